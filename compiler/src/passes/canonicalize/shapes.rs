//! Movements with one cheaper spelling.
//!
//! ```text
//! slice(slice(x))                      ->  slice(x)
//! slice(concat(.., a, ..))             ->  slice(a), or a                if it lies within a
//! concat(x[..n], x[n..])               ->  x[..]
//! concat(concat(a, b), c)              ->  concat(a, b, c)
//! reshape(slice(reshape(x)))           ->  slice(x) {step}               element i of each group of k
//! reshape(reduce(x))                   ->  reduce(x) {keep}              if it only brings the axes back
//! broadcast(broadcast(x))              ->  broadcast(x)
//! f(broadcast(x))                      ->  broadcast(f(x))               f has one operand
//! f(broadcast(x), y)                   ->  f(x, y)                       if y alone gives the shape
//! reshape, broadcast of iota           ->  iota
//! transpose(f(transpose(x)))           ->  f(transpose(x))               likewise with reshape
//! cast(reshape(x)), cast(transpose(x)) ->  the cast first, if it narrows, else last
//! f(reshape(matmul(..)), y)            ->  reshape(f(matmul(..), y'))     y' is y, or reshaped likewise
//! norm(reshape(add(..)))               ->  reshape(norm(add(..)))        if the last axis stays
//! matmul(x, transpose(y))              ->  matmul(x, y) {transpose_b}    if it swaps the last axes, and back
//! matmul(x, @w)                        ->  matmul(x, @wᵀ) {transpose_b}  as linear layers store their weights
//! ```

use millrace_ir::ops::broadcasting::broadcast_shapes;
use millrace_ir::ops::{Broadcast, Concat, Iota, Matmul, Op, Reduce, Reshape, Slice, Transpose};
use millrace_ir::types::Shape;
use millrace_ir::{Dim, NodeId, Operand, SharedOp, TensorType, WeightExpr};

use crate::pattern::constant;
use crate::rewrite::{From, Outcome, Patch, View};

/// Looks for a movement that has a cheaper spelling.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let found = match &*view.node(id).op {
        Op::Slice(slice) => slice_of(view, id, slice),
        Op::Concat(concat) => concat_of(view, id, concat.axis),
        Op::Reshape(Reshape { shape }) => reshape_of(view, id, shape),
        Op::Broadcast(Broadcast { shape }) => broadcast_of(view, id, shape),
        Op::Transpose(Transpose { perm }) => transpose_of(view, id, perm),
        Op::Unary(_) => raise_broadcast(view, id).or_else(|| lower_reshape(view, id)),
        Op::Cast(_) => raise_broadcast(view, id).or_else(|| narrow_first(view, id)),
        Op::Binary(_) => drop_broadcast(view, id).or_else(|| lower_reshape(view, id)),
        Op::Select(_) => drop_broadcast(view, id),
        Op::Matmul(matmul) => matmul_of(view, id, matmul),
        Op::RmsNorm(_) | Op::LayerNorm(_) => lower_reshape_of_norm(view, id),
        _ => None,
    };
    found.map_or(Outcome::NoMatch, Outcome::Rewrite)
}

fn producer<'a>(view: &'a View<'_>, operand: Operand) -> Option<(NodeId, &'a Op)> {
    let (id, 0) = view.def(operand)? else { return None };
    Some((id, &view.node(id).op))
}

fn alone(view: &View<'_>, operand: Operand) -> bool {
    matches!(operand, Operand::Value(value) if view.used_once(value))
}

fn one_node<const N: usize>(
    view: &View<'_>,
    id: NodeId,
    sources: [NodeId; N],
    op: impl Into<SharedOp>,
    operands: impl IntoIterator<Item = Operand>,
) -> Option<Patch> {
    let mut patch = Patch::new(sources);
    let new = patch.node(op, operands.into_iter().map(From::Old));
    patch.replace(view.node(id).results[0], From::New(new, 0));
    Some(patch)
}

fn slice_of(view: &View<'_>, id: NodeId, slice: &Slice) -> Option<Patch> {
    let (inner, op) = producer(view, view.node(id).operands[0])?;
    match op {
        Op::Slice(first) if first.axis == slice.axis && first.step == 1 => {
            let op = Slice {
                start: first.start.add(&slice.start),
                end: first.start.add(&slice.end),
                ..slice.clone()
            };
            one_node(view, id, [id, inner], op, [view.node(inner).operands[0]])
        }
        Op::Concat(concat) if concat.axis == slice.axis => {
            let mut offset = Dim::from(0i64);
            for part in &view.node(inner).operands {
                let end = offset.add(&view.ty(*part).shape[slice.axis]);
                let fits = |low: &Dim, high: &Dim| high.sub(low).as_const().is_some_and(|gap| gap >= 0);
                if fits(&offset, &slice.start) && fits(&slice.end, &end) {
                    let op = Slice {
                        start: slice.start.sub(&offset),
                        end: slice.end.sub(&offset),
                        ..slice.clone()
                    };
                    return one_node(view, id, [id], op, [*part]);
                }
                offset = end;
            }
            None
        }
        _ => None,
    }
}

/// What a slice reads: source, start and end.
type Range = (Operand, Dim, Dim);

fn concat_of(view: &View<'_>, id: NodeId, axis: usize) -> Option<Patch> {
    let parts = &view.node(id).operands;
    let nested = |part: &Operand| match producer(view, *part) {
        Some((inner, Op::Concat(c))) if c.axis == axis && alone(view, *part) => Some(inner),
        _ => None,
    };
    if parts.iter().any(|p| nested(p).is_some()) {
        let sources: Vec<NodeId> = parts.iter().filter_map(nested).chain([id]).collect();
        let flat: Vec<From> = parts
            .iter()
            .flat_map(|p| nested(p).map_or_else(|| vec![*p], |inner| view.node(inner).operands.to_vec()))
            .map(From::Old)
            .collect();
        let mut patch = Patch::new(sources);
        let new = patch.node(Concat { axis }, flat);
        patch.replace(view.node(id).results[0], From::New(new, 0));
        return Some(patch);
    }
    // Runs of slices that continue each other.
    let range = |part: &Operand| match producer(view, *part) {
        Some((inner, Op::Slice(s))) if s.axis == axis && s.step == 1 => {
            Some((view.node(inner).operands[0], s.start.clone(), s.end.clone()))
        }
        _ => None,
    };
    let mut runs: Vec<(Operand, Option<Range>)> = Vec::new();
    for part in parts {
        match (runs.last_mut(), range(part)) {
            (Some((_, Some((source, _, end)))), Some((next, from, to)))
                if *source == next && *end == from =>
            {
                *end = to;
            }
            (_, found) => runs.push((*part, found)),
        }
    }
    if runs.len() == parts.len() {
        return None;
    }
    let mut patch = Patch::new([id]);
    let joined: Vec<From> = runs
        .into_iter()
        .map(|(part, range)| match range {
            Some((source, start, end)) => {
                From::New(patch.node(Slice { axis, start, end, step: 1 }, [From::Old(source)]), 0)
            }
            None => From::Old(part),
        })
        .collect();
    let new = match joined[..] {
        [only] => only,
        _ => From::New(patch.node(Concat { axis }, joined), 0),
    };
    patch.replace(view.node(id).results[0], new);
    Some(patch)
}

fn reshape_of(view: &View<'_>, id: NodeId, shape: &Shape) -> Option<Patch> {
    let operand = view.node(id).operands[0];
    let (inner, op) = producer(view, operand)?;
    match op {
        Op::Reduce(Reduce { function, axes, keep: false }) if alone(view, operand) => {
            let x = view.node(inner).operands[0];
            let mut kept = view.ty(x).shape.clone();
            axes.iter().for_each(|axis| kept[*axis] = Dim::from(1i64));
            let op = Reduce { function: *function, axes: axes.clone(), keep: true };
            (&kept == shape).then(|| one_node(view, id, [id, inner], op, [x]))?
        }
        Op::Iota(iota) => {
            let one = Dim::from(1i64);
            let long = |shape: &Shape| {
                let mut axes = (0..shape.len()).filter(|a| shape[*a] != one);
                match (axes.next(), axes.next()) {
                    (Some(axis), None) => Some(axis),
                    _ => None,
                }
            };
            let (from, axis) = (long(&iota.shape)?, long(shape)?);
            if from != iota.axis {
                return None;
            }
            one_node(view, id, [id], Iota { shape: shape.clone(), axis, dtype: iota.dtype }, [])
        }
        Op::Slice(slice) if slice.axis + 1 == view.ty(operand).rank() => {
            let grouped = view.node(inner).operands[0];
            let (outer, Op::Reshape(_)) = producer(view, grouped)? else { return None };
            let x = view.node(outer).operands[0];
            // [.., n * k] -> [.., n, k] -> [.., n, 1] -> [.., n]
            let [lead @ .., n, k] = &view.ty(grouped).shape[..] else { return None };
            let (n, k, start) = (n.as_const()?, k.as_const()?, slice.start.as_const()?);
            let (own, x_lead) = view.ty(x).shape.split_last()?;
            let fits = own.as_const() == n.checked_mul(k)
                && x_lead == lead
                && slice.end.as_const() == Some(start + 1)
                && shape.split_last() == Some((&Dim::from(n), lead));
            let op = Slice {
                axis: lead.len(),
                start: slice.start.clone(),
                end: own.clone(),
                step: usize::try_from(k).ok()?,
            };
            fits.then(|| one_node(view, id, [id], op, [x]))?
        }
        _ => across(view, id, operand).or_else(|| widen_last(view, id)),
    }
}

fn broadcast_of(view: &View<'_>, id: NodeId, shape: &Shape) -> Option<Patch> {
    let (inner, op) = producer(view, view.node(id).operands[0])?;
    match op {
        Op::Broadcast(_) => {
            let op = Broadcast { shape: shape.clone() };
            one_node(view, id, [id, inner], op, [view.node(inner).operands[0]])
        }
        Op::Iota(iota) => {
            let axis = iota.axis + shape.len() - iota.shape.len();
            (shape[axis] == iota.shape[iota.axis]).then(|| {
                one_node(view, id, [id], Iota { shape: shape.clone(), axis, dtype: iota.dtype }, [])
            })?
        }
        _ => None,
    }
}

fn transpose_of(view: &View<'_>, id: NodeId, perm: &[usize]) -> Option<Patch> {
    let operand = view.node(id).operands[0];
    if let Some((_, Op::Iota(iota))) = producer(view, operand) {
        let shape = perm.iter().map(|p| iota.shape[*p].clone()).collect();
        let axis = perm.iter().position(|p| *p == iota.axis)?;
        return one_node(view, id, [id], Iota { shape, axis, dtype: iota.dtype }, []);
    }
    across(view, id, operand).or_else(|| widen_last(view, id))
}

/// Most elementwise nodes between two movements.
const BETWEEN: usize = 8;

/// A movement of an elementwise node, every operand of which comes from a movement of its kind: moves the operands
/// instead, so that the movements meet.
fn across(view: &View<'_>, id: NodeId, operand: Operand) -> Option<Patch> {
    let movement = &view.node(id).op;
    if !meets(view, movement, operand, BETWEEN) {
        return None;
    }
    let (inner, op) = producer(view, operand)?;
    if !is_elementwise(op) {
        return None;
    }
    let mut patch = Patch::new([id, inner]);
    let operands: Vec<From> = view
        .node(inner)
        .operands
        .iter()
        .map(|o| match is_scalar(view, *o) {
            true => From::Old(*o),
            false => From::New(patch.node(movement.clone(), [From::Old(*o)]), 0),
        })
        .collect();
    let new = patch.node(op.clone(), operands);
    patch.replace(view.node(id).results[0], From::New(new, 0));
    Some(patch)
}

fn is_elementwise(op: &Op) -> bool {
    matches!(op, Op::Unary(_) | Op::Cast(_) | Op::Binary(_))
}

/// Whether the operand is a constant that no movement changes.
fn is_scalar(view: &View<'_>, operand: Operand) -> bool {
    let ty = view.ty(operand);
    ty.rank() <= 1 && ty.elements().as_const() == Some(1) && constant(view, operand).is_some()
}

/// Whether every way up from `operand`, through elementwise nodes that nobody else reads, ends in a movement of the
/// same kind.
fn meets(view: &View<'_>, movement: &Op, operand: Operand, depth: usize) -> bool {
    let Some((id, op)) = producer(view, operand) else { return false };
    match (movement, op) {
        (Op::Transpose(_), Op::Transpose(_)) | (Op::Reshape(_), Op::Reshape(_)) => true,
        (_, op) if is_elementwise(op) && depth > 0 && alone(view, operand) => {
            let shape = &view.ty(operand).shape;
            let moving: Vec<Operand> =
                view.node(id).operands.iter().copied().filter(|o| !is_scalar(view, *o)).collect();
            !moving.is_empty()
                && moving.iter().all(|o| &view.ty(*o).shape == shape && meets(view, movement, *o, depth - 1))
        }
        _ => false,
    }
}

/// A cast that makes elements smaller comes before the movement.
fn narrow_first(view: &View<'_>, id: NodeId) -> Option<Patch> {
    let operand = view.node(id).operands[0];
    let (inner, movement) = producer(view, operand)?;
    let result = &view.module.graph.values[view.node(id).results[0]].ty;
    let narrows =
        is_float_change(view, operand, result) && result.dtype.bits() < view.ty(operand).dtype.bits();
    let moves = matches!(movement, Op::Reshape(_) | Op::Transpose(_));
    (narrows && moves && alone(view, operand)).then(|| swap(view, id, inner))
}

/// A cast that makes elements larger comes after the movement.
fn widen_last(view: &View<'_>, id: NodeId) -> Option<Patch> {
    let operand = view.node(id).operands[0];
    let (inner, Op::Cast(_)) = producer(view, operand)? else { return None };
    let below = view.node(inner).operands[0];
    let widens = is_float_change(view, below, view.ty(operand))
        && view.ty(operand).dtype.bits() > view.ty(below).dtype.bits();
    (widens && alone(view, operand)).then(|| swap(view, id, inner))
}

fn is_float_change(view: &View<'_>, from: Operand, to: &TensorType) -> bool {
    view.ty(from).dtype.is_float() && to.dtype.is_float()
}

/// `outer(inner(x))` as `inner(outer(x))`.
fn swap(view: &View<'_>, outer: NodeId, inner: NodeId) -> Patch {
    let mut patch = Patch::new([outer, inner]);
    let first = patch.node(view.node(outer).op.clone(), [From::Old(view.node(inner).operands[0])]);
    let second = patch.node(view.node(inner).op.clone(), [From::New(first, 0)]);
    patch.replace(view.node(outer).results[0], From::New(second, 0));
    patch
}

/// A function of one broadcast operand computes before the broadcast.
fn raise_broadcast(view: &View<'_>, id: NodeId) -> Option<Patch> {
    let operand = view.node(id).operands[0];
    let (inner, op) = producer(view, operand)?;
    if !matches!(op, Op::Broadcast(_)) || !alone(view, operand) {
        return None;
    }
    let mut patch = Patch::new([id, inner]);
    let small = patch.node(view.node(id).op.clone(), [From::Old(view.node(inner).operands[0])]);
    let new = patch.node(op.clone(), [From::New(small, 0)]);
    patch.replace(view.node(id).results[0], From::New(new, 0));
    Some(patch)
}

/// An operand that a broadcast brings to a shape it would get anyway.
fn drop_broadcast(view: &View<'_>, id: NodeId) -> Option<Patch> {
    let node = view.node(id);
    let shape = &view.module.graph.values[node.results[0]].ty.shape;
    for (at, operand) in node.operands.iter().enumerate() {
        let Some((inner, Op::Broadcast(_))) = producer(view, *operand) else { continue };
        let mut operands = node.operands.clone();
        operands[at] = view.node(inner).operands[0];
        let together =
            operands.iter().try_fold(Shape::new(), |known, o| broadcast_shapes(&known, &view.ty(*o).shape));
        if together.is_ok_and(|s| &s == shape) {
            return one_node(view, id, [id, inner], node.op.clone(), operands);
        }
    }
    None
}

/// What follows a matmul element by element comes before the reshape of its result, where fusion finds it.
fn lower_reshape(view: &View<'_>, id: NodeId) -> Option<Patch> {
    let node = view.node(id);
    let (at, inner, x) = node.operands.iter().enumerate().find_map(|(at, operand)| {
        let (inner, Op::Reshape(_)) = producer(view, *operand)? else { return None };
        let x = view.node(inner).operands[0];
        let from_matmul = producer(view, x).is_some_and(|(_, op)| is_linear(view, op, x));
        (from_matmul && alone(view, *operand)).then_some((at, inner, x))
    })?;
    let n = view.ty(x).last();
    let result = &view.module.graph.values[node.results[0]].ty;
    if result.last() != n || view.ty(node.operands[at]).shape != result.shape {
        return None;
    }
    let mut patch = Patch::new([id, inner]);
    let mut operands = Vec::new();
    for (i, operand) in node.operands.iter().enumerate() {
        let ty = view.ty(*operand);
        let vector = ty.rank() == 1 && ty.shape[0] == n && matches!(operand, Operand::Weight(_));
        if i == at {
            operands.push(From::Old(x));
        } else if vector || (ty.rank() <= 1 && ty.elements().as_const() == Some(1)) {
            operands.push(From::Old(*operand));
        } else if ty.shape == result.shape && matches!(operand, Operand::Value(_)) {
            let shape = view.ty(x).shape.clone();
            operands.push(From::New(patch.node(Reshape { shape }, [From::Old(*operand)]), 0));
        } else {
            return None;
        }
    }
    let new = patch.node(node.op.clone(), operands);
    let shaped = patch.node(Reshape { shape: result.shape.clone() }, [From::New(new, 0)]);
    patch.replace(node.results[0], From::New(shaped, 0));
    Some(patch)
}

/// A norm of a reshaped sum normalises the sum, where fusion finds it, if the reshape keeps the last axis.
fn lower_reshape_of_norm(view: &View<'_>, id: NodeId) -> Option<Patch> {
    let node = view.node(id);
    let (inner, Op::Reshape(_)) = producer(view, node.operands[0])? else { return None };
    let x = view.node(inner).operands[0];
    let sum = matches!(producer(view, x)?.1, Op::Binary(_));
    let result = &view.module.graph.values[node.results[0]].ty;
    if !sum || view.ty(x).last() != result.last() {
        return None;
    }
    let mut patch = Patch::new([id, inner]);
    let operands = std::iter::once(x).chain(node.operands[1..].iter().copied()).map(From::Old);
    let new = patch.node(node.op.clone(), operands.collect::<Vec<_>>());
    let shaped = patch.node(Reshape { shape: result.shape.clone() }, [From::New(new, 0)]);
    patch.replace(node.results[0], From::New(shaped, 0));
    Some(patch)
}

/// Whether the op that defines `x` is a matmul by a weight, or an elementwise node right after one.
fn is_linear(view: &View<'_>, op: &Op, x: Operand) -> bool {
    let by_weight = |id: NodeId| matches!(view.node(id).operands.get(1), Some(Operand::Weight(_)));
    match (op, view.def(x)) {
        (Op::Matmul(_), Some((id, _))) => by_weight(id),
        (Op::Binary(_) | Op::Unary(_), Some((id, _))) => view.node(id).operands.iter().any(|o| {
            producer(view, *o).is_some_and(|(inner, op)| matches!(op, Op::Matmul(_)) && by_weight(inner))
        }),
        _ => false,
    }
}

fn matmul_of(view: &View<'_>, id: NodeId, matmul: &Matmul) -> Option<Patch> {
    let [a, b] = view.node(id).operands[..] else { return None };
    let turned = Matmul { transpose_b: !matmul.transpose_b, out: matmul.out };
    if let Some((inner, Op::Transpose(Transpose { perm }))) = producer(view, b) {
        let rank = perm.len();
        let swaps = perm[..rank - 2].iter().enumerate().all(|(i, p)| i == *p)
            && perm[rank - 2..] == [rank - 1, rank - 2];
        return swaps.then(|| one_node(view, id, [id, inner], turned, [a, view.node(inner).operands[0]]))?;
    }
    let Operand::Weight(weight) = b else { return None };
    let weight = &view.module.weights[weight];
    if matmul.transpose_b || weight.ty.rank() != 2 || weight.ty.dtype.size_bytes().is_none() {
        return None;
    }
    let mut patch = Patch::new([id]);
    let by = match &weight.expr {
        WeightExpr::Transpose { perm, of } if perm[..] == [1, 0] => From::Old(Operand::Weight(*of)),
        _ => {
            let Operand::Weight(of) = b else { return None };
            let shape: Shape = weight.ty.shape.iter().rev().cloned().collect();
            let expr = WeightExpr::Transpose { perm: vec![1, 0], of };
            patch.weight(format!("{}.t", weight.name), TensorType { dtype: weight.ty.dtype, shape }, expr)
        }
    };
    let new = patch.node(turned, [From::Old(a), by]);
    patch.replace(view.node(id).results[0], From::New(new, 0));
    Some(patch)
}
