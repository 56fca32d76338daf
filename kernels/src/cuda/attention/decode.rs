//! Attention of steps with one row a sequence: the sequence is split over blocks, and the last block to arrive joins
//! what they found, so that one launch does all.

use millrace_ir::{Bindings, Dim};

use super::call::Call;
use super::single_rows;
use crate::cuda::plan::{Argument, Planned, SiteLaunch, SiteVariant};
use crate::cuda::source::Promise;

/// Threads of a block.
const THREADS: u32 = 128;

/// Fewest keys of a block's range.
const MIN_CHUNK: usize = 64;

/// Most ranges of a row.
const MAX_SPLITS: u64 = 128;

/// Most blocks along the second axis of a grid.
const MAX_ROWS: u64 = 65535;

/// Most bytes of counters.
const MAX_COUNTERS: u64 = 1 << 20;

/// Numbers of sequences at which the split changes: a range ends with each.
const CLASSES: [u64; 6] = [1, 2, 4, 8, 16, MAX_ROWS];

/// The variants for steps of one row a sequence, without one for the rest.
pub(super) fn plan(call: &Call<'_>) -> Option<Planned> {
    let paged = call.paged.as_ref()?;
    let module = call.site.module;
    // Wide heads leave registers for eight of them only.
    let head_block = call.group().min(if call.d > 128 { 8 } else { 16 });
    let columns = (call.kv_heads * call.group().div_ceil(head_block)) as u64;
    let most_rows =
        call.b.extent(&Bindings::maxima(&module.dims))?.min(MAX_ROWS).min(MAX_COUNTERS / 4 / columns);
    let min_blocks = if head_block > 8 || call.d > 128 { 2 } else { 3 };
    let source = call
        .source("cuda.attention.decode")
        .int("HEAD_BLOCK", head_block)
        .int("HEAD_BLOCKS", call.group().div_ceil(head_block))
        .int("MIN_CHUNK", MIN_CHUNK)
        .int("MAX_SPLITS", MAX_SPLITS)
        .int("MIN_BLOCKS", min_blocks)
        .body(include_str!("decode.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish();

    let context = paged.width.mul(&paged.tokens_per_block.into());
    // One range more than the context fills: a window's first tile may begin before the window.
    let needed = context.ceil_div(MIN_CHUNK as i64);
    let resident = u64::from(call.site.arch.multiprocessors()) * min_blocks;
    let mut variants = Vec::new();
    let mut workspace = Dim::from(0u64);
    let mut least = 0;
    for most in CLASSES.map(|c| c.min(most_rows)) {
        if most < least {
            continue;
        }
        // All blocks of one or two sequences run at once; more sequences may differ in length, so their ranges are
        // shorter.
        let waves = if most <= 2 { 1 } else { 4 };
        let rows = if most == MAX_ROWS || most == most_rows { most.min(least.max(1) * 2) } else { most };
        let splits = (resident * waves / (columns * rows.max(1))).clamp(4, MAX_SPLITS);
        let splits = needed.min_of(&Dim::from(splits));
        let part = (call.heads * (call.d + 2) * 4) as u64;
        let bytes = call.b.min_of(&Dim::from(most)).mul(&splits).mul(&Dim::from(part));
        workspace = workspace.max_of(&bytes);
        let mut args = call.arguments();
        // The kernel takes the table's width last.
        args.retain(|a| !matches!(a, Argument::I32(_)));
        args.extend([Argument::Workspace(0u64.into()), Argument::Counters(0)]);
        args.extend([Argument::I32(call.b.clone()), Argument::I32(paged.width.clone())]);
        let mut launch =
            SiteLaunch::new(source.clone(), [columns.into(), call.t.clone(), splits], THREADS).args(args);
        launch.dependent = true;
        variants.push(SiteVariant { when: single_rows(call, least, most), launches: vec![launch] });
        least = most + 1;
    }
    Some(Planned { variants, workspace, counters: most_rows * columns * 4 })
}
