//! Matmul weights are stored in the order the target's kernel reads them.
//!
//! ```text
//! matmul.fused(x, @w)  ->  matmul.fused(x, pack(@w)) {panel = 32}
//! ```

use millrace_ir::names::WeightNames;
use millrace_ir::ops::FusedMatmul;
use millrace_ir::{Id, Module, Op, Operand, Phase, Result, TensorType, Weight, WeightExpr};

use crate::pass::{Context, Pass};

/// See the module.
pub(super) struct PackWeights;

impl Pass for PackWeights {
    fn name(&self) -> &'static str {
        "pack-weights"
    }
    fn help(&self) -> &'static str {
        "stores matmul weights in the panel order of the target's kernels"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Fused, Phase::Fused)
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let panel = context.panel;
        if panel == 0 {
            return Ok(false);
        }
        let mut packed = 0;
        let mut names = WeightNames::of(module);
        let unpacked = read_unpacked(module);
        for id in module.graph.order.clone() {
            let node = &module.graph.nodes[id];
            let Some(&Operand::Weight(of)) = node.operands.get(1) else {
                if matches!(node.op, Op::FusedMatmul(_)) {
                    context.blocked(self.name(), &module.graph, id, "the weight is computed during the step");
                }
                continue;
            };
            if matches!(node.op, Op::Matmul(_)) {
                context.blocked(self.name(), &module.graph, id, "the matmul is not fused");
                continue;
            }
            let Op::FusedMatmul(fused) = &node.op else { continue };
            if fused.panel != 0 || !context.allow(self.name(), &module.graph, id) {
                continue;
            }
            let new_op = FusedMatmul { panel, ..fused.clone() };
            let segments = fused.segments.clone();
            let suffix: Vec<String> = segments.iter().map(ToString::to_string).collect();
            let name = format!("{}.pack{panel}.{}", module.weights[of].name, suffix.join("-"));
            let weight = names.get_or_add(module, &name.clone(), |module| {
                let panels: usize = segments.iter().map(|s| s.div_ceil(panel)).sum();
                let source = &module.weights[of].ty;
                let shape = vec![panels.into(), source.shape[1].clone(), panel.into()];
                let ty = TensorType { dtype: source.dtype, shape };
                let expr = WeightExpr::Pack { panel, segments, of };
                Weight { name, ty, expr, stream: None }
            });
            if unpacked[of.index()] {
                let said = format!("packs a copy: @{} is read as it is elsewhere", module.weights[of].name);
                context.remark(self.name(), &module.graph, id, said);
            }
            let node = &mut module.graph.nodes[id];
            node.op = new_op.into();
            node.operands[1] = Operand::Weight(weight);
            packed += 1;
        }
        context.count("pack-weights.packed", packed);
        Ok(packed > 0)
    }
}

/// The weights that some node reads otherwise than as the weight of a fused matmul: an embedding table that is the
/// output projection as well.
fn read_unpacked(module: &Module) -> Vec<bool> {
    let mut unpacked = vec![false; module.weights.bound()];
    for (_, node) in module.graph.nodes.iter() {
        for (index, operand) in node.operands.iter().enumerate() {
            if let Operand::Weight(w) = operand
                && !(index == 1 && matches!(node.op, Op::FusedMatmul(_)))
            {
                unpacked[w.index()] = true;
            }
        }
    }
    unpacked
}
