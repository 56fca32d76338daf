//! Attention of any mix of sequences with the tensor cores: tiles of query rows, an online softmax, no score in memory.

use millrace_ir::Dim;

use super::call::Call;
use crate::cuda::plan::{Argument, SiteLaunch};
use crate::cuda::source::Promise;

/// Warps of a block; `WARPS` of the kernel.
const WARPS: usize = 4;

/// Tile sizes of one architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// Tiles of 16 query rows a warp.
    pub row_tiles: usize,
    /// Keys of one step.
    pub keys: usize,
    /// Bytes of shared memory.
    pub shared: usize,
    /// Blocks that share a multiprocessor.
    pub blocks: usize,
}

impl Tile {
    /// Query rows of a block.
    pub fn rows(self) -> usize {
        WARPS * self.row_tiles * 16
    }

    /// The tile for heads of `d` elements where a multiprocessor has `memory` bytes: the most keys of which two blocks
    /// fit, else one.
    pub fn of(d: usize, memory: usize) -> Option<Tile> {
        let row_tiles = if d <= 128 { 2 } else { 1 };
        let stride = ((d.div_ceil(16) * 2) | 1) * 16;
        [2, 1].into_iter().find_map(|blocks| {
            // Wider steps do not fit into registers.
            let most = if d <= 96 { 64 } else { 32 };
            [64, 32, 16].into_iter().filter(|keys| *keys <= most).find_map(|keys| {
                let shared = (WARPS * row_tiles * 16 + 4 * keys) * stride + 4 * keys * 4;
                // A block needs a kibibyte of its own.
                let fits = shared <= memory && blocks * (shared + 1024) <= memory + 1024;
                fits.then_some(Tile { row_tiles, keys, shared, blocks })
            })
        })
    }
}

/// The launch for every shape.
pub(super) fn launch(call: &Call<'_>) -> SiteLaunch {
    // Every head size up to 256 fits into the smallest memory.
    let tile = Tile::of(call.d, call.site.arch.max_shared() as usize).unwrap_or(Tile {
        row_tiles: 1,
        keys: 16,
        shared: 0,
        blocks: 1,
    });
    let source = call
        .source("cuda.attention.prefill")
        .int("MT", tile.row_tiles)
        .int("BN", tile.keys)
        .int("MIN_BLOCKS", tile.blocks)
        .body(include_str!("prefill.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish();
    // Each sequence begins a tile of its own.
    let tiles = call.t.ceil_div(tile.rows() as i64).add(&call.b);
    let mut launch =
        SiteLaunch::new(source, [Dim::from(call.heads), tiles, Dim::from(1u64)], 32 * WARPS as u32)
            .args(call.arguments())
            .args([Argument::I32(call.b.clone())]);
    launch.shared = tile.shared as u32;
    launch.dependent = true;
    launch
}
