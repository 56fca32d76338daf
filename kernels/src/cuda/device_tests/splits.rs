//! Attention of single rows in every split there is to choose, for a device: a driver compares each with a reference and
//! times them.
//!
//! `MILLRACE_CUDA_SPLITS=folder cargo test -p millrace-kernels write_splits -- --ignored` writes sources `s0.cu`, .. and
//! `splits.json`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use millrace_ir::{Bindings, Dim, Module, Operand, Sym, text};

use crate::cuda::attention::{plan, plan_layer, splits};
use crate::cuda::plan::{Argument, Site, SiteLaunch};
use crate::cuda::{Arch, Choices};

/// Steps over one cache.
#[derive(Clone)]
struct Case {
    heads: usize,
    kv_heads: usize,
    d: usize,
    page: usize,
    window: usize,
    fused: bool,
    lens: Vec<u64>,
    timed: bool,
}

impl Case {
    /// Attention alone, or the middle of a decoder's layer with its launch group.
    fn module(&self) -> Module {
        let Case { heads, kv_heads, d, page, window, .. } = self;
        let cache = format!("bf16[$pages, {page}, {kv_heads}, {d}]");
        let (q, k) = (format!("bf16[$t, {heads}, {d}]"), format!("bf16[$t, {kv_heads}, {d}]"));
        let scale = 1.0 / (*d as f64).sqrt();
        let paging = "%4 \"s\": i32[$b + 1], %5 \"l\": i32[$b], %6 \"p\": i32[$b, $p]";
        let rope = "{base = 500000.0, layout = half}";
        let appended = [
            format!("    %7 = rope %0, %3 {rope} : {q}\n    %8 = rope %1, %3 {rope} : {k}\n"),
            format!("    %9 = kv_append @k, %8, %4, %5, %6 : {cache}\n    %10 = kv_append @v, %2, %4, %5, %6 : {cache}\n"),
        ]
        .concat();
        let (before, query, keys, values) =
            if self.fused { (appended.as_str(), "%7", "%9", "%10") } else { ("", "%0", "@k", "@v") };
        let body = format!(
            "module @m phase imported {{\n  dim $t in 1..=64\n  dim $b in 1..=64\n  dim $p in 1..=8192\n  dim $pages in 1..=65536\n  state @k : {cache}\n  state @v : {cache}\n  graph @main(%0 \"q\": {q}, %1 \"k\": {k}, %2 \"v\": {k}, %3 \"n\": i32[$t], {paging}) -> (\"y\": {q}) {{\n{before}    %12 = paged_attention {query}, {keys}, {values}, %4, %5, %6 {{scale = {scale}, window = {window}}} : {q}\n    return %12\n  }}\n}}\n"
        );
        text::parse(&body).unwrap_or_else(|e| panic!("{e:?}\n{body}"))
    }

    /// Pages of the longest sequence.
    fn width(&self) -> u64 {
        self.lens.iter().max().unwrap().div_ceil(self.page as u64)
    }

    fn bindings(&self) -> Bindings {
        let b = self.lens.len() as u64;
        let mut bindings = Bindings::new();
        for (name, value) in [("t", b), ("b", b), ("p", self.width()), ("pages", b * self.width())] {
            bindings.set(Sym::new(name).unwrap(), value);
        }
        bindings
    }

    /// The launch of every split that may be chosen for the step, by name; the built-in one first.
    fn launches(&self) -> Vec<(String, String, SiteLaunch)> {
        let module = self.module();
        let site = Site { module: &module, nodes: &module.graph.order, arch: Arch::Sm90a };
        let bindings = self.bindings();
        let launch = |choices: &Choices| {
            let planned = if self.fused { plan_layer(site, choices) } else { plan(site, choices) }.unwrap();
            let holds = |v: &&crate::cuda::SiteVariant| v.when.iter().all(|c| c.holds(&bindings));
            let variant = planned.variants.iter().find(holds).unwrap();
            assert_eq!(variant.launches.len(), 1);
            variant.launches[0].clone()
        };
        let mut found = vec![("built-in".to_string(), String::new(), launch(&Choices::default()))];
        // Each key has its own candidates: those that change the launch of this step are for it.
        for (key, all) in splits(site) {
            for split in &all[1..] {
                let choices: Choices = [(key.clone(), split.name())].into_iter().collect();
                let launch = launch(&choices);
                if launch.source != found[0].2.source || launch.grid != found[0].2.grid {
                    found.push((split.name(), key.clone(), launch));
                }
            }
        }
        assert!(found.len() > 3, "{}", found.len());
        found
    }
}

const NAMES: [&str; 7] = ["q", "new_k", "new_v", "positions", "starts", "lens", "table"];

fn argument(arg: &Argument, module_states: &[Operand], bindings: &Bindings) -> String {
    match arg {
        Argument::Address(operand) => {
            let state = module_states.iter().position(|s| s == operand);
            let input = |i: usize| NAMES.get(i).copied().unwrap_or("out").to_string();
            let name = match (state, operand) {
                (Some(i), _) => ["k", "v"][i].to_string(),
                (None, Operand::Value(value)) => {
                    // Appended caches are the states.
                    let index = millrace_ir::Id::index(*value);
                    match index {
                        9 => "k".to_string(),
                        10 => "v".to_string(),
                        _ => input(index),
                    }
                }
                other => panic!("{other:?}"),
            };
            format!("[\"at\", \"{name}\"]")
        }
        Argument::Workspace(_) => "[\"at\", \"workspace\"]".to_string(),
        Argument::Counters(_) => "[\"at\", \"counters\"]".to_string(),
        Argument::I32(dim) => format!("[\"i\", {}]", dim.extent(bindings).unwrap()),
        other => panic!("{other:?}"),
    }
}

fn cases() -> Vec<Case> {
    let llama = Case {
        heads: 32,
        kv_heads: 8,
        d: 128,
        page: 32,
        window: 0,
        fused: false,
        lens: Vec::new(),
        timed: false,
    };
    let mut cases = Vec::new();
    for lens in [
        vec![32768],
        vec![8192],
        vec![2048],
        vec![32768; 4],
        vec![8192; 4],
        vec![2048; 4],
        vec![8192; 32],
        vec![2048; 32],
    ] {
        cases.push(Case { lens, timed: true, ..llama.clone() });
    }
    let timed: [(usize, &[u64]); 6] = [
        (1, &[256, 1024, 2048, 4096, 8192, 16384, 32768]),
        (2, &[2048]),
        (4, &[2048]),
        (8, &[256, 2048, 8192]),
        (16, &[256, 2048, 8192]),
        (32, &[256, 1024, 2048]),
    ];
    for (b, lens) in timed {
        for len in lens {
            cases.push(Case { lens: vec![*len; b], timed: true, fused: true, ..llama.clone() });
        }
    }
    // What differs in length.
    let mixed = (0..32).map(|i| [300, 700, 1500, 9000][i % 4]).collect();
    cases.push(Case { lens: mixed, timed: true, fused: true, ..llama.clone() });
    // Around the edges of tiles, of ranges and of one cluster, in short and long tables.
    let odd: [&[u64]; 6] = [
        &[1],
        &[1025],
        &[33001],
        &[8193, 1, 17, 5000],
        &[9001, 64, 63, 65, 1, 16, 8192, 300, 2],
        &[8191, 15, 16, 17, 1000, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 4097],
    ];
    for (i, lens) in odd.iter().enumerate() {
        for fused in [false, true] {
            let at = |heads, kv_heads, d, page, window| Case {
                heads,
                kv_heads,
                d,
                page,
                window,
                fused,
                lens: lens.to_vec(),
                timed: false,
            };
            cases.push(at(32, 8, 128, 32, 0));
            // Other heads, pages smaller than a tile, windows: one each.
            cases.push(match i {
                0 => at(7, 1, 64, 16, 0),
                1 => at(32, 1, 128, 16, 0),
                2 => at(4, 2, 128, 32, 2000),
                3 => at(8, 2, 64, 8, 0),
                4 => at(4, 2, 80, 64, if fused { 20 } else { 0 }),
                _ => at(8, 8, 256, 16, 100),
            });
        }
    }
    cases
}

#[test]
#[ignore = "writes cases for a device into the folder MILLRACE_CUDA_SPLITS"]
fn write_splits() {
    let folder = super::folder("MILLRACE_CUDA_SPLITS");
    let mut kernels: BTreeMap<String, usize> = BTreeMap::new();
    let mut json = String::from("[\n");
    for (at, case) in cases().iter().enumerate() {
        let Case { heads, kv_heads, d, page, window, fused, lens, timed } = case;
        let bindings = case.bindings();
        let module = case.module();
        let states: Vec<Operand> = module.states.iter().map(|(id, _)| Operand::State(id)).collect();
        let mut ways = Vec::new();
        for (name, key, launch) in case.launches() {
            let number = |dim: &Dim| dim.extent(&bindings).unwrap();
            let next = kernels.len();
            let kernel = *kernels.entry(launch.source.text.clone()).or_insert(next);
            let grid: Vec<u64> = launch.grid.iter().map(number).collect();
            let args: Vec<String> = launch.args.iter().map(|a| argument(a, &states, &bindings)).collect();
            ways.push(format!(
                "{{\"name\": \"{name}\", \"key\": \"{key}\", \"kernel\": {kernel}, \"grid\": {grid:?}, \"threads\": {}, \"cluster\": {}, \"shared\": {}, \"args\": [{}]}}",
                launch.threads,
                launch.cluster,
                launch.shared,
                args.join(", ")
            ));
        }
        let separator = if at == 0 { "" } else { ",\n" };
        let _ = write!(
            json,
            "{separator}{{\"heads\": {heads}, \"kv_heads\": {kv_heads}, \"d\": {d}, \"page\": {page}, \"window\": {window}, \"fused\": {fused}, \"timed\": {timed}, \"lens\": {lens:?}, \"width\": {}, \"ways\": [\n{}]}}",
            case.width(),
            ways.join(",\n")
        );
    }
    json.push_str("\n]\n");
    std::fs::write(folder.join("splits.json"), json).unwrap();
    for (text, at) in kernels {
        std::fs::write(folder.join(format!("s{at}.cu")), text).unwrap();
    }
}
