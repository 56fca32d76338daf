//! Matmuls of many rows.

use millrace_ir::Dim;

use super::problem::Problem;
use crate::cuda::plan::SiteLaunch;

/// Launches for numbers of rows beyond those of the skinny family, and the bytes of workspace they need. `None` where the
/// simple family serves.
pub fn plan_tail(_problem: &Problem<'_>) -> Option<(Vec<SiteLaunch>, Dim)> {
    None
}
