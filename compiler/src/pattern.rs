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
use millrace_ir::tensor::round_to;
use millrace_ir::{DType, Module, NodeId, Op, Operand, WeightExpr, WeightId};

use crate::rewrite::View;

mod search;

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
        if !search::matches(view, self, Operand::Value(result), &mut found, &mut |_| true) {
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
            WeightExpr::Cast { of }
            | WeightExpr::Reshape { of }
            | WeightExpr::Transpose { of, .. }
            | WeightExpr::Slice { of, .. } => at = *of,
            WeightExpr::File { .. }
            | WeightExpr::Random { .. }
            | WeightExpr::Concat { .. }
            | WeightExpr::Pack { .. }
            | WeightExpr::Cores { .. } => return None,
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
        match *view.node(node).op {
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
                Some((node, 0)) if matches!(*view.node(node).op, Op::Cast(_)) => {
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

#[cfg(test)]
mod tests;
