//! Attention with one warp a row and head: every element type and head size, plain arithmetic in f32.

use super::call::Call;
use crate::cuda::plan::{Argument, SiteLaunch};
use crate::cuda::source::Promise;

/// Warps of a block; `WARPS` of the kernel.
const WARPS: usize = 4;

/// The launch for every shape.
pub(super) fn launch(call: &Call<'_>) -> SiteLaunch {
    // With head sizes that do not fill the lanes the compiler may keep a few bytes in local memory.
    let promise = Promise { registers: 0, no_local: call.d.is_multiple_of(32) };
    let source =
        call.source("cuda.attention.simple").body(include_str!("simple.cu")).promise(promise).finish();
    let tasks = call.t.mul(&call.heads.into());
    let mut launch =
        SiteLaunch::new(source, [tasks.ceil_div(WARPS as i64), 1u64.into(), 1u64.into()], 32 * WARPS as u32)
            .args(call.arguments())
            .args([Argument::I32(call.t.clone()), Argument::I32(call.b.clone())]);
    launch.dependent = true;
    launch
}
