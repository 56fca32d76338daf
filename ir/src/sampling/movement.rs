//! Samples of ops that move elements.

use super::Sample;
use super::draft::{Draft, MOST};
use super::known::Known;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::Operand;
use crate::ops::{Broadcast, Concat, Iota, Op, Reshape, Slice, Transpose};
use crate::types::{TensorType, product};

fn same(operands: &[Known]) -> Option<(f64, f64)> {
    let low = operands.iter().map(|k| k.low).fold(f64::INFINITY, f64::min);
    Some((low, operands.iter().map(|k| k.high).fold(f64::NEG_INFINITY, f64::max)))
}

/// Any value of at least this rank.
fn anything(draft: &mut Draft, rank: usize) -> Operand {
    match draft.find(|k| k.ty.rank() >= rank) {
        Some(found) => found,
        None => draft.tame(rank),
    }
}

impl Sample for Broadcast {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = anything(draft, 0);
        let one = Dim::from(1i64);
        let mut shape = draft.ty(x).shape;
        for dim in &mut shape {
            if *dim == one && draft.random.once_in(2) {
                *dim = draft.extent();
            }
        }
        if draft.random.once_in(2) {
            let front = draft.extent();
            shape.insert(0, front);
        }
        Some((Broadcast { shape }.into(), vec![x]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        same(operands)
    }
}

impl Draft {
    /// Another shape of as many elements.
    pub fn reshaped(&mut self, from: &[Dim]) -> Vec<Dim> {
        let mut shape = from.to_vec();
        match self.random.below(4) {
            0 => shape = vec![product(&shape)],
            1 => {
                let at = self.random.below(shape.len() + 1);
                shape.insert(at, Dim::from(1i64));
            }
            2 if shape.len() > 1 => {
                let at = self.random.below(shape.len() - 1);
                let joined = shape[at].mul(&shape[at + 1]);
                shape.splice(at..at + 2, [joined]);
            }
            _ => {
                let splits: Vec<(usize, usize, usize)> = shape
                    .iter()
                    .enumerate()
                    .filter_map(|(i, d)| Some((i, usize::try_from(d.as_const()?).ok()?)))
                    .flat_map(|(i, n)| [2, 3, 4].map(|f| (i, n, f)))
                    .filter(|(_, n, f)| n % f == 0)
                    .collect();
                if !splits.is_empty() {
                    let (at, n, factor) = self.random.pick(&splits);
                    shape.splice(at..at + 1, [Dim::from(n / factor), Dim::from(factor)]);
                }
            }
        }
        shape
    }
}

impl Sample for Reshape {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = anything(draft, 0);
        let from = draft.ty(x).shape;
        let shape = draft.reshaped(&from);
        Some((Reshape { shape: shape.into() }.into(), vec![x]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        same(operands)
    }
}

impl Sample for Transpose {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = anything(draft, 1);
        let rank = draft.ty(x).rank();
        Some((Transpose { perm: draft.permutation(rank) }.into(), vec![x]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        same(operands)
    }
}

impl Sample for Slice {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = anything(draft, 1);
        let ty = draft.ty(x);
        let axis = draft.random.below(ty.rank());
        let extent = &ty.shape[axis];
        let step = draft.random.pick(&[1, 1, 1, 2, 3]);
        let (start, end) = match extent.as_const() {
            Some(n) if n > 0 => {
                let start = draft.random.below(n as usize);
                (Dim::from(start), Dim::from(draft.random.between(start + 1, n as usize)))
            }
            // Every symbol is at least 1.
            _ if draft.random.once_in(3) => (Dim::from(0i64), Dim::from(1i64)),
            _ => (Dim::from(0i64), extent.clone()),
        };
        Some((Slice { axis, start, end, step }.into(), vec![x]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        same(operands)
    }
}

impl Sample for Concat {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = anything(draft, 1);
        let ty = draft.ty(x);
        let axis = draft.random.below(ty.rank());
        let mut parts = vec![x];
        for _ in 0..draft.random.below(3) {
            let fits = |k: &Known| {
                k.ty.dtype == ty.dtype
                    && k.ty.rank() == ty.rank()
                    && (0..ty.rank()).all(|i| i == axis || k.ty.shape[i] == ty.shape[i])
            };
            if let Some(other) = draft.find(fits) {
                let at = draft.random.below(parts.len() + 1);
                parts.insert(at, other);
            }
        }
        Some((Concat { axis }.into(), parts))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        same(operands)
    }
}

impl Sample for Iota {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let rank = draft.random.between(1, 3);
        let shape = draft.shape(rank);
        let axis = draft.random.below(rank);
        let dtype = draft.random.pick(&[DType::I32, DType::I32, DType::I64, DType::F32, DType::BF16]);
        Some((Iota { shape: shape.into(), axis, dtype }.into(), vec![]))
    }
    fn range(&self, _: &[Known]) -> Option<(f64, f64)> {
        Some((0.0, self.shape[self.axis].as_const().unwrap_or(MOST as i64) as f64 - 1.0))
    }
}

/// The type of one more operand along `axis`.
pub(super) fn with_extent(ty: &TensorType, axis: usize, extent: Dim) -> TensorType {
    let mut ty = ty.clone();
    ty.shape[axis] = extent;
    ty
}
