//! Equal nodes (same op, same operands) become one. State writes stay.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use millrace_ir::{Id, Module, Node, NodeId, Operand, Phase, Result, ValueId};
use smallvec::SmallVec;

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
        // Nodes by a fingerprint of op name and operands, which the lookup compares in full.
        let mut known: HashMap<u64, SmallVec<[NodeId; 1]>> = HashMap::with_capacity(graph.order.len());
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
            let equal = known.entry(fingerprint(node)).or_default();
            let same = |first: &&NodeId| {
                let first = &graph.nodes[**first];
                first.operands == node.operands && first.op == node.op
            };
            match equal.iter().find(same) {
                None => equal.push(id),
                Some(first) => {
                    if !context.allow(self.name(), graph, id) {
                        continue;
                    }
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

fn fingerprint(node: &Node) -> u64 {
    let mut hasher = DefaultHasher::new();
    node.op.name().hash(&mut hasher);
    node.operands.hash(&mut hasher);
    hasher.finish()
}
