//! Random graphs mean the same before and after every pass, at every level, and in a session.
//!
//! - `MILLRACE_RANDOM_GRAPHS=100000` tries so many graphs instead of 2,000 (build with `--release`);
//! - `MILLRACE_RANDOM_LOG=FILE` writes what they were made of and went through;
//! - `MILLRACE_RANDOM_SEED=N` tries one graph only.

#[path = "common/random/mod.rs"]
mod random;
#[path = "common/seeds.rs"]
mod seeds;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use millrace::compiler::passes::all as registry;
use millrace::ir::sampling::{RandomGraph, graph};
use millrace::ir::{Op, Operand, text};
use random::{Failure, Summary, examine};
use seeds::{number, on_all_processors};

/// Graphs of an ordinary test run.
const GRAPHS: u64 = 2000;

/// About as many nodes has a graph at most.
const NODES: usize = 16;

/// After so many failures a run ends.
const ENOUGH: usize = 12;

/// Graphs are of many sizes; small ones are the easiest to understand when they fail.
fn size(seed: u64) -> usize {
    2 + (seed as usize * 7) % (NODES - 1)
}

/// A folder for engines, in memory where the system has such a place: writing an engine waits for the disk.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn try_graph(graph: &RandomGraph, folder: &Path, summary: &mut Summary) -> Result<(), Failure> {
    catch_unwind(AssertUnwindSafe(|| examine(graph, folder, summary))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(Failure { pipeline: "unknown".into(), message: format!("panic: {}", text.unwrap_or_default()) })
    })
}

/// Smaller by one: without one output, or without one node that nobody reads.
fn smaller(graph: &RandomGraph) -> Vec<RandomGraph> {
    let mut candidates = Vec::new();
    let outputs = graph.module.graph.outputs.len();
    for at in (0..outputs).filter(|_| outputs > 1) {
        let mut candidate = graph.clone();
        candidate.module.graph.outputs.remove(at);
        candidate.output_bounds.remove(at);
        candidates.push(candidate);
    }
    for id in graph.module.graph.order.iter().rev() {
        let graph_of = &graph.module.graph;
        let results = &graph_of.nodes[*id].results;
        let reads = |o: &Operand| matches!(o, Operand::Value(v) if results.contains(v));
        let read = graph_of.nodes.iter().any(|(_, n)| n.operands.iter().any(reads));
        if read || graph_of.outputs.iter().any(|o| results.contains(&o.value)) {
            continue;
        }
        let mut candidate = graph.clone();
        candidate.module.graph.order.retain(|n| n != id);
        candidate.module.graph.remove_node(*id);
        // The text numbers nodes anew.
        if let Ok(module) = text::parse(&text::print(&candidate.module)) {
            candidate.module = module;
            candidates.push(candidate);
        }
    }
    candidates
}

/// A graph that fails too and does not when it is smaller by one: shorter drafts of the same seed come first.
fn reduce(seed: u64, folder: &Path, failure: Failure) -> (RandomGraph, Failure) {
    let try_one = |candidate: RandomGraph| {
        let failure = try_graph(&candidate, folder, &mut Summary::default()).err()?;
        Some((candidate, failure))
    };
    let drafts = (1..size(seed)).map(|nodes| graph(seed, nodes));
    let mut best = drafts.into_iter().find_map(try_one).unwrap_or((graph(seed, size(seed)), failure));
    while let Some(found) = smaller(&best.0).into_iter().find_map(try_one) {
        best = found;
    }
    best
}

fn run(seeds: std::ops::Range<u64>) -> Summary {
    let folder = scratch();
    let try_one = |seed: u64, mine: &mut Summary| {
        if let Err(failure) = try_graph(&graph(seed, size(seed)), folder.path(), mine) {
            mine.failures.push((seed, failure));
        }
        mine.failures.len() < ENOUGH
    };
    on_all_processors(seeds, try_one, Summary::join)
}

/// Writes the failing graph down, as small as it gets; returns what to tell.
fn describe(seed: u64, failure: Failure) -> String {
    let folder = scratch();
    let (reduced, failure) = reduce(seed, folder.path(), failure);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("random-graph-{seed}.ir"));
    let text = format!("// run: opt --passes={}\n{}", failure.pipeline, text::print(&reduced.module));
    std::fs::write(&path, text).unwrap();
    format!(
        "seed {seed}, pipeline {}\n  {}\n  graph: {}\n  again: MILLRACE_RANDOM_SEED={seed} cargo test --test random_graphs",
        failure.pipeline,
        failure.message,
        path.display()
    )
}

#[test]
fn random_graphs_keep_their_meaning() {
    let only = number("MILLRACE_RANDOM_SEED");
    let count = number("MILLRACE_RANDOM_GRAPHS").unwrap_or(GRAPHS);
    let mut summary = run(only.map_or(0..count, |seed| seed..seed + 1));
    summary.failures.sort_by_key(|(seed, _)| *seed);
    if let Ok(path) = std::env::var("MILLRACE_RANDOM_LOG") {
        std::fs::write(path, summary.report()).unwrap();
    }
    let failures: Vec<String> =
        std::mem::take(&mut summary.failures).into_iter().map(|(s, f)| describe(s, f)).collect();
    assert!(failures.is_empty(), "{} graph(s) failed\n{}", failures.len(), failures.join("\n"));
    if only.is_some() || count < GRAPHS {
        return;
    }
    let rare: Vec<&str> = Op::all_names()
        .into_iter()
        .filter(|op| summary.ops.get(*op).is_none_or(|dtypes| dtypes.values().sum::<usize>() < 30))
        .collect();
    assert!(rare.is_empty(), "hardly sampled: {rare:?}");
    let idle: Vec<&str> = registry()
        .iter()
        .map(|p| p.name())
        // The chunk passes want widths of whole panels and a layer that holds the peak; processors join no launches.
        .filter(|p| {
            !["begin-fusion", "schedule", "chunk-mlp", "chunk-attention", "group-launches"].contains(p)
        })
        .filter(|p| !summary.applied.contains_key(*p))
        .collect();
    assert!(idle.is_empty(), "never applied: {idle:?}");
    assert!(
        summary.vague * 10 < summary.outputs,
        "{} of {} outputs are judged loosely",
        summary.vague,
        summary.outputs
    );
}

/// Graphs on which something once went wrong, with everything that is claimed of random ones.
#[test]
fn regressions_stay_fixed() {
    let folder = scratch();
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests/regressions");
    let mut paths: Vec<_> = std::fs::read_dir(files).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths.iter().filter(|p| p.extension().is_some_and(|e| e == "ir")) {
        let module = text::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
        let graph = RandomGraph::of(module);
        if let Err(failure) = try_graph(&graph, folder.path(), &mut Summary::default()) {
            panic!("{}, pipeline {}: {}", path.display(), failure.pipeline, failure.message);
        }
    }
}
