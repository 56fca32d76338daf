//! Matmuls of at most 64 rows: a stream of weights through shared memory under as much else as can be hidden.
//!
//! The time of such a matmul is the time to read its weight, so a kernel keeps many bytes of it in flight on every
//! multiprocessor, and starts to before its predecessor ends. Terms: a *panel* is eight rows of the weight, a *tile* the
//! panels that a block sums up at a time, a *chunk* the columns of one stage of the ring.

use millrace_ir::launch::{MapBase, TensorMap, tile_first};
use millrace_ir::{DType, Dim, Operand};

use super::epilogue::{arguments, computes, declare, locate_panels, touch};
use super::norm;
use super::problem::{Layout, Problem};
use crate::cuda::plan::{Argument, SiteLaunch, SiteVariant, between};
use crate::cuda::source::{Promise, SourceWriter};

/// Ranges of rows that have kernels of their own, first and last.
const RANGES: [(u64, u64); 7] = [(0, 1), (2, 4), (5, 8), (9, 16), (17, 32), (33, 48), (49, 64)];

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
    /// Rows of x that lie in shared memory as a whole; 0 where x goes through the ring.
    pub whole: usize,
    /// Whether the kernel normalises x: where it lies in shared memory before it is multiplied, elsewhere afterwards.
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
        let x = self.whole * (chunks * self.chunk * 2 + 16);
        let norm = if self.norm { (k * 2).next_multiple_of(16) } else { 0 };
        let sums = if self.alias() { 0 } else { self.sum_bytes() };
        let squares = if self.after() { self.warps_k * self.columns * 4 } else { 0 };
        self.stages * (self.stage_bytes() + 16) + x + norm + sums + 128 + squares
    }

    /// Whether rows are multiplied with the norm's weight alone, and their results with what their squares tell.
    pub fn after(&self) -> bool {
        self.norm && self.whole == 0
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

/// Most bytes of the ring. One block fills a multiprocessor, so that blocks spread evenly and the blocks of the next
/// launch, which begin as those of this one end, have much to fetch while they wait.
const RING: usize = 192 << 10;

/// Most bytes of rows to normalise in shared memory.
const WHOLE: usize = 66 << 10;

/// By how much of the least work of the busiest block a tile may exceed it to be larger.
const TOLERANCE: f64 = 1.05;

/// The shape for at most `rows` rows, or `None` where nothing fits the architecture's shared memory.
pub fn shape(problem: &Problem<'_>, rows: usize) -> Option<Shape> {
    shapes(problem, rows).into_iter().next()
}

/// Shapes for at most `rows` rows, the best by the model first: least work of the busiest block, then what suits warps.
pub fn shapes(problem: &Problem<'_>, rows: usize) -> Vec<Shape> {
    if !serves(problem) {
        return Vec::new();
    }
    let (k, columns) = (problem.k, rows.next_multiple_of(8));
    // A single row is small; more rows lie in shared memory only where they are normalised on the way.
    let whole = match rows {
        1 => 1,
        2..=8 if problem.norm.is_some() && rows * k * 2 <= WHOLE => rows,
        _ => 0,
    };
    let mut shapes = candidates(problem, rows, whole);
    if shapes.is_empty() {
        shapes = candidates(problem, rows, 0);
    }
    let work = |s: &Shape| s.passes * s.tile;
    let least = shapes.iter().map(work).min().unwrap_or(0) as f64;
    let excess = |s: &Shape| work(s) as f64 > least * TOLERANCE;
    // Two panels a warp fill the matrix instruction and leave its sums few registers. What normalising rows afterwards costs
    // each warp pays once a tile for all of its panels: with few of them, for many tiles, or for more rows, a launch of the norm
    // is faster.
    let fit = |s: &Shape| match s.tile / s.warps_n {
        3.. if s.after() && s.passes == 1 && columns <= 48 => 4,
        _ if s.after() => 0,
        2 if columns > 8 => 3,
        3 | 4 => 2,
        // Two passes of half the panels hide more of the norm than one: 12.4 against 13.1 us for a weight of [6144, 4096].
        _ if columns == 8 && s.norm && s.passes == 1 => 1,
        _ if columns == 8 => 2,
        _ => 1,
    };
    // Of shapes that are equal in all of this the last, so that the order is that of `max_by_key`.
    shapes.reverse();
    shapes.sort_by_key(|s| {
        let busy = if excess(s) { work(s) } else { 0 };
        (busy, std::cmp::Reverse((fit(s), s.tile, s.warps_k)))
    });
    shapes
}

/// The shapes of blocks that fit.
fn candidates(problem: &Problem<'_>, rows: usize, whole: usize) -> Vec<Shape> {
    let (k, panels, arch) = (problem.k, problem.panels(), problem.site.arch);
    let unit = if problem.gated() { 2 } else { 1 };
    let columns = rows.next_multiple_of(8);
    let most_tile = if columns == 8 { 8 } else { 32 };
    let mut shapes = Vec::new();
    for tile in (unit..=most_tile).step_by(unit) {
        let warps = [(1, 8), (2, 4), (3, 2), (4, 2), (7, 1), (8, 1)];
        for ((warps_n, warps_k), after) in warps.into_iter().flat_map(|w| [(w, false), (w, true)]) {
            let chunk = (32 * warps_k).max(64);
            if after && (whole > 0 || !normalises_after(problem, chunk)) {
                continue;
            }
            let tiles = panels.div_ceil(tile);
            let passes = tiles.div_ceil(arch.multiprocessors() as usize);
            let mut shape = Shape {
                tile,
                warps_n,
                warps_k,
                columns,
                chunk,
                stages: 0,
                whole,
                norm: after || (problem.norm.is_some() && whole > 0),
                passes,
                blocks: tiles.div_ceil(passes),
            };
            let fixed = shape.shared(k);
            let ring = (arch.max_shared() as usize).saturating_sub(fixed).min(RING);
            shape.stages = ring / (shape.stage_bytes() + 16);
            let fits = tile.is_multiple_of(warps_n * unit)
                && tile / warps_n <= if columns == 8 { 8 } else { 4 }
                && shape.accumulators() <= if warps_n == 8 { 32 } else { 64 }
                && shape.stages >= 2
                && (!shape.alias() || shape.sum_bytes() <= shape.stages * shape.stage_bytes());
            if fits && (columns > 8 || warps_n == 1) {
                shapes.push(shape);
            }
        }
    }
    shapes
}

/// Whether rows may be normalised after they were multiplied: rows times the norm's weight must have a place in the element type
/// before they are scaled.
fn normalises_after(problem: &Problem<'_>, chunk: usize) -> bool {
    problem.norm.is_some() && problem.dtype == DType::BF16 && problem.k.is_multiple_of(chunk)
}

/// Whether the family serves the problem.
fn serves(problem: &Problem<'_>) -> bool {
    problem.layout == Layout::Cores
        && matches!(problem.dtype, DType::BF16 | DType::F16)
        && computes(problem.out)
        && problem.k.is_multiple_of(8)
        && problem.k > 0
}

/// The variants for up to [`MAX_ROWS`] rows, each with its condition; empty where another family must serve. The last may be
/// left to [`super::large`].
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
        Some(SiteVariant::new(vec![between(&problem.m, first, last)], launches))
    };
    RANGES.into_iter().filter_map(one).collect()
}

/// The launch of one shape.
pub fn launch(problem: &Problem<'_>, shape: &Shape) -> Option<SiteLaunch> {
    let norm = problem.norm.filter(|_| shape.norm);
    let shared = shape.shared(problem.k);
    let parameter = if norm.is_some() { "const T *norm_weight," } else { "" };
    let writer = SourceWriter::new("cuda.matmul.skinny")
        .int("K", problem.k)
        .int("PANELS", problem.panels())
        .int("TILE", shape.tile)
        .int("WARPS_N", shape.warps_n)
        .int("WARPS_K", shape.warps_k)
        .int("COLUMNS", shape.columns)
        .int("CHUNK", shape.chunk)
        .int("STAGES", shape.stages)
        .int("WHOLE", i32::from(shape.whole > 0))
        .int("X_ROWS", shape.whole.max(1))
        .int("NORM", i32::from(norm.is_some() && !shape.after()))
        .int("AFTER", i32::from(shape.after()))
        .int("GATED", i32::from(problem.gated()))
        .int("ALIAS", i32::from(shape.alias()))
        .int("RELEASE", 4)
        .int("ROTATE", 1)
        .int("EXPECTED_SHARED", shared)
        .line(&format!("#define WHOLE_ON {}", i32::from(shape.whole > 0)))
        .line(&format!("#define NORM_ON {}", i32::from(norm.is_some())))
        .line(&format!("#define NORM_PARAMETER {parameter}"))
        .float("EPS", norm.map_or(0.0, |n| n.eps));
    let tiles = problem.tiles();
    let writer = locate_panels(touch(declare(writer, problem)?, problem), problem)
        .body_for(include_str!("skinny.cu"), tiles.is_some());
    let source = writer.promise(Promise { registers: 0, no_local: true }).finish();
    let one = Dim::from(1u64);
    let x = norm.map_or(problem.x, |n| n.x);
    let mut launch =
        SiteLaunch::new(source, [blocks(problem, shape), one.clone(), one], shape.threads() as u32)
            .args([x_argument(problem, shape, x), weight_argument(problem, shape)])
            .args(norm.map(|n| Argument::Address(n.weight)))
            .args(arguments(problem))
            .args([Argument::I32(problem.m.clone())]);
    launch.shared = u32::try_from(shared).ok()?;
    launch.dependent = problem.site.arch.has_tma();
    launch.tiles = tiles;
    Some(launch)
}

/// Blocks of a launch. A tile of the shape is one block's work, so parts of the weight have no more blocks than tiles of the
/// whole weight that they have panels of.
fn blocks(problem: &Problem<'_>, shape: &Shape) -> Dim {
    if problem.tiles().is_none() {
        return Dim::from(shape.blocks);
    }
    let (first, tile) = (Dim::from(tile_first()), shape.tile as i64);
    let end = first.add(&problem.tile_slices()).ceil_div(tile);
    // Rounded down, as the ceiling of something smaller.
    let tiles = end.sub(&first.sub(&Dim::from(tile - 1)).ceil_div(tile));
    tiles.min_of(&Dim::from(shape.blocks))
}

/// The weight: a descriptor whose box is the weights of a stage, or an address.
fn weight_argument(problem: &Problem<'_>, shape: &Shape) -> Argument {
    if !problem.site.arch.has_tma() {
        return Argument::Address(problem.weight);
    }
    Argument::Map(TensorMap {
        of: MapBase::Address(problem.weight),
        dtype: problem.dtype,
        shape: vec![Dim::from(64u64), Dim::from(problem.k / 8), problem.tile_slices()],
        strides: [128, problem.k * 16].map(Dim::from).to_vec(),
        tile: [64, shape.chunk / 8, shape.tile].map(|n| n as u32).to_vec(),
        swizzle: 0,
    })
}

/// The rows of x: a descriptor whose boxes are 64 columns of a stage, or an address.
fn x_argument(problem: &Problem<'_>, shape: &Shape, x: Operand) -> Argument {
    if !problem.site.arch.has_tma() || shape.whole > 0 {
        return Argument::Address(x);
    }
    Argument::Map(TensorMap {
        of: MapBase::Address(x),
        dtype: problem.dtype,
        shape: vec![Dim::from(problem.k), problem.m.clone()],
        strides: vec![Dim::from(problem.k * 2)],
        tile: vec![64, shape.columns as u32],
        swizzle: 128,
    })
}

#[cfg(test)]
#[path = "skinny_tests.rs"]
pub(in crate::cuda) mod tests;
