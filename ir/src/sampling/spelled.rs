//! Ops spelled out of primitives, as exporters write them, and near misses of such spellings.

use super::draft::{Draft, TAME};
use super::motifs::{biased, binary, qkv, unary};
use super::sequences::head_counts;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Operand, WeightExpr};
use crate::ops::binary::BinaryFn;
use crate::ops::reduce::ReduceFn;
use crate::ops::unary::UnaryFn;
use crate::ops::{
    Binary, Broadcast, Cast, Concat, Iota, Matmul, Reduce, Reshape, Select, Slice, Softmax, Transpose, Unary,
};
use crate::tensor::round_to;
use crate::types::TensorType;

fn reduce(draft: &mut Draft, function: ReduceFn, x: Operand, axis: usize) -> Option<Operand> {
    draft.node(Reduce { function, axes: vec![axis], keep: true }, &[x])
}

/// `exp(x - max) / sum`, with broadcasts written out or not.
pub(super) fn softmax(draft: &mut Draft) -> Option<()> {
    let x = draft.tame(1);
    let ty = draft.ty(x);
    let axis = if draft.random.once_in(4) { 0 } else { ty.rank() - 1 };
    let wide = draft.random.once_in(3);
    let spread = |draft: &mut Draft, x: Operand| {
        if wide { draft.node(Broadcast { shape: ty.shape.clone() }, &[x]) } else { Some(x) }
    };
    let top = reduce(draft, ReduceFn::Max, x, axis)?;
    let top = spread(draft, top)?;
    let centred = draft.node(Binary { function: BinaryFn::Sub }, &[x, top])?;
    // The bounds of the difference do not know that it is never positive.
    let raised = draft.node(Unary { function: UnaryFn::Exp }, &[centred]);
    let Some(raised) = raised else {
        draft.node(Softmax { axis }, &[x])?;
        return Some(());
    };
    let total = reduce(draft, ReduceFn::Sum, raised, axis)?;
    let total = spread(draft, total)?;
    draft.node(Binary { function: BinaryFn::Div }, &[raised, total])?;
    Some(())
}

/// RMS or layer norm out of a mean, a square, `rsqrt`.
pub(super) fn norm(draft: &mut Draft) -> Option<()> {
    let x = draft.float(1, -8.0, 8.0);
    let ty = draft.ty(x);
    ty.last().as_const()?;
    // Over another axis it is no norm of rows.
    let axis = if draft.random.once_in(6) { 0 } else { ty.rank() - 1 };
    let centred = if draft.random.once_in(2) {
        let mean = reduce(draft, ReduceFn::Mean, x, axis)?;
        draft.node(Binary { function: BinaryFn::Sub }, &[x, mean])?
    } else {
        x
    };
    let square = if draft.random.once_in(2) {
        draft.node(Binary { function: BinaryFn::Mul }, &[centred, centred])?
    } else {
        // `|x|` keeps the power away from negative numbers.
        let positive = unary(draft, UnaryFn::Abs, centred)?;
        draft.node(Binary { function: BinaryFn::Mul }, &[positive, positive])?
    };
    let mean = reduce(draft, ReduceFn::Mean, square, axis)?;
    // The bounds of a product of a value with itself may be negative; the larger with 0 says they are not.
    let zero = draft.splat(ty.dtype, vec![], 0.0);
    let mean = draft.node(Binary { function: BinaryFn::Max }, &[mean, zero])?;
    let eps = draft.splat(ty.dtype, vec![Dim::from(1i64)], 0.0625);
    let shifted = binary(draft, BinaryFn::Add, mean, eps)?;
    let scale = if draft.random.once_in(2) {
        unary(draft, UnaryFn::Rsqrt, shifted)?
    } else {
        let root = unary(draft, UnaryFn::Sqrt, shifted)?;
        unary(draft, UnaryFn::Recip, root)?
    };
    let normed = binary(draft, BinaryFn::Mul, centred, scale)?;
    let w = draft.weight(TensorType::new(ty.dtype, [ty.last()]), 0.5, 1.5);
    let scaled = binary(draft, BinaryFn::Mul, normed, w)?;
    if draft.random.once_in(2) {
        biased(draft, scaled)?;
    }
    Some(())
}

/// A value scaled or shifted by a statistic of its rows that no norm is: with or without the axis, in several rounds,
/// now and then over another axis, with values in between that are read elsewhere.
pub(super) fn statistics(draft: &mut Draft) -> Option<()> {
    let mut x = draft.tame(1);
    for _ in 0..draft.random.between(1, 2) {
        let ty = draft.ty(x);
        let axis = if draft.random.once_in(8) { 0 } else { ty.rank() - 1 };
        let inner = match draft.random.below(4) {
            0 => x,
            1 => unary(draft, UnaryFn::Abs, x)?,
            2 => unary(draft, UnaryFn::Sigmoid, x)?,
            _ => binary(draft, BinaryFn::Mul, x, x)?,
        };
        let function = draft.random.pick(&ReduceFn::ALL);
        let mut statistic = if draft.random.once_in(3) {
            let dropped = draft.node(Reduce { function, axes: vec![axis], keep: false }, &[inner])?;
            let mut shape = ty.shape.clone();
            shape[axis] = Dim::from(1i64);
            draft.node(Reshape { shape }, &[dropped])?
        } else {
            reduce(draft, function, inner, axis)?
        };
        if draft.random.once_in(2) {
            let one = draft.splat(ty.dtype, vec![], 1.0);
            let positive = unary(draft, UnaryFn::Abs, statistic)?;
            let shifted = binary(draft, BinaryFn::Add, positive, one)?;
            // The bounds of `|x| + 1` keep it away from 0.
            statistic = unary(draft, UnaryFn::Recip, shifted)?;
        }
        let whole = if draft.random.once_in(4) { inner } else { x };
        let function = draft.random.pick(&[BinaryFn::Sub, BinaryFn::Mul, BinaryFn::Max, BinaryFn::Add]);
        x = binary(draft, function, whole, statistic)?;
        if draft.random.once_in(4) {
            unary(draft, UnaryFn::Tanh, inner)?;
        }
        if draft.random.once_in(4) {
            unary(draft, UnaryFn::Tanh, statistic)?;
        }
    }
    Some(())
}

/// `x sigmoid(x)`, or gelu by `erf` or `tanh`.
pub(super) fn activation(draft: &mut Draft) -> Option<()> {
    let x = draft.tame(1);
    let dtype = draft.ty(x).dtype;
    // A constant that is slightly off makes another function of it.
    let off = if draft.random.once_in(4) { 1.125 } else { 1.0 };
    let constant = |draft: &mut Draft, value: f64| {
        let value = round_to(dtype, value);
        draft.splat(dtype, vec![], value)
    };
    let half = constant(draft, 0.5);
    let one = constant(draft, 1.0);
    match draft.random.below(3) {
        0 => {
            let s = unary(draft, UnaryFn::Sigmoid, x)?;
            binary(draft, BinaryFn::Mul, x, s)?;
        }
        1 => {
            let root = constant(draft, 0.5f64.sqrt() * off);
            let scaled = binary(draft, BinaryFn::Mul, x, root)?;
            let e = unary(draft, UnaryFn::Erf, scaled)?;
            let e = binary(draft, BinaryFn::Add, e, one)?;
            let h = binary(draft, BinaryFn::Mul, x, half)?;
            binary(draft, BinaryFn::Mul, h, e)?;
        }
        _ => {
            let (c, k) =
                (constant(draft, 0.044715 * off), constant(draft, (2.0 / std::f64::consts::PI).sqrt()));
            let square = binary(draft, BinaryFn::Mul, x, x)?;
            let cube = binary(draft, BinaryFn::Mul, square, x)?;
            let scaled = binary(draft, BinaryFn::Mul, cube, c)?;
            let inner = binary(draft, BinaryFn::Add, x, scaled)?;
            let inner = binary(draft, BinaryFn::Mul, inner, k)?;
            let t = unary(draft, UnaryFn::Tanh, inner)?;
            let t = binary(draft, BinaryFn::Add, t, one)?;
            let h = binary(draft, BinaryFn::Mul, x, half)?;
            binary(draft, BinaryFn::Mul, h, t)?;
        }
    }
    Some(())
}

/// `softmax(q k^T) v` out of transpositions and products.
pub(super) fn attention(draft: &mut Draft) -> Option<()> {
    let (n, _, d) = head_counts(draft);
    let [q, k, v] = qkv(draft, n, n, d)?;
    let mut turned = Vec::new();
    for x in [q, k, v] {
        turned.push(draft.node(Transpose { perm: vec![1, 0, 2] }, &[x])?);
    }
    let scores = if draft.random.once_in(2) {
        draft.node(Matmul { transpose_b: true, out: None }, &[turned[0], turned[1]])?
    } else {
        let keys = draft.node(Transpose { perm: vec![0, 2, 1] }, &[turned[1]])?;
        draft.node(Matmul { transpose_b: false, out: None }, &[turned[0], keys])?
    };
    let dtype = draft.ty(scores).dtype;
    let scale = draft.splat(dtype, vec![], 0.5);
    let mut scores = binary(draft, BinaryFn::Mul, scores, scale)?;
    if draft.random.once_in(2) {
        scores = mask(draft, scores)?;
    }
    let weights = draft.node(Softmax { axis: 2 }, &[scores])?;
    let y = draft.node(Matmul { transpose_b: false, out: None }, &[weights, turned[2]])?;
    let y = draft.node(Transpose { perm: vec![1, 0, 2] }, &[y])?;
    draft.node(Reshape { shape: vec![draft.rows(), Dim::from(n * d)].into() }, &[y])?;
    Some(())
}

pub(super) fn masked(draft: &mut Draft) -> Option<()> {
    let scores = draft.float(2, -TAME, TAME);
    let scores = mask(draft, scores)?;
    let axis = draft.ty(scores).rank() - 1;
    draft.node(Softmax { axis }, &[scores])?;
    Some(())
}

/// Scores under a mask of coordinates as exporters write it: causal, or nearly so.
fn mask(draft: &mut Draft, scores: Operand) -> Option<Operand> {
    let ty = draft.ty(scores);
    let shape = ty.shape[ty.rank() - 2..].to_vec();
    let iota = |axis| Iota { shape: shape.clone().into(), axis, dtype: DType::I32 };
    let (row, column) = (draft.node(iota(0), &[])?, draft.node(iota(1), &[])?);
    let function = draft.random.pick(&[BinaryFn::Ge, BinaryFn::Ge, BinaryFn::Gt, BinaryFn::Le]);
    let seen = draft.node(Binary { function }, &[row, column])?;
    let low = draft.random.pick(&[-1000.0, -1000.0, -8.0]);
    let low = draft.splat(ty.dtype, vec![], low);
    draft.node(Select, &[seen, scores, low])
}

/// Rotation of halves out of tables of sines and cosines, with frequencies that may be none of a rotation.
pub(super) fn rope(draft: &mut Draft) -> Option<()> {
    let (n, _, half) = head_counts(draft);
    let (t, d) = (draft.rows(), 2 * half);
    let x = draft.value(&TensorType::new(DType::F32, [t.clone(), n.into(), d.into()]), -4.0, 4.0);
    let positions = draft.value(&TensorType::new(DType::I32, [t.clone()]), 0.0, 40.0);
    let off = if draft.random.once_in(4) { 0.75 } else { 1.0 };
    let base = draft.random.pick(&[100.0f64, 10000.0]);
    let exponent = |i: usize| -(2.0 * i as f64) / d as f64;
    let mut frequencies: Vec<f64> = (0..half).map(|i| round_to(DType::F32, base.powf(exponent(i)))).collect();
    frequencies[half - 1] *= off;
    let frequencies =
        draft.add_weight(TensorType::new(DType::F32, [half]), WeightExpr::Dense(frequencies), (0.0, 1.0));
    let places = draft.node(Cast { to: DType::F32 }, &[positions])?;
    let places = draft.node(Reshape { shape: vec![t.clone(), Dim::from(1i64)].into() }, &[places])?;
    let angles = binary(draft, BinaryFn::Mul, places, frequencies)?;
    let (c, s) = (unary(draft, UnaryFn::Cos, angles)?, unary(draft, UnaryFn::Sin, angles)?);
    let shape = vec![t, Dim::from(1i64), Dim::from(half)];
    let c = draft.node(Reshape { shape: shape.clone().into() }, &[c])?;
    let s = draft.node(Reshape { shape: shape.into() }, &[s])?;
    let part = |start: usize| Slice { axis: 2, start: start.into(), end: (start + half).into(), step: 1 };
    let (a, b) = (draft.node(part(0), &[x])?, draft.node(part(half), &[x])?);
    let (ac, bs) = (binary(draft, BinaryFn::Mul, a, c)?, binary(draft, BinaryFn::Mul, b, s)?);
    let (bc, as_) = (binary(draft, BinaryFn::Mul, b, c)?, binary(draft, BinaryFn::Mul, a, s)?);
    let first = draft.node(Binary { function: BinaryFn::Sub }, &[ac, bs])?;
    let second = binary(draft, BinaryFn::Add, bc, as_)?;
    draft.node(Concat { axis: 2 }, &[first, second])?;
    Some(())
}
