use std::collections::BTreeSet;

use super::super::large::tests::{module, with};
use super::*;
use crate::cuda::{Arch, Site, plan_site, plan_site_with};

/// A problem whose weight is in cores, and its variants as built in.
fn built_in(problem: &Problem<'_>) -> Vec<SiteVariant> {
    super::super::variants(problem, &Choices::default()).unwrap()
}

fn serving(variants: &[SiteVariant], m: u64) -> &SiteVariant {
    let holds = |v: &&SiteVariant| v.when.iter().all(|c| (c.min..=c.max).contains(&m));
    variants.iter().find(holds).unwrap()
}

fn texts(variant: &SiteVariant) -> Vec<&str> {
    variant.launches.iter().map(|l| l.source.text.as_str()).collect()
}

#[test]
fn ranges_follow_each_other_and_end_nowhere() {
    assert_eq!((RANGES[0].first, RANGES[RANGES.len() - 1].last), (0, u64::MAX));
    assert!(RANGES.windows(2).all(|w| w[0].last + 1 == w[1].first));
    assert!(RANGES.iter().all(|r| (r.first..=r.last).contains(&r.at)));
}

#[test]
fn the_first_candidate_is_the_built_in_one_and_names_are_unique() {
    for arch in Arch::ALL {
        for (k, segments, epilogue) in [
            (4096, vec![4096], "residual"),
            (4096, vec![4096, 1024, 1024], ""),
            (2048, vec![8192, 8192], "glu(silu)"),
            (72, vec![24], "bias, relu"),
        ] {
            let module = module("bf16", k, &segments, epilogue);
            with(arch, &module, |problem| {
                let variants = built_in(&problem);
                for rows in RANGES {
                    let ways = candidates(&problem, rows);
                    let names: BTreeSet<String> = ways.iter().map(Way::name).collect();
                    assert_eq!(names.len(), ways.len(), "{names:?}");
                    assert!(ways.len() > 1, "{arch} {rows:?}");
                    let first = ways[0].launches(&problem).unwrap();
                    let as_built = serving(&variants, rows.at);
                    let first: Vec<&str> = first.iter().map(|l| l.source.text.as_str()).collect();
                    assert_eq!(first, texts(as_built), "{arch} {rows:?} {}", ways[0].name());
                    for way in &ways {
                        for launch in way.launches(&problem).unwrap() {
                            assert!(launch.shared <= arch.max_shared(), "{}", way.name());
                        }
                    }
                }
            });
        }
    }
}

#[test]
fn a_choice_serves_its_rows_and_no_others() {
    let module = module("bf16", 4096, &[4096, 1024, 1024], "");
    with(Arch::Sm90a, &module, |problem| {
        let before = built_in(&problem);
        for rows in RANGES {
            for way in candidates(&problem, rows) {
                let choices = Choices::from_iter([(key(&problem, rows), way.name())]);
                let mut variants = built_in(&problem);
                apply(&problem, &choices, &mut variants);
                assert!(variants.last().unwrap().when.is_empty());
                let own = way.launches(&problem).unwrap();
                for m in RANGES.iter().flat_map(|r| [r.first, r.at, r.last.min(100_000)]) {
                    let found = serving(&variants, m);
                    if (rows.first..=rows.last).contains(&m) {
                        assert_eq!(found.launches[0].source, own[0].source, "{m} rows, {}", way.name());
                    } else {
                        assert_eq!(texts(found), texts(serving(&before, m)), "{m} rows, {}", way.name());
                    }
                }
            }
        }
    });
}

#[test]
fn all_choices_together_leave_nothing_built_in() {
    let module = module("bf16", 4096, &[4096], "residual");
    with(Arch::Sm90a, &module, |problem| {
        let choices: Choices = RANGES
            .iter()
            .map(|r| (key(&problem, *r), candidates(&problem, *r).last().unwrap().name()))
            .collect();
        let mut variants = built_in(&problem);
        apply(&problem, &choices, &mut variants);
        assert_eq!(variants.len(), RANGES.len());
        assert!(variants.last().unwrap().when.is_empty());
    });
}

#[test]
fn what_is_not_known_changes_nothing() {
    let module = module("bf16", 4096, &[4096], "residual");
    with(Arch::Sm90a, &module, |problem| {
        let choices: Choices = [
            (key(&problem, RANGES[0]), "skinny-t99-n9-k9-c8-w0".to_string()),
            ("matmul of another model".to_string(), "wgmma".to_string()),
        ]
        .into_iter()
        .collect();
        let mut variants = built_in(&problem);
        apply(&problem, &choices, &mut variants);
        let before = built_in(&problem);
        assert_eq!(variants.len(), before.len());
        assert!(variants.iter().zip(&before).all(|(a, b)| a.when == b.when && texts(a) == texts(b)));
    });
}

#[test]
fn keys_name_what_matters() {
    let module = module("f16", 64, &[40, 40], "bias, glu(gelu), residual");
    with(Arch::Sm80, &module, |problem| {
        assert_eq!(
            key(&problem, RANGES[1]),
            "matmul sm_80 f16 out=f16 cores k=64 n=40+40 epilogue=bias,glu(gelu),residual m=2..4"
        );
        assert!(key(&problem, RANGES[18]).ends_with(" m=4097.."));
    });
}

#[test]
fn sites_without_a_choice_have_one_candidate() {
    let module = module("f32", 66, &[64], "");
    let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
    let problem = Problem::of(site).unwrap();
    assert!(RANGES[10..].iter().all(|r| candidates(&problem, *r) == [Way::Simple]));
    let choices = Choices::from_iter([(key(&problem, RANGES[10]), "x".to_string())]);
    let count = |planned: crate::cuda::Planned| planned.variants.len();
    assert_eq!(count(plan_site(site).unwrap()), count(plan_site_with(site, &choices).unwrap()));
}

#[test]
fn coverage_of_ranges() {
    assert!(covers(&[(0, 3), (4, 9)], 1, 9) && !covers(&[(0, 3), (5, 9)], 1, 9));
    assert!(covers(&[(5, u64::MAX), (0, 4)], 0, u64::MAX) && !covers(&[], 0, 0));
}
