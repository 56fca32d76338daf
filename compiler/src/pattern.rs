//! Patterns that read like the formula they find, for rules that recover an op from primitives.
//!
//! ```
//! use millrace_compiler::pattern::{add, erf, mul, product};
//!
//! let gelu = product(["x".into(), 0.5.into(), add(erf(mul("x", std::f64::consts::FRAC_1_SQRT_2)), 1.0)]);
//! ```
//!
//! - A text is a name: it stands for any operand, and for the same one wherever it is repeated.
//! - A number stands for a constant whose elements all have this value, up to 1e-6 of it or the rounding of the
//!   constant's element type, whether the constant is a weight or computed from one by casts, broadcasts and reshapes.
//! - Functions find every spelling of the same thing: operands in both orders where the op table says so, a
//!   multiplication by `c` as a division by `1/c`, a square as a product or a power, `1/sqrt` in one op or two.
//! - [`product`] finds factors in any order and grouping.
//! - Reductions run along one axis, the same in the whole formula, and keep it with extent 1.
//! - A constant never enlarges what it is combined with.
//!
//! The nodes inside a match vanish only if nobody else reads them. [`Pattern::find`] says who does; [`shared`] marks
//! what may have other readers. Matching backtracks within the pattern and never looks deeper than it.

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::reduce::ReduceFn;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{Binary, Reduce, Unary};
use millrace_ir::tensor::round_to;
use millrace_ir::{DType, Module, NodeId, Op, Operand, WeightExpr, WeightId};

use crate::rewrite::View;

/// A formula over names and numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    /// Any operand; the same one wherever the name is repeated.
    Value(&'static str),
    /// A constant of this value.
    Number(f64),
    /// Any constant with one value, which the name is bound to.
    AnyNumber(&'static str),
    /// A function of one operand.
    Unary(UnaryFn, Box<Pattern>),
    /// A function of two operands.
    Binary(BinaryFn, Box<[Pattern; 2]>),
    /// Factors in any order and grouping.
    Product(Vec<Pattern>),
    /// A square.
    Square(Box<Pattern>),
    /// A reduction along one axis that keeps it.
    Reduce(ReduceFn, Box<Pattern>),
    /// The first operand where the condition holds, else the second.
    Select(Box<[Pattern; 3]>),
    /// The first alternative that lets the whole formula match.
    Either(Vec<Pattern>),
    /// The pattern below any number of casts between float types.
    Casts(Box<Pattern>),
    /// The pattern, whose result may have other readers.
    Shared(Box<Pattern>),
    /// The pattern, whose result is also bound to the name.
    Named(&'static str, Box<Pattern>),
}

impl From<&'static str> for Pattern {
    fn from(name: &'static str) -> Self {
        Pattern::Value(name)
    }
}

impl From<f64> for Pattern {
    fn from(value: f64) -> Self {
        Pattern::Number(value)
    }
}

macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident($($arg:ident),+) = $make:expr;)*) => {
        $($(#[$doc])*
        pub fn $name($($arg: impl Into<Pattern>),+) -> Pattern {
            $(let $arg = $arg.into();)+
            $make
        })*
    };
}

fn unary(function: UnaryFn, a: Pattern) -> Pattern {
    Pattern::Unary(function, Box::new(a))
}

fn binary(function: BinaryFn, a: Pattern, b: Pattern) -> Pattern {
    Pattern::Binary(function, Box::new([a, b]))
}

functions! {
    /// `-a`, `a * -1` or `0 - a`.
    neg(a) = unary(UnaryFn::Neg, a);
    /// `|a|`
    abs(a) = unary(UnaryFn::Abs, a);
    /// `e^a`
    exp(a) = unary(UnaryFn::Exp, a);
    /// Error function.
    erf(a) = unary(UnaryFn::Erf, a);
    /// Hyperbolic tangent.
    tanh(a) = unary(UnaryFn::Tanh, a);
    /// `1 / (1 + e^-a)`, the op.
    sigmoid(a) = unary(UnaryFn::Sigmoid, a);
    /// Square root, also as a power.
    sqrt(a) = unary(UnaryFn::Sqrt, a);
    /// `a + b`, also `a - (-b)` for a number b.
    add(a, b) = binary(BinaryFn::Add, a, b);
    /// `a - b`
    sub(a, b) = binary(BinaryFn::Sub, a, b);
    /// `a * b`, also `a / (1/b)` for a number b.
    mul(a, b) = binary(BinaryFn::Mul, a, b);
    /// `a / b`, also `a * recip(b)`, and `a * rsqrt(c)` for `b = sqrt(c)`.
    div(a, b) = binary(BinaryFn::Div, a, b);
    /// The larger.
    max(a, b) = binary(BinaryFn::Max, a, b);
    /// `a ^ b`
    pow(a, b) = binary(BinaryFn::Pow, a, b);
    /// `a > b`, also `b < a`.
    gt(a, b) = binary(BinaryFn::Gt, a, b);
    /// `a >= b`, also `b <= a`.
    ge(a, b) = binary(BinaryFn::Ge, a, b);
    /// `a` where the condition holds, else `b`.
    select(condition, a, b) = Pattern::Select(Box::new([condition, a, b]));
    /// `a * a` or `a ^ 2`.
    square(a) = Pattern::Square(Box::new(a));
    /// Sum along the axis of the formula.
    sum(a) = Pattern::Reduce(ReduceFn::Sum, Box::new(a));
    /// Mean along the axis of the formula, also as a sum times `1/n`.
    mean(a) = Pattern::Reduce(ReduceFn::Mean, Box::new(a));
    /// Largest along the axis of the formula.
    largest(a) = Pattern::Reduce(ReduceFn::Max, Box::new(a));
    /// `a` below any number of casts between float types.
    casts(a) = Pattern::Casts(Box::new(a));
    /// `a`, whose result may have readers outside the match.
    shared(a) = Pattern::Shared(Box::new(a));
}

/// Factors in any order and grouping.
pub fn product<const N: usize>(factors: [Pattern; N]) -> Pattern {
    Pattern::Product(factors.to_vec())
}

/// The first alternative that lets the whole formula match.
pub fn either<const N: usize>(alternatives: [Pattern; N]) -> Pattern {
    Pattern::Either(alternatives.to_vec())
}

/// Any constant with one value, bound to `name`.
pub fn number(name: &'static str) -> Pattern {
    Pattern::AnyNumber(name)
}

/// `a`, whose result is also bound to `name`.
pub fn named(name: &'static str, a: impl Into<Pattern>) -> Pattern {
    Pattern::Named(name, Box::new(a.into()))
}

/// What a pattern was found to be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Match {
    values: Vec<(&'static str, Operand)>,
    numbers: Vec<(&'static str, f64)>,
    nodes: Vec<NodeId>,
    shared: Vec<NodeId>,
    axes: Vec<usize>,
    casts: Vec<(Operand, Operand)>,
}

/// Answer of [`Pattern::find`].
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// The formula is not there.
    Nothing,
    /// The formula is there, but an inner result has another reader; says which.
    Read(String),
    /// The formula is there.
    Match(Match),
}

impl Match {
    /// The operand bound to `name`.
    pub fn value(&self, name: &str) -> Option<Operand> {
        self.values.iter().find(|(n, _)| *n == name).map(|(_, o)| *o)
    }

    /// The number bound to `name`.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.numbers.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }

    /// Every node of the match, the root among them.
    pub fn nodes(&self) -> Vec<NodeId> {
        let mut nodes = self.nodes.clone();
        nodes.sort();
        nodes.dedup();
        nodes
    }

    /// The axis of the reductions, if the formula has any.
    pub fn axis(&self) -> Option<usize> {
        self.axes.first().copied()
    }

    /// An operand of element type `dtype` that [`casts`] led from to `below`, or `below` itself.
    pub fn above(&self, view: &View<'_>, below: Operand, dtype: DType) -> Option<Operand> {
        let tops = self.casts.iter().filter(|(b, _)| *b == below).map(|(_, top)| *top);
        std::iter::once(below).chain(tops).find(|o| view.ty(*o).dtype == dtype)
    }

    fn mark(&self) -> [usize; 6] {
        let lists = [self.values.len(), self.numbers.len(), self.nodes.len(), self.shared.len()];
        [lists[0], lists[1], lists[2], lists[3], self.axes.len(), self.casts.len()]
    }

    fn reset(&mut self, mark: [usize; 6]) {
        self.values.truncate(mark[0]);
        self.numbers.truncate(mark[1]);
        self.nodes.truncate(mark[2]);
        self.shared.truncate(mark[3]);
        self.axes.truncate(mark[4]);
        self.casts.truncate(mark[5]);
    }

    fn bind(&mut self, name: &'static str, operand: Operand) -> bool {
        match self.value(name) {
            Some(known) => known == operand,
            None => {
                self.values.push((name, operand));
                true
            }
        }
    }
}

impl Pattern {
    /// Looks for the formula with `root` as its last node.
    pub fn find(&self, view: &View<'_>, root: NodeId) -> Found {
        let [result] = view.node(root).results[..] else { return Found::Nothing };
        let mut found = Match::default();
        if !matches(view, self, Operand::Value(result), &mut found, &mut |_| true) {
            return Found::Nothing;
        }
        match read_outside(view, &found.nodes(), root, &found.shared) {
            Some(reason) => Found::Read(reason),
            None => Found::Match(found),
        }
    }
}

/// Who reads a result of `nodes` besides themselves, if anybody does; results of `root` and of `shared` may be read.
pub fn read_outside(view: &View<'_>, nodes: &[NodeId], root: NodeId, shared: &[NodeId]) -> Option<String> {
    for inner in nodes.iter().filter(|n| **n != root && !shared.contains(n)) {
        for value in view.node(*inner).results.iter().copied() {
            if view.is_output(value) {
                return Some(format!("{value} is also an output"));
            }
            if let Some(reader) = view.users(value).iter().find(|user| !nodes.contains(user)) {
                return Some(format!("{value} is also read by {reader}"));
            }
        }
    }
    None
}

/// The one value of all elements of a weight, if its expression says so.
pub fn splat(module: &Module, weight: WeightId) -> Option<f64> {
    let mut at = weight;
    // Expressions nest at most 32 deep.
    for _ in 0..=32 {
        match &module.weights.get(at)?.expr {
            WeightExpr::Splat(value) => return Some(*value),
            WeightExpr::Dense(values) => {
                let first = *values.first()?;
                return values.iter().all(|v| *v == first).then_some(first);
            }
            WeightExpr::Cast { of } | WeightExpr::Reshape { of } | WeightExpr::Transpose { of, .. } => {
                at = *of
            }
            WeightExpr::File { .. }
            | WeightExpr::Random { .. }
            | WeightExpr::Concat { .. }
            | WeightExpr::Pack { .. } => return None,
        }
    }
    None
}

/// The one value of all elements of an operand: of a weight, or of movements of one.
pub fn constant(view: &View<'_>, operand: Operand) -> Option<f64> {
    let mut at = operand;
    for _ in 0..4 {
        if let Operand::Weight(weight) = at {
            return splat(view.module, weight);
        }
        let (node, _) = view.def(at)?;
        match view.node(node).op {
            Op::Cast(_) | Op::Broadcast(_) | Op::Reshape(_) | Op::Transpose(_) => {
                at = view.node(node).operands[0];
            }
            _ => return None,
        }
    }
    None
}

/// Whether a constant of element type `dtype` stands for `wanted`.
pub fn close(found: f64, wanted: f64, dtype: DType) -> bool {
    found == wanted
        || (found - wanted).abs() <= 1e-6 * wanted.abs()
        || (dtype.is_float() && round_to(dtype, found) == round_to(dtype, wanted))
}

/// The operand below casts between float types, and the cast nodes above it.
pub fn below_casts(view: &View<'_>, operand: Operand) -> (Operand, Vec<NodeId>) {
    let (mut at, mut nodes) = (operand, Vec::new());
    loop {
        let below = match at {
            Operand::Weight(weight) => match view.module.weights[weight].expr {
                WeightExpr::Cast { of } => Operand::Weight(of),
                _ => return (at, nodes),
            },
            _ => match view.def(at) {
                Some((node, 0)) if matches!(view.node(node).op, Op::Cast(_)) => {
                    nodes.push(node);
                    view.node(node).operands[0]
                }
                _ => return (at, nodes),
            },
        };
        if !view.ty(at).dtype.is_float() || !view.ty(below).dtype.is_float() || nodes.len() > 4 {
            return (at, nodes);
        }
        at = below;
    }
}

/// What remains to be matched after a part of the formula was.
type Rest<'k> = &'k mut dyn FnMut(&mut Match) -> bool;

/// Matches `pattern` at `operand` and then the rest; leaves `found` as it was if either fails.
fn matches(view: &View<'_>, pattern: &Pattern, operand: Operand, found: &mut Match, rest: Rest<'_>) -> bool {
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
            let Some(id) = node.filter(|id| matches!(view.node(*id).op, Op::Select(_))) else { return false };
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
        Pattern::Unary(function, inner) => match (node.map(|id| (id, &view.node(id).op)), function) {
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
    let Op::Binary(Binary { function }) = node.op else { return None };
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
    match node.op {
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
    match &view.node(id).op {
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use millrace_ir::{Module, text};

    use super::*;
    use crate::pass::Context;
    use crate::rewrite::{Outcome, Rule, rewrite};

    /// Looks for a pattern at every node and keeps what it finds.
    struct Probe(Pattern, RefCell<Vec<(NodeId, Found)>>);

    impl Rule for Probe {
        fn look(&self, view: &View<'_>, node: NodeId) -> Outcome {
            match self.0.find(view, node) {
                Found::Nothing => {}
                found => self.1.borrow_mut().push((node, found)),
            }
            Outcome::NoMatch
        }
    }

    /// Where the pattern is found in a body over `%0` and `%1`.
    fn found(pattern: Pattern, body: &str) -> Vec<(usize, Found)> {
        let source = format!(
            "module @m phase imported {{\n weight @two : f32[] = splat(2.0)\n weight @half : f32[1] = dense[0.5]\n \
             weight @big : f32[3, 4] = splat(2.0)\n \
             graph @main(%0 \"x\": f32[4], %1 \"z\": f32[4]) -> (\"y\": f32[4]) {{\n {body} return %9\n }}\n}}"
        );
        let mut module: Module = text::parse(&source).unwrap();
        let order = module.graph.order.clone();
        let probe = Probe(pattern, RefCell::default());
        rewrite("probe", &mut module, &mut Context::default(), &probe).unwrap();
        let place = |id: NodeId| order.iter().position(|n| *n == id).unwrap();
        probe.1.into_inner().into_iter().map(|(id, f)| (place(id), f)).collect()
    }

    fn is_found(pattern: Pattern, body: &str) -> bool {
        matches!(found(pattern, body).last(), Some((_, Found::Match(_))))
    }

    #[test]
    fn names_repeat_and_operands_swap() {
        let pattern = || mul(add("a", exp("b")), "b");
        assert!(is_found(
            pattern(),
            "%2 = exp %1 : f32[4] %3 = add %2, %0 : f32[4] %9 = mul %1, %3 : f32[4]"
        ));
        assert!(!is_found(
            pattern(),
            "%2 = exp %1 : f32[4] %3 = add %2, %0 : f32[4] %9 = mul %0, %3 : f32[4]"
        ));
        assert!(!is_found(sub("a", exp("b")), "%2 = exp %1 : f32[4] %9 = sub %2, %0 : f32[4]"));
    }

    /// The first operand fits both sides of the sum, but only one choice lets the product match.
    #[test]
    fn matching_backtracks() {
        let pattern = mul(add(either(["a".into(), exp("a")]), exp("b")), "b");
        let body =
            "%2 = exp %0 : f32[4] %3 = exp %1 : f32[4] %4 = add %2, %3 : f32[4] %9 = mul %4, %0 : f32[4]";
        let Some((3, Found::Match(found))) = found(pattern, body).pop() else { panic!("not found") };
        assert_eq!(found.nodes().len(), 3);
        assert!(found.value("a") != found.value("b"));
    }

    #[test]
    fn numbers_are_splats_of_any_spelling_that_enlarge_nothing() {
        assert!(is_found(mul("a", 0.5), "%9 = div %0, @two : f32[4]"));
        assert!(is_found(mul("a", 2.0000001), "%9 = mul @two, %0 : f32[4]"));
        assert!(!is_found(mul("a", 2.00001), "%9 = mul @two, %0 : f32[4]"));
        assert!(is_found(add("a", -0.5), "%9 = sub %0, @half : f32[4]"));
        assert!(!is_found(sub("a", 0.5), "%9 = sub @half, %0 : f32[4]"));
        let rows = "%2 = reduce_sum %3 {axes = [0]} : f32[4]";
        let body = format!("%3 = mul %0, @big : f32[3, 4] {rows} %9 = exp %2 : f32[4]");
        assert!(!found(mul("a", 2.0), &body).iter().any(|(at, _)| *at == 0));
    }

    #[test]
    fn products_have_any_grouping() {
        let pattern = || product(["a".into(), exp("a"), "b".into(), 2.0.into()]);
        for (first, second) in [("mul %0, %2", "mul %3, %1"), ("mul %1, %2", "mul %0, %3")] {
            let body = format!(
                "%2 = exp %0 : f32[4] %3 = {first} : f32[4] %4 = {second} : f32[4] %9 = div %4, @half : f32[4]"
            );
            assert!(is_found(pattern(), &body), "{body}");
        }
        assert!(!is_found(
            pattern(),
            "%2 = exp %0 : f32[4] %3 = mul %0, %2 : f32[4] %9 = mul %3, @two : f32[4]"
        ));
    }

    #[test]
    fn other_readers_are_named_unless_shared() {
        let body = "%2 = exp %0 : f32[4] %3 = add %2, %1 : f32[4] %9 = mul %3, %2 : f32[4]";
        let all = found(add(exp("a"), "b"), body);
        assert_eq!(all, [(1, Found::Read("%2 is also read by n2".into()))]);
        assert!(is_found(add(shared(exp("a")), "b"), body));
    }

    #[test]
    fn quotients_have_four_spellings() {
        let pattern = || div("a", sqrt("b"));
        for body in [
            "%2 = sqrt %1 : f32[4] %9 = div %0, %2 : f32[4]",
            "%2 = rsqrt %1 : f32[4] %9 = mul %2, %0 : f32[4]",
            "%2 = sqrt %1 : f32[4] %3 = recip %2 : f32[4] %9 = mul %0, %3 : f32[4]",
            "%2 = pow %1, @half : f32[4] %9 = div %0, %2 : f32[4]",
        ] {
            assert!(is_found(pattern(), body), "{body}");
        }
        assert!(!is_found(pattern(), "%2 = sqrt %1 : f32[4] %9 = mul %0, %2 : f32[4]"));
    }
}
