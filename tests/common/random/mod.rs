//! Everything that is claimed of one random graph, and the summary of many.

mod judge;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use judge::Judge;
use millrace::compiler::pass::Context;
use millrace::compiler::passes::all as registry;
use millrace::compiler::pipeline::{Manager, Pipeline};
use millrace::ir::sampling::{Random, RandomGraph};
use millrace::ir::tensor::{Tensor, decode};
use millrace::ir::verify::check;
use millrace::ir::{Bindings, Module, Phase, plan, text};
use millrace::{Allocation, CompileOptions, Engine, SessionOptions, TensorRef, compile};

/// A claim that does not hold: the pipeline it was made for, and what happened.
#[derive(Debug)]
pub struct Failure {
    pub pipeline: String,
    pub message: String,
}

/// What many graphs were made of and went through.
#[derive(Default)]
pub struct Summary {
    pub graphs: usize,
    pub nodes: usize,
    /// Nodes by op, and within by element type of the first result.
    pub ops: BTreeMap<String, BTreeMap<String, usize>>,
    /// Graphs that a pass alone changed.
    pub applied: BTreeMap<String, usize>,
    /// Nodes by kernel that sessions ran.
    pub kernels: BTreeMap<String, usize>,
    pub sessions: usize,
    pub outputs: usize,
    pub vague: usize,
    pub failures: Vec<(u64, Failure)>,
}

impl Summary {
    pub fn join(&mut self, other: Summary) {
        let Summary { graphs, nodes, ops, applied, kernels, sessions, outputs, vague, failures } = other;
        self.graphs += graphs;
        self.nodes += nodes;
        for (op, dtypes) in ops {
            let mine = self.ops.entry(op).or_default();
            dtypes.into_iter().for_each(|(dtype, n)| *mine.entry(dtype).or_default() += n);
        }
        applied.into_iter().for_each(|(pass, n)| *self.applied.entry(pass).or_default() += n);
        kernels.into_iter().for_each(|(kernel, n)| *self.kernels.entry(kernel).or_default() += n);
        self.sessions += sessions;
        self.outputs += outputs;
        self.vague += vague;
        self.failures.extend(failures);
    }

    pub fn report(&self) -> String {
        let mut out = format!(
            "graphs {}\nnodes {}\nsessions {}\noutputs {}\noutputs with a wide tolerance {}\nfailures {}\n",
            self.graphs,
            self.nodes,
            self.sessions,
            self.outputs,
            self.vague,
            self.failures.len()
        );
        for (seed, failure) in &self.failures {
            writeln!(out, "failure seed {seed} [{}] {}", failure.pipeline, failure.message).unwrap();
        }
        out.push_str("\npass: graphs it changed\n");
        self.applied.iter().for_each(|(pass, n)| writeln!(out, "  {pass:<18} {n}").unwrap());
        out.push_str("\nkernel: nodes that sessions ran\n");
        self.kernels.iter().for_each(|(kernel, n)| writeln!(out, "  {kernel:<22} {n}").unwrap());
        out.push_str("\nop: nodes, by element type\n");
        for (op, dtypes) in &self.ops {
            let list: Vec<String> = dtypes.iter().map(|(dtype, n)| format!("{dtype} {n}")).collect();
            writeln!(out, "  {op:<18} {:<8} {}", dtypes.values().sum::<usize>(), list.join(", ")).unwrap();
        }
        out
    }

    fn count(&mut self, module: &Module) {
        self.graphs += 1;
        for (_, node) in module.graph.nodes.iter() {
            self.nodes += 1;
            let dtype = module.graph.values[node.results[0]].ty.dtype.to_string();
            *self.ops.entry(node.op.name().to_string()).or_default().entry(dtype).or_default() += 1;
        }
    }
}

/// What runs before a pass so that it finds what it looks for.
fn before(pass: &str, first: Phase, module: &Module) -> &'static str {
    match (pass, first) {
        _ if module.phase >= first && module.phase == Phase::Fused && pass != "fuse-glu" => "",
        ("fuse-glu", _) => "fuse-linear,merge-matmuls",
        (_, Phase::Imported) => "",
        (_, Phase::Canonical) => "canonicalize",
        (_, Phase::Fused) => "fuse-linear",
        (_, Phase::Scheduled) => "begin-fusion,schedule",
        _ => "begin-fusion,schedule,plan-memory",
    }
}

/// A pipeline of all passes in an order that the levels do not use.
fn shuffled(random: &mut Random) -> String {
    let early = ["canonicalize", "const-fold", "cse", "dce", "recover"];
    let late = [
        "merge-matmuls",
        "fuse-glu",
        "fuse-add-norm",
        "fuse-epilogue",
        "fuse-pointwise",
        "pack-weights",
        "canonicalize",
        "const-fold",
        "cse",
        "dce",
    ];
    let mut passes: Vec<&str> = Vec::new();
    (0..random.below(5)).for_each(|_| passes.push(random.pick(&early)));
    passes.push(random.pick(&["fuse-linear", "fuse-linear", "begin-fusion"]));
    (0..random.between(2, 9)).for_each(|_| passes.push(random.pick(&late)));
    passes.push(random.pick(&["schedule", "schedule{search=true}"]));
    passes.extend(["plan-memory", "mark-streamable"]);
    passes.join(",")
}

/// Checks every claim about `graph`; what it went through is added to `summary`.
pub fn examine(graph: &RandomGraph, folder: &Path, summary: &mut Summary) -> Result<(), Failure> {
    let fail = |pipeline: &str, message: String| Failure { pipeline: pipeline.to_string(), message };
    let module = &graph.module;
    summary.count(module);
    check(module).map_err(|e| fail("none: verify", e.to_string()))?;
    let printed = text::print(module);
    let parsed = text::parse(&printed).map_err(|e| fail("none: parse", e.to_string()))?;
    if &parsed != module || text::print(&parsed) != printed {
        return Err(fail("none: parse", "the text parses to another module".into()));
    }
    let judge = Judge::new(graph).map_err(|e| fail("none: evaluate", e.to_string()))?;
    summary.outputs += judge.outputs();
    summary.vague += judge.vague;
    for pass in registry() {
        let (first, _) = pass.phases();
        let prefix = before(pass.name(), first, module);
        let pipeline =
            if prefix.is_empty() { pass.name().to_string() } else { format!("{prefix},{}", pass.name()) };
        let mut after = module.clone();
        let parsed = Pipeline::parse(&pipeline).map_err(|e| fail(&pipeline, e.to_string()))?;
        let mut manager = Manager { verify_each: true, ..Manager::default() };
        manager.run(&parsed, &mut after, &mut Context::cpu()).map_err(|e| fail(&pipeline, e.to_string()))?;
        if manager.runs.last().is_some_and(|run| run.changed) {
            *summary.applied.entry(pass.name().to_string()).or_default() += 1;
            judge.evaluate(&after).map_err(|m| fail(&pipeline, format!("{m}\n{}", text::print(&after))))?;
        }
    }
    let mut random = Random::new(graph.seed ^ 0x7061_7373);
    let mut pipelines: Vec<String> = (0..3).map(|level| Pipeline::level(level).to_string()).collect();
    pipelines.push(shuffled(&mut random));
    // Every graph runs as the highest level and one of the others leave it.
    let also = random.pick(&[0, 1, 3]);
    for (n, pipeline) in pipelines.iter().enumerate() {
        engine(graph, &judge, pipeline, n == 2 || n == also, folder, summary)
            .map_err(|m| fail(pipeline, m))?;
    }
    // A long run would otherwise fill the folder.
    for extension in ["ir", "engine"] {
        let _ = std::fs::remove_file(folder.join(format!("{}.{extension}", graph.seed)));
    }
    Ok(())
}

/// Compiles, checks result and plan, and runs a session.
fn engine(
    graph: &RandomGraph,
    judge: &Judge,
    pipeline: &str,
    run: bool,
    folder: &Path,
    summary: &mut Summary,
) -> Result<(), String> {
    let text_of = |e: millrace::Error| e.to_string();
    let source = folder.join(format!("{}.ir", graph.seed));
    std::fs::write(&source, text::print(&graph.module)).map_err(|e| e.to_string())?;
    let options = CompileOptions {
        pipeline: Pipeline::parse(pipeline).map_err(text_of)?,
        verify_each: true,
        ..CompileOptions::default()
    };
    let compiled = compile(&source, &options, None).map_err(text_of)?;
    let module = &compiled.module;
    let shown = |m: String| format!("{m}\n{}", text::print(module));
    judge.evaluate(module).map_err(|m| shown(format!("evaluated: {m}")))?;
    let dims = &module.dims;
    let mut shapes = vec![Bindings::minima(dims), Bindings::maxima(dims), Bindings::hints(dims)];
    shapes.extend(judge.steps.iter().map(|s| s.bindings.clone()));
    for bindings in shapes {
        plan::check(module, &bindings).map_err(|o| shown(format!("plan: {}", o.message)))?;
    }
    if !run {
        return Ok(());
    }
    let file = folder.join(format!("{}.engine", graph.seed));
    compiled.write(&file, &mut |_, _| {}).map_err(text_of)?;
    let engine = Engine::open(&file).map_err(text_of)?;
    let pages = judge.steps[0].bindings.iter().find(|(s, _)| s.name() == "pages").map(|(_, v)| v);
    let allocation = if graph.seed.is_multiple_of(3) { Allocation::Dynamic } else { Allocation::Static };
    let threads = Some(1 + graph.seed as usize % 2);
    let options = SessionOptions { threads, allocation, kv_pages: pages, ..SessionOptions::default() };
    let mut session = engine.session(options).map_err(text_of)?;
    summary.sessions += 1;
    for (_, node) in module.graph.nodes.iter() {
        let kernel = node.kernel.map_or("none", |k| module.kernels[k].name.as_str());
        *summary.kernels.entry(kernel.to_string()).or_default() += 1;
    }
    for (at, step) in judge.steps.iter().enumerate() {
        let bytes: Vec<Vec<u8>> = step.inputs.iter().map(Tensor::to_bytes).collect();
        let extents: Vec<Vec<u64>> =
            step.inputs.iter().map(|t| t.shape.iter().map(|d| *d as u64).collect()).collect();
        let refs: Vec<TensorRef<'_>> = step
            .inputs
            .iter()
            .zip(&bytes)
            .zip(&extents)
            .map(|((t, bytes), shape)| TensorRef { dtype: t.dtype, shape, bytes })
            .collect();
        session.run(&refs).map_err(|e| shown(format!("session: {e}")))?;
        let mut found = Vec::new();
        for n in 0..module.graph.outputs.len() {
            let output = session.output(n).ok_or_else(|| format!("session: no output {n}"))?;
            let shape = output.shape.iter().map(|d| *d as usize).collect();
            found.push(Tensor { dtype: output.dtype, shape, data: decode(output.dtype, output.bytes) });
        }
        judge.compare(at, &found).map_err(|m| shown(format!("session: {m}")))?;
    }
    Ok(())
}
