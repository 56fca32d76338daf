//! Reductions over axes: `%1 = reduce_sum %0 {axes = [1], keep = true}`.

use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_float};
use crate::attr::{AttrReader, Attrs};
use crate::dim::Dim;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// How elements are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReduceFn {
    /// Sum, 0 of nothing.
    Sum,
    /// Mean, NaN of nothing.
    Mean,
    /// Largest, negative infinity of nothing.
    Max,
    /// Smallest, infinity of nothing.
    Min,
}

/// Combines all elements along `axes`; these axes vanish, or become 1 with `keep`.
#[derive(Clone, Debug, PartialEq)]
pub struct Reduce {
    /// How elements are combined.
    pub function: ReduceFn,
    /// The axes, rising.
    pub axes: Vec<usize>,
    /// Keep the axes with extent 1.
    pub keep: bool,
}

impl ReduceFn {
    /// All functions.
    pub const ALL: [ReduceFn; 4] = [ReduceFn::Sum, ReduceFn::Mean, ReduceFn::Max, ReduceFn::Min];

    /// Its spelling as an op and as a step of a region.
    pub fn name(self) -> &'static str {
        Reduce::NAMES[self as usize]
    }

    /// The function of that spelling.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.name() == name)
    }

    /// What elements are combined with first.
    pub fn start(self) -> f64 {
        match self {
            ReduceFn::Sum | ReduceFn::Mean => 0.0,
            ReduceFn::Max => f64::NEG_INFINITY,
            ReduceFn::Min => f64::INFINITY,
        }
    }

    /// Two values combined; the mean is a sum until it is divided by the count.
    pub fn combine(self, a: f64, b: f64) -> f64 {
        match self {
            ReduceFn::Sum | ReduceFn::Mean => a + b,
            ReduceFn::Max => a.max(b),
            ReduceFn::Min => a.min(b),
        }
    }
}

impl OpDef for Reduce {
    const NAMES: &'static [&'static str] = &["reduce_sum", "reduce_mean", "reduce_max", "reduce_min"];
    fn name(&self) -> &'static str {
        self.function.name()
    }
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("axes", self.axes.clone());
        attrs.set_unless("keep", self.keep, false);
        attrs
    }
    fn from_attrs(name: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        let index = Self::NAMES.iter().position(|n| *n == name).unwrap_or(0);
        Ok(Reduce { function: ReduceFn::ALL[index], axes: attrs.usizes("axes")?, keep: attrs.flag("keep")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        need_float("the operand", x)?;
        let rising =
            self.axes.windows(2).all(|w| w[0] < w[1]) && self.axes.last().is_none_or(|a| *a < x.rank());
        if !rising || self.axes.is_empty() {
            return Err(format!("axes {:?} must rise within {x}", self.axes));
        }
        let mut shape = Vec::new();
        for (axis, dim) in x.shape.iter().enumerate() {
            match (self.axes.contains(&axis), self.keep) {
                (false, _) => shape.push(dim.clone()),
                (true, true) => shape.push(Dim::from(1i64)),
                (true, false) => {}
            }
        }
        Ok(vec![TensorType { dtype: x.dtype, shape: shape.into() }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let x = ctx.operand(0)?;
        let mut out = ctx.empty(0)?;
        out.data.iter_mut().for_each(|v| *v = self.function.start());
        // Extents of an empty tensor may multiply beyond any integer.
        let count: f64 = self.axes.iter().map(|a| x.shape[*a] as f64).product();
        let strides = if x.data.is_empty() { Vec::new() } else { x.strides() };
        for (at, v) in x.data.iter().enumerate() {
            let mut target = 0;
            for axis in (0..x.shape.len()).filter(|a| !self.axes.contains(a)) {
                target = target * x.shape[axis] + at / strides[axis] % x.shape[axis];
            }
            let slot = &mut out.data[target];
            *slot = self.function.combine(*slot, *v);
        }
        if self.function == ReduceFn::Mean {
            out.data.iter_mut().for_each(|v| *v /= count);
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(match self.function {
            ReduceFn::Sum | ReduceFn::Mean => Numerics::Accumulated,
            ReduceFn::Max | ReduceFn::Min => Numerics::Exact,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{close, f32s, fails, i32s, ramp, run};
    use super::*;

    #[test]
    fn two_by_three_by_hand() {
        let x = f32s(&[2, 3], &[1.0, 5.0, -3.0, 2.0, 2.0, 8.0]);
        let all = [
            (ReduceFn::Sum, vec![3.0, 7.0, 5.0], vec![3.0, 12.0]),
            (ReduceFn::Mean, vec![1.5, 3.5, 2.5], vec![1.0, 4.0]),
            (ReduceFn::Max, vec![2.0, 5.0, 8.0], vec![5.0, 8.0]),
            (ReduceFn::Min, vec![1.0, 2.0, -3.0], vec![-3.0, 2.0]),
        ];
        for (function, columns, rows) in all {
            close(
                &run(Reduce { function, axes: vec![0], keep: false }, std::slice::from_ref(&x))[0].data,
                &columns,
            );
            let kept =
                run(Reduce { function, axes: vec![1], keep: true }, std::slice::from_ref(&x)).remove(0);
            assert_eq!(kept.shape, [2, 1]);
            close(&kept.data, &rows);
        }
        let total =
            run(Reduce { function: ReduceFn::Sum, axes: vec![0, 1], keep: false }, std::slice::from_ref(&x));
        assert_eq!((total[0].shape.len(), total[0].data[0]), (0, 15.0));
        assert!(fails(Reduce { function: ReduceFn::Sum, axes: vec![2], keep: false }, &[x]).contains("axes"));
    }

    /// Nested loops over coordinates instead of a pass over memory.
    #[test]
    fn inner_and_outer_axes_of_a_cube() {
        let x = ramp(&[2, 3, 4]);
        let at = |i: usize, j: usize, k: usize| x.data[(i * 3 + j) * 4 + k];
        let sum = |axes: &[usize]| {
            let op = Reduce { function: ReduceFn::Sum, axes: axes.to_vec(), keep: false };
            run(op, std::slice::from_ref(&x)).remove(0)
        };
        let ends: Vec<f64> =
            (0..3).map(|j| (0..2).map(|i| (0..4).map(|k| at(i, j, k)).sum::<f64>()).sum()).collect();
        close(&sum(&[0, 2]).data, &ends);
        let middle: Vec<f64> =
            (0..2).flat_map(|i| (0..4).map(move |k| (0..3).map(|j| at(i, j, k)).sum())).collect();
        close(&sum(&[1]).data, &middle);
    }

    #[test]
    fn nothing_reduces_to_the_neutral_element() {
        let empty = f32s(&[2, 0], &[]);
        for (function, expected) in
            [(ReduceFn::Sum, 0.0), (ReduceFn::Max, f64::NEG_INFINITY), (ReduceFn::Min, f64::INFINITY)]
        {
            let op = Reduce { function, axes: vec![1], keep: false };
            assert_eq!(run(op, std::slice::from_ref(&empty))[0].data, [expected; 2]);
        }
        let mean = run(Reduce { function: ReduceFn::Mean, axes: vec![1], keep: false }, &[empty]).remove(0);
        assert!(mean.data.iter().all(|v| v.is_nan()) && mean.data.len() == 2);
    }

    #[test]
    fn axes_rise_and_elements_are_floats() {
        for axes in [vec![], vec![1, 0], vec![0, 0], vec![usize::MAX]] {
            let op = Reduce { function: ReduceFn::Max, axes, keep: true };
            assert!(fails(op, &[ramp(&[2, 2])]).contains("must rise"));
        }
        let op = Reduce { function: ReduceFn::Sum, axes: vec![0], keep: false };
        assert!(fails(op.clone(), &[i32s(&[1], &[0.0])]).contains("float"));
        assert!(fails(op, &[]).contains("takes 1"));
    }
}
