//! Gives every value its place: states in themselves, outputs with the caller, the rest in one arena.

use millrace_ir::plan::{Item, Packing, aligned_size, check_all, liveness, lower_bound, pack, symbolic};
use millrace_ir::{ArenaDecl, Bindings, Dim, Error, Id, Kind, Module, Operand, Phase, Place, Result};

use crate::pass::{Context, Pass};

/// Name of the activation arena.
pub const ARENA: &str = "act";

/// See the module.
pub(super) struct PlanMemory;

/// Quality of a plan at some bindings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanReport {
    /// Bytes of the arena.
    pub peak_bytes: u64,
    /// Largest sum of sizes alive at one instant, each padded to the arena's alignment: no plan is smaller.
    pub lower_bound_bytes: u64,
    /// Number of buffers.
    pub buffers: usize,
}

/// The plan of a planned module at `bindings`, against the bound.
pub fn plan_report(module: &Module, bindings: &Bindings) -> Option<PlanReport> {
    let buffers = liveness(module, true).buffers;
    let align = module.arenas.iter().map(|(_, a)| a.align).max().unwrap_or(1).max(1);
    let items: Option<Vec<Item>> = buffers
        .iter()
        .map(|b| Some(Item::new(b.bytes.extent(bindings)?.checked_next_multiple_of(align)?, b.start, b.end)))
        .collect();
    let peak_bytes = module.arenas.iter().map(|(_, a)| a.size.extent(bindings)).sum::<Option<u64>>()?;
    Some(PlanReport { peak_bytes, lower_bound_bytes: lower_bound(&items?), buffers: buffers.len() })
}

impl Pass for PlanMemory {
    fn name(&self) -> &'static str {
        "plan-memory"
    }
    fn help(&self) -> &'static str {
        "places every buffer: liveness, in-place reuse, offsets valid for every shape; checked independently"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Scheduled, Phase::Scheduled)
    }
    fn leaves(&self) -> Option<Phase> {
        Some(Phase::Planned)
    }
    fn required(&self) -> bool {
        true
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let align = context.align.max(1);
        let maxima = Bindings::maxima(&module.dims);
        let too_large = || {
            Error::new(Kind::BadInput, "compile/too-large", "an activation is too large to plan")
                .hint("lower --max-num-tokens or --max-batch-size")
        };
        let buffers = liveness(module, true).buffers;
        let sizes: Vec<Dim> = buffers.iter().map(|b| aligned_size(&b.bytes, align)).collect();
        let items: Vec<Item> = buffers
            .iter()
            .zip(&sizes)
            .map(|(b, size)| Some(Item::new(size.extent(&maxima)?, b.start, b.end)))
            .collect::<Option<_>>()
            .ok_or_else(too_large)?;
        let packing: Packing = pack(&items);
        let (offsets, total) = symbolic(&items, &sizes, &packing, align, &maxima);
        let mut output = vec![None; module.graph.values.bound()];
        module.graph.outputs.iter().enumerate().rev().for_each(|(n, o)| output[o.value.index()] = Some(n));
        for id in module.graph.order.clone() {
            for result in module.graph.nodes[id].results.clone() {
                if let Some(state) = module.state_of(Operand::Value(result)) {
                    module.graph.values[result].place = Some(Place::State(state));
                } else if let Some(n) = output[result.index()] {
                    module.graph.values[result].place = Some(Place::Output(n));
                }
            }
        }
        if !buffers.is_empty() {
            let arena = module.arenas.push(ArenaDecl { name: ARENA.to_string(), size: total, align });
            for (buffer, offset) in buffers.iter().zip(&offsets) {
                for value in &buffer.values {
                    module.graph.values[*value].place = Some(Place::Arena { arena, offset: offset.clone() });
                }
            }
        }
        let minima = Bindings::minima(&module.dims);
        check_all(module, &[&maxima, &minima]).map_err(|overlap| {
            let message = format!("the plan overlaps: {}", overlap.message);
            Error::new(Kind::Internal, "compile/bad-plan", message)
                .hint("please report this with the model's configuration")
        })?;
        context.count("plan-memory.buffers", buffers.len() as u64);
        context.count("plan-memory.peak_bytes", packing.peak);
        context.count("plan-memory.lower_bound_bytes", packing.lower_bound);
        Ok(true)
    }
}
