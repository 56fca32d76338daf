//! Shapes of graphs that passes look for: layers as importers write them, and as authors spell them out.

use super::draft::{Draft, TAME};
use super::sequences::{head_counts, heads};
use super::spelled;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::Operand;
use crate::ops::attention::Mask;
use crate::ops::binary::BinaryFn;
use crate::ops::fused_matmul::Epilogue;
use crate::ops::rope::{RopeLayout, RopeScaling};
use crate::ops::unary::UnaryFn;
use crate::ops::{
    Attention, Binary, Broadcast, Cast, Concat, KvAppend, LayerNorm, Matmul, PagedAttention, Reshape,
    RmsNorm, Rope, Transpose, Unary,
};
use crate::types::TensorType;

/// Adds one motif, as far as it fits: what a motif has made stays.
pub(super) fn add(draft: &mut Draft) {
    let _ = match draft.random.below(21) {
        0 | 1 => linear(draft).map(|_| ()),
        2 => gated(draft),
        3 => residual_norm(draft),
        4 => projections(draft),
        5 => chain_of_shapes(draft),
        6 => chain_of_points(draft),
        7 => spelled::softmax(draft),
        8 => spelled::norm(draft),
        9 => spelled::activation(draft),
        10 => paged_block(draft),
        11 => repeated(draft),
        12 => constants(draft),
        13 => neutral(draft),
        14 => spelled::masked(draft),
        15 => packed_block(draft),
        16 => spelled::attention(draft),
        17 => spelled::rope(draft),
        18 | 19 => spelled::statistics(draft),
        _ => split_and_join(draft),
    };
}

pub(super) fn unary(draft: &mut Draft, function: UnaryFn, x: Operand) -> Option<Operand> {
    draft.node(Unary { function }, &[x])
}

pub(super) fn binary(draft: &mut Draft, function: BinaryFn, a: Operand, b: Operand) -> Option<Operand> {
    let swap = matches!(function, BinaryFn::Add | BinaryFn::Mul) && draft.random.once_in(3);
    draft.node(Binary { function }, &if swap { [b, a] } else { [a, b] })
}

/// A value to project: a matrix of packed rows, more often than not.
fn rows(draft: &mut Draft) -> Option<Operand> {
    let x = draft.float(2, -8.0, 8.0);
    draft.ty(x).last().as_const()?;
    Some(x)
}

/// `x w^T` for a weight with `n` rows.
pub(super) fn project(draft: &mut Draft, x: Operand, n: &Dim) -> Option<Operand> {
    project_to(draft, x, n, None)
}

/// The same with results of another element type.
fn project_to(draft: &mut Draft, x: Operand, n: &Dim, out: Option<DType>) -> Option<Operand> {
    let ty = draft.ty(x);
    let w = draft.weight(TensorType::new(ty.dtype, [n.clone(), ty.last()]), -0.6, 0.6);
    draft.node(Matmul { transpose_b: true, out }, &[x, w])
}

pub(super) fn biased(draft: &mut Draft, y: Operand) -> Option<Operand> {
    let ty = draft.ty(y);
    let b = draft.weight(TensorType::new(ty.dtype, [ty.last()]), -1.0, 1.0);
    binary(draft, BinaryFn::Add, y, b)
}

/// Linear layer with some of: bias, activation, residual.
fn linear(draft: &mut Draft) -> Option<Operand> {
    let x = rows(draft)?;
    let n = if draft.random.once_in(2) { draft.ty(x).last() } else { draft.width() };
    let mut y = project(draft, x, &n)?;
    if !draft.random.once_in(3) {
        y = biased(draft, y)?;
    }
    if draft.random.once_in(2) {
        let function = draft.random.pick(&Epilogue::ACTIVATIONS);
        y = unary(draft, function, y)?;
    }
    if draft.random.once_in(2) {
        let ty = draft.ty(y);
        let other = if ty == draft.ty(x) { x } else { draft.value(&ty, -TAME, TAME) };
        let function = draft.random.pick(&[BinaryFn::Add, BinaryFn::Add, BinaryFn::Mul]);
        y = binary(draft, function, y, other)?;
    }
    Some(y)
}

/// `act(gate(x)) * up(x)`, and perhaps the projection down.
fn gated(draft: &mut Draft) -> Option<()> {
    let x = rows(draft)?;
    let n = draft.width();
    // A gate of width 1 broadcasts.
    let other = if draft.random.once_in(6) { Dim::from(1i64) } else { n.clone() };
    let (mut g, mut u) = (project(draft, x, &n)?, project(draft, x, &other)?);
    if draft.random.once_in(4) {
        (g, u) = (biased(draft, g)?, biased(draft, u)?);
    }
    if draft.random.once_in(4) {
        std::mem::swap(&mut g, &mut u);
    }
    let function = draft.random.pick(&[UnaryFn::Silu, UnaryFn::Silu, UnaryFn::GeluTanh, UnaryFn::Gelu]);
    let a = if draft.random.once_in(4) {
        let s = unary(draft, UnaryFn::Sigmoid, g)?;
        binary(draft, BinaryFn::Mul, g, s)?
    } else {
        unary(draft, function, g)?
    };
    let y = binary(draft, BinaryFn::Mul, a, u)?;
    if draft.random.once_in(2) {
        let n = draft.ty(x).last();
        let down = project(draft, y, &n)?;
        binary(draft, BinaryFn::Add, down, x)?;
    }
    Some(())
}

pub(super) fn norm(draft: &mut Draft, x: Operand) -> Option<Operand> {
    let ty = draft.ty(x);
    ty.last().as_const()?;
    let vector = TensorType::new(ty.dtype, [ty.last()]);
    let w = draft.weight(vector.clone(), 0.5, 1.5);
    let eps = if ty.dtype == DType::F32 { 1e-5 } else { 0.01 };
    match draft.random.below(3) {
        0 | 1 => draft.node(RmsNorm { eps }, &[x, w]),
        _ => {
            let b = draft.weight(vector, -1.0, 1.0);
            draft.node(LayerNorm { eps }, &[x, w, b])
        }
    }
}

/// `norm(x + y)`; the sum often lives on.
fn residual_norm(draft: &mut Draft) -> Option<()> {
    let x = draft.tame(1);
    let ty = draft.ty(x);
    let y = draft.value(&ty, -TAME, TAME);
    let sum = binary(draft, BinaryFn::Add, x, y)?;
    if draft.random.once_in(4) {
        unary(draft, UnaryFn::Tanh, sum)?;
    }
    let normed = norm(draft, sum)?;
    if draft.random.once_in(2) {
        binary(draft, BinaryFn::Add, sum, normed)?;
    }
    if draft.random.once_in(3) {
        norm(draft, sum)?;
    }
    Some(())
}

/// q, k and v of one value, of equal or different widths, sometimes one with a bias.
fn projections(draft: &mut Draft) -> Option<()> {
    let x = rows(draft)?;
    let count = draft.random.between(2, 3);
    let all_biased = draft.random.once_in(3);
    for _ in 0..count {
        let n = draft.width();
        let out = draft.random.once_in(3).then(|| draft.random.pick(&[DType::F32, DType::BF16]));
        let y = project_to(draft, x, &n, out)?;
        if all_biased || draft.random.once_in(8) {
            biased(draft, y)?;
        }
    }
    Some(())
}

fn chain_of_shapes(draft: &mut Draft) -> Option<()> {
    let mut x = draft.tame(1);
    for _ in 0..draft.random.between(2, 4) {
        let ty = draft.ty(x);
        x = match draft.random.below(5) {
            0 | 1 => {
                let shape = draft.reshaped(&ty.shape);
                draft.node(Reshape { shape: shape.into() }, &[x])?
            }
            2 | 3 => {
                let perm = draft.permutation(ty.rank());
                draft.node(Transpose { perm }, &[x])?
            }
            _ => draft.node(Reshape { shape: ty.shape }, &[x])?,
        };
    }
    Some(())
}

fn chain_of_points(draft: &mut Draft) -> Option<()> {
    let mut x = draft.tame(1);
    for _ in 0..draft.random.between(2, 6) {
        let ty = draft.ty(x);
        x = match draft.random.below(6) {
            0 | 1 => {
                let smooth = [UnaryFn::Tanh, UnaryFn::Silu, UnaryFn::Relu, UnaryFn::Neg, UnaryFn::Sigmoid];
                let function = draft.random.pick(&smooth);
                unary(draft, function, x)?
            }
            2 => {
                let function = draft.random.pick(&[BinaryFn::Add, BinaryFn::Sub, BinaryFn::Mul]);
                binary(draft, function, x, x)?
            }
            _ => {
                let shape = draft.broadcastable(&ty.shape);
                let other = draft.value(&TensorType { dtype: ty.dtype, shape: shape.into() }, -2.0, 2.0);
                let smooth = [BinaryFn::Add, BinaryFn::Sub, BinaryFn::Mul, BinaryFn::Max, BinaryFn::Min];
                let function = draft.random.pick(&smooth);
                binary(draft, function, x, other)?
            }
        };
    }
    Some(())
}

fn rotate(draft: &mut Draft, x: Operand, positions: Operand) -> Option<Operand> {
    let layout = draft.random.pick(&[RopeLayout::Half, RopeLayout::Interleaved]);
    draft.node(Rope { base: 10000.0, layout, scaling: RopeScaling::Default, rotary: 0 }, &[x, positions])
}

/// q, k and v of `[t, h]` rows as heads.
pub(super) fn qkv(draft: &mut Draft, n: usize, kv: usize, d: usize) -> Option<[Operand; 3]> {
    let dtype = draft.float_type();
    let width = draft.width();
    let x = draft.value(&TensorType::new(dtype, [draft.rows(), width]), -4.0, 4.0);
    let mut made = Vec::new();
    for count in [n, kv, kv] {
        let y = project(draft, x, &Dim::from(count * d))?;
        let y = unary(draft, UnaryFn::Tanh, y)?;
        let shape = vec![draft.rows(), count.into(), d.into()];
        made.push(draft.node(Reshape { shape: shape.into() }, &[y])?);
    }
    made.try_into().ok()
}

/// Attention of a decoder layer: projections, rotation, cache, and the projection out.
fn paged_block(draft: &mut Draft) -> Option<()> {
    let (n, kv, d) = head_counts(draft);
    let [mut q, mut k, v] = qkv(draft, n, kv, d)?;
    let dtype = draft.ty(q).dtype;
    if draft.random.once_in(2) {
        let positions = draft.value(&TensorType::new(DType::I32, [draft.rows()]), 0.0, 40.0);
        (q, k) = (rotate(draft, q, positions)?, rotate(draft, k, positions)?);
    }
    let (keys, values) = (draft.cache(dtype, kv, d), draft.cache(dtype, kv, d));
    let [starts, lens, table] = draft.paging();
    if draft.random.once_in(3) {
        // What reads the caches as they were comes before they are written.
        let (keys, values) = (draft.cache_version(keys), draft.cache_version(values));
        draft.node(PagedAttention { scale: 0.5, window: 0 }, &[q, keys, values, starts, lens, table])?;
    }
    for (cache, x) in [(keys, k), (values, v)] {
        let version = draft.cache_version(cache);
        draft.node(KvAppend, &[version, x, starts, lens, table])?;
    }
    let (keys, values) = (draft.cache_version(keys), draft.cache_version(values));
    let window = if draft.random.once_in(3) { 2 } else { 0 };
    let op = PagedAttention { scale: 0.5, window };
    let y = draft.node(op, &[q, keys, values, starts, lens, table])?;
    let flat = draft.node(Reshape { shape: vec![draft.rows(), Dim::from(n * d)].into() }, &[y])?;
    let width = draft.width();
    project(draft, flat, &width)?;
    Some(())
}

/// Attention of an encoder layer.
fn packed_block(draft: &mut Draft) -> Option<()> {
    let (n, kv, d) = head_counts(draft);
    let [q, k, v] = if draft.random.once_in(2) {
        qkv(draft, n, kv, d)?
    } else {
        let dtype = draft.float_type();
        [heads(draft, dtype, n, d), heads(draft, dtype, kv, d), heads(draft, dtype, kv, d)]
    };
    let [starts, ..] = draft.paging();
    let mask = Mask { scale: 0.25, causal: draft.random.once_in(2), window: 0 };
    let y = draft.node(Attention { mask }, &[q, k, v, starts])?;
    draft.node(Reshape { shape: vec![draft.rows(), Dim::from(n * d)].into() }, &[y])?;
    Some(())
}

/// One expression twice, and what reads both.
fn repeated(draft: &mut Draft) -> Option<()> {
    let x = draft.tame(1);
    let function = draft.random.pick(&[UnaryFn::Tanh, UnaryFn::Relu, UnaryFn::Sigmoid]);
    let (a, b) = (unary(draft, function, x)?, unary(draft, function, x)?);
    let (c, d) = (unary(draft, UnaryFn::Neg, a)?, unary(draft, UnaryFn::Neg, b)?);
    binary(draft, BinaryFn::Sub, c, d)?;
    binary(draft, BinaryFn::Add, a, d)?;
    Some(())
}

/// Nodes that read weights only, then a value.
fn constants(draft: &mut Draft) -> Option<()> {
    let x = draft.tame(1);
    let ty = draft.ty(x);
    let n = ty.last();
    n.as_const()?;
    let mut w = draft.weight(TensorType::new(ty.dtype, [n.clone()]), -1.0, 1.0);
    for _ in 0..draft.random.between(1, 3) {
        w = match draft.random.below(6) {
            0 => draft.node(Reshape { shape: vec![Dim::from(1i64), n.clone()].into() }, &[w])?,
            1 => draft.node(Concat { axis: 0 }, &[w])?,
            2 => unary(draft, UnaryFn::Tanh, w)?,
            3 => {
                let up = draft.node(Cast { to: DType::F32 }, &[w])?;
                draft.node(Cast { to: ty.dtype }, &[up])?
            }
            4 => {
                let rank = draft.ty(w).rank();
                draft.node(Transpose { perm: (0..rank).collect() }, &[w])?
            }
            _ => {
                let same = draft.ty(w);
                let other = draft.weight(same, -1.0, 1.0);
                binary(draft, BinaryFn::Mul, w, other)?
            }
        };
    }
    binary(draft, BinaryFn::Add, x, w)?;
    Some(())
}

/// Operations that change nothing.
fn neutral(draft: &mut Draft) -> Option<()> {
    let mut x = draft.tame(1);
    for _ in 0..draft.random.between(1, 3) {
        let ty = draft.ty(x);
        let constant = |draft: &mut Draft, value: f64| {
            let shape = if draft.random.once_in(2) { vec![] } else { vec![Dim::from(1i64); ty.rank()] };
            draft.splat(ty.dtype, shape, value)
        };
        x = match draft.random.below(7) {
            0 => {
                let zero = constant(draft, 0.0);
                binary(draft, BinaryFn::Add, x, zero)?
            }
            1 => {
                let one = constant(draft, 1.0);
                binary(draft, BinaryFn::Mul, x, one)?
            }
            2 => {
                let one = constant(draft, 1.0);
                binary(draft, BinaryFn::Div, x, one)?
            }
            3 => draft.node(Cast { to: ty.dtype }, &[x])?,
            4 => draft.node(Broadcast { shape: ty.shape.clone() }, &[x])?,
            5 => {
                let there = draft.node(Cast { to: DType::F32 }, &[x])?;
                draft.node(Cast { to: ty.dtype }, &[there])?
            }
            _ => {
                let away = unary(draft, UnaryFn::Neg, x)?;
                unary(draft, UnaryFn::Neg, away)?
            }
        };
    }
    Some(())
}

/// Halves of the last axis, treated apart and joined, as rotations are spelled.
fn split_and_join(draft: &mut Draft) -> Option<()> {
    let x = draft.tame(1);
    let ty = draft.ty(x);
    let n = ty.last().as_const().filter(|n| *n > 1)?;
    let axis = ty.rank() - 1;
    let cut = n / 2;
    let part =
        |start: i64, end: i64| crate::ops::Slice { axis, start: start.into(), end: end.into(), step: 1 };
    let (a, b) = (draft.node(part(0, cut), &[x])?, draft.node(part(cut, n), &[x])?);
    let b = unary(draft, UnaryFn::Neg, b)?;
    let turned = draft.node(Concat { axis }, &[b, a])?;
    binary(draft, BinaryFn::Add, turned, x)?;
    Some(())
}
