//! Rules about the graph: V5 structure, V6 operands, V7 order, V8 types, V10 states, V13 outputs, V14 names.

use std::fmt::Display;

use super::Report;
use super::scope::Scope;
use crate::arena::Id;
use crate::distinct::{Ops, TypeId};
use crate::graph::*;

/// V5 and the part of V14 that is about nodes, for every node; returns the position in the order of each.
fn definitions(module: &Module, report: &mut Report) -> Vec<u32> {
    let graph = &module.graph;
    let mut position: Vec<u32> = vec![u32::MAX; graph.nodes.bound()];
    for (at, id) in graph.order.iter().enumerate() {
        if !graph.nodes.contains(*id) {
            report.add(5, None, format!("the order names {id}, which does not exist"));
        } else if position[id.index()] != u32::MAX {
            report.add(5, Some(*id), "stands in the order twice");
        } else {
            position[id.index()] = at as u32;
        }
    }
    // Values that are what their node or the list of inputs says of them.
    let mut agreed = 0;
    for (id, node) in graph.nodes.iter() {
        if position[id.index()] == u32::MAX {
            report.add(5, Some(id), "is missing from the order");
        }
        if node.results.is_empty() {
            report.add(5, Some(id), "has no result");
        }
        for (index, result) in node.results.iter().enumerate() {
            let def = graph.values.get(*result).map(|v| &v.def);
            if matches!(def, Some(Def::Node { node, index: i }) if (*node, *i) == (id, index)) {
                agreed += 1;
            } else {
                report.add(5, Some(id), format!("{result} is not defined by this node"));
            }
        }
        if node.loc.iter().any(|l| l.is_empty()) {
            report.add(14, Some(id), "has an empty source name");
        }
    }
    let mut is_input = vec![false; graph.values.bound()];
    for input in &graph.inputs {
        match is_input.get_mut(input.index()) {
            Some(true) => report.add(5, None, format!("{input} is an input twice")),
            Some(slot) => {
                *slot = true;
                let def = graph.values.get(*input).map(|v| &v.def);
                agreed += usize::from(matches!(def, Some(Def::Input(_))));
            }
            None => {}
        }
    }
    let disputed = agreed != graph.values.len();
    for (id, value) in graph.values.iter().filter(|_| disputed) {
        let known = match &value.def {
            Def::Input(_) => is_input[id.index()],
            Def::Node { node, index } => {
                graph.nodes.get(*node).is_some_and(|n| n.results.get(*index) == Some(&id))
            }
        };
        if !known {
            report.add(5, None, format!("{id} is defined by nobody"));
        }
    }
    for input in &graph.inputs {
        if !matches!(graph.values.get(*input).map(|v| &v.def), Some(Def::Input(_))) {
            report.add(5, None, format!("{input} is no input"));
        }
    }
    position
}

pub(super) fn structure(module: &Module, scope: &Scope<'_>, report: &mut Report) {
    let graph = &module.graph;
    // Where copies are left out, nodes agree with their results and stand where their ids say.
    let position = (!scope.leaves_out()).then(|| definitions(module, report));
    let position_of = |node: NodeId| match &position {
        Some(position) => position.get(node.index()).copied(),
        None => Some(node.index() as u32),
    };
    for (id, node) in scope.nodes().filter(|_| scope.leaves_out()) {
        if node.results.is_empty() {
            report.add(5, Some(id), "has no result");
        }
        if node.loc.iter().any(|l| l.is_empty()) {
            report.add(14, Some(id), "has an empty source name");
        }
    }
    for output in &graph.outputs {
        if graph.values.get(output.value).is_none() {
            report.add(
                13,
                None,
                format!("output \"{}\" is {}, which does not exist", output.name, output.value),
            );
        }
    }
    if graph.outputs.is_empty() {
        report.add(13, None, "the graph has no output");
    }
    for (at, id) in scope.order() {
        let Some(node) = graph.nodes.get(id) else { continue };
        for operand in &node.operands {
            let missing: Option<&dyn Display> = match operand {
                Operand::Value(v) => (!graph.values.contains(*v)).then_some(v),
                Operand::Weight(w) => (!module.weights.contains(*w)).then_some(w),
                Operand::State(s) => (!module.states.contains(*s)).then_some(s),
            };
            if let Some(missing) = missing {
                report.add(6, Some(id), format!("{missing} does not exist"));
            }
            if let Operand::Value(v) = operand
                && let Some(Value { def: Def::Node { node, .. }, .. }) = graph.values.get(*v)
                && position_of(*node).is_none_or(|p| p as usize >= at)
            {
                report.add(7, Some(id), format!("{v} is used before it is defined"));
            }
        }
    }
}

pub(super) fn types(module: &Module, scope: &Scope<'_>, report: &mut Report) {
    let (graph, distinct) = (&module.graph, &scope.types);
    // Operand and result types of nodes that were found good, by op.
    let mut good: Ops<'_, (Vec<TypeId>, Vec<TypeId>)> = Ops::new();
    let (mut operands, mut results) = (Vec::new(), Vec::new());
    for (id, node) in scope.nodes() {
        operands.clear();
        operands.extend(node.operands.iter().map(|o| distinct.operand(*o)));
        results.clear();
        results.extend(node.results.iter().map(|r| distinct.value(*r)));
        if good.find(&node.op, |(o, r)| *o == operands && *r == results).is_some() {
            continue;
        }
        match node.op.infer(&module.operand_types(&node.operands)) {
            Err(message) => report.add(8, Some(id), format!("`{}` {message}", node.op.name())),
            Ok(inferred) => {
                let declared: Vec<_> = node.results.iter().map(|r| &graph.values[*r].ty).collect();
                if inferred.iter().ne(declared.iter().copied()) {
                    report.add(
                        8,
                        Some(id),
                        format!("results are declared {declared:?}, inferred {inferred:?}"),
                    );
                } else {
                    good.remember(&node.op, (operands.clone(), results.clone()));
                }
            }
        }
    }
}

/// The state that a value is a version of.
pub(super) struct Versions(Option<Vec<Option<StateId>>>);

impl Versions {
    /// The state that the first result of `node`, `value`, is a version of.
    pub(super) fn of(&self, value: ValueId, node: Option<&Node>) -> Option<StateId> {
        if let Some(versions) = &self.0 {
            return versions[value.index()];
        }
        // Only states themselves are written.
        let node = node.filter(|n| n.op.traits().writes_state && n.results.first() == Some(&value))?;
        if let Operand::State(state) = node.operands.first()? { Some(*state) } else { None }
    }
}

/// Checks V10.
///
/// The versions of a state are the state itself and the results of writes to one of its versions. The order is
/// known to be topological.
pub(super) fn states(module: &Module, scope: &Scope<'_>, report: &mut Report) -> Versions {
    if scope.states_written_once {
        return Versions(None);
    }
    let graph = &module.graph;
    let mut versions: Vec<Option<StateId>> = vec![None; graph.values.bound()];
    // Whether a node above has overwritten the version.
    let mut state_written: Vec<bool> = vec![false; module.states.bound()];
    let mut value_written: Vec<bool> = vec![false; graph.values.bound()];
    for id in &graph.order {
        let node = &graph.nodes[*id];
        let writes = node.op.traits().writes_state;
        for (at, operand) in node.operands.iter().enumerate() {
            let stale = match operand {
                Operand::State(s) => state_written[s.index()],
                Operand::Value(v) => value_written[v.index()],
                Operand::Weight(_) => false,
            };
            if stale && at == 0 && writes {
                report.add(10, Some(*id), "writes a version of a state that was overwritten before");
            } else if stale {
                report.add(10, Some(*id), "reads a version of a state that was overwritten before");
            }
        }
        if !writes {
            continue;
        }
        let (state, written) = match node.operands.first() {
            Some(Operand::State(s)) => (Some(*s), Some(&mut state_written[s.index()])),
            Some(Operand::Value(v)) => (versions[v.index()], Some(&mut value_written[v.index()])),
            Some(Operand::Weight(_)) | None => (None, None),
        };
        match (state, written, node.results.first()) {
            (Some(state), Some(written), Some(result)) => {
                *written = true;
                versions[result.index()] = Some(state);
            }
            _ => report.add(10, Some(*id), "writes something that is no version of a state"),
        }
        if node.operands.iter().skip(1).any(|o| Some(o) == node.operands.first()) {
            report.add(10, Some(*id), "reads the version of a state that it overwrites");
        }
    }
    Versions(Some(versions))
}
