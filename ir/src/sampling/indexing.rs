//! Samples of ops that read or write at computed places.

use super::Sample;
use super::draft::Draft;
use super::known::Known;
use super::movement::with_extent;
use crate::dim::Dim;
use crate::graph::Operand;
use crate::ops::{Embedding, Gather, Op, Scatter};
use crate::types::TensorType;

impl Sample for Gather {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = draft.find(|k| k.ty.rank() >= 1)?;
        let ty = draft.ty(x);
        let axis = if draft.random.once_in(2) { 0 } else { draft.random.below(ty.rank()) };
        let rank = draft.random.below(3);
        let indices = draft.indices(&ty.shape[axis], rank);
        Some((Gather { axis }.into(), vec![x, indices]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let (x, indices) = (&operands[0], &operands[1]);
        indices.indexes(&x.ty.shape[self.axis]).then_some((x.low, x.high))
    }
}

impl Sample for Embedding {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let rows = Dim::from(draft.random.between(1, 9));
        let (width, dtype, rank) = (draft.width(), draft.float_type(), draft.random.below(3));
        let table = draft.value(&TensorType::new(dtype, [rows.clone(), width]), -1.0, 1.0);
        let indices = draft.indices(&rows, rank);
        Some((Embedding.into(), vec![table, indices]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let (table, indices) = (&operands[0], &operands[1]);
        indices.indexes(&table.ty.shape[0]).then_some((table.low, table.high))
    }
}

impl Sample for Scatter {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = draft.tame(1);
        let ty = draft.ty(x);
        let axis = draft.random.below(ty.rank());
        let indices = draft.indices(&ty.shape[axis], 1);
        let n = draft.ty(indices).shape[0].clone();
        let updates = draft.value(&with_extent(&ty, axis, n), -2.0, 2.0);
        Some((Scatter { axis }.into(), vec![x, indices, updates]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let (x, indices, updates) = (&operands[0], &operands[1], &operands[2]);
        let legal = indices.indexes(&x.ty.shape[self.axis]);
        legal.then(|| (x.low.min(updates.low), x.high.max(updates.high)))
    }
}
