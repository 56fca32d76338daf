//! Attention of steps with one row a sequence: the sequence is split over blocks, and the last block to arrive joins
//! what they found, so that one launch does all.

use millrace_ir::{Bindings, Dim};

use super::call::Call;
use super::single_rows;
use crate::cuda::plan::{Argument, Planned, SiteLaunch, SiteVariant};
use crate::cuda::rope::BeforeAttention;
use crate::cuda::source::Promise;

/// Threads of a block.
pub(super) const THREADS: u32 = 128;

/// Most parts of a row that are joined through memory.
const MAX_PARTS: u64 = 128;

/// Most blocks along the third axis of a grid.
const MAX_ROWS: u64 = 65535;

/// Most bytes of counters.
const MAX_COUNTERS: u64 = 1 << 20;

/// How steps of up to some number of sequences are split.
struct Class {
    /// Most sequences.
    most: u64,
    /// Blocks of a cluster, where the architecture has clusters.
    cluster: u64,
    /// Fewest keys of a block's range.
    min_chunk: usize,
    /// Keys of a block's range up to which a row takes one cluster only.
    one_cluster: usize,
    /// Blocks in all, in hundredths of what a device holds at once.
    percent: u64,
}

/// Clusters shorten the way of few rows, as many as run at once: they do not fill a device to the last block. Many rows
/// need no splitting until contexts are long, and more blocks than run at once, since they may differ in length.
const CLASSES: [Class; 6] = [
    Class { most: 1, cluster: 8, min_chunk: 64, one_cluster: 128, percent: 85 },
    Class { most: 2, cluster: 8, min_chunk: 64, one_cluster: 128, percent: 85 },
    Class { most: 4, cluster: 4, min_chunk: 64, one_cluster: 256, percent: 85 },
    Class { most: 8, cluster: 4, min_chunk: 64, one_cluster: 1024, percent: 260 },
    Class { most: 16, cluster: 1, min_chunk: 256, one_cluster: 256, percent: 260 },
    Class { most: MAX_ROWS, cluster: 1, min_chunk: 1024, one_cluster: 1024, percent: 260 },
];

/// The variants for steps of one row a sequence, without one for the rest. With `before`, the kernels rotate queries and
/// keys and write the cache themselves.
pub(super) fn plan(call: &Call<'_>, before: Option<&BeforeAttention<'_>>) -> Option<Planned> {
    let paged = call.paged.as_ref()?;
    let module = call.site.module;
    // Wide heads leave registers for eight of them only.
    let head_block = call.group().min(if call.d > 128 { 8 } else { 16 });
    let columns = (call.kv_heads * call.group().div_ceil(head_block)) as u64;
    let most_rows =
        call.b.extent(&Bindings::maxima(&module.dims))?.min(MAX_ROWS).min(MAX_COUNTERS / 4 / columns);
    let min_blocks: u64 = match call.d {
        _ if head_block > 8 => 2,
        0..=64 => 5,
        65..=128 => 3,
        _ => 2,
    };
    let source = |cluster: u64, min_chunk: usize, one_cluster: usize| {
        let writer = match before {
            Some(before) => before.angles(call.source("cuda.attention.layer_decode").line("#define FUSED 1")),
            None => call.source("cuda.attention.decode").line("#define FUSED 0"),
        };
        writer
            .int("HEAD_BLOCK", head_block)
            .int("HEAD_BLOCKS", call.group().div_ceil(head_block))
            .int("MIN_CHUNK", min_chunk)
            .int("ONE_CLUSTER", one_cluster)
            .int("MIN_BLOCKS", min_blocks)
            .line(&format!("#define CLUSTER {cluster}"))
            .body(include_str!("decode.cu"))
            .promise(Promise { registers: 0, no_local: true })
            .finish()
    };
    let context = paged.width.mul(&paged.tokens_per_block.into());
    let clusters = call.site.arch.has_tma();
    let resident = u64::from(call.site.arch.multiprocessors()) * min_blocks;
    let mut variants = Vec::new();
    let mut workspace = Dim::from(0u64);
    let mut least = 0;
    for Class { most, cluster, min_chunk, one_cluster, percent } in CLASSES {
        let most = most.min(most_rows);
        if most < least {
            continue;
        }
        // A class without end is split as its smallest members' double.
        let rows = most.min(2 * least).max(1);
        let cluster = if clusters { cluster } else { 1 };
        let parts = resident * percent / 100 / cluster / (columns * rows);
        let parts = parts.clamp(4u64.div_ceil(cluster), MAX_PARTS);
        let source = source(cluster, min_chunk, one_cluster);
        let keys = if cluster > 1 { one_cluster } else { min_chunk };
        let parts = context.ceil_div((keys as u64 * cluster) as i64).min_of(&Dim::from(parts));
        let part = (columns as usize * head_block * (call.d + 4) * 4) as u64;
        let bytes = call.b.min_of(&Dim::from(most)).mul(&parts).mul(&Dim::from(part));
        workspace = workspace.max_of(&bytes);
        let mut args = call.arguments();
        // The kernel takes all numbers last.
        args.retain(|a| !matches!(a, Argument::I32(_)));
        args.extend([Argument::Workspace(0u64.into()), Argument::Counters(0)]);
        args.extend([&call.b, &paged.width, &paged.pages].map(|dim| Argument::I32(dim.clone())));
        if let Some(before) = before {
            args[0] = Argument::Address(before.q);
            args.extend([before.k, before.v, before.positions].map(Argument::Address));
        }
        let mut launch =
            SiteLaunch::new(source, [parts.mul(&cluster.into()), columns.into(), call.t.clone()], THREADS)
                .args(args);
        launch.cluster = cluster as u32;
        launch.dependent = true;
        variants.push(SiteVariant::new(single_rows(call, least, most), vec![launch]));
        least = most + 1;
    }
    Some(Planned { variants, streamed: Vec::new(), workspace, counters: most_rows * columns * 4 })
}
