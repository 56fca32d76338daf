//! One node at a time against the op's definition: fresh random shapes, types and values; outputs poisoned before; one
//! and two threads bitwise equal; in place where the op may be.

mod harness;

use millrace_ir::ops::attention::Mask;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::fused_matmul::{Epilogue, FusedMatmul};
use millrace_ir::ops::pointwise::{Out, Source, Step};
use millrace_ir::ops::reduce::ReduceFn;
use millrace_ir::ops::rope::{RopeLayout, RopeScaling};
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{
    Attention, Binary, Broadcast, Cast, Concat, Conv2d, Embedding, Gather, Iota, Matmul, MeanPool, Pointwise,
    Pool2d, Reduce, Rope, Scatter, Select, Slice, Softmax, Transpose, Unary,
};
use millrace_ir::tensor::Tensor;
use millrace_ir::{Bindings, DType, Dim, Op};
use millrace_kernels::cpu::select::REFERENCE;
use proptest::prelude::*;

use super::{Program, Regions};
use crate::memory::Buffer;
use harness::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn transposes(
        dtype in bytes(), (shape, perm) in shape(0..20, 1..5).prop_flat_map(|s| {
            let axes: Vec<usize> = (0..s.len()).collect();
            (Just(s), Just(axes).prop_shuffle())
        }), seed: u64,
    ) {
        check(Transpose { perm }, &[(dtype, shape, Fill::Any)], seed);
    }

    #[test]
    fn broadcasts(dtype in bytes(), shape in shape(0..9, 0..5), mask: u64, seed: u64) {
        let from = repeated(&shape, mask);
        check(Broadcast { shape: dims(&shape).into() }, &[(dtype, from, Fill::Any)], seed);
    }

    #[test]
    fn slices(
        dtype in bytes(), shape in shape(0..9, 1..5), axis: usize, from: usize, to: usize,
        step in 1usize..4, seed: u64,
    ) {
        let axis = axis % shape.len();
        let (a, b) = (from % (shape[axis] + 1), to % (shape[axis] + 1));
        let op = Slice { axis, start: Dim::from(a.min(b)), end: Dim::from(a.max(b)), step };
        check(op, &[(dtype, shape, Fill::Any)], seed);
    }

    #[test]
    fn concats(
        dtype in bytes(), shape in shape(0..7, 1..4), axis: usize,
        extents in proptest::collection::vec(0usize..6, 1..5), seed: u64,
    ) {
        let axis = axis % shape.len();
        let part = |extent: &usize| {
            let mut own = shape.clone();
            own[axis] = *extent;
            (dtype, own, Fill::Any)
        };
        check(Concat { axis }, &extents.iter().map(part).collect::<Vec<_>>(), seed);
    }

    #[test]
    fn gathers_and_embeddings(
        dtype in bytes(), ids in ids(), shape in shape(1..7, 1..4), axis: usize, idx in shape(0..5, 0..3),
        width in 0usize..9, float in floats(), seed: u64,
    ) {
        let axis = axis % shape.len();
        let indices = (ids, idx, Fill::Below(shape[axis]));
        check(Gather { axis }, &[(dtype, shape, Fill::Any), indices.clone()], seed);
        let Fill::Below(rows) = indices.2 else { unreachable!() };
        check(Embedding, &[(float, vec![rows, width], Fill::Any), indices], seed);
    }

    #[test]
    fn scatters(
        dtype in bytes(), ids in ids(), shape in shape(1..6, 1..4), axis: usize, count in 0usize..9,
        seed: u64,
    ) {
        let axis = axis % shape.len();
        let mut updates = shape.clone();
        updates[axis] = count;
        let indices = (ids, vec![count], Fill::Below(shape[axis]));
        check(Scatter { axis }, &[(dtype, shape, Fill::Any), indices, (dtype, updates, Fill::Any)], seed);
    }

    #[test]
    fn selects(dtype in bytes(), shape in shape(0..9, 0..4), masks: [u64; 3], seed: u64) {
        let [c, a, b] = masks.map(|m| repeated(&shape, m));
        check(Select, &[(DType::Bool, c, Fill::Tame), (dtype, a, Fill::Any), (dtype, b, Fill::Any)], seed);
    }

    #[test]
    fn iotas(dtype in numbers(), shape in shape(0..9, 1..4), axis: usize) {
        check(Iota { axis: axis % shape.len(), shape: dims(&shape).into(), dtype }, &[], 0);
    }

    #[test]
    fn casts(from in bytes(), to in bytes(), shape in shape(0..30, 0..3), seed: u64) {
        check(Cast { to }, &[(from, shape, Fill::Any)], seed);
    }

    #[test]
    fn unary_functions(
        dtype in numbers().prop_filter("floats", |d| d.is_float()), shape in shape(0..30, 0..3),
        f in proptest::sample::select(UnaryFn::ALL.to_vec()), seed: u64,
    ) {
        check(Unary { function: f }, &[(dtype, shape, Fill::Tame)], seed);
    }

    #[test]
    fn binary_functions(
        dtype in bytes(), shape in shape(0..9, 0..4), f in proptest::sample::select(BinaryFn::ALL.to_vec()),
        masks: [u64; 2], seed: u64,
    ) {
        prop_assume!(dtype != DType::Bool || f.compares());
        prop_assume!(dtype.is_float() || !matches!(f, BinaryFn::Div | BinaryFn::Pow));
        let [a, b] = masks.map(|m| repeated(&shape, m));
        let fill = if f == BinaryFn::Pow { Fill::Tame } else { Fill::Any };
        check(Binary { function: f }, &[(dtype, a, fill), (dtype, b, fill)], seed);
    }

    #[test]
    fn regions(
        types in proptest::collection::vec(bytes(), 4), shape in shape(0..9, 0..4), masks: [u64; 3],
        seed: u64,
    ) {
        let body = vec![
            Step::Binary(BinaryFn::Mul, Source::Input(0), Source::Const(0.5)),
            Step::Binary(BinaryFn::Le, Source::Input(1), Source::Step(0)),
            Step::Select(Source::Step(1), Source::Input(2), Source::Step(0)),
            Step::Cast(types[3], Source::Step(2)),
        ];
        let out = vec![Source::Step(3), Source::Step(1)];
        let op = Pointwise::elementwise(body, out, vec![types[0], DType::Bool]);
        let operands: Vec<Spec> = (0..3).map(|i| (types[i], repeated(&shape, masks[i]), Fill::Tame)).collect();
        check(op, &operands, seed);
    }

    /// Rows shorter and longer than a tile, operands that repeat in any way, results per element and per row, and
    /// result 0 of either kind in place of operand 0.
    #[test]
    fn regions_of_rows(
        types in proptest::collection::vec(floats(), 3), shape in shape(1..9, 1..4), masks: [u64; 3],
        columns in 0usize..600, f in proptest::sample::select(ReduceFn::ALL.to_vec()), swap: bool, seed: u64,
    ) {
        let mut shape = shape;
        *shape.last_mut().unwrap() = columns;
        let (i, t) = (Source::Input, Source::Step);
        let body = vec![
            Step::Binary(BinaryFn::Mul, i(0), i(1)),
            Step::Unary(UnaryFn::Abs, t(0)),
            Step::Reduce(f, t(1)),
            Step::Binary(BinaryFn::Add, t(2), Source::Const(1.0)),
            Step::Binary(BinaryFn::Max, t(3), Source::Const(0.5)),
            Step::Binary(BinaryFn::Div, t(0), t(4)),
            Step::Binary(BinaryFn::Sub, i(2), t(5)),
            Step::Reduce(ReduceFn::Max, t(6)),
            Step::Binary(BinaryFn::Le, i(2), Source::Const(0.0)),
            Step::Select(t(8), t(7), t(1)),
        ];
        let mut op = Pointwise {
            body: body.into(),
            out: vec![Out::full(t(9)), Out::row(t(7)), Out::full(t(5)), Out::row(t(3))].into(),
            dtypes: vec![types[0], types[0], types[1], DType::F32].into(),
        };
        let mut operands: Vec<Spec> =
            (0..3).map(|i| (types[i], repeated(&shape, masks[i]), Fill::Tame)).collect();
        // The whole shape, so that there is an axis to reduce; what the result may replace is of its type.
        operands[2].1 = shape.clone();
        if masks[0] & 1 == 1 {
            operands[0].1 = shape.clone();
        }
        if swap {
            op.out.swap(0, 1);
            *operands[0].1.last_mut().unwrap_or(&mut 1) = 1;
        }
        check(op, &operands, seed);
    }

    #[test]
    fn reductions(
        dtype in floats(), shape in shape(0..12, 1..5), mask: u8, keep: bool,
        f in proptest::sample::select(vec![ReduceFn::Sum, ReduceFn::Mean, ReduceFn::Max, ReduceFn::Min]),
        seed: u64,
    ) {
        let mut axes: Vec<usize> = (0..shape.len()).filter(|a| mask >> a & 1 == 1).collect();
        if axes.is_empty() {
            axes.push(shape.len() - 1);
        }
        let fill = if matches!(f, ReduceFn::Max | ReduceFn::Min) { Fill::Any } else { Fill::Tame };
        check(Reduce { function: f, axes, keep }, &[(dtype, shape, fill)], seed);
    }

    #[test]
    fn softmaxes(dtype in floats(), shape in shape(1..12, 1..4), axis: usize, seed: u64) {
        check(Softmax { axis: axis % shape.len() }, &[(dtype, shape, Fill::Any)], seed);
    }

    #[test]
    fn convolutions(
        dtype in floats(), n in 0usize..3, groups in 1usize..4, c in 1usize..4, o in 1usize..15,
        image in [0usize..13, 0usize..40],
        kernel in [1usize..4, 1usize..4], stride in [1usize..4, 1usize..4],
        pad in [0usize..3, 0usize..3, 0usize..3, 0usize..3],
        dilation in [1usize..3, 1usize..3], bias: bool, seed: u64,
    ) {
        prop_assume!((0..2).all(|i| dilation[i] * (kernel[i] - 1) < image[i] + pad[i] + pad[i + 2]));
        let mut operands = vec![
            (dtype, vec![n, c * groups, image[0], image[1]], Fill::Tame),
            (dtype, vec![o * groups, c, kernel[0], kernel[1]], Fill::Tame),
        ];
        if bias {
            operands.push((dtype, vec![o * groups], Fill::Tame));
        }
        check(Conv2d { stride, pad, dilation, groups }, &operands, seed);
    }

    #[test]
    fn pools(
        dtype in floats(), planes in [0usize..3, 1usize..4], image in [0usize..13, 0usize..40],
        kernel in [1usize..4, 1usize..4],
        stride in [1usize..4, 1usize..4], pads: [usize; 4], average: bool, count_include_pad: bool, seed: u64,
    ) {
        let pad = [0, 1, 2, 3].map(|i| pads[i] % kernel[i % 2]);
        prop_assume!((0..2).all(|i| kernel[i] <= image[i] + pad[i] + pad[i + 2]));
        let op = Pool2d { average, kernel, stride, pad, count_include_pad: average && count_include_pad };
        check(op, &[(dtype, vec![planes[0], planes[1], image[0], image[1]], Fill::Tame)], seed);
    }

    #[test]
    fn unpacked_products(
        dtype in floats(), out in proptest::option::of(floats()), m in 1usize..14, k in 1usize..70,
        segments in proptest::collection::vec(1usize..40, 1..3),
        panel in proptest::sample::select(vec![0usize, 0, 5, 16, 32]), bias: bool, residuals in 0usize..3,
        seed: u64,
    ) {
        let n: usize = segments.iter().sum();
        let weight = match panel {
            0 => vec![n, k],
            p => vec![segments.iter().map(|s| s.div_ceil(p)).sum(), k, p],
        };
        let mut operands = vec![(dtype, vec![m, k], Fill::Tame), (dtype, weight, Fill::Tame)];
        let mut epilogue = Vec::new();
        if bias {
            operands.push((dtype, vec![n], Fill::Tame));
            epilogue.push(Epilogue::Bias);
        }
        for _ in 0..if segments.len() == 1 { residuals } else { 0 } {
            operands.push((dtype, vec![m, n], Fill::Tame));
            epilogue.push(Epilogue::Residual);
        }
        check(FusedMatmul { segments: segments.into(), panel, cores: false, epilogue: epilogue.into(), out }, &operands, seed);
    }

    #[test]
    fn batched_products(
        dtype in floats(), a in shape(1..4, 0..3), mask: u64, m in 1usize..9, k in 1usize..40,
        n in 1usize..40, transpose_b: bool, seed: u64,
    ) {
        let mut right = repeated(&a, mask);
        right.extend(if transpose_b { [n, k] } else { [k, n] });
        let left = [a, vec![m, k]].concat();
        let operands = [(dtype, left, Fill::Tame), (dtype, right, Fill::Tame)];
        check(Matmul { transpose_b, out: None }, &operands, seed);
    }

    #[test]
    fn index_operands_have_either_width(dtype in floats(), ids in ids(), t in 1usize..9, seed: u64) {
        let rope = Rope { base: 10000.0, layout: RopeLayout::Half, scaling: RopeScaling::Default, rotary: 0 };
        check(rope, &[(dtype, vec![t, 2, 8], Fill::Tame), (ids, vec![t], Fill::Below(20))], seed);
        check(MeanPool, &[(dtype, vec![t, 5], Fill::Tame), (ids, vec![3], Fill::Rising(t))], seed);
        let heads = |n: usize| (dtype, vec![t, n, 8], Fill::Tame);
        let mask = Mask { scale: 0.25, causal: true, window: 0 };
        check(Attention { mask }, &[heads(4), heads(2), heads(2), (ids, vec![3], Fill::Rising(t))], seed);
    }
}

/// Sizes with many tasks, cache blocks and partial sums.
#[test]
fn large_tensors() {
    let f = DType::F32;
    for (dtype, shape, perm) in [
        (f, vec![300, 517], vec![1, 0]),
        (DType::BF16, vec![130, 33, 66], vec![2, 0, 1]),
        (DType::U8, vec![7, 300, 200], vec![0, 2, 1]),
        (DType::I64, vec![90, 40, 31], vec![1, 2, 0]),
        (f, vec![65, 70, 4], vec![1, 0, 2]),
    ] {
        check(Transpose { perm }, &[(dtype, shape, Fill::Any)], 1);
    }
    check(Concat { axis: 0 }, &[(f, vec![300, 200], Fill::Any), (f, vec![3, 200], Fill::Any)], 2);
    check(Concat { axis: 1 }, &[(f, vec![300, 200], Fill::Any), (f, vec![300, 1], Fill::Any)], 3);
    check(
        Binary { function: BinaryFn::Add },
        &[(f, vec![50, 1, 70], Fill::Tame), (f, vec![20, 1], Fill::Tame)],
        4,
    );
    check(
        Binary { function: BinaryFn::Mul },
        &[(DType::I32, vec![50, 1, 170], Fill::Any), (DType::I32, vec![9, 1], Fill::Any)],
        5,
    );
    check(Softmax { axis: 0 }, &[(f, vec![2000, 150], Fill::Tame)], 6);
    for (shape, axes) in [
        (vec![3, 20_000], vec![1]),
        (vec![20_000, 3], vec![0]),
        (vec![700, 600], vec![0]),
        (vec![70, 9, 600], vec![0, 2]),
        (vec![9, 70, 600], vec![1]),
        (vec![100_003], vec![0]),
        (vec![60, 30, 50, 3], vec![0, 2, 3]),
    ] {
        for function in [ReduceFn::Sum, ReduceFn::Max] {
            check(Reduce { function, axes: axes.clone(), keep: false }, &[(f, shape.clone(), Fill::Tame)], 7);
        }
    }
    let conv = Conv2d { stride: [1, 1], pad: [1; 4], dilation: [1, 1], groups: 1 };
    let operands = [(f, vec![2, 60, 20, 23], Fill::Tame), (f, vec![40, 60, 3, 3], Fill::Tame)];
    check(conv.clone(), &operands, 8);
    let operands = [(f, vec![1, 8, 5, 5], Fill::Tame), (f, vec![800, 4, 1, 1], Fill::Tame)];
    check(Conv2d { pad: [0; 4], groups: 2, ..conv }, &operands, 9);
}

/// The sum of every row.
fn row_sums(dtype: DType) -> Pointwise {
    let body = vec![Step::Reduce(ReduceFn::Sum, Source::Input(0))];
    Pointwise { body: body.into(), out: vec![Out::row(Source::Step(0))].into(), dtypes: vec![dtype].into() }
}

/// All that may still run the reference evaluator: 4-bit elements, which no kernel addresses; sums and windows of 8-bit
/// floats; and rows that are known to be empty.
#[test]
fn the_reference_evaluator_is_for_exotic_types() {
    let mut found = Vec::new();
    for dtype in DType::ALL {
        let tame = |shape: &[usize]| (dtype, shape.to_vec(), Fill::Tame);
        let ids = (DType::I64, vec![2], Fill::Below(2));
        let x = tame(&[2, 2]);
        let image = tame(&[1, 2, 4, 4]);
        let mut ops: Vec<(Op, Vec<Spec>)> = vec![
            (Cast { to: DType::F32 }.into(), vec![x.clone()]),
            (Transpose { perm: vec![1, 0] }.into(), vec![x.clone()]),
            (Broadcast { shape: dims(&[3, 2, 2]).into() }.into(), vec![x.clone()]),
            (
                Slice { axis: 0, start: Dim::from(1usize), end: Dim::from(2usize), step: 1 }.into(),
                vec![x.clone()],
            ),
            (Concat { axis: 0 }.into(), vec![x.clone(), x.clone()]),
            (Gather { axis: 1 }.into(), vec![x.clone(), ids.clone()]),
            (Scatter { axis: 0 }.into(), vec![x.clone(), ids.clone(), x.clone()]),
            (Select.into(), vec![(DType::Bool, vec![2], Fill::Tame), x.clone(), x.clone()]),
            (Binary { function: BinaryFn::Lt }.into(), vec![x.clone(), x.clone()]),
        ];
        if dtype != DType::Bool {
            ops.push((Binary { function: BinaryFn::Add }.into(), vec![x.clone(), x.clone()]));
            ops.push((Iota { shape: dims(&[2]).into(), axis: 0, dtype }.into(), vec![]));
        }
        if dtype.is_float() {
            let window = Pool2d {
                average: true,
                kernel: [2, 2],
                stride: [2, 2],
                pad: [0; 4],
                count_include_pad: false,
            };
            let conv = Conv2d { stride: [1, 1], pad: [0; 4], dilation: [1, 1], groups: 1 };
            let product = FusedMatmul {
                segments: vec![2].into(),
                panel: 0,
                cores: false,
                epilogue: vec![].into(),
                out: None,
            };
            ops.extend([
                (Op::from(Unary { function: UnaryFn::Exp }), vec![x.clone()]),
                (Embedding.into(), vec![x.clone(), ids]),
                (Reduce { function: ReduceFn::Sum, axes: vec![0], keep: false }.into(), vec![x.clone()]),
                (row_sums(dtype).into(), vec![x.clone()]),
                (Softmax { axis: 0 }.into(), vec![x.clone()]),
                (Matmul { transpose_b: false, out: None }.into(), vec![x.clone(), x.clone()]),
                (product.into(), vec![x.clone(), x.clone()]),
                (conv.into(), vec![image.clone(), tame(&[2, 2, 2, 2])]),
                (window.into(), vec![image]),
            ]);
        }
        for (op, operands) in ops {
            if kernel(op.clone(), &operands) == REFERENCE {
                found.push(format!("{} {dtype}", op.name()));
            }
        }
    }
    let sums = ["reduce_sum", "pointwise", "softmax", "matmul", "matmul.fused", "conv2d", "avg_pool2d"];
    let eight_bits = ["f8e4m3", "f8e5m2"].into_iter().flat_map(|d| sums.map(|op| format!("{op} {d}")));
    let moves = [
        "cast",
        "transpose",
        "broadcast",
        "slice",
        "concat",
        "gather",
        "scatter",
        "select",
        "lt",
        "add",
        "iota",
    ];
    let expected: Vec<String> = eight_bits.chain(moves.map(|op| format!("{op} i4"))).collect();
    assert_eq!(found, expected);
    let empty = (DType::F32, vec![2, 0], Fill::Tame);
    assert_eq!(kernel(Softmax { axis: 1 }, std::slice::from_ref(&empty)), REFERENCE);
    assert_eq!(kernel(Unary { function: UnaryFn::Exp }, &[empty]), "cpu.pointwise");
}

#[test]
fn bad_indices_are_errors() {
    for (dtype, index) in
        [(DType::I32, -1.0), (DType::I64, 3.0), (DType::I64, 1e12), (DType::I32, 2147483647.0)]
    {
        let x = (DType::F32, vec![3, 2], Fill::Tame);
        let idx = (dtype, vec![1], Fill::Below(1));
        let update = (DType::F32, vec![1, 2], Fill::Tame);
        for (op, operands) in [
            (Op::from(Gather { axis: 0 }), vec![x.clone(), idx.clone()]),
            (Scatter { axis: 0 }.into(), vec![x.clone(), idx.clone(), update]),
        ] {
            let module = module(&op, &operands);
            let mut tensors: Vec<Tensor> = operands.iter().map(|s| tensor(s, 1)).collect();
            tensors[1].data[0] = index;
            let mut held: Vec<Buffer> = tensors
                .iter()
                .map(|t| {
                    let bytes = t.to_bytes();
                    let mut buffer = Buffer::zeroed(bytes.len() as u64, "a test").unwrap();
                    buffer.bytes_mut().copy_from_slice(&bytes);
                    buffer
                })
                .collect();
            let mut out = Buffer::zeroed(24, "a test").unwrap();
            let mut regions = Regions {
                inputs: held.iter_mut().map(Buffer::region).collect(),
                outputs: vec![out.region()],
                arenas: Vec::new(),
                states: Vec::new(),
                weights: Vec::new(),
            };
            let run = Program::new(&module).unwrap().run(
                &module,
                &POOLS[0],
                &mut regions,
                &Bindings::new(),
                None,
                None,
            );
            assert_eq!(run.unwrap_err().code(), "run/bad-index");
        }
    }
}
