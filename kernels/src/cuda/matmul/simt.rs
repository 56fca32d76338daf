//! Matmuls of many rows in f32 with the weight row by row, on the units that do without matrix instructions: 64 sums a thread
//! out of shared memory. A measurement may choose it; nothing is built in.

use millrace_ir::{DType, Dim};

use super::epilogue::{arguments, computes, declare, locate_columns};
use super::problem::{Layout, Problem};
use crate::cuda::plan::{Argument, SiteLaunch};
use crate::cuda::source::{Promise, SourceWriter};

/// Edges of tiles of results; `EDGE` of the kernel.
const EDGES: [u64; 2] = [64, 128];

/// Columns of the results in a tile.
fn columns(problem: &Problem<'_>, edge: u64) -> u64 {
    if problem.gated() { edge / 2 } else { edge }
}

fn serves(problem: &Problem<'_>) -> bool {
    problem.layout == Layout::Rows
        && problem.dtype == DType::F32
        && computes(problem.out)
        && problem.k > 0
        && problem.k.is_multiple_of(4)
}

/// Most rows for which small tiles come first: with more there are as many large ones as multiprocessors. On an H200 large ones
/// take 1.46 of the time of small ones with half as many, 1.01 with 0.7 as many, 0.70 with twice as many.
fn most_rows_of_small(problem: &Problem<'_>) -> u64 {
    let [_, large] = EDGES;
    let across = (problem.features() as u64).div_ceil(columns(problem, large)).max(1);
    let wanted = u64::from(problem.site.arch.multiprocessors());
    (wanted.div_ceil(across) - 1) * large
}

/// Edges of tiles for `rows` rows, from best to worst; empty where the family does not serve the problem.
pub fn edges(problem: &Problem<'_>, rows: u64) -> Vec<u64> {
    let [small, large] = EDGES;
    match serves(problem) {
        false => Vec::new(),
        true if rows <= most_rows_of_small(problem) => vec![small, large],
        true => vec![large, small],
    }
}

/// The launch of tiles of `edge` by `edge`.
pub fn launch(problem: &Problem<'_>, edge: u64) -> Option<SiteLaunch> {
    let features = problem.features();
    let writer = SourceWriter::new("cuda.matmul.simt")
        .int("K", problem.k)
        .int("FEATURES", features)
        .int("GATED", i32::from(problem.gated()))
        .int("EDGE", edge);
    let tiles = problem.tiles();
    let source = locate_columns(declare(writer, problem)?, problem)
        .body_for(include_str!("simt.cu"), tiles.is_some())
        .promise(Promise { registers: 0, no_local: true })
        .finish();
    // A slice of the weight is a column.
    let all = match tiles {
        Some(_) => problem.tile_slices(),
        None => Dim::from(features),
    };
    let grid =
        [all.ceil_div(columns(problem, edge) as i64), problem.m.ceil_div(edge as i64), Dim::from(1u64)];
    let threads = (edge / 8).pow(2) as u32;
    let mut launch = SiteLaunch::new(source, grid, threads)
        .args([Argument::Address(problem.x), Argument::Address(problem.weight)])
        .args(arguments(problem))
        .args([Argument::I32(problem.m.clone())]);
    launch.dependent = problem.site.arch.has_tma();
    launch.tiles = tiles;
    Some(launch)
}

#[cfg(test)]
mod tests {
    use super::super::large::tests::module;
    use super::*;
    use crate::cuda::Arch;
    use crate::cuda::plan::Site;

    fn grids(segments: &[usize], epilogue: &str, rows: u64) -> Vec<(u64, Vec<Option<i64>>)> {
        let module = module("f32", 64, segments, epilogue);
        let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
        let problem = Problem::of(site).unwrap();
        let mut bindings = millrace_ir::Bindings::new();
        bindings.set(millrace_ir::Sym::new("t").unwrap(), rows);
        let of = |edge| {
            let launch = launch(&problem, edge).unwrap();
            assert_eq!(u64::from(launch.threads), (edge / 8).pow(2));
            (edge, launch.grid.iter().map(|d| d.eval(&bindings)).collect())
        };
        edges(&problem, rows).into_iter().map(of).collect()
    }

    #[test]
    fn large_tiles_come_first_where_they_fill_the_device() {
        // 16 tiles across: 9 rows of them are 144 for 132 multiprocessors.
        let found = grids(&[2048], "residual", 9 * 128);
        assert_eq!(found[0], (128, vec![Some(16), Some(9), Some(1)]));
        let found = grids(&[2048], "residual", 8 * 128);
        assert_eq!(found[0], (64, vec![Some(32), Some(16), Some(1)]));
        // A gated tile has half its columns from each segment.
        let found = grids(&[8192, 8192], "glu(silu)", 300);
        assert_eq!(found[0], (128, vec![Some(128), Some(3), Some(1)]));
    }

    #[test]
    fn other_types_and_odd_rows_are_left_to_others() {
        for (dtype, k) in [("bf16", 64), ("f32", 66)] {
            let module = module(dtype, k, &[64], "");
            let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
            let problem = Problem::of(site).unwrap();
            assert!(edges(&problem, 300).is_empty());
        }
    }
}
