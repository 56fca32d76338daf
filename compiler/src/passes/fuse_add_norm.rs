//! Residual addition and the norm after it become one node.
//!
//! ```text
//! s = add(x, y) ; rms_norm(s, @w)  ->  s, n = add_rms_norm(x, y, @w) {sum = true}
//! ```

use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::{AddNorm, Binary};
use millrace_ir::{NodeId, Op, Operand, Phase};

use super::rule_pass;
use crate::rewrite::{From, Outcome, Patch, Rule, View};

rule_pass!(
    /// See the module.
    FuseAddNorm,
    "fuse-add-norm",
    "joins a residual addition with the norm that reads it",
    (Phase::Fused, Phase::Fused),
    None
);

impl Rule for FuseAddNorm {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        let (kind, eps) = match &*node.op {
            Op::RmsNorm(n) => (NormKind::Rms, n.eps),
            Op::LayerNorm(n) => (NormKind::Layer, n.eps),
            _ => return Outcome::NoMatch,
        };
        let Some((source, 0)) = view.def(node.operands[0]) else { return Outcome::NoMatch };
        let add = view.node(source);
        let Op::Binary(Binary { function: BinaryFn::Add }) = *add.op else { return Outcome::NoMatch };
        let sum = add.results[0];
        if kind == NormKind::Layer && node.operands.len() != 3 {
            return Outcome::Blocked("the norm has no weight or no bias".into());
        }
        if view.ty(add.operands[0]) != view.ty(add.operands[1]) {
            return Outcome::Blocked("the addition broadcasts".into());
        }
        if add.operands.iter().any(|o| !matches!(o, Operand::Value(_))) {
            return Outcome::Blocked("an addend is a constant".into());
        }
        if node.operands[1..].contains(&Operand::Value(sum)) {
            return Outcome::Blocked("the norm scales or shifts by the sum itself".into());
        }
        let only = view.used_once(sum);
        // The new node stands where the norm stands; users of the sum before it would read it too early.
        if view.users(sum).iter().any(|user| *user != id && view.passed(*user)) {
            return Outcome::Blocked("the sum is read before the norm".into());
        }
        let mut patch = Patch::new([source, id]);
        let operands = add.operands.iter().chain(&node.operands[1..]).copied().map(From::Old);
        let new = patch.node(AddNorm { kind, eps, sum: !only }, operands.collect::<Vec<_>>());
        if !only {
            patch.replace(sum, From::New(new, 0));
        }
        patch.replace(node.results[0], From::New(new, usize::from(!only)));
        Outcome::Rewrite(patch)
    }
}
