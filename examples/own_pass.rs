//! A pass from outside of Millrace: a rule, registered under a name, used in a pipeline and tested by filetests.
//!
//! Run with `cargo run --example own_pass`; `MILLRACE_ACCEPT=1` writes the snapshots.
#![allow(clippy::print_stdout)]

use std::path::Path;

use millrace::Result;
use millrace::compiler::Registry;
use millrace::compiler::pass::{Context, Pass};
use millrace::compiler::rewrite::{From, Outcome, Patch, Rule, View, rewrite};
use millrace::ir::ops::Unary;
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::{Module, NodeId, Op, Phase};

/// `neg(neg(x)) -> x`
struct CancelNeg;

const NEG: Op = Op::Unary(Unary { function: UnaryFn::Neg });

impl Rule for CancelNeg {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let outer = view.node(id);
        let Some((source, 0)) = view.def(outer.operands[0]) else { return Outcome::NoMatch };
        let inner = view.node(source);
        if outer.op != NEG || inner.op != NEG {
            return Outcome::NoMatch;
        }
        let mut patch = Patch::new([id, source]);
        patch.replace(outer.results[0], From::Old(inner.operands[0]));
        Outcome::Rewrite(patch)
    }
}

impl Pass for CancelNeg {
    fn name(&self) -> &'static str {
        "cancel-neg"
    }
    fn help(&self) -> &'static str {
        "removes pairs of negations"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Fused)
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        Ok(rewrite(self.name(), module, context, self)? > 0)
    }
}

/// Millrace's passes and this one, which runs first in `O2`.
pub fn registry() -> Result<Registry> {
    Registry::standard().with(Box::new(CancelNeg)).with_level(2, "cancel-neg,O2")
}

fn main() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/own_pass");
    println!("{} filetests pass", millrace::filetest::run(&folder, &registry()?)?);
    Ok(())
}
