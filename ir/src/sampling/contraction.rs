//! Samples of ops that reduce: sums, products of matrices, images, normalisations.

use super::Sample;
use super::draft::{Draft, MOST, TAME};
use super::known::{Known, computes};
use crate::dim::{Bindings, Dim};
use crate::dtype::DType;
use crate::graph::Operand;
use crate::ops::reduce::ReduceFn;
use crate::ops::{Conv2d, L2Normalize, LayerNorm, Matmul, Op, Pool2d, Reduce, RmsNorm, Softmax};
use crate::types::TensorType;

/// Most elements of an axis.
fn most(dim: &Dim) -> f64 {
    let mut bindings = Bindings::new();
    dim.symbols().into_iter().for_each(|sym| bindings.set(sym, MOST));
    dim.eval(&bindings).map_or(f64::INFINITY, |n| n as f64)
}

fn symmetric(bound: f64) -> Option<(f64, f64)> {
    Some((-bound, bound))
}

impl Sample for Reduce {
    fn sample(name: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let function = match name {
            "reduce_sum" => ReduceFn::Sum,
            "reduce_mean" => ReduceFn::Mean,
            "reduce_max" => ReduceFn::Max,
            _ => ReduceFn::Min,
        };
        let x = draft.tame(1);
        let rank = draft.ty(x).rank();
        let mut axes: Vec<usize> = (0..rank).filter(|_| draft.random.once_in(3)).collect();
        if axes.is_empty() {
            axes.push(if draft.random.once_in(2) { rank - 1 } else { draft.random.below(rank) });
        }
        Some((Reduce { function, axes, keep: draft.random.once_in(2) }.into(), vec![x]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let x = &operands[0];
        match self.function {
            ReduceFn::Sum => {
                let n: f64 = self.axes.iter().map(|a| most(&x.ty.shape[*a])).product();
                Some(((x.low * n).min(x.low), (x.high * n).max(x.high)))
            }
            _ => Some((x.low, x.high)),
        }
    }
}

impl Sample for Matmul {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let a = draft.float(2, -8.0, 8.0);
        let ty = draft.ty(a);
        let k = ty.last();
        let transpose_b = !draft.random.once_in(4);
        let n = if draft.random.once_in(4) { draft.extent() } else { draft.width() };
        let mut shape = if transpose_b { vec![n, k] } else { vec![k, n] };
        if ty.rank() > 2 && draft.random.once_in(3) {
            let lead = &ty.shape[..ty.rank() - 2];
            shape.splice(0..0, draft.broadcastable(lead));
        }
        let b = draft.value(&TensorType { dtype: ty.dtype, shape: shape.into() }, -1.0, 1.0);
        let out = draft.random.once_in(8).then(|| draft.float_type());
        Some((Matmul { transpose_b, out }.into(), vec![a, b]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        symmetric(most(&operands[0].ty.last()) * operands[0].bound() * operands[1].bound())
    }
}

/// An image and its channels.
fn image(draft: &mut Draft) -> (Operand, usize) {
    let fits = |k: &Known| {
        let constant = |i: usize| k.ty.shape[i].as_const().is_some_and(|n| n > 1);
        computes(k.ty.dtype) && k.ty.rank() == 4 && (1..4).all(constant) && k.bound() <= TAME
    };
    let found = draft.find(fits);
    let x = match found {
        Some(found) => found,
        None => {
            let n = draft.extent();
            let c = draft.random.pick(&[2usize, 4]);
            let (h, w) = (draft.random.between(3, 6), draft.random.between(3, 6));
            let dtype = draft.float_type();
            draft.fresh(TensorType::new(dtype, [n, c.into(), h.into(), w.into()]), -1.5, 1.5)
        }
    };
    let channels = draft.ty(x).shape[1].as_const().unwrap_or(1) as usize;
    (x, channels)
}

impl Sample for Conv2d {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let (x, channels) = image(draft);
        let random = &mut draft.random;
        let groups = if channels % 2 == 0 && random.once_in(3) { random.pick(&[2, channels]) } else { 1 };
        let o = groups * random.between(1, 2);
        let kernel = [random.between(1, 3), random.between(1, 3)];
        let pad = [(); 4].map(|()| random.below(2));
        let stride = [random.between(1, 2), random.between(1, 2)];
        let dilation = [random.pick(&[1, 1, 2]), random.pick(&[1, 1, 2])];
        let dtype = draft.ty(x).dtype;
        let shape = [o, channels / groups, kernel[0], kernel[1]];
        let mut operands = vec![x, draft.value(&TensorType::new(dtype, shape), -1.0, 1.0)];
        if draft.random.once_in(2) {
            operands.push(draft.value(&TensorType::new(dtype, [o]), -1.0, 1.0));
        }
        Some((Conv2d { stride, pad, dilation, groups }.into(), operands))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let taps: f64 = operands[1].ty.shape[1..].iter().map(most).product();
        let bias = operands.get(2).map_or(0.0, Known::bound);
        symmetric(taps * operands[0].bound() * operands[1].bound() + bias)
    }
}

impl Sample for Pool2d {
    fn sample(name: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let (x, _) = image(draft);
        let average = name == "avg_pool2d";
        let random = &mut draft.random;
        let kernel = [random.between(1, 3), random.between(1, 3)];
        let pad = [0, 1, 2, 3].map(|i: usize| if kernel[i % 2] > 1 { random.below(2) } else { 0 });
        let stride = [random.between(1, 2), random.between(1, 2)];
        let count_include_pad = average && random.once_in(2);
        Some((Pool2d { average, kernel, stride, pad, count_include_pad }.into(), vec![x]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let x = &operands[0];
        // A window that lies in the padding alone has no mean.
        let hollow = [2, 3].iter().any(|axis| {
            let extent = x.ty.shape[*axis].as_const().unwrap_or(1) as usize;
            let (kernel, stride) = (self.kernel[axis - 2], self.stride[axis - 2]);
            let (before, after) = (self.pad[axis - 2], self.pad[*axis]);
            let room = (extent + before + after).checked_sub(kernel);
            room.is_none_or(|r| r / stride * stride >= extent + before)
        });
        (!hollow).then(|| (x.low.min(0.0), x.high.max(0.0)))
    }
}

impl Sample for Softmax {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = draft.tame(1);
        let rank = draft.ty(x).rank();
        let axis = if draft.random.once_in(3) { draft.random.below(rank) } else { rank - 1 };
        Some((Softmax { axis }.into(), vec![x]))
    }
    fn range(&self, _: &[Known]) -> Option<(f64, f64)> {
        Some((0.0, 1.0))
    }
}

/// A smallest divisor of norms: not so small that a row of equal elements becomes noise.
pub(super) fn eps(draft: &mut Draft, dtype: DType) -> f64 {
    if dtype == DType::F32 { draft.random.pick(&[1e-5, 1e-3, 0.1]) } else { draft.random.pick(&[0.01, 0.1]) }
}

impl Sample for RmsNorm {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = draft.tame(1);
        let ty = draft.ty(x);
        ty.last().as_const()?;
        let w = draft.value(&TensorType::new(ty.dtype, [ty.last()]), -2.0, 2.0);
        Some((RmsNorm { eps: eps(draft, ty.dtype) }.into(), vec![x, w]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        symmetric(most(&operands[0].ty.last()).sqrt() * operands[1].bound())
    }
}

impl Sample for LayerNorm {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = draft.tame(1);
        let ty = draft.ty(x);
        ty.last().as_const()?;
        let vector = TensorType::new(ty.dtype, [ty.last()]);
        let mut operands = vec![x, draft.value(&vector, -2.0, 2.0)];
        if !draft.random.once_in(4) {
            operands.push(draft.value(&vector, -2.0, 2.0));
        }
        Some((LayerNorm { eps: eps(draft, ty.dtype) }.into(), operands))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let bias = operands.get(2).map_or(0.0, Known::bound);
        symmetric(most(&operands[0].ty.last()).sqrt() * operands[1].bound() + bias)
    }
}

impl Sample for L2Normalize {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = draft.tame(1);
        let dtype = draft.ty(x).dtype;
        Some((L2Normalize { eps: eps(draft, dtype) }.into(), vec![x]))
    }
    fn range(&self, _: &[Known]) -> Option<(f64, f64)> {
        symmetric(1.0)
    }
}
