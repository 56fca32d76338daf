//! Rules about phases (V11) and places (V12).

use super::Report;
use super::graph_rules::Versions;
use super::module_rules::simple;
use super::scope::Scope;
use crate::arena::Id;
use crate::dim::{Bindings, Dim};
use crate::distinct::{Dims, TypeId};
use crate::graph::*;

pub(super) fn phases(module: &Module, scope: &Scope<'_>, report: &mut Report) {
    let phase = module.phase;
    let graph = &module.graph;
    for (id, node) in scope.nodes() {
        if phase < Phase::Fused && node.op.traits().fused_only {
            report.add(11, Some(id), format!("`{}` is not legal in phase {phase}", node.op.name()));
        }
        for result in &node.results {
            let placed = graph.values[*result].place.is_some();
            if placed != (phase >= Phase::Planned) {
                let what = if placed { "has a place" } else { "has no place" };
                report.add(11, Some(id), format!("{result} {what} in phase {phase}"));
            }
        }
        match node.kernel {
            Some(kernel) if phase < Phase::Lowered => {
                report.add(11, Some(id), format!("has kernel {kernel} in phase {phase}"));
            }
            None if phase == Phase::Lowered => report.add(11, Some(id), "has no kernel"),
            Some(kernel) if module.kernels.get(kernel).is_none() => {
                report.add(11, Some(id), format!("{kernel} does not exist"));
            }
            _ => {}
        }
    }
    for (at, id) in scope.order() {
        if graph.nodes.get(id).is_some_and(|n| n.joined) && (phase < Phase::Scheduled || at == 0) {
            let what = if at == 0 { "with nothing before it" } else { "before the order is final" };
            report.add(11, Some(id), format!("is joined {what}"));
        }
    }
    if phase < Phase::Planned && !module.arenas.is_empty() {
        report.add(11, None, format!("there are arenas in phase {phase}"));
    }
    if phase < Phase::Lowered && !module.kernels.is_empty() {
        report.add(11, None, format!("there are kernels in phase {phase}"));
    }
    if phase == Phase::Lowered && module.target.is_none() {
        report.add(11, None, "a lowered module names its target");
    }
}

/// V12, and V9 for offsets. `versions` says of which states values are versions.
pub(super) fn places(module: &Module, scope: &Scope<'_>, versions: &Versions, report: &mut Report) {
    let (graph, types) = (&module.graph, &scope.types);
    let ends = [Bindings::minima(&module.dims), Bindings::maxima(&module.dims)];
    // Offset and type of places that were found good.
    let mut good: Dims<'_, ()> = Dims::new();
    let number = |arena: ArenaId, ty: TypeId| (arena.index() as u64) << 32 | u64::from(ty);
    for (id, value) in scope.values() {
        let Def::Node { node, .. } = value.def else {
            if value.place.is_some() {
                report.add(12, None, format!("input {id} has a place, but the caller owns it"));
            }
            continue;
        };
        let state = versions.of(id, graph.nodes.get(node));
        let node = Some(node);
        match &value.place {
            None => {}
            Some(Place::State(found)) if state == Some(*found) => {}
            Some(Place::State(_)) => report.add(12, node, format!("{id} is no version of that state")),
            Some(_) if state.is_some() => {
                report.add(12, node, format!("{id} is a version of a state and must live in it"));
            }
            Some(Place::Output(n)) if graph.outputs.get(*n).is_some_and(|o| o.value == id) => {}
            Some(Place::Output(n)) => report.add(12, node, format!("{id} is not output {n}")),
            Some(Place::Arena { arena, offset }) => match module.arenas.get(*arena) {
                None => report.add(12, node, format!("the arena of {id} does not exist")),
                Some(_) if !simple(offset) => {
                    report.add(3, node, format!("the offset of {id} is too complex"));
                }
                Some(_) if good.get(offset, number(*arena, types.value(id))).is_some() => {}
                Some(declared) => {
                    let before = report.found.len();
                    if !offset.is_monotone(&module.dims) {
                        report.add(
                            9,
                            node,
                            format!("offset {offset} of {id} does not grow with every symbol"),
                        );
                    }
                    if let Err(message) = fits(value, declared, offset, &ends) {
                        report.add(12, node, format!("{id} {message}"));
                    }
                    if report.found.len() == before {
                        good.remember(offset, number(*arena, types.value(id)), ());
                    }
                }
            },
        }
    }
}

/// Whether a value at `offset` is aligned and inside its arena, at both ends of every symbol's range.
fn fits(value: &Value, arena: &ArenaDecl, offset: &Dim, ends: &[Bindings; 2]) -> Result<(), String> {
    let ArenaDecl { name, size, align } = arena;
    if ends.iter().any(|at| offset.extent(at).is_none()) {
        return Err(format!("has the offset {offset}, which is negative or too large"));
    }
    // By form, so that every value between the ends is aligned as well.
    if !offset.coefficients_divisible(i64::try_from(*align).unwrap_or(i64::MAX)) {
        return Err(format!("has the offset {offset}, which is not aligned to {align}"));
    }
    let end = offset.add(&value.ty.bytes());
    let inside =
        |at: &Bindings| matches!((end.eval(at), size.eval(at)), (Some(end), Some(size)) if end <= size);
    if ends.iter().all(inside) {
        return Ok(());
    }
    Err(format!("ends at {end}, but arena {name} at {size}"))
}
