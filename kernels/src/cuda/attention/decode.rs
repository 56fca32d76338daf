//! Attention of steps with one row a sequence: the sequence is split over blocks, and the last block to arrive joins
//! what they found, so that one launch does all.

use std::sync::Arc;

use millrace_ir::{Bindings, Dim};

use super::call::Call;
use super::single_rows;
use super::split::{self, CLASSES, CONTEXTS, MAX_ROWS, Split};
use crate::cuda::matmul::Choices;
use crate::cuda::plan::{Argument, Planned, SiteLaunch, SiteVariant, between};
use crate::cuda::rope::BeforeAttention;
use crate::cuda::source::{Promise, Source};

/// Fewest threads of a block.
pub(super) const THREADS: u32 = 128;

/// Most parts of a row that are joined through memory.
const MAX_PARTS: u64 = 128;

/// Most bytes of counters of rows whose heads are joined as one.
const MAX_COUNTERS: u64 = 1 << 20;

/// A choice: its key, and the splits there are, the built-in one first.
pub(super) type Choice = (String, Vec<Split>);

/// Blocks along the second axis of a grid: groups of query heads that share a key head.
fn columns(call: &Call<'_>) -> u64 {
    (call.kv_heads * call.group().div_ceil(split::head_block(call))) as u64
}

/// Most sequences of a step that a call may have here.
fn most_rows(call: &Call<'_>) -> Option<u64> {
    let most = call.b.extent(&Bindings::maxima(&call.site.module.dims))?;
    Some(most.min(MAX_ROWS).min(MAX_COUNTERS / 4 / columns(call)))
}

/// Numbers of sequences of each class that the call may have.
fn classes(call: &Call<'_>) -> Vec<(&'static split::Class, u64, u64)> {
    let Some(most_rows) = most_rows(call) else { return Vec::new() };
    let mut least = 0;
    let mut found = Vec::new();
    for class in &CLASSES {
        let most = class.most.min(most_rows);
        if most >= least {
            found.push((class, least, most));
            least = most + 1;
        }
    }
    found
}

/// All choices of a call; `fused` if its launch also rotates and writes the cache.
pub(super) fn choices(call: &Call<'_>, fused: bool) -> Vec<Choice> {
    let of = |(class, least, _): (&split::Class, u64, u64)| {
        CONTEXTS.map(|contexts| {
            let key = split::key(call, fused, (least, class.most), contexts);
            (key, split::candidates(call, class, contexts))
        })
    };
    classes(call).into_iter().flat_map(of).collect()
}

fn source(call: &Call<'_>, before: Option<&BeforeAttention<'_>>, split: &Split) -> Arc<Source> {
    let writer = match before {
        Some(before) => before.angles(call.source("cuda.attention.layer_decode").line("#define FUSED 1")),
        None => call.source("cuda.attention.decode").line("#define FUSED 0"),
    };
    let head_block = split::head_block(call);
    writer
        .int("HEAD_BLOCK", head_block)
        .int("HEAD_BLOCKS", call.group().div_ceil(head_block))
        .int("MIN_CHUNK", split.min_chunk)
        .int("ONE_CLUSTER", split.one_cluster)
        .int("MIN_BLOCKS", split.blocks)
        .int("WARPS", split.warps)
        .int("GRAIN", split.grain)
        .line(&format!("constexpr bool HEADS_FIRST = {};", split.heads_first))
        .line(&format!("#define CLUSTER {}", split.cluster))
        .line(&format!("#define STAGES {}", split.stages))
        .line(&format!("#define FETCH {}", split.fetch))
        .body(include_str!("decode_cache.cu"))
        .body(include_str!("decode_rotate.cu"))
        .body(include_str!("decode_join.cu"))
        .body(include_str!("decode.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish()
}

/// The variants for steps of one row a sequence, without one for the rest. With `before`, the kernels rotate queries and
/// keys and write the cache themselves. `choices` replace what is built in.
pub(super) fn plan(
    call: &Call<'_>,
    before: Option<&BeforeAttention<'_>>,
    choices: &Choices,
) -> Option<Planned> {
    let paged = call.paged.as_ref()?;
    let columns = columns(call);
    let page = paged.tokens_per_block as u64;
    let context = paged.width.mul(&paged.tokens_per_block.into());
    let longest = context.extent(&Bindings::maxima(&call.site.module.dims)).unwrap_or(u64::MAX);
    let mut variants = Vec::new();
    let (mut workspace, mut counters) = (Dim::from(0u64), 0);
    for (class, least, most) in classes(call) {
        let mut add = |split: Split, width: Option<(u64, u64)>| {
            let (launch, bytes) = launch(call, before, &split, &context, (least, most));
            workspace = workspace.max_of(&bytes);
            // One for each row, and slice of its heads that blocks of a cluster join.
            counters = counters.max(most * columns * split.cluster.min(split::head_block(call) as u64) * 4);
            let mut when = single_rows(call, least, most);
            when.extend(width.map(|(first, last)| between(&paged.width, first, last)));
            variants.push(SiteVariant::new(when, vec![launch]));
        };
        let short = split::built_in(call, class, CONTEXTS[0]);
        for contexts in CONTEXTS.into_iter().filter(|(first, _)| *first <= longest) {
            let key = split::key(call, before.is_some(), (least, class.most), contexts);
            let of_name = |name: &str| {
                split::candidates(call, class, contexts).into_iter().find(|split| split.name() == name)
            };
            let chosen = choices.get(&key).and_then(of_name);
            let split = chosen.unwrap_or_else(|| split::built_in(call, class, contexts));
            if split != short {
                // A table's room is its width in pages.
                let last = if contexts.1 == u64::MAX { u64::MAX } else { contexts.1 / page };
                add(split, Some((contexts.0.div_ceil(page), last)));
            }
        }
        add(short, None);
    }
    Some(Planned { variants, streamed: Vec::new(), workspace, counters })
}

/// The launch of a split for `least` to `most` sequences, and its bytes of workspace.
fn launch(
    call: &Call<'_>,
    before: Option<&BeforeAttention<'_>>,
    split: &Split,
    context: &Dim,
    (least, most): (u64, u64),
) -> (SiteLaunch, Dim) {
    let columns = columns(call);
    // A class without end is split as its smallest members' double.
    let rows = most.min(2 * least).max(1);
    let Split { cluster, percent, blocks, .. } = *split;
    let resident = u64::from(call.site.arch.multiprocessors()) * blocks;
    let parts = resident * percent / 100 / cluster / (columns * rows);
    let parts = parts.clamp(4u64.div_ceil(cluster), MAX_PARTS);
    let keys = if cluster > 1 { split.one_cluster } else { split.min_chunk };
    let parts = context.ceil_div((keys as u64 * cluster) as i64).min_of(&Dim::from(parts));
    let part = (columns as usize * split::head_block(call) * (call.d + 4) * 4) as u64;
    let bytes = call.b.min_of(&Dim::from(most)).mul(&parts).mul(&Dim::from(part));
    let mut args = call.joined_arguments();
    args.extend(call.paged.as_ref().map(|paged| Argument::I32(paged.pages.clone())));
    if let Some(before) = before {
        args[0] = Argument::Address(before.q);
        args.extend([before.k, before.v, before.positions].map(Argument::Address));
    }
    let grid = [parts.mul(&cluster.into()), columns.into(), call.t.clone()];
    let mut launch = SiteLaunch::new(source(call, before, split), grid, split.warps as u32 * 32).args(args);
    launch.cluster = cluster as u32;
    launch.shared = split.shared(call.d) as u32;
    launch.dependent = true;
    (launch, bytes)
}
