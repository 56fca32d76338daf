//! Ops of language models and fused ops against computations of another structure.

use super::add_norm::NormKind;
use super::attention::Mask;
use super::binary::BinaryFn;
use super::fused_matmul::Epilogue;
use super::pointwise::{Out, Source, Step};
use super::reduce::ReduceFn;
use super::testing::{close, f32s, fails, fails_eval, i32s, ramp, run};
use super::unary::UnaryFn;
use super::*;
use crate::dtype::DType;

/// Attention as three primitive ops over one sequence and head: product, masked softmax, product.
fn by_primitives(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scale: f64,
    sees: impl Fn(usize, usize) -> bool,
) -> Vec<f64> {
    let (n, m) = (q.shape[0], k.shape[0]);
    let mut scores = run(Matmul { transpose_b: true, out: None }, &[q.clone(), k.clone()]).remove(0);
    for i in 0..n {
        for j in 0..m {
            let s = &mut scores.data[i * m + j];
            *s = if sees(i, j) { *s * scale } else { f64::NEG_INFINITY };
        }
    }
    let weights = run(Softmax { axis: 1 }, &[scores]).remove(0);
    run(Matmul { transpose_b: false, out: None }, &[weights, v.clone()]).remove(0).data
}

/// Rows `range` and head `head` of `x [t, heads, d]` as a matrix.
fn head(x: &Tensor, range: std::ops::Range<usize>, head: usize) -> Tensor {
    let (heads, d) = (x.shape[1], x.shape[2]);
    let rows: Vec<f64> = range.clone().flat_map(|r| x.data[(r * heads + head) * d..][..d].to_vec()).collect();
    f32s(&[range.len(), d], &rows)
}

#[test]
fn attention_is_softmax_between_two_products() {
    let (q, k, v) = (ramp(&[5, 4, 3]), ramp(&[5, 2, 3]), ramp(&[5, 2, 3]));
    let starts = i32s(&[4], &[0.0, 2.0, 2.0, 5.0]);
    for (causal, window) in [(false, 0), (true, 0), (true, 2)] {
        let mask = Mask { scale: 0.7, causal, window };
        let op = Attention { mask: mask.clone() };
        let out = run(op, &[q.clone(), k.clone(), v.clone(), starts.clone()]).remove(0);
        for range in [0..2, 2..5] {
            for h in 0..4 {
                let sees = |i: usize, j: usize| (!causal || j <= i) && (window == 0 || j + window > i);
                let part = |x: &Tensor, h| head(x, range.clone(), h);
                let expected = by_primitives(&part(&q, h), &part(&k, h / 2), &part(&v, h / 2), 0.7, sees);
                close(&part(&out, h).data, &expected);
            }
        }
    }
    let bad = i32s(&[2], &[0.0, 4.0]);
    let op = Attention { mask: Mask { scale: 1.0, causal: false, window: 0 } };
    assert!(fails_eval(op.clone(), &[q.clone(), k.clone(), v.clone(), bad]).contains("must rise"));
    assert!(fails(op, &[q, ramp(&[5, 3, 3]), ramp(&[5, 3, 3]), starts]).contains("cannot share"));
}

/// Filling a cache in two steps and attending equals attention over the packed sequence.
#[test]
fn pages_hold_what_was_appended() {
    let (t, heads, d) = (5, 2, 3);
    let (q, k, v) = (ramp(&[t, heads, d]), ramp(&[t, 1, d]), ramp(&[t, 1, d]));
    let table = i32s(&[1, 3], &[4.0, 0.0, 2.0]);
    let rows = |x: &Tensor, from: usize, to: usize| {
        let width = x.shape[1] * x.shape[2];
        f32s(&[to - from, x.shape[1], x.shape[2]], &x.data[from * width..to * width])
    };
    let mut caches = [f32s(&[5, 2, 1, d], &[9.0; 30]), f32s(&[5, 2, 1, d], &[9.0; 30])];
    let mut found = Vec::new();
    for (from, to) in [(0, 3), (3, 5)] {
        let index = [i32s(&[2], &[0.0, (to - from) as f64]), i32s(&[1], &[to as f64]), table.clone()];
        for (cache, x) in caches.iter_mut().zip([&k, &v]) {
            let operands =
                [cache.clone(), rows(x, from, to), index[0].clone(), index[1].clone(), index[2].clone()];
            *cache = run(KvAppend, &operands).remove(0);
        }
        let operands = [
            rows(&q, from, to),
            caches[0].clone(),
            caches[1].clone(),
            index[0].clone(),
            index[1].clone(),
            index[2].clone(),
        ];
        found.extend(run(PagedAttention { scale: 0.5, window: 0 }, &operands).remove(0).data);
    }
    let mask = Mask { scale: 0.5, causal: true, window: 0 };
    let starts = i32s(&[2], &[0.0, t as f64]);
    close(&found, &run(Attention { mask }, &[q, k.clone(), v, starts]).remove(0).data);
    // Position 0 lies in page 4, position 4 in page 2, slot 0; untouched slots keep their content.
    assert_eq!(caches[0].data[4 * 2 * d..][..d], k.data[..d]);
    assert_eq!(caches[0].data[2 * 2 * d..][..d], k.data[4 * d..]);
    assert_eq!(caches[0].data[2 * d..][..d], [9.0; 3]);
    let far = [caches[0].clone(), rows(&k, 0, 1), i32s(&[2], &[0.0, 1.0]), i32s(&[1], &[7.0]), table];
    assert!(fails_eval(KvAppend, &far).contains("beyond the block table"));
}

#[test]
fn mean_pool_is_a_reduction_per_sequence() {
    let x = ramp(&[5, 4]);
    let out = run(MeanPool, &[x.clone(), i32s(&[4], &[0.0, 2.0, 2.0, 5.0])]).remove(0);
    for (s, (from, to)) in [(0, 2), (2, 2), (2, 5)].into_iter().enumerate() {
        let expected = if from == to {
            vec![0.0; 4]
        } else {
            let part = f32s(&[to - from, 4], &x.data[from * 4..to * 4]);
            let mean = Reduce { function: ReduceFn::Mean, axes: vec![0], keep: false };
            run(mean, &[part]).remove(0).data
        };
        close(&out.data[s * 4..][..4], &expected);
    }
}

#[test]
fn fused_matmul_is_its_parts_in_order() {
    let (x, w, b, r) = (ramp(&[3, 4]), ramp(&[10, 4]), ramp(&[10]), ramp(&[3, 5]));
    let add = Binary { function: BinaryFn::Add };
    let product = run(Matmul { transpose_b: true, out: None }, &[x.clone(), w.clone()]).remove(0);
    let biased = run(add.clone(), &[product, b.clone()]).remove(0);
    let half = |x: &Tensor, start: i64| {
        let part = Slice { axis: 1, start: start.into(), end: (start + 5).into(), step: 1 };
        run(part, std::slice::from_ref(x)).remove(0)
    };
    let split = FusedMatmul {
        segments: vec![5, 5].into(),
        panel: 0,
        cores: false,
        epilogue: vec![Epilogue::Bias].into(),
        out: None,
    };
    let parts = run(split.clone(), &[x.clone(), w.clone(), b.clone()]);
    close(&parts[0].data, &half(&biased, 0).data);
    close(&parts[1].data, &half(&biased, 5).data);
    let gate = run(Unary { function: UnaryFn::Silu }, &[half(&biased, 0)]).remove(0);
    let gated = run(Binary { function: BinaryFn::Mul }, &[gate, half(&biased, 5)]).remove(0);
    let expected = run(add, &[gated, r.clone()]).remove(0);
    let epilogue = vec![Epilogue::Bias, Epilogue::Glu(UnaryFn::Silu), Epilogue::Residual];
    let fused = FusedMatmul { epilogue: epilogue.into(), ..split.clone() };
    close(&run(fused, &[x.clone(), w.clone(), b.clone(), r]).remove(0).data, &expected.data);
    // The packed weight: panels of 4 columns, each segment padded to two of them.
    let mut packed = vec![0.0; 4 * 4 * 4];
    for column in 0..10 {
        let (segment, within) = (column / 5, column % 5);
        for i in 0..4 {
            packed[((segment * 2 + within / 4) * 4 + i) * 4 + within % 4] = w.data[column * 4 + i];
        }
    }
    let from_panels =
        run(FusedMatmul { panel: 4, ..split.clone() }, &[x.clone(), f32s(&[4, 4, 4], &packed), b.clone()]);
    close(&from_panels[1].data, &parts[1].data);
    let uneven = FusedMatmul {
        segments: vec![4, 6].into(),
        epilogue: vec![Epilogue::Glu(UnaryFn::Silu)].into(),
        ..split
    };
    assert!(fails(uneven, &[x, w]).contains("two equal segments"));
}

#[test]
fn pointwise_is_its_steps_as_ops() {
    let (x, row) = (ramp(&[3, 4]), ramp(&[4]));
    let body = vec![
        Step::Binary(BinaryFn::Mul, Source::Input(0), Source::Input(1)),
        Step::Unary(UnaryFn::Tanh, Source::Step(0)),
        Step::Binary(BinaryFn::Lt, Source::Step(1), Source::Const(0.0)),
        Step::Select(Source::Step(2), Source::Input(0), Source::Step(1)),
        Step::Cast(DType::BF16, Source::Step(3)),
    ];
    let region =
        Pointwise::elementwise(body, vec![Source::Step(3), Source::Step(4)], vec![DType::F32, DType::BF16]);
    let out = run(region.clone(), &[x.clone(), row.clone()]);
    let product = run(Binary { function: BinaryFn::Mul }, &[x.clone(), row.clone()]).remove(0);
    let tanh = run(Unary { function: UnaryFn::Tanh }, &[product]).remove(0);
    let below = run(Binary { function: BinaryFn::Lt }, &[tanh.clone(), f32s(&[], &[0.0])]).remove(0);
    let chosen = run(Select, &[below, x.clone(), tanh]).remove(0);
    close(&out[0].data, &chosen.data);
    assert_eq!(out[1].data, run(Cast { to: DType::BF16 }, &[chosen]).remove(0).data);
    let early = Pointwise { body: vec![Step::Unary(UnaryFn::Exp, Source::Step(0))].into(), ..region };
    assert!(fails(early, &[x, row]).contains("does not exist before it"));
}

/// `e = exp(x - max x)`, `e / sum e`, the sum per row, and what is per row spread over the row.
#[test]
fn pointwise_reductions_are_reductions_as_ops() {
    let (x, scale) = (ramp(&[2, 3, 4]), f32s(&[3, 1], &[0.5, 2.0, -1.0]));
    let (i, t) = (Source::Input, Source::Step);
    let body = vec![
        Step::Binary(BinaryFn::Mul, i(0), i(1)),
        Step::Reduce(ReduceFn::Max, t(0)),
        Step::Binary(BinaryFn::Sub, t(0), t(1)),
        Step::Unary(UnaryFn::Exp, t(2)),
        Step::Reduce(ReduceFn::Sum, t(3)),
        Step::Binary(BinaryFn::Div, t(3), t(4)),
        Step::Reduce(ReduceFn::Mean, i(1)),
        Step::Reduce(ReduceFn::Sum, i(1)),
        Step::Reduce(ReduceFn::Min, i(0)),
    ];
    let out = vec![
        Out::full(t(5)),
        Out::row(t(4)),
        Out::full(t(1)),
        Out::row(t(6)),
        Out::row(t(7)),
        Out::row(t(8)),
    ];
    let region = Pointwise { body: body.into(), out: out.into(), dtypes: vec![DType::F32; 6].into() };
    let found = run(region.clone(), &[x.clone(), scale.clone()]);
    let product = run(Binary { function: BinaryFn::Mul }, &[x.clone(), scale.clone()]).remove(0);
    let soft = run(Softmax { axis: 2 }, std::slice::from_ref(&product)).remove(0);
    found[0].data.iter().zip(&soft.data).for_each(|(a, b)| assert!((a - b).abs() < 1e-12, "{a} {b}"));
    let reduce = |function, of: &Tensor| {
        run(Reduce { function, axes: vec![2], keep: true }, std::slice::from_ref(of)).remove(0)
    };
    let top = reduce(ReduceFn::Max, &product);
    for (row, sum) in found[1].data.iter().enumerate() {
        let line = &product.data[row * 4..row * 4 + 4];
        assert!((sum - line.iter().map(|v| (v - top.data[row]).exp()).sum::<f64>()).abs() < 1e-12);
        assert_eq!(found[2].data[row * 4..row * 4 + 4], [top.data[row]; 4]);
    }
    // What is per row counts once for each element.
    assert_eq!(found[1].shape, [2, 3, 1]);
    assert_eq!(found[3].data, [0.5, 2.0, -1.0, 0.5, 2.0, -1.0]);
    assert_eq!(found[4].data, [2.0, 8.0, -4.0, 2.0, 8.0, -4.0]);
    assert_eq!(found[5].data, reduce(ReduceFn::Min, &x).data);
    // An empty row is reduced to the neutral element.
    let sum = Pointwise {
        body: vec![Step::Reduce(ReduceFn::Sum, i(0)), Step::Unary(UnaryFn::Exp, t(0))].into(),
        out: vec![Out::row(t(1))].into(),
        dtypes: vec![DType::F32].into(),
    };
    assert_eq!(run(sum, &[f32s(&[2, 0], &[])])[0].data, [1.0, 1.0]);
}

#[test]
fn pointwise_refuses_rows_that_do_not_exist_and_too_much() {
    let x = ramp(&[2, 3]);
    let (i, t) = (Source::Input, Source::Step);
    let region = |body: Vec<Step>, out: Vec<Out>| {
        let dtypes = vec![DType::F32; out.len()];
        Pointwise { body: body.into(), out: out.into(), dtypes: dtypes.into() }
    };
    let sum = Step::Reduce(ReduceFn::Sum, i(0));
    let full = region(vec![Step::Unary(UnaryFn::Exp, i(0))], vec![Out::row(t(0))]);
    assert!(fails(full, std::slice::from_ref(&x)).contains("`row(t0)` has a value per element"));
    let scalar = region(vec![sum.clone()], vec![Out::full(t(0))]);
    assert!(fails(scalar, &[f32s(&[], &[1.0])]).contains("no axis"));
    let long = region(vec![sum.clone(); 257], vec![Out::row(t(0))]);
    assert!(fails(long, std::slice::from_ref(&x)).contains("257 steps, at most 256"));
    let wide = region(vec![sum.clone()], vec![Out::row(t(0)); 17]);
    assert!(fails(wide, std::slice::from_ref(&x)).contains("17 results, at most 16"));
    assert!(fails(region(vec![sum], vec![Out::row(t(0))]), &vec![x; 65]).contains("65 operands, at most 64"));
}

#[test]
fn add_norm_is_an_addition_and_a_norm() {
    let (x, r, w, b) = (ramp(&[3, 4]), f32s(&[3, 4], &[0.25; 12]), ramp(&[4]), ramp(&[4]));
    let sum = run(Binary { function: BinaryFn::Add }, &[x.clone(), r.clone()]).remove(0);
    let rms = run(RmsNorm { eps: 1e-5 }, &[sum.clone(), w.clone()]).remove(0);
    let out = run(AddNorm { kind: NormKind::Rms, eps: 1e-5, sum: true }, &[x.clone(), r.clone(), w.clone()]);
    assert!(out[0].data.iter().zip(&sum.data).all(|(a, b)| (a - b).abs() < 1e-6));
    assert!(out[1].data.iter().zip(&rms.data).all(|(a, b)| (a - b).abs() < 1e-5));
    let layer = run(LayerNorm { eps: 1e-5 }, &[sum, w.clone(), b.clone()]).remove(0);
    let only =
        run(AddNorm { kind: NormKind::Layer, eps: 1e-5, sum: false }, &[x.clone(), r.clone(), w.clone(), b]);
    assert!(only[0].data.iter().zip(&layer.data).all(|(a, b)| (a - b).abs() < 1e-5));
    let op = AddNorm { kind: NormKind::Layer, eps: 1e-5, sum: false };
    assert!(fails(op, &[x, r, w]).contains("takes 4 operands"));
}
