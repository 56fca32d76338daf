//! Cases for a device: kernels, launches at concrete bindings, operands and what the reference evaluator makes of them.
//!
//! `MILLRACE_CUDA_CASES=folder cargo test -p millrace-kernels device_tests -- --ignored` writes sources `k0.cu`, ..,
//! `data.bin` and `cases.json` for a driver that launches the kernels and compares.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use millrace_ir::eval::evaluate_with;
use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::pointwise::{Pointwise, Source as From, Step};
use millrace_ir::ops::reduce::ReduceFn;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{
    AddNorm, Binary, Broadcast, Cast, Concat, Conv2d, EvalCtx, Gather, Iota, L2Normalize, LayerNorm,
    Numerics, Op, Pool2d, Reduce, Reshape, RmsNorm, Scatter, Select, Slice, Softmax, Transpose, Unary,
};
use millrace_ir::sampling::{Fill, Random, RandomGraph, graph};
use millrace_ir::tensor::Tensor;
use millrace_ir::weights::WeightReader;
use millrace_ir::{Bindings, Builder, DType, Def, Dim, Module, Node, Operand, TensorType};

use super::plan::{Argument, Planned, Site};
use super::{Arch, rows as rows_family, select};

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
        let bindings = case.bindings(&mut random);
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
                whole || matches!(node.op, Op::Reshape(_)),
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

/// A graph of one node.
fn single(op: impl Into<Op>, operands: &[(DType, &[&str])]) -> Module {
    let mut b = Builder::new("case");
    let mut dims = BTreeMap::new();
    for (_, shape) in operands {
        for text in shape.iter().filter(|t| t.parse::<u64>().is_err()) {
            let most = if *text == "w" { 3000 } else { 40 };
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

impl Dump {
    /// A node to time; results and operands are buffers of their size.
    fn time(&mut self, name: &str, op: impl Into<Op>, operands: &[(DType, &[&str])]) {
        let module = single(op, operands);
        let node = module.graph.nodes.iter().next().unwrap().1;
        let planned = plan(&module, node).unwrap();
        self.time_plan(name, &module, node, &planned);
    }

    fn time_plan(&mut self, name: &str, module: &Module, node: &Node, planned: &Planned) {
        let launches = self.launches(node, planned, &Bindings::new());
        let results = node.results.iter().map(|r| Operand::Value(*r));
        let types = node.operands.iter().copied().chain(results).map(|o| module.operand_type(o));
        let sizes: Vec<String> = types.map(|t| t.bytes().to_string()).collect();
        let ids = node.operands.iter().position(|o| module.operand_type(*o).dtype == DType::I32);
        let ids = ids.map_or("null".to_string(), |i| i.to_string());
        self.timings.push(format!(
            "{{\"name\": \"{name}\", \"buffers\": [{}], \"ids\": {ids}, \"launches\": [{launches}]}}",
            sizes.join(", ")
        ));
    }
}

fn timings(dump: &mut Dump) {
    let (b, f) = (DType::BF16, DType::F32);
    let x: (DType, &[&str]) = (b, &["16384", "4096"]);
    let w: (DType, &[&str]) = (b, &["4096"]);
    for (threads, lanes, packs) in
        [(128, 32, 16), (128, 128, 4), (256, 256, 2), (512, 512, 1), (256, 256, 0), (512, 512, 0)]
    {
        let module = single(RmsNorm { eps: 1e-5 }, &[x, w]);
        let node = module.graph.nodes.iter().next().unwrap().1;
        let site = Site { module: &module, nodes: &[module.graph.order[0]], arch: Arch::Sm90a };
        let division = rows_family::Division { threads, lanes, packs };
        let planned = rows_family::plan_divided(site, node, division).unwrap();
        dump.time_plan(&format!("rms_norm {threads}/{lanes}x{packs}"), &module, node, &planned);
    }
    dump.time("layer_norm", LayerNorm { eps: 1e-5 }, &[x, w, w]);
    dump.time("add_rms_norm sum", AddNorm { kind: NormKind::Rms, eps: 1e-5, sum: true }, &[x, x, w]);
    dump.time("l2_normalize", L2Normalize { eps: 1e-5 }, &[x]);
    dump.time("softmax", Softmax { axis: 1 }, &[x]);
    dump.time("softmax f32 8192x2048", Softmax { axis: 1 }, &[(f, &["8192", "2048"])]);
    dump.time("softmax axis 0", Softmax { axis: 0 }, &[(f, &["512", "65536"])]);
    dump.time("rms_norm 524288x128", RmsNorm { eps: 1e-5 }, &[(b, &["524288", "128"]), (b, &["128"])]);
    dump.time("rms_norm 16384x8192", RmsNorm { eps: 1e-5 }, &[(b, &["16384", "8192"]), (b, &["8192"])]);
    dump.time("rms_norm f32 16384x2048", RmsNorm { eps: 1e-5 }, &[(f, &["16384", "2048"]), (f, &["2048"])]);
    dump.time("rms_norm 1x4096", RmsNorm { eps: 1e-5 }, &[(b, &["1", "4096"]), w]);
    dump.time("rms_norm 32x4096", RmsNorm { eps: 1e-5 }, &[(b, &["32", "4096"]), w]);
    let body = vec![
        Step::Unary(UnaryFn::Silu, From::Input(0)),
        Step::Binary(BinaryFn::Mul, From::Step(0), From::Input(1)),
    ];
    for dtype in [b, f] {
        let op = Pointwise { body: body.clone(), out: vec![From::Step(1)], dtypes: vec![dtype] };
        let x: (DType, &[&str]) = (dtype, &["8192", "14336"]);
        dump.time(&format!("silu*mul {dtype}"), op, &[x, x]);
    }
    let gelu = Unary { function: UnaryFn::Gelu };
    dump.time("gelu bf16", gelu.clone(), &[(b, &["16384", "4096"])]);
    dump.time("gelu_tanh bf16", Unary { function: UnaryFn::GeluTanh }, &[(b, &["16384", "4096"])]);
    dump.time("gelu f32", gelu, &[(f, &["16384", "4096"])]);
    dump.time("add bias", Binary { function: BinaryFn::Add }, &[x, w]);
    dump.time("add column", Binary { function: BinaryFn::Add }, &[x, (b, &["16384", "1"])]);
    let wide: (DType, &[&str]) = (DType::I64, &["4096", "4096"]);
    dump.time("add i64", Binary { function: BinaryFn::Add }, &[wide, wide]);
    dump.time("cast f32 bf16", Cast { to: b }, &[(f, &["16384", "4096"])]);
    dump.time("cast bf16 f8e4m3", Cast { to: DType::F8E4M3 }, &[(b, &["16384", "4096"])]);
    dump.time("cast bf16 f32", Cast { to: f }, &[(b, &["16384", "4096"])]);
    dump.time("transpose bf16", Transpose { perm: vec![1, 0] }, &[(b, &["8192", "8192"])]);
    dump.time("transpose f32", Transpose { perm: vec![1, 0] }, &[(f, &["8192", "8192"])]);
    dump.time("transpose u8", Transpose { perm: vec![1, 0] }, &[(DType::U8, &["8192", "8192"])]);
    dump.time("transpose heads", Transpose { perm: vec![1, 0, 2] }, &[(b, &["16384", "32", "128"])]);
    dump.time("concat", Concat { axis: 1 }, &[(b, &["16384", "4096"]), (b, &["16384", "1024"])]);
    let slice = Slice { axis: 1, start: Dim::from(4096u64), end: Dim::from(5120u64), step: 1 };
    dump.time("slice", slice, &[(b, &["32768", "6144"])]);
    dump.time("gather", Gather { axis: 0 }, &[(b, &["65536", "4096"]), (DType::I32, &["16384"])]);
    dump.time("reduce rows", Reduce { function: ReduceFn::Sum, axes: vec![1], keep: false }, &[x]);
    dump.time("reduce columns", Reduce { function: ReduceFn::Sum, axes: vec![0], keep: false }, &[x]);
    dump.time(
        "reduce max f32",
        Reduce { function: ReduceFn::Max, axes: vec![1], keep: false },
        &[(f, &["131072", "512"])],
    );
    let conv = Conv2d { stride: [1, 1], pad: [1, 1, 1, 1], dilation: [1, 1], groups: 1 };
    dump.time("conv2d 3x3 64", conv, &[(f, &["8", "64", "56", "56"]), (f, &["64", "64", "3", "3"])]);
}

const WHOLE: [DType; 10] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::F8E4M3,
    DType::F8E5M2,
    DType::I8,
    DType::U8,
    DType::I32,
    DType::I64,
    DType::Bool,
];
const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Values where conversions differ from one another.
fn edges(dtype: DType) -> Tensor {
    let mut values =
        vec![0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -1.5, 127.0, 128.0, -129.0, 255.0, 256.0, 300.7, 1e-3, 2e-3];
    values.extend([
        447.0, 448.0, 449.0, 464.0, 465.0, 57344.0, 61440.0, 65504.0, 65520.0, 1e9, -1e9, 3e9, -3e9,
    ]);
    values.extend([2147483647.0, -2147483648.0, 16777217.0, 16777219.0, 1e12, -1e15, 9007199254740991.0]);
    if dtype.is_float() {
        values.extend([
            1e20,
            -1e20,
            f64::INFINITY,
            f64::NEG_INFINITY,
            f64::NAN,
            6e-8,
            3e-8,
            2e-8,
            1e-5,
            7.7e-6,
        ]);
        values.extend((0..600).map(|i| f64::from(i - 300) * 0.013_7));
        values.extend((0..300).map(|i| 2f64.powf(f64::from(i - 200) * 0.1)));
    }
    let n = values.len();
    let mut t = Tensor::from_values(dtype, &[n], values).unwrap();
    t.round();
    t
}

fn casts(dump: &mut Dump) {
    for from in WHOLE {
        for to in WHOLE {
            dump.of(Cast { to }, &[edges(from)]);
        }
    }
}

fn elementwise(dump: &mut Dump) {
    let positive = Fill::Uniform(0.1, 3.0);
    let shape: &[&str] = &["t", "37"];
    for function in UnaryFn::ALL {
        let fill = match function {
            UnaryFn::Log | UnaryFn::Sqrt | UnaryFn::Rsqrt | UnaryFn::Recip => positive.clone(),
            _ => Fill::Uniform(-6.0, 6.0),
        };
        dump.one(Unary { function }, &[(DType::F32, shape)], std::slice::from_ref(&fill));
        dump.one(Unary { function }, &[(DType::BF16, shape)], std::slice::from_ref(&fill));
    }
    for function in BinaryFn::ALL {
        for dtype in [DType::F32, DType::BF16, DType::I32, DType::I64, DType::U8] {
            if !dtype.is_float() && matches!(function, BinaryFn::Div | BinaryFn::Pow) {
                continue;
            }
            let fills =
                if dtype.is_float() { vec![positive.clone(); 2] } else { vec![Fill::Uniform(0.0, 200.0); 2] };
            dump.one(Binary { function }, &[(dtype, &["t", "1", "24"]), (dtype, &["5", "24"])], &fills);
        }
    }
    for dtype in WHOLE {
        dump.one(Select, &[(DType::Bool, &["t", "1"]), (dtype, &["t", "32"]), (dtype, &["32"])], &[]);
    }
    let silu = vec![
        Step::Unary(UnaryFn::Silu, From::Input(0)),
        Step::Binary(BinaryFn::Mul, From::Step(0), From::Input(1)),
        Step::Cast(DType::BF16, From::Step(1)),
        Step::Binary(BinaryFn::Add, From::Step(2), From::Const(0.1)),
        Step::Binary(BinaryFn::Lt, From::Step(2), From::Input(0)),
        Step::Select(From::Step(4), From::Step(3), From::Const(-1.0)),
    ];
    for dtype in FLOATS {
        let op = Pointwise {
            body: silu[..2].to_vec(),
            out: vec![From::Step(1), From::Step(0)],
            dtypes: vec![dtype, DType::F32],
        };
        dump.one(op, &[(dtype, &["t", "48"]), (dtype, &["t", "48"])], &[]);
        let op = Pointwise { body: silu.clone(), out: vec![From::Step(5)], dtypes: vec![DType::F32] };
        dump.one(op, &[(dtype, &["t", "s", "7"]), (dtype, &["s", "1"])], &[]);
    }
    let mixed = vec![
        Step::Cast(DType::F32, From::Input(0)),
        Step::Binary(BinaryFn::Mul, From::Step(0), From::Input(1)),
        Step::Binary(BinaryFn::Add, From::Input(0), From::Input(2)),
        Step::Cast(DType::I8, From::Step(1)),
        Step::Cast(DType::F8E4M3, From::Step(1)),
    ];
    let out = vec![From::Step(1), From::Step(2), From::Step(3), From::Step(4)];
    let dtypes = vec![DType::F32, DType::I64, DType::I8, DType::F8E4M3];
    let op = Pointwise { body: mixed, out, dtypes };
    let operands: [(DType, &[&str]); 3] =
        [(DType::I8, &["t", "16"]), (DType::F32, &["16"]), (DType::I64, &["t", "1"])];
    dump.one(
        op,
        &operands,
        &[Fill::Uniform(-100.0, 100.0), Fill::Uniform(-2.0, 2.0), Fill::Uniform(0.0, 1e12)],
    );
}

fn rows(dump: &mut Dump) {
    let widths = [
        "1", "7", "16", "24", "64", "128", "384", "576", "1000", "1024", "2048", "4096", "5120", "w", "40000",
    ];
    for (i, width) in widths.into_iter().enumerate() {
        let rows = if i > 8 { "2" } else { "t" };
        let second = (i < 9).then_some(FLOATS[(i + 1) % 3]);
        for dtype in [Some(FLOATS[i % 3]), second].into_iter().flatten() {
            let x: (DType, &[&str]) = (dtype, &[rows, width]);
            let w: (DType, &[&str]) = (dtype, &[width]);
            dump.one(RmsNorm { eps: 1e-5 }, &[x, w], &[]);
            dump.one(LayerNorm { eps: 1e-5 }, &[x, w, w], &[]);
            dump.one(LayerNorm { eps: 1e-5 }, &[x, w], &[]);
            dump.one(L2Normalize { eps: 1e-12 }, &[x], &[]);
            dump.one(Softmax { axis: 1 }, &[x], &[Fill::Uniform(-20.0, 20.0)]);
            for (kind, sum) in [(NormKind::Rms, true), (NormKind::Rms, false), (NormKind::Layer, true)] {
                let mut operands = vec![x, x, w];
                operands.extend((kind == NormKind::Layer).then_some(w));
                dump.one(AddNorm { kind, eps: 1e-6, sum }, &operands, &[]);
            }
        }
    }
    for dtype in FLOATS {
        dump.one(Softmax { axis: 0 }, &[(dtype, &["t", "33"])], &[]);
        dump.one(Softmax { axis: 1 }, &[(dtype, &["3", "s", "t", "5"])], &[]);
    }
    dump.one(RmsNorm { eps: 1e-5 }, &[(DType::F8E4M3, &["t", "64"]), (DType::F8E4M3, &["64"])], &[]);
    let masked = [f64::NEG_INFINITY, 1.0, f64::NEG_INFINITY, 2.0];
    let nothing = [f64::NEG_INFINITY; 4];
    let t = Tensor::from_values(DType::F32, &[2, 4], [masked, nothing].concat()).unwrap();
    dump.of(Softmax { axis: 1 }, &[t]);
}

fn reductions(dump: &mut Dump) {
    for (i, function) in [ReduceFn::Sum, ReduceFn::Mean, ReduceFn::Max, ReduceFn::Min].into_iter().enumerate()
    {
        let cases: [(&[&str], Vec<usize>); 9] = [
            (&["t", "64"], vec![1]),
            (&["t", "67"], vec![1]),
            (&["t", "64"], vec![0]),
            (&["4", "w"], vec![1]),
            (&["w", "5"], vec![0]),
            (&["t", "6", "s"], vec![1]),
            (&["t", "6", "7", "s"], vec![0, 2]),
            (&["3", "t", "5", "40"], vec![1, 3]),
            (&["t", "5000"], vec![0, 1]),
        ];
        for (j, (shape, axes)) in cases.into_iter().enumerate() {
            let dtype = FLOATS[(i + j) % 3];
            dump.one(Reduce { function, axes, keep: j % 2 == 0 }, &[(dtype, shape)], &[]);
        }
    }
    let x = Tensor::from_values(DType::F32, &[2, 3], vec![1.0, f64::NAN, -2.0, f64::NAN, f64::NAN, f64::NAN])
        .unwrap();
    dump.of(Reduce { function: ReduceFn::Max, axes: vec![1], keep: false }, std::slice::from_ref(&x));
    dump.of(Reduce { function: ReduceFn::Sum, axes: vec![1], keep: false }, &[x]);
}

fn movement(dump: &mut Dump) {
    let (t, one) = (Dim::from(millrace_ir::Sym::new("t").unwrap()), |n: u64| Dim::from(n));
    for dtype in WHOLE {
        dump.one(Transpose { perm: vec![1, 0] }, &[(dtype, &["t", "48"])], &[]);
        dump.one(Transpose { perm: vec![1, 0, 2] }, &[(dtype, &["t", "4", "16"])], &[]);
        dump.one(
            Concat { axis: 1 },
            &[(dtype, &["t", "16"]), (dtype, &["t", "3"]), (dtype, &["t", "s"])],
            &[],
        );
        let slice = |axis, start: u64, end: u64, step| Slice { axis, start: one(start), end: one(end), step };
        dump.one(slice(1, 16, 48, 1), &[(dtype, &["t", "64"])], &[]);
        dump.one(slice(1, 3, 20, 5), &[(dtype, &["t", "21", "2"])], &[]);
        dump.one(
            Gather { axis: 1 },
            &[(dtype, &["3", "9", "8"]), (DType::I64, &["t"])],
            &[Fill::Uniform(0.0, 1.0), Fill::Index(one(9))],
        );
        if dtype != DType::Bool {
            dump.one(Iota { shape: vec![one(3), one(5), one(2)], axis: 1, dtype }, &[], &[]);
        }
    }
    let f = DType::F32;
    dump.one(Transpose { perm: vec![2, 0, 1] }, &[(DType::BF16, &["s", "t", "64"])], &[]);
    dump.one(Transpose { perm: vec![0, 2, 1] }, &[(DType::BF16, &["5", "t", "s"])], &[]);
    dump.one(Transpose { perm: vec![0, 3, 2, 1] }, &[(f, &["2", "t", "3", "40"])], &[]);
    dump.one(Transpose { perm: vec![1, 0] }, &[(DType::I8, &["100", "70"])], &[]);
    dump.one(Transpose { perm: vec![3, 2, 1, 0] }, &[(DType::F16, &["3", "t", "5", "2"])], &[]);
    dump.one(Broadcast { shape: vec![one(3), t.clone(), one(16)] }, &[(f, &["t", "1"])], &[]);
    dump.one(Broadcast { shape: vec![t.clone(), one(6), one(16)] }, &[(DType::BF16, &["t", "1", "16"])], &[]);
    dump.one(Broadcast { shape: vec![one(4), t.clone()] }, &[(DType::I64, &["t"])], &[]);
    dump.one(Reshape { shape: vec![one(2), t.clone(), one(3)] }, &[(DType::U8, &["t", "6"])], &[]);
    let last = Slice { axis: 0, start: t.sub(&one(1)), end: t.clone(), step: 1 };
    dump.one(last, &[(DType::BF16, &["t", "5", "8"])], &[]);
    for (dtype, ids) in [(f, DType::I32), (DType::BF16, DType::I64), (DType::U8, DType::I32)] {
        for axis in [0, 1] {
            let shapes: [&[&str]; 2] =
                if axis == 0 { [&["6", "40"], &["t", "40"]] } else { [&["9", "6", "4"], &["9", "t", "4"]] };
            dump.one(
                Scatter { axis },
                &[(dtype, shapes[0]), (ids, &["t"]), (dtype, shapes[1])],
                &[Fill::Uniform(0.0, 1.0), Fill::Index(one(6)), Fill::Uniform(0.0, 9.0)],
            );
        }
    }
}

fn images(dump: &mut Dump) {
    let conv = |stride, pad, dilation, groups| Conv2d { stride, pad, dilation, groups };
    for dtype in FLOATS {
        let w: (DType, &[&str]) = (dtype, &["6", "3", "3", "2"]);
        let b: (DType, &[&str]) = (dtype, &["6"]);
        dump.one(conv([1, 1], [1, 1, 1, 1], [1, 1], 1), &[(dtype, &["2", "3", "7", "9"]), w, b], &[]);
        dump.one(conv([2, 1], [1, 0, 2, 3], [1, 2], 2), &[(dtype, &["1", "6", "11", "9"]), w], &[]);
        let w: (DType, &[&str]) = (dtype, &["8", "1", "3", "3"]);
        dump.one(conv([1, 1], [1, 1, 1, 1], [1, 1], 8), &[(dtype, &["t", "8", "6", "5"]), w], &[]);
        let pools = [(false, false), (true, false), (true, true)];
        for (average, count_include_pad) in pools {
            let op = Pool2d { average, kernel: [3, 2], stride: [2, 2], pad: [1, 1, 2, 1], count_include_pad };
            dump.one(op, &[(dtype, &["2", "3", "t", "9"])], &[]);
        }
    }
}

/// All hand-written cases and the nodes of random graphs.
fn cases() -> Dump {
    let mut dump = Dump::default();
    casts(&mut dump);
    elementwise(&mut dump);
    rows(&mut dump);
    reductions(&mut dump);
    movement(&mut dump);
    images(&mut dump);
    for seed in 0..16 {
        dump.graph(&format!("seed{seed}"), &graph(seed, 14), seed);
    }
    dump
}

#[test]
#[ignore = "writes cases for a device into the folder MILLRACE_CUDA_CASES"]
fn write_cases() {
    let folder = std::env::var("MILLRACE_CUDA_CASES").unwrap();
    let mut dump = cases();
    timings(&mut dump);
    dump.write(Path::new(&folder));
}
