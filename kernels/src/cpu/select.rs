//! Which kernel runs a node: one function, used by code generation to choose and by the runtime to check.

use crate::cpu::matmul::PANEL;
use millrace_ir::ops::pointwise::Step;
use millrace_ir::{DType, Dim, Module, Node, Op};

/// The kernel of ops that have no fast one: the reference evaluator.
pub const REFERENCE: &str = "cpu.reference";

/// The kernel of elementwise ops whose operands, results and casts are floats of 16 or 32 bits or truth values.
pub const POINTWISE: &str = "cpu.pointwise";

/// The kernel of regions of the same types that reduce rows.
pub const POINTWISE_ROWS: &str = "cpu.pointwise.rows";

fn computes(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

fn indexes(dtype: DType) -> bool {
    matches!(dtype, DType::I32 | DType::I64)
}

/// The kernel of a node of a verified module, by op, element types and layouts.
pub fn select(module: &Module, node: &Node) -> &'static str {
    let ty = |index: usize| module.operand_type(node.operands[index]);
    let result = &module.graph.values[node.results[0]].ty;
    let whole = (0..node.operands.len()).map(ty).chain([result]).all(|t| t.dtype != DType::I4);
    if !whole {
        return if matches!(*node.op, Op::Reshape(_)) { "cpu.view" } else { REFERENCE };
    }
    movement(&node.op)
        .or_else(|| elementwise(module, node))
        .or_else(|| images(&node.op, result.dtype))
        .or_else(|| rows(module, node))
        .unwrap_or(REFERENCE)
}

/// Kernels that move elements of at least a byte; tensors may be empty.
fn movement(op: &Op) -> Option<&'static str> {
    match op {
        Op::Reshape(_) => Some("cpu.view"),
        Op::Transpose(_) => Some("cpu.transpose"),
        Op::Broadcast(_) => Some("cpu.broadcast"),
        Op::Slice(_) => Some("cpu.slice"),
        Op::Concat(_) => Some("cpu.concat"),
        Op::Gather(_) | Op::Embedding(_) => Some("cpu.gather"),
        Op::Scatter(_) => Some("cpu.scatter"),
        Op::Select(_) => Some("cpu.select"),
        Op::Iota(_) => Some("cpu.iota"),
        _ => None,
    }
}

/// Element by element: floats and truth values in f32, everything else in f64; tensors may be empty. Rows are reduced in
/// f32 only.
fn elementwise(module: &Module, node: &Node) -> Option<&'static str> {
    let in_f32 = |dtype: DType| computes(dtype) || dtype == DType::Bool;
    let operands = node.operands.iter().map(|o| module.operand_type(*o).dtype);
    let results = node.results.iter().map(|r| module.graph.values[*r].ty.dtype);
    let fast = operands.chain(results).all(in_f32);
    let fast = match &*node.op {
        Op::Unary(_) | Op::Binary(_) | Op::Cast(_) => fast,
        Op::Pointwise(p) => {
            let fast = fast && p.body.iter().all(|s| !matches!(s, Step::Cast(dtype, _) if !in_f32(*dtype)));
            if p.has_rows() {
                return Some(if fast { POINTWISE_ROWS } else { REFERENCE });
            }
            fast
        }
        _ => return None,
    };
    Some(if fast { POINTWISE } else { "cpu.pointwise.numbers" })
}

/// Reductions and windows of floats; tensors may be empty.
fn images(op: &Op, dtype: DType) -> Option<&'static str> {
    match op {
        _ if !computes(dtype) => None,
        Op::Reduce(_) => Some("cpu.reduce"),
        Op::Conv2d(_) => Some("cpu.conv2d"),
        Op::Pool2d(_) => Some("cpu.pool2d"),
        _ => None,
    }
}

/// Rows of floats. No extent may be known to be 0.
fn rows(module: &Module, node: &Node) -> Option<&'static str> {
    let ty = |index: usize| module.operand_type(node.operands[index]);
    let result = &module.graph.values[node.results[0]].ty;
    let types =
        (0..node.operands.len()).map(ty).chain(node.results.iter().map(|r| &module.graph.values[*r].ty));
    if types.flat_map(|t| &t.shape).any(|d| d.as_const() == Some(0)) {
        return None;
    }
    let floats = |range: std::ops::Range<usize>| {
        let first = result.dtype;
        computes(first) && range.into_iter().all(|i| ty(i).dtype == first)
    };
    let ids = |indices: &[usize]| indices.iter().all(|i| indexes(ty(*i).dtype));
    let kernel = match &*node.op {
        Op::Rope(_) if floats(0..1) && ids(&[1]) && head_fits(ty(0).last()) => "cpu.rope",
        Op::KvAppend(_) if floats(0..2) && ids(&[2, 3, 4]) => "cpu.kv_append",
        Op::PagedAttention(_) if floats(0..3) && ids(&[3, 4, 5]) && head_fits(ty(0).last()) => {
            "cpu.paged_attention"
        }
        Op::Attention(_) if floats(0..3) && ids(&[3]) && head_fits(ty(0).last()) => "cpu.attention",
        Op::RmsNorm(_) if floats(0..2) => "cpu.norm",
        Op::LayerNorm(_) if floats(0..node.operands.len()) => "cpu.norm",
        Op::AddNorm(_) if floats(0..node.operands.len()) => "cpu.add_norm",
        Op::L2Normalize(_) if floats(0..1) => "cpu.l2_normalize",
        Op::Softmax(s) if floats(0..1) && s.axis + 1 == result.rank() => "cpu.softmax",
        Op::Softmax(_) if floats(0..1) => "cpu.softmax.axis",
        Op::MeanPool(_) if floats(0..1) && ids(&[1]) => "cpu.mean_pool",
        Op::FusedMatmul(f)
            if computes(ty(0).dtype)
                && computes(result.dtype)
                && !f.cores
                && (0..node.operands.len()).all(|i| ty(i).dtype == ty(0).dtype) =>
        {
            if f.panel == PANEL {
                "cpu.matmul.packed"
            } else {
                "cpu.matmul.unpacked"
            }
        }
        Op::Matmul(_) if computes(ty(0).dtype) && computes(result.dtype) => "cpu.matmul.activations",
        _ => return None,
    };
    Some(kernel)
}

fn head_fits(d: Dim) -> bool {
    d.as_const().is_some_and(|d| d > 0)
}
