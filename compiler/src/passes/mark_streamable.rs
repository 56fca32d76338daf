//! Marks the weights that may be brought in during a step: when they are first read, and how their bytes can be cut.

use millrace_ir::types::const_bytes;
use millrace_ir::{Id, Module, Operand, Phase, Result, Stream, TensorType};

use crate::pass::{Context, Pass};

/// Types that are remembered with how they are cut.
const REMEMBERED: usize = 16;

/// Bytes of a weight, and how many slices its outermost axis has, unless it is a scalar.
type Cut = (u64, Option<u64>);

/// The outermost axis is the output axis of packed and plain matrices and the row axis of tables.
fn cut(ty: &TensorType) -> Option<Cut> {
    let shape = ty.const_shape()?;
    Some((const_bytes(ty.dtype, &shape)?, shape.first().map(|slices| (*slices).max(1))))
}

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
        // Bytes and slices by type: weights of repeated layers share theirs.
        let mut known: Vec<(TensorType, Option<Cut>)> = Vec::new();
        for (at, id) in module.graph.order.iter().enumerate() {
            for operand in &module.graph.nodes[*id].operands {
                let Operand::Weight(w) = operand else { continue };
                let Some(weight) = module.weights.get_mut(*w).filter(|w| w.stream.is_none()) else {
                    continue;
                };
                let seen = |(ty, _): &&(TensorType, Option<Cut>)| {
                    ty.dtype == weight.ty.dtype && ty.shape.is_shared_with(&weight.ty.shape)
                };
                let cut = match known.iter().find(seen) {
                    Some((_, cut)) => *cut,
                    None => {
                        let cut = cut(&weight.ty);
                        known.truncate(REMEMBERED - 1);
                        known.insert(0, (weight.ty.clone(), cut));
                        cut
                    }
                };
                let Some((total, slices)) = cut else { continue };
                // A scalar has no axis to cut and stays with the engine.
                let Some(slices) = slices else {
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
