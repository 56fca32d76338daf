//! Kernel selection of the CPU target. Ops without a fast kernel run the reference evaluator, and say so in their
//! kernel's name.

use millrace_ir::verify::Verified;
use millrace_ir::{DType, Id, Kernel, KernelId, Module, Phase};
use millrace_kernels::cpu::select::select;

/// The target's name.
pub const TARGET: &str = "cpu";

/// Gives every node of a planned module its kernel; equal kernels are listed once.
pub fn lower(module: Verified<'_>) -> Module {
    let mut lowered = module.module().clone();
    let mut kernels: Vec<Kernel> = Vec::new();
    for id in lowered.graph.order.clone() {
        let node = &lowered.graph.nodes[id];
        let operands = node.operands.iter().map(|o| lowered.operand_type(*o).dtype);
        let dtypes: Vec<DType> =
            operands.chain(node.results.iter().map(|r| lowered.graph.values[*r].ty.dtype)).collect();
        let kernel = Kernel { name: select(&lowered, node).to_string(), dtypes };
        let index = kernels.iter().position(|k| *k == kernel).unwrap_or_else(|| {
            kernels.push(kernel);
            kernels.len() - 1
        });
        lowered.graph.nodes[id].kernel = Some(KernelId::from_index(index));
    }
    kernels.into_iter().for_each(|k| {
        lowered.kernels.push(k);
    });
    lowered.phase = Phase::Lowered;
    lowered.target = Some(TARGET.to_string());
    lowered
}
