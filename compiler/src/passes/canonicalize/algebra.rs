//! Arithmetic with one cheaper spelling.
//!
//! ```text
//! neg(neg(x))          ->  x                 add(x, neg(y))       ->  sub(x, y)
//! sub(x, neg(y))       ->  add(x, y)         div(x, splat 2^n)    ->  mul(x, splat 2^-n)
//! pow(x, splat 2)      ->  mul(x, x)         pow(x, splat 1)      ->  x
//! pow(x, splat -1)     ->  recip(x)          div(splat 1, x)      ->  recip(x)
//! recip(sqrt(x))       ->  rsqrt(x)          cast(cast(x))        ->  cast(x)     if the first one loses nothing
//! sub(i, i)            ->  splat 0           mul(i, splat 0)      ->  splat 0     for integers
//! select(splat, a, b)  ->  a or b            select(c, a, a)      ->  a
//! ```
//!
//! Every rewrite gives the same elements, up to roundings it leaves out. Hence `x - x` and `x * 0` of floats stay:
//! they are NaN where x is infinite or NaN.

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{Binary, Broadcast, Cast, Op, Unary};
use millrace_ir::tensor::round_to;
use millrace_ir::{DType, NodeId, Operand, WeightExpr};

use crate::pattern::constant;
use crate::rewrite::{From, Outcome, Patch, View};

/// Looks for arithmetic that has a cheaper spelling.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let node = view.node(id);
    match &*node.op {
        Op::Unary(Unary { function }) => unary(view, id, *function),
        Op::Binary(Binary { function }) => binary(view, id, *function),
        Op::Cast(Cast { to }) => {
            let Some((inner, Op::Cast(_))) = producer(view, node.operands[0]) else {
                return Outcome::NoMatch;
            };
            let x = view.node(inner).operands[0];
            if !widens(view.ty(x).dtype, view.ty(node.operands[0]).dtype) {
                return Outcome::NoMatch;
            }
            new_op(id, view, [id, inner], Cast { to: *to }, [From::Old(x)])
        }
        Op::Select(_) => {
            let [c, a, b] = node.operands[..] else { return Outcome::NoMatch };
            let chosen = match constant(view, c) {
                Some(condition) => Some(if condition != 0.0 { a } else { b }),
                None => (a == b).then_some(a),
            };
            chosen.map_or(Outcome::NoMatch, |operand| fill(view, id, operand))
        }
        _ => Outcome::NoMatch,
    }
}

/// Whether a cast between these types keeps every element.
fn widens(from: DType, to: DType) -> bool {
    use DType::{BF16, F8E4M3, F8E5M2, F16, F32, I32, I64};
    matches!((from, to), (BF16 | F16 | F8E4M3 | F8E5M2, F32) | (F8E4M3 | F8E5M2, F16 | BF16) | (I32, I64))
}

fn producer<'a>(view: &'a View<'_>, operand: Operand) -> Option<(NodeId, &'a Op)> {
    let (id, 0) = view.def(operand)? else { return None };
    Some((id, &view.node(id).op))
}

/// One new node instead of `id`.
fn new_op<const N: usize, const M: usize>(
    id: NodeId,
    view: &View<'_>,
    sources: [NodeId; N],
    op: impl Into<Op>,
    operands: [From; M],
) -> Outcome {
    let mut patch = Patch::new(sources);
    let new = patch.node(op, operands);
    patch.replace(view.node(id).results[0], From::New(new, 0));
    Outcome::Rewrite(patch)
}

/// `operand` instead of the result of `id`, broadcast to its shape.
fn fill(view: &View<'_>, id: NodeId, operand: Operand) -> Outcome {
    let result = view.node(id).results[0];
    let ty = &view.module.graph.values[result].ty;
    if view.ty(operand).shape != ty.shape {
        return new_op(id, view, [id], Broadcast { shape: ty.shape.clone() }, [From::Old(operand)]);
    }
    // Graph outputs and state rules want values, so a weight is not forwarded.
    if !matches!(operand, Operand::Value(_)) {
        return Outcome::NoMatch;
    }
    let mut patch = Patch::new([id]);
    patch.replace(result, From::Old(operand));
    Outcome::Rewrite(patch)
}

fn unary(view: &View<'_>, id: NodeId, function: UnaryFn) -> Outcome {
    let operand = view.node(id).operands[0];
    let Some((inner, Op::Unary(Unary { function: below }))) = producer(view, operand) else {
        return Outcome::NoMatch;
    };
    let x = view.node(inner).operands[0];
    match (function, below) {
        (UnaryFn::Neg, UnaryFn::Neg) => fill(view, id, x),
        (UnaryFn::Recip, UnaryFn::Sqrt) if matches!(operand, Operand::Value(v) if view.used_once(v)) => {
            new_op(id, view, [id, inner], Unary { function: UnaryFn::Rsqrt }, [From::Old(x)])
        }
        _ => Outcome::NoMatch,
    }
}

fn binary(view: &View<'_>, id: NodeId, function: BinaryFn) -> Outcome {
    let node = view.node(id);
    let (a, b) = (node.operands[0], node.operands[1]);
    let result = node.results[0];
    let ty = &view.module.graph.values[result].ty;
    let whole = |o: Operand| view.ty(o) == ty;
    let negated = |o: Operand| match producer(view, o) {
        Some((inner, Op::Unary(Unary { function: UnaryFn::Neg }))) => {
            Some((inner, view.node(inner).operands[0]))
        }
        _ => None,
    };
    match function {
        BinaryFn::Add => match (negated(a), negated(b)) {
            (_, Some((inner, y))) => {
                let sub = Binary { function: BinaryFn::Sub };
                new_op(id, view, [id, inner], sub, [From::Old(a), From::Old(y)])
            }
            (Some((inner, y)), None) => {
                let sub = Binary { function: BinaryFn::Sub };
                new_op(id, view, [id, inner], sub, [From::Old(b), From::Old(y)])
            }
            _ => Outcome::NoMatch,
        },
        BinaryFn::Sub => {
            if a == b && !ty.dtype.is_float() {
                return zero(view, id);
            }
            negated(b).map_or(Outcome::NoMatch, |(inner, y)| {
                new_op(
                    id,
                    view,
                    [id, inner],
                    Binary { function: BinaryFn::Add },
                    [From::Old(a), From::Old(y)],
                )
            })
        }
        BinaryFn::Mul if !ty.dtype.is_float() => {
            let is_zero = |o| constant(view, o) == Some(0.0);
            if is_zero(a) || is_zero(b) { zero(view, id) } else { Outcome::NoMatch }
        }
        BinaryFn::Div => {
            let recip = Unary { function: UnaryFn::Recip };
            match (constant(view, a), constant(view, b), b) {
                (Some(1.0), _, _) if whole(b) => new_op(id, view, [id], recip, [From::Old(b)]),
                (_, Some(divisor), Operand::Weight(weight)) if is_power_of_two(divisor, ty.dtype) => {
                    let weight = &view.module.weights[weight];
                    let mut patch = Patch::new([id]);
                    let expr = WeightExpr::Splat(divisor.recip());
                    let factor = patch.weight(format!("{}.recip", weight.name), weight.ty.clone(), expr);
                    let new = patch.node(Binary { function: BinaryFn::Mul }, [From::Old(a), factor]);
                    patch.replace(result, From::New(new, 0));
                    Outcome::Rewrite(patch)
                }
                _ => Outcome::NoMatch,
            }
        }
        BinaryFn::Pow if whole(a) => match constant(view, b) {
            Some(1.0) => fill(view, id, a),
            Some(2.0) => {
                new_op(id, view, [id], Binary { function: BinaryFn::Mul }, [From::Old(a), From::Old(a)])
            }
            Some(-1.0) => new_op(id, view, [id], Unary { function: UnaryFn::Recip }, [From::Old(a)]),
            _ => Outcome::NoMatch,
        },
        _ => Outcome::NoMatch,
    }
}

/// Whether dividing by this and multiplying by its reciprocal round alike: both are powers of two that the element
/// type holds.
fn is_power_of_two(value: f64, dtype: DType) -> bool {
    let exact = |v: f64| v.is_finite() && v != 0.0 && round_to(dtype, v) == v;
    let mantissa = value.to_bits() & ((1 << 52) - 1);
    dtype.is_float() && value.is_normal() && mantissa == 0 && exact(value) && exact(value.recip())
}

/// Zeros instead of the result of `id`, if it has a constant shape and is no output.
fn zero(view: &View<'_>, id: NodeId) -> Outcome {
    let result = view.node(id).results[0];
    let ty = &view.module.graph.values[result].ty;
    if ty.const_shape().is_none() || view.is_output(result) {
        return Outcome::NoMatch;
    }
    let mut patch = Patch::new([id]);
    let sizes: Vec<String> = ty.shape.iter().map(ToString::to_string).collect();
    let name = format!("zeros.{}.{}", ty.dtype, sizes.join("x"));
    let zeros = patch.weight(name, ty.clone(), WeightExpr::Splat(0.0));
    patch.replace(result, zeros);
    Outcome::Rewrite(patch)
}
