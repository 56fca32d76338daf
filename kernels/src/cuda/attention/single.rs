//! Attention of steps with one row a sequence in plain f32 arithmetic: the sequence is split over blocks, and the last block
//! to arrive joins what they found. For what tensor cores do not take: f32, and heads of uncommon sizes.

use millrace_ir::{Bindings, Dim};

use super::call::Call;
use super::single_rows;
use crate::cuda::plan::{Planned, SiteLaunch, SiteVariant};
use crate::cuda::source::Promise;

/// Warps of a block; `WARPS` of the kernel.
const WARPS: usize = 4;

/// Blocks that a multiprocessor holds; `MIN_BLOCKS` of the kernel.
const BLOCKS: u64 = 3;

/// Most sequences of a launch, by number of parts: more sequences leave less to divide.
const CLASSES: [u64; 4] = [1, 4, 16, 65535];

/// Fewest keys of a part; `MIN_CHUNK` of the kernel.
const MIN_CHUNK: usize = 32;

/// Most parts of a row.
const MAX_PARTS: u64 = 64;

/// Most bytes of counters.
const MAX_COUNTERS: u64 = 1 << 20;

/// The variants for steps of one row a sequence, in increasing order of sequences; none for heads of more than 256 elements or
/// of no whole pieces of four, and without a cache.
pub(super) fn plan(call: &Call<'_>) -> Option<Planned> {
    let paged = call.paged.as_ref()?;
    if call.d > 256 || !call.d.is_multiple_of(4) {
        return None;
    }
    let mut planned = Planned::none();
    let lanes = (call.d / 4).next_power_of_two().min(32);
    let pieces = (call.d / 4).div_ceil(lanes);
    let head_blocks = call.group().div_ceil(8 / pieces);
    let head_block = call.group().div_ceil(head_blocks);
    let columns = (call.kv_heads * head_blocks) as u64;
    let source = call
        .source("cuda.attention.single")
        .int("WARPS", WARPS)
        .int("MIN_BLOCKS", BLOCKS)
        .int("LANES", lanes)
        .int("DEPTH", 4 / pieces)
        .int("MIN_CHUNK", MIN_CHUNK)
        .int("HEAD_BLOCK", head_block)
        .int("HEAD_BLOCKS", head_blocks)
        .line("#define CLUSTER 1")
        .body(include_str!("decode_join.cu"))
        .body(include_str!("single.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish();
    let context = paged.width.mul(&paged.tokens_per_block.into());
    let room = call.b.extent(&Bindings::maxima(&call.site.module.dims)).unwrap_or(u64::MAX);
    let room = room.min(MAX_COUNTERS / 4 / columns);
    let mut least = 0;
    for most in CLASSES.map(|most| most.min(room)) {
        if most < least {
            break;
        }
        let resident = u64::from(call.site.arch.multiprocessors()) * BLOCKS;
        // A class is split for its largest steps, one that is wide for twice its smallest.
        let parts = (resident / (columns * most.min(2 * least.max(1)))).clamp(1, MAX_PARTS);
        let parts = context.ceil_div(MIN_CHUNK as i64).min_of(&Dim::from(parts));
        let part = (columns as usize * head_block * (call.d + 4) * 4) as u64;
        let bytes = call.b.min_of(&Dim::from(most)).mul(&parts).mul(&Dim::from(part));
        planned.workspace = planned.workspace.max_of(&bytes);
        planned.counters = planned.counters.max(most * columns * 4);
        let grid = [parts, columns.into(), call.t.clone()];
        let mut launch =
            SiteLaunch::new(source.clone(), grid, 32 * WARPS as u32).args(call.joined_arguments());
        launch.dependent = true;
        planned.variants.push(SiteVariant::new(single_rows(call, least, most), vec![launch]));
        least = most + 1;
    }
    Some(planned)
}
