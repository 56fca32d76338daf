//! The mean over each sequence's rows.

use millrace_ir::{DType, Operand};

use super::call::constant;
use crate::cuda::plan::{Argument, Planned, Site, SiteLaunch};
use crate::cuda::source::{Promise, SourceWriter};

/// Plans `mean_pool`.
pub(super) fn plan(site: Site<'_>) -> Option<Planned> {
    let node = site.only()?;
    let (x, starts) = (site.operand_ty(node, 0), site.operand_ty(node, 1));
    let h = constant(&x.last())?;
    if h == 0 || !matches!(x.dtype, DType::F32 | DType::F16 | DType::BF16) {
        return None;
    }
    let source = SourceWriter::new("cuda.mean_pool")
        .ty("Element", x.dtype)
        .ty("Starts", starts.dtype)
        .int("H", h)
        .body(include_str!("mean_pool.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish();
    let result = Operand::Value(node.results[0]);
    let sequences = site.ty(result).shape[0].clone();
    let mut launch = SiteLaunch::new(source, [h.div_ceil(32).into(), sequences, 1u64.into()], 256)
        .args([node.operands[0], node.operands[1], result].map(Argument::Address));
    launch.dependent = true;
    Some(Planned::one(launch))
}
