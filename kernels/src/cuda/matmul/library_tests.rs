use millrace_ir::launch::Product;
use millrace_ir::{Module, Stream};

use super::super::choice::{Choices, RANGES, apply, key, library_key};
use super::super::large::tests::module;
use super::super::simple;
use super::*;
use crate::cuda::{Arch, Site, SiteVariant, plan_site_with};

/// The problem of a module, with its weight row by row.
fn with<R>(module: &Module, f: impl FnOnce(Problem<'_>) -> R) -> R {
    let problem = Problem::of(Site { module, nodes: &module.graph.order, arch: Arch::Sm90a }).unwrap();
    assert_eq!(problem.layout, Layout::Rows);
    f(problem)
}

fn products(problem: &Problem<'_>) -> Vec<Product> {
    run(problem, RANGES[9], 1).unwrap().products
}

#[test]
fn each_segment_is_a_product() {
    let module = module("f32", 64, &[96, 32, 32], "bias");
    with(&module, |problem| {
        let all = products(&problem);
        let places: Vec<(u64, u64, u64)> = all.iter().map(|p| (p.first, p.n, p.k)).collect();
        assert_eq!(places, [(0, 96, 64), (96, 32, 64), (128, 32, 64)]);
        let results: Vec<Operand> = all.iter().map(|p| p.y).collect();
        assert_eq!(results, problem.results);
        assert!(all.iter().all(|p| p.bias.is_some() && p.residual.is_none() && p.at == 256));
        assert!(all.iter().all(|p| (p.dtype, p.out, p.suggestion) == (DType::F32, DType::F32, 1)));
        assert_eq!(names(&problem), ["cublaslt-0", "cublaslt-1", "cublaslt-2", "cublaslt-3"]);
        assert!(run(&problem, RANGES[9], SUGGESTIONS).is_none());
    });
}

#[test]
fn what_the_library_does_not_compute_stays_with_kernels() {
    for (dtype, k, segments, epilogue, served) in [
        ("f32", 64, vec![48], "", true),
        ("f32", 64, vec![48], "residual", true),
        ("f32", 64, vec![48], "bias, residual", true),
        ("f32", 64, vec![48], "bias, relu", false),
        ("f32", 64, vec![48], "relu", false),
        ("f32", 64, vec![48, 48], "glu(silu)", false),
        // The second segment would begin inside of 16 bytes: of its weight, then of its bias.
        ("f32", 3, vec![7, 7], "", false),
        ("f32", 64, vec![7, 7], "", true),
        ("f32", 64, vec![7, 7], "bias", false),
        ("bf16", 9, vec![48], "", true),
    ] {
        let module = module(dtype, k, &segments, epilogue);
        with(&module, |problem| {
            assert_eq!(!names(&problem).is_empty(), served, "{dtype} {k} {segments:?} {epilogue}");
            assert_eq!(run(&problem, RANGES[0], 0).is_some(), served);
            let in_cores = Problem { layout: Layout::Cores, ..problem };
            assert!(names(&in_cores).is_empty() && run(&in_cores, RANGES[0], 0).is_none());
        });
    }
}

fn serving(variants: &[SiteVariant], m: u64) -> &SiteVariant {
    let holds = |v: &&SiteVariant| v.when.iter().all(|c| (c.min..=c.max).contains(&m));
    variants.iter().find(holds).unwrap()
}

#[test]
fn a_choice_of_the_library_keeps_the_launches() {
    let module = module("f32", 64, &[48], "residual");
    with(&module, |problem| {
        for rows in RANGES {
            let own = simple::launches(&problem).unwrap();
            let mut variants = vec![SiteVariant::new(Vec::new(), own.clone())];
            let choices = Choices::from_iter([(library_key(&key(&problem, rows)), name(2))]);
            apply(&problem, &choices, &mut variants);
            assert!(variants.last().unwrap().when.is_empty());
            for m in RANGES.iter().flat_map(|r| [r.first, r.at, r.last.min(100_000)]) {
                let found = serving(&variants, m);
                assert_eq!(found.launches[0].source, own[0].source);
                assert_eq!(found.library.is_some(), (rows.first..=rows.last).contains(&m), "{m} of {rows:?}");
            }
        }
    });
}

/// Variants of other bounds than those of the range are cut where they end, and none of them is lost.
#[test]
fn launches_of_every_number_of_rows_stay_its_own() {
    let module = module("f32", 64, &[48], "");
    with(&module, |problem| {
        let own = |threads: u32| {
            let mut launches = simple::launches(&problem).unwrap();
            launches[0].threads = threads;
            launches
        };
        let upper = |last: u64| vec![crate::cuda::plan::between(&problem.m, 0, last)];
        let middle = vec![crate::cuda::plan::between(&problem.m, 2600, 2700)];
        let before = vec![
            SiteVariant::new(upper(100), own(1)),
            SiteVariant::new(middle, own(2)),
            SiteVariant::new(upper(2500), own(3)),
            SiteVariant::new(upper(3000), own(4)),
            SiteVariant::new(Vec::new(), own(5)),
        ];
        let rows = RANGES[16];
        assert_eq!((rows.first, rows.last), (2049, 3072));
        let mut variants = before.clone();
        let choices = Choices::from_iter([(library_key(&key(&problem, rows)), name(0))]);
        apply(&problem, &choices, &mut variants);
        for m in (0..4000).chain([100_000]) {
            let (found, expected) = (serving(&variants, m), serving(&before, m));
            assert_eq!(found.launches[0].threads, expected.launches[0].threads, "{m} rows");
            assert_eq!(found.library.is_some(), (2049..=3072).contains(&m), "{m} rows");
        }
    });
}

#[test]
fn names_that_are_none_choose_nothing() {
    assert_eq!(
        ["cublaslt-3", "cublaslt-4", "cublaslt-", "simple"].map(suggestion),
        [Some(3), None, None, None]
    );
    let module = module("f32", 64, &[64], "");
    let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
    let problem = Problem::of(site).unwrap();
    let choose = |key: String, name: &str| Choices::from_iter([(key, name.to_string())]);
    let own = key(&problem, RANGES[3]);
    let named = |choices: &Choices| {
        let planned = plan_site_with(site, choices).unwrap();
        planned.variants.iter().filter(|v| v.library.is_some()).count()
    };
    assert_eq!(named(&Choices::default()), 0);
    assert_eq!(named(&choose(library_key(&own), "cublaslt-9")), 0);
    assert_eq!(named(&choose(own.clone(), "cublaslt-0")), 0, "only the library's own key names it");
    assert_eq!(named(&choose(library_key(&own), "cublaslt-0")), 1);
}

/// A weight that may come in parts: whole, the library may read it, in parts it does not.
#[test]
fn weights_in_parts_are_read_by_kernels() {
    let mut module = module("f32", 64, &[64], "");
    let id = module.weights.iter().next().unwrap().0;
    module.weights[id].stream = Some(Stream { first_use: 0, tile_axis: 0, tile_bytes: 256 });
    let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
    let problem = Problem::of(site).unwrap();
    assert!(problem.tiles().is_some());
    let choices = Choices::from_iter([(library_key(&key(&problem, RANGES[18])), name(0))]);
    let planned = plan_site_with(site, &choices).unwrap();
    assert!(planned.variants.iter().any(|v| v.library.is_some()));
    assert!(!planned.streamed.is_empty() && planned.streamed.iter().all(|v| v.library.is_none()));
}
