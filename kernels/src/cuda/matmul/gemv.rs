//! Matmuls of few rows by f32 arithmetic, with the weight row by row: f32 graphs, and 16-bit ones whose rows fill no blocks of
//! eight columns.
//!
//! The time of such a matmul is the time to read its weight, so many warps keep loads of 16 bytes under way, and the first
//! before their predecessor ends. Terms: a *group* is the columns of the results that a block sums up at a time, a *batch*
//! what a warp reads in one go. How columns of the weight go to lanes depends on the weight alone, so a row's results have
//! the same bits whatever the number of rows.

use millrace_ir::Dim;

use super::choice::RowRange;
use super::epilogue::{arguments, computes, declare, locate_columns};
use super::norm;
use super::problem::{Layout, Problem};
use crate::cuda::plan::{Argument, SiteLaunch, SiteVariant, between};
use crate::cuda::source::{Promise, SourceWriter};

/// Ranges of rows that have kernels of their own, first and last; the last ends with [`most_rows`].
const RANGES: [(u64, u64); 4] = [(0, 1), (2, 4), (5, 8), (9, MAX_ROWS)];

/// Most rows of the family. Past 16 a weight is read again for every 16 rows, from the cache beside other blocks.
pub const MAX_ROWS: u64 = 256;

/// Most rows of the family where the weight has so many rows that tiles of 64 by 64 fill every multiprocessor several times
/// over: with 128,256 rows tiles take 0.94 of its time at 64 rows of x, with 2,048 to 16,384 1.1 to 1.6 of it at 256.
const MAX_ROWS_OF_MANY: u64 = 32;

/// Most rows of x in one block.
const MOST_COLUMNS: u64 = 16;

/// Warps of a block.
const WARPS: usize = 4;

/// Warps of a multiprocessor that keep memory busy; a row of the weight is split over more warps until there are as many.
const BUSY: usize = 16;

/// Shape of the blocks of one kernel; the constants of `gemv.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Rows of the weight that a warp sums at a time, of both segments where they are gated.
    pub rows: usize,
    /// Steps of a batch.
    pub unroll: usize,
    /// Warps that share a row of the weight.
    pub split: usize,
    /// Most rows of x in a block.
    pub columns: usize,
    /// Whether the kernel normalises x.
    pub norm: bool,
}

impl Shape {
    /// Blocks of a multiprocessor that registers suffice for: two batches, the sums, what is read of x and the rest.
    fn resident(&self, problem: &Problem<'_>) -> usize {
        let words = (vector(problem) * bytes(problem)).div_ceil(4);
        let narrow = if bytes(problem) < 4 { 8 + 2 * vector(problem) } else { 0 };
        let others = 26 + narrow + self.columns + if self.unroll > 1 { 16 } else { 0 };
        let registers =
            2 * self.rows * self.unroll * words + self.rows * self.columns + 2 * vector(problem) + others;
        (1..=8).rev().find(|blocks| registers <= 512 / blocks / 8 * 8).unwrap_or(0)
    }

    /// Columns of the results in a group.
    fn group(&self, problem: &Problem<'_>) -> usize {
        WARPS / self.split * self.rows / if problem.gated() { 2 } else { 1 }
    }

    /// Bytes of shared memory for a row that is normalised.
    fn shared(&self, k: usize) -> usize {
        if self.norm { k * 4 } else { 0 }
    }
}

/// Bytes of an element.
fn bytes(problem: &Problem<'_>) -> usize {
    problem.dtype.bits() / 8
}

/// Most rows of x for which the family serves the problem.
fn most_rows(problem: &Problem<'_>) -> u64 {
    let many = 512 * problem.site.arch.multiprocessors() as usize;
    if problem.features() >= many { MAX_ROWS_OF_MANY } else { MAX_ROWS }
}

/// Elements of a load: as many of a row as fill 16 bytes, or the largest power of two that divides a row.
fn vector(problem: &Problem<'_>) -> usize {
    let most = 16 / bytes(problem);
    most.min(1 << problem.k.trailing_zeros())
}

/// Whether the family serves the problem.
fn serves(problem: &Problem<'_>) -> bool {
    problem.layout == Layout::Rows
        && computes(problem.dtype)
        && computes(problem.out)
        && problem.k > 0
        && problem.features() > 0
        && i32::try_from(problem.k * MOST_COLUMNS as usize).is_ok()
}

/// Shapes for the rows of a range, the built-in one first; empty where another family must serve.
pub fn shapes(problem: &Problem<'_>, rows: RowRange) -> Vec<Shape> {
    if !serves(problem) || rows.last > most_rows(problem) {
        return Vec::new();
    }
    let columns = rows.last.min(MOST_COLUMNS).next_power_of_two() as usize;
    let words = (vector(problem) * bytes(problem)).div_ceil(4);
    let (own, best) = (if problem.gated() { 2 } else { 1 }, split(problem));
    let mut shapes: Vec<Shape> = Vec::new();
    for split in [best, 4, 2, 1] {
        // With few rows of x much of the weight under way is worth most, with many the use of what is read of x.
        let order = if columns <= 4 { [(2, 2), (4, 1)] } else { [(4, 1), (2, 2)] };
        let others = [(4, 2), (2, 1), (8, 1), (1, 1), (1, 2)];
        for (rows, batch) in order.into_iter().chain(others) {
            // A lane has as many bytes under way with narrow loads as with wide ones.
            let unroll = (batch * 16 / (rows * words)).clamp(1, if columns > 4 { 2 } else { 4 });
            let mut shape = Shape { rows, unroll, split, columns, norm: false };
            let fits = (own..=own * problem.features()).contains(&rows) && shape.resident(problem) >= 3;
            if !fits {
                continue;
            }
            shape.norm = normalises(problem, &shape);
            if !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
    }
    shapes
}

/// Whether a kernel of this shape normalises its row on the way. A row of its own in shared memory leaves room for all blocks.
fn normalises(problem: &Problem<'_>, shape: &Shape) -> bool {
    let room = problem.site.arch.max_shared() as usize / shape.resident(problem) - (4 << 10);
    problem.norm.is_some() && shape.columns == 1 && problem.k * 4 <= room && norm::vector(problem) == 1
}

/// Warps that share a row: as many as it takes to keep every multiprocessor busy.
fn split(problem: &Problem<'_>) -> usize {
    let rows = problem.n().div_ceil(4);
    let busy = BUSY * problem.site.arch.multiprocessors() as usize;
    let steps = problem.k.div_ceil(32 * vector(problem));
    let enough = |split: &usize| rows * split >= busy || split * 2 > steps;
    [1, 2].into_iter().find(enough).unwrap_or(WARPS)
}

/// The variants for up to [`MAX_ROWS`] rows, each with its condition; empty where another family must serve.
pub fn variants(problem: &Problem<'_>) -> Vec<SiteVariant> {
    let one = |(first, last): (u64, u64)| {
        let last = last.min(most_rows(problem));
        let shape = shapes(problem, RowRange { first, last, at: last }).into_iter().next()?;
        let launch = launch(problem, &shape)?;
        let norm = norm::launch(problem).filter(|_| !shape.norm);
        let launches = norm.into_iter().chain([launch]).collect();
        Some(SiteVariant::new(vec![between(&problem.m, first, last)], launches))
    };
    RANGES.into_iter().filter_map(one).collect()
}

/// The launch of one shape.
pub fn launch(problem: &Problem<'_>, shape: &Shape) -> Option<SiteLaunch> {
    let norm = problem.norm.filter(|_| shape.norm);
    let parameter = if norm.is_some() { "const T *norm_weight," } else { "" };
    let writer = SourceWriter::new("cuda.matmul.gemv")
        .int("K", problem.k)
        .int("FEATURES", problem.features())
        .int("GATED", i32::from(problem.gated()))
        .int("VECTOR", vector(problem))
        .int("ROWS", shape.rows)
        .int("UNROLL", shape.unroll)
        .int("SPLIT", shape.split)
        .int("COLUMNS", shape.columns)
        .int("RESIDENT", shape.resident(problem))
        .int("NORM_THREADS", if norm.is_some() { norm::THREADS } else { 0 })
        .int("NORM", i32::from(norm.is_some()))
        .line(&format!("#define NORM_ON {}", i32::from(norm.is_some())))
        .line(&format!("#define NORM_PARAMETER {parameter}"))
        .float("EPS", norm.map_or(0.0, |n| n.eps));
    let tiles = problem.tiles();
    let writer =
        locate_columns(declare(writer, problem)?, problem).body_for(include_str!("gemv.cu"), tiles.is_some());
    let source = writer.promise(Promise { registers: 0, no_local: true }).finish();
    // Every block is there at once, and has as many groups as any other, or one less.
    let groups = problem.features().div_ceil(shape.group(problem));
    let room = problem.site.arch.multiprocessors() as usize * shape.resident(problem);
    let blocks = Dim::from(groups.div_ceil(groups.div_ceil(room)));
    let blocks = match tiles {
        Some(_) => problem.tile_slices().ceil_div(shape.group(problem) as i64).min_of(&blocks),
        None => blocks,
    };
    let grid = [problem.m.ceil_div(shape.columns as i64), blocks, Dim::from(1u64)];
    let x = norm.map_or(problem.x, |n| n.x);
    let mut launch = SiteLaunch::new(source, grid, (WARPS * 32) as u32)
        .args([Argument::Address(x), Argument::Address(problem.weight)])
        .args(norm.map(|n| Argument::Address(n.weight)))
        .args(arguments(problem))
        .args([Argument::I32(problem.m.clone())]);
    launch.shared = u32::try_from(shape.shared(problem.k)).ok()?;
    launch.dependent = problem.site.arch.has_tma();
    launch.tiles = tiles;
    Some(launch)
}

#[cfg(test)]
#[path = "gemv_tests.rs"]
mod tests;
