//! Rules about phases (V11) and places (V12).

use super::Report;
use crate::arena::Id;
use crate::dim::{Bindings, Dim};
use crate::graph::*;

pub(super) fn phases(module: &Module, report: &mut Report) {
    let phase = module.phase;
    let graph = &module.graph;
    for (id, node) in graph.nodes.iter() {
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

pub(super) fn places(module: &Module, report: &mut Report) {
    let graph = &module.graph;
    let (minima, maxima) = (Bindings::minima(&module.dims), Bindings::maxima(&module.dims));
    let mut outputs: Vec<Option<usize>> = vec![None; graph.values.bound()];
    for (n, output) in graph.outputs.iter().enumerate() {
        outputs[output.value.index()].get_or_insert(n);
    }
    for (id, value) in graph.values.iter() {
        let Def::Node { node, .. } = value.def else {
            if value.place.is_some() {
                report.add(12, None, format!("input {id} has a place, but the caller owns it"));
            }
            continue;
        };
        let state = module.state_of(Operand::Value(id));
        match &value.place {
            None => {}
            Some(Place::State(found)) if state == Some(*found) => {}
            Some(Place::State(_)) => report.add(12, Some(node), format!("{id} is no version of that state")),
            Some(_) if state.is_some() => report.add(12, Some(node), format!("{id} is a version of a state")),
            Some(Place::Output(n)) if graph.outputs.get(*n).is_some_and(|o| o.value == id) => {}
            Some(Place::Output(n)) => report.add(12, Some(node), format!("{id} is not output {n}")),
            Some(Place::Arena { arena, offset }) => {
                let Some(arena) = module.arenas.get(*arena) else {
                    report.add(12, Some(node), format!("the arena of {id} does not exist"));
                    continue;
                };
                if !offset.is_monotone(&module.dims) {
                    report.add(9, Some(node), format!("offset {offset} does not grow with every symbol"));
                }
                let end = offset.add(&value.ty.bytes());
                for bindings in [&minima, &maxima] {
                    let aligned = offset.extent(bindings).is_some_and(|o| o.is_multiple_of(arena.align));
                    if !aligned {
                        report.add(
                            12,
                            Some(node),
                            format!("offset {offset} of {id} is not aligned to {}", arena.align),
                        );
                        break;
                    }
                    let inside = matches!((end.eval(bindings), arena.size.eval(bindings)), (Some(e), Some(s)) if e <= s);
                    if !inside {
                        report.add(
                            12,
                            Some(node),
                            format!("{id} ends at {end}, outside arena {}", arena.name),
                        );
                        break;
                    }
                }
                if !aligned_by_form(offset, arena.align) {
                    report.add(
                        12,
                        Some(node),
                        format!("offset {offset} of {id} is not a multiple of {}", arena.align),
                    );
                }
            }
        }
    }
}

/// Whether every coefficient is a multiple, or the form has functions, whose values were checked at both ends.
fn aligned_by_form(offset: &Dim, align: u64) -> bool {
    offset.coefficients_divisible(align as i64)
}
