//! Ops without a fast kernel: the reference evaluator between bytes.

use millrace_ir::ops::EvalCtx;
use millrace_ir::tensor::Tensor;
use millrace_ir::{Bindings, Error, Kind, Module, Node, Result, TensorType};

/// Evaluates a node; returns the bytes of each result.
pub(super) fn evaluate(
    module: &Module,
    node: &Node,
    operands: &[&[u8]],
    bindings: &Bindings,
) -> Result<Vec<Vec<u8>>> {
    let failed = |message: String| {
        Error::new(Kind::BadInput, "run/failed", format!("`{}`: {message}", node.op.name()))
    };
    let shape = |ty: &TensorType| -> Result<Vec<usize>> {
        let shape = ty.shape_at(bindings).ok_or_else(|| failed(format!("{ty} has no shape here")))?;
        Ok(shape.into_iter().map(|d| d as usize).collect())
    };
    let tensors = node
        .operands
        .iter()
        .zip(operands)
        .map(|(operand, bytes)| {
            let ty = module.operand_type(*operand);
            Tensor::from_bytes(ty.dtype, &shape(ty)?, bytes)
                .ok_or_else(|| failed(format!("{ty} has another size")))
        })
        .collect::<Result<Vec<_>>>()?;
    let refs: Vec<&Tensor> = tensors.iter().collect();
    let results: Vec<TensorType> = node.results.iter().map(|r| module.graph.values[*r].ty.clone()).collect();
    let computed = node.op.eval(&EvalCtx { operands: &refs, results: &results, bindings }).map_err(failed)?;
    Ok(computed
        .into_iter()
        .map(|mut t| {
            t.round();
            t.to_bytes()
        })
        .collect())
}
