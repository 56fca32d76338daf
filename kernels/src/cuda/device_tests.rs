//! Cases for a device: kernels, launches at concrete bindings, operands and what the reference evaluator makes of them.
//!
//! `MILLRACE_CUDA_CASES=folder cargo test -p millrace-kernels device_tests -- --ignored` writes sources `k0.cu`, ..,
//! `data.bin` and `cases.json` for a driver that launches the kernels and compares.

mod cases;
mod gemv;
mod splits;
mod tiles;
mod timings;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use millrace_ir::eval::evaluate_with;
use millrace_ir::ops::{EvalCtx, Numerics, Op};
use millrace_ir::sampling::{Fill, Random, RandomGraph, graph};
use millrace_ir::tensor::Tensor;
use millrace_ir::weights::WeightReader;
use millrace_ir::{Bindings, Builder, DType, Def, Dim, Module, Node, Operand, Sym, TensorType};

use super::plan::{Argument, Planned, Site};
use super::{Arch, select};

/// The folder that a variable of the environment names, made if it is not there.
fn folder(variable: &str) -> PathBuf {
    let folder = PathBuf::from(std::env::var_os(variable).unwrap());
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Kernels and cases of one dump.
#[derive(Default)]
struct Dump {
    kernels: BTreeMap<String, usize>,
    texts: Vec<(String, &'static str)>,
    data: Vec<u8>,
    cases: Vec<String>,
    timings: Vec<String>,
    seen: BTreeMap<String, usize>,
}

impl Dump {
    fn bytes(&mut self, bytes: &[u8]) -> String {
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let at = self.data.len();
        self.data.extend(bytes);
        format!("[{at}, {}]", bytes.len())
    }

    fn kernel(&mut self, text: &str, family: &'static str) -> usize {
        if let Some(at) = self.kernels.get(text) {
            return *at;
        }
        self.kernels.insert(text.to_string(), self.texts.len());
        self.texts.push((text.to_string(), family));
        self.texts.len() - 1
    }

    /// Adds what `node` computes. Node and operand values come from an evaluation.
    fn add(
        &mut self,
        name: &str,
        module: &Module,
        node: &Node,
        planned: &Planned,
        ctx: &EvalCtx<'_>,
        found: &[Tensor],
    ) {
        let operands = ctx.operands;
        let bindings = ctx.bindings;
        let variant = planned.variants.iter().find(|v| v.when.iter().all(|c| c.holds(bindings))).unwrap();
        let elements: usize =
            operands.iter().map(|t| t.data.len()).chain(found.iter().map(|t| t.data.len())).sum();
        let key: String = variant.launches.iter().map(|l| l.source.text.as_str()).collect();
        let seen = self.seen.entry(key).or_default();
        *seen += 1;
        if *seen > 1 || elements > 60_000 || variant.launches.is_empty() {
            return;
        }
        let launches = self.launches(node, planned, bindings);
        let inputs: Vec<String> = operands
            .iter()
            .map(|t| {
                let at = self.bytes(&t.to_bytes());
                format!("{{\"at\": {at}, \"dtype\": \"{}\"}}", t.dtype)
            })
            .collect();
        let outputs: Vec<String> = found
            .iter()
            .map(|t| {
                let at = self.bytes(&t.to_bytes());
                format!("{{\"at\": {at}, \"dtype\": \"{}\"}}", t.dtype)
            })
            .collect();
        let traits = node.op.traits();
        let fits = |i: &usize| {
            module.operand_type(node.operands[*i]) == module.operand_type(Operand::Value(node.results[0]))
        };
        let in_place = traits.in_place.filter(fits).map_or("null".to_string(), |i| i.to_string());
        let numbers = |d: DType| !d.is_float();
        let exact = traits.numerics == Numerics::Exact || found.iter().all(|t| numbers(t.dtype));
        self.cases.push(format!(
            "{{\"name\": \"{name}\", \"op\": \"{}\", \"exact\": {exact}, \"in_place\": {in_place}, \"inputs\": [{}], \
             \"outputs\": [{}], \"launches\": [{}]}}",
            node.op.name(),
            inputs.join(", "),
            outputs.join(", "),
            launches
        ));
    }

    /// The launches of a node at concrete bindings. Buffers are operands, then results.
    fn launches(&mut self, node: &Node, planned: &Planned, bindings: &Bindings) -> String {
        let variant = planned.variants.iter().find(|v| v.when.iter().all(|c| c.holds(bindings))).unwrap();
        let buffer = |operand: &Operand| -> usize {
            let result = node.results.iter().position(|r| Operand::Value(*r) == *operand);
            let operand = node.operands.iter().position(|o| o == operand);
            result.map(|r| node.operands.len() + r).or(operand).unwrap()
        };
        let mut launches = Vec::new();
        for launch in &variant.launches {
            let number = |d: &Dim| d.extent(bindings).unwrap();
            let args: Vec<String> = launch
                .args
                .iter()
                .map(|a| match a {
                    Argument::Address(o) => format!("[\"b\", {}]", buffer(o)),
                    Argument::I32(d) => format!("[\"i\", {}]", i32::try_from(number(d)).unwrap()),
                    Argument::F32(v) => format!("[\"f\", {v}]"),
                    other => panic!("{other:?}"),
                })
                .collect();
            let grid: Vec<String> = launch.grid.iter().map(|d| number(d).to_string()).collect();
            let kernel = self.kernel(&launch.source.text, launch.source.family);
            launches.push(format!(
                "{{\"kernel\": {kernel}, \"grid\": [{}], \"threads\": {}, \"shared\": {}, \"args\": [{}]}}",
                grid.join(", "),
                launch.threads,
                launch.shared,
                args.join(", ")
            ));
        }
        launches.join(", ")
    }

    /// Evaluates a graph and adds every node that has a plan.
    fn graph(&mut self, name: &str, case: &RandomGraph, seed: u64) {
        let mut random = Random::new(seed);
        let mut bindings = case.bindings(&mut random);
        if let Some(huge) = Sym::new(HUGE).filter(|s| bindings.get(*s).is_some()) {
            bindings.set(huge, 5);
        }
        let inputs = case.inputs(&bindings, &mut random);
        self.evaluate(name, case, &bindings, &inputs, &mut random);
    }

    fn evaluate(
        &mut self,
        name: &str,
        case: &RandomGraph,
        bindings: &Bindings,
        inputs: &[Tensor],
        random: &mut Random,
    ) {
        let module = &case.module;
        let mut states = case.states(bindings, random);
        let mut number = 0;
        let mut weights = WeightReader::new(module);
        evaluate_with(module, &mut weights, inputs, &mut states, &mut |node, ctx| {
            let mut results = node.op.eval(ctx)?;
            results.iter_mut().for_each(Tensor::round);
            number += 1;
            if let Some(planned) = plan(module, node) {
                self.add(&format!("{name}.{number}"), module, node, &planned, ctx, &results);
            }
            Ok(results)
        })
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        for (i, (text, _)) in self.texts.iter().enumerate() {
            std::fs::write(folder.join(format!("k{i}.cu")), text).unwrap();
        }
        let mut json = String::from("{\"families\": [");
        let families: Vec<String> = self.texts.iter().map(|(_, f)| format!("\"{f}\"")).collect();
        let (cases, timings) = (self.cases.join(",\n"), self.timings.join(",\n"));
        let _ = write!(
            json,
            "{}], \"cases\": [\n{cases}\n], \"timings\": [\n{timings}\n]}}",
            families.join(", ")
        );
        std::fs::write(folder.join("cases.json"), json).unwrap();
        std::fs::write(folder.join("data.bin"), &self.data).unwrap();
    }
}

fn plan(module: &Module, node: &Node) -> Option<Planned> {
    let Def::Node { node: id, .. } = module.graph.values[node.results[0]].def else { return None };
    select::plan(Site { module, nodes: &[id], arch: Arch::Sm90a })
}

/// Whether another family computes the op.
fn elsewhere(op: &Op) -> bool {
    matches!(
        op,
        Op::FusedMatmul(_)
            | Op::Matmul(_)
            | Op::Rope(_)
            | Op::KvAppend(_)
            | Op::PagedAttention(_)
            | Op::Attention(_)
            | Op::MeanPool(_)
    )
}

#[test]
fn every_op_of_random_graphs_has_a_plan() {
    let mut names: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..400 {
        let case = graph(seed, 14);
        for (_, node) in case.module.graph.nodes.iter().filter(|(_, n)| !elsewhere(&n.op)) {
            let types = node.operands.iter().map(|o| case.module.operand_type(*o));
            let whole = types
                .chain(node.results.iter().map(|r| &case.module.graph.values[*r].ty))
                .all(|t| t.dtype != DType::I4);
            let planned = plan(&case.module, node);
            assert_eq!(
                planned.is_some(),
                whole || matches!(*node.op, Op::Reshape(_)),
                "seed {seed}: {:?}",
                node.op
            );
            let Some(planned) = planned else { continue };
            *names.entry(node.op.name()).or_default() += 1;
            for launch in planned.variants.iter().flat_map(|v| &v.launches) {
                assert!(launch.dependent && launch.threads <= 1024 && launch.threads.is_multiple_of(32));
                let text = &launch.source.text;
                let parameters = text.split("KERNEL(").nth(1).unwrap().split(") {").next().unwrap();
                assert_eq!(parameters.split(',').count(), launch.args.len(), "{text}");
                assert!(text.contains("wait_for_predecessor();\n    release_successor();"));
            }
        }
    }
    assert!(names.len() > 40, "{names:?}");
}

/// A symbol that may be as large as an extent can be.
const HUGE: &str = "huge";

/// A graph of one node.
fn single(op: impl Into<Op>, operands: &[(DType, &[&str])]) -> Module {
    let mut b = Builder::new("case");
    let mut dims = BTreeMap::new();
    for (_, shape) in operands {
        for text in shape.iter().filter(|t| t.parse::<u64>().is_err()) {
            let most = match *text {
                "w" => 3000,
                // Indices need 64 bits.
                HUGE => i32::MAX as u64,
                _ => 40,
            };
            dims.entry(text.to_string()).or_insert_with(|| b.dim(text, 1, most, None).unwrap());
        }
    }
    let inputs: Vec<Operand> = operands
        .iter()
        .enumerate()
        .map(|(i, (dtype, shape))| {
            let shape = shape.iter().map(|t| t.parse::<u64>().map_or_else(|_| dims[*t].clone(), Dim::from));
            b.input(&format!("x{i}"), TensorType::new(*dtype, shape))
        })
        .collect();
    let results = b.node(op, &inputs, "case").unwrap_or_else(|e| panic!("{e}"));
    for (i, result) in results.into_iter().enumerate() {
        b.output(&format!("y{i}"), result).unwrap();
    }
    b.finish()
}

impl Dump {
    fn one(&mut self, op: impl Into<Op>, operands: &[(DType, &[&str])], fills: &[Fill]) {
        let mut case = RandomGraph::of(single(op, operands));
        for (fill, given) in case.fills.iter_mut().zip(fills) {
            *fill = given.clone();
        }
        let name = format!("one{}", self.cases.len());
        self.graph(&name, &case, 7 + self.cases.len() as u64);
    }

    /// A node over given values.
    fn of(&mut self, op: impl Into<Op>, operands: &[Tensor]) {
        let shapes: Vec<Vec<String>> =
            operands.iter().map(|t| t.shape.iter().map(ToString::to_string).collect()).collect();
        let refs: Vec<Vec<&str>> = shapes.iter().map(|s| s.iter().map(String::as_str).collect()).collect();
        let types: Vec<(DType, &[&str])> =
            operands.iter().zip(&refs).map(|(t, s)| (t.dtype, s.as_slice())).collect();
        let case = RandomGraph::of(single(op, &types));
        let name = format!("of{}", self.cases.len());
        self.evaluate(&name, &case, &Bindings::new(), operands, &mut Random::new(1));
    }
}

/// All hand-written cases and the nodes of random graphs.
fn cases() -> Dump {
    let mut dump = Dump::default();
    cases::add(&mut dump);
    for seed in 0..16 {
        dump.graph(&format!("seed{seed}"), &graph(seed, 14), seed);
    }
    dump
}

#[test]
#[ignore = "writes cases for a device into the folder MILLRACE_CUDA_CASES"]
fn write_cases() {
    let folder = folder("MILLRACE_CUDA_CASES");
    let mut dump = cases();
    timings::add(&mut dump);
    dump.write(&folder);
}
