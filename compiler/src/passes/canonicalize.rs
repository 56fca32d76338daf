//! One spelling for equal things: no-op movements vanish, movements compose, constants stand on the right.
//!
//! ```text
//! reshape(reshape(x))  ->  reshape(x)        transpose(transpose(x))  ->  transpose(x)
//! reshape to own type  ->  x                 cast to own type         ->  x
//! add(x, splat 0)      ->  x                 mul(x, splat 1)          ->  x
//! add(@w, x)           ->  add(x, @w)
//! ```
//!
//! `algebra` and `shapes` hold the rules for arithmetic and movements beyond these.

mod algebra;
mod shapes;

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::{Binary, Reshape, Transpose};
use millrace_ir::{NodeId, Op, Operand, Phase, WeightExpr};

use super::{BEFORE_FUSION, rule_pass};
use crate::rewrite::{From, Outcome, Patch, Rule, View};

rule_pass!(
    /// See the module.
    Canonicalize,
    "canonicalize",
    "brings arithmetic and movements into one spelling, removes what does nothing",
    BEFORE_FUSION,
    Some(Phase::Canonical)
);

impl Rule for Canonicalize {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        for rules in [look, algebra::look, shapes::look] {
            if let Outcome::Rewrite(patch) = rules(view, id) {
                return Outcome::Rewrite(patch);
            }
        }
        Outcome::NoMatch
    }
}

fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let node = view.node(id);
    let result = node.results[0];
    let same_type = |operand: &Operand| view.ty(*operand) == &view.module.graph.values[result].ty;
    let forward = |operand: Operand| {
        // Graph outputs and state rules want values, so a weight is not forwarded.
        if !matches!(operand, Operand::Value(_)) {
            return Outcome::NoMatch;
        }
        let mut patch = Patch::new([id]);
        patch.replace(result, From::Old(operand));
        Outcome::Rewrite(patch)
    };
    match &*node.op {
        Op::Reshape(_) | Op::Cast(_) | Op::Broadcast(_) if same_type(&node.operands[0]) => {
            forward(node.operands[0])
        }
        Op::Transpose(t) if t.perm.iter().enumerate().all(|(i, p)| i == *p) => forward(node.operands[0]),
        Op::Slice(s) if s.step == 1 && same_type(&node.operands[0]) => forward(node.operands[0]),
        Op::Concat(_) if node.operands.len() == 1 => forward(node.operands[0]),
        Op::Reshape(Reshape { shape }) => match view.def(node.operands[0]).map(|(n, _)| (n, view.node(n))) {
            Some((inner, source)) if matches!(*source.op, Op::Reshape(_)) => {
                let mut patch = Patch::new([id, inner]);
                let new = patch.node(Reshape { shape: shape.clone() }, [From::Old(source.operands[0])]);
                patch.replace(result, From::New(new, 0));
                Outcome::Rewrite(patch)
            }
            _ => Outcome::NoMatch,
        },
        Op::Transpose(Transpose { perm }) => {
            match view.def(node.operands[0]).map(|(n, _)| (n, view.node(n))) {
                Some((inner, source)) => match &*source.op {
                    Op::Transpose(first) => {
                        let perm = perm.iter().map(|p| first.perm[*p]).collect();
                        let mut patch = Patch::new([id, inner]);
                        let new = patch.node(Transpose { perm }, [From::Old(source.operands[0])]);
                        patch.replace(result, From::New(new, 0));
                        Outcome::Rewrite(patch)
                    }
                    _ => Outcome::NoMatch,
                },
                None => Outcome::NoMatch,
            }
        }
        Op::Binary(Binary { function }) => {
            let (left, right) = (node.operands[0], node.operands[1]);
            let splat = |operand: Operand| match operand {
                Operand::Weight(w) => match view.module.weights[w].expr {
                    WeightExpr::Splat(value) => Some(value),
                    _ => None,
                },
                _ => None,
            };
            let neutral = match function {
                BinaryFn::Add | BinaryFn::Sub => Some(0.0),
                BinaryFn::Mul | BinaryFn::Div => Some(1.0),
                _ => None,
            };
            if neutral.is_some() && splat(right) == neutral && same_type(&left) {
                return forward(left);
            }
            let constant_left = matches!(left, Operand::Weight(_)) && matches!(right, Operand::Value(_));
            if function.commutative() && constant_left {
                let mut patch = Patch::new([id]);
                let new = patch.node(Binary { function: *function }, [From::Old(right), From::Old(left)]);
                patch.replace(result, From::New(new, 0));
                return Outcome::Rewrite(patch);
            }
            Outcome::NoMatch
        }
        _ => Outcome::NoMatch,
    }
}
