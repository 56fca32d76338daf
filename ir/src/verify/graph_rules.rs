//! Rules about the graph: V5 structure, V6 operands, V7 order, V8 types, V10 states, V13 outputs, V14 names.

use super::Report;
use crate::arena::Id;
use crate::graph::*;

pub(super) fn structure(module: &Module, report: &mut Report) {
    let graph = &module.graph;
    let mut position: Vec<Option<usize>> = vec![None; graph.nodes.bound()];
    for (at, id) in graph.order.iter().enumerate() {
        match graph.nodes.get(*id) {
            None => report.add(5, None, format!("the order names {id}, which does not exist")),
            Some(_) if position[id.index()].is_some() => {
                report.add(5, Some(*id), "stands in the order twice")
            }
            Some(_) => position[id.index()] = Some(at),
        }
    }
    for (id, node) in graph.nodes.iter() {
        if position[id.index()].is_none() {
            report.add(5, Some(id), "is missing from the order");
        }
        if node.results.is_empty() {
            report.add(5, Some(id), "has no result");
        }
        for (index, result) in node.results.iter().enumerate() {
            let def = graph.values.get(*result).map(|v| &v.def);
            if def != Some(&(Def::Node { node: id, index })) {
                report.add(5, Some(id), format!("{result} is not defined by this node"));
            }
        }
        if node.loc.iter().any(|l| l.is_empty()) {
            report.add(14, Some(id), "has an empty source name");
        }
    }
    for (id, value) in graph.values.iter() {
        let known = match &value.def {
            Def::Input(_) => graph.inputs.contains(&id),
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
    for (at, id) in graph.order.iter().enumerate() {
        let Some(node) = graph.nodes.get(*id) else { continue };
        for operand in &node.operands {
            let exists = match operand {
                Operand::Value(v) => graph.values.get(*v).is_some(),
                Operand::Weight(w) => module.weights.get(*w).is_some(),
                Operand::State(s) => module.states.get(*s).is_some(),
            };
            if !exists {
                report.add(6, Some(*id), format!("{operand:?} does not exist"));
            }
            if let Operand::Value(v) = operand
                && let Some(Value { def: Def::Node { node, .. }, .. }) = graph.values.get(*v)
                && position.get(node.index()).copied().flatten().is_none_or(|p| p >= at)
            {
                report.add(7, Some(*id), format!("{v} is used before it is defined"));
            }
        }
    }
}

pub(super) fn types(module: &Module, report: &mut Report) {
    let graph = &module.graph;
    for (id, node) in graph.nodes.iter() {
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
                }
            }
        }
    }
}

/// A version of a state: the state itself or the result of a write.
pub(super) fn states(module: &Module, report: &mut Report) {
    let graph = &module.graph;
    // The writer of each version, and the last reader of it.
    let mut state_writer: Vec<Option<usize>> = vec![None; module.states.bound()];
    let mut value_writer: Vec<Option<usize>> = vec![None; graph.values.bound()];
    let writes = |id: &NodeId| graph.nodes[*id].op.traits().writes_state;
    for (at, id) in graph.order.iter().enumerate().filter(|(_, id)| writes(id)) {
        let slot = match graph.nodes[*id].operands.first() {
            Some(Operand::State(s)) => &mut state_writer[s.index()],
            Some(operand @ Operand::Value(v)) if module.state_of(*operand).is_some() => {
                &mut value_writer[v.index()]
            }
            _ => {
                report.add(10, Some(*id), "writes something that is no state");
                continue;
            }
        };
        if slot.replace(at).is_some() {
            report.add(10, Some(*id), "writes a version of a state that is written already");
        }
    }
    for (at, id) in graph.order.iter().enumerate() {
        for operand in &graph.nodes[*id].operands {
            let writer = match operand {
                Operand::State(s) => state_writer[s.index()],
                Operand::Value(v) => value_writer[v.index()],
                Operand::Weight(_) => None,
            };
            if writer.is_some_and(|w| w < at) {
                report.add(10, Some(*id), "reads a version of a state that was overwritten before");
            }
        }
    }
}
