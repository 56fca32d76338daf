//! The norm in front of a matmul as a launch of its own, for shapes where the matmul does not compute it on the way.

use millrace_ir::Dim;

use super::problem::Problem;
use crate::cuda::plan::{Argument, SiteLaunch};
use crate::cuda::source::{Promise, SourceWriter, type_name};

/// Threads of a block; a block has one row.
pub const THREADS: u32 = 256;

/// Elements that a thread reads at a time.
pub fn vector(problem: &Problem<'_>) -> usize {
    if problem.dtype.bits() == 16 && problem.k.is_multiple_of(8) { 8 } else { 1 }
}

/// The launch that writes the norm's result, if the problem begins with a norm.
pub fn launch(problem: &Problem<'_>) -> Option<SiteLaunch> {
    let norm = problem.norm?;
    let source = SourceWriter::new("cuda.matmul.norm")
        .line(&format!("typedef {} T;", type_name(problem.dtype)))
        .int("K", problem.k)
        .int("THREADS", THREADS)
        .int("VECTOR", vector(problem))
        .float("EPS", norm.eps)
        .body(include_str!("norm.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish();
    let one = Dim::from(1u64);
    let mut launch = SiteLaunch::new(source, [problem.m.clone(), one.clone(), one], THREADS)
        .args([norm.x, norm.weight, problem.x].map(Argument::Address));
    launch.dependent = problem.site.arch.has_tma();
    Some(launch)
}
