//! What follows a linear layer element by element runs before its store.
//!
//! ```text
//! gelu(matmul.fused(x, @w))      ->  matmul.fused(x, @w) {epilogue = [.., gelu]}
//! add(r, matmul.fused(x, @w))    ->  matmul.fused(x, @w, r) {epilogue = [.., residual]}
//! mul(matmul.fused(x, @w), m)    ->  matmul.fused(x, @w, m) {epilogue = [.., mul]}
//! ```

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::ops::{Binary, FusedMatmul, Unary};
use millrace_ir::{NodeId, Op, Operand, Phase};

use super::rule_pass;
use crate::rewrite::{From, Outcome, Patch, Rule, View};

rule_pass!(
    /// See the module.
    FuseEpilogue,
    "fuse-epilogue",
    "folds activation, residual addition and multiplication into the matmul before them",
    (Phase::Fused, Phase::Fused),
    None
);

/// The fused matmul with one result that makes `operand`.
fn producer<'a>(view: &'a View<'_>, operand: Operand) -> Option<(NodeId, &'a FusedMatmul)> {
    let (id, 0) = view.def(operand)? else { return None };
    match &view.node(id).op {
        Op::FusedMatmul(fused) if view.node(id).results.len() == 1 => Some((id, fused)),
        _ => None,
    }
}

impl Rule for FuseEpilogue {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        let (step, y, extra) = match &node.op {
            Op::Unary(Unary { function }) if Epilogue::ACTIVATIONS.contains(function) => {
                (Epilogue::Activation(*function), node.operands[0], None)
            }
            Op::Binary(Binary { function: function @ (BinaryFn::Add | BinaryFn::Mul) }) => {
                let (a, b) = (node.operands[0], node.operands[1]);
                let step = if *function == BinaryFn::Add { Epilogue::Residual } else { Epilogue::Mul };
                // Prefer the later product: its operand is sure to exist before it.
                if producer(view, b).is_some() { (step, b, Some(a)) } else { (step, a, Some(b)) }
            }
            _ => return Outcome::NoMatch,
        };
        let Some((source, fused)) = producer(view, y) else { return Outcome::NoMatch };
        let Operand::Value(value) = y else { return Outcome::NoMatch };
        if !view.used_once(value) {
            return Outcome::Blocked("the product has other uses".into());
        }
        if let Some(extra) = extra {
            if !matches!(extra, Operand::Value(_)) || view.ty(extra).shape != view.ty(y).shape {
                return Outcome::Blocked("the other operand has another shape".into());
            }
            if view.ty(extra).dtype != view.ty(view.node(source).operands[0]).dtype {
                return Outcome::Blocked("the other operand has another element type".into());
            }
        }
        let mut epilogue = fused.epilogue.clone();
        epilogue.push(step);
        let mut patch = Patch::new([source, id]);
        let operands = view.node(source).operands.iter().copied().chain(extra).map(From::Old);
        let new = patch.node(FusedMatmul { epilogue, ..fused.clone() }, operands.collect::<Vec<_>>());
        patch.replace(node.results[0], From::New(new, 0));
        Outcome::Rewrite(patch)
    }
}
