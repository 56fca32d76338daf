//! `rolled{..}` makes of random graphs of repeated layers what its steps make of them, and fails where they fail only.
//!
//! - `MILLRACE_RANDOM_GRAPHS=100000` tries so many graphs instead of 300 (build with `--release`);
//! - `MILLRACE_RANDOM_LOG=FILE` writes how many were rolled, and why others were not;
//! - `MILLRACE_RANDOM_SEED=N` tries one graph only.

#[path = "../../tests/common/seeds.rs"]
mod seeds;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use millrace_compiler::pass::{Context, Pass};
use millrace_compiler::pipeline::{Controls, LEVELS, Manager, Pipeline};
use millrace_compiler::registry::Registry;
use millrace_compiler::target::Target;
use millrace_ir::eval::evaluate;
use millrace_ir::ops::Unary;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::sampling::{Layered, Random, RandomGraph, layered};
use millrace_ir::tensor::Tensor;
use millrace_ir::weights::WeightReader;
use millrace_ir::{Module, Op, Operand, Phase, Result as Outcome, text};
use seeds::{number, on_all_processors};

/// Graphs of an ordinary test run.
const GRAPHS: u64 = 300;

/// Graphs that showed a bug: numbers of a layer's seeded weights, equal by chance in few layers, were taken for those of all;
/// in the last one, a weight was called after a source name that only one layer has.
const SHOWED_A_BUG: [u64; 4] = [13229, 31532, 55373, 87720];

/// After so many failures a thread ends.
const ENOUGH: usize = 6;

/// A module after a pipeline.
struct Done {
    module: Module,
    context: Context,
    runs: Vec<(&'static str, bool, usize)>,
    /// Whether counters and runs are those of the steps on the whole module.
    counted: bool,
}

impl Done {
    /// What `rolled` said.
    fn said(&self) -> Vec<&str> {
        let own = self.context.remarks.iter().filter(|r| r.pass == "rolled");
        own.map(|r| r.message.as_str()).collect()
    }

    fn rolled(&self) -> bool {
        self.said().iter().any(|s| s.contains("equal layers of"))
    }
}

/// A pipeline with the target whose facts it gets.
struct Way {
    pipeline: Pipeline,
    context: Context,
}

impl Way {
    fn run(&self, module: &Module, whole: bool) -> Outcome<Done> {
        let (mut module, mut context) = (module.clone(), self.context.target_facts());
        let controls = Controls { whole, ..Controls::default() };
        let mut manager = Manager { controls, verify_each: true, ..Manager::default() };
        manager.run(&self.pipeline, &mut module, &mut context)?;
        let runs = manager.runs.iter().map(|r| (r.name, r.changed, r.nodes)).collect();
        module.compact();
        Ok(Done { module, context, runs, counted: true })
    }
}

fn outputs(graph: &RandomGraph, module: &Module) -> Result<Vec<Vec<Tensor>>, String> {
    let mut random = Random::new(graph.seed);
    let mut steps = Vec::new();
    for _ in 0..2 {
        let bindings = graph.bindings(&mut random);
        let inputs = graph.inputs(&bindings, &mut random);
        let mut states = graph.states(&bindings, &mut random);
        let mut reader = WeightReader::new(module);
        let found = evaluate(module, &mut reader, &inputs, &mut states).map_err(|e| e.to_string())?;
        steps.push(found.into_iter().chain(states).collect());
    }
    Ok(steps)
}

/// How the outputs and states of two modules of one interface differ.
fn meaning(graph: &RandomGraph, whole: &Module, rolled: &Module) -> Result<(), String> {
    let (expected, found) = (outputs(graph, whole)?, outputs(graph, rolled)?);
    for (step, (expected, found)) in expected.iter().zip(&found).enumerate() {
        for (n, (a, b)) in expected.iter().zip(found).enumerate() {
            let same = |(x, y): (&f64, &f64)| x.to_bits() == y.to_bits();
            if (a.dtype, &a.shape) != (b.dtype, &b.shape) || !a.data.iter().zip(&b.data).all(same) {
                return Err(format!("another meaning: step {step}, output or state {n}"));
            }
        }
    }
    Ok(())
}

/// The first lines in which two modules differ.
fn difference(whole: &Module, rolled: &Module) -> String {
    let (a, b) = (text::print(whole), text::print(rolled));
    let lines = a.lines().zip(b.lines()).filter(|(a, b)| a != b).take(6);
    let mut out = format!("{} lines instead of {}\n", b.lines().count(), a.lines().count());
    lines.for_each(|(a, b)| writeln!(out, "    - {a}\n    + {b}").unwrap());
    out
}

/// The property: rolling changes nothing.
fn same(graph: &RandomGraph, way: &Way) -> Result<Done, String> {
    let [rolled, whole] = [false, true].map(|whole| way.run(&graph.module, whole));
    let (mut rolled, whole) = match (rolled, whole) {
        (Ok(rolled), Ok(whole)) => (rolled, whole),
        (Err(e), Ok(_)) => return Err(format!("fails when it rolls: {e}")),
        (Ok(_), Err(e)) => return Err(format!("fails unless it rolls: {e}")),
        (Err(_), Err(e)) => return Err(format!("fails: {e}")),
    };
    let said = rolled.said();
    meaning(graph, &whole.module, &rolled.module)
        .map_err(|m| format!("{m}; {said:?}\n{}", difference(&whole.module, &rolled.module)))?;
    if text::print(&whole.module) != text::print(&rolled.module) {
        return Err(format!("another text; {said:?}\n{}", difference(&whole.module, &rolled.module)));
    }
    // No number is equal to one that is none, but their texts are.
    if whole.module != rolled.module && format!("{:?}", whole.module) != format!("{:?}", rolled.module) {
        return Err(format!("another module of equal text; {said:?}"));
    }
    rolled.counted = whole.context.stats == rolled.context.stats && whole.runs == rolled.runs;
    Ok(rolled)
}

/// What runs in a group, in orders that the levels do not use.
fn shuffled(random: &mut Random) -> String {
    let early =
        ["canonicalize", "const-fold", "cse", "dce", "recover", "fixpoint{canonicalize,const-fold,cse,dce}"];
    let late = [
        "merge-matmuls",
        "merge-matmuls",
        "fuse-glu",
        "fuse-add-norm",
        "fuse-epilogue",
        "fuse-pointwise",
        "pack-weights",
        "pack-weights",
        "canonicalize",
        "const-fold",
        "cse",
        "dce",
        "fixpoint{cse,dce}",
        "chunk-mlp{parts=2,force=true}",
    ];
    let mut first: Vec<&str> = (0..random.below(5)).map(|_| random.pick(&early)).collect();
    let mut second = vec![random.pick(&["fuse-linear", "fuse-linear", "begin-fusion"])];
    (0..random.between(1, 7)).for_each(|_| second.push(random.pick(&late)));
    let last = random.pick(&["schedule", "schedule{search=true}"]);
    match random.below(3) {
        // One group, two of them, or one behind other passes.
        0 => format!("rolled<min=6>{{{},{last}}}", [first, second].concat().join(",")),
        1 => {
            first.push("dce");
            format!("rolled<min=6>{{{}}},rolled<min=7>{{{}}},{last}", first.join(","), second.join(","))
        }
        _ => {
            first.push("cse");
            format!("{},rolled<min=6>{{{},{last}}}", first.join(","), second.join(","))
        }
    }
}

/// The pipelines that a graph goes through.
fn ways(seed: u64) -> Vec<(String, Way)> {
    let mut random = Random::new(seed ^ 0x726f_6c6c);
    let level = LEVELS[random.between(1, 2)].replace("rolled{", "rolled<min=6>{");
    [level, shuffled(&mut random)]
        .into_iter()
        .map(|spelled| {
            let target = random.pick(&["cpu", "cpu", "cuda"]);
            let context = Context::of(&Target::named(target).unwrap());
            let pipeline = Pipeline::parse(&spelled).unwrap();
            (format!("{spelled} for {target}"), Way { pipeline, context })
        })
        .collect()
}

/// What many graphs went through.
#[derive(Default)]
struct Summary {
    graphs: usize,
    nodes: usize,
    pipelines: usize,
    /// Pipelines that rolled.
    rolled: usize,
    /// Those among them that made weights, and those that made nodes fewer.
    packed: usize,
    fused: usize,
    /// Graphs that rolled, by number of layers of the longest run.
    layers: BTreeMap<usize, usize>,
    /// Irregularities: in pipelines that rolled and in those that did not.
    planted: BTreeMap<&'static str, [usize; 2]>,
    /// Why layers were not rolled.
    reasons: BTreeMap<String, usize>,
    /// Pipelines whose counters or runs are not those of the steps on the whole module.
    uneven: usize,
    failures: Vec<(u64, String)>,
}

impl Summary {
    fn join(&mut self, other: Summary) {
        self.graphs += other.graphs;
        self.nodes += other.nodes;
        self.pipelines += other.pipelines;
        self.rolled += other.rolled;
        self.packed += other.packed;
        self.fused += other.fused;
        self.uneven += other.uneven;
        other.layers.into_iter().for_each(|(k, n)| *self.layers.entry(k).or_default() += n);
        for (what, [yes, no]) in other.planted {
            let counts = self.planted.entry(what).or_default();
            (counts[0], counts[1]) = (counts[0] + yes, counts[1] + no);
        }
        other.reasons.into_iter().for_each(|(k, n)| *self.reasons.entry(k).or_default() += n);
        self.failures.extend(other.failures);
    }

    fn add(&mut self, layered: &Layered, done: &Done) {
        let before = &layered.graph.module;
        self.pipelines += 1;
        self.uneven += usize::from(!done.counted);
        let rolled = done.rolled();
        if rolled {
            self.rolled += 1;
            self.packed += usize::from(done.module.weights.iter().any(|(_, w)| w.name.contains(".pack")));
            self.fused += usize::from(done.module.graph.nodes.len() < before.graph.nodes.len());
            let longest = layered.layers.iter().copied().max().unwrap_or(0);
            *self.layers.entry(longest).or_default() += 1;
        }
        for what in layered.planted.iter().copied().chain(layered.planted.is_empty().then_some("nothing")) {
            self.planted.entry(what).or_default()[usize::from(!rolled)] += 1;
        }
        for reason in done.said().iter().filter(|s| !s.contains("equal layers of")) {
            // Names are of one graph.
            let reason: Vec<&str> =
                reason.split(' ').filter(|w| !w.starts_with(['`', '@']) && !w.contains('`')).collect();
            *self.reasons.entry(reason.join(" ")).or_default() += 1;
        }
    }

    fn report(&self) -> String {
        let mut out = format!(
            "graphs {}\nnodes {}\npipelines {}\nrolled {}\nrolled with fewer nodes {}\nrolled with packed weights {}\nother counters {}\nfailures {}\n",
            self.graphs,
            self.nodes,
            self.pipelines,
            self.rolled,
            self.fused,
            self.packed,
            self.uneven,
            self.failures.len()
        );
        for (seed, failure) in &self.failures {
            writeln!(out, "failure seed {seed} {}", failure.lines().next().unwrap_or("")).unwrap();
        }
        out.push_str("\nlayers: pipelines that rolled\n");
        self.layers.iter().for_each(|(k, n)| writeln!(out, "  {k:<4} {n}").unwrap());
        out.push_str("\nirregular: pipelines that rolled, and that did not\n");
        self.planted.iter().for_each(|(k, [yes, no])| writeln!(out, "  {k:<34} {yes:<8} {no}").unwrap());
        out.push_str("\nremark: pipelines\n");
        self.reasons.iter().for_each(|(k, n)| writeln!(out, "  {n:<8} {k}").unwrap());
        out
    }
}

fn size(seed: u64) -> usize {
    1 + (seed as usize * 7) % 12
}

/// Checks the property on the graph of a seed; a failure names the pipeline.
fn examine(layered: &Layered, summary: &mut Summary) -> Result<(), String> {
    summary.graphs += 1;
    summary.nodes += layered.graph.module.graph.nodes.len();
    for (spelled, way) in ways(layered.graph.seed) {
        let checked = catch_unwind(AssertUnwindSafe(|| same(&layered.graph, &way)));
        let checked = checked.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(format!("panic: {}", text.unwrap_or_default()))
        });
        let done = checked.map_err(|m| format!("[{spelled}] {:?} {m}", layered.planted))?;
        summary.add(layered, &done);
    }
    Ok(())
}

fn run(seeds: std::ops::Range<u64>) -> Summary {
    let try_one = |seed: u64, mine: &mut Summary| {
        if let Err(failure) = examine(&layered(seed, size(seed)), mine) {
            mine.failures.push((seed, failure));
        }
        mine.failures.len() < ENOUGH
    };
    on_all_processors(seeds, try_one, Summary::join)
}

/// Writes the failing graph down, of the shortest draft that fails; returns what to tell.
fn describe(seed: u64, failure: String) -> String {
    let mut sizes = 0..size(seed);
    let shorter = sizes.find_map(|nodes| {
        let candidate = layered(seed, nodes);
        let failure = examine(&candidate, &mut Summary::default()).err()?;
        Some((candidate, failure))
    });
    let (layered, failure) = shorter.unwrap_or_else(|| (layered(seed, size(seed)), failure));
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("random-layers-{seed}.ir"));
    std::fs::write(&path, text::print(&layered.graph.module)).unwrap();
    format!("seed {seed}, {:?} layers: {failure}\n  graph: {}", layered.layers, path.display())
}

#[test]
fn random_layers_are_what_the_steps_make_of_them() {
    let only = number("MILLRACE_RANDOM_SEED");
    let count = number("MILLRACE_RANDOM_GRAPHS").unwrap_or(GRAPHS);
    let mut summary = run(only.map_or(0..count, |seed| seed..seed + 1));
    for seed in SHOWED_A_BUG.into_iter().filter(|_| only.is_none()) {
        summary.join(run(seed..seed + 1));
    }
    summary.failures.sort();
    if let Ok(path) = std::env::var("MILLRACE_RANDOM_LOG") {
        std::fs::write(path, summary.report()).unwrap();
    }
    let failures: Vec<String> =
        std::mem::take(&mut summary.failures).into_iter().map(|(s, f)| describe(s, f)).collect();
    assert!(failures.is_empty(), "{} graph(s) failed\n{}", failures.len(), failures.join("\n"));
    if only.is_some() || count < GRAPHS {
        return;
    }
    let report = summary.report();
    // A node that is merged in few layers and dead in more of them is counted elsewhere, which no result shows.
    assert!(summary.uneven * 5_000 <= summary.pipelines, "{report}");
    // The property says little where nothing rolls.
    assert!(summary.rolled * 5 > summary.pipelines, "{report}");
    assert!(summary.fused * 2 > summary.rolled && summary.packed * 10 > summary.rolled, "{report}");
    assert!(summary.layers.len() > 5 && summary.planted.len() > 6 && summary.reasons.len() > 3, "{report}");
}

/// Makes every `tanh` a sigmoid, in modules of many nodes only: what no rewrite may look at.
#[derive(Clone)]
struct Many(usize);

impl Pass for Many {
    fn name(&self) -> &'static str {
        "many"
    }

    fn help(&self) -> &'static str {
        "looks at the number of nodes"
    }

    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Scheduled)
    }

    fn run(&self, module: &mut Module, _: &mut Context) -> Outcome<bool> {
        if module.graph.order.len() < self.0 {
            return Ok(false);
        }
        let mut changed = false;
        for id in module.graph.order.clone() {
            let node = &mut module.graph.nodes[id];
            if matches!(&*node.op, Op::Unary(u) if u.function == UnaryFn::Tanh) {
                (node.op, changed) = (Unary { function: UnaryFn::Sigmoid }.into(), true);
            }
        }
        Ok(changed)
    }
}

/// A pass whose result for few layers is not that for many is found out.
#[test]
fn what_does_not_follow_from_few_layers_is_seen() {
    let mut seen = 0;
    for seed in 0..60 {
        let graph = layered(seed, 6).graph;
        let nodes = graph.module.graph.order.len();
        let way = |pass: Many| {
            let registry = Registry::standard().with(Box::new(pass));
            let pipeline = Pipeline::parse_with("rolled<min=6>{many,dce}", &registry).unwrap();
            Way { pipeline, context: Context::cpu() }
        };
        let rolls = same(&graph, &way(Many(0))).unwrap().rolled();
        let runs = way(Many(0)).run(&graph.module, true).unwrap().runs;
        if rolls && runs[0].1 {
            let failure = same(&graph, &way(Many(nodes))).err();
            assert!(failure.is_some_and(|f| f.starts_with("another")), "seed {seed}");
            seen += 1;
        }
    }
    assert!(seen > 10, "{seen} graphs show it");
}

/// One weight of a layer in place of another one's is found out.
#[test]
fn a_weight_of_another_layer_is_seen() {
    let mut seen = 0;
    for seed in 0..120 {
        let graph = layered(seed, 6).graph;
        let way = Way {
            pipeline: Pipeline::parse("rolled<min=6>{canonicalize,dce}").unwrap(),
            context: Context::cpu(),
        };
        let done = same(&graph, &way).unwrap();
        if !done.rolled() {
            continue;
        }
        let mut wrong = done.module.clone();
        let weights: Vec<_> = wrong
            .graph
            .order
            .iter()
            .flat_map(|id| {
                wrong.graph.nodes[*id].operands.iter().enumerate().map(move |(slot, o)| (*id, slot, *o))
            })
            .filter_map(|(id, slot, o)| if let Operand::Weight(w) = o { Some((id, slot, w)) } else { None })
            .collect();
        let middle = weights.len() / 2;
        let Some((id, slot, weight)) = weights.get(middle).copied() else { continue };
        let like = |w: &&(_, _, _)| {
            let (a, b) = (&wrong.weights[w.2], &wrong.weights[weight]);
            a.ty == b.ty && a.expr != b.expr
        };
        let Some((_, _, other)) = weights[middle..].iter().find(like) else { continue };
        wrong.graph.nodes[id].operands[slot] = Operand::Weight(*other);
        seen += usize::from(meaning(&graph, &done.module, &wrong).is_err());
    }
    assert!(seen > 12, "{seen} graphs show it");
}
