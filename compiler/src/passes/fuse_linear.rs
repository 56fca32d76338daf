//! Linear layers become fused matmuls, with their bias.
//!
//! ```text
//! matmul(x, @w) {transpose_b}            ->  matmul.fused(x, @w)
//! add(matmul.fused(x, @w), @bias [n])    ->  matmul.fused(x, @w, @bias) {epilogue = [bias]}
//! ```

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::ops::{Binary, FusedMatmul};
use millrace_ir::{List, NodeId, Op, Operand, Phase};

use super::{BEFORE_FUSION, rule_pass};
use crate::rewrite::{From, Outcome, Patch, Rule, View};

rule_pass!(
    /// See the module.
    FuseLinear,
    "fuse-linear",
    "turns matmuls with constant weights into fused matmuls and folds their bias in",
    BEFORE_FUSION,
    Some(Phase::Fused)
);

impl Rule for FuseLinear {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        match &*node.op {
            Op::Matmul(matmul) if matmul.transpose_b => {
                let weight = node.operands[1];
                let rows = match (weight, view.ty(weight).const_shape().as_deref()) {
                    (Operand::Weight(_), Some([0, _])) => {
                        return Outcome::Blocked("the weight has no rows".into());
                    }
                    (Operand::Weight(_), Some([rows, _])) => *rows as usize,
                    (Operand::Weight(_), _) => {
                        return Outcome::Blocked("the weight is no constant matrix".into());
                    }
                    _ => return Outcome::NoMatch,
                };
                let fused = FusedMatmul {
                    segments: vec![rows].into(),
                    panel: 0,
                    cores: false,
                    epilogue: List::new(),
                    out: matmul.out,
                };
                let mut patch = Patch::new([id]);
                let new = patch.node(fused, node.operands.iter().copied().map(From::Old));
                patch.replace(node.results[0], From::New(new, 0));
                Outcome::Rewrite(patch)
            }
            Op::Matmul(_) if matches!(node.operands[1], Operand::Weight(_)) => {
                Outcome::Blocked("the weight is not stored as rows of outputs (transpose_b)".into())
            }
            Op::Binary(Binary { function: BinaryFn::Add }) => {
                let (y, bias) = (node.operands[0], node.operands[1]);
                let (Some((source, 0)), Operand::Weight(_)) = (view.def(y), bias) else {
                    return Outcome::NoMatch;
                };
                let matmul = view.node(source);
                let Op::FusedMatmul(fused) = &*matmul.op else { return Outcome::NoMatch };
                let Operand::Value(y_value) = y else { return Outcome::NoMatch };
                if !fused.epilogue.is_empty() || fused.segments.len() != 1 {
                    return Outcome::Blocked("the matmul has a bias or several results already".into());
                }
                if view.ty(bias).rank() != 1 || view.ty(bias).shape[0] != view.ty(y).last() {
                    return Outcome::Blocked("the addend is no vector of the output's width".into());
                }
                if view.ty(bias).dtype != view.ty(matmul.operands[0]).dtype {
                    return Outcome::Blocked("the bias has another element type than the operand".into());
                }
                if !view.used_once(y_value) {
                    return Outcome::Blocked("the product has other uses".into());
                }
                let mut patch = Patch::new([source, id]);
                let biased = FusedMatmul { epilogue: vec![Epilogue::Bias].into(), ..fused.clone() };
                let operands = matmul.operands.iter().copied().chain([bias]).map(From::Old);
                let new = patch.node(biased, operands.collect::<Vec<_>>());
                patch.replace(node.results[0], From::New(new, 0));
                Outcome::Rewrite(patch)
            }
            _ => Outcome::NoMatch,
        }
    }
}
