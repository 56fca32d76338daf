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
//! have any rank: it becomes `[t, heads, d]`, where t counts sequences and positions. Where only the first elements are
//! rotated and the rest is joined to them, the op rotates that many.

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::rope::RopeLayout;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{Binary, Broadcast, Cast, Concat, Iota, Op, Reshape, Rope, Slice, Transpose, Unary};
use millrace_ir::types::{Shape, product};
use millrace_ir::{DType, Dim, NodeId, Operand, ValueId};

use super::rope_angles::{Positions, angles, rope};
use super::{cast_result, stored_as, widest};
use crate::pattern::{below_casts, constant, read_outside};
use crate::rewrite::{From, Outcome, Patch, View};

/// A rotation whose angles are not looked at yet.
struct Rotation {
    x: Operand,
    /// How many elements of x are rotated, from the first on.
    width: i64,
    /// Whether the rest of x is joined to them by the node itself.
    joined: bool,
    cos: Operand,
    sin: Operand,
    layout: RopeLayout,
    nodes: Vec<NodeId>,
}

/// Looks for a rotation that ends in this node.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let found = match &*view.node(id).op {
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

/// One element of every pair of the first elements of x.
#[derive(Clone, Copy, PartialEq)]
struct Half {
    x: Operand,
    /// 0 for the first elements of pairs, 1 for the second.
    index: usize,
    layout: RopeLayout,
    /// How many elements of x the pairs cover.
    width: i64,
}

fn half(view: &View<'_>, operand: Operand, nodes: &mut Vec<NodeId>) -> Option<Half> {
    let (id, op) = producer(view, operand, nodes)?;
    let Op::Slice(Slice { axis, start, end, step }) = op else { return None };
    let source = view.node(id).operands[0];
    let ty = view.ty(source);
    let d = ty.last().as_const()?;
    if axis + 1 != ty.rank() {
        return None;
    }
    let x = below_casts(view, source).0;
    let (index, layout, width) = match (start.as_const()?, end.as_const()?, step) {
        (0, end, 1) => (0, RopeLayout::Half, 2 * end),
        (start, end, 1) if end == 2 * start => (1, RopeLayout::Half, end),
        (0, end, 2) => (0, RopeLayout::Interleaved, end + end % 2),
        (1, end, 2) if end % 2 == 0 => (1, RopeLayout::Interleaved, end),
        _ => return None,
    };
    (width > 0 && width <= d).then_some(Half { x, index, layout, width })
}

/// Whether the operand is the first `width` elements of x.
fn is_start(view: &View<'_>, operand: Operand, of: Half, nodes: &mut Vec<NodeId>) -> bool {
    let below = below_casts(view, operand).0;
    if view.ty(of.x).last().as_const() == Some(of.width) {
        return below == of.x;
    }
    let Some((id, Op::Slice(slice))) = producer(view, operand, nodes) else { return false };
    slice.axis + 1 == view.ty(of.x).rank()
        && slice.step == 1
        && (slice.start.as_const(), slice.end.as_const()) == (Some(0), Some(of.width))
        && below_casts(view, view.node(id).operands[0]).0 == of.x
}

/// Two tensors joined as the first and second elements of pairs, in which layout.
fn joined(view: &View<'_>, operand: Operand, nodes: &mut Vec<NodeId>) -> Option<([Operand; 2], RopeLayout)> {
    let (id, op) = producer(view, operand, nodes)?;
    let parts = |id: NodeId| match view.node(id).operands[..] {
        // What is not rotated may follow in the same node.
        [a, b] | [a, b, _] => Some([a, b]),
        _ => None,
    };
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
                (last.as_const() == Some(1) && view.ty(source).shape == lead).then_some(source)
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
            if lo.index != 0 || lo.layout != layout || hi != (Half { index: 1, ..lo }) {
                continue;
            }
            let mut is_x = |o: Operand| is_start(view, o, lo, &mut inner);
            let cos = match plain {
                [x, cos] if is_x(x) => cos,
                [cos, x] if is_x(x) => cos,
                _ => continue,
            };
            return Some(Rotation {
                x: lo.x,
                width: lo.width,
                joined: false,
                cos,
                sin,
                layout,
                nodes: inner,
            });
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
            let half = half(view, part, &mut inner)?;
            (half.layout == layout).then(|| {
                nodes.extend(inner);
                (half, factor)
            })
        })
    };
    let mut terms = |operand: Operand, wanted: BinaryFn| {
        let (id, Op::Binary(Binary { function })) = producer(view, operand, &mut nodes)? else { return None };
        let [a, b] = view.node(id).operands[..] else { return None };
        (*function == wanted).then_some(())?;
        Some([turned(a, &mut nodes)?, turned(b, &mut nodes)?])
    };
    let [(lo, cos), (hi, sin)] = terms(first, BinaryFn::Sub)?;
    let sum = terms(second, BinaryFn::Add)?;
    let fits = lo.index == 0
        && hi == (Half { index: 1, ..lo })
        && (sum == [(hi, cos), (lo, sin)] || sum == [(lo, sin), (hi, cos)]);
    let rest = match (&*view.node(id).op, &view.node(id).operands[..]) {
        (Op::Concat(_), [_, _, rest]) => Some(is_rest(view, *rest, lo.x, lo.width)?),
        _ => None,
    };
    nodes.extend(rest);
    fits.then_some(Rotation { x: lo.x, width: lo.width, joined: rest.is_some(), cos, sin, layout, nodes })
}

/// The node that makes `operand`, if it is all of x but the first `width` elements.
fn is_rest(view: &View<'_>, operand: Operand, x: Operand, width: i64) -> Option<NodeId> {
    let (id, 0) = view.def(operand)? else { return None };
    let Op::Slice(slice) = &*view.node(id).op else { return None };
    let ty = view.ty(x);
    let fits = slice.axis + 1 == ty.rank()
        && slice.step == 1
        && slice.start.as_const() == Some(width)
        && slice.end == ty.last()
        && view.node(id).operands[0] == x;
    fits.then_some(id)
}

/// Where the rest of x is joined to the rotated elements: the nodes that do it, and the result.
fn joined_rest(view: &View<'_>, result: ValueId, x: Operand, width: i64) -> Option<([NodeId; 2], ValueId)> {
    let [user] = view.users(result)[..] else { return None };
    let node = view.node(user);
    let Op::Concat(Concat { axis }) = *node.op else { return None };
    let [first, rest] = node.operands[..] else { return None };
    let slice = is_rest(view, rest, x, width)?;
    let fits = first == Operand::Value(result) && view.used_once(result) && axis + 1 == view.ty(x).rank();
    fits.then(|| ([user, slice], node.results[0]))
}

fn rewrite(view: &View<'_>, id: NodeId, rotation: Rotation) -> Result<Outcome, String> {
    let Rotation { x, width, joined, cos, sin, layout, mut nodes } = rotation;
    let own = view.node(id).results[0];
    let rotated = &view.module.graph.values[own].ty;
    let x_ty = view.ty(x);
    let all = x_ty.last().as_const() == Some(width);
    let last = if joined { x_ty.last() } else { Dim::from(width) };
    if rotated.last() != last || rotated.shape[..rotated.rank() - 1] != x_ty.shape[..x_ty.rank() - 1] {
        return Ok(Outcome::NoMatch);
    }
    // Elements that are not rotated are part of the op if they are joined to the others right afterwards.
    let mut joins = Vec::new();
    let (result, rotary) = match joined_rest(view, own, x, width) {
        _ if all => (own, 0),
        _ if joined => (own, width as usize),
        Some((nodes, result)) => {
            joins.extend(nodes);
            (result, width as usize)
        }
        None => (own, 0),
    };
    let ty = &view.module.graph.values[result].ty;
    let shape = &ty.shape;
    let rank = shape.len();
    let found = [angles(view, cos, UnaryFn::Cos)?, angles(view, sin, UnaryFn::Sin)?];
    let (op, positions) = rope(&found[0], &found[1], width as usize, layout)?;
    let op = Rope { rotary, ..op };
    nodes.extend(&joins);
    let shared: Vec<NodeId> = nodes
        .iter()
        .copied()
        .filter(|n| joins.contains(n) || matches!(*view.node(*n).op, Op::Cast(_) | Op::Slice(_)))
        .collect();
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
    let (target, replaced) = stored_as(view, result, narrow, &mut nodes);
    let dtype = widest([narrow, target]);
    let mut patch = Patch::new(nodes);
    let mut at = From::Old(x);
    if view.ty(x).last() != ty.last() {
        let first = Slice { axis: rank - 1, start: Dim::from(0i64), end: ty.last(), step: 1 };
        at = From::New(patch.node(first, [at]), 0);
    }
    if narrow != dtype {
        at = From::New(patch.node(Cast { to: dtype }, [at]), 0);
    }
    let perm: Vec<usize> = rows.iter().chain(&heads).copied().chain([rank - 1]).collect();
    let turned = perm.iter().enumerate().any(|(i, p)| i != *p);
    if turned {
        at = From::New(patch.node(Transpose { perm: perm.clone() }, [at]), 0);
    }
    let dims = |axes: &[usize]| axes.iter().map(|a| shape[*a].clone()).collect::<Shape>();
    let t = product(&dims(&rows));
    let head_count = heads.map_or(Dim::from(1i64), |axis| shape[axis].clone());
    let packed = patch.node(Reshape { shape: vec![t.clone(), head_count, ty.last()].into() }, [at]);
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
        _ => From::New(patch.node(Reshape { shape: vec![t].into() }, [all]), 0),
    }
}
