//! Matmuls whose launches read the weight in parts, for a device: a driver launches every tile of a partition on a copy of its
//! slices and compares, bit by bit, with one launch over the whole weight and with the kernel that knows no tiles.
//!
//! `MILLRACE_CUDA_TILES=folder cargo test -p millrace-kernels write_tiles -- --ignored` writes sources `t0.cu`, .. and
//! `tiles.json`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use millrace_ir::launch::{MapBase, TensorMap, Tiles};
use millrace_ir::sampling::Random;
use millrace_ir::{Bindings, Dim, Module, NodeId, Operand, Stream, Sym};

use crate::cuda::matmul::large::{self, Tile};
use crate::cuda::matmul::skinny::tests::{Case, case};
use crate::cuda::matmul::{self, Layout, Problem};
use crate::cuda::plan::{Argument, Site, SiteLaunch};
use crate::cuda::{Arch, Source};

/// The module with a weight that may be streamed.
fn streamed(mut module: Module) -> Module {
    for (_, weight) in module.weights.iter_mut() {
        weight.stream = Some(Stream { first_use: 0, tile_axis: 0, tile_bytes: 1 });
    }
    module
}

pub(super) fn at_rows(m: u64) -> Bindings {
    let mut bindings = Bindings::new();
    bindings.set(Sym::new("t").unwrap(), m);
    bindings
}

/// The launches at `m` rows.
fn planned(module: &Module, nodes: &[NodeId], arch: Arch, m: u64) -> Vec<SiteLaunch> {
    let planned = matmul::plan(Site { module, nodes, arch }, &matmul::Choices::default()).unwrap();
    let bindings = at_rows(m);
    let holds = |v: &&crate::cuda::SiteVariant| v.when.iter().all(|c| c.holds(&bindings));
    let ways = if planned.streamed.is_empty() { &planned.variants } else { &planned.streamed };
    ways.iter().find(holds).unwrap().launches.clone()
}

fn cases() -> Vec<(&'static str, Case)> {
    let glu = |n, k| Case { segments: vec![n, n], norm: true, epilogue: "glu(silu)", ..case(n, k) };
    let qkv = |q, kv, k| Case { segments: vec![q, kv, kv], norm: true, ..case(q, k) };
    let residual = |n, k| Case { epilogue: "residual", ..case(n, k) };
    vec![
        ("8b.qkv", qkv(4096, 1024, 4096)),
        ("8b.o", residual(4096, 4096)),
        ("8b.up", glu(14336, 4096)),
        ("8b.down", residual(4096, 14336)),
        ("8b.head", Case { out: "f32", norm: true, ..case(128256, 4096) }),
        ("few", Case { segments: vec![7, 9], epilogue: "silu", ..case(0, 8) }),
        ("one", case(1, 8)),
        ("thousand", case(1000, 1000)),
        ("glu33", glu(33, 24)),
        ("gelu", Case { epilogue: "gelu_tanh, residual", ..case(129, 1032) }),
        ("three", Case { segments: vec![130, 70, 9], epilogue: "bias, relu", norm: true, ..case(0, 2056) }),
        ("gated", Case { segments: vec![40, 40], epilogue: "bias, glu(gelu), mul", ..case(0, 264) }),
        ("middle", Case { epilogue: "bias, residual", ..case(2560, 1536) }),
        ("wide", Case { epilogue: "bias, glu(silu), mul", segments: vec![1544, 1544], ..case(0, 520) }),
    ]
}

fn hopper(consumers: u32, columns: u32, stages: u32, cluster: u32, split: u32, boxes: u32) -> Tile {
    Tile::Wgmma { consumers, columns, stages, cluster, split, boxes, group: 4 }
}

/// Tiles of Hopper with every constant that changes a schedule.
fn shapes() -> [Tile; 8] {
    [
        hopper(2, 256, 4, 2, 1, 1),
        hopper(2, 256, 4, 1, 1, 1),
        hopper(2, 192, 5, 1, 1, 1),
        hopper(2, 128, 6, 1, 1, 2),
        hopper(2, 64, 8, 1, 1, 1),
        hopper(2, 128, 6, 1, 2, 1),
        hopper(2, 64, 8, 1, 2, 2),
        hopper(1, 64, 8, 1, 1, 1),
    ]
}

/// Ways to cut a weight: one slice first, one last, odd ones between; every granule by itself where there are few.
fn partitions(tiles: Tiles, random: &mut Random) -> Vec<Vec<u64>> {
    let units = tiles.slices / tiles.granule;
    let mut cuts = vec![vec![1], vec![units - 1], vec![1, units - 1]];
    let mut odd: Vec<u64> = (0..4).map(|_| random.below(units.max(1) as usize) as u64).collect();
    odd.extend([1, units - 1]);
    cuts.push(odd);
    if units <= 24 {
        cuts.push((0..units).collect());
    }
    cuts.iter_mut().for_each(|c| {
        c.iter_mut().for_each(|u| *u *= tiles.granule);
        c.extend([0, tiles.slices]);
        c.sort_unstable();
        c.dedup();
    });
    cuts.sort();
    cuts.dedup();
    cuts
}

/// What operands are called, and the text of launches.
pub(super) struct Writer<'a> {
    pub module: &'a Module,
    pub nodes: &'a [NodeId],
    pub arch: Arch,
    pub kernels: &'a mut BTreeMap<(Arch, String), usize>,
}

impl Writer<'_> {
    fn name(&self, operand: Operand) -> String {
        if let Operand::Weight(w) = operand {
            return self.module.weights[w].name.clone();
        }
        let last = &self.module.graph.nodes[self.nodes[self.nodes.len() - 1]];
        if let Some(at) = last.results.iter().position(|r| Operand::Value(*r) == operand) {
            return format!("y{at}");
        }
        let inputs = &self.module.graph.inputs;
        match inputs.iter().position(|i| Operand::Value(*i) == operand) {
            Some(at) => self.module.input_types()[at].0.to_string(),
            None => "normed".to_string(),
        }
    }

    fn map(&self, map: &TensorMap, bindings: &Bindings) -> String {
        let MapBase::Address(of) = &map.of else { panic!("{map:?}") };
        let numbers = |dims: &[Dim]| dims.iter().map(|d| d.extent(bindings).unwrap()).collect::<Vec<_>>();
        format!(
            "[\"map\", \"{}\", {:?}, {:?}, {:?}, {}]",
            self.name(*of),
            numbers(&map.shape),
            numbers(&map.strides),
            map.tile,
            map.swizzle
        )
    }

    fn kernel(&mut self, source: &Source) -> usize {
        let count = self.kernels.len();
        *self.kernels.entry((self.arch, source.text.clone())).or_insert(count)
    }

    pub(super) fn launch(&mut self, launch: &SiteLaunch, bindings: &Bindings) -> String {
        let args: Vec<String> = launch
            .args
            .iter()
            .map(|a| match a {
                Argument::Address(o) => format!("[\"at\", \"{}\"]", self.name(*o)),
                Argument::I32(d) => format!("[\"i\", {}]", d.extent(bindings).unwrap()),
                Argument::Map(map) => self.map(map, bindings),
                other => panic!("{other:?}"),
            })
            .collect();
        let grid: Vec<u64> = launch.grid.iter().map(|d| d.extent(bindings).unwrap()).collect();
        format!(
            "{{\"kernel\": {}, \"grid\": {grid:?}, \"threads\": {}, \"cluster\": {}, \"shared\": {}, \"dependent\": {}, \
             \"args\": [{}]}}",
            self.kernel(&launch.source),
            launch.threads,
            launch.cluster,
            launch.shared,
            launch.dependent,
            args.join(", ")
        )
    }

    /// Launches before the matmul, the matmul, and for the matmul with tiles every partition.
    fn compare(&mut self, head: &str, launches: [&[SiteLaunch]; 2], m: u64, cuts: bool) -> String {
        let bindings = at_rows(m);
        let [(whole, before), (tiled, _)] = launches.map(|l| l.split_last().unwrap());
        let tiles = tiled.tiles.unwrap();
        let before: Vec<String> = before.iter().map(|l| self.launch(l, &bindings)).collect();
        let whole = self.launch(whole, &bindings);
        let full = self.launch(tiled, &Tiles::bind(&bindings, 0, tiles.slices));
        let mut parts = Vec::new();
        for cut in partitions(tiles, &mut Random::new(m)).iter().filter(|_| cuts) {
            let one = |w: &[u64]| {
                let launch = self.launch(tiled, &Tiles::bind(&bindings, w[0], w[1] - w[0]));
                format!("{{\"first\": {}, \"count\": {}, \"launch\": {launch}}}", w[0], w[1] - w[0])
            };
            parts.push(format!("[{}]", cut.windows(2).map(one).collect::<Vec<_>>().join(", ")));
        }
        format!(
            "{{{head}, \"m\": {m}, \"slices\": {}, \"before\": [{}], \"baked\": {whole}, \"full\": {full}, \"parts\": [{}]}}",
            tiles.slices,
            before.join(", "),
            parts.join(", ")
        )
    }
}

/// Problems, kernels by architecture and text.
fn written() -> (Vec<String>, BTreeMap<(Arch, String), usize>) {
    let (mut out, mut kernels) = (Vec::new(), BTreeMap::new());
    for arch in [Arch::Sm90a, Arch::Sm80] {
        for (name, case) in cases() {
            let rows: &[u64] = match (name, arch) {
                ("8b.head", Arch::Sm90a) => &[1, 32],
                ("8b.qkv" | "8b.up", Arch::Sm90a) => &[1, 8, 32, 2048],
                ("8b.o" | "8b.down", Arch::Sm90a) => &[1, 32, 2048],
                (_, Arch::Sm90a) => &[1, 3, 16, 61, 100, 300, 4200],
                ("8b.up", _) => &[1, 100],
                (name, _) if name.starts_with("8b.") => &[],
                _ => &[1, 5, 30, 300],
            };
            for (layout, dtype) in [
                (Layout::Cores, "bf16"),
                (Layout::Cores, "f16"),
                (Layout::Rows, "f32"),
                (Layout::Rows, "bf16"),
            ] {
                let gated = case.epilogue.contains("glu(");
                let heavy = name.starts_with("8b.");
                let other = dtype != "bf16" || layout == Layout::Rows;
                if other && (heavy || arch == Arch::Sm80) || layout == Layout::Rows && gated {
                    continue;
                }
                let (plain, tiled) = (case.module(layout, dtype), streamed(case.module(layout, dtype)));
                let nodes = plain.graph.order.clone();
                let head = |how: &str| {
                    let result = if case.out.is_empty() { dtype } else { case.out };
                    format!(
                        "\"name\": \"{name}\", \"how\": \"{how}\", \"arch\": \"{arch}\", \"layout\": \"{layout:?}\", \"dtype\": \
                         \"{dtype}\", \"out\": \"{result}\", \"k\": {}, \"segments\": {:?}, \"gated\": {gated}, \"norm\": {}, \
                         \"epilogue\": \"{}\"",
                        case.k, case.segments, case.norm, case.epilogue
                    )
                };
                let mut writer = Writer { module: &tiled, nodes: &nodes, arch, kernels: &mut kernels };
                let rows = if other { &rows[..rows.len().min(4)] } else { rows };
                for m in rows {
                    let launches = [&plain, &tiled].map(|module| planned(module, &nodes, arch, *m));
                    out.push(writer.compare(&head("plan"), [&launches[0], &launches[1]], *m, true));
                }
                if other || heavy || arch == Arch::Sm80 {
                    continue;
                }
                let site = |module| Site { module, nodes: &nodes, arch };
                let problems = [Problem::of(site(&plain)).unwrap(), Problem::of(site(&tiled)).unwrap()];
                for tile in shapes() {
                    let Some(launches) =
                        problems.iter().map(|p| large::launch(p, tile)).collect::<Option<Vec<_>>>()
                    else {
                        continue;
                    };
                    // What the norm would write is there by itself.
                    let split = matches!(tile, Tile::Wgmma { split: 2, .. });
                    out.push(writer.compare(
                        &head(&format!("{tile:?}").replace("Wgmma ", "")),
                        [&launches[..1], &launches[1..]],
                        if split { 200 } else { 777 },
                        true,
                    ));
                }
            }
        }
    }
    (out, kernels)
}

#[test]
fn launches_of_all_parts_are_planned() {
    let (problems, kernels) = written();
    assert!(problems.len() > 150 && kernels.len() > 150, "{} {}", problems.len(), kernels.len());
}

#[test]
#[ignore = "writes launches for a device into the folder MILLRACE_CUDA_TILES"]
fn write_tiles() {
    let folder = super::folder("MILLRACE_CUDA_TILES");
    let (problems, kernels) = written();
    let mut archs = vec![Arch::Sm90a; kernels.len()];
    for ((arch, text), at) in &kernels {
        std::fs::write(folder.join(format!("t{at}.cu")), text).unwrap();
        archs[*at] = *arch;
    }
    let archs: Vec<String> = archs.iter().map(|a| format!("\"{a}\"")).collect();
    let mut json = String::new();
    let _ =
        write!(json, "{{\"archs\": [{}], \"problems\": [\n{}\n]}}", archs.join(", "), problems.join(",\n"));
    std::fs::write(folder.join("tiles.json"), json).unwrap();
}
