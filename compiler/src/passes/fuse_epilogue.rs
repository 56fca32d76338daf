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
use millrace_ir::{Node, NodeId, Op, Operand, Phase};

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

/// The fused matmul that makes `operand`.
fn producer<'a>(view: &'a View<'_>, operand: Operand) -> Option<(NodeId, &'a FusedMatmul)> {
    let (id, _) = view.def(operand)?;
    match &*view.node(id).op {
        Op::FusedMatmul(fused) => Some((id, fused)),
        _ => None,
    }
}

/// What has no place in an epilogue although it follows a product.
fn other(view: &View<'_>, node: &Node) -> Outcome {
    let elementwise = matches!(*node.op, Op::Unary(_) | Op::Binary(_));
    match elementwise && node.operands.iter().any(|o| producer(view, *o).is_some()) {
        true => Outcome::Blocked(format!("no matmul kernel applies {}", node.op.name())),
        false => Outcome::NoMatch,
    }
}

impl Rule for FuseEpilogue {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        let (step, y, extra) = match &*node.op {
            Op::Unary(Unary { function }) if Epilogue::ACTIVATIONS.contains(function) => {
                (Epilogue::Activation(*function), node.operands[0], None)
            }
            Op::Binary(Binary { function: function @ (BinaryFn::Add | BinaryFn::Mul) }) => {
                let (a, b) = (node.operands[0], node.operands[1]);
                let step = if *function == BinaryFn::Add { Epilogue::Residual } else { Epilogue::Mul };
                // Prefer the later product: its operand is sure to exist before it.
                let alone = |o| producer(view, o).is_some_and(|(id, _)| view.node(id).results.len() == 1);
                let later = alone(b) || (!alone(a) && producer(view, b).is_some());
                if later { (step, b, Some(a)) } else { (step, a, Some(b)) }
            }
            _ => return other(view, node),
        };
        let Some((source, fused)) = producer(view, y) else { return Outcome::NoMatch };
        let Operand::Value(value) = y else { return Outcome::NoMatch };
        if view.node(source).results.len() > 1 {
            return Outcome::Blocked("the matmul has several results".into());
        }
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
