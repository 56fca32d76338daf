//! Matmuls of at most 64 rows: a stream of weights through shared memory under as much else as can be hidden.
//!
//! The time of such a matmul is the time to read its weight, so a kernel keeps many bytes of it in flight on every
//! multiprocessor, and starts to before its predecessor ends. Terms: a *panel* is eight rows of the weight, a *tile* the
//! panels that a block sums up at a time, a *chunk* the columns of one stage of the ring, a *split* the number of blocks,
//! one cluster, among which the columns of a tile are divided.

use millrace_ir::DType;
use millrace_ir::Dim;

use super::epilogue::{arguments, computes, declare, locate_panels};
use super::norm;
use super::problem::{Layout, Problem};
use crate::cuda::arch::Arch;
use crate::cuda::plan::{Argument, SiteLaunch, SiteVariant, between};
use crate::cuda::source::{Promise, SourceWriter};

/// Ranges of rows that have kernels of their own, first and last.
const RANGES: [(u64, u64); 6] = [(0, 1), (2, 8), (9, 16), (17, 32), (33, 48), (49, 64)];

/// Most rows of the family.
pub const MAX_ROWS: u64 = RANGES[RANGES.len() - 1].1;

/// Shape of the blocks of one kernel; the constants of `skinny.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Panels of a tile.
    pub tile: usize,
    /// Ways in which warps divide the panels of a tile.
    pub warps_n: usize,
    /// Ways in which warps divide the columns of a chunk.
    pub warps_k: usize,
    /// Most rows of x, a multiple of 8.
    pub columns: usize,
    /// Columns of a chunk.
    pub chunk: usize,
    /// Stages of the ring.
    pub stages: usize,
    /// Blocks of a cluster.
    pub split: usize,
    /// Rows of x that lie in shared memory as a whole; 0 where x goes through the ring.
    pub whole: usize,
    /// Whether the kernel normalises x.
    pub norm: bool,
    /// Tiles of the busiest block.
    pub passes: usize,
    /// Blocks of the grid.
    pub blocks: usize,
}

impl Shape {
    /// Whether sums lie over the ring, which no copy writes any more when they are known.
    fn alias(&self) -> bool {
        self.passes == 1 && self.columns > 8
    }

    fn stage_bytes(&self) -> usize {
        let x = if self.whole > 0 { 0 } else { self.columns * self.chunk * 2 };
        self.tile * self.chunk * 16 + x
    }

    fn sum_bytes(&self) -> usize {
        let columns = if self.whole > 0 { self.whole } else { self.columns };
        self.warps_k * columns * (self.tile * 8 + 4) * 4
    }

    /// Bytes of shared memory, as `skinny.cu` divides it.
    pub fn shared(&self, k: usize) -> usize {
        let chunks = k.div_ceil(self.chunk);
        let x = self.whole * (chunks.div_ceil(self.split) * self.chunk * 2 + 16);
        let norm = if self.norm { (k * 2).next_multiple_of(16) } else { 0 };
        let sums = if self.alias() { 0 } else { self.sum_bytes() };
        self.stages * (self.stage_bytes() + 16) + x + norm + sums + 128
    }

    /// Threads of a block: the warps that multiply and the one that copies.
    pub fn threads(&self) -> usize {
        (self.warps_n * self.warps_k + 1) * 32
    }

    /// Accumulators of a thread.
    fn accumulators(&self) -> usize {
        (self.tile / self.warps_n).div_ceil(2) * self.columns / 2
    }
}

/// Bytes of the ring: what is in flight on a multiprocessor. Two blocks fit side by side, so that the next launch fills
/// its ring while this one ends.
const RING: usize = 96 << 10;

/// The largest x that lies in shared memory as a whole.
const WHOLE: usize = 66 << 10;

/// The shape for at most `rows` rows, or `None` where nothing fits the architecture's shared memory.
pub fn shape(problem: &Problem<'_>, rows: usize) -> Option<Shape> {
    let (k, panels) = (problem.k, problem.panels());
    let unit = if problem.gated() { 2 } else { 1 };
    let sms = problem.site.arch.multiprocessors() as usize;
    let columns = rows.next_multiple_of(8);
    let x_rows = if rows == 1 { 1 } else { columns };
    let few = columns == 8;
    // The ring of an architecture with little shared memory is short, and x then goes through it.
    let ring = RING.min(problem.site.arch.max_shared() as usize / 2);
    let room = problem.site.arch.max_shared() as usize - ring;
    let fits_whole = few && x_rows * k * 2 <= WHOLE.min(room.saturating_sub(k * 2 + (12 << 10)));
    let whole = if fits_whole { x_rows } else { 0 };
    let norm = problem.norm.is_some() && whole > 0;
    let mut best: Option<((usize, usize), Shape)> = None;
    let mut consider = |tile: usize, warps: (usize, usize), chunk: usize, split: usize| {
        let tiles = panels.div_ceil(tile);
        let passes = (tiles * split).div_ceil(sms);
        let parts = split == 1 || (passes == 1 && !norm && k.div_ceil(chunk) >= 2 * split);
        if !tile.is_multiple_of(warps.0 * unit) || !parts {
            return;
        }
        let mut shape = Shape {
            tile,
            warps_n: warps.0,
            warps_k: warps.1,
            columns,
            chunk,
            stages: 0,
            split,
            whole,
            norm,
            passes,
            blocks: tiles.div_ceil(passes) * split,
        };
        shape.stages = (ring / shape.stage_bytes()).max(2);
        let over = shape.sum_bytes() > shape.stages * shape.stage_bytes();
        let fits = shape.shared(k) <= problem.site.arch.max_shared() as usize;
        if !fits || shape.alias() && over || shape.accumulators() > 32 {
            return;
        }
        // Weights that the busiest block reads, and x that it reads along with them.
        let panels = passes * tile * 64 / split;
        let x = if whole > 0 { 0 } else { passes * columns * 16 / split };
        let key = (panels + x, usize::MAX - tile);
        if best.is_none_or(|(known, _)| key < known) {
            best = Some((key, shape));
        }
    };
    let splits: &[usize] = if problem.site.arch.has_tma() { &[1, 2, 4, 8] } else { &[1] };
    for split in splits {
        if few {
            (1..=8).for_each(|tile| consider(tile, (1, 8), 256, *split));
            continue;
        }
        for (warps_n, warps_k) in [(8, 1), (7, 1), (6, 1), (4, 2)] {
            (1..=4).for_each(|each| consider(warps_n * each, (warps_n, warps_k), 64, *split));
        }
    }
    best.map(|(_, shape)| shape)
}

/// Whether the family serves the problem.
fn serves(problem: &Problem<'_>) -> bool {
    problem.layout == Layout::Cores
        && matches!(problem.dtype, DType::BF16 | DType::F16)
        && computes(problem.out)
        && problem.k.is_multiple_of(8)
        && problem.k > 0
}

/// The variants for up to [`MAX_ROWS`] rows, each with its condition; empty where another family must serve.
pub fn variants(problem: &Problem<'_>) -> Vec<SiteVariant> {
    if !serves(problem) {
        return Vec::new();
    }
    let one = |(first, last): (u64, u64)| {
        let shape = shape(problem, last as usize)?;
        let mut launches = vec![launch(problem, &shape)?];
        if !shape.norm {
            launches.splice(0..0, norm::launch(problem));
        }
        Some(SiteVariant { when: vec![between(&problem.m, first, last)], launches })
    };
    RANGES.into_iter().filter_map(one).collect()
}

/// The launch of one shape.
pub fn launch(problem: &Problem<'_>, shape: &Shape) -> Option<SiteLaunch> {
    let norm = problem.norm.filter(|_| shape.norm);
    let shared = shape.shared(problem.k);
    let parameter = if norm.is_some() { "const T *norm_weight," } else { "" };
    // Two blocks on a multiprocessor, unless their sums need more registers than half of it has.
    let blocks = if shape.accumulators() > 24 { 1 } else { 2 };
    let writer = SourceWriter::new("cuda.matmul.skinny")
        .int("K", problem.k)
        .int("PANELS", problem.panels())
        .int("TILE", shape.tile)
        .int("WARPS_N", shape.warps_n)
        .int("WARPS_K", shape.warps_k)
        .int("COLUMNS", shape.columns)
        .int("CHUNK", shape.chunk)
        .int("STAGES", shape.stages)
        .int("SPLIT", shape.split)
        .int("WHOLE", i32::from(shape.whole > 0))
        .int("X_ROWS", shape.whole.max(1))
        .int("NORM", i32::from(norm.is_some()))
        .int("GATED", i32::from(problem.gated()))
        .int("ALIAS", i32::from(shape.alias()))
        .int("RELEASE", 0)
        .int("BLOCKS", blocks)
        .int("EXPECTED_SHARED", shared)
        .line(&format!("#define NORM_ON {}", i32::from(norm.is_some())))
        .line(&format!("#define NORM_PARAMETER {parameter}"))
        .float("EPS", norm.map_or(0.0, |n| n.eps));
    let writer = locate_panels(declare(writer, problem)?, problem).body(include_str!("skinny.cu"));
    let source = writer.promise(Promise { registers: 0, no_local: true }).finish();
    let one = Dim::from(1u64);
    let x = norm.map_or(problem.x, |n| n.x);
    let mut launch =
        SiteLaunch::new(source, [Dim::from(shape.blocks), one.clone(), one], shape.threads() as u32)
            .args([Argument::Address(x), Argument::Address(problem.weight)])
            .args(norm.map(|n| Argument::Address(n.weight)))
            .args(arguments(problem))
            .args([Argument::I32(problem.m.clone())]);
    launch.cluster = shape.split as u32;
    launch.shared = u32::try_from(shared).ok()?;
    launch.dependent = problem.site.arch.has_tma();
    debug_assert!(problem.site.arch != Arch::Sm80 || launch.cluster == 1);
    Some(launch)
}

#[cfg(test)]
#[path = "skinny_tests.rs"]
mod tests;
