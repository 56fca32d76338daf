//! Marks the weights that may be brought in during a step: when they are first read, and how their bytes can be cut.

use millrace_ir::types::const_bytes;
use millrace_ir::{Id, Module, Operand, Phase, Result, Stream};

use crate::pass::{Context, Pass};

/// See the module.
pub(super) struct MarkStreamable;

impl Pass for MarkStreamable {
    fn name(&self) -> &'static str {
        "mark-streamable"
    }
    fn help(&self) -> &'static str {
        "marks weights that may be streamed: first use, tile axis, bytes per tile"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Scheduled, Phase::Planned)
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let mut bytes = 0;
        let mut whole = vec![false; module.weights.bound()];
        for (at, id) in module.graph.order.iter().enumerate() {
            for operand in &module.graph.nodes[*id].operands {
                let Operand::Weight(w) = operand else { continue };
                let Some(weight) = module.weights.get_mut(*w).filter(|w| w.stream.is_none()) else {
                    continue;
                };
                // The outermost axis is the output axis of packed and plain matrices and the row axis of tables.
                let (Some(total), Some(shape)) = (
                    weight.ty.const_shape().and_then(|s| const_bytes(weight.ty.dtype, &s)),
                    weight.ty.const_shape(),
                ) else {
                    continue;
                };
                // A scalar has no axis to cut and stays with the engine.
                let Some(slices) = shape.first().map(|s| (*s).max(1)) else {
                    if !std::mem::replace(&mut whole[w.index()], true) {
                        let reason = format!("@{} is a scalar, there is no axis to cut", weight.name);
                        context.blocked(self.name(), &module.graph, *id, &reason);
                    }
                    continue;
                };
                weight.stream =
                    Some(Stream { first_use: at, tile_axis: 0, tile_bytes: total.div_ceil(slices) });
                bytes += total;
            }
        }
        context.count("mark-streamable.bytes", bytes);
        Ok(bytes > 0)
    }
}
