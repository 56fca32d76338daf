//! Lifetimes of values over the execution order, with values that share memory joined into one buffer.

use crate::arena::Id;
use crate::dim::Dim;
use crate::distinct::Types;
use crate::graph::*;

/// Values that share one piece of memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// The values, in order of definition.
    pub values: Results,
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
    /// Positions of the nodes that write states.
    pub writers: Vec<usize>,
    /// Positions of the nodes that could write over their operand, were its memory not read later.
    pub displaced: Vec<usize>,
}

/// Computes the buffers of every value that needs arena memory: not inputs, not outputs, not states.
///
/// Nodes that are launched together read and write during the whole group: a buffer is born with the group of its first
/// node and dies with the group of its last reader.
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
    let mut views: Vec<(ValueId, ValueId)> = Vec::new();
    let mut joined = false;
    for (at, id) in order.iter().enumerate() {
        let node = &graph.nodes[*id];
        joined |= node.joined;
        for operand in &node.operands {
            if let Operand::Value(v) = operand {
                last_use[v.index()] = at;
            }
        }
        if node.op.traits().view
            && let (Some(Operand::Value(from)), Some(to)) = (node.operands.first(), node.results.first())
        {
            views.push((*from, *to));
        }
    }
    // Memory that a view keeps alive: backwards, so that chains of views pass their last use on.
    for (from, to) in views.into_iter().rev() {
        last_use[from.index()] = last_use[from.index()].max(last_use[to.index()]);
    }
    let mut is_output = vec![false; graph.values.bound()];
    graph.outputs.iter().for_each(|o| is_output[o.value.index()] = true);
    let mut buffer_of: Vec<Option<usize>> = vec![None; graph.values.bound()];
    let mut liveness = Liveness { buffers: Vec::with_capacity(graph.values.len()), ..Liveness::default() };
    let groups = if joined { groups(graph, order) } else { Vec::new() };
    for (at, id) in order.iter().enumerate() {
        let node = &graph.nodes[*id];
        let traits = node.op.traits();
        if traits.writes_state {
            liveness.writers.push(at);
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
                // Another node of the group may still read the operand when this one writes.
                let earlier = groups.get(at).map_or(at, |(first, _)| *first)..at;
                let in_group = order[earlier].iter().map(|id| &graph.nodes[*id]).any(|n| {
                    let reads =
                        |o: &Operand| matches!(o, Operand::Value(v) if buffer_of[v.index()] == Some(buffer));
                    !n.op.traits().view && n.operands.iter().any(reads)
                });
                let dies = liveness.buffers[buffer].end == at + 1 && !others && !in_group;
                let same = types.value(*from) == types.value(*result);
                let fits = same || (traits.view && bytes_of(*from) == bytes_of(*result));
                let shares = fits && (traits.view || (in_place && dies));
                if same && !traits.view && !shares {
                    liveness.displaced.push(at);
                }
                shares.then_some(buffer)
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
                        values: Results::from_slice(&[*result]),
                        bytes: bytes_of(*result).clone(),
                        start: at,
                        end,
                    });
                }
            }
        }
    }
    if joined {
        for buffer in &mut liveness.buffers {
            buffer.start = groups[buffer.start].0;
            buffer.end = groups[buffer.end - 1].1;
        }
    }
    liveness
}

/// For each position, the first position of its launch group and one past the last.
fn groups(graph: &Graph, order: &[NodeId]) -> Vec<(usize, usize)> {
    let groups = graph.launch_groups(order);
    groups.into_iter().flat_map(|g| std::iter::repeat_n((g.start, g.end), g.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::Bindings;
    use crate::plan::check;
    use crate::text;

    /// A norm and a matmul that reads it, the matmul joined or not; `place` is where the matmul's result lies.
    fn norm_and_matmul(joined: &str, place: u64) -> Module {
        let text = format!(
            "module @m phase planned {{
  weight @n : f32[4] = splat(1.0)
  weight @w : f32[4, 4] = random(seed = 1, std = 1.0)
  arena act = 192 align 64
  graph @main(%0 \"x\": f32[4, 4]) -> (\"y\": f32[4, 4]) {{
    %1 = silu %0 : f32[4, 4] @ act[0]
    %2 = rms_norm %1, @n {{eps = 1e-5}} : f32[4, 4] @ act[64]
    %3 = matmul.fused %2, @w {{segments = [4]}} : f32[4, 4] @ act[{place}]{joined}
    %4 = silu %3 : f32[4, 4] @ out[0]
    return %4
  }}
}}
"
        );
        text::parse(&text).unwrap()
    }

    #[test]
    fn a_group_keeps_what_it_reads_until_its_end() {
        let ends = |joined: &str| {
            liveness(&norm_and_matmul(joined, 128), false)
                .buffers
                .iter()
                .map(|b| (b.start, b.end))
                .collect::<Vec<_>>()
        };
        assert_eq!(ends(""), [(0, 2), (1, 3), (2, 4)]);
        assert_eq!(ends(" joined"), [(0, 3), (1, 3), (1, 4)]);
    }

    #[test]
    fn the_checker_knows_groups() {
        let at = Bindings::new();
        // Over the norm's operand: dead for a node of its own, still read by a group.
        check(&norm_and_matmul("", 0), &at).unwrap();
        check(&norm_and_matmul(" joined", 0), &at).unwrap_err();
        check(&norm_and_matmul(" joined", 128), &at).unwrap();
    }
}
