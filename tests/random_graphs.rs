//! Random graphs mean the same before and after every pass, at every level, and in a session.
//!
//! - `MILLRACE_RANDOM_GRAPHS=100000` tries so many graphs instead of 2,000 (build with `--release`);
//! - `MILLRACE_RANDOM_LOG=FILE` writes what they were made of and went through;
//! - `MILLRACE_RANDOM_SEED=N` tries one graph only.

#[path = "common/random/mod.rs"]
mod random;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use millrace::compiler::passes::registry;
use millrace::ir::sampling::{RandomGraph, graph};
use millrace::ir::{Op, text};
use random::{Failure, Summary, examine};

/// Graphs of an ordinary test run.
const GRAPHS: u64 = 2000;

/// About as many nodes has a graph at most.
const NODES: usize = 16;

/// After so many failures a run ends.
const ENOUGH: usize = 12;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{variable}={v} is no number")))
}

/// Graphs are of many sizes; small ones are the easiest to understand when they fail.
fn size(seed: u64) -> usize {
    2 + (seed as usize * 7) % (NODES - 1)
}

fn try_graph(graph: &RandomGraph, folder: &Path, summary: &mut Summary) -> Result<(), Failure> {
    catch_unwind(AssertUnwindSafe(|| examine(graph, folder, summary))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
        Err(Failure { pipeline: "unknown".into(), message: format!("panic: {}", text.unwrap_or_default()) })
    })
}

/// A smaller graph that fails too: shorter drafts of the same seed, then fewer outputs and what they need.
fn reduce(seed: u64, folder: &Path, first: Failure) -> (RandomGraph, Failure) {
    let mut fails = |candidate: &RandomGraph| try_graph(candidate, folder, &mut Summary::default()).err();
    let mut best = (graph(seed, size(seed)), first);
    for nodes in 1..size(seed) {
        let candidate = graph(seed, nodes);
        if let Some(failure) = fails(&candidate) {
            best = (candidate, failure);
            break;
        }
    }
    let mut at = 0;
    while best.0.module.graph.outputs.len() > 1 && at < best.0.module.graph.outputs.len() {
        let mut candidate = best.0.clone();
        candidate.module.graph.outputs.remove(at);
        candidate.output_bounds.remove(at);
        match fails(&candidate) {
            Some(failure) => best = (candidate, failure),
            None => at += 1,
        }
    }
    let order = best.0.module.graph.order.clone();
    for id in order.into_iter().rev() {
        let graph = &best.0.module.graph;
        let results = &graph.nodes[id].results;
        let read = graph.nodes.iter().any(|(_, n)| {
            n.operands.iter().any(|o| matches!(o, millrace::ir::Operand::Value(v) if results.contains(v)))
        });
        if read || graph.outputs.iter().any(|o| results.contains(&o.value)) {
            continue;
        }
        let mut candidate = best.0.clone();
        candidate.module.graph.order.retain(|n| *n != id);
        candidate.module.graph.remove_node(id);
        // Numbers stay with their values; the text does not depend on those of nodes.
        candidate.module = text::parse(&text::print(&candidate.module)).unwrap();
        if let Some(failure) = fails(&candidate) {
            let printed = text::print(&candidate.module);
            best = (candidate, failure);
            return finish_reducing(best, printed, folder);
        }
    }
    best
}

/// Goes on with node ids of a text that was read again.
fn finish_reducing(best: (RandomGraph, Failure), _printed: String, folder: &Path) -> (RandomGraph, Failure) {
    let mut best = best;
    loop {
        let graph = &best.0.module.graph;
        let dead = graph.order.iter().rev().copied().filter(|id| {
            let results = &graph.nodes[*id].results;
            let read = graph.nodes.iter().any(|(_, n)| {
                n.operands.iter().any(|o| matches!(o, millrace::ir::Operand::Value(v) if results.contains(v)))
            });
            !read && !graph.outputs.iter().any(|o| results.contains(&o.value))
        });
        let smaller = dead.collect::<Vec<_>>().into_iter().find_map(|id| {
            let mut candidate = best.0.clone();
            candidate.module.graph.order.retain(|n| *n != id);
            candidate.module.graph.remove_node(id);
            candidate.module = text::parse(&text::print(&candidate.module)).ok()?;
            let failure = try_graph(&candidate, folder, &mut Summary::default()).err()?;
            Some((candidate, failure))
        });
        match smaller {
            Some(found) => best = found,
            None => return best,
        }
    }
}

fn run(seeds: std::ops::Range<u64>) -> Summary {
    let folder = tempfile::tempdir().unwrap();
    let next = AtomicU64::new(seeds.start);
    let total = Mutex::new(Summary::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Summary::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || mine.failures.len() >= ENOUGH {
                        break;
                    }
                    let tried = graph(seed, size(seed));
                    if let Err(failure) = try_graph(&tried, folder.path(), &mut mine) {
                        mine.failures.push((seed, failure));
                    }
                }
                total.lock().unwrap().join(mine);
            });
        }
    });
    total.into_inner().unwrap()
}

/// Writes the failing graph down, as small as it gets; returns what to tell.
fn describe(seed: u64, failure: Failure) -> String {
    let folder = tempfile::tempdir().unwrap();
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
        .filter(|p| *p != "begin-fusion" && *p != "schedule" && !summary.applied.contains_key(*p))
        .collect();
    assert!(idle.is_empty(), "never applied: {idle:?}");
    assert!(
        summary.vague * 10 < summary.outputs,
        "{} of {} outputs are judged loosely",
        summary.vague,
        summary.outputs
    );
}
