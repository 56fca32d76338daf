//! Means.
//!
//! ```text
//! mul(reduce_sum(x), 1/n), div(reduce_sum(x), n)  ->  reduce_mean(x)      n elements are summed
//! reduce_mean(x [b, s, h]) {axes = [1]}               ->  mean_pool(x', seq_starts)
//! ```

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::reduce::ReduceFn;
use millrace_ir::ops::{Binary, MeanPool, Op, Reduce, Reshape};
use millrace_ir::{Dim, NodeId, Operand};

use super::attention::seq_starts;
use crate::pattern::{close, constant};
use crate::rewrite::{From, Outcome, Patch, View};

/// Looks for a mean that ends in this node.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let node = view.node(id);
    if let Op::Reduce(reduce) = &*node.op {
        return pool(view, id, reduce);
    }
    let Op::Binary(Binary { function }) = *node.op else { return Outcome::NoMatch };
    let (a, b) = (node.operands[0], node.operands[1]);
    let summed = |sum: Operand, factor: Operand, divides: bool| {
        let (source, _) = view.def(sum)?;
        let Op::Reduce(Reduce { function: ReduceFn::Sum, axes, keep }) = &*view.node(source).op else {
            return None;
        };
        let x = view.node(source).operands[0];
        let count =
            axes.iter().fold(Dim::from(1i64), |n, axis| n.mul(&view.ty(x).shape[*axis])).as_const()?;
        let wanted = if divides { count as f64 } else { 1.0 / count as f64 };
        let found = constant(view, factor)?;
        (count > 0 && close(found, wanted, view.ty(factor).dtype))
            .then(|| (source, sum, x, axes.clone(), *keep))
    };
    let found = match function {
        BinaryFn::Mul => summed(a, b, false).or_else(|| summed(b, a, false)),
        BinaryFn::Div => summed(a, b, true),
        _ => None,
    };
    let Some((source, sum, x, axes, keep)) = found else { return Outcome::NoMatch };
    let result = node.results[0];
    if view.ty(sum) != &view.module.graph.values[result].ty {
        return Outcome::NoMatch;
    }
    if let Operand::Value(value) = sum
        && !view.used_once(value)
    {
        return Outcome::Blocked(format!("reduce_mean: the sum {value} has other readers"));
    }
    let mut patch = Patch::new([source, id]);
    let new = patch.node(Reduce { function: ReduceFn::Mean, axes, keep }, [From::Old(x)]);
    patch.replace(result, From::New(new, 0));
    Outcome::Rewrite(patch)
}

/// The mean over the rows of sequences of equal length.
fn pool(view: &View<'_>, id: NodeId, reduce: &Reduce) -> Outcome {
    let node = view.node(id);
    let x = node.operands[0];
    let [sequences, rows, width] = &view.ty(x).shape[..] else { return Outcome::NoMatch };
    if reduce.function != ReduceFn::Mean || reduce.axes[..] != [1] || reduce.keep {
        return Outcome::NoMatch;
    }
    let mut patch = Patch::new([id]);
    let packed =
        patch.node(Reshape { shape: vec![sequences.mul(rows), width.clone()].into() }, [From::Old(x)]);
    let starts = seq_starts(&mut patch, sequences, rows);
    let new = patch.node(MeanPool, [From::New(packed, 0), starts]);
    patch.replace(node.results[0], From::New(new, 0));
    Outcome::Rewrite(patch)
}
