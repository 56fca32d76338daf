//! Rotary position embedding.
//!
//! ```text
//! x * cos + concat(-x[d/2..], x[..d/2]) * sin                    ->  rope(x, positions) {layout = half}
//! concat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)               likewise, with halves x1, x2
//! x * cos + stack(-x[1::2], x[0::2]) * sin                       ->  rope(x, positions) {layout = interleaved}
//! stack(x1 * cos - x2 * sin, x2 * cos + x1 * sin)                likewise, with elements x1, x2 of pairs
//! ```
//!
//! `cos` and `sin` must be known to be those of positions times powers of a base (see `rope_angles`). `x [.., d]` may
//! have any rank: it becomes `[t, heads, d]`, where t counts sequences and positions.

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::rope::RopeLayout;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{Binary, Broadcast, Concat, Iota, Op, Reshape, Slice, Transpose, Unary};
use millrace_ir::types::{Shape, product};
use millrace_ir::{DType, Dim, NodeId, Operand};

use super::rope_angles::{Positions, angles, rope};
use super::{cast_after, cast_result, widest};
use crate::pattern::{below_casts, constant, read_outside};
use crate::rewrite::{From, Outcome, Patch, View};

/// A rotation whose angles are not looked at yet.
struct Rotation {
    x: Operand,
    cos: Operand,
    sin: Operand,
    layout: RopeLayout,
    nodes: Vec<NodeId>,
}

/// Looks for a rotation that ends in this node.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let found = match &view.node(id).op {
        Op::Binary(Binary { function: BinaryFn::Add }) => whole(view, id),
        Op::Concat(_) | Op::Reshape(_) => halves(view, id),
        _ => None,
    };
    let Some(rotation) = found else { return Outcome::NoMatch };
    rewrite(view, id, rotation).unwrap_or_else(|reason| Outcome::Blocked(format!("rope: {reason}")))
}

/// The node that defines an operand, below casts between float types.
fn producer<'a>(view: &'a View<'_>, operand: Operand, nodes: &mut Vec<NodeId>) -> Option<(NodeId, &'a Op)> {
    let (below, casts) = below_casts(view, operand);
    let (id, 0) = view.def(below)? else { return None };
    nodes.extend(casts);
    nodes.push(id);
    Some((id, &view.node(id).op))
}

/// The two factors of a product.
fn factors(view: &View<'_>, operand: Operand, nodes: &mut Vec<NodeId>) -> Option<[Operand; 2]> {
    let (id, op) = producer(view, operand, nodes)?;
    match op {
        Op::Binary(Binary { function: BinaryFn::Mul }) => view.node(id).operands[..].try_into().ok(),
        _ => None,
    }
}

fn negated(view: &View<'_>, operand: Operand, nodes: &mut Vec<NodeId>) -> Option<Operand> {
    let (id, op) = producer(view, operand, nodes)?;
    let node = view.node(id);
    match op {
        Op::Unary(Unary { function: UnaryFn::Neg }) => Some(node.operands[0]),
        Op::Binary(Binary { function: BinaryFn::Mul }) => match (node.operands[0], node.operands[1]) {
            (a, b) if constant(view, b) == Some(-1.0) => Some(a),
            (a, b) if constant(view, a) == Some(-1.0) => Some(b),
            _ => None,
        },
        _ => None,
    }
}

/// One element of every pair of x: x, which element, and the layout.
fn half(view: &View<'_>, operand: Operand, nodes: &mut Vec<NodeId>) -> Option<(Operand, usize, RopeLayout)> {
    let (id, op) = producer(view, operand, nodes)?;
    let Op::Slice(Slice { axis, start, end, step }) = op else { return None };
    let x = view.node(id).operands[0];
    let ty = view.ty(x);
    let d = ty.last().as_const().filter(|d| d % 2 == 0)?;
    if axis + 1 != ty.rank() {
        return None;
    }
    let x = below_casts(view, x).0;
    match (start.as_const()?, end.as_const()?, step) {
        (0, end, 1) if end == d / 2 => Some((x, 0, RopeLayout::Half)),
        (start, end, 1) if start == d / 2 && end == d => Some((x, 1, RopeLayout::Half)),
        (0, end, 2) if end >= d - 1 => Some((x, 0, RopeLayout::Interleaved)),
        (1, end, 2) if end == d => Some((x, 1, RopeLayout::Interleaved)),
        _ => None,
    }
}

/// Two tensors joined as the first and second elements of pairs, in which layout.
fn joined(view: &View<'_>, operand: Operand, nodes: &mut Vec<NodeId>) -> Option<([Operand; 2], RopeLayout)> {
    let (id, op) = producer(view, operand, nodes)?;
    let parts = |id: NodeId| -> Option<[Operand; 2]> { view.node(id).operands[..].try_into().ok() };
    match op {
        Op::Concat(Concat { axis }) if axis + 1 == view.ty(operand).rank() => {
            Some((parts(id)?, RopeLayout::Half))
        }
        Op::Reshape(Reshape { shape }) => {
            let stacked = view.node(id).operands[0];
            let (concat, Op::Concat(Concat { axis })) = producer(view, stacked, nodes)? else { return None };
            let [a, b] = parts(concat)?;
            let mut below = |part: Operand| {
                let (id, Op::Reshape(Reshape { shape: inner })) = producer(view, part, nodes)? else {
                    return None;
                };
                let source = view.node(id).operands[0];
                let (last, lead) = inner.split_last()?;
                (last.as_const() == Some(1) && lead == view.ty(source).shape).then_some(source)
            };
            let (a, b) = (below(a)?, below(b)?);
            let is_last = axis + 1 == view.ty(stacked).rank();
            let flat = shape.len() == view.ty(a).rank()
                && shape[..shape.len() - 1] == view.ty(a).shape[..shape.len() - 1];
            (is_last && flat).then_some(([a, b], RopeLayout::Interleaved))
        }
        _ => None,
    }
}

/// `x * cos + turned(x) * sin`.
fn whole(view: &View<'_>, id: NodeId) -> Option<Rotation> {
    let [a, b] = view.node(id).operands[..] else { return None };
    for (plain, turned) in [(a, b), (b, a)] {
        let mut nodes = vec![id];
        let (Some(plain), Some(turned)) =
            (factors(view, plain, &mut nodes), factors(view, turned, &mut nodes))
        else {
            continue;
        };
        for (rotated, sin) in [(turned[0], turned[1]), (turned[1], turned[0])] {
            let mut inner = nodes.clone();
            let Some(([minus, second], layout)) = joined(view, rotated, &mut inner) else { continue };
            let Some(minus) = negated(view, minus, &mut inner) else { continue };
            let (Some(hi), Some(lo)) = (half(view, minus, &mut inner), half(view, second, &mut inner)) else {
                continue;
            };
            if hi != (lo.0, 1, layout) || lo.1 != 0 || lo.2 != layout {
                continue;
            }
            let is_x = |o: Operand| below_casts(view, o).0 == lo.0;
            let cos = match plain {
                [x, cos] if is_x(x) => cos,
                [cos, x] if is_x(x) => cos,
                _ => continue,
            };
            return Some(Rotation { x: lo.0, cos, sin, layout, nodes: inner });
        }
    }
    None
}

/// `joined(x1 * cos - x2 * sin, x2 * cos + x1 * sin)`.
fn halves(view: &View<'_>, id: NodeId) -> Option<Rotation> {
    let mut nodes = Vec::new();
    let ([first, second], layout) = joined(view, Operand::Value(view.node(id).results[0]), &mut nodes)?;
    // A product of an element of the pair with cos or sin.
    let turned = |operand: Operand, nodes: &mut Vec<NodeId>| {
        let [a, b] = factors(view, operand, nodes)?;
        [(a, b), (b, a)].into_iter().find_map(|(part, factor)| {
            let mut inner = Vec::new();
            let (x, index, found) = half(view, part, &mut inner)?;
            (found == layout).then(|| {
                nodes.extend(inner);
                (x, index, factor)
            })
        })
    };
    let mut terms = |operand: Operand, wanted: BinaryFn| {
        let (id, Op::Binary(Binary { function })) = producer(view, operand, &mut nodes)? else { return None };
        let [a, b] = view.node(id).operands[..] else { return None };
        (*function == wanted).then_some(())?;
        Some([turned(a, &mut nodes)?, turned(b, &mut nodes)?])
    };
    let [(x, 0, cos), (y, 1, sin)] = terms(first, BinaryFn::Sub)? else { return None };
    let sum = terms(second, BinaryFn::Add)?;
    let fits = sum == [(x, 1, cos), (x, 0, sin)] || sum == [(x, 0, sin), (x, 1, cos)];
    (x == y && fits).then_some(Rotation { x, cos, sin, layout, nodes })
}

fn rewrite(view: &View<'_>, id: NodeId, rotation: Rotation) -> Result<Outcome, String> {
    let Rotation { x, cos, sin, layout, mut nodes } = rotation;
    let result = view.node(id).results[0];
    let ty = &view.module.graph.values[result].ty;
    let shape = &ty.shape;
    let (Some(d), true) = (ty.last().as_const(), &view.ty(x).shape == shape) else {
        return Ok(Outcome::NoMatch);
    };
    let rank = shape.len();
    let found = [angles(view, cos, UnaryFn::Cos)?, angles(view, sin, UnaryFn::Sin)?];
    let (op, positions) = rope(&found[0], &found[1], d as usize, layout)?;
    let shared: Vec<NodeId> =
        nodes.iter().copied().filter(|n| matches!(view.node(*n).op, Op::Cast(_) | Op::Slice(_))).collect();
    if let Some(reason) = read_outside(view, &nodes, id, &shared) {
        return Err(reason);
    }
    // Axes of x along which the angle changes.
    let moving = |angle: Operand| -> Vec<usize> {
        let own = &view.ty(angle).shape;
        (0..own.len() - 1).filter(|a| own[*a].as_const() != Some(1)).map(|a| a + rank - own.len()).collect()
    };
    let axes = moving(cos);
    if axes != moving(sin) || axes.is_empty() {
        return Err("the angles do not change along the axes of x".into());
    }
    let positions_shape: Shape = axes.iter().map(|a| shape[*a].clone()).collect();
    let fits = match positions {
        Positions::Coordinate => axes.len() == 1,
        Positions::Given(given) => {
            let dims = view.ty(given).shape.iter().filter(|d| d.as_const() != Some(1)).cloned();
            dims.collect::<Shape>() == positions_shape
        }
    };
    if !fits {
        return Err("the angles do not follow the shape of the positions".into());
    }
    let mut others: Vec<usize> = (0..rank - 1).filter(|a| !axes.contains(a)).collect();
    let heads = match others.last() {
        Some(last) if others.len() > 1 || shape[*last].as_const().is_some() => others.pop(),
        _ => None,
    };
    let mut rows: Vec<usize> = others.iter().chain(&axes).copied().collect();
    rows.sort_unstable();
    let narrow = view.ty(x).dtype;
    let (target, replaced) = match cast_after(view, result, narrow) {
        Some((cast, value)) => {
            nodes.push(cast);
            (narrow, value)
        }
        None => (ty.dtype, result),
    };
    let dtype = widest([narrow, target]);
    let mut patch = Patch::new(nodes);
    let mut at = From::Old(x);
    if narrow != dtype {
        at = From::New(patch.node(millrace_ir::ops::Cast { to: dtype }, [at]), 0);
    }
    let perm: Vec<usize> = rows.iter().chain(&heads).copied().chain([rank - 1]).collect();
    let turned = perm.iter().enumerate().any(|(i, p)| i != *p);
    if turned {
        at = From::New(patch.node(Transpose { perm: perm.clone() }, [at]), 0);
    }
    let dims = |axes: &[usize]| axes.iter().map(|a| shape[*a].clone()).collect::<Shape>();
    let t = product(&dims(&rows));
    let head_count = heads.map_or(Dim::from(1i64), |axis| shape[axis].clone());
    let packed = patch.node(Reshape { shape: vec![t.clone(), head_count, ty.last()] }, [at]);
    let positions = flat_positions(view, &mut patch, positions, &rows, &axes, &dims(&rows), t);
    let turn = patch.node(op, [From::New(packed, 0), positions]);
    let mut back = patch.node(Reshape { shape: dims(&perm) }, [From::New(turn, 0)]);
    if turned {
        let inverse = (0..rank).map(|axis| perm.iter().position(|p| *p == axis).unwrap_or(axis)).collect();
        back = patch.node(Transpose { perm: inverse }, [From::New(back, 0)]);
    }
    let with = cast_result(&mut patch, back, dtype, target);
    patch.replace(replaced, with);
    Ok(Outcome::Rewrite(patch))
}

/// The positions of all rows `[t]`; rows run over `dims` and have a position along `axes`.
fn flat_positions(
    view: &View<'_>,
    patch: &mut Patch,
    positions: Positions,
    rows: &[usize],
    axes: &[usize],
    dims: &Shape,
    t: Dim,
) -> From {
    let all = match positions {
        Positions::Coordinate => {
            let axis = rows.iter().position(|row| axes.contains(row)).unwrap_or(0);
            From::New(patch.node(Iota { shape: dims.clone(), axis, dtype: DType::I32 }, []), 0)
        }
        Positions::Given(given) if rows == axes => From::Old(given),
        Positions::Given(given) => {
            let one = Dim::from(1i64);
            let placed = rows.iter().zip(dims);
            let shape =
                placed.map(|(row, dim)| if axes.contains(row) { dim.clone() } else { one.clone() }).collect();
            let placed = patch.node(Reshape { shape }, [From::Old(given)]);
            From::New(patch.node(Broadcast { shape: dims.clone() }, [From::New(placed, 0)]), 0)
        }
    };
    match all {
        From::Old(given) if view.ty(given).rank() == 1 => all,
        From::New(..) if dims.len() == 1 => all,
        _ => From::New(patch.node(Reshape { shape: vec![t] }, [all]), 0),
    }
}
