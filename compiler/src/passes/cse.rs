//! Equal nodes (same op, same operands) become one. State writes stay.

use std::collections::BTreeMap;

use millrace_ir::{Id, Module, NodeId, Operand, Phase, Result, ValueId};

use super::BEFORE_FUSION;
use crate::pass::{Context, Pass};

/// See the module.
pub(super) struct Cse;

impl Pass for Cse {
    fn name(&self) -> &'static str {
        "cse"
    }
    fn help(&self) -> &'static str {
        "merges nodes with the same op and operands"
    }
    fn phases(&self) -> (Phase, Phase) {
        BEFORE_FUSION
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let graph = &mut module.graph;
        // Nodes by op name and operands; those of one entry differ in their parameters.
        let mut known: BTreeMap<(&'static str, Vec<Operand>), Vec<NodeId>> = BTreeMap::new();
        let mut renamed: Vec<Option<ValueId>> = vec![None; graph.values.bound()];
        let mut removed = Vec::new();
        for id in graph.order.clone() {
            for operand in &mut graph.nodes[id].operands {
                if let Operand::Value(v) = operand
                    && let Some(new) = renamed[v.index()]
                {
                    *v = new;
                }
            }
            let node = &graph.nodes[id];
            // A state read depends on when it happens, which the operands of a later version express.
            if node.op.traits().writes_state {
                continue;
            }
            let equal = known.entry((node.op.name(), node.operands.clone())).or_default();
            match equal.iter().find(|first| graph.nodes[**first].op == node.op) {
                None => equal.push(id),
                Some(first) => {
                    let pairs: Vec<_> = graph.nodes[id]
                        .results
                        .iter()
                        .copied()
                        .zip(graph.nodes[*first].results.iter().copied())
                        .collect();
                    for (old, new) in pairs {
                        renamed[old.index()] = Some(new);
                        graph.outputs.iter_mut().filter(|o| o.value == old).for_each(|o| o.value = new);
                    }
                    let mut loc = graph.nodes[*first].loc.clone();
                    loc.extend(graph.nodes[id].loc.iter().cloned());
                    loc.sort();
                    loc.dedup();
                    graph.nodes[*first].loc = loc;
                    removed.push(id);
                }
            }
        }
        let gone: std::collections::BTreeSet<NodeId> = removed.iter().copied().collect();
        graph.order.retain(|id| !gone.contains(id));
        removed.iter().for_each(|id| graph.remove_node(*id));
        context.count("cse.merged", removed.len() as u64);
        Ok(!removed.is_empty())
    }
}
