//! Which kernel runs a node: one function, used by code generation to choose and by the runtime to check.

use crate::cpu::matmul::PANEL;
use millrace_ir::ops::Pointwise;
use millrace_ir::ops::pointwise::Source;
use millrace_ir::types::Shape;
use millrace_ir::{DType, Dim, Module, Node, Op, Operand};

/// The kernel of ops that have no fast one: the reference evaluator.
pub const REFERENCE: &str = "cpu.reference";

fn computes(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

/// The kernel of a node of a verified module, by op, element types and layouts.
pub fn select(module: &Module, node: &Node) -> &'static str {
    let ty = |index: usize| module.operand_type(node.operands[index]);
    let result = &module.graph.values[node.results[0]].ty;
    let floats = |range: std::ops::Range<usize>| {
        let first = result.dtype;
        computes(first) && range.into_iter().all(|i| ty(i).dtype == first)
    };
    let i32s = |indices: &[usize]| indices.iter().all(|i| ty(*i).dtype == DType::I32);
    match &node.op {
        Op::Reshape(_) => "cpu.view",
        Op::Embedding(_) if computes(ty(0).dtype) && i32s(&[1]) => "cpu.gather_rows",
        Op::Gather(g) if g.axis == 0 && computes(ty(0).dtype) && i32s(&[1]) && ty(0).rank() >= 1 => {
            "cpu.gather_rows"
        }
        Op::Rope(_) if floats(0..1) && i32s(&[1]) => "cpu.rope",
        Op::KvAppend(_) if floats(0..2) && i32s(&[2, 3, 4]) => "cpu.kv_append",
        Op::PagedAttention(_) if floats(0..3) && i32s(&[3, 4, 5]) && head_fits(ty(0).last()) => {
            "cpu.paged_attention"
        }
        Op::Attention(_) if floats(0..3) && i32s(&[3]) && head_fits(ty(0).last()) => "cpu.attention",
        Op::RmsNorm(_) if floats(0..2) => "cpu.norm",
        Op::LayerNorm(_) if floats(0..node.operands.len()) => "cpu.norm",
        Op::AddNorm(_) if floats(0..node.operands.len()) => "cpu.add_norm",
        Op::L2Normalize(_) if floats(0..1) => "cpu.l2_normalize",
        Op::Softmax(s) if floats(0..1) && s.axis + 1 == result.rank() => "cpu.softmax",
        Op::MeanPool(_) if floats(0..1) && i32s(&[1]) => "cpu.mean_pool",
        Op::FusedMatmul(f)
            if f.panel == PANEL
                && computes(ty(0).dtype)
                && matches!(node.operands[1], Operand::Weight(_))
                && (0..node.operands.len()).all(|i| ty(i).dtype == ty(0).dtype) =>
        {
            "cpu.matmul.packed"
        }
        Op::Matmul(_) if computes(ty(0).dtype) && computes(result.dtype) => "cpu.matmul.activations",
        Op::Pointwise(p) if pointwise(module, node, p, &result.shape) => "cpu.pointwise",
        _ => REFERENCE,
    }
}

fn head_fits(d: Dim) -> bool {
    d.as_const().is_some_and(|d| d > 0)
}

/// Whether the tile interpreter can read every operand: float or truth values that fill the result or repeat by
/// element, row or column.
fn pointwise(module: &Module, node: &Node, op: &Pointwise, shape: &Shape) -> bool {
    let one = Dim::from(1i64);
    let layout = |shape_of: &[Dim]| {
        let ones = shape_of.iter().take_while(|d| **d == one).count();
        let rest = &shape_of[ones..];
        let suffix = shape.ends_with(rest) && (rest.len() <= 1 || rest.len() == shape.len());
        let column = shape_of.len() == shape.len()
            && shape_of.last() == Some(&one)
            && shape_of[..shape_of.len() - 1] == shape[..shape.len() - 1];
        suffix || column
    };
    let stores = |dtype: &DType| computes(*dtype) || *dtype == DType::Bool;
    op.dtypes.iter().all(stores)
        && op.out.iter().all(|s| !matches!(s, Source::Const(_)) || !op.body.is_empty())
        && node.operands.iter().all(|o| {
            let ty = module.operand_type(*o);
            (computes(ty.dtype) || ty.dtype == DType::Bool) && layout(&ty.shape)
        })
}
