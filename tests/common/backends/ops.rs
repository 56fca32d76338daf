//! Cases of ops outside of matmuls and attention: at level 0, where each runs as a kernel of its own.

use millrace::ir::ops::add_norm::NormKind;
use millrace::ir::ops::binary::BinaryFn;
use millrace::ir::ops::pointwise::{Out, Pointwise, Source as From, Step as Body};
use millrace::ir::ops::reduce::ReduceFn;
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{
    AddNorm, Binary, Broadcast, Cast, Concat, Conv2d, Embedding, Gather, Iota, L2Normalize, LayerNorm, Op,
    Pool2d, Reduce, Reshape, RmsNorm, Scatter, Select, Slice, Softmax, Transpose, Unary,
};
use millrace::ir::{Builder, DType, Dim, Operand, Phase, TensorType};

use super::case::{Case, Step};
use super::kernels::rows;

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Element types of whole bytes.
fn whole() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|dtype| dtype.size_bytes().is_some())
}

/// A graph of nodes that read inputs only.
struct Nodes {
    b: Builder,
    t: Dim,
    count: usize,
}

impl Nodes {
    fn new() -> Nodes {
        let mut b = Builder::new("ops");
        let t = b.dim("t", 1, 512, Some(8)).unwrap();
        Nodes { b, t, count: 0 }
    }

    /// An input; an extent of 0 stands for `$t`.
    fn input(&mut self, name: &str, dtype: DType, shape: &[u64]) -> Operand {
        let shape: Vec<Dim> =
            shape.iter().map(|d| if *d == 0 { self.t.clone() } else { (*d).into() }).collect();
        self.b.input(name, TensorType::new(dtype, shape))
    }

    fn add(&mut self, op: impl Into<Op>, operands: &[Operand]) {
        for result in self.b.node(op, operands, "op").unwrap() {
            self.b.output(&format!("y{}", self.count), result).unwrap();
            self.count += 1;
        }
    }

    fn case(self, name: impl Into<String>, counts: &[u64]) -> Case {
        let mut module = self.b.finish();
        let fused = module.graph.nodes.iter().any(|(_, n)| n.op.traits().fused_only);
        if fused {
            module.phase = Phase::Fused;
        }
        Case::of(name, &module, rows(counts)).at_level(0).strict()
    }
}

/// All of them.
pub fn ops() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in FLOATS {
        cases.push(unary(dtype));
        cases.push(reductions(dtype));
        cases.push(images(dtype));
        cases.push(regions(dtype));
        cases.push(regions_of_rows(dtype));
        cases.push(norms(dtype, 64));
        cases.push(norms(dtype, 77));
        cases.push(norms(dtype, 1000));
    }
    cases.push(norms(DType::BF16, 4096));
    cases.push(norms(DType::BF16, 9000));
    for dtype in whole() {
        cases.push(casts(dtype));
        cases.push(binary(dtype));
        cases.push(movement(dtype));
    }
    cases
}

fn unary(dtype: DType) -> Case {
    let mut n = Nodes::new();
    let x = n.input("x", dtype, &[0, 37]);
    let positive = n.input("positive", dtype, &[0, 37]);
    for function in UnaryFn::ALL {
        let domain = matches!(function, UnaryFn::Log | UnaryFn::Sqrt | UnaryFn::Rsqrt | UnaryFn::Recip);
        n.add(Unary { function }, &[if domain { positive } else { x }]);
    }
    n.case(format!("unary/{dtype}"), &[1, 3, 8, 129])
}

fn binary(dtype: DType) -> Case {
    let mut n = Nodes::new();
    let (a, b) = (n.input("positive", dtype, &[0, 1, 24]), n.input("b", dtype, &[5, 24]));
    let c = n.input("c", dtype, &[0, 5, 24]);
    let condition = n.input("condition", DType::Bool, &[0, 1, 1]);
    for function in BinaryFn::ALL {
        if dtype == DType::Bool && !function.compares() {
            continue;
        }
        match function {
            BinaryFn::Pow if dtype.is_float() => n.add(Binary { function }, &[a, a]),
            BinaryFn::Div if dtype.is_float() => n.add(Binary { function }, &[c, a]),
            BinaryFn::Pow | BinaryFn::Div => {}
            _ => n.add(Binary { function }, &[a, b]),
        }
    }
    n.add(Select, &[condition, c, b]);
    n.case(format!("binary/{dtype}"), &[1, 2, 33])
}

fn casts(from: DType) -> Case {
    let mut n = Nodes::new();
    let x = n.input("edges", from, &[0, 29]);
    for to in whole() {
        n.add(Cast { to }, &[x]);
    }
    n.case(format!("cast/{from}"), &[1, 7, 40])
}

fn movement(dtype: DType) -> Case {
    let mut n = Nodes::new();
    let t = n.t.clone();
    let x = n.input("x", dtype, &[0, 48]);
    let y = n.input("y", dtype, &[0, 3, 16]);
    let z = n.input("z", dtype, &[0, 5]);
    let table = n.input("table", dtype, &[9, 6, 8]);
    let ids = n.input("ids", DType::I32, &[0]);
    n.add(Transpose { perm: vec![1, 0] }, &[x]);
    n.add(Transpose { perm: vec![1, 0, 2] }, &[y]);
    n.add(Transpose { perm: vec![2, 1, 0] }, &[y]);
    n.add(Concat { axis: 1 }, &[x, z, x]);
    n.add(Slice { axis: 1, start: 16u64.into(), end: 48u64.into(), step: 1 }, &[x]);
    n.add(Slice { axis: 1, start: 3u64.into(), end: 20u64.into(), step: 5 }, &[x]);
    n.add(Slice { axis: 0, start: t.sub(&1u64.into()), end: t.clone(), step: 1 }, &[x]);
    n.add(Broadcast { shape: vec![2u64.into(), t.clone(), 5u64.into()].into() }, &[z]);
    n.add(Reshape { shape: vec![t.clone(), 4u64.into(), 12u64.into()].into() }, &[x]);
    n.add(Gather { axis: 0 }, &[table, ids]);
    let more = n.input("more", DType::I64, &[7]);
    n.add(Gather { axis: 1 }, &[table, more]);
    // One index for each row, so that the order of writes does not matter.
    let one = n.input("one", DType::I32, &[1]);
    let update = n.input("update", dtype, &[9, 1, 8]);
    n.add(Scatter { axis: 1 }, &[table, one, update]);
    if dtype.is_float() && dtype.bits() >= 16 {
        let words = n.input("words", dtype, &[40, 24]);
        let tokens = n.input("tokens", DType::I32, &[0]);
        n.add(Embedding, &[words, tokens]);
    }
    if dtype != DType::Bool {
        n.add(Iota { shape: vec![3u64.into(), t, 2u64.into()].into(), axis: 1, dtype }, &[]);
    }
    n.case(format!("movement/{dtype}"), &[1, 3, 64])
}

fn reductions(dtype: DType) -> Case {
    let mut n = Nodes::new();
    let x = n.input("x", dtype, &[0, 6, 40]);
    let wide = n.input("wide", dtype, &[3, 2500]);
    for (i, function) in ReduceFn::ALL.into_iter().enumerate() {
        n.add(Reduce { function, axes: vec![2], keep: i % 2 == 0 }, &[x]);
        n.add(Reduce { function, axes: vec![0], keep: i % 2 == 1 }, &[x]);
        n.add(Reduce { function, axes: vec![1], keep: false }, &[wide]);
    }
    n.add(Reduce { function: ReduceFn::Sum, axes: vec![1], keep: false }, &[x]);
    n.add(Reduce { function: ReduceFn::Max, axes: vec![0, 2], keep: true }, &[x]);
    n.add(Reduce { function: ReduceFn::Mean, axes: vec![0, 1, 2], keep: false }, &[x]);
    n.case(format!("reduce/{dtype}"), &[1, 9, 200])
}

fn norms(dtype: DType, width: u64) -> Case {
    let mut n = Nodes::new();
    let x = n.input("x", dtype, &[0, width]);
    let r = n.input("r", dtype, &[0, width]);
    let (w, b) = (n.input("w", dtype, &[width]), n.input("bias", dtype, &[width]));
    let wide = n.input("wide", dtype, &[0, width]);
    n.add(RmsNorm { eps: 1e-5 }, &[x, w]);
    n.add(LayerNorm { eps: 1e-5 }, &[x, w, b]);
    n.add(LayerNorm { eps: 1e-5 }, &[x, w]);
    n.add(L2Normalize { eps: 1e-12 }, &[x]);
    n.add(Softmax { axis: 1 }, &[wide]);
    n.add(Softmax { axis: 0 }, &[wide]);
    n.add(AddNorm { kind: NormKind::Rms, eps: 1e-6, sum: true }, &[x, r, w]);
    n.add(AddNorm { kind: NormKind::Layer, eps: 1e-6, sum: false }, &[x, r, w, b]);
    let counts: &[u64] = if width > 2000 { &[1, 3] } else { &[1, 2, 5, 33, 130] };
    // The sum is rounded before it is normalised.
    let mut case = n.case(format!("norms/{dtype}-{width}"), counts);
    case.strict = dtype == DType::F32;
    case
}

fn images(dtype: DType) -> Case {
    let mut n = Nodes::new();
    let conv = |stride, pad, dilation, groups| Conv2d { stride, pad, dilation, groups };
    let x = n.input("x", dtype, &[0, 6, 11, 9]);
    let (w, bias) = (n.input("w", dtype, &[4, 6, 3, 2]), n.input("bias", dtype, &[4]));
    let grouped = n.input("grouped", dtype, &[6, 3, 3, 2]);
    let deep = n.input("deep", dtype, &[6, 1, 3, 3]);
    let point = n.input("point", dtype, &[8, 6, 1, 1]);
    n.add(conv([1, 1], [1, 1, 1, 1], [1, 1], 1), &[x, w, bias]);
    n.add(conv([2, 1], [1, 0, 2, 3], [1, 2], 2), &[x, grouped]);
    n.add(conv([1, 1], [1, 1, 1, 1], [1, 1], 6), &[x, deep]);
    n.add(conv([1, 1], [0; 4], [1, 1], 1), &[x, point]);
    for (average, count_include_pad) in [(false, false), (true, false), (true, true)] {
        let pad = [1, 1, 2, 1];
        n.add(Pool2d { average, kernel: [3, 2], stride: [2, 2], pad, count_include_pad }, &[x]);
    }
    n.case(format!("images/{dtype}"), &[1, 5])
}

fn regions(dtype: DType) -> Case {
    let mut n = Nodes::new();
    let (x, y) = (n.input("x", dtype, &[0, 7, 24]), n.input("y", dtype, &[7, 1]));
    let z = n.input("z", DType::I32, &[0, 1, 24]);
    let body = vec![
        Body::Unary(UnaryFn::Silu, From::Input(0)),
        Body::Binary(BinaryFn::Mul, From::Step(0), From::Input(1)),
        Body::Cast(DType::F32, From::Input(2)),
        Body::Binary(BinaryFn::Add, From::Step(1), From::Step(2)),
        Body::Binary(BinaryFn::Lt, From::Input(0), From::Const(0.25)),
        Body::Select(From::Step(4), From::Step(3), From::Const(-1.0)),
    ];
    let out = vec![From::Step(5), From::Step(1), From::Step(4)];
    n.add(Pointwise::elementwise(body, out, vec![dtype, DType::F32, DType::Bool]), &[x, y, z]);
    n.case(format!("region/{dtype}"), &[1, 2, 33])
}

/// Regions with reductions of their rows.
fn regions_of_rows(dtype: DType) -> Case {
    let mut n = Nodes::new();
    let (i, t) = (From::Input, From::Step);
    let softmax = vec![
        Body::Reduce(ReduceFn::Max, i(0)),
        Body::Binary(BinaryFn::Sub, i(0), t(0)),
        Body::Unary(UnaryFn::Exp, t(1)),
        Body::Reduce(ReduceFn::Sum, t(2)),
        Body::Unary(UnaryFn::Recip, t(3)),
        Body::Binary(BinaryFn::Mul, t(2), t(4)),
    ];
    for width in [1, 5, 40, 700] {
        let x = n.input(&format!("x{width}"), dtype, &[0, 3, width]);
        let out = vec![Out::full(t(5)), Out::row(t(3))];
        n.add(
            Pointwise {
                body: softmax.clone().into(),
                out: out.into(),
                dtypes: vec![dtype, DType::F32].into(),
            },
            &[x],
        );
        let (row, column) = (
            n.input(&format!("r{width}"), dtype, &[0, 3, 1]),
            n.input(&format!("c{width}"), dtype, &[width]),
        );
        let body = vec![
            Body::Binary(BinaryFn::Mul, i(0), i(2)),
            Body::Binary(BinaryFn::Mul, t(0), t(0)),
            Body::Reduce(ReduceFn::Mean, t(1)),
            Body::Binary(BinaryFn::Add, t(2), From::Const(1e-5)),
            Body::Unary(UnaryFn::Rsqrt, t(3)),
            Body::Binary(BinaryFn::Mul, t(0), t(4)),
            Body::Binary(BinaryFn::Add, t(5), i(1)),
            Body::Reduce(ReduceFn::Min, t(6)),
        ];
        let out = vec![Out::full(t(6)), Out::row(t(7)), Out::full(t(0))];
        n.add(
            Pointwise { body: body.into(), out: out.into(), dtypes: vec![dtype, dtype, DType::F32].into() },
            &[x, row, column],
        );
    }
    n.case(format!("rows/{dtype}"), &[1, 2, 33])
}

/// Steps at the smallest, the typical and the largest sizes of a graph.
pub fn extremes(module: &millrace::ir::Module) -> Vec<Step> {
    let of = |value: fn(&millrace::ir::SymDecl) -> u64| {
        Step::Dims(module.dims.iter().map(|d| (d.sym.name().to_string(), value(d))).collect())
    };
    vec![of(|d| d.hint.unwrap_or(d.max)), of(|d| d.min), of(|d| d.max.min(64))]
}
