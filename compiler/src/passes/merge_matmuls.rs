//! Matmuls of one operand become one with several results: q, k and v, gate and up.
//!
//! ```text
//! matmul.fused(x, @q), matmul.fused(x, @k)  ->  a, b = matmul.fused(x, concat(@q, @k)) {segments = [nq, nk]}
//! ```

use millrace_ir::names::WeightNames;
use millrace_ir::ops::FusedMatmul;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::{
    Id, Module, Node, NodeId, Op, Operand, Phase, Result, TensorType, Value, Weight, WeightExpr, WeightId,
};

use crate::pass::{Context, Pass};

/// See the module.
pub(super) struct MergeMatmuls;

impl Pass for MergeMatmuls {
    fn name(&self) -> &'static str {
        "merge-matmuls"
    }
    fn help(&self) -> &'static str {
        "merges matmuls that share their operand (q/k/v, gate/up) into one with several results"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Fused, Phase::Fused)
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let mut by_operand: Vec<Vec<NodeId>> = vec![Vec::new(); module.graph.values.bound()];
        for id in &module.graph.order {
            let node = &module.graph.nodes[*id];
            if let (Op::FusedMatmul(_), Some(Operand::Value(x))) = (&*node.op, node.operands.first()) {
                by_operand[x.index()].push(*id);
            }
        }
        let mut merged = 0;
        let mut names = WeightNames::of(module);
        let mut places = vec![usize::MAX; module.graph.nodes.bound()];
        module.graph.order.iter().enumerate().for_each(|(at, id)| places[id.index()] = at);
        for group in by_operand.into_iter().filter(|g| g.len() > 1) {
            let (mut plain, mut reasons) = (Vec::new(), Vec::new());
            for id in group {
                match not_plain(module, id) {
                    None => plain.push(id),
                    Some(reason) => reasons.push((id, reason)),
                }
            }
            // Those that agree merge; what differs from the first of the group says why it does not join it.
            let mut alike: Vec<Vec<NodeId>> = Vec::new();
            for id in plain {
                match alike.iter_mut().find(|a| difference(module, a[0], id).is_none()) {
                    Some(group) => group.push(id),
                    None => {
                        let first = alike.first().and_then(|a| difference(module, a[0], id));
                        reasons.extend(first.map(|reason| (id, reason)));
                        alike.push(vec![id]);
                    }
                }
            }
            for (id, reason) in reasons {
                context.blocked(self.name(), &module.graph, id, &reason);
            }
            for group in alike.into_iter().filter(|a| a.len() > 1) {
                if context.allow(self.name(), &module.graph, group[0]) {
                    merge(module, &mut names, &places, &group)?;
                    merged += 1;
                }
            }
        }
        let Module { graph, .. } = module;
        graph.order.retain(|id| graph.nodes.get(*id).is_some());
        context.count("merge-matmuls.merged", merged);
        Ok(merged > 0)
    }
}

/// Why a fused matmul merges with no other.
fn not_plain(module: &Module, id: NodeId) -> Option<String> {
    let node = &module.graph.nodes[id];
    let Op::FusedMatmul(fused) = &*node.op else { return Some("it is no fused matmul".into()) };
    if !fused.plain() {
        return Some("its weight is packed already".into());
    }
    if fused.segments.len() != 1 {
        return Some("it has several results already".into());
    }
    if fused.epilogue.iter().any(|e| *e != Epilogue::Bias) {
        return Some("its epilogue is more than a bias".into());
    }
    let constant = node.operands[1..].iter().all(|o| matches!(o, Operand::Weight(_)));
    (!constant).then(|| "its weight or bias is computed during the step".into())
}

/// What keeps two plain fused matmuls of one operand apart. Their weights have the operand's element type.
fn difference(module: &Module, first: NodeId, other: NodeId) -> Option<String> {
    let facts = |id: NodeId| {
        let node = &module.graph.nodes[id];
        (node.operands.len() > 2, module.graph.values[node.results[0]].ty.dtype)
    };
    let (a, b) = (facts(first), facts(other));
    let has = |bias: bool| if bias { "a bias" } else { "no bias" };
    if a.0 != b.0 {
        return Some(format!("it has {}, {first} has {}", has(b.0), has(a.0)));
    }
    (a.1 != b.1).then(|| format!("its result is {}, that of {first} is {}", b.1, a.1))
}

/// The weights at operand `index` of all nodes joined along their rows.
fn join(module: &mut Module, names: &mut WeightNames, group: &[NodeId], index: usize) -> Option<WeightId> {
    let parts: Vec<WeightId> =
        group
            .iter()
            .map(|id| {
                if let Operand::Weight(w) = module.graph.nodes[*id].operands[index] { Some(w) } else { None }
            })
            .collect::<Option<_>>()?;
    let joined: Vec<&str> = parts.iter().map(|w| module.weights[*w].name.as_str()).collect();
    let name = joined.join("+");
    Some(names.get_or_add(module, &name.clone(), |module| {
        let mut shape = module.weights[parts[0]].ty.shape.clone();
        for part in &parts[1..] {
            shape[0] = shape[0].add(&module.weights[*part].ty.shape[0]);
        }
        let ty = TensorType { dtype: module.weights[parts[0]].ty.dtype, shape };
        Weight { name, ty, expr: WeightExpr::Concat { axis: 0, parts: parts.into() }, stream: None }
    }))
}

/// Replaces the group's nodes by one; its other nodes stay in the order for the caller to drop.
fn merge(module: &mut Module, names: &mut WeightNames, places: &[usize], group: &[NodeId]) -> Result<()> {
    let Op::FusedMatmul(first) = (*module.graph.nodes[group[0]].op).clone() else { return Ok(()) };
    let segments = group
        .iter()
        .filter_map(|id| {
            if let Op::FusedMatmul(f) = &*module.graph.nodes[*id].op { Some(f.segments[0]) } else { None }
        })
        .collect();
    let Some(weight) = join(module, names, group, 1) else { return Ok(()) };
    let mut operands = vec![module.graph.nodes[group[0]].operands[0], Operand::Weight(weight)];
    if !first.epilogue.is_empty() {
        let Some(bias) = join(module, names, group, 2) else { return Ok(()) };
        operands.push(Operand::Weight(bias));
    }
    let mut loc: Vec<_> = group.iter().flat_map(|id| module.graph.nodes[*id].loc.clone()).collect();
    loc.sort();
    loc.dedup();
    let new = module.new_node(FusedMatmul { segments, ..first }, operands, loc)?;
    // The first node of the group gives its place; its neighbours' values move to the new node.
    if let Some(slot) = places.get(group[0].index()).and_then(|at| module.graph.order.get_mut(*at)) {
        *slot = new;
    }
    for (index, id) in group.iter().enumerate() {
        let Node { results, .. } = module.graph.nodes[*id].clone();
        let to = module.graph.nodes[new].results[index];
        // Keep the old value ids, so that users need no change.
        module.graph.values.remove(to);
        if let Some(Value { def, .. }) = module.graph.values.get_mut(results[0]) {
            *def = millrace_ir::Def::Node { node: new, index };
        }
        module.graph.nodes[new].results[index] = results[0];
        module.graph.nodes.remove(*id);
    }
    Ok(())
}
