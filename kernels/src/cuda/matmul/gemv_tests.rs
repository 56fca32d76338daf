use millrace_ir::Module;

use super::super::choice::{self, RANGES as ROWS, Way};
use super::super::skinny::tests::{Case, case};
use super::*;
use crate::cuda::matmul::{Choices, plan};
use crate::cuda::plan::{Planned, Site};
use crate::cuda::{Arch, Source};

fn planned(module: &Module, arch: Arch, choices: &Choices) -> Planned {
    plan(Site { module, nodes: &module.graph.order, arch }, choices).expect("a plan")
}

/// The number that a source declares.
fn constant(source: &Source, name: &str) -> usize {
    let (_, rest) = source.text.split_once(&format!("constexpr int {name} = ")).unwrap();
    rest.split(';').next().unwrap().parse().unwrap()
}

fn residual(n: usize, k: usize) -> Case {
    Case { epilogue: "residual", ..case(n, k) }
}

#[test]
fn few_rows_take_the_family_and_more_rows_tiles() {
    let norm = |epilogue| Case { segments: vec![768, 768], norm: true, epilogue, ..case(0, 1024) };
    for case in [norm(""), norm("glu(silu)"), residual(1, 1), residual(3, 7), residual(4096, 4096)] {
        for (arch, dtype) in Arch::ALL.into_iter().zip(["f32", "bf16", "f16", "f32", "f32"]) {
            let module = case.module(Layout::Rows, dtype);
            let planned = planned(&module, arch, &Choices::default());
            assert_eq!(planned.variants.len(), RANGES.len() + 1);
            let (last, few) = planned.variants.split_last().unwrap();
            assert_eq!(last.launches.last().unwrap().source.family, "cuda.matmul.simple");
            assert!(last.when.is_empty());
            for (variant, (first, last)) in few.iter().zip(RANGES) {
                let launch = variant.launches.last().unwrap();
                assert_eq!(launch.source.family, "cuda.matmul.gemv");
                assert_eq!((variant.when[0].min, variant.when[0].max), (first, last));
                assert_eq!(launch.dependent, arch.has_tma());
                // One launch normalises: this one, or the one before.
                let own = constant(&launch.source, "NORM") == 1;
                assert_eq!(variant.launches.len(), 1 + usize::from(case.norm && !own));
                assert!(!own || launch.args.len() == 4 + variant_results(&case));
            }
        }
    }
}

fn variant_results(case: &Case) -> usize {
    if case.epilogue.contains("glu") { 1 } else { case.segments.len() }
}

#[test]
fn every_block_of_a_range_has_half_of_its_rows() {
    for (first, last) in RANGES {
        for m in first.max(1)..=last {
            let columns = last.min(MOST_COLUMNS).next_power_of_two();
            let blocks = m.div_ceil(columns);
            for block in 0..blocks {
                let rows = m * (block + 1) / blocks - m * block / blocks;
                assert!(
                    rows * 2 >= columns && rows <= columns,
                    "{rows} of {m} rows in a block for {columns}"
                );
            }
        }
    }
}

#[test]
fn weights_that_fill_the_device_with_tiles_leave_many_rows_to_them() {
    for (n, last) in [(16_384, MAX_ROWS), (128_256, MAX_ROWS_OF_MANY)] {
        let module = residual(n, 64).module(Layout::Rows, "f32");
        let planned = planned(&module, Arch::Sm90a, &Choices::default());
        assert_eq!(planned.variants[RANGES.len() - 1].when[0].max, last);
        let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
        let problem = Problem::of(site).unwrap();
        for rows in ROWS {
            assert_eq!(shapes(&problem, rows).is_empty(), rows.last > last, "{n}: {rows:?}");
        }
    }
}

#[test]
fn loads_are_as_wide_as_rows_allow() {
    for (dtype, k, expected) in [
        ("f32", 2048, 4),
        ("f32", 2050, 2),
        ("f32", 2051, 1),
        ("bf16", 2048, 8),
        ("f16", 2052, 4),
        ("bf16", 2050, 2),
        ("bf16", 2051, 1),
    ] {
        let module = residual(640, k).module(Layout::Rows, dtype);
        for variant in planned(&module, Arch::Sm90a, &Choices::default()).variants {
            let launch = variant.launches.last().unwrap();
            if launch.source.family == "cuda.matmul.gemv" {
                assert_eq!(constant(&launch.source, "VECTOR"), expected, "{dtype} {k}");
            }
        }
    }
}

#[test]
fn sums_are_cut_alike_for_every_number_of_rows() {
    for (n, k) in [(2048, 2048), (512, 8192), (128_256, 2048), (16, 64), (100, 1001)] {
        let module = residual(n, k).module(Layout::Rows, "f32");
        let planned = planned(&module, Arch::Sm90a, &Choices::default());
        let cuts: Vec<_> = planned.variants[..RANGES.len()]
            .iter()
            .map(|v| ["VECTOR", "SPLIT"].map(|name| constant(&v.launches[0].source, name)))
            .collect();
        assert!(cuts.windows(2).all(|w| w[0] == w[1]), "{n} x {k}: {cuts:?}");
    }
}

#[test]
fn groups_of_all_blocks_are_all_columns_and_fill_the_device() {
    for (n, k, busy) in [(3072, 2048, true), (2048, 8192, true), (128_256, 2048, true), (5, 64, false)] {
        let module = residual(n, k).module(Layout::Rows, "f32");
        let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
        let problem = Problem::of(site).unwrap();
        for rows in &ROWS[..5] {
            for shape in shapes(&problem, *rows) {
                let launch = launch(&problem, &shape).unwrap();
                let blocks = usize::try_from(launch.grid[1].as_const().unwrap()).unwrap();
                let groups = n.div_ceil(shape.group(&problem));
                assert!((1..=groups).contains(&blocks) && blocks <= 132 * shape.resident(&problem));
                // No block has two groups more than another.
                assert_eq!(
                    groups.div_ceil(blocks),
                    groups.div_ceil(groups.min(132 * shape.resident(&problem)))
                );
            }
            let shape = shapes(&problem, *rows)[0];
            let warps = n.div_ceil(shape.rows) * shape.split;
            assert_eq!(warps >= 132 * 8, busy, "{n} x {k}: {shape:?}");
        }
    }
}

#[test]
fn candidates_begin_with_what_is_built_in_and_each_may_be_chosen() {
    let module = residual(2048, 2048).module(Layout::Rows, "f32");
    let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
    let problem = Problem::of(site).unwrap();
    let built_in = planned(&module, Arch::Sm90a, &Choices::default());
    for rows in &ROWS[..7] {
        let ways = choice::candidates(&problem, *rows);
        assert!(matches!(ways[0], Way::Gemv(_)) && ways.contains(&Way::Simple), "{ways:?}");
        let serving = |planned: &Planned, m: u64| {
            let found = planned.variants.iter().find(|v| v.when.iter().all(|c| (c.min..=c.max).contains(&m)));
            found.unwrap().launches[0].source.clone()
        };
        assert_eq!(serving(&built_in, rows.last), ways[0].launches(&problem).unwrap()[0].source);
        for (at, way) in ways.iter().enumerate() {
            assert!(ways[..at].iter().all(|w| w.name() != way.name()), "{}", way.name());
            let choices = Choices::from_iter([(choice::key(&problem, *rows), way.name())]);
            let planned = planned(&module, Arch::Sm90a, &choices);
            assert_eq!(serving(&planned, rows.last), way.launches(&problem).unwrap()[0].source);
        }
    }
}
