//! Fixes the order of nodes. With `search=true` a memory-aware order is tried as well, and the one whose largest live
//! set is smaller wins; the given order wins ties.

use std::collections::BTreeSet;

use millrace_ir::distinct::Types;
use millrace_ir::plan::{Item, liveness_of, lower_bound};
use millrace_ir::{Bindings, Id, Module, NodeId, Operand, Phase, Result};

use crate::options::{OptionKind, PassOption, PassOptions};
use smallvec::SmallVec;

use crate::pass::{Context, Pass};

/// See the module.
#[derive(Default)]
pub(super) struct Schedule {
    search: bool,
}

impl Pass for Schedule {
    fn name(&self) -> &'static str {
        "schedule"
    }
    fn help(&self) -> &'static str {
        "fixes the order of nodes; search=true tries an order with a smaller peak"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Fused, Phase::Fused)
    }
    fn leaves(&self) -> Option<Phase> {
        Some(Phase::Scheduled)
    }
    fn options(&self) -> &'static [PassOption] {
        &[PassOption {
            name: "search",
            help: "tries an order with a smaller peak",
            kind: OptionKind::Flag { default: false },
        }]
    }
    fn with_options(&self, options: &PassOptions) -> Option<Box<dyn Pass>> {
        Some(Box::new(Schedule { search: options.flag("search") }))
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        if !self.search {
            return Ok(false);
        }
        let types = Types::of(module);
        let given = peak(module, &types, &module.graph.order, context.align);
        let order = memory_aware(module, &types);
        let found = peak(module, &types, &order, context.align);
        context.count("schedule.saved_bytes", given.saturating_sub(found));
        if found < given {
            module.graph.order = order;
        } else if let Some(first) = module.graph.order.first() {
            let reason = match order == module.graph.order {
                true => format!("the search finds the given order, which needs {given} bytes"),
                false => format!("the given order needs {given} bytes, the order tried {found}"),
            };
            context.blocked(self.name(), &module.graph, *first, &reason);
        }
        Ok(found < given)
    }
}

/// Largest live set at the symbols' upper bounds, in bytes.
pub(super) fn peak(module: &Module, types: &Types<'_>, order: &[NodeId], align: u64) -> u64 {
    let maxima = Bindings::maxima(&module.dims);
    let items: Vec<Item> = liveness_of(module, types, order, true)
        .buffers
        .iter()
        .map(|b| {
            let bytes = b.bytes.extent(&maxima).unwrap_or(u64::MAX / 4);
            Item::new(bytes.next_multiple_of(align.max(1)), b.start, b.end)
        })
        .collect();
    lower_bound(&items)
}

/// Nodes around another, mostly one or two.
type Few = SmallVec<[NodeId; 2]>;

/// List scheduling: among the nodes whose operands exist, the one that adds least to the live set; the given
/// order breaks ties.
fn memory_aware(module: &Module, types: &Types<'_>) -> Vec<NodeId> {
    let graph = &module.graph;
    let maxima = Bindings::maxima(&module.dims);
    let size: Vec<i64> = {
        let bytes: Vec<i64> =
            types.list().iter().map(|t| t.bytes().eval(&maxima).unwrap_or(i64::MAX / 1024)).collect();
        let mut outputs = vec![false; graph.values.bound()];
        graph.outputs.iter().for_each(|o| outputs[o.value.index()] = true);
        let mut size = vec![0; graph.values.bound()];
        for id in graph.values.ids() {
            let is_output = outputs[id.index()];
            let is_state = module.state_of(Operand::Value(id)).is_some();
            if !is_output && !is_state {
                size[id.index()] = bytes[types.value(id) as usize];
            }
        }
        size
    };
    let mut position = vec![0usize; graph.nodes.bound()];
    graph.order.iter().enumerate().for_each(|(at, id)| position[id.index()] = at);
    let mut readers: Vec<Few> = vec![Few::new(); graph.values.bound()];
    let mut remaining = vec![0usize; graph.values.bound()];
    let mut waits: Vec<usize> = vec![0; graph.nodes.bound()];
    let mut wakes: Vec<Few> = vec![Few::new(); graph.nodes.bound()];
    let mut state_readers: Vec<Few> = vec![Few::new(); module.states.bound()];
    for id in &graph.order {
        let mut values: SmallVec<[_; 8]> = graph.nodes[*id]
            .operands
            .iter()
            .filter_map(|o| if let Operand::Value(v) = o { Some(*v) } else { None })
            .collect();
        values.sort();
        values.dedup();
        for value in values {
            readers[value.index()].push(*id);
            remaining[value.index()] += 1;
            if let Some(def) = graph.def_node(value) {
                waits[id.index()] += 1;
                wakes[def.index()].push(*id);
            }
        }
        for operand in &graph.nodes[*id].operands {
            if let Operand::State(s) = operand {
                state_readers[s.index()].push(*id);
            }
        }
    }
    // A writer waits for all other readers of the version it overwrites.
    for id in &graph.order {
        let node = &graph.nodes[*id];
        if !node.op.traits().writes_state {
            continue;
        }
        let before: Few = match node.operands.first() {
            Some(Operand::State(s)) => state_readers[s.index()].clone(),
            Some(Operand::Value(v)) => readers[v.index()].clone(),
            _ => Few::new(),
        };
        for other in before.into_iter().filter(|o| o != id) {
            waits[id.index()] += 1;
            wakes[other.index()].push(*id);
        }
    }
    let cost = |id: NodeId, remaining: &[usize]| -> i64 {
        let node = &graph.nodes[id];
        let made: i64 = node.results.iter().map(|r| size[r.index()]).sum();
        let mut freed: SmallVec<[_; 8]> = node
            .operands
            .iter()
            .filter_map(|o| if let Operand::Value(v) = o { Some(*v) } else { None })
            .filter(|v| remaining[v.index()] == 1)
            .collect();
        freed.sort();
        freed.dedup();
        made - freed.iter().map(|v| size[v.index()]).sum::<i64>()
    };
    // Ready nodes by cost and position. All of them are looked at: a bound would make the order of one layer depend on
    // how many others there are.
    let mut costs: Vec<Option<i64>> = vec![None; graph.nodes.bound()];
    let mut ready: BTreeSet<(i64, usize, NodeId)> = BTreeSet::new();
    for id in graph.order.iter().filter(|id| waits[id.index()] == 0) {
        let now = cost(*id, &remaining);
        costs[id.index()] = Some(now);
        ready.insert((now, position[id.index()], *id));
    }
    let mut order = Vec::with_capacity(graph.order.len());
    while let Some((_, _, id)) = ready.pop_first() {
        costs[id.index()] = None;
        order.push(id);
        let mut read: SmallVec<[_; 8]> = graph.nodes[id]
            .operands
            .iter()
            .filter_map(|o| if let Operand::Value(v) = o { Some(*v) } else { None })
            .collect();
        read.sort();
        read.dedup();
        read.iter().for_each(|v| remaining[v.index()] -= 1);
        // Who reads a value last frees it, so that node costs less from here on.
        for reader in read.iter().filter(|v| remaining[v.index()] == 1).flat_map(|v| &readers[v.index()]) {
            if let Some(before) = costs[reader.index()] {
                let (at, now) = (position[reader.index()], cost(*reader, &remaining));
                ready.remove(&(before, at, *reader));
                ready.insert((now, at, *reader));
                costs[reader.index()] = Some(now);
            }
        }
        for next in &wakes[id.index()] {
            waits[next.index()] -= 1;
            if waits[next.index()] == 0 {
                let now = cost(*next, &remaining);
                costs[next.index()] = Some(now);
                ready.insert((now, position[next.index()], *next));
            }
        }
    }
    order
}
