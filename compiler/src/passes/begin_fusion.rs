//! Moves a module to phase fused without fusing anything, for unoptimised builds.

use millrace_ir::{Module, Phase, Result};

use crate::pass::{Context, Pass};

/// See the module.
pub(super) struct BeginFusion;

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
