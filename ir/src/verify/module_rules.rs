//! Rules about declarations: V1 names, V2 symbols, V3 and V9 sizes, V4 weights.

use std::collections::HashSet;

use super::Report;
use super::scope::Scope;
use crate::arena::Id;
use crate::attr::Quoted;
use crate::dim::{Bindings, Dim, MAX_EXTENT, MAX_NESTING, MAX_SIZE, SymDecl};
use crate::distinct::{Dims, Ops, TypeId, Types};
use crate::dtype::DType;
use crate::graph::*;
use crate::launch::{tile_count, tile_first};
use crate::nearest::nearest;
use crate::ops::movement::is_permutation;
use crate::types::TensorType;
use crate::weights::MAX_DEPTH;

/// A number that equal names have in common and most different ones do not; none for names that are empty or hold
/// other bytes than ASCII letters, digits, signs and blanks. Eight bytes at a time: a model has as many names as nodes.
fn plain(name: &str) -> Option<u64> {
    const EACH: u64 = u64::MAX / 255;
    let mut hash = name.len() as u64;
    let mut unfit = 0;
    let mut take = |word: u64| {
        // The high bit of a byte is set in the first for those above 127, in the second for 127, in the third below 32.
        unfit |= word | word.wrapping_add(EACH) | !word.wrapping_add(0x60 * EACH);
        let product = u128::from(hash ^ word) * 0x9e37_79b9_7f4a_7c15;
        hash = (product as u64) ^ ((product >> 64) as u64);
    };
    let (words, rest) = name.as_bytes().as_chunks();
    words.iter().for_each(|word| take(u64::from_le_bytes(*word)));
    if !rest.is_empty() {
        let mut word = [b' '; 8];
        word[..rest.len()].copy_from_slice(rest);
        take(u64::from_le_bytes(word));
    }
    (!name.is_empty() && unfit & (0x80 * EACH) == 0).then_some(hash)
}

/// Names, by hash. Hashes are sorted, not kept in a table: a sort goes through memory in order, however many there are.
pub(super) struct Hashes {
    hashes: Vec<u64>,
    plain: bool,
}

impl Hashes {
    fn with_capacity(names: usize) -> Self {
        Hashes { hashes: Vec::with_capacity(names), plain: true }
    }

    fn add(&mut self, name: &str) {
        match plain(name) {
            Some(hash) => self.hashes.push(hash),
            None => self.plain = false,
        }
    }

    /// Whether all names are fit to be printed and differ; a rare `false` may be wrong.
    fn surely_unique(mut self) -> bool {
        self.hashes.sort_unstable();
        self.plain && self.hashes.windows(2).all(|pair| pair[0] != pair[1])
    }
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a str> + Clone, report: &mut Report) {
    let mut hashes = Hashes::with_capacity(names.size_hint().0);
    names.clone().for_each(|name| hashes.add(name));
    if !hashes.surely_unique() {
        say_which(what, names, report);
    }
}

/// Says which names are not fit or not unique.
fn say_which<'a>(what: &str, names: impl Iterator<Item = &'a str>, report: &mut Report) {
    let mut seen = HashSet::new();
    for name in names {
        if name.is_empty() {
            report.add(1, None, format!("a {what} has no name"));
        } else if name.chars().any(char::is_control) {
            report.add(1, None, format!("the {what} {} has control characters", Quoted(name)));
        } else if !seen.insert(name) {
            report.add(1, None, format!("the {what} `{name}` is declared twice"));
        }
    }
}

/// V1; `of_weights` are the names of the weights.
pub(super) fn names(module: &Module, mut of_weights: Hashes, report: &mut Report) {
    module.states.iter().for_each(|(_, s)| of_weights.add(&s.name));
    if !of_weights.surely_unique() {
        let weights = module.weights.iter().map(|(_, w)| w.name.as_str());
        say_which(
            "weight or state",
            weights.chain(module.states.iter().map(|(_, s)| s.name.as_str())),
            report,
        );
    }
    unique("arena", module.arenas.iter().map(|(_, a)| a.name.as_str()), report);
    unique("symbol", module.dims.iter().map(|d| d.sym.name()), report);
    unique("input", module.input_types().iter().map(|(n, _)| *n), report);
    unique("output", module.graph.outputs.iter().map(|o| o.name.as_str()), report);
    for (what, name) in [("module", &module.name), ("graph", &module.graph.name)] {
        if name.is_empty() {
            report.add(1, None, format!("the {what} has no name"));
        }
    }
}

/// Most symbols of a module: tables of them are searched front to back.
const MAX_SYMBOLS: usize = 64;

pub(super) fn symbols(module: &Module, scope: &Scope<'_>, report: &mut Report) {
    let types = &scope.types;
    for decl in &module.dims {
        let SymDecl { sym, min, max, multiple, hint: _ } = decl;
        if !(1 <= *min && min <= max && *max <= MAX_EXTENT as u64) {
            report.add(2, None, format!("{sym} has no sound range: {min}..={max}"));
        }
        if *multiple == 0 {
            report.add(2, None, format!("{sym} is a multiple of 0"));
        }
        if [tile_first(), tile_count()].contains(sym) {
            report.add(2, None, format!("{sym} is a name of launch tables"));
        }
    }
    if module.dims.len() > MAX_SYMBOLS {
        report.add(
            2,
            None,
            format!("{} symbols are declared, at most {MAX_SYMBOLS} may be", module.dims.len()),
        );
        return;
    }
    let declared = |dim: &Dim, report: &mut Report, node: Option<NodeId>| {
        for sym in dim.symbols() {
            if !module.dims.iter().any(|d| d.sym == sym) {
                let names = module.dims.iter().map(|d| d.sym.name());
                let close =
                    nearest(sym.name(), names).map_or(String::new(), |n| format!("; did you mean ${n}?"));
                report.add(2, node, format!("{sym} is not declared{close}"));
            }
        }
    };
    // Ops, types and offsets that were found good need no second look.
    let mut ops: Ops<'_, ()> = Ops::new();
    for (id, node) in scope.nodes() {
        if ops.find(&node.op, |()| true).is_some() {
            continue;
        }
        let before = report.found.len();
        for (_, attr) in &node.op.attrs().0 {
            attr.visit_dims(&mut |dim| declared(dim, report, Some(id)));
        }
        if report.found.len() == before {
            ops.remember(&node.op, ());
        }
    }
    let mut good = vec![false; types.list().len()];
    let mut offsets: Dims<'_, ()> = Dims::new();
    for (id, value) in scope.values() {
        let node = if let Def::Node { node, .. } = value.def { Some(node) } else { None };
        let before = report.found.len();
        if !good[types.value(id) as usize] {
            value.ty.shape.iter().for_each(|d| declared(d, report, node));
            good[types.value(id) as usize] = report.found.len() == before;
        }
        if let Some(Place::Arena { offset, .. }) = &value.place
            && offsets.get(offset, 0).is_none()
        {
            let before = report.found.len();
            declared(offset, report, node);
            if report.found.len() == before {
                offsets.remember(offset, 0, ());
            }
        }
    }
    for (id, state) in module.states.iter() {
        if !good[types.operand(Operand::State(id)) as usize] {
            state.ty.shape.iter().for_each(|d| declared(d, report, None));
        }
    }
    module.arenas.iter().for_each(|(_, a)| declared(&a.size, report, None));
}

/// Most forms of weights that are remembered.
const FORMS: usize = 64;

/// Whether a weight is well typed because another one of its type is: one expression over parts of the same types.
fn same_form(module: &Module, types: &Types<'_>, good: &Weight, other: &Weight) -> bool {
    let ty = |id: WeightId| module.weights.contains(id).then(|| types.operand(Operand::Weight(id)));
    let axis = |weight: &Weight| weight.stream.as_ref().map(|s| s.tile_axis);
    let (x, y) = (good, other);
    let alike = || match (&x.expr, &y.expr) {
        (WeightExpr::File { .. }, WeightExpr::File { file, key }) => !file.is_empty() && !key.is_empty(),
        (WeightExpr::Concat { axis, .. }, WeightExpr::Concat { axis: other, .. }) => axis == other,
        (WeightExpr::Transpose { perm, .. }, WeightExpr::Transpose { perm: other, .. }) => perm == other,
        (WeightExpr::Reshape { .. }, WeightExpr::Reshape { .. }) => true,
        (WeightExpr::Cast { .. }, WeightExpr::Cast { .. }) => true,
        (WeightExpr::Pack { panel, segments, .. }, WeightExpr::Pack { panel: p, segments: s, .. }) => {
            (panel, segments) == (p, s)
        }
        _ => false,
    };
    let parts = |w: &Weight| w.expr.parts().len();
    alike()
        && axis(x) == axis(y)
        && parts(x) == parts(y)
        && x.expr.parts().iter().zip(y.expr.parts()).all(|(p, q)| ty(*q).is_some() && ty(*p) == ty(*q))
}

/// V4; returns the names of the weights, which it visits anyway.
pub(super) fn weights(module: &Module, types: &Types<'_>, report: &mut Report) -> Hashes {
    let mut names = Hashes::with_capacity(module.weights.len() + module.states.len());
    let mut good: Vec<(TypeId, &Weight)> = Vec::new();
    // How deep expressions nest, as far as parts come before what is made of them.
    let mut depth = vec![0u32; module.weights.bound()];
    let mut deep = false;
    for (id, weight) in module.weights.iter() {
        names.add(&weight.name);
        for part in weight.expr.parts() {
            let below = depth.get(part.index()).copied().filter(|_| *part < id);
            depth[id.index()] = depth[id.index()].max(below.map_or(0, |below| below + 1));
            deep |= below.is_none_or(|below| below as usize >= MAX_DEPTH);
        }
        let ty = types.operand(Operand::Weight(id));
        if good.iter().any(|(t, known)| *t == ty && same_form(module, types, known, weight)) {
            continue;
        }
        match expression(module, weight) {
            Err(message) => report.add(4, None, format!("@{}: {message}", weight.name)),
            Ok(()) if good.len() < FORMS => good.push((ty, weight)),
            Ok(()) => {}
        }
    }
    if deep {
        nesting(module, report);
    }
    names
}

/// The part of V4 that is about how deep expressions nest.
fn nesting(module: &Module, report: &mut Report) {
    // Depth by relaxation over the arena: a part that comes later needs another round, a cycle never settles.
    let mut depth = vec![0usize; module.weights.bound()];
    let mut deepest = None;
    for _ in 0..=MAX_DEPTH {
        deepest = None;
        for (id, weight) in module.weights.iter() {
            let below = weight.expr.parts().iter().filter_map(|p| depth.get(p.index())).max().copied();
            let here = below.map_or(0, |d| d + 1);
            if std::mem::replace(&mut depth[id.index()], here) != here || here > MAX_DEPTH {
                deepest.get_or_insert(&weight.name);
            }
        }
        if deepest.is_none() {
            return;
        }
    }
    if let Some(name) = deepest {
        report.add(4, None, format!("@{name}: expressions are cyclic or nest deeper than {MAX_DEPTH}"));
    }
}

/// Whether `value` is an element of `dtype` up to rounding of floats.
fn representable(dtype: DType, value: f64) -> bool {
    let within = |low: f64, high: f64| value.fract() == 0.0 && (low..=high).contains(&value);
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => true,
        DType::Bool => within(0.0, 1.0),
        DType::U8 => within(0.0, 255.0),
        DType::I8 => within(-128.0, 127.0),
        DType::I32 => within(f64::from(i32::MIN), f64::from(i32::MAX)),
        // Beyond 2^53 a literal does not say which integer is meant.
        DType::I64 => within(-9007199254740992.0, 9007199254740992.0),
        // Elements that share a byte come from files only.
        DType::I4 => false,
    }
}

fn expression(module: &Module, weight: &Weight) -> Result<(), String> {
    let ty = &weight.ty;
    let shape = ty.const_shape().ok_or_else(|| format!("{ty} is not constant"))?;
    if crate::types::const_bytes(ty.dtype, &shape).is_none_or(|b| b > MAX_EXTENT as u64) {
        return Err(format!("{ty} is too large"));
    }
    if weight.stream.as_ref().is_some_and(|s| s.tile_axis >= shape.len()) {
        return Err(format!("{ty} has no axis to stream along"));
    }
    let part = |id: &WeightId| -> Result<(&TensorType, Vec<u64>), String> {
        let part = module.weights.get(*id).ok_or_else(|| format!("{id} does not exist"))?;
        let shape = part.ty.const_shape().ok_or_else(|| format!("part {} is not constant", part.ty))?;
        Ok((&part.ty, shape))
    };
    let same = |found: Vec<u64>, dtype, what: &str| {
        if found == shape && dtype == ty.dtype {
            Ok(())
        } else {
            Err(format!("{what} gives {dtype}{found:?}, declared {ty}"))
        }
    };
    let elements = |shape: &[u64]| shape.iter().try_fold(1u64, |acc, d| acc.checked_mul(*d));
    match &weight.expr {
        WeightExpr::File { file, key } if file.is_empty() || key.is_empty() => {
            Err("names no tensor".to_string())
        }
        WeightExpr::File { .. } => Ok(()),
        WeightExpr::Splat(value) if representable(ty.dtype, *value) => Ok(()),
        WeightExpr::Splat(value) => Err(format!("{value:?} is no {} element", ty.dtype)),
        WeightExpr::Random { std, .. } => {
            if ty.dtype.is_float() && std.is_finite() && *std >= 0.0 {
                Ok(())
            } else {
                Err("random weights are floats with a finite deviation".to_string())
            }
        }
        WeightExpr::Dense(values) => {
            if values.len() > WeightExpr::DENSE_LIMIT || elements(&shape) != Some(values.len() as u64) {
                return Err(format!("{} literal elements for {ty}", values.len()));
            }
            match values.iter().find(|v| !representable(ty.dtype, **v)) {
                Some(value) => Err(format!("{value:?} is no {} element", ty.dtype)),
                None => Ok(()),
            }
        }
        WeightExpr::Concat { axis, parts } => {
            let mut joined: Option<Vec<u64>> = None;
            for id in parts {
                let (part_ty, part_shape) = part(id)?;
                if part_ty.dtype != ty.dtype || *axis >= part_shape.len() {
                    return Err(format!("part {part_ty} does not join into {ty} along axis {axis}"));
                }
                joined = Some(match joined {
                    None => part_shape,
                    Some(mut sum) => {
                        let fits = sum.len() == part_shape.len()
                            && (0..sum.len()).all(|i| i == *axis || sum[i] == part_shape[i]);
                        let extent = fits.then(|| sum[*axis].checked_add(part_shape[*axis])).flatten();
                        sum[*axis] = extent.ok_or_else(|| format!("part {part_ty} does not fit"))?;
                        sum
                    }
                });
            }
            same(joined.ok_or("joins nothing")?, ty.dtype, "concat")
        }
        WeightExpr::Transpose { perm, of } => {
            let (part_ty, part_shape) = part(of)?;
            if perm.len() != part_shape.len() || !is_permutation(perm) {
                return Err(format!("{perm:?} is no permutation of {part_ty}"));
            }
            same(perm.iter().map(|p| part_shape[*p]).collect(), part_ty.dtype, "transpose")
        }
        WeightExpr::Reshape { of } => {
            let (part_ty, part_shape) = part(of)?;
            if part_ty.dtype == ty.dtype && elements(&part_shape) == elements(&shape) {
                Ok(())
            } else {
                Err(format!("{part_ty} does not reshape to {ty}"))
            }
        }
        WeightExpr::Cast { of } => {
            let (_, part_shape) = part(of)?;
            same(part_shape, ty.dtype, "cast")
        }
        WeightExpr::Slice { axis, start, len, of } => {
            let (part_ty, mut part_shape) = part(of)?;
            let end = start.checked_add(*len).map(|end| end as u64);
            match part_shape.get_mut(*axis) {
                Some(extent) if end.is_some_and(|end| end <= *extent) => *extent = *len as u64,
                _ => {
                    let message =
                        format!("{len} elements from {start} along axis {axis} are no part of {part_ty}");
                    return Err(message);
                }
            }
            // A piece of elements that share bytes does not begin at a byte.
            if ty.dtype.size_bytes().is_none() {
                return Err(format!("{} elements share bytes and cannot be sliced", ty.dtype));
            }
            same(part_shape, part_ty.dtype, "slice")
        }
        WeightExpr::Pack { panel, segments, of } => {
            let (part_ty, part_shape) = part(of)?;
            let rows = segments.iter().try_fold(0usize, |acc, s| acc.checked_add(*s));
            let [n, k] = part_shape[..] else { return Err(format!("packs a matrix, not {part_ty}")) };
            if !(1..=1024).contains(panel) || rows.map(|r| r as u64) != Some(n) {
                return Err(format!("panel {panel} and segments {segments:?} do not pack {part_ty}"));
            }
            let panels: usize = segments.iter().map(|s| s.div_ceil(*panel)).sum();
            same(vec![panels as u64, k, *panel as u64], part_ty.dtype, "pack")
        }
        WeightExpr::Cores { segments, alternate, of } => {
            let (part_ty, part_shape) = part(of)?;
            let rows = segments.iter().try_fold(0usize, |acc, s| acc.checked_add(*s));
            let [n, k] = part_shape[..] else { return Err(format!("cuts a matrix, not {part_ty}")) };
            if rows.map(|r| r as u64) != Some(n) || k % 8 != 0 {
                return Err(format!("segments {segments:?} do not cut {part_ty} into cores"));
            }
            if *alternate && !matches!(segments.as_slice(), [a, b] if a == b) {
                return Err(format!("segments {segments:?} cannot alternate"));
            }
            let panels: usize = segments.iter().map(|s| s.div_ceil(8)).sum();
            same(vec![panels as u64, k / 8, 8, 8], part_ty.dtype, "cores")
        }
    }
}

/// Whether a dim is small enough to be written down and compared.
pub(super) fn simple(dim: &Dim) -> bool {
    dim.size() <= MAX_SIZE && dim.nesting() <= MAX_NESTING
}

/// V3 and V9 over everything that has a size.
pub(super) fn sizes(module: &Module, types: &Types<'_>, report: &mut Report) {
    let (minima, maxima) = (Bindings::minima(&module.dims), Bindings::maxima(&module.dims));
    let mut check = |what: String, ty: &TensorType, node: Option<NodeId>| {
        let constant = ty.shape.iter().all(|d| d.as_const().is_some_and(|c| c >= 0));
        if !ty.shape.iter().all(simple) {
            report.add(3, node, format!("an extent of {what} is too complex"));
            return;
        }
        let bytes = ty.bytes();
        if constant {
            if !(0..=MAX_EXTENT).contains(&bytes.as_const().unwrap_or(-1)) {
                report.add(3, node, format!("{what} is too large: {ty}"));
            }
            return;
        }
        for dim in &ty.shape {
            if dim.extent(&minima).is_none() || dim.eval(&maxima).is_none_or(|v| v > MAX_EXTENT) {
                report.add(3, node, format!("extent {dim} of {what} leaves 0..={MAX_EXTENT}"));
                return;
            }
        }
        if bytes.eval(&maxima).is_none_or(|v| v > MAX_EXTENT) {
            report.add(3, node, format!("{what} is too large: {ty}"));
        } else if !bytes.is_monotone(&module.dims) {
            report.add(9, node, format!("the size {bytes} of {what} does not grow with every symbol"));
        }
    };
    // Each distinct type is named by the first value that has it.
    let mut seen = vec![false; types.list().len()];
    for id in (0..module.graph.values.bound()).map(ValueId::from_index) {
        if seen[types.value(id) as usize] {
            continue;
        }
        if let Some(value) = module.graph.values.get(id) {
            seen[types.value(id) as usize] = true;
            let node = if let Def::Node { node, .. } = value.def { Some(node) } else { None };
            check(id.to_string(), &value.ty, node);
        }
    }
    for (id, state) in module.states.iter() {
        if !std::mem::replace(&mut seen[types.operand(Operand::State(id)) as usize], true) {
            check(format!("@{}", state.name), &state.ty, None);
        }
    }
    for (_, arena) in module.arenas.iter() {
        if !simple(&arena.size) {
            report.add(3, None, format!("the size of arena {} is too complex", arena.name));
            continue;
        }
        if !arena.size.is_monotone(&module.dims) {
            report.add(
                9,
                None,
                format!("the size {} of arena {} does not grow with every symbol", arena.size, arena.name),
            );
        }
        if arena.size.extent(&minima).is_none() || arena.size.eval(&maxima).is_none_or(|v| v > MAX_EXTENT) {
            report.add(
                3,
                None,
                format!("arena {} has a negative or too large size: {}", arena.name, arena.size),
            );
        }
        if !arena.align.is_power_of_two() || arena.align > 1 << 20 {
            report.add(12, None, format!("arena {} has alignment {}", arena.name, arena.align));
        }
    }
}
