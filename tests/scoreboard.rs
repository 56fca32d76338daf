//! The scoreboard: what `-O2` makes of every graph of the zoo, as one text that a change of the compiler has to accept.
//! `docs/zoo.md` says how to read it.

#[path = "common/zoo/mod.rs"]
mod zoo;

use std::collections::BTreeMap;
use std::fmt::Write;

use millrace::Compiled;
use millrace::ir::weights::WeightReader;
use millrace::ir::{Kernel, Module};
use millrace::kernels::cpu::select::REFERENCE;
use zoo::Graph;

/// The kernel of nodes that move no byte.
const VIEW: &str = "cpu.view";

/// The kernels that run in a step, in the order of the nodes: one for each launch.
fn launches(module: &Module) -> Vec<&Kernel> {
    let kernels = module.graph.order.iter().map(|n| &module.kernels[module.graph.nodes[*n].kernel.unwrap()]);
    kernels.filter(|k| k.name != VIEW).collect()
}

fn row(name: &str, nodes: usize, compiled: &Compiled) -> String {
    let module = &compiled.module;
    let launches = launches(module);
    let plan = compiled.plan().unwrap();
    let over = 100.0 * (plan.peak_bytes as f64 / plan.lower_bound_bytes.max(1) as f64 - 1.0);
    let over = if plan.lower_bound_bytes == 0 { 0.0 } else { over };
    let reader = WeightReader::new(module);
    let used = module.used_weights();
    let weights: u64 = used.iter().map(|w| reader.len(*w).unwrap()).sum();
    let streamable: u64 =
        used.iter().filter(|w| module.weights[**w].stream.is_some()).map(|w| reader.len(*w).unwrap()).sum();
    format!(
        "{name:<26} {nodes:>6} {:>6} {:>8} {:>9} {:>10} {:>11} {over:>6.2} {weights:>12} {streamable:>12}",
        module.graph.order.len(),
        module.kernels.len(),
        launches.len(),
        launches.iter().filter(|k| k.name == REFERENCE).count(),
        plan.peak_bytes,
    )
}

fn families(module: &Module) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for kernel in launches(module) {
        *counts.entry(&kernel.name).or_default() += 1;
    }
    let counts: Vec<String> = counts.into_iter().map(|(name, n)| format!("{name} {n}")).collect();
    counts.join(", ")
}

fn scoreboard() -> String {
    let mut table = format!(
        "{:<26} {:>6} {:>6} {:>8} {:>9} {:>10} {:>11} {:>6} {:>12} {:>12}\n",
        "graph",
        "nodes",
        "after",
        "kernels",
        "launches",
        "reference",
        "peak_bytes",
        "over%",
        "weights",
        "streamable"
    );
    let mut blocks = String::new();
    for graph in zoo::graphs() {
        let compiled = graph.compiled();
        let row = row(&graph.name, graph.imported().graph.order.len(), &compiled);
        writeln!(table, "{row}").unwrap();
        write!(blocks, "\n{}\n  {}\n", graph.name, families(&compiled.module)).unwrap();
    }
    table + &blocks
}

#[test]
fn scoreboard_is_as_accepted() {
    let found = scoreboard();
    let path = zoo::root().join("tests/scoreboard.snap");
    if std::env::var("MILLRACE_ACCEPT").is_ok_and(|v| v == "1") {
        std::fs::write(&path, &found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let diff = similar::TextDiff::from_lines(&expected, &found);
    assert!(
        found == expected,
        "the scoreboard differs\n{}\naccept with: MILLRACE_ACCEPT=1 cargo test --test scoreboard",
        diff.unified_diff().context_radius(0)
    );
}

/// Kernels with their element types, and how often each is launched.
fn multiset(name: &str) -> BTreeMap<String, usize> {
    let module = Graph::named(name).compiled().module;
    let mut counts = BTreeMap::new();
    for kernel in launches(&module) {
        let dtypes: Vec<String> = kernel.dtypes.iter().map(ToString::to_string).collect();
        *counts.entry(format!("{} [{}]", kernel.name, dtypes.join(", "))).or_default() += 1;
    }
    counts
}

/// Both spellings of a model launch the same kernels equally often.
fn assert_same_kernels(pair: &str) {
    let mut wrong = String::new();
    let (primitive, twin) = (multiset(&format!("primitive_{pair}")), multiset(&format!("twin_{pair}")));
    for kernel in primitive.keys().chain(twin.keys().filter(|k| !primitive.contains_key(*k))) {
        let count = |set: &BTreeMap<String, usize>| set.get(kernel).copied().unwrap_or(0);
        let (p, t) = (count(&primitive), count(&twin));
        if p != t {
            writeln!(wrong, "{kernel} runs {p} times in the primitive, {t} times in the twin").unwrap();
        }
    }
    assert!(wrong.is_empty(), "{pair}\n{wrong}");
}

#[test]
fn both_encoders_run_the_same_kernels() {
    assert_same_kernels("encoder");
}

#[test]
fn both_decoders_run_the_same_kernels() {
    assert_same_kernels("decoder");
}

#[test]
fn both_decoders_with_tables_run_the_same_kernels() {
    assert_same_kernels("decoder_tables");
}

#[test]
fn both_narrow_decoders_run_the_same_kernels() {
    assert_same_kernels("decoder_bf16");
}
