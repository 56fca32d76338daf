//! Attention of any mix of sequences in plain f32 arithmetic: tiles of query rows share keys and values in shared memory.

use millrace_ir::Dim;

use super::call::Call;
use crate::cuda::plan::{Argument, SiteLaunch};
use crate::cuda::source::Promise;

/// Warps of a block; `WARPS` of the kernel.
const WARPS: usize = 4;

/// Query rows of a tile; `ROWS` of the kernel.
const ROWS: usize = 32;

/// Keys of a step; `KEYS` of the kernel.
const KEYS: usize = 32;

/// The launch for every shape, for heads of up to 128 elements.
pub(super) fn launch(call: &Call<'_>) -> Option<SiteLaunch> {
    let d = call.d;
    if d > 128 || !d.is_multiple_of(4) {
        return None;
    }
    let source = call
        .source("cuda.attention.plain")
        .body(include_str!("plain.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish();
    // Each sequence begins a tile of its own.
    let tiles = call.t.ceil_div(ROWS as i64).add(&call.b);
    let mut launch =
        SiteLaunch::new(source, [Dim::from(call.heads), tiles, Dim::from(1u64)], 32 * WARPS as u32)
            .args(call.arguments())
            .args([Argument::I32(call.b.clone())]);
    launch.shared = (4 * (ROWS * d + KEYS * (d + 4) + KEYS * d + ROWS * KEYS)) as u32;
    launch.dependent = true;
    Some(launch)
}
