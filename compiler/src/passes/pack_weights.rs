//! Matmul weights are stored in the order the target's kernel reads them.
//!
//! ```text
//! matmul.fused(x, @w)  ->  matmul.fused(x, pack(@w)) {panel = 32}      for processors
//! matmul.fused(x, @w)  ->  matmul.fused(x, cores(@w)) {cores = true}   for GPUs, 16-bit elements
//! ```

use millrace_ir::names::WeightNames;
use millrace_ir::ops::FusedMatmul;
use millrace_ir::{
    DType, Dim, Id, Module, Op, Operand, Phase, Result, TensorType, Weight, WeightExpr, WeightId,
};

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
        if context.panel == 0 && !context.cores {
            return Ok(false);
        }
        let mut packed = 0;
        let mut names = WeightNames::of(module);
        let unpacked = read_unpacked(module);
        for id in module.graph.order.clone() {
            let node = &module.graph.nodes[id];
            let Some(&Operand::Weight(of)) = node.operands.get(1) else {
                if matches!(*node.op, Op::FusedMatmul(_)) {
                    context.blocked(self.name(), &module.graph, id, "the weight is computed during the step");
                }
                continue;
            };
            if matches!(*node.op, Op::Matmul(_)) {
                context.blocked(self.name(), &module.graph, id, "the matmul is not fused");
                continue;
            }
            let Op::FusedMatmul(fused) = &*node.op else { continue };
            if !fused.plain() {
                continue;
            }
            let packing = Packing { cores: context.cores, panel: context.panel, of };
            if let Err(reason) = packing.takes(&module.weights[of].ty) {
                context.blocked(self.name(), &module.graph, id, reason);
                continue;
            }
            if !context.allow(self.name(), &module.graph, id) {
                continue;
            }
            let (new_op, name) = packing.apply(fused, &module.weights[of].name);
            let weight = names.get_or_add(module, &name.clone(), |module| {
                packing.weight(&new_op, name, &module.weights[of].ty)
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

/// How a matmul's weight is stored.
struct Packing {
    cores: bool,
    panel: usize,
    of: WeightId,
}

impl Packing {
    /// Why a weight of this type stays as it is.
    fn takes(&self, ty: &TensorType) -> std::result::Result<(), &'static str> {
        if !self.cores {
            return Ok(());
        }
        if !matches!(ty.dtype, DType::BF16 | DType::F16) {
            return Err("only 16-bit elements are stored in cores");
        }
        match ty.last().as_const() {
            Some(k) if k % 8 == 0 => Ok(()),
            _ => Err("rows of cores are multiples of 8"),
        }
    }

    /// The op with the packed weight, and the weight's name.
    fn apply(&self, fused: &FusedMatmul, name: &str) -> (FusedMatmul, String) {
        let suffix: Vec<String> = fused.segments.iter().map(ToString::to_string).collect();
        let suffix = suffix.join("-");
        if self.cores {
            let alternate = if fused.glu().is_some() { ".glu" } else { "" };
            let op = FusedMatmul { cores: true, ..fused.clone() };
            return (op, format!("{name}.cores.{suffix}{alternate}"));
        }
        let panel = self.panel;
        (FusedMatmul { panel, ..fused.clone() }, format!("{name}.pack{panel}.{suffix}"))
    }

    fn weight(&self, op: &FusedMatmul, name: String, source: &TensorType) -> Weight {
        let segments = op.segments.clone();
        let panels = |rows: usize| Dim::from(segments.iter().map(|s| s.div_ceil(rows)).sum::<usize>());
        let columns = source.last();
        let (shape, expr) = if self.cores {
            // `takes` has seen that the columns are a multiple of 8.
            let eight = Dim::from(8usize);
            let shape = vec![panels(8), columns.ceil_div(8), eight.clone(), eight];
            let alternate = op.glu().is_some();
            (shape, WeightExpr::Cores { segments: segments.clone(), alternate, of: self.of })
        } else {
            let shape = vec![panels(self.panel), columns, Dim::from(self.panel)];
            (shape, WeightExpr::Pack { panel: self.panel, segments: segments.clone(), of: self.of })
        };
        Weight { name, ty: TensorType { dtype: source.dtype, shape: shape.into() }, expr, stream: None }
    }
}

/// The weights that some node reads otherwise than as the weight of a fused matmul: an embedding table that is the
/// output projection as well.
fn read_unpacked(module: &Module) -> Vec<bool> {
    let mut unpacked = vec![false; module.weights.bound()];
    for (_, node) in module.graph.nodes.iter() {
        for (index, operand) in node.operands.iter().enumerate() {
            if let Operand::Weight(w) = operand
                && !(index == 1 && matches!(*node.op, Op::FusedMatmul(_)))
            {
                unpacked[w.index()] = true;
            }
        }
    }
    unpacked
}
