//! Samples of elementwise ops, and the arithmetic of bounds that fused regions share.

use super::Sample;
use super::draft::{Draft, TAME};
use super::known::{Known, computes, counts};
use crate::dtype::DType;
use crate::graph::Operand;
use crate::ops::binary::BinaryFn;
use crate::ops::unary::UnaryFn;
use crate::ops::{Binary, Cast, Op, Select, Unary};
use crate::types::TensorType;

/// Closest that logarithms, roots and divisors come to 0.
pub const NEAR_ZERO: f64 = 0.05;

/// Bounds of `function` over `low..=high`.
pub fn unary_range(function: UnaryFn, low: f64, high: f64, exact: bool) -> Option<(f64, f64)> {
    use UnaryFn::*;
    let ends = || Some((function.apply(low), function.apply(high)));
    let positive = low >= NEAR_ZERO;
    match function {
        Neg => Some((-high, -low)),
        Abs if low >= 0.0 => Some((low, high)),
        Abs => Some((0.0, high.max(-low))),
        Exp => ends().filter(|_| high <= 6.0),
        Log | Sqrt => ends().filter(|_| positive),
        Rsqrt | Recip => ends().filter(|_| positive).map(|(a, b)| (b, a)),
        Sigmoid | Tanh | Relu | Erf => ends(),
        Silu | Gelu | GeluTanh if low >= 0.0 => ends(),
        // Each has one minimum, of about -0.28 or -0.17.
        Silu | Gelu | GeluTanh => Some((-0.3, function.apply(high).max(0.0))),
        Sin | Cos => Some((-1.0, 1.0)).filter(|_| low.abs().max(high.abs()) <= 100.0),
        Floor | Ceil => ends().filter(|_| exact),
    }
}

/// Bounds of `function` over two intervals.
pub fn binary_range(function: BinaryFn, a: (f64, f64), b: (f64, f64), exact: bool) -> Option<(f64, f64)> {
    let corners = || {
        let all = [(a.0, b.0), (a.0, b.1), (a.1, b.0), (a.1, b.1)].map(|(x, y)| function.apply(x, y));
        let low = all.into_iter().fold(f64::INFINITY, f64::min);
        (low, all.into_iter().fold(f64::NEG_INFINITY, f64::max))
    };
    match function {
        BinaryFn::Add | BinaryFn::Sub | BinaryFn::Mul | BinaryFn::Max | BinaryFn::Min => Some(corners()),
        BinaryFn::Div => (b.0 >= NEAR_ZERO || b.1 <= -NEAR_ZERO).then(corners),
        BinaryFn::Pow => (a.0 >= NEAR_ZERO && b.0.abs().max(b.1.abs()) <= 4.0).then(corners),
        _ => exact.then_some((0.0, 1.0)),
    }
}

impl Sample for Unary {
    fn sample(name: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let function = UnaryFn::parse(name)?;
        let x = match function {
            UnaryFn::Log | UnaryFn::Sqrt | UnaryFn::Rsqrt | UnaryFn::Recip => draft.float(0, NEAR_ZERO, TAME),
            UnaryFn::Exp => draft.float(0, -TAME, 4.0),
            UnaryFn::Floor | UnaryFn::Ceil => {
                let x = draft.exact();
                if !computes(draft.ty(x).dtype) {
                    return None;
                }
                x
            }
            _ => draft.tame(0),
        };
        Some((Unary { function }.into(), vec![x]))
    }

    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let x = &operands[0];
        unary_range(self.function, x.low, x.high, x.exact)
    }
}

impl Sample for Binary {
    fn sample(name: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let function = BinaryFn::parse(name)?;
        let integers = !matches!(function, BinaryFn::Div | BinaryFn::Pow) && draft.random.once_in(3);
        let a = if function.compares() {
            draft.exact()
        } else if integers {
            match draft.find(|k| matches!(k.ty.dtype, DType::I32 | DType::I64) && k.bound() <= 100.0) {
                Some(found) => found,
                None => {
                    let dtype = draft.random.pick(&[DType::I32, DType::I64]);
                    let shape = draft.shape(2);
                    draft.fresh(TensorType { dtype, shape: shape.into() }, -9.0, 9.0)
                }
            }
        } else if function == BinaryFn::Pow {
            draft.float(0, NEAR_ZERO, 4.0)
        } else {
            draft.tame(0)
        };
        let ty = draft.ty(a);
        let (low, high) = match function {
            BinaryFn::Div => (0.25, TAME),
            BinaryFn::Pow => (-2.0, 2.0),
            _ => (-TAME, TAME),
        };
        let like = |k: &Known| {
            let shape = crate::ops::broadcasting::broadcast_shapes(&k.ty.shape, &ty.shape);
            k.ty.dtype == ty.dtype && shape.is_ok() && k.low >= low && k.high <= high
        };
        let found = if draft.random.once_in(2) {
            draft.find(|k| like(k) && (k.exact || !function.compares()))
        } else {
            None
        };
        let b = match found {
            Some(found) => found,
            None => {
                let shape = draft.broadcastable(&ty.shape);
                let low = if ty.dtype == DType::U8 { 0.0 } else { low.max(-2.0) };
                draft.fresh(TensorType { dtype: ty.dtype, shape: shape.into() }, low, high.min(2.0))
            }
        };
        let swap = draft.random.once_in(3) && !matches!(function, BinaryFn::Div | BinaryFn::Pow);
        Some((Binary { function }.into(), if swap { vec![b, a] } else { vec![a, b] }))
    }

    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let (a, b) = (&operands[0], &operands[1]);
        // Small integers wrap or saturate soon.
        if matches!(a.ty.dtype, DType::I8 | DType::U8) && !self.function.compares() {
            return None;
        }
        binary_range(self.function, (a.low, a.high), (b.low, b.high), a.exact && b.exact)
    }
}

impl Sample for Select {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let a = draft.tame(0);
        let ty = draft.ty(a);
        let shape = ty.shape.clone();
        let fits = move |k: &Known| {
            crate::ops::broadcasting::broadcast_shapes(&k.ty.shape, &shape).is_ok_and(|s| s == shape)
        };
        let c = match draft.find(|k| k.ty.dtype == DType::Bool && fits(k)) {
            Some(found) => found,
            None => {
                let shape = draft.broadcastable(&ty.shape);
                draft.fresh(TensorType { dtype: DType::Bool, shape: shape.into() }, 0.0, 1.0)
            }
        };
        let shape = draft.broadcastable(&ty.shape);
        let b = draft.value(&TensorType { dtype: ty.dtype, shape: shape.into() }, -TAME, TAME);
        let swap = draft.random.once_in(2);
        Some((Select.into(), if swap { vec![c, b, a] } else { vec![c, a, b] }))
    }

    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let (a, b) = (&operands[1], &operands[2]);
        operands[0].exact.then(|| (a.low.min(b.low), a.high.max(b.high)))
    }
}

impl Sample for Cast {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let floats = [DType::F32, DType::F32, DType::BF16, DType::F16];
        let any = [
            DType::I32,
            DType::I64,
            DType::Bool,
            DType::I8,
            DType::U8,
            DType::F8E4M3,
            DType::F8E5M2,
            DType::F32,
            DType::BF16,
        ];
        if draft.random.once_in(2) {
            let x = draft.tame(0);
            return Some((Cast { to: draft.random.pick(&floats) }.into(), vec![x]));
        }
        let x = draft.find(|k| k.exact && k.bound() <= 100.0)?;
        Some((Cast { to: draft.random.pick(&any) }.into(), vec![x]))
    }

    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let x = &operands[0];
        let jumps = counts(self.to) || self.to == DType::Bool;
        if (jumps && !x.exact) || x.bound() > 400.0 {
            return None;
        }
        match self.to {
            DType::Bool => Some((0.0, 1.0)),
            DType::U8 => Some((x.low.clamp(0.0, 255.0), x.high.clamp(0.0, 255.0))),
            DType::I8 => Some((x.low.clamp(-128.0, 127.0), x.high.clamp(-128.0, 127.0))),
            _ if jumps => Some((x.low.trunc(), x.high.trunc())),
            // A rounding to three bits of mantissa or two moves a bound by at most an eighth.
            DType::F8E4M3 | DType::F8E5M2 => Some((x.low - x.low.abs() / 8.0, x.high + x.high.abs() / 8.0)),
            _ => Some((x.low, x.high)),
        }
    }
}
