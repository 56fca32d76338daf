//! Kernel selection of the CPU target. Ops without a fast kernel run the reference evaluator, and say so in their
//! kernel's name.

use millrace_ir::verify::check;
use millrace_ir::{DType, Id, Kernel, KernelId, Module, Phase, Result};
use millrace_kernels::cpu::select::select;

/// The target's name.
pub const TARGET: &str = "cpu";

/// Gives every node of a planned module its kernel; equal kernels are listed once. The module is verified first.
///
/// # Errors
/// `ir/invalid` for a module that breaks rules.
pub fn lower(module: Module) -> Result<Module> {
    check(&module)?;
    let mut lowered = module;
    let mut dtypes: Vec<DType> = Vec::new();
    let mut kernels: Vec<Kernel> = Vec::new();
    for at in 0..lowered.graph.order.len() {
        let id = lowered.graph.order[at];
        let node = &lowered.graph.nodes[id];
        let operands = node.operands.iter().map(|o| lowered.operand_type(*o).dtype);
        dtypes.clear();
        dtypes.extend(operands.chain(node.results.iter().map(|r| lowered.graph.values[*r].ty.dtype)));
        let name = select(&lowered, node);
        let index = kernels.iter().position(|k| k.name == name && k.dtypes == dtypes).unwrap_or_else(|| {
            kernels.push(Kernel { name: name.to_string(), dtypes: dtypes.clone() });
            kernels.len() - 1
        });
        lowered.graph.nodes[id].kernel = Some(KernelId::from_index(index));
    }
    kernels.into_iter().for_each(|k| {
        lowered.kernels.push(k);
    });
    lowered.phase = Phase::Lowered;
    lowered.target = Some(TARGET.to_string());
    Ok(lowered)
}
