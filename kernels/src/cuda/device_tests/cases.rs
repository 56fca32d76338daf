//! Hand-written cases: every op and element type, and the values and shapes where kernels go wrong.

use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::pointwise::{Pointwise, Source as From, Step};
use millrace_ir::ops::reduce::ReduceFn;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{
    AddNorm, Binary, Broadcast, Cast, Concat, Conv2d, Gather, Iota, L2Normalize, LayerNorm, Pool2d, Reduce,
    Reshape, RmsNorm, Scatter, Select, Slice, Softmax, Transpose, Unary,
};
use millrace_ir::sampling::Fill;
use millrace_ir::tensor::Tensor;
use millrace_ir::{DType, Dim};

use super::{Dump, HUGE};

/// Adds all of them.
pub fn add(dump: &mut Dump) {
    casts(dump);
    elementwise(dump);
    rows(dump);
    reductions(dump);
    movement(dump);
    images(dump);
    extremes(dump);
}

/// Tensors that may have more than 2^31 elements, and tensors that have none.
fn extremes(dump: &mut Dump) {
    let (b, one) = (DType::BF16, |n: u64| Dim::from(n));
    let x: (DType, &[&str]) = (b, &[HUGE, "64"]);
    let w: (DType, &[&str]) = (b, &["64"]);
    let cube: (DType, &[&str]) = (b, &[HUGE, "3", "64"]);
    let ids = |n: u64| [Fill::Uniform(-1.0, 1.0), Fill::Index(one(n)), Fill::Uniform(-1.0, 1.0)];
    dump.one(Binary { function: BinaryFn::Add }, &[x, x], &[]);
    dump.one(Binary { function: BinaryFn::Mul }, &[cube, w], &[]);
    dump.one(Binary { function: BinaryFn::Mul }, &[cube, (b, &[HUGE, "1", "1"])], &[]);
    dump.one(RmsNorm { eps: 1e-5 }, &[x, w], &[]);
    dump.one(Softmax { axis: 1 }, &[cube], &[]);
    dump.one(Reduce { function: ReduceFn::Sum, axes: vec![2], keep: false }, &[cube], &[]);
    dump.one(Reduce { function: ReduceFn::Sum, axes: vec![1], keep: false }, &[cube], &[]);
    dump.one(Transpose { perm: vec![1, 0, 2] }, &[cube], &[]);
    dump.one(Transpose { perm: vec![0, 2, 1] }, &[(b, &[HUGE, "20", "64"])], &[]);
    dump.one(Concat { axis: 1 }, &[x, x], &[]);
    dump.one(Gather { axis: 1 }, &[x, (DType::I32, &["7"])], &ids(64));
    dump.one(Scatter { axis: 1 }, &[x, (DType::I32, &["7"]), (b, &[HUGE, "7"])], &ids(64));
    dump.one(Iota { shape: vec![one(3), one(1 << 12)].into(), axis: 1, dtype: DType::F32 }, &[], &[]);
    let pool =
        Pool2d { average: true, kernel: [2, 2], stride: [2, 2], pad: [0; 4], count_include_pad: false };
    dump.one(pool, &[(b, &[HUGE, "2", "8", "8"])], &[]);
    let conv = Conv2d { stride: [1, 1], pad: [0; 4], dilation: [1, 1], groups: 1 };
    dump.one(conv, &[(b, &[HUGE, "2", "8", "8"]), (b, &["2", "2", "3", "3"])], &[]);

    let none: (DType, &[&str]) = (DType::F32, &["3", "0"]);
    for function in [ReduceFn::Sum, ReduceFn::Mean, ReduceFn::Max, ReduceFn::Min] {
        dump.one(Reduce { function, axes: vec![1], keep: false }, &[none], &[]);
    }
    dump.one(
        Reduce { function: ReduceFn::Max, axes: vec![0], keep: false },
        &[(DType::F32, &["0", "5"])],
        &[],
    );
    dump.one(Concat { axis: 1 }, &[none, (DType::F32, &["3", "2"])], &[]);
    dump.one(Softmax { axis: 1 }, &[none], &[]);
    dump.one(Transpose { perm: vec![1, 0] }, &[none], &[]);
    dump.one(Binary { function: BinaryFn::Add }, &[none, none], &[]);
}

const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// Element types of whole bytes.
fn whole() -> impl Iterator<Item = DType> {
    DType::ALL.into_iter().filter(|dtype| dtype.size_bytes().is_some())
}

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
    if dtype == DType::I64 {
        t.data.iter_mut().for_each(|v| *v = v.trunc());
    }
    t
}

fn casts(dump: &mut Dump) {
    for from in whole() {
        for to in whole() {
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
    for dtype in whole() {
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
        let dtypes = vec![dtype, DType::F32];
        let op = Pointwise::elementwise(silu[..2].to_vec(), vec![From::Step(1), From::Step(0)], dtypes);
        dump.one(op, &[(dtype, &["t", "48"]), (dtype, &["t", "48"])], &[]);
        let op = Pointwise::elementwise(silu.clone(), vec![From::Step(5)], vec![DType::F32]);
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
    let op = Pointwise::elementwise(mixed, out, dtypes);
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
    for dtype in whole() {
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
            dump.one(Iota { shape: vec![one(3), one(5), one(2)].into(), axis: 1, dtype }, &[], &[]);
        }
    }
    let f = DType::F32;
    dump.one(Transpose { perm: vec![2, 0, 1] }, &[(DType::BF16, &["s", "t", "64"])], &[]);
    dump.one(Transpose { perm: vec![0, 2, 1] }, &[(DType::BF16, &["5", "t", "s"])], &[]);
    dump.one(Transpose { perm: vec![0, 3, 2, 1] }, &[(f, &["2", "t", "3", "40"])], &[]);
    dump.one(Transpose { perm: vec![1, 0] }, &[(DType::I8, &["100", "70"])], &[]);
    dump.one(Transpose { perm: vec![3, 2, 1, 0] }, &[(DType::F16, &["3", "t", "5", "2"])], &[]);
    dump.one(Broadcast { shape: vec![one(3), t.clone(), one(16)].into() }, &[(f, &["t", "1"])], &[]);
    dump.one(
        Broadcast { shape: vec![t.clone(), one(6), one(16)].into() },
        &[(DType::BF16, &["t", "1", "16"])],
        &[],
    );
    dump.one(Broadcast { shape: vec![one(4), t.clone()].into() }, &[(DType::I64, &["t"])], &[]);
    dump.one(Reshape { shape: vec![one(2), t.clone(), one(3)].into() }, &[(DType::U8, &["t", "6"])], &[]);
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
