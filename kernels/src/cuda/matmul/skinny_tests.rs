use millrace_ir::{Dim, Module, NodeId, Op, Stream, text};

use super::*;
use crate::cuda::Arch;
use crate::cuda::matmul::{Choices, plan};
use crate::cuda::plan::{Planned, Site};

/// `[rms_norm,] matmul.fused` on `x bf16[$t, k]` with a weight of `layout`.
pub(in crate::cuda) struct Case {
    pub segments: Vec<usize>,
    pub k: usize,
    pub norm: bool,
    pub epilogue: &'static str,
    pub out: &'static str,
}

pub(in crate::cuda) fn case(n: usize, k: usize) -> Case {
    Case { segments: vec![n], k, norm: false, epilogue: "", out: "" }
}

impl Case {
    pub fn module(&self, layout: Layout, dtype: &str) -> Module {
        let Case { segments, k, norm, epilogue, out } = self;
        let n: usize = segments.iter().sum();
        let results: Vec<String> = match epilogue.contains("glu(") {
            true => vec![format!("{dtype}[$t, {}]", segments[0])],
            false => segments
                .iter()
                .map(|s| format!("{}[$t, {s}]", if out.is_empty() { dtype } else { out }))
                .collect(),
        };
        let width = if epilogue.contains("glu(") { segments[0] } else { n };
        let mut text = format!(
            "module @m phase fused {{\n  dim $t in 1..=8192\n  weight @w : {dtype}[{n}, {k}] = splat(1)\n  weight @g : {dtype}[{k}] = splat(1)\n"
        );
        let (mut extra, mut more) = (String::new(), String::new());
        for step in epilogue.split(", ") {
            match step {
                "bias" => {
                    text = text.replace(
                        "  weight @g",
                        &format!("  weight @b : {dtype}[{n}] = splat(1)\n  weight @g"),
                    );
                    more.push_str(", @b");
                }
                "residual" => {
                    extra.push_str(&format!(", %1 \"r\": {dtype}[$t, {width}]"));
                    more.push_str(", %1");
                }
                "mul" => {
                    extra.push_str(&format!(", %2 \"m\": {dtype}[$t, {width}]"));
                    more.push_str(", %2");
                }
                _ => {}
            }
        }
        let mut attrs = format!("segments = {segments:?}");
        if !epilogue.is_empty() {
            attrs.push_str(&format!(", epilogue = [{epilogue}]"));
        }
        if !out.is_empty() {
            attrs.push_str(&format!(", out = {out}"));
        }
        let outputs: Vec<String> =
            results.iter().enumerate().map(|(i, r)| format!("\"y{i}\": {r}")).collect();
        let names: Vec<String> = (0..results.len()).map(|i| format!("%{}", 20 + i)).collect();
        text.push_str(&format!(
            "  graph @main(%0 \"x\": {dtype}[$t, {k}]{extra}) -> ({}) {{\n",
            outputs.join(", ")
        ));
        let x = if *norm { "%9" } else { "%0" };
        if *norm {
            text.push_str(&format!("    %9 = rms_norm %0, @g {{eps = 1e-5}} : {dtype}[$t, {k}]\n"));
        }
        text.push_str(&format!(
            "    {} = matmul.fused {x}, @w{more} {{{attrs}}} : {}\n    return {}\n  }}\n}}\n",
            names.join(", "),
            results.join(", "),
            names.join(", ")
        ));
        let mut module = text::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        if layout == Layout::Cores {
            let w = module.weights.iter().find(|(_, w)| w.name == "w").unwrap().0;
            let panels: usize = segments.iter().map(|s| s.div_ceil(8)).sum();
            module.weights[w].ty.shape = [panels, k / 8, 8, 8].map(Dim::from).to_vec().into();
        }
        module
    }
}

fn nodes(module: &Module) -> Vec<NodeId> {
    module.graph.order.clone()
}

fn planned(module: &Module, arch: Arch) -> Planned {
    plan(Site { module, nodes: &nodes(module), arch }, &Choices::default()).expect("a plan")
}

/// The matmuls of the decoders that decode speed is measured with, and odd ones.
fn cases() -> Vec<Case> {
    let glu = |n, k| Case { segments: vec![n, n], norm: true, epilogue: "glu(silu)", ..case(n, k) };
    let qkv = |q, kv, k| Case { segments: vec![q, kv, kv], norm: true, ..case(q, k) };
    let residual = |n, k| Case { epilogue: "residual", ..case(n, k) };
    let head = |n, k, norm| Case { out: "f32", norm, ..case(n, k) };
    vec![
        qkv(4096, 1024, 4096),
        residual(4096, 4096),
        glu(14336, 4096),
        residual(4096, 14336),
        head(128256, 4096, true),
        qkv(2048, 512, 2048),
        residual(2048, 2048),
        glu(8192, 2048),
        residual(2048, 8192),
        head(128256, 2048, false),
        glu(27648, 5120),
        residual(8192, 28672),
        qkv(8192, 1024, 8192),
        Case { segments: vec![7, 9], epilogue: "silu", ..case(0, 8) },
        case(1, 8),
        case(1000, 1000),
        glu(33, 24),
        Case { epilogue: "gelu_tanh, residual", ..case(129, 1032) },
        Case { segments: vec![130, 70, 9], epilogue: "bias, relu", norm: true, ..case(0, 2056) },
        Case { segments: vec![40, 40], epilogue: "bias, glu(gelu), mul", ..case(0, 264) },
    ]
}

#[test]
fn every_shape_of_interest_has_a_plan_on_every_architecture() {
    for case in cases() {
        let module = case.module(Layout::Cores, "bf16");
        for arch in Arch::ALL {
            let planned = planned(&module, arch);
            // The last range is left to tiles where those were measured to be faster.
            let ranges = RANGES.len() - usize::from(arch == Arch::Sm90a);
            assert!(planned.variants.len() > ranges, "{:?} x {} on {arch}", case.segments, case.k);
            assert!(planned.variants.last().unwrap().when.is_empty());
            for launch in planned.variants[..ranges].iter().flat_map(|v| &v.launches) {
                assert!(launch.shared <= arch.max_shared(), "{} bytes on {arch}", launch.shared);
                assert!(launch.threads <= 1024 && launch.source.text.contains("KERNEL("));
                assert!(launch.cluster == 1);
                assert_eq!(launch.dependent, arch.has_tma());
                assert!(launch.source.text.contains("wait_for_predecessor();"));
            }
        }
    }
}

#[test]
fn up_to_48_rows_are_normalised_on_the_way() {
    let all = cases();
    let module = all[0].module(Layout::Cores, "bf16");
    // Of the others one has too many multiprocessors for one tile of this weight a block.
    for arch in [Arch::Sm80, Arch::Sm89, Arch::Sm90a, Arch::Sm100] {
        let planned = planned(&module, arch);
        let families =
            |v: usize| planned.variants[v].launches.iter().map(|l| l.source.family).collect::<Vec<_>>();
        for few in 0..6 {
            assert_eq!(families(few), ["cuda.matmul.skinny"], "{arch}");
            assert!(planned.variants[few].launches[0].source.text.contains("#define NORM_ON 1"));
        }
        for many in [6, 7] {
            assert_eq!(families(many.min(planned.variants.len() - 1))[0], "cuda.matmul.norm", "{arch}");
        }
    }
}

#[test]
fn large_weights_keep_nearly_every_multiprocessor_busy() {
    for case in &cases()[..13] {
        let module = case.module(Layout::Cores, "bf16");
        let order = nodes(&module);
        let problem = Problem::of(Site { module: &module, nodes: &order, arch: Arch::Sm90a }).unwrap();
        for (_, rows) in RANGES {
            let shape = shape(&problem, rows as usize).unwrap();
            let share = shape.passes * shape.tile * 132;
            let even = problem.panels();
            assert!(even * 100 >= share * 75, "{:?} x {} at {rows}: {shape:?}", case.segments, case.k);
        }
    }
}

#[test]
fn other_layouts_take_other_families() {
    for (layout, dtype) in [(Layout::Rows, "bf16"), (Layout::Rows, "f32"), (Layout::Rows, "f16")] {
        for case in cases() {
            let module = case.module(layout, dtype);
            let planned = planned(&module, Arch::Sm90a);
            let mut families = planned.variants.iter().flat_map(|v| &v.launches).map(|l| l.source.family);
            assert!(families.clone().all(|f| f != "cuda.matmul.skinny"));
            assert_eq!(families.next_back(), Some("cuda.matmul.simple"));
        }
    }
}

#[test]
fn a_known_number_of_rows_has_one_variant() {
    let mut module = cases()[1].module(Layout::Cores, "bf16");
    for value in module.graph.values.ids().collect::<Vec<_>>() {
        module.graph.values[value].ty.shape[0] = Dim::from(4u64);
    }
    let planned = planned(&module, Arch::Sm90a);
    assert_eq!(planned.variants.len(), 1);
    assert!(planned.variants[0].when.is_empty());
    assert!(planned.variants[0].launches[0].source.text.contains("constexpr int COLUMNS = 8;"));
}

#[test]
fn rows_may_be_normalised_after_they_were_multiplied() {
    let case = Case { norm: true, ..case(4096, 4096) };
    let after = |dtype: &str, rows| {
        let module = case.module(Layout::Cores, dtype);
        let order = nodes(&module);
        let problem = Problem::of(Site { module: &module, nodes: &order, arch: Arch::Sm90a }).unwrap();
        let all = shapes(&problem, rows);
        assert_eq!(all[0].after(), all.iter().any(Shape::after));
        all.into_iter().find(Shape::after).map(|shape| launch(&problem, &shape).unwrap())
    };
    let launch = after("bf16", 32).unwrap();
    assert!(launch.source.text.contains("constexpr int AFTER = 1;"));
    assert!(launch.source.text.contains("constexpr int NORM = 0;"));
    // x, the weight, the norm's weight, the result, rows.
    assert_eq!(launch.args.len(), 5);
    // Few rows lie in shared memory as a whole, and f16 may have no place for what is not scaled yet.
    assert!(after("bf16", 4).is_none() && after("f16", 32).is_none());
}

#[test]
fn weights_that_may_be_streamed_are_read_in_parts() {
    let glu = Case { segments: vec![264, 264], norm: true, epilogue: "glu(silu)", ..case(0, 512) };
    let plain = Case { epilogue: "residual", ..case(1000, 512) };
    for (case, layout, dtype, expected) in [
        (&glu, Layout::Cores, "bf16", Some((66, 2))),
        (&plain, Layout::Cores, "bf16", Some((125, 1))),
        (&plain, Layout::Rows, "f32", Some((1000, 1))),
        (&glu, Layout::Rows, "f32", None),
    ] {
        let mut module = case.module(layout, dtype);
        for arch in Arch::ALL {
            for variant in planned(&module, arch).variants {
                for launch in variant.launches {
                    assert!(launch.tiles.is_none() && !launch.source.text.contains("tile_first"));
                    assert!(!launch.source.text.contains("//#"));
                }
            }
        }
        let w = module.weights.iter().find(|(_, w)| w.name == "w").unwrap().0;
        module.weights[w].stream = Some(Stream { first_use: 0, tile_axis: 0, tile_bytes: 1 });
        for arch in Arch::ALL {
            let planned = planned(&module, arch);
            assert_eq!(planned.streamed.is_empty(), expected.is_none());
            // Where all of it is there, it is read by the kernels that know no parts.
            assert!(planned.variants.iter().flat_map(|v| &v.launches).all(|l| l.tiles.is_none()));
            for variant in planned.streamed {
                for launch in variant.launches {
                    let norm = launch.source.family == "cuda.matmul.norm";
                    let tiles = expected.filter(|_| !norm);
                    let found = launch.tiles.map(|t| (t.slices, t.granule));
                    assert_eq!(found, tiles, "{}", launch.source.family);
                    assert!(launch.tiles.is_none_or(|t| t.weight == w));
                    assert_eq!(launch.source.text.contains("tile_first"), tiles.is_some());
                    assert!(!launch.source.text.contains("//#"));
                }
            }
        }
    }
}

/// `[$b, 1, 3, 4]` times `[5, 4, 2]`.
fn batched(transposed: bool) -> Module {
    let (b, attrs) = if transposed { ("5, 2, 4", "{transpose_b = true} ") } else { ("5, 4, 2", "") };
    let types = format!("(%0 \"a\": f32[$b, 1, 3, 4], %1 \"b\": f32[{b}]) -> (\"c\": f32[$b, 5, 3, 2])");
    let node = format!("%2 = matmul %0, %1 {attrs}: f32[$b, 5, 3, 2]");
    let text = format!(
        "module @m phase fused {{\n  dim $b in 1..=64\n  graph @main{types} {{\n    {node}\n    return %2\n  }}\n}}\n"
    );
    text::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

#[test]
fn activations_multiply_with_broadcast_batches() {
    let module = batched(false);
    assert!(matches!(*module.graph.nodes[nodes(&module)[0]].op, Op::Matmul(_)));
    let planned = planned(&module, Arch::Sm80);
    let text = &planned.variants[0].launches[0].source.text;
    assert!(text.contains("a += (u64)i0 * (1);") && text.contains("b += (u64)i1 * (1);"), "{text}");
    assert!(!text.contains("b += (u64)i0"));
}

/// Writes every source of the cases and a manifest of their launches into the folder `MILLRACE_DUMP_SOURCES`, to compile,
/// check or measure them elsewhere.
#[test]
#[ignore = "writes files"]
fn dump_sources() {
    let Ok(folder) = std::env::var("MILLRACE_DUMP_SOURCES") else { return };
    let mut manifest = String::new();
    let mut dump = |label: String, planned: &Planned| {
        for (v, variant) in planned.variants.iter().enumerate() {
            for (l, launch) in variant.launches.iter().enumerate() {
                let name = format!("{label}-{v}-{l}");
                std::fs::write(format!("{folder}/{name}.cu"), &launch.source.text).unwrap();
                let SiteLaunch { grid: [x, y, z], threads, cluster, shared, args, .. } = launch;
                manifest.push_str(&format!(
                    "{name};{:?};{x};{y};{z};{threads};{cluster};{shared};{args:?}\n",
                    variant.when.iter().map(|c| (c.min, c.max)).collect::<Vec<_>>()
                ));
            }
        }
    };
    for arch in Arch::ALL {
        for (index, case) in cases().iter().enumerate() {
            for (layout, dtype) in [
                (Layout::Cores, "bf16"),
                (Layout::Cores, "f16"),
                (Layout::Rows, "bf16"),
                (Layout::Rows, "f32"),
            ] {
                let module = case.module(layout, dtype);
                dump(format!("{arch}-{index}-{layout:?}-{dtype}"), &planned(&module, arch));
            }
        }
        for (index, transposed) in [(0, false), (1, true)] {
            dump(format!("{arch}-{index}-batched"), &planned(&batched(transposed), arch));
        }
    }
    std::fs::write(format!("{folder}/manifest.txt"), manifest).unwrap();
}
