//! Attention of any mix of sequences on Hopper, for heads of 64 or 128 elements.

use millrace_ir::{DType, Dim};

use super::call::Call;
use crate::cuda::plan::{Argument, SiteLaunch};
use crate::cuda::source::Promise;

/// Query rows of a tile; `ROWS` of the kernel.
const ROWS: usize = 128;

/// Keys of a step; `BN` of the kernel.
const KEYS: usize = 128;

/// Threads of a block: a group that copies and two that compute.
const THREADS: u32 = 384;

/// Bytes of counters: tiles taken, and blocks that ended.
pub(super) const COUNTERS: u64 = 8;

/// The launch for every shape, if architecture and head size allow it.
pub(super) fn launch(call: &Call<'_>) -> Option<SiteLaunch> {
    if !call.site.arch.has_wgmma() || !matches!(call.d, 64 | 128) {
        return None;
    }
    let element = if call.dtype == DType::BF16 { "bf16" } else { "f16" };
    let source = call
        .source("cuda.attention.hopper")
        .line(&format!("#define ELEMENT \"{element}\""))
        .body(include_str!("hopper.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish();
    // Each sequence begins a tile of its own.
    let tiles = call.t.ceil_div(ROWS as i64).add(&call.b);
    let items = tiles.mul(&Dim::from(call.heads));
    let blocks = items.min_of(&Dim::from(u64::from(call.site.arch.multiprocessors())));
    let mut launch = SiteLaunch::new(source, [blocks, Dim::from(1u64), Dim::from(1u64)], THREADS)
        .args(call.arguments())
        .args([Argument::Counters(0), Argument::I32(call.b.clone()), Argument::I32(tiles)]);
    // Tiles are aligned to 1024 bytes.
    launch.shared = ((ROWS + 4 * KEYS) * call.d * 2 + 1024) as u32;
    launch.dependent = true;
    Some(launch)
}
