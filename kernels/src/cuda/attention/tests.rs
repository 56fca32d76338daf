use millrace_ir::{Bindings, Id, Module, Operand, Sym, ValueId, text};

use super::super::plan::{Argument, Planned, Site, SiteVariant};
use super::super::source::Source;
use super::super::{Arch, Choices, plan_site, rope};
use super::{plan_layer, splits};

fn plan(site: Site<'_>) -> Option<Planned> {
    super::plan(site, &Choices::default())
}

fn bindings(dims: &[(&str, u64)]) -> Bindings {
    let mut bindings = Bindings::new();
    dims.iter().for_each(|(name, value)| bindings.set(Sym::new(name).unwrap(), *value));
    bindings
}

fn module(body: &str) -> Module {
    let text = format!(
        "module @m phase imported {{\n  dim $t in 1..=8192\n  dim $b in 1..=64\n  dim $p in 1..=1024\n  dim $pages in 1..=65536\n{body}}}\n"
    );
    text::parse(&text).unwrap_or_else(|e| panic!("{e:?}\n{text}"))
}

pub(crate) fn paged(dtype: &str, heads: usize, kv_heads: usize, d: usize) -> Module {
    let cache = format!("{dtype}[$pages, 32, {kv_heads}, {d}]");
    let q = format!("{dtype}[$t, {heads}, {d}]");
    module(&format!(
        "  state @k : {cache}\n  state @v : {cache}\n  graph @main(%0 \"q\": {q}, %1 \"s\": i32[$b + 1], %2 \"l\": i32[$b], %3 \"p\": i32[$b, $p]) -> (\"y\": {q}) {{\n    %4 = paged_attention %0, @k, @v, %1, %2, %3 {{scale = 0.125}} : {q}\n    return %4\n  }}\n"
    ))
}

fn group(tail: &str, result: &str) -> Module {
    let cache = "bf16[$pages, 32, 2, 16]";
    let rope = "{base = 10000.0, layout = half}";
    module(&format!(
        "  state @k : {cache}\n  state @v : {cache}\n  graph @main(%0 \"q\": bf16[$t, 4, 16], %1 \"k\": bf16[$t, 2, 16], %2 \"v\": bf16[$t, 2, 16], %3 \"n\": i32[$t], %4 \"s\": i32[$b + 1], %5 \"l\": i32[$b], %6 \"p\": i32[$b, $p]) -> (\"y\": bf16[$t, 4, 16]{result}) {{\n    %7 = kv_append @v, %2, %4, %5, %6 : {cache}\n    %8 = rope %1, %3 {rope} : bf16[$t, 2, 16]\n    %9 = reshape %8 {{shape = [$t, 2, 16]}} : bf16[$t, 2, 16]\n    %10 = rope %0, %3 {rope} : bf16[$t, 4, 16]\n    %11 = kv_append @k, %9, %4, %5, %6 : {cache}\n    return %10{tail}\n  }}\n"
    ))
}

fn site(module: &Module) -> Site<'_> {
    Site { module, nodes: &module.graph.order, arch: Arch::Sm90a }
}

fn chosen<'p>(planned: &'p Planned, dims: &[(&str, u64)]) -> &'p SiteVariant {
    let bindings = bindings(dims);
    planned.variants.iter().find(|v| v.when.iter().all(|c| c.holds(&bindings))).unwrap()
}

fn grid(variant: &SiteVariant, dims: &[(&str, u64)]) -> Vec<i64> {
    let bindings = bindings(dims);
    variant.launches[0].grid.iter().map(|d| d.eval(&bindings).unwrap()).collect()
}

fn check(source: &Source) {
    assert!(source.promise.no_local);
    assert!(source.text.contains("KERNEL("));
}

#[test]
fn single_rows_decode_and_others_prefill() {
    let module = paged("bf16", 32, 8, 128);
    let planned = plan(site(&module)).unwrap();
    let one = [("t", 1), ("b", 1), ("p", 1024)];
    let family = |dims: &[(&str, u64)]| chosen(&planned, dims).launches[0].source.family;
    assert_eq!(family(&one), "cuda.attention.decode");
    assert_eq!(family(&[("t", 64), ("b", 64), ("p", 1)]), "cuda.attention.decode");
    assert_eq!(family(&[("t", 65), ("b", 64), ("p", 1)]), "cuda.attention.hopper");
    assert_eq!(family(&[("t", 3), ("b", 4), ("p", 1)]), "cuda.attention.hopper");
    assert!(planned.variants.last().unwrap().when.is_empty());
    planned.variants.iter().flat_map(|v| &v.launches).for_each(|l| {
        check(&l.source);
        assert!(l.dependent);
    });
    // A short context needs fewer ranges than a long one.
    let short = [("t", 1), ("b", 1), ("p", 4)];
    assert_eq!(grid(chosen(&planned, &short), &short), [2, 8, 1], "one cluster");
    let many = grid(chosen(&planned, &one), &one);
    assert!(many[0] > 16 && many[0] <= 128, "{many:?}");
}

#[test]
fn partial_results_fit_the_workspace() {
    let module = paged("bf16", 32, 8, 128);
    let planned = plan(site(&module)).unwrap();
    for b in 1..=64 {
        let dims = [("t", b), ("b", b), ("p", 1024)];
        let grid = grid(chosen(&planned, &dims), &dims);
        let cluster = i64::from(chosen(&planned, &dims).launches[0].cluster);
        let needed = grid[0] / cluster * grid[1] * grid[2] * 4 * (128 + 4) * 4;
        assert!(planned.workspace.eval(&bindings(&dims)).unwrap() >= needed, "{b}");
        assert!(planned.counters as i64 >= grid[1] * grid[2] * cluster.min(4) * 4);
        assert_eq!(grid[0] % cluster, 0);
    }
}

#[test]
fn every_sequence_begins_a_tile() {
    let module = paged("bf16", 32, 8, 128);
    let dims = [("t", 300), ("b", 3), ("p", 8)];
    let planned = plan(Site { arch: Arch::Sm80, ..site(&module) }).unwrap();
    assert_eq!(grid(chosen(&planned, &dims), &dims), [32, 3 + 3, 1]);
    // On Hopper blocks take tiles in turn.
    let planned = plan(site(&module)).unwrap();
    let hopper = chosen(&planned, &dims);
    assert_eq!(grid(hopper, &dims), [132, 1, 1]);
    assert!(
        matches!(hopper.launches[0].args.last(), Some(Argument::I32(n)) if n.eval(&bindings(&dims)) == Some(6))
    );
    assert_eq!(hopper.launches[0].shared, 160 * 1024 + 1024);
}

#[test]
fn only_hopper_has_its_kernel() {
    for (arch, d, family) in [
        (Arch::Sm90a, 64, "cuda.attention.hopper"),
        (Arch::Sm90a, 80, "cuda.attention.prefill"),
        (Arch::Sm100, 64, "cuda.attention.prefill"),
        (Arch::Sm89, 128, "cuda.attention.prefill"),
    ] {
        let module = paged("f16", 8, 2, d);
        let planned = plan(Site { arch, ..site(&module) }).unwrap();
        assert_eq!(planned.variants.last().unwrap().launches[0].source.family, family);
        let clusters = planned.variants.iter().any(|v| v.launches[0].cluster > 1);
        assert_eq!(clusters, arch.has_tma());
    }
}

#[test]
fn other_types_and_sizes_take_kernels_of_plain_arithmetic() {
    for (dtype, d) in [("f32", 64), ("bf16", 12), ("f16", 264), ("f32", 30)] {
        let module = paged(dtype, 4, 2, d);
        let planned = plan(site(&module)).unwrap();
        let family = |dims: &[(&str, u64)]| chosen(&planned, dims).launches[0].source.family;
        let split = d <= 256 && d % 4 == 0;
        let (one, many) = if split {
            ("cuda.attention.single", "cuda.attention.plain")
        } else {
            ("cuda.attention.simple", "cuda.attention.simple")
        };
        assert_eq!(family(&[("t", 5), ("b", 5), ("p", 1)]), one, "{dtype} {d}");
        assert_eq!(family(&[("t", 9), ("b", 2), ("p", 1)]), many, "{dtype} {d}");
        assert!(planned.variants.last().unwrap().when.is_empty());
    }
}

#[test]
fn parts_of_plain_single_rows_fit_workspace_and_counters() {
    for (heads, kv_heads, d) in [(32, 8, 64), (4, 4, 128), (64, 2, 256), (12, 1, 20)] {
        let module = paged("f32", heads, kv_heads, d);
        let planned = plan(site(&module)).unwrap();
        let mut before = i64::MAX;
        for b in 1..=64 {
            let dims = [("t", b), ("b", b), ("p", 1024)];
            let variant = chosen(&planned, &dims);
            check(&variant.launches[0].source);
            let grid = grid(variant, &dims);
            let head_block = (heads / kv_heads).div_ceil(grid[1] as usize / kv_heads) as i64;
            let needed = grid[0] * grid[1] * grid[2] * head_block * (d as i64 + 4) * 4;
            assert!(planned.workspace.eval(&bindings(&dims)).unwrap() >= needed, "{b}");
            assert!(planned.counters as i64 >= grid[1] * grid[2] * 4);
            assert!(grid[0] >= 1 && grid[0] <= before, "more sequences, fewer parts");
            before = grid[0];
        }
        // A short context has nothing to divide.
        let short = [("t", 1), ("b", 1), ("p", 1)];
        assert_eq!(grid(chosen(&planned, &short), &short)[0], 1);
    }
}

#[test]
fn packed_attention_has_no_cache() {
    let qkv = "bf16[$t, 12, 64]";
    let module = module(&format!(
        "  graph @main(%0 \"q\": {qkv}, %1 \"k\": {qkv}, %2 \"v\": {qkv}, %3 \"s\": i32[$b + 1]) -> (\"y\": {qkv}) {{\n    %4 = attention %0, %1, %2, %3 {{scale = 0.125}} : {qkv}\n    return %4\n  }}\n"
    ));
    let planned = plan(site(&module)).unwrap();
    let launch = &planned.variants[0].launches[0];
    assert_eq!(launch.source.family, "cuda.attention.hopper");
    assert!(launch.source.text.contains("constexpr bool CAUSAL = false;"));
    assert_eq!(launch.args.len(), 8);
    assert_eq!(planned.counters, 8);
}

#[test]
fn mean_pool_is_planned() {
    let module = module(
        "  graph @main(%0 \"x\": f32[$t, 100], %1 \"s\": i32[$b + 1]) -> (\"y\": f32[$b, 100]) {\n    %2 = mean_pool %0, %1 : f32[$b, 100]\n    return %2\n  }\n",
    );
    let planned = plan(site(&module)).unwrap();
    assert_eq!(grid(&planned.variants[0], &[("t", 9), ("b", 5)]), [4, 5, 1]);
}

#[test]
fn a_layers_ropes_and_appends_are_one_launch() {
    let module = group("", "");
    let planned = rope::plan(site(&module)).unwrap();
    for variant in &planned.variants {
        assert_eq!(variant.launches.len(), 1);
        assert_eq!(variant.launches[0].source.family, "cuda.rope_append");
        check(&variant.launches[0].source);
    }
    let source = &planned.variants[0].launches[0].source.text;
    assert!(source.contains("#define KEEP_K 0"), "nobody else reads the rotated keys");
    let dims = [("t", 5), ("b", 2), ("p", 1)];
    assert_eq!(grid(chosen(&planned, &dims), &dims)[0], 5);
}

#[test]
fn rotated_keys_are_kept_for_other_readers() {
    let module = group(", %9", ", \"k\": bf16[$t, 2, 16]");
    let planned = rope::plan(site(&module)).unwrap();
    let launch = &planned.variants[0].launches[0];
    assert!(launch.source.text.contains("#define KEEP_K 1"));
    assert!(matches!(launch.args.last(), Some(Argument::Address(_))));
}

#[test]
fn lone_ropes_and_appends_are_planned() {
    let module = group("", "");
    let order = &module.graph.order;
    for (node, family) in [(0, "cuda.kv_append"), (1, "cuda.rope")] {
        let planned = rope::plan(Site { nodes: &order[node..=node], ..site(&module) }).unwrap();
        assert_eq!(planned.variants[0].launches[0].source.family, family);
    }
    let two = rope::plan(Site { nodes: &order[..2], ..site(&module) }).unwrap();
    assert!(two.variants.iter().all(|v| v.launches.len() == 2));
}

/// The middle of a decoder layer with views, and what else is returned.
fn layer(rope: &str, d: usize, tail: &str, result: &str) -> Module {
    let cache = format!("bf16[$pages, 32, 2, {d}]");
    let rope = format!("{{base = 10000.0, layout = {rope}}}");
    module(&format!(
        "  state @k : {cache}\n  state @v : {cache}\n  graph @main(%0 \"q\": bf16[$t, 8, {d}], %1 \"k\": bf16[$t, 2, {d}], %2 \"v\": bf16[$t, {width}], %3 \"n\": i32[$t], %4 \"s\": i32[$b + 1], %5 \"l\": i32[$b], %6 \"p\": i32[$b, $p]) -> (\"y\": bf16[$t, 8, {d}]{result}) {{\n    %7 = rope %0, %3 {rope} : bf16[$t, 8, {d}]\n    %8 = rope %1, %3 {rope} : bf16[$t, 2, {d}]\n    %9 = kv_append @k, %8, %4, %5, %6 : {cache}\n    %10 = reshape %2 {{shape = [$t, 2, {d}]}} : bf16[$t, 2, {d}]\n    %11 = kv_append @v, %10, %4, %5, %6 : {cache}\n    %12 = paged_attention %7, %9, %11, %4, %5, %6 {{scale = 0.125}} : bf16[$t, 8, {d}]\n    return %12{tail}\n  }}\n",
        width = 2 * d,
    ))
}

fn families(variant: &SiteVariant) -> Vec<&'static str> {
    variant.launches.iter().map(|l| l.source.family).collect()
}

#[test]
fn the_middle_of_a_layer_is_one_launch_at_decode() {
    let module = layer("half", 64, "", "");
    let planned = plan_site(site(&module)).unwrap();
    for b in [1, 2, 5, 16, 64] {
        let dims = [("t", b), ("b", b), ("p", 8)];
        assert_eq!(families(chosen(&planned, &dims)), ["cuda.attention.layer_decode"], "{b}");
    }
    for (t, b) in [(65, 1), (3, 2), (2, 3)] {
        let families = families(chosen(&planned, &[("t", t), ("b", b), ("p", 8)]));
        assert_eq!(families, ["cuda.rope_append", "cuda.attention.hopper"], "{t} {b}");
    }
    assert!(planned.variants.last().unwrap().when.is_empty());
    for launch in planned.variants.iter().flat_map(|v| &v.launches) {
        check(&launch.source);
        assert!(launch.dependent);
    }
    // It takes what the rotation reads, and splits as attention alone does.
    let dims = [("t", 2), ("b", 2), ("p", 8)];
    let one = &chosen(&planned, &dims).launches[0];
    let address = |arg: &Argument| match arg {
        Argument::Address(operand) => Some(*operand),
        _ => None,
    };
    let values = |at: &[usize]| -> Vec<Operand> {
        at.iter().map(|at| Operand::Value(ValueId::from_index(*at))).collect()
    };
    let addresses: Vec<Operand> = one.args.iter().filter_map(address).collect();
    assert_eq!(addresses, values(&[0, 9, 11, 4, 5, 6, 12, 1, 2, 3]));
    let order = &module.graph.order;
    let alone = plan(Site { nodes: &order[order.len() - 1..], ..site(&module) }).unwrap();
    assert_eq!(grid(chosen(&planned, &dims), &dims), grid(chosen(&alone, &dims), &dims));
    assert_eq!(planned.counters, alone.counters);
}

#[test]
fn a_layer_runs_in_turn_where_one_launch_cannot() {
    let dims = [("t", 2), ("b", 2), ("p", 8)];
    for (rope, d, tail, result) in [
        // The rotated queries, or keys, are read elsewhere.
        ("half", 64, ", %7", ", \"q\": bf16[$t, 8, 64]"),
        ("half", 64, ", %8", ", \"r\": bf16[$t, 2, 64]"),
        // A piece of eight columns holds both halves of a pair.
        ("half", 24, "", ""),
    ] {
        let module = layer(rope, d, tail, result);
        let planned = plan_site(site(&module)).unwrap();
        let found = families(chosen(&planned, &dims));
        assert_eq!(found, ["cuda.rope_append", "cuda.attention.decode"], "{d} {tail}");
    }
    let module = layer("interleaved", 24, "", "");
    let planned = plan_site(site(&module)).unwrap();
    assert_eq!(families(chosen(&planned, &dims)), ["cuda.attention.layer_decode"]);
}

#[test]
fn tiles_fit_shared_memory() {
    for arch in Arch::ALL {
        for d in (16..=256).step_by(8) {
            let memory = arch.max_shared() as usize;
            let tile = super::prefill::Tile::of(d, memory).unwrap();
            assert!(tile.shared <= memory);
        }
    }
}

/// Choices of one split for every key of a site, by its place among the candidates; the last where there are fewer.
fn chosen_splits(site: Site<'_>, at: usize) -> Choices {
    let name = |all: &[super::Split]| all[at.min(all.len() - 1)].name();
    splits(site).iter().map(|(key, all)| (key.clone(), name(all))).collect()
}

#[test]
fn a_choice_splits_the_steps_of_its_key_and_no_others() {
    let module = layer("half", 128, "", "");
    let site = site(&module);
    let all = splits(site);
    assert!(all.iter().all(|(key, splits)| key.contains(" rope b=") && splits.len() > 8), "{all:?}");
    let (key, candidates) = &all[1];
    assert!(key.ends_with("b=0..1 context=8192..24575"), "{key}");
    let built_in = plan_site(site).unwrap();
    let launch = |planned: &Planned, b: u64, pages: u64| {
        let variant = chosen(planned, &[("t", b), ("b", b), ("p", pages)]).clone();
        let [launch] = variant.launches.as_slice() else { panic!("{} launches", variant.launches.len()) };
        (launch.source.text.clone(), grid(&variant, &[("t", b), ("b", b), ("p", pages)]), launch.shared)
    };
    for split in &candidates[1..] {
        let choices: Choices = [(key.clone(), split.name())].into_iter().collect();
        let planned = plan_layer(site, &choices).unwrap();
        // What short tables take needs no variant of its own.
        let fewer = usize::from(*split == all[0].1[0]);
        assert_eq!(planned.variants.len(), built_in.variants.len() - fewer);
        // 8192 positions are 256 pages.
        let (text, blocks, shared) = launch(&planned, 1, 256);
        assert!(text.contains(&format!("#define STAGES {}\n", split.stages)));
        assert_ne!(text, launch(&built_in, 1, 256).0, "{}", split.name());
        assert_eq!(u64::from(shared), split.warps * split.stages * (2 * 16 * 128 * 2));
        assert_eq!(blocks[0] as u64 % split.cluster, 0);
        for (b, pages) in [(1, 255), (2, 256), (1, 768), (1, 1)] {
            assert_eq!(launch(&planned, b, pages), launch(&built_in, b, pages), "{b} {pages}");
        }
    }
    // Names that are none of the key's choose nothing.
    let other: Choices = [(key.clone(), "split-w3".to_string())].into_iter().collect();
    assert_eq!(plan_layer(site, &other).unwrap().variants.len(), built_in.variants.len());
}

#[test]
fn what_was_measured_is_built_in() {
    let of = |arch, d, b: u64, pages: u64| {
        let module = paged("bf16", 32, 8, d);
        let planned = plan(Site { arch, ..site(&module) }).unwrap();
        let launch = chosen(&planned, &[("t", b), ("b", b), ("p", pages)]).launches[0].clone();
        (launch.cluster, launch.threads, launch.shared)
    };
    // Pages of 32 positions.
    let of_b = |b| [255, 256, 767, 768].map(|pages| of(Arch::Sm90a, 128, b, pages));
    let (ring, wide, many) = ((2, 128, 96 << 10), (2, 256, 192 << 10), (1, 128, 64 << 10));
    for b in [1, 2, 4] {
        assert_eq!(of_b(b), [wide, ring, ring, ring]);
    }
    assert_eq!(of_b(8), [ring; 4]);
    assert_eq!(of_b(16), [many; 4]);
    assert_eq!(of_b(32), [(1, 128, 96 << 10); 4]);
    assert_eq!(of(Arch::Sm90a, 64, 1, 1024), (2, 128, 48 << 10));
    // Elsewhere: registers.
    assert_eq!(of(Arch::Sm90a, 48, 1, 1024), (8, 128, 0));
    assert_eq!(of(Arch::Sm100, 128, 1, 1024), (8, 128, 0));
    assert_eq!(of(Arch::Sm80, 128, 1, 1024), (1, 128, 0));
}

#[test]
fn tables_that_end_before_need_no_variants_for_long_ones() {
    let text = text::print(&paged("bf16", 32, 8, 128));
    let variants = |most: u64| {
        let short = text.replace("dim $p in 1..=1024", &format!("dim $p in 1..={most}"));
        assert!(most == 1024 || short != text);
        plan(site(&text::parse(&short).unwrap())).unwrap().variants.len()
    };
    let all = [1024, 767, 255].map(variants);
    assert!(all[0] > all[1] && all[1] > all[2], "{all:?}");
}

#[test]
fn splits_have_names_and_keys_of_their_own() {
    for arch in Arch::ALL {
        for d in [16, 24, 64, 80, 128, 256] {
            let module = paged("bf16", 32, 8, d);
            let all = splits(Site { arch, ..site(&module) });
            let keys: std::collections::BTreeSet<&String> = all.iter().map(|(key, _)| key).collect();
            assert_eq!(keys.len(), 18, "{keys:?}");
            for (key, splits) in &all {
                let names: std::collections::BTreeSet<String> =
                    splits.iter().map(super::Split::name).collect();
                assert_eq!(names.len(), splits.len(), "{key}: {names:?}");
                // Blocks that are to run together fit a multiprocessor.
                let fits = |s: &super::Split| s.blocks * s.shared(d) <= u64::from(arch.max_shared());
                assert!(splits.iter().all(fits), "{arch} {d}");
            }
        }
    }
    // Nothing is chosen in f32, and nothing where there is no cache.
    assert!(splits(site(&paged("f32", 32, 8, 128))).is_empty());
}

#[test]
fn chosen_splits_fit_workspace_and_counters() {
    let module = paged("bf16", 32, 8, 128);
    let site = site(&module);
    for at in 1..20 {
        let choices = chosen_splits(site, at);
        let planned = super::plan(site, &choices).unwrap();
        for b in [1, 2, 3, 4, 5, 8, 9, 16, 17, 64] {
            for p in [1, 8, 255, 256, 1024] {
                let dims = [("t", b), ("b", b), ("p", p)];
                let variant = chosen(&planned, &dims);
                let (grid, cluster) = (grid(variant, &dims), i64::from(variant.launches[0].cluster));
                let needed = grid[0] / cluster * grid[1] * grid[2] * 4 * (128 + 4) * 4;
                assert!(planned.workspace.eval(&bindings(&dims)).unwrap() >= needed, "{at} {b} {p}");
                assert!(planned.counters as i64 >= grid[1] * grid[2] * cluster.min(4) * 4);
                assert_eq!(grid[0] % cluster, 0);
            }
        }
    }
}
