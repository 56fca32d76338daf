//! Nodes that read only weights become weight expressions; small ones that need no file become literals.

use millrace_ir::names::WeightNames;
use millrace_ir::ops::EvalCtx;
use millrace_ir::ops::movement::Slice;
use millrace_ir::weights::WeightReader;
use millrace_ir::{Bindings, Id, Module, NodeId, Op, Operand, Phase, Result, Weight, WeightExpr, WeightId};

use super::BEFORE_FUSION;
use crate::pass::{Context, Pass};

/// See the module.
pub(super) struct ConstFold;

impl Pass for ConstFold {
    fn name(&self) -> &'static str {
        "const-fold"
    }
    fn help(&self) -> &'static str {
        "turns nodes that read only weights into weight expressions"
    }
    fn phases(&self) -> (Phase, Phase) {
        BEFORE_FUSION
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let mut folded: Vec<Option<WeightId>> = vec![None; module.graph.values.bound()];
        let mut count = 0;
        let order = module.graph.order.clone();
        let mut outputs = vec![false; module.graph.values.bound()];
        module.graph.outputs.iter().for_each(|o| outputs[o.value.index()] = true);
        let mut names = WeightNames::of(module);
        for id in order {
            for operand in &mut module.graph.nodes[id].operands {
                if let Operand::Value(v) = operand
                    && let Some(weight) = folded[v.index()]
                {
                    *operand = Operand::Weight(weight);
                }
            }
            if module.graph.nodes[id].results.iter().any(|r| outputs[r.index()]) {
                continue;
            }
            if let Some((ty, expr)) = fold(module, id)
                && context.allow(self.name(), &module.graph, id)
            {
                let result = module.graph.nodes[id].results[0];
                let name = base_name(module, id);
                let weight = names.add(module, Weight { name, ty, expr, stream: None });
                folded[result.index()] = Some(weight);
                count += 1;
            }
        }
        context.count("const-fold.folded", count);
        if count > 0 {
            module
                .graph
                .order
                .retain(|id| !module.graph.nodes[*id].results.iter().any(|r| folded[r.index()].is_some()));
            let mut live = vec![false; module.graph.nodes.bound()];
            module.graph.order.iter().for_each(|n| live[n.index()] = true);
            let dead: Vec<NodeId> = module.graph.nodes.ids().filter(|n| !live[n.index()]).collect();
            dead.into_iter().for_each(|n| module.graph.remove_node(n));
        }
        Ok(count > 0)
    }
}

fn base_name(module: &Module, id: NodeId) -> String {
    let node = &module.graph.nodes[id];
    node.loc.first().map_or_else(|| "folded".to_string(), |l| format!("{l}.{}", node.op.name()))
}

fn fold(module: &Module, id: NodeId) -> Option<(millrace_ir::TensorType, WeightExpr)> {
    let node = &module.graph.nodes[id];
    let [result] = node.results[..] else { return None };
    let ty = module.graph.values[result].ty.clone();
    ty.const_shape()?;
    let parts: Option<Vec<WeightId>> =
        node.operands.iter().map(|o| if let Operand::Weight(w) = o { Some(*w) } else { None }).collect();
    let parts = parts?;
    let by_bytes = ty.dtype.size_bytes().is_some()
        && parts.iter().all(|p| module.weights[*p].ty.dtype.size_bytes().is_some());
    let expr = match (&node.op, parts.as_slice()) {
        (Op::Transpose(t), [of]) if by_bytes => Some(WeightExpr::Transpose { perm: t.perm.clone(), of: *of }),
        (Op::Reshape(_), [of]) if by_bytes => Some(WeightExpr::Reshape { of: *of }),
        (Op::Cast(_), [of]) if by_bytes => Some(WeightExpr::Cast { of: *of }),
        // Literals can be looked into: masks and angles are recognised by them.
        (Op::Slice(s), [of]) if by_bytes && s.step == 1 => {
            literal(module, id, &parts, &ty).or_else(|| slice(s, *of))
        }
        (Op::Concat(c), [_, ..]) if by_bytes => {
            Some(WeightExpr::Concat { axis: c.axis, parts: parts.clone() })
        }
        _ => None,
    };
    expr.or_else(|| literal(module, id, &parts, &ty)).map(|expr| (ty, expr))
}

/// A cut with constant bounds.
fn slice(slice: &Slice, of: WeightId) -> Option<WeightExpr> {
    let start = usize::try_from(slice.start.as_const()?).ok()?;
    let end = usize::try_from(slice.end.as_const()?).ok()?;
    Some(WeightExpr::Slice { axis: slice.axis, start, len: end.checked_sub(start)?, of })
}

/// The value of a small node whose weights need no file.
fn literal(
    module: &Module,
    id: NodeId,
    parts: &[WeightId],
    ty: &millrace_ir::TensorType,
) -> Option<WeightExpr> {
    let node = &module.graph.nodes[id];
    let small = |ty: &millrace_ir::TensorType| {
        ty.elements().as_const().is_some_and(|n| (0..=WeightExpr::DENSE_LIMIT as i64).contains(&n))
    };
    if !small(ty) || !parts.iter().all(|p| small(&module.weights[*p].ty)) || node.op.traits().fused_only {
        return None;
    }
    let mut reader = WeightReader::new(module);
    // A part that needs a file has no source here and ends the attempt.
    let tensors: Vec<_> = parts.iter().map(|p| reader.tensor(*p).ok()).collect::<Option<_>>()?;
    let refs: Vec<_> = tensors.iter().collect();
    let results = [ty.clone()];
    let context = EvalCtx { operands: &refs, results: &results, bindings: &Bindings::new() };
    let mut value = node.op.eval(&context).ok()?.into_iter().next()?;
    value.round();
    match value.data.first() {
        Some(first) if value.data.iter().all(|v| v == first) => Some(WeightExpr::Splat(*first)),
        _ => Some(WeightExpr::Dense(value.data)),
    }
}
