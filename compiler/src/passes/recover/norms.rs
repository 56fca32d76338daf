//! Norms over the last axis.
//!
//! ```text
//! x / sqrt(mean(x^2) + eps) * w                              ->  rms_norm(x, w) {eps}
//! (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * w      ->  layer_norm(x, w) {eps}
//! layer_norm(x, w) + b                                       ->  layer_norm(x, w, b)
//! x / max(sqrt(sum(x^2)), eps)                               ->  l2_normalize(x) {eps}
//! ```
//!
//! Casts between float types may stand around x, before and after the weight. The op computes in the widest element
//! type of x, w and the result.

use std::sync::LazyLock;

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::{Binary, L2Normalize, LayerNorm, Op, Reshape, RmsNorm};
use millrace_ir::{Dim, NodeId, Operand, TensorType, WeightExpr};

use super::{as_dtype, cast_result, is_float_cast, is_vector, other_operand, widest};
use crate::pattern::{
    Found, Match, Pattern, add, casts, constant, div, either, max, mean, mul, named, number, shared, sqrt,
    square, sub, sum,
};
use crate::rewrite::{From, Outcome, Patch, View};

#[derive(Clone, Copy, PartialEq)]
enum Norm {
    Rms,
    Layer,
}

/// Formulas of a norm without its weight. Layer norm comes first: it is the root mean square norm of `x - mean`.
static PLAIN: LazyLock<Vec<(Norm, Pattern)>> = LazyLock::new(|| {
    let x = || casts("x");
    let root = |variance: Pattern| sqrt(add(variance, number("eps")));
    let centred = || sub(x(), mean(x()));
    let spread = either([
        mean(square(centred())),
        // The centred values once more, from a subtraction of their own or cast in between.
        mean(square(casts("d"))),
        sub(mean(square(x())), square(mean(x()))),
        max(sub(mean(square(x())), square(mean(x()))), 0.0),
    ]);
    vec![
        (Norm::Layer, div(named("d", centred()), root(spread))),
        (Norm::Rms, div(x(), root(mean(square(x()))))),
    ]
});

static WEIGHTED: LazyLock<Vec<(Norm, Pattern)>> = LazyLock::new(|| {
    let weighted = |(norm, plain): &(Norm, Pattern)| (*norm, mul(casts(shared(plain.clone())), casts("w")));
    PLAIN.iter().map(weighted).collect()
});

static L2: LazyLock<Vec<Pattern>> = LazyLock::new(|| {
    let squares = || sum(square(casts("x")));
    vec![
        div(casts("x"), max(sqrt(squares()), number("eps"))),
        div(casts("x"), sqrt(max(squares(), number("eps_squared")))),
        div(casts("x"), sqrt(squares())),
    ]
});

static L2_ADDED: LazyLock<Pattern> =
    LazyLock::new(|| div(casts("x"), sqrt(add(sum(square(casts("x"))), number("eps")))));

/// Looks for a norm that ends in this node.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let Op::Binary(Binary { function }) = *view.node(id).op else { return Outcome::NoMatch };
    let mut blocked = None;
    let mut find = |pattern: &Pattern| match pattern.find(view, id) {
        Found::Match(found) => Some(found),
        Found::Read(reason) => {
            blocked.get_or_insert(reason);
            None
        }
        Found::Nothing => None,
    };
    if matches!(function, BinaryFn::Mul) {
        for (norm, pattern) in WEIGHTED.iter() {
            if let Some(found) = find(pattern)
                && is_norm(view, &found, id)
                && found.value("w").is_some_and(|w| is_vector(view, w, &view.ty(result(view, id)).last()))
            {
                return rewrite(view, &found, *norm, id);
            }
        }
    }
    if matches!(function, BinaryFn::Mul | BinaryFn::Div) {
        for (norm, pattern) in PLAIN.iter() {
            if let Some(found) = find(pattern)
                && is_norm(view, &found, id)
            {
                if weight_follows(view, result(view, id)) {
                    return Outcome::NoMatch;
                }
                return rewrite(view, &found, *norm, id);
            }
        }
        for pattern in L2.iter() {
            if let Some(found) = find(pattern)
                && is_norm(view, &found, id)
            {
                return l2(view, &found, id);
            }
        }
        if let Some(found) = find(&L2_ADDED)
            && is_norm(view, &found, id)
        {
            let reason = "eps is added to the sum of squares, l2_normalize takes the larger of norm and eps";
            return Outcome::Blocked(reason.into());
        }
    }
    match (blocked, function) {
        (Some(reason), _) => Outcome::Blocked(reason),
        (None, BinaryFn::Add) => bias(view, id),
        (None, BinaryFn::Mul) => late_weight(view, id),
        _ => Outcome::NoMatch,
    }
}

fn result(view: &View<'_>, id: NodeId) -> Operand {
    Operand::Value(view.node(id).results[0])
}

/// Whether the formula runs over the last axis and keeps the shape of x.
fn is_norm(view: &View<'_>, found: &Match, id: NodeId) -> bool {
    let shape = &view.ty(result(view, id)).shape;
    found.value("x").is_some_and(|x| &view.ty(x).shape == shape)
        && found.axis().is_some_and(|axis| axis + 1 == shape.len())
}

/// Whether everything that reads the value multiplies it by a vector, after casts or at once: then the norm is
/// recovered together with that weight.
fn weight_follows(view: &View<'_>, value: Operand) -> bool {
    let Operand::Value(id) = value else { return false };
    let n = view.ty(value).last();
    let weighs = |user: &NodeId| {
        matches!(*view.node(*user).op, Op::Binary(Binary { function: BinaryFn::Mul }))
            && other_operand(view, *user, value).is_some_and(|w| is_vector(view, w, &n))
    };
    let casts = |user: &NodeId| {
        is_float_cast(view, *user) && {
            let cast = view.node(*user).results[0];
            let below = Operand::Value(cast);
            !view.is_output(cast)
                && view.users(cast).iter().all(|u| {
                    matches!(*view.node(*u).op, Op::Binary(Binary { function: BinaryFn::Mul }))
                        && other_operand(view, *u, below).is_some_and(|w| is_vector(view, w, &n))
                })
        }
    };
    !view.is_output(id)
        && !view.users(id).is_empty()
        && view.users(id).iter().all(|user| weighs(user) || casts(user))
}

fn rewrite(view: &View<'_>, found: &Match, norm: Norm, id: NodeId) -> Outcome {
    let (Some(x), Some(eps)) = (found.value("x"), found.number("eps")) else { return Outcome::NoMatch };
    if !(eps.is_finite() && eps >= 0.0) {
        return Outcome::Blocked(format!("{eps} is no epsilon"));
    }
    let ty = view.ty(result(view, id));
    let weight = found.value("w");
    let dtypes = [Some(x), weight].into_iter().flatten().map(|o| view.ty(o).dtype);
    let dtype = widest(dtypes.chain([ty.dtype]));
    let mut patch = Patch::new(found.nodes());
    let Some(n) = ty.last().as_const() else {
        return Outcome::Blocked(format!("the normalised extent {} is not constant", ty.last()));
    };
    let input = as_dtype(view, found, &mut patch, x, dtype);
    let vector = TensorType::new(dtype, [ty.last()]);
    let weight = match weight {
        None => patch.weight(format!("ones.{dtype}.{n}"), vector, WeightExpr::Splat(1.0)),
        Some(w) => {
            let rank = view.ty(w).rank();
            let w = as_dtype(view, found, &mut patch, w, dtype);
            flat(&mut patch, w, rank, &ty.last())
        }
    };
    let op: Op = match norm {
        Norm::Rms => RmsNorm { eps }.into(),
        Norm::Layer => LayerNorm { eps }.into(),
    };
    let new = patch.node(op, [input, weight]);
    let with = cast_result(&mut patch, new, dtype, ty.dtype);
    patch.replace(view.node(id).results[0], with);
    Outcome::Rewrite(patch)
}

/// A vector of any rank as `[n]`.
fn flat(patch: &mut Patch, vector: From, rank: usize, n: &Dim) -> From {
    match rank {
        1 => vector,
        _ => From::New(patch.node(Reshape { shape: vec![n.clone()].into() }, [vector]), 0),
    }
}

fn l2(view: &View<'_>, found: &Match, id: NodeId) -> Outcome {
    let Some(x) = found.value("x") else { return Outcome::NoMatch };
    let eps = match (found.number("eps"), found.number("eps_squared")) {
        (Some(eps), _) => eps,
        (None, Some(square)) => square.sqrt(),
        (None, None) => 0.0,
    };
    if !(eps.is_finite() && eps >= 0.0) {
        return Outcome::Blocked(format!("{eps} is no epsilon"));
    }
    let ty = view.ty(result(view, id));
    let dtype = widest([view.ty(x).dtype, ty.dtype]);
    let mut patch = Patch::new(found.nodes());
    let input = as_dtype(view, found, &mut patch, x, dtype);
    let new = patch.node(L2Normalize { eps }, [input]);
    let with = cast_result(&mut patch, new, dtype, ty.dtype);
    patch.replace(view.node(id).results[0], with);
    Outcome::Rewrite(patch)
}

/// A layer norm without bias that defines `operand`.
fn unbiased(view: &View<'_>, operand: Operand) -> Option<NodeId> {
    let (source, _) = view.def(operand)?;
    let node = view.node(source);
    (matches!(*node.op, Op::LayerNorm(_)) && node.operands.len() == 2).then_some(source)
}

fn bias(view: &View<'_>, id: NodeId) -> Outcome {
    let [a, b] = view.node(id).operands[..] else { return Outcome::NoMatch };
    let (source, y, vector) = match (unbiased(view, a), unbiased(view, b)) {
        (Some(source), _) => (source, a, b),
        (None, Some(source)) => (source, b, a),
        (None, None) => return Outcome::NoMatch,
    };
    if !is_vector(view, vector, &view.ty(y).last()) {
        return Outcome::NoMatch;
    }
    if let Operand::Value(value) = y
        && !view.used_once(value)
    {
        return Outcome::Blocked(format!("the norm {value} is read before its bias is added"));
    }
    let mut patch = Patch::new([source, id]);
    let shift = flat(&mut patch, From::Old(vector), view.ty(vector).rank(), &view.ty(y).last());
    let operands = view.node(source).operands.iter().map(|o| From::Old(*o)).chain([shift]);
    let new = patch.node(view.node(source).op.clone(), operands.collect::<Vec<_>>());
    patch.replace(view.node(id).results[0], From::New(new, 0));
    Outcome::Rewrite(patch)
}

/// A norm with a weight of ones, times a vector.
fn late_weight(view: &View<'_>, id: NodeId) -> Outcome {
    let [a, b] = view.node(id).operands[..] else { return Outcome::NoMatch };
    let plain = |operand: Operand| {
        let (source, _) = view.def(operand)?;
        let node = view.node(source);
        let is_norm = matches!(*node.op, Op::LayerNorm(_) | Op::RmsNorm(_)) && node.operands.len() == 2;
        (is_norm && constant(view, node.operands[1]) == Some(1.0)).then_some(source)
    };
    let (source, y, vector) = match (plain(a), plain(b)) {
        (Some(source), _) => (source, a, b),
        (None, Some(source)) => (source, b, a),
        (None, None) => return Outcome::NoMatch,
    };
    let alone = matches!(y, Operand::Value(value) if view.used_once(value));
    if !alone || !is_vector(view, vector, &view.ty(y).last()) {
        return Outcome::NoMatch;
    }
    let mut patch = Patch::new([source, id]);
    let weight = flat(&mut patch, From::Old(vector), view.ty(vector).rank(), &view.ty(y).last());
    let new = patch.node(view.node(source).op.clone(), [From::Old(view.node(source).operands[0]), weight]);
    patch.replace(view.node(id).results[0], From::New(new, 0));
    Outcome::Rewrite(patch)
}
