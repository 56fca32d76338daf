//! Lifetimes of values over the execution order, with values that share memory joined into one buffer.

use crate::arena::Id;
use crate::dim::Dim;
use crate::distinct::Types;
use crate::graph::*;

/// Values that share one piece of memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// The values, in order of definition.
    pub values: Vec<ValueId>,
    /// Bytes, not padded.
    pub bytes: Dim,
    /// Position of the defining node.
    pub start: usize,
    /// One past the position of the last node that reads any of the values.
    pub end: usize,
}

/// Buffers of a graph.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Liveness {
    /// Buffers in order of birth.
    pub buffers: Vec<Buffer>,
}

/// Computes the buffers of every value that needs arena memory: not inputs, not outputs, not states.
///
/// A view shares its operand's buffer. With `in_place`, a result takes the buffer of the operand its op names, if
/// the types have one size and shape and nothing reads that buffer afterwards.
pub fn liveness(module: &Module, in_place: bool) -> Liveness {
    liveness_of(module, &Types::of(module), &module.graph.order, in_place)
}

/// [`liveness`] as if the nodes ran in `order`.
pub fn liveness_of(module: &Module, types: &Types<'_>, order: &[NodeId], in_place: bool) -> Liveness {
    let graph = &module.graph;
    let bytes: Vec<Dim> = types.list().iter().map(|t| t.bytes()).collect();
    let bytes_of = |value: ValueId| &bytes[types.value(value) as usize];
    let mut last_use: Vec<usize> = vec![0; graph.values.bound()];
    for (at, id) in order.iter().enumerate() {
        for operand in &graph.nodes[*id].operands {
            if let Operand::Value(v) = operand {
                last_use[v.index()] = at;
            }
        }
    }
    // Memory that a view keeps alive: walk backwards so that chains of views pass their last use on.
    for id in order.iter().rev() {
        let node = &graph.nodes[*id];
        if node.op.traits().view
            && let (Some(Operand::Value(from)), Some(to)) = (node.operands.first(), node.results.first())
        {
            last_use[from.index()] = last_use[from.index()].max(last_use[to.index()]);
        }
    }
    let mut is_output = vec![false; graph.values.bound()];
    graph.outputs.iter().for_each(|o| is_output[o.value.index()] = true);
    let mut buffer_of: Vec<Option<usize>> = vec![None; graph.values.bound()];
    let mut liveness = Liveness::default();
    for (at, id) in order.iter().enumerate() {
        let node = &graph.nodes[*id];
        let traits = node.op.traits();
        if traits.writes_state {
            continue;
        }
        for (index, result) in node.results.iter().enumerate() {
            if is_output[result.index()] {
                continue;
            }
            let end = last_use[result.index()].max(at) + 1;
            let shared = traits.in_place.filter(|_| index == 0).and_then(|operand| {
                let Some(Operand::Value(from)) = node.operands.get(operand) else { return None };
                let buffer = buffer_of[from.index()]?;
                let others = node.operands.iter().enumerate().any(|(i, o)| {
                    i != operand && matches!(o, Operand::Value(v) if buffer_of[v.index()] == Some(buffer))
                });
                let dies = liveness.buffers[buffer].end == at + 1 && !others;
                let same = types.value(*from) == types.value(*result);
                let fits = same || (traits.view && bytes_of(*from) == bytes_of(*result));
                (fits && (traits.view || (in_place && dies))).then_some(buffer)
            });
            match shared {
                Some(buffer) => {
                    liveness.buffers[buffer].values.push(*result);
                    liveness.buffers[buffer].end = liveness.buffers[buffer].end.max(end);
                    buffer_of[result.index()] = Some(buffer);
                }
                None => {
                    buffer_of[result.index()] = Some(liveness.buffers.len());
                    liveness.buffers.push(Buffer {
                        values: vec![*result],
                        bytes: bytes_of(*result).clone(),
                        start: at,
                        end,
                    });
                }
            }
        }
    }
    liveness
}
