//! Nodes that read only weights become weight expressions; small ones that need no file become literals.

use millrace_ir::names::WeightNames;
use millrace_ir::ops::EvalCtx;
use millrace_ir::ops::movement::Slice;
use millrace_ir::{
    Bindings, Id, Module, Node, NodeId, Op, Operand, Phase, Result, TensorType, Weight, WeightExpr, WeightId,
};

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
        let live = super::dce::live(&module.graph);
        let mut names: Option<WeightNames> = None;
        for id in order {
            for operand in &mut module.graph.nodes[id].operands {
                if let Operand::Value(v) = operand
                    && let Some(weight) = folded[v.index()]
                {
                    *operand = Operand::Weight(weight);
                }
            }
            let Some(parts) = constants(&module.graph.nodes[id]).filter(|_| live[id.index()]) else {
                continue;
            };
            let folds = if module.graph.nodes[id].results.iter().any(|r| outputs[r.index()]) {
                Err("the result is an output of the graph".to_string())
            } else {
                fold(module, context, id, &parts)
            };
            let (ty, expr) = match folds {
                Ok(folded) => folded,
                // A node without operands is no constant expression that somebody wrote.
                Err(_) if parts.is_empty() => continue,
                Err(reason) => {
                    context.blocked_once(self.name(), &module.graph, id, &reason);
                    continue;
                }
            };
            if context.allow(self.name(), &module.graph, id) {
                let result = module.graph.nodes[id].results[0];
                let name = base_name(module, id);
                let names = names.get_or_insert_with(|| WeightNames::of(module));
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

/// The operands of a node that reads only weights.
fn constants(node: &Node) -> Option<Vec<WeightId>> {
    node.operands.iter().map(|o| if let Operand::Weight(w) = o { Some(*w) } else { None }).collect()
}

/// Type and expression of the node's result, or why it has none.
fn fold(
    module: &Module,
    context: &mut Context,
    id: NodeId,
    parts: &[WeightId],
) -> std::result::Result<(TensorType, WeightExpr), String> {
    let node = &module.graph.nodes[id];
    let [result] = node.results[..] else { return Err("the node has several results".into()) };
    let ty = module.graph.values[result].ty.clone();
    if ty.const_shape().is_none() {
        return Err(format!("the shape of {ty} is known at run time only"));
    }
    let by_bytes = ty.dtype.size_bytes().is_some()
        && parts.iter().all(|p| module.weights[*p].ty.dtype.size_bytes().is_some());
    let expr = match (&*node.op, parts) {
        (Op::Transpose(t), [of]) if by_bytes => WeightExpr::Transpose { perm: t.perm.clone(), of: *of },
        (Op::Reshape(_), [of]) if by_bytes => WeightExpr::Reshape { of: *of },
        (Op::Cast(_), [of]) if by_bytes => WeightExpr::Cast { of: *of },
        // Literals can be looked into: masks and angles are recognised by them.
        (Op::Slice(s), [of]) if by_bytes && s.step == 1 => {
            match (literal(module, context, id, parts, &ty), slice(s, *of)) {
                (Err(_), Some(slice)) => slice,
                (literal, _) => literal?,
            }
        }
        (Op::Concat(c), [_, ..]) if by_bytes => WeightExpr::Concat { axis: c.axis, parts: parts.into() },
        _ => literal(module, context, id, parts, &ty)?,
    };
    Ok((ty, expr))
}

/// A cut with constant bounds.
fn slice(slice: &Slice, of: WeightId) -> Option<WeightExpr> {
    let start = usize::try_from(slice.start.as_const()?).ok()?;
    let end = usize::try_from(slice.end.as_const()?).ok()?;
    Some(WeightExpr::Slice { axis: slice.axis, start, len: end.checked_sub(start)?, of })
}

/// The value of a small node whose weights need no file, or why there is none.
fn literal(
    module: &Module,
    context: &mut Context,
    id: NodeId,
    parts: &[WeightId],
    ty: &TensorType,
) -> std::result::Result<WeightExpr, String> {
    let node = &module.graph.nodes[id];
    let name = node.op.name();
    let large = |ty: &TensorType| {
        !ty.elements().as_const().is_some_and(|n| (0..=WeightExpr::DENSE_LIMIT as i64).contains(&n))
    };
    if node.op.traits().fused_only {
        return Err(format!("{name} runs in kernels only"));
    }
    let mut types = parts.iter().map(|p| &module.weights[*p].ty).chain([ty]);
    if let Some(ty) = types.find(|ty| large(ty)) {
        return Err(format!("{ty} has more than the {} elements of a literal", WeightExpr::DENSE_LIMIT));
    }
    let mut tensors = Vec::with_capacity(parts.len());
    for part in parts {
        let missing = |_| format!("{name} of @{}, whose values are in a file", module.weights[*part].name);
        tensors.push(context.numbers(module, *part).map_err(missing)?);
    }
    let refs: Vec<_> = tensors.iter().collect();
    let results = [ty.clone()];
    let context = EvalCtx { operands: &refs, results: &results, bindings: &Bindings::new() };
    let value = node.op.eval(&context).ok().and_then(|results| results.into_iter().next());
    let mut value = value.ok_or_else(|| format!("{name} cannot be evaluated on these values"))?;
    value.round();
    Ok(match value.data.first() {
        Some(first) if value.data.iter().all(|v| v == first) => WeightExpr::Splat(*first),
        _ => WeightExpr::Dense(value.data),
    })
}
