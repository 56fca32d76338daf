//! The CPU backend: runs a lowered graph node by node with the kernels it names.
//!
//! Before a node runs, its results are checked to overlap no operand, except the one it may replace in place. So
//! even an engine with a forged plan cannot make two references to the same bytes.

mod backend;
#[allow(unsafe_code)]
mod execute;
mod numeric;
mod reference;
mod tensors;

use std::time::Instant;

use millrace_ir::{Bindings, Error, Id, Kind, Module, Op, Result};
use millrace_kernels::cpu::Pool;
use millrace_kernels::cpu::select::{REFERENCE, select};

use crate::memory::Region;
use crate::places;
use crate::profile::Profile;

pub(crate) use backend::Cpu;

/// Memory of one step.
pub(crate) type Regions = places::Regions<Region>;

/// What is prepared once for a graph.
pub(crate) struct Program {
    /// By node: rotary frequencies, where a node needs them.
    frequencies: Vec<Option<Vec<f32>>>,
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
            if let Op::Rope(rope) = &*node.op {
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
        let mut values = regions.input_values(module);
        for id in &graph.order {
            let node = &graph.nodes[*id];
            let (operands, results) = regions.place_node(module, bindings, *id, &mut values)?;
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
        for (from, to) in regions.late_outputs(module, &values)? {
            execute::copy(from, to)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod differential_tests;
