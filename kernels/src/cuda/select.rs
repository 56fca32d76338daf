//! Which family plans a site: one exhaustive match.

use millrace_ir::Op;

use super::plan::{Planned, Site};
use super::{conv, movement, pointwise, reduce, rows};

/// The launches of a site; `None` if no kernel computes it: element types smaller than a byte, extents that may exceed
/// 32 bits, or an op or group whose family is not among those asked here.
pub fn plan(site: Site<'_>) -> Option<Planned> {
    let node = site.only()?;
    match &node.op {
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
        Op::FusedMatmul(_) => None,
        Op::Matmul(_) => None,
        Op::Rope(_) => None,
        Op::KvAppend(_) => None,
        Op::PagedAttention(_) => None,
        Op::Attention(_) => None,
        Op::MeanPool(_) => None,
    }
}
