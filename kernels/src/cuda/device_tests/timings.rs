//! Nodes of sizes at which kernels are timed.

use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::pointwise::{Pointwise, Source as From, Step};
use millrace_ir::ops::reduce::ReduceFn;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{
    AddNorm, Binary, Cast, Concat, Conv2d, Gather, L2Normalize, LayerNorm, Op, Reduce, RmsNorm, Slice,
    Softmax, Transpose, Unary,
};
use millrace_ir::{Bindings, DType, Dim, Module, Node, Operand};

use super::{Dump, plan, single};
use crate::cuda::plan::{Planned, Site};
use crate::cuda::{Arch, rows as rows_family};

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

/// Adds all of them.
pub fn add(dump: &mut Dump) {
    let (b, f) = (DType::BF16, DType::F32);
    let x: (DType, &[&str]) = (b, &["16384", "4096"]);
    let w: (DType, &[&str]) = (b, &["4096"]);
    let short: [(DType, &[&str]); 2] = [(b, &["524288", "128"]), (b, &["128"])];
    let long: [(DType, &[&str]); 2] = [x, w];
    let divisions = [
        (long, 256, 256, 2),
        (long, 256, 256, 0),
        (short, 128, 16, 1),
        (short, 128, 8, 2),
        (short, 256, 8, 2),
        (short, 128, 4, 4),
    ];
    for (operands, threads, lanes, packs) in divisions {
        let module = single(RmsNorm { eps: 1e-5 }, &operands);
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
        let op = Pointwise::elementwise(body.clone(), vec![From::Step(1)], vec![dtype]);
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
