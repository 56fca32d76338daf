//! The passes, one file each. Adding one is a file with a [`Pass`] and a line in [`registry`].

mod canonicalize;
mod const_fold;
mod cse;
mod dce;
mod fuse_add_norm;
mod fuse_epilogue;
mod fuse_glu;
mod fuse_linear;
mod fuse_pointwise;
mod mark_streamable;
mod merge_matmuls;
mod pack_weights;
mod plan_memory;
mod recover;
mod schedule;

pub use plan_memory::{ARENA, PlanReport, plan_report};

use millrace_ir::{Error, Kind, Module, Phase, Result};

use crate::pass::{Context, Pass};

/// Every pass with its default options, in the order of the default pipeline.
pub fn registry() -> Vec<Box<dyn Pass>> {
    vec![
        Box::new(canonicalize::Canonicalize),
        Box::new(const_fold::ConstFold),
        Box::new(cse::Cse),
        Box::new(dce::Dce),
        Box::new(recover::Recover),
        Box::new(BeginFusion),
        Box::new(fuse_linear::FuseLinear),
        Box::new(merge_matmuls::MergeMatmuls),
        Box::new(fuse_glu::FuseGlu),
        Box::new(fuse_add_norm::FuseAddNorm),
        Box::new(fuse_epilogue::FuseEpilogue),
        Box::new(fuse_pointwise::FusePointwise),
        Box::new(pack_weights::PackWeights),
        Box::new(schedule::Schedule::default()),
        Box::new(plan_memory::PlanMemory),
        Box::new(mark_streamable::MarkStreamable),
    ]
}

/// The pass called `name` with options.
///
/// # Errors
/// `compile/bad-pipeline` for an unknown pass or option.
pub fn create(name: &str, options: &[(String, String)]) -> Result<Box<dyn Pass>> {
    let bad = |message: String| Error::new(Kind::Usage, "compile/bad-pipeline", message);
    if name == "schedule" {
        return Ok(Box::new(schedule::Schedule::with_options(options).map_err(bad)?));
    }
    registry().into_iter().find(|p| p.name() == name).ok_or_else(|| bad(format!("there is no pass `{name}`")))
}

/// Moves a module to phase fused without fusing anything, for unoptimised builds.
struct BeginFusion;

impl Pass for BeginFusion {
    fn name(&self) -> &'static str {
        "begin-fusion"
    }
    fn help(&self) -> &'static str {
        "moves to phase fused without fusing anything"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Fused)
    }
    fn leaves(&self) -> Option<Phase> {
        Some(Phase::Fused)
    }
    fn run(&self, _: &mut Module, _: &mut Context) -> Result<bool> {
        Ok(false)
    }
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
