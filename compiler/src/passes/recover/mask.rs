//! Which positions a masked score matrix lets through: causal masks and windows, as comparisons of coordinates or
//! as tables of constants.
//!
//! Rows are the last but one axis (queries), columns the last (keys). A mask is *visible* where the score counts.

use millrace_ir::ops::attention::Mask;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::{Binary, Iota, Op};
use millrace_ir::{Operand, WeightExpr, WeightId};

use crate::pattern::constant;
use crate::rewrite::View;

/// A score this low, or a number added that is, means never.
pub(super) const NEVER: f64 = -1e4;

/// Why a mask is not understood.
type Reason = String;

/// A mask that lets everything through.
pub(super) fn open() -> Mask {
    Mask { scale: 1.0, causal: false, window: 0 }
}

/// What both masks let through.
pub(super) fn both(a: &Mask, b: &Mask) -> Mask {
    let window = match (a.window, b.window) {
        (0, w) | (w, 0) => w,
        (v, w) => v.min(w),
    };
    Mask { scale: 1.0, causal: a.causal || b.causal, window }
}

/// Deepest nesting of a mask's expression.
const DEPTH: usize = 8;

/// What a tensor that is added to scores lets through, if the scores are multiplied by `scale` afterwards.
pub(super) fn additive(view: &View<'_>, mask: Operand, scale: f64) -> Result<Mask, Reason> {
    let mask = below_movements(view, mask);
    if let Some(value) = constant(view, mask) {
        return if value.is_finite() { Ok(open()) } else { Err(format!("the mask adds {value} everywhere")) };
    }
    let is_low = |value: f64| value * scale <= NEVER;
    let unclear =
        |value: f64| format!("the mask adds {value}, which is neither 0 nor at most {NEVER} after scaling");
    if let Operand::Weight(weight) = mask {
        return table(view, weight, |value| match value {
            0.0 => Ok(true),
            v if is_low(v) => Ok(false),
            v => Err(unclear(v)),
        });
    }
    let Some((node, _)) = view.def(mask) else { return Err(data(mask)) };
    let node = view.node(node);
    match *node.op {
        Op::Select(_) => {
            let values = [constant(view, node.operands[1]), constant(view, node.operands[2])];
            match values {
                [Some(0.0), Some(low)] if is_low(low) => condition(view, node.operands[0], true, DEPTH),
                [Some(low), Some(0.0)] if is_low(low) => condition(view, node.operands[0], false, DEPTH),
                [Some(a), Some(b)] => Err(unclear(if a == 0.0 { b } else { a })),
                _ => Err(data(mask)),
            }
        }
        // (1 - visible) * low, or hidden * low.
        Op::Binary(Binary { function: BinaryFn::Mul }) => {
            let (a, b) = (node.operands[0], node.operands[1]);
            let (truth, low) = match (constant(view, a), constant(view, b)) {
                (_, Some(low)) => (a, low),
                (Some(low), _) => (b, low),
                _ => return Err(data(mask)),
            };
            if !is_low(low) {
                return Err(unclear(low));
            }
            let (truth, visible) = match view.def(truth).map(|(n, _)| view.node(n)) {
                Some(inner)
                    if matches!(*inner.op, Op::Binary(Binary { function: BinaryFn::Sub }))
                        && constant(view, inner.operands[0]) == Some(1.0) =>
                {
                    (inner.operands[1], true)
                }
                _ => (truth, false),
            };
            condition(view, below_cast(view, truth), visible, DEPTH)
        }
        Op::Binary(Binary { function: BinaryFn::Add }) => {
            let masks = [node.operands[0], node.operands[1]];
            let [a, b] =
                masks.map(|m| if m == mask { Err(data(mask)) } else { additive_leaf(view, m, scale) });
            Ok(both(&a?, &b?))
        }
        _ => Err(data(mask)),
    }
}

/// A summand of a sum of masks, which is no sum itself.
fn additive_leaf(view: &View<'_>, mask: Operand, scale: f64) -> Result<Mask, Reason> {
    let is_sum = view
        .def(below_movements(view, mask))
        .is_some_and(|(n, _)| matches!(*view.node(n).op, Op::Binary(Binary { function: BinaryFn::Add })));
    if is_sum { Err(data(mask)) } else { additive(view, mask, scale) }
}

fn data(operand: Operand) -> Reason {
    match operand {
        Operand::Value(value) => {
            format!("the mask {value} is data; attention knows causal masks and windows")
        }
        _ => "the mask is data; attention knows causal masks and windows".into(),
    }
}

/// What a truth value lets through: where it holds if `visible`, else where it does not.
pub(super) fn condition(
    view: &View<'_>,
    truth: Operand,
    visible: bool,
    depth: usize,
) -> Result<Mask, Reason> {
    let truth = below_movements(view, truth);
    if let Operand::Weight(weight) = truth {
        return table(view, weight, |value| Ok((value != 0.0) == visible));
    }
    let Some((node, _)) = view.def(truth) else { return Err(data(truth)) };
    let node = view.node(node);
    match *node.op {
        Op::Binary(Binary { function }) if function.compares() => {
            let sides = [linear(view, node.operands[0], depth), linear(view, node.operands[1], depth)];
            let [Some(left), Some(right)] = sides else { return Err(data(truth)) };
            comparison(left.minus(right), function, visible)
                .ok_or_else(|| format!("the mask {} is neither causal nor a window", name(truth)))
        }
        // select(a, b, false) is both; select(a, true, b) either, which hides where neither holds.
        Op::Select(_) if depth > 0 => {
            let [a, b, c] = node.operands[..] else { return Err(data(truth)) };
            let other = match (visible, constant(view, b), constant(view, c)) {
                (true, _, Some(0.0)) => b,
                (false, Some(yes), _) if yes != 0.0 => c,
                _ => return Err(data(truth)),
            };
            let parts =
                [condition(view, a, visible, depth - 1)?, condition(view, other, visible, depth - 1)?];
            Ok(both(&parts[0], &parts[1]))
        }
        _ => Err(data(truth)),
    }
}

fn name(operand: Operand) -> String {
    match operand {
        Operand::Value(value) => value.to_string(),
        _ => "weight".into(),
    }
}

/// `row * i + column * j + constant` at row i and column j.
#[derive(Clone, Copy)]
struct Linear {
    row: f64,
    column: f64,
    constant: f64,
}

impl Linear {
    fn minus(self, other: Linear) -> Linear {
        Linear {
            row: self.row - other.row,
            column: self.column - other.column,
            constant: self.constant - other.constant,
        }
    }
}

fn linear(view: &View<'_>, operand: Operand, depth: usize) -> Option<Linear> {
    if let Some(constant) = constant(view, operand) {
        return Some(Linear { row: 0.0, column: 0.0, constant });
    }
    let (node, _) = view.def(operand)?;
    let node = view.node(node);
    let next = depth.checked_sub(1)?;
    match &*node.op {
        // The only coordinate along an extent of 1 is 0.
        Op::Iota(Iota { shape, axis, .. }) if shape[*axis].as_const() == Some(1) => {
            Some(Linear { row: 0.0, column: 0.0, constant: 0.0 })
        }
        Op::Iota(Iota { shape, axis, .. }) => match shape.len() - axis {
            1 => Some(Linear { row: 0.0, column: 1.0, constant: 0.0 }),
            2 => Some(Linear { row: 1.0, column: 0.0, constant: 0.0 }),
            _ => None,
        },
        // Coordinates are whole, and small enough for every element type but the narrow floats.
        Op::Cast(cast) if !cast.to.is_float() || cast.to.bits() >= 32 => linear(view, node.operands[0], next),
        Op::Binary(Binary { function: BinaryFn::Sub }) => {
            Some(linear(view, node.operands[0], next)?.minus(linear(view, node.operands[1], next)?))
        }
        Op::Binary(Binary { function: BinaryFn::Add }) => {
            let (a, b) = (linear(view, node.operands[0], next)?, linear(view, node.operands[1], next)?);
            let zero = Linear { row: 0.0, column: 0.0, constant: 0.0 };
            Some(a.minus(zero.minus(b)))
        }
        _ => None,
    }
}

/// The mask of `difference <function> 0`, or of its contrary.
fn comparison(difference: Linear, function: BinaryFn, visible: bool) -> Option<Mask> {
    // Turn everything into `row - column` on the left.
    let (function, constant) = match (difference.row, difference.column) {
        (1.0, -1.0) => (function, -difference.constant),
        (-1.0, 1.0) => {
            let turned = match function {
                BinaryFn::Lt => BinaryFn::Gt,
                BinaryFn::Le => BinaryFn::Ge,
                BinaryFn::Gt => BinaryFn::Lt,
                BinaryFn::Ge => BinaryFn::Le,
                _ => return None,
            };
            (turned, difference.constant)
        }
        _ => return None,
    };
    let function = match (function, visible) {
        (f, true) => f,
        (BinaryFn::Lt, false) => BinaryFn::Ge,
        (BinaryFn::Le, false) => BinaryFn::Gt,
        (BinaryFn::Gt, false) => BinaryFn::Le,
        (BinaryFn::Ge, false) => BinaryFn::Lt,
        _ => return None,
    };
    // row - column is whole: at least `least`, or at most `most`.
    let (least, most) = match function {
        BinaryFn::Ge => (Some(constant.ceil()), None),
        BinaryFn::Gt => (Some(constant.floor() + 1.0), None),
        BinaryFn::Le => (None, Some(constant.floor())),
        BinaryFn::Lt => (None, Some(constant.ceil() - 1.0)),
        _ => return None,
    };
    match (least, most) {
        (Some(0.0), _) => Some(Mask { causal: true, ..open() }),
        (_, Some(most)) if (0.0..=1e9).contains(&most) => Some(Mask { window: most as usize + 1, ..open() }),
        _ => None,
    }
}

/// The mask that a table of constants spells.
fn table(
    view: &View<'_>,
    weight: WeightId,
    visible: impl Fn(f64) -> Result<bool, Reason>,
) -> Result<Mask, Reason> {
    let name = &view.module.weights[weight].name;
    let unknown = || format!("the values of @{name} are not known while compiling");
    let shape = view.module.weights[weight].ty.const_shape().unwrap_or_default();
    let (lead, n) = match shape[..] {
        [ref lead @ .., rows, columns] if rows == columns => (lead, rows as usize),
        _ => return Err(format!("the mask @{name} is not square")),
    };
    if lead.iter().any(|d| *d != 1) {
        return Err(format!("the mask @{name} differs between heads or sequences"));
    }
    if n * n > WeightExpr::DENSE_LIMIT {
        return Err(unknown());
    }
    let values = view.numbers(weight).map_err(|_| unknown())?;
    let sees = values.data.iter().map(|v| visible(*v)).collect::<Result<Vec<bool>, Reason>>()?;
    if n == 1 {
        // It repeats over all rows and columns.
        return if sees[0] { Ok(open()) } else { Err(format!("the mask @{name} hides everything")) };
    }
    let causal = (0..n).all(|i| (i + 1..n).all(|j| !sees[i * n + j]));
    let reach = (0..n).flat_map(|i| (0..=i).map(move |j| (i, j))).filter(|(i, j)| sees[i * n + j]);
    let reach = reach.map(|(i, j)| i - j + 1).max().unwrap_or(0);
    let mask = Mask { causal, window: if reach >= n { 0 } else { reach }, ..open() };
    let holds = (0..n).all(|i| (0..n).all(|j| mask.sees(i, j) == sees[i * n + j]));
    if reach > 0 && holds {
        Ok(mask)
    } else {
        Err(format!("the mask @{name} is neither causal nor a window"))
    }
}

/// The operand below broadcasts, and below reshapes that only add leading axes of extent 1.
fn below_movements(view: &View<'_>, operand: Operand) -> Operand {
    let mut at = operand;
    for _ in 0..DEPTH {
        let Some((node, _)) = view.def(at) else { return at };
        let source = view.node(node).operands.first().copied();
        let Some(source) = source else { return at };
        let adds_ones = || {
            let (to, from) = (&view.ty(at).shape, &view.ty(source).shape);
            let added = to.len().saturating_sub(from.len());
            to.ends_with(from) && to[..added].iter().all(|d| d.as_const() == Some(1))
        };
        match *view.node(node).op {
            Op::Broadcast(_) => at = source,
            Op::Reshape(_) if adds_ones() => at = source,
            Op::Cast(ref cast) if cast.to.is_float() && view.ty(source).dtype.is_float() => at = source,
            _ => return at,
        }
    }
    at
}

/// The truth value below a cast to numbers.
fn below_cast(view: &View<'_>, operand: Operand) -> Operand {
    let at = below_movements(view, operand);
    match view.def(at) {
        Some((node, _)) if matches!(*view.node(node).op, Op::Cast(_)) => view.node(node).operands[0],
        _ => at,
    }
}
