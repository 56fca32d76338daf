//! Weights of every kind of expression, with elements in given bounds.

use super::draft::Draft;
use super::known::{computes, counts};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Operand, WeightExpr};
use crate::tensor::round_to;
use crate::types::TensorType;

/// Random weights are normal; none of the few elements of a draft is farther out than so many deviations.
const DEVIATIONS: f64 = 6.0;

impl Draft {
    /// A new weight with elements in `low..=high`.
    pub fn weight(&mut self, ty: TensorType, low: f64, high: f64) -> Operand {
        self.weight_of(ty, low, high, 2)
    }

    /// A weight where every element is `value`.
    pub fn splat(&mut self, dtype: DType, shape: Vec<Dim>, value: f64) -> Operand {
        self.add_weight(TensorType { dtype, shape: shape.into() }, WeightExpr::Splat(value), (value, value))
    }

    fn weight_of(&mut self, ty: TensorType, low: f64, high: f64, depth: usize) -> Operand {
        let elements = ty.elements().as_const().unwrap_or(0);
        let number = |draft: &mut Draft| {
            let value = draft.random.uniform(low, high);
            let value = if ty.dtype.is_float() { value } else { value.round() };
            round_to(ty.dtype, value)
        };
        let spread = high.min(-low);
        let choice = self.random.below(if depth > 0 { 9 } else { 4 });
        let (expr, range) = match choice {
            0 => {
                let value = number(self);
                (WeightExpr::Splat(value), (value, value))
            }
            1..=3 if ty.dtype.is_float() && spread > 0.0 => {
                let std = spread / DEVIATIONS;
                (WeightExpr::Random { seed: self.random.bits() >> 40, std }, (-spread, spread))
            }
            4 if ty.rank() > 0 => {
                let axis = self.random.below(ty.rank());
                let extent = ty.shape[axis].as_const().unwrap_or(0) as usize;
                if extent < 2 {
                    return self.weight_of(ty, low, high, 0);
                }
                let cut = self.random.between(1, extent - 1);
                let part = |draft: &mut Draft, n: usize| {
                    let mut ty = ty.clone();
                    ty.shape[axis] = Dim::from(n);
                    draft.weight_of(ty, low, high, depth - 1)
                };
                let parts = [part(self, cut), part(self, extent - cut)];
                (WeightExpr::Concat { axis, parts: parts.into_iter().filter_map(id).collect() }, (low, high))
            }
            5 if ty.rank() > 1 => {
                let perm = self.permutation(ty.rank());
                let mut source = ty.clone();
                perm.iter().enumerate().for_each(|(i, p)| source.shape[*p] = ty.shape[i].clone());
                let of = self.weight_of(source, low, high, depth - 1);
                match id(of) {
                    Some(of) => (WeightExpr::Transpose { perm, of }, (low, high)),
                    None => return of,
                }
            }
            6 => {
                let source = TensorType { dtype: ty.dtype, shape: vec![ty.elements()].into() };
                let of = self.weight_of(source, low, high, depth - 1);
                match id(of) {
                    Some(of) => (WeightExpr::Reshape { of }, (low, high)),
                    None => return of,
                }
            }
            7 if computes(ty.dtype) => {
                let from = self.random.pick(&[DType::F32, DType::BF16, DType::F16]);
                let of = self.weight_of(ty.with_dtype(from), low, high, depth - 1);
                match id(of) {
                    Some(of) => (WeightExpr::Cast { of }, (low, high)),
                    None => return of,
                }
            }
            _ if elements <= 64 || counts(ty.dtype) || ty.dtype == DType::Bool => {
                let values = (0..elements).map(|_| number(self)).collect();
                (WeightExpr::Dense(values), (low, high))
            }
            _ => {
                let value = number(self);
                (WeightExpr::Splat(value), (value, value))
            }
        };
        self.add_weight(ty, expr, range)
    }

    /// A random permutation.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut perm: Vec<usize> = (0..n).collect();
        (1..n).rev().for_each(|i| perm.swap(i, self.random.below(i + 1)));
        perm
    }
}

fn id(operand: Operand) -> Option<crate::graph::WeightId> {
    if let Operand::Weight(id) = operand { Some(id) } else { None }
}
