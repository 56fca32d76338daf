//! Gated feed-forward layers: the gate runs inside the matmul.
//!
//! ```text
//! g, u = matmul.fused(x, @gate+up) ; mul(silu(g), u)  ->  matmul.fused(x, @gate+up) {epilogue = [glu(silu)]}
//! ```

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::ops::{Binary, FusedMatmul};
use millrace_ir::{NodeId, Op, Operand, Phase};

use super::rule_pass;
use crate::rewrite::{From, Outcome, Patch, Rule, View};

rule_pass!(
    /// See the module.
    FuseGlu,
    "fuse-glu",
    "folds act(gate) * up into the matmul that makes both",
    (Phase::Fused, Phase::Fused),
    None
);

impl Rule for FuseGlu {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        let Op::Binary(Binary { function: BinaryFn::Mul }) = *node.op else { return Outcome::NoMatch };
        let try_order = |gate: Operand, up: Operand| {
            let (act, 0) = view.def(gate)? else { return None };
            let Op::Unary(unary) = &*view.node(act).op else { return None };
            let (source, first) = view.def(view.node(act).operands[0])?;
            let (other, second) = view.def(up)?;
            let Op::FusedMatmul(fused) = &*view.node(source).op else { return None };
            let Op::FusedMatmul(_) = &*view.node(other).op else { return None };
            Some((act, source, unary.function, fused.clone(), (source == other, first, second)))
        };
        let (a, b) = (node.operands[0], node.operands[1]);
        let Some((act, source, function, fused, results)) = try_order(a, b).or_else(|| try_order(b, a))
        else {
            return Outcome::NoMatch;
        };
        if !results.0 {
            return Outcome::Blocked("gate and up are two matmuls".into());
        }
        if (results.1, results.2, fused.segments.len()) != (0, 1, 2) {
            return Outcome::Blocked("gate and up are not the first and second of two results".into());
        }
        if !Epilogue::ACTIVATIONS.contains(&function) {
            return Outcome::Blocked(format!("no matmul kernel applies {}", function.name()));
        }
        if fused.segments[0] != fused.segments[1] {
            return Outcome::Blocked("gate and up differ in width".into());
        }
        let matmul = view.node(source);
        let values = [matmul.results[0], matmul.results[1], view.node(act).results[0]];
        if !values.into_iter().all(|v| view.used_once(v)) {
            return Outcome::Blocked("gate or up has other uses".into());
        }
        let mut epilogue = fused.epilogue.clone();
        epilogue.push(Epilogue::Glu(function));
        let mut patch = Patch::new([source, act, id]);
        let new =
            patch.node(FusedMatmul { epilogue, ..fused }, matmul.operands.iter().copied().map(From::Old));
        patch.replace(node.results[0], From::New(new, 0));
        Outcome::Rewrite(patch)
    }
}
