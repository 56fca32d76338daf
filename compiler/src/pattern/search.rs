//! The search behind [`Pattern::find`]: depth first, with the rest of the formula as a continuation, so that a choice that
//! fits here but fails later is undone. Each function leaves the match as it was if it fails.

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::reduce::ReduceFn;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{Binary, Reduce, Unary};
use millrace_ir::{NodeId, Op, Operand};

use super::{Match, Pattern, below_casts, close, constant};
use crate::rewrite::View;

/// What remains to be matched after a part of the formula was.
pub(super) type Rest<'k> = &'k mut dyn FnMut(&mut Match) -> bool;

/// Matches `pattern` at `operand` and then the rest; leaves `found` as it was if either fails.
pub(super) fn matches(
    view: &View<'_>,
    pattern: &Pattern,
    operand: Operand,
    found: &mut Match,
    rest: Rest<'_>,
) -> bool {
    let mark = found.mark();
    let done = attempt(view, pattern, operand, found, rest);
    if !done {
        found.reset(mark);
    }
    done
}

fn attempt(view: &View<'_>, pattern: &Pattern, operand: Operand, found: &mut Match, rest: Rest<'_>) -> bool {
    let node = match view.def(operand) {
        Some((id, 0)) => Some(id),
        _ => None,
    };
    match pattern {
        Pattern::Value(name) => found.bind(name, operand) && rest(found),
        Pattern::Number(wanted) => {
            constant(view, operand).is_some_and(|v| close(v, *wanted, view.ty(operand).dtype)) && rest(found)
        }
        Pattern::AnyNumber(name) => match (constant(view, operand), found.number(name)) {
            (Some(value), Some(known)) => value == known && rest(found),
            (Some(value), None) => {
                found.numbers.push((name, value));
                rest(found)
            }
            (None, _) => false,
        },
        Pattern::Either(patterns) => patterns.iter().any(|p| matches(view, p, operand, found, rest)),
        Pattern::Casts(inner) => {
            let (below, nodes) = below_casts(view, operand);
            found.nodes.extend(&nodes);
            found.shared.extend(&nodes);
            found.casts.push((below, operand));
            matches(view, inner, below, found, rest)
        }
        Pattern::Shared(inner) => {
            found.shared.extend(node);
            matches(view, inner, operand, found, rest)
        }
        Pattern::Named(name, inner) => {
            found.bind(name, operand) && matches(view, inner, operand, found, rest)
        }
        Pattern::Select(parts) => {
            let Some(id) = node.filter(|id| matches!(*view.node(*id).op, Op::Select(_))) else {
                return false;
            };
            let operands = &view.node(id).operands;
            found.nodes.push(id);
            matches(view, &parts[0], operands[0], found, &mut |found| {
                matches(view, &parts[1], operands[1], found, &mut |found| {
                    matches(view, &parts[2], operands[2], found, rest)
                })
            })
        }
        Pattern::Product(factors) => {
            let all: Vec<&Pattern> = factors.iter().collect();
            factors_match(view, &all, operand, found, rest)
        }
        Pattern::Square(inner) => {
            let Some((id, function, [a, b])) = binary_node(view, operand) else { return false };
            let squares = match function {
                BinaryFn::Mul => a == b,
                BinaryFn::Pow => is(view, b, 2.0),
                _ => false,
            };
            found.nodes.push(id);
            squares && matches(view, inner, a, found, rest)
        }
        Pattern::Reduce(function, inner) => reduction(view, *function, inner, operand, found, rest),
        Pattern::Unary(function, inner) => match (node.map(|id| (id, &*view.node(id).op)), function) {
            (Some((id, Op::Unary(Unary { function: there }))), wanted) if there == wanted => {
                found.nodes.push(id);
                matches(view, inner, view.node(id).operands[0], found, rest)
            }
            (Some((id, Op::Binary(_))), UnaryFn::Neg | UnaryFn::Sqrt) => {
                let Some((_, there, [a, b])) = binary_node(view, operand) else { return false };
                let argument = match (function, there) {
                    (UnaryFn::Neg, BinaryFn::Mul | BinaryFn::Div) if is(view, b, -1.0) => a,
                    (UnaryFn::Neg, BinaryFn::Mul) if is(view, a, -1.0) => b,
                    (UnaryFn::Neg, BinaryFn::Sub) if is(view, a, 0.0) => b,
                    (UnaryFn::Sqrt, BinaryFn::Pow) if is(view, b, 0.5) => a,
                    _ => return false,
                };
                found.nodes.push(id);
                matches(view, inner, argument, found, rest)
            }
            _ => false,
        },
        Pattern::Binary(function, parts) => two(view, *function, parts, operand, found, rest),
    }
}

/// Whether the operand is a constant of this value.
fn is(view: &View<'_>, operand: Operand, value: f64) -> bool {
    constant(view, operand).is_some_and(|v| close(v, value, view.ty(operand).dtype))
}

/// The binary node that defines `operand`, unless one of its operands is a constant that enlarges the other.
fn binary_node(view: &View<'_>, operand: Operand) -> Option<(NodeId, BinaryFn, [Operand; 2])> {
    let (id, 0) = view.def(operand)? else { return None };
    let node = view.node(id);
    let Op::Binary(Binary { function }) = *node.op else { return None };
    let [a, b] = node.operands[..] else { return None };
    let shape = &view.ty(operand).shape;
    let enlarges = |c: Operand, other: Operand| constant(view, c).is_some() && &view.ty(other).shape != shape;
    (!enlarges(a, b) && !enlarges(b, a)).then_some((id, function, [a, b]))
}

/// Matches two patterns at two operands.
fn both(
    view: &View<'_>,
    patterns: [&Pattern; 2],
    operands: [Operand; 2],
    found: &mut Match,
    rest: Rest<'_>,
) -> bool {
    matches(view, patterns[0], operands[0], found, &mut |found| {
        matches(view, patterns[1], operands[1], found, rest)
    })
}

fn two(
    view: &View<'_>,
    wanted: BinaryFn,
    parts: &[Pattern; 2],
    operand: Operand,
    found: &mut Match,
    rest: Rest<'_>,
) -> bool {
    let [p, q] = parts;
    if wanted == BinaryFn::Div && matches!(p, Pattern::Number(one) if *one == 1.0) {
        return reciprocal(view, q, operand, found, rest);
    }
    let Some((id, there, [a, b])) = binary_node(view, operand) else { return false };
    found.nodes.push(id);
    if there == wanted
        && (both(view, [p, q], [a, b], found, rest)
            || (there.commutative() && both(view, [p, q], [b, a], found, rest)))
    {
        return true;
    }
    let inverse = |c: &Pattern, operation: fn(f64) -> f64| match c {
        Pattern::Number(value) => Some(Pattern::Number(operation(*value))),
        _ => None,
    };
    match (wanted, there) {
        (BinaryFn::Mul, BinaryFn::Div) => [(p, q), (q, p)]
            .into_iter()
            .any(|(x, c)| inverse(c, f64::recip).is_some_and(|c| both(view, [x, &c], [a, b], found, rest))),
        (BinaryFn::Add, BinaryFn::Sub) => [(p, q), (q, p)]
            .into_iter()
            .any(|(x, c)| inverse(c, |v| -v).is_some_and(|c| both(view, [x, &c], [a, b], found, rest))),
        (BinaryFn::Sub, BinaryFn::Add) => inverse(q, |v| -v).is_some_and(|c| {
            both(view, [p, &c], [a, b], found, rest) || both(view, [p, &c], [b, a], found, rest)
        }),
        (BinaryFn::Div, BinaryFn::Mul) => [(a, b), (b, a)].into_iter().any(|(x, y)| {
            if let Some(c) = inverse(q, f64::recip) {
                return both(view, [p, &c], [x, y], found, rest);
            }
            matches(view, p, x, found, &mut |found| {
                let mark = found.mark();
                let done = reciprocal(view, q, y, found, rest);
                if !done {
                    found.reset(mark);
                }
                done
            })
        }),
        (BinaryFn::Gt, BinaryFn::Lt) | (BinaryFn::Ge, BinaryFn::Le) => {
            both(view, [p, q], [b, a], found, rest)
        }
        _ => false,
    }
}

/// Matches `1 / pattern`: a reciprocal, a quotient, a reciprocal square root where the pattern is a root, or a
/// constant.
fn reciprocal(
    view: &View<'_>,
    pattern: &Pattern,
    operand: Operand,
    found: &mut Match,
    rest: Rest<'_>,
) -> bool {
    let Some((id, 0)) = view.def(operand) else { return false };
    let node = view.node(id);
    let root = match pattern {
        Pattern::Unary(UnaryFn::Sqrt, inner) => Some(inner.as_ref()),
        _ => None,
    };
    found.nodes.push(id);
    match *node.op {
        Op::Unary(Unary { function: UnaryFn::Recip }) => {
            matches(view, pattern, node.operands[0], found, rest)
        }
        Op::Unary(Unary { function: UnaryFn::Rsqrt }) => {
            root.is_some_and(|inner| matches(view, inner, node.operands[0], found, rest))
        }
        Op::Binary(_) => match (binary_node(view, operand), root) {
            (Some((_, BinaryFn::Div, [one, b])), _) if is(view, one, 1.0) => {
                matches(view, pattern, b, found, rest)
            }
            (Some((_, BinaryFn::Pow, [a, minus])), _) if is(view, minus, -1.0) => {
                matches(view, pattern, a, found, rest)
            }
            (Some((_, BinaryFn::Pow, [a, half])), Some(inner)) if is(view, half, -0.5) => {
                matches(view, inner, a, found, rest)
            }
            _ => false,
        },
        // A cast between the reciprocal and its use.
        Op::Cast(_) if matches!(pattern, Pattern::Casts(_)) => {
            matches(view, pattern, node.operands[0], found, rest)
        }
        _ => false,
    }
}

/// Matches a tree of multiplications whose leaves are the factors.
fn factors_match(
    view: &View<'_>,
    factors: &[&Pattern],
    operand: Operand,
    found: &mut Match,
    rest: Rest<'_>,
) -> bool {
    if let [only] = factors {
        return matches(view, only, operand, found, rest);
    }
    let Some((id, there, [a, b])) = binary_node(view, operand) else { return false };
    let mark = found.mark();
    found.nodes.push(id);
    let done = match there {
        BinaryFn::Mul => (1..(1usize << factors.len()) - 1).any(|subset| {
            let part = |inside: bool| -> Vec<&Pattern> {
                let chosen = |i: &usize| (subset >> i & 1 == 1) == inside;
                (0..factors.len()).filter(chosen).map(|i| factors[i]).collect()
            };
            factors_match(view, &part(true), a, found, &mut |found| {
                factors_match(view, &part(false), b, found, rest)
            })
        }),
        BinaryFn::Div => factors.iter().enumerate().any(|(at, factor)| {
            let Pattern::Number(value) = factor else { return false };
            let others: Vec<&Pattern> =
                factors.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, f)| *f).collect();
            is(view, b, value.recip()) && factors_match(view, &others, a, found, rest)
        }),
        _ => false,
    };
    if !done {
        found.reset(mark);
    }
    done
}

/// The reduction node that defines `operand`, if it runs along one axis and keeps it.
fn reduce_node(view: &View<'_>, operand: Operand) -> Option<(NodeId, ReduceFn, usize)> {
    let (id, 0) = view.def(operand)? else { return None };
    match &*view.node(id).op {
        Op::Reduce(Reduce { function, axes, keep: true }) => match axes[..] {
            [axis] => Some((id, *function, axis)),
            _ => None,
        },
        _ => None,
    }
}

fn reduction(
    view: &View<'_>,
    wanted: ReduceFn,
    inner: &Pattern,
    operand: Operand,
    found: &mut Match,
    rest: Rest<'_>,
) -> bool {
    let mut at = operand;
    if let Some((id, function, [a, b])) = binary_node(view, operand) {
        // A mean as a sum over n.
        let sum = if reduce_node(view, a).is_some() { (a, b) } else { (b, a) };
        let Some((reduce, ReduceFn::Sum, axis)) = reduce_node(view, sum.0) else { return false };
        let Some(n) = view.ty(view.node(reduce).operands[0]).shape[axis].as_const() else { return false };
        let is_mean = match function {
            BinaryFn::Mul => is(view, sum.1, 1.0 / n as f64),
            BinaryFn::Div => sum.0 == a && is(view, b, n as f64),
            _ => false,
        };
        if wanted != ReduceFn::Mean || !is_mean {
            return false;
        }
        found.nodes.push(id);
        at = sum.0;
    }
    let Some((id, function, axis)) = reduce_node(view, at) else { return false };
    let is_wanted = function == wanted || at != operand;
    if !is_wanted || found.axes.iter().any(|known| *known != axis) {
        return false;
    }
    found.nodes.push(id);
    found.axes.push(axis);
    matches(view, inner, view.node(id).operands[0], found, rest)
}
