//! The CPU backend: runs a lowered graph node by node with the kernels it names.
//!
//! Before a node runs, its results are checked to overlap no operand, except the one it may replace in place. So
//! even an engine with a forged plan cannot make two references to the same bytes.

#[allow(unsafe_code)]
mod execute;
mod numeric;
mod reference;
mod tensors;

use std::time::Instant;

use millrace_ir::{Bindings, Def, Error, Id, Kind, Module, NodeId, Op, Operand, Place, Result};
use millrace_kernels::cpu::Pool;
use millrace_kernels::cpu::select::{REFERENCE, select};

use crate::memory::Region;
use crate::profile::Profile;

/// Memory of one step.
pub(crate) struct Regions {
    pub inputs: Vec<Region>,
    pub outputs: Vec<Region>,
    pub arenas: Vec<Region>,
    pub states: Vec<Option<Region>>,
    pub weights: Vec<Option<Region>>,
}

/// What is prepared once for a graph.
pub(crate) struct Program {
    /// By node: rotary frequencies, where a node needs them.
    frequencies: Vec<Option<Vec<f32>>>,
}

fn forged(message: &str, node: NodeId) -> Error {
    Error::new(Kind::BadInput, "engine/forged", message)
        .at(node)
        .hint("the engine was altered: build it again")
}

impl Program {
    /// Checks that this runtime has the kernels the graph names.
    pub fn new(module: &Module) -> Result<Program> {
        let graph = &module.graph;
        let mut frequencies = vec![None; graph.nodes.bound()];
        for (id, node) in graph.nodes.iter() {
            let kernel = node.kernel.and_then(|k| module.kernels.get(k)).map_or("none", |k| k.name.as_str());
            let expected = select(module, node);
            if kernel != expected && kernel != REFERENCE {
                let message =
                    format!("kernel `{kernel}` is not what this runtime has for `{}`", node.op.name());
                return Err(Error::new(Kind::Incompatible, "engine/kernel", message)
                    .at(id)
                    .hint("build the engine again with this version"));
            }
            if let Op::Rope(rope) = &node.op {
                let d = module.operand_type(node.operands[0]).last().as_const().unwrap_or(0);
                // The verifier has bounded the head size with the type.
                frequencies[id.index()] =
                    Some(rope.frequencies(rope.rotated(usize::try_from(d).unwrap_or(0))));
            }
        }
        Ok(Program { frequencies })
    }

    /// Runs every node; the time of each goes into `profile`, if there is one.
    pub fn run(
        &self,
        module: &Module,
        pool: &Pool,
        regions: &Regions,
        bindings: &Bindings,
        mut profile: Option<&mut Profile>,
    ) -> Result<()> {
        let graph = &module.graph;
        let mut values: Vec<Option<Region>> = vec![None; graph.values.bound()];
        for (id, region) in graph.inputs.iter().zip(&regions.inputs) {
            values[id.index()] = Some(*region);
        }
        for id in &graph.order {
            let node = &graph.nodes[*id];
            for result in &node.results {
                values[result.index()] = Some(place(module, regions, bindings, *result, *id)?);
            }
            let operands = node
                .operands
                .iter()
                .map(|o| match o {
                    Operand::Value(v) => values[v.index()],
                    Operand::Weight(w) => regions.weights.get(w.index()).copied().flatten(),
                    Operand::State(s) => regions.states.get(s.index()).copied().flatten(),
                })
                .collect::<Option<Vec<Region>>>()
                .ok_or_else(|| forged("an operand has no memory", *id))?;
            let results: Vec<Region> = node.results.iter().filter_map(|r| values[r.index()]).collect();
            disjoint(&node.op, &operands, &results, *id)?;
            let step = execute::Node {
                module,
                node,
                operands: &operands,
                results: &results,
                bindings,
                frequencies: self.frequencies[id.index()].as_deref(),
            };
            let start = profile.as_ref().map(|_| Instant::now());
            step.run(pool).map_err(|e| match node.loc.first() {
                Some(loc) => e.at(format!("{id} ({loc})")),
                None => e.at(id),
            })?;
            if let (Some(profile), Some(start)) = (profile.as_deref_mut(), start) {
                profile.node(*id, start);
            }
        }
        // Inputs, versions of states and values with several names end up where the caller looks for them.
        for (n, (output, region)) in graph.outputs.iter().zip(&regions.outputs).enumerate() {
            let value = graph.values.get(output.value);
            if value.is_some_and(|v| v.place != Some(Place::Output(n))) {
                let from = values.get(output.value.index()).copied().flatten();
                let missing = || {
                    Error::new(Kind::BadInput, "engine/forged", "an output has no memory")
                        .at(format!("\"{}\"", output.name))
                        .hint("the engine was altered: build it again")
                };
                execute::copy(from.ok_or_else(missing)?, *region)?;
            }
        }
        Ok(())
    }
}

fn place(
    module: &Module,
    regions: &Regions,
    bindings: &Bindings,
    value: millrace_ir::ValueId,
    node: NodeId,
) -> Result<Region> {
    let value = &module.graph.values[value];
    debug_assert!(matches!(value.def, Def::Node { .. }));
    let bytes = value.ty.bytes().extent(bindings).ok_or_else(|| forged("a size has no value", node))?;
    let region = match &value.place {
        Some(Place::Arena { arena, offset }) => {
            let index = module.arenas.ids().position(|a| a == *arena);
            let base = index.and_then(|i| regions.arenas.get(i));
            offset.extent(bindings).zip(base).and_then(|(at, base)| base.part(at, bytes))
        }
        Some(Place::State(state)) => regions.states.get(state.index()).copied().flatten(),
        Some(Place::Output(n)) => regions.outputs.get(*n).and_then(|r| r.part(0, bytes)),
        None => None,
    };
    region.filter(|r| r.len() as u64 == bytes).ok_or_else(|| forged("a result has no memory", node))
}

/// No result shares a byte with another result or with an operand, except with the whole of the operand it may
/// replace.
fn disjoint(op: &Op, operands: &[Region], results: &[Region], id: NodeId) -> Result<()> {
    let traits = op.traits();
    let replaced = if traits.writes_state { Some(0) } else { traits.in_place };
    for (r, result) in results.iter().enumerate() {
        for (o, operand) in operands.iter().enumerate() {
            let allowed = r == 0 && replaced == Some(o) && result.same(*operand);
            if result.overlaps(*operand) && !allowed {
                return Err(forged("a result overlaps an operand", id));
            }
        }
        if results[..r].iter().any(|other| other.overlaps(*result)) {
            return Err(forged("two results overlap", id));
        }
    }
    Ok(())
}

#[cfg(test)]
mod differential_tests;
