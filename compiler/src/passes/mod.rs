//! The passes, one file each. Adding one is a file with a [`Pass`], a line in [`all`], and a line and an example in
//! [`pages`].

mod begin_fusion;
mod canonicalize;
mod chunk_attention;
mod chunk_mlp;
mod chunks;
mod const_fold;
mod cse;
mod dce;
mod fuse_add_norm;
mod fuse_epilogue;
mod fuse_glu;
mod fuse_linear;
mod fuse_pointwise;
mod group_launches;
mod mark_streamable;
mod merge_matmuls;
mod pack_weights;
pub mod pages;
mod plan_memory;
mod recover;
mod schedule;

pub use plan_memory::{ARENA, PlanReport, plan_report};

use millrace_ir::Phase;

use crate::pass::Pass;

/// Every pass with its default options, in the order of the default pipeline; `chunk-mlp` and
/// `chunk-attention` stand where they may be put in.
pub fn all() -> Vec<Box<dyn Pass>> {
    vec![
        Box::new(canonicalize::Canonicalize),
        Box::new(const_fold::ConstFold),
        Box::new(cse::Cse),
        Box::new(dce::Dce),
        Box::new(recover::Recover),
        Box::new(begin_fusion::BeginFusion),
        Box::new(fuse_linear::FuseLinear),
        Box::new(merge_matmuls::MergeMatmuls),
        Box::new(fuse_glu::FuseGlu),
        Box::new(fuse_add_norm::FuseAddNorm),
        Box::new(fuse_epilogue::FuseEpilogue),
        Box::new(fuse_pointwise::FusePointwise),
        Box::new(chunk_mlp::ChunkMlp::default()),
        Box::new(chunk_attention::ChunkAttention::default()),
        Box::new(pack_weights::PackWeights),
        Box::new(schedule::Schedule::default()),
        Box::new(group_launches::GroupLaunches),
        Box::new(plan_memory::PlanMemory),
        Box::new(mark_streamable::MarkStreamable),
    ]
}

/// Declares a pass that is one rewrite rule.
macro_rules! rule_pass {
    ($(#[$doc:meta])* $name:ident, $spelling:literal, $help:literal, $phases:expr, $leaves:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl $crate::pass::Pass for $name {
            fn name(&self) -> &'static str {
                $spelling
            }
            fn help(&self) -> &'static str {
                $help
            }
            fn phases(&self) -> (millrace_ir::Phase, millrace_ir::Phase) {
                $phases
            }
            fn leaves(&self) -> Option<millrace_ir::Phase> {
                $leaves
            }
            fn run(
                &self,
                module: &mut millrace_ir::Module,
                context: &mut $crate::pass::Context,
            ) -> millrace_ir::Result<bool> {
                Ok($crate::rewrite::rewrite($spelling, module, context, self)? > 0)
            }
        }
    };
}
use rule_pass;

/// The phases in which unfused graphs are rewritten.
const BEFORE_FUSION: (Phase, Phase) = (Phase::Imported, Phase::Fused);
