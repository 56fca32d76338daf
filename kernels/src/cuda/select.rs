//! Which family plans a site: one exhaustive match.

use millrace_ir::Op;

use super::matmul::Choices;
use super::plan::{Planned, Site};
use super::{attention, conv, matmul, movement, pointwise, reduce, rope, rows};

/// [`plan_with`] where nothing was measured.
pub fn plan(site: Site<'_>) -> Option<Planned> {
    plan_with(site, &Choices::default())
}

/// The launches of a site; `None` if no kernel computes it: element types smaller than a byte, extents that may exceed
/// 32 bits, or an op or group whose family is not among those asked here.
/// `choices` replace built-in ones.
pub fn plan_with(site: Site<'_>, choices: &Choices) -> Option<Planned> {
    let Some(node) = site.only() else {
        return match site.last_op() {
            Op::FusedMatmul(_) => matmul::plan(site, choices),
            Op::PagedAttention(_) => attention::plan_layer(site, choices),
            _ => rope::plan(site),
        };
    };
    match &*node.op {
        Op::Unary(_) | Op::Binary(_) | Op::Cast(_) | Op::Select(_) | Op::Pointwise(_) => {
            pointwise::plan(site, node)
        }
        Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Broadcast(_)
        | Op::Slice(_)
        | Op::Concat(_)
        | Op::Iota(_)
        | Op::Gather(_)
        | Op::Embedding(_)
        | Op::Scatter(_) => movement::plan(site, node),
        Op::Reduce(_) => reduce::plan(site, node),
        Op::Conv2d(_) | Op::Pool2d(_) => conv::plan(site, node),
        Op::Softmax(_) | Op::RmsNorm(_) | Op::LayerNorm(_) | Op::AddNorm(_) | Op::L2Normalize(_) => {
            rows::plan(site, node)
        }
        Op::FusedMatmul(_) | Op::Matmul(_) => matmul::plan(site, choices),
        Op::Rope(_) | Op::KvAppend(_) => rope::plan(site),
        Op::PagedAttention(_) | Op::Attention(_) | Op::MeanPool(_) => attention::plan(site, choices),
    }
}
