//! Nodes nobody needs vanish: what remains reaches an output or writes a state.

use millrace_ir::{Graph, Id, Module, NodeId, Operand, Phase, Result};

use crate::pass::{Context, Pass};

/// Which nodes reach an output or write a state, by index.
pub(super) fn live(graph: &Graph) -> Vec<bool> {
    let mut live = vec![false; graph.nodes.bound()];
    let mut work: Vec<NodeId> = graph.outputs.iter().filter_map(|o| graph.def_node(o.value)).collect();
    work.extend(graph.nodes.iter().filter(|(_, n)| n.op.traits().writes_state).map(|(id, _)| id));
    while let Some(id) = work.pop() {
        if !std::mem::replace(&mut live[id.index()], true) {
            let operands = graph.nodes[id].operands.iter();
            work.extend(
                operands.filter_map(|o| if let Operand::Value(v) = o { graph.def_node(*v) } else { None }),
            );
        }
    }
    live
}

/// See the module.
pub(super) struct Dce;

impl Pass for Dce {
    fn name(&self) -> &'static str {
        "dce"
    }
    fn help(&self) -> &'static str {
        "removes nodes that reach no output and write no state"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Scheduled)
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let graph = &mut module.graph;
        let live = live(graph);
        let before = graph.order.len();
        graph.order.retain(|id| live[id.index()]);
        let dead: Vec<NodeId> = graph.nodes.ids().filter(|id| !live[id.index()]).collect();
        dead.iter().for_each(|id| graph.remove_node(*id));
        context.count("dce.removed", dead.len() as u64);
        Ok(graph.order.len() != before)
    }
}
