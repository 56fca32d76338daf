//! Gives every value its place: states in themselves, outputs with the caller, the rest in one arena.

use millrace_ir::distinct::Dims;
use millrace_ir::plan::{
    Buffer, Item, Liveness, Packing, aligned_size, check_all, liveness, lower_bound, pack, symbolic,
};
use millrace_ir::{ArenaDecl, Bindings, Def, Dim, Error, Id, Kind, Module, Operand, Phase, Place, Result};

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
        let Liveness { buffers, writers, displaced } = liveness(module, true);
        // Repeated layers have few sizes.
        let mut known: Dims<'_, (Dim, u64)> = Dims::new();
        let mut sizes: Vec<Dim> = Vec::with_capacity(buffers.len());
        let mut items: Vec<Item> = Vec::with_capacity(buffers.len());
        for buffer in &buffers {
            let (size, bytes) = match known.get(&buffer.bytes, 0) {
                Some(known) => known.clone(),
                None => {
                    let size = aligned_size(&buffer.bytes, align);
                    let bytes = size.extent(&maxima).ok_or_else(too_large)?;
                    known.remember(&buffer.bytes, 0, (size.clone(), bytes));
                    (size, bytes)
                }
            };
            items.push(Item::new(bytes, buffer.start, buffer.end));
            sizes.push(size);
        }
        let packing: Packing = pack(&items);
        let (offsets, total) = symbolic(&items, &sizes, &packing, align, &maxima);
        // A value that is several outputs lies in the first; one that is a state lies there.
        for (n, output) in module.graph.outputs.iter().enumerate().rev() {
            let value = &mut module.graph.values[output.value];
            if matches!(value.def, Def::Node { .. }) {
                value.place = Some(Place::Output(n));
            }
        }
        for at in writers {
            for result in module.graph.nodes[module.graph.order[at]].results.clone() {
                if let Some(state) = module.state_of(Operand::Value(result)) {
                    module.graph.values[result].place = Some(Place::State(state));
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
        lives_on(module, context, &buffers, &displaced);
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

/// Remarks about nodes that could write over their operand, were its memory not read later.
fn lives_on(module: &Module, context: &mut Context, buffers: &[Buffer], displaced: &[usize]) {
    if displaced.is_empty() {
        return;
    }
    let graph = &module.graph;
    let mut buffer_of = vec![None; graph.values.bound()];
    for (index, buffer) in buffers.iter().enumerate() {
        buffer.values.iter().for_each(|v| buffer_of[v.index()] = Some(index));
    }
    for (at, id) in displaced.iter().map(|at| (*at, &graph.order[*at])) {
        let node = &graph.nodes[*id];
        let traits = node.op.traits();
        let (Some(&Operand::Value(from)), Some(&to)) =
            (traits.in_place.and_then(|operand| node.operands.get(operand)), node.results.first())
        else {
            continue;
        };
        let (Some(read), Some(written)) = (buffer_of[from.index()], buffer_of[to.index()]) else { continue };
        if traits.view || read == written || graph.values[from].ty != graph.values[to].ty {
            continue;
        }
        // A buffer ends behind its last reader.
        let last = buffers[read].end.checked_sub(1).filter(|last| *last > at);
        let reason = match last.and_then(|last| graph.order.get(last)) {
            Some(reader) => format!("not in place: {reader} reads the memory of {from} later"),
            None => format!("not in place: another operand shares the memory of {from}"),
        };
        context.blocked("plan-memory", graph, *id, &reason);
    }
}
