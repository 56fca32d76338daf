//! Which angles a tensor of cosines or sines stands for: positions times frequencies.
//!
//! Two forms are understood: `cos(positions * frequencies)` with constant frequencies, and tables of constants whose
//! row p holds the cosines at position p. Casts, broadcasts, extents of 1 and repetitions along the last axis may
//! stand in between.

use millrace_ir::ops::rope::{RopeLayout, RopeScaling};
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{Binary, Concat, Embedding, Gather, Iota, Op, Rope, Slice, Unary, binary::BinaryFn};
use millrace_ir::{Operand, WeightExpr, WeightId};

use crate::rewrite::View;

/// Where the positions come from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Positions {
    /// The coordinate along the axis.
    Coordinate,
    /// A tensor of whole numbers.
    Given(Operand),
}

/// What cosines or sines are taken of.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Angles {
    positions: Positions,
    values: Values,
    /// For each element of the last axis, the frequency or column it uses.
    columns: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq)]
enum Values {
    Frequencies(Vec<f64>),
    Table(Vec<f64>),
}

/// How the last axis was made from the one below.
#[derive(Clone, Copy)]
enum Expansion {
    /// All elements, then all again.
    Twice,
    /// Each element this many times in a row.
    Each(usize),
}

/// Most nodes between the product with x and the positions.
const CHAIN: usize = 16;

/// The angles whose `function` (cosine or sine) the operand holds.
pub(super) fn angles(view: &View<'_>, operand: Operand, function: UnaryFn) -> Result<Angles, String> {
    let unknown = |what: Operand| match what {
        Operand::Value(value) => format!("{value} is data, no {} of positions", function.name()),
        _ => format!("the table of {} is not known while compiling", function.name()),
    };
    let mut at = operand;
    let mut expansions = Vec::new();
    let mut applied = false;
    for _ in 0..CHAIN {
        if let Operand::Weight(weight) = at {
            if applied {
                return Err("the angles are a table".into());
            }
            let table = constants(view, weight).ok_or_else(|| unknown(at))?;
            let width = width(view, at);
            return finish(Positions::Coordinate, Values::Table(table), width, &expansions);
        }
        let Some((id, 0)) = view.def(at) else { return Err(unknown(at)) };
        let node = view.node(id);
        let last = |o: Operand| view.ty(o).last();
        match &*node.op {
            Op::Cast(_) | Op::Broadcast(_) | Op::Reshape(_) if last(node.operands[0]) == last(at) => {
                at = node.operands[0];
            }
            Op::Reshape(_) => {
                let (each, below) = repeated_each(view, node.operands[0]).ok_or_else(|| unknown(at))?;
                expansions.push(Expansion::Each(each));
                at = below;
            }
            Op::Concat(Concat { axis }) if axis + 1 == view.ty(at).rank() => {
                let [first, second] = node.operands[..] else { return Err(unknown(at)) };
                if first != second {
                    return Err(unknown(at));
                }
                expansions.push(Expansion::Twice);
                at = first;
            }
            // The first rows of a table.
            Op::Slice(Slice { axis: 0, start, step: 1, .. }) if !applied && start.as_const() == Some(0) => {
                at = node.operands[0];
            }
            Op::Unary(Unary { function: there }) if *there == function && !applied => {
                applied = true;
                at = node.operands[0];
            }
            Op::Gather(Gather { axis: 0 }) | Op::Embedding(Embedding) if !applied => {
                let Operand::Weight(table) = node.operands[0] else { return Err(unknown(at)) };
                let values = constants(view, table).ok_or_else(|| unknown(node.operands[0]))?;
                let width = width(view, node.operands[0]);
                let positions = Positions::Given(node.operands[1]);
                return finish(positions, Values::Table(values), width, &expansions);
            }
            Op::Binary(Binary { function: BinaryFn::Mul }) if applied => {
                let (a, b) = (node.operands[0], node.operands[1]);
                let (weight, other) = match (a, b) {
                    (other, Operand::Weight(weight)) | (Operand::Weight(weight), other) => (weight, other),
                    _ => return Err("the frequencies are not constant".into()),
                };
                let elements = &view.module.weights[weight].ty.elements();
                if &view.ty(Operand::Weight(weight)).last() != elements {
                    return Err("the frequencies do not stand along the last axis".into());
                }
                return product(view, weight, other, &expansions);
            }
            Op::Matmul(_) if applied => {
                let inner = view.ty(node.operands[0]).last().as_const();
                match node.operands[1] {
                    Operand::Weight(weight) if inner == Some(1) => {
                        return product(view, weight, node.operands[0], &expansions);
                    }
                    _ => return Err("the frequencies are not constant".into()),
                }
            }
            _ => return Err(unknown(at)),
        }
    }
    Err(unknown(at))
}

fn width(view: &View<'_>, operand: Operand) -> usize {
    view.ty(operand).last().as_const().and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
}

/// The elements of a small weight that needs no file.
fn constants(view: &View<'_>, weight: WeightId) -> Option<Vec<f64>> {
    let elements = view.module.weights[weight].ty.elements().as_const()?;
    if !(1..=WeightExpr::DENSE_LIMIT as i64).contains(&elements) {
        return None;
    }
    view.numbers(weight).ok().map(|t| t.data)
}

/// `[.., n]` below a broadcast `[.., n, 1] -> [.., n, k]`: k and the operand.
fn repeated_each(view: &View<'_>, operand: Operand) -> Option<(usize, Operand)> {
    let (id, _) = view.def(operand)?;
    let node = view.node(id);
    let one = |o: Operand| view.ty(o).last().as_const() == Some(1);
    if !matches!(*node.op, Op::Broadcast(_)) || !one(node.operands[0]) {
        return None;
    }
    let (below, _) = view.def(node.operands[0])?;
    let base = view.node(below).operands.first().copied()?;
    let adds_axis = matches!(*view.node(below).op, Op::Reshape(_))
        && view.ty(base).shape[..] == view.ty(node.operands[0]).shape[..view.ty(node.operands[0]).rank() - 1];
    adds_axis.then(|| (width(view, operand), base))
}

/// Positions times constant frequencies.
fn product(
    view: &View<'_>,
    weight: WeightId,
    positions: Operand,
    expansions: &[Expansion],
) -> Result<Angles, String> {
    let frequencies =
        constants(view, weight).ok_or("the frequencies come from a file, their base is not known")?;
    let mut at = positions;
    for _ in 0..CHAIN {
        let Some((id, 0)) = view.def(at) else { break };
        let node = view.node(id);
        match &*node.op {
            Op::Cast(_) | Op::Broadcast(_) | Op::Reshape(_) => at = node.operands[0],
            Op::Iota(Iota { shape, axis, .. }) => {
                let one_axis =
                    (0..shape.len()).all(|other| other == *axis || shape[other].as_const() == Some(1));
                if shape[*axis].as_const() == Some(1) {
                    return Err("there is only one position".into());
                }
                if !one_axis {
                    return Err("the positions are coordinates of several axes".into());
                }
                let width = frequencies.len();
                return finish(Positions::Coordinate, Values::Frequencies(frequencies), width, expansions);
            }
            _ => break,
        }
    }
    if view.ty(at).dtype.is_float() {
        return Err(format!("the positions are {} and may not be whole", view.ty(at)));
    }
    let width = frequencies.len();
    finish(Positions::Given(at), Values::Frequencies(frequencies), width, expansions)
}

fn finish(
    positions: Positions,
    values: Values,
    width: usize,
    expansions: &[Expansion],
) -> Result<Angles, String> {
    let mut columns: Vec<usize> = (0..width).collect();
    for expansion in expansions.iter().rev() {
        columns = match expansion {
            Expansion::Twice => columns.iter().chain(&columns).copied().collect(),
            Expansion::Each(times) => columns.iter().flat_map(|c| std::iter::repeat_n(*c, *times)).collect(),
        };
    }
    Ok(Angles { positions, values, columns })
}

/// The op that rotates by these angles: `d` elements in pairs of `layout`.
pub(super) fn rope(
    cos: &Angles,
    sin: &Angles,
    d: usize,
    layout: RopeLayout,
) -> Result<(Rope, Positions), String> {
    if cos.positions != sin.positions || cos.columns.len() != sin.columns.len() {
        return Err("cosines and sines belong to different angles".into());
    }
    let half = d / 2;
    // The column of each pair's first element; the second one must agree.
    let pairs = |angles: &Angles| -> Option<Vec<usize>> {
        let columns = &angles.columns;
        if columns.len() == half {
            return Some(columns.clone());
        }
        (columns.len() == d)
            .then(|| {
                (0..half).map(|i| if layout == RopeLayout::Half { (i, i + half) } else { (2 * i, 2 * i + 1) })
            })?
            .map(|(a, b)| same_column(angles, columns[a], columns[b]).then_some(columns[a]))
            .collect()
    };
    let (Some(cos_columns), Some(sin_columns)) = (pairs(cos), pairs(sin)) else {
        return Err("the two elements of a pair turn by different angles".into());
    };
    let frequencies: Vec<f64> = match (&cos.values, &sin.values) {
        (Values::Frequencies(c), Values::Frequencies(s)) => {
            let of_cos: Vec<f64> = cos_columns.iter().map(|i| c[*i]).collect();
            if !sin_columns.iter().zip(&of_cos).all(|(i, f)| s[*i] == *f) {
                return Err("cosines and sines belong to different angles".into());
            }
            of_cos
        }
        (Values::Table(c), Values::Table(s)) => {
            let (c_width, s_width) = (c.len() / rows(cos), s.len() / rows(sin));
            if rows(cos) < 2 || rows(cos) != rows(sin) {
                return Err("the tables of cosines and sines have too few rows".into());
            }
            // Row 1 holds the frequencies as angles.
            let angle = |(a, b): (&usize, &usize)| s[s_width + b].atan2(c[c_width + a]);
            let found: Vec<f64> = cos_columns.iter().zip(&sin_columns).map(angle).collect();
            let fits = |table: &[f64], width: usize, columns: &[usize], function: fn(f64) -> f64| {
                (0..table.len() / width).all(|row| {
                    let tolerance = 1e-5 * (1.0 + row as f64);
                    columns.iter().zip(&found).all(|(column, f)| {
                        (table[row * width + column] - function(row as f64 * f)).abs() <= tolerance
                    })
                })
            };
            if !fits(c, c_width, &cos_columns, f64::cos) || !fits(s, s_width, &sin_columns, f64::sin) {
                return Err("the rows of the tables are no multiples of angles".into());
            }
            found
        }
        _ => return Err("cosines and sines belong to different angles".into()),
    };
    let (base, scaling) = fit(&frequencies, layout).ok_or("the frequencies are no powers of a base")?;
    Ok((Rope { base, layout, scaling, rotary: 0 }, cos.positions))
}

fn rows(angles: &Angles) -> usize {
    let width = angles.columns.iter().max().map_or(1, |c| c + 1);
    match &angles.values {
        Values::Table(values) => (values.len() / width).max(1),
        Values::Frequencies(_) => 1,
    }
}

fn same_column(angles: &Angles, a: usize, b: usize) -> bool {
    a == b
        || match &angles.values {
            Values::Frequencies(values) => values[a] == values[b],
            Values::Table(values) => {
                let width = values.len() / rows(angles);
                (0..rows(angles)).all(|row| values[row * width + a] == values[row * width + b])
            }
        }
}

/// Base and scaling that give these frequencies.
fn fit(frequencies: &[f64], layout: RopeLayout) -> Option<(f64, RopeScaling)> {
    let (first, last) = (*frequencies.first()?, *frequencies.last()?);
    let n = frequencies.len();
    let d = 2 * n;
    if !frequencies.iter().all(|f| f.is_finite() && *f > 0.0) {
        return None;
    }
    let nice = |base: f64| if (base - base.round()).abs() <= 1e-5 * base { base.round() } else { base };
    let base_of = |a: f64, b: f64, steps: usize| match steps {
        0 => 10000.0,
        _ => nice((a / b).powf(d as f64 / (2 * steps) as f64)),
    };
    let plain = base_of(first, last, n - 1);
    let linear = match (first - 1.0).abs() <= 1e-6 {
        true => RopeScaling::Default,
        false => RopeScaling::Linear { factor: nice(first.recip()) },
    };
    let mut candidates = vec![(plain, linear)];
    if n > 2 {
        // Llama 3: the first frequencies are as trained, the last is divided.
        let base = base_of(first, frequencies[1], 1);
        let factor = nice(base.powf(-((2 * (n - 1)) as f64) / d as f64) / last);
        candidates.push((
            base,
            RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192.0 },
        ));
    }
    candidates.into_iter().find(|(base, scaling)| {
        let rope = Rope { base: *base, layout, scaling: *scaling, rotary: 0 };
        let expected = rope.frequencies(d);
        *base > 0.0
            && base.is_finite()
            && expected.iter().zip(frequencies).all(|(e, f)| (f64::from(*e) - f).abs() <= 2e-6 * f)
    })
}
