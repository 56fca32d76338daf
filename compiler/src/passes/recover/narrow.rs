//! Casts around one op vanish: it computes in a wide type anyway and rounds its result once.
//!
//! ```text
//! cast(rms_norm(cast(x, f32), cast(@w, f32)), bf16)  ->  rms_norm(x, @w)      x and @w are bf16
//! ```

use millrace_ir::ops::{Cast, Op};
use millrace_ir::tensor::round_to;
use millrace_ir::{NodeId, Operand, WeightExpr};

use crate::pattern::{below_casts, constant};
use crate::rewrite::{From, Outcome, Patch, View};

/// Looks for a narrowing cast of an op whose operands were all widened before it.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let node = view.node(id);
    let Op::Cast(Cast { to }) = *node.op else { return Outcome::NoMatch };
    let wide = node.operands[0];
    let Some((source, 0)) = view.def(wide) else { return Outcome::NoMatch };
    let inner = view.node(source);
    let computes_wide = matches!(
        *inner.op,
        Op::RmsNorm(_)
            | Op::LayerNorm(_)
            | Op::L2Normalize(_)
            | Op::Softmax(_)
            | Op::Unary(_)
            | Op::Attention(_)
            | Op::Rope(_)
    );
    if !computes_wide || to.bits() >= view.ty(wide).dtype.bits() {
        return Outcome::NoMatch;
    }
    // What stands for an operand in the narrow type: the operand below its casts, or an equal constant.
    let mut patch = Patch::new([source, id]);
    let mut operands = Vec::new();
    for (index, wide) in inner.operands.iter().enumerate() {
        let (below, _) = below_casts(view, *wide);
        let ty = view.ty(*wide);
        if !ty.dtype.is_float() {
            operands.push(From::Old(*wide));
            continue;
        }
        if view.ty(below).dtype == to {
            operands.push(From::Old(below));
            continue;
        }
        let value = constant(view, *wide).filter(|v| index > 0 && round_to(to, *v) == *v);
        match (value, ty.const_shape()) {
            (Some(value), Some(shape)) => {
                let sizes: Vec<String> = shape.iter().map(ToString::to_string).collect();
                let name = format!("splat.{value}.{to}.{}", sizes.join("x"));
                operands.push(patch.weight(name, ty.with_dtype(to), WeightExpr::Splat(value)));
            }
            _ => return Outcome::NoMatch,
        }
    }
    if let Operand::Value(value) = wide
        && !view.used_once(value)
    {
        return Outcome::Blocked(format!("{} stays wide: {value} has other readers", inner.op.name()));
    }
    let new = patch.node(inner.op.clone(), operands);
    patch.replace(node.results[0], From::New(new, 0));
    Outcome::Rewrite(patch)
}
