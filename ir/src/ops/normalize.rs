//! Normalisations along an axis: softmax, layer_norm, l2_normalize.

use super::def::{
    EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_axis, need_dim, need_eps, need_float, need_rank,
    need_same_dtype,
};
use crate::attr::{AttrReader, Attrs};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// `exp(x) / sum(exp(x))` along one axis; `%1 = softmax %0 {axis = 1}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Softmax {
    /// The axis.
    pub axis: usize,
}

impl OpDef for Softmax {
    const NAMES: &'static [&'static str] = &["softmax"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("axis", self.axis);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Softmax { axis: attrs.usize("axis")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        need_float("the operand", x)?;
        need_axis(self.axis, x)?;
        Ok(vec![x.clone()])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.operand(0)?.clone();
        if out.data.is_empty() {
            return Ok(vec![out]);
        }
        let inner: usize = out.shape[self.axis + 1..].iter().product();
        let n = out.shape[self.axis];
        for start in (0..out.data.len()).filter(|i| (i / inner.max(1)).is_multiple_of(n.max(1))) {
            let places = || (0..n).map(|j| start + j * inner);
            let top = places().map(|p| out.data[p]).fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = places().map(|p| (out.data[p] - top).exp()).sum();
            for p in (0..n).map(|j| start + j * inner) {
                out.data[p] = (out.data[p] - top).exp() / total;
            }
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits { in_place: Some(0), ..OpTraits::plain(Numerics::Accumulated) }
    }
}

/// `(x - mean) / sqrt(variance + eps) * w + b` over the last axis (Ba, Kiros and Hinton 2016); `x [.., n]`, `w [n]`,
/// optional `b [n]`; `%1 = layer_norm %0, @w, @b {eps = 1e-12}`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f64,
}

impl OpDef for LayerNorm {
    const NAMES: &'static [&'static str] = &["layer_norm"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("eps", self.eps);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(LayerNorm { eps: attrs.float("eps")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        ctx.at_least(2)?;
        if ctx.operands.len() > 3 {
            return Err(format!("takes 2 or 3 operands, got {}", ctx.operands.len()));
        }
        need_eps(self.eps)?;
        let x = &ctx.operands[0];
        need_float("operand 0", x)?;
        for vector in &ctx.operands[1..] {
            need_same_dtype(x, vector)?;
            need_rank("weight and bias", vector, 1)?;
            need_dim("the extent of weight and bias", &vector.shape[0], &x.last())?;
        }
        Ok(vec![x.clone()])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.operand(0)?.clone();
        let weight = ctx.operand(1)?;
        let bias = ctx.operands.get(2);
        let n = weight.elements();
        for row in out.data.chunks_mut(n.max(1)) {
            let mean = row.iter().sum::<f64>() / n as f64;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            for (c, v) in row.iter_mut().enumerate() {
                let shift = bias.map_or(0.0, |b| b.data[c]);
                *v = (*v - mean) / (variance + self.eps).sqrt() * weight.data[c] + shift;
            }
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits { in_place: Some(0), ..OpTraits::plain(Numerics::Accumulated) }
    }
}

/// `x / max(|x|, eps)` over the last axis; `%1 = l2_normalize %0 {eps = 1e-12}`.
#[derive(Clone, Debug, PartialEq)]
pub struct L2Normalize {
    /// Smallest divisor.
    pub eps: f64,
}

impl OpDef for L2Normalize {
    const NAMES: &'static [&'static str] = &["l2_normalize"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("eps", self.eps);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(L2Normalize { eps: attrs.float("eps")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        need_eps(self.eps)?;
        need_float("the operand", x)?;
        Ok(vec![x.clone()])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.operand(0)?.clone();
        let n = out.last().max(1);
        for row in out.data.chunks_mut(n) {
            let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt().max(self.eps);
            row.iter_mut().for_each(|v| *v /= norm);
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits { in_place: Some(0), ..OpTraits::plain(Numerics::Accumulated) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::add_norm::NormKind;
    use super::super::testing::{close, f32s, fails, i32s, ramp, run};
    use super::super::{AddNorm, RmsNorm};
    use super::*;

    #[test]
    fn softmax_of_logarithms_is_their_proportion() {
        let logs = [1.0f64, 2.0, 5.0, 3.0, 3.0, 2.0].map(f64::ln);
        let out = run(Softmax { axis: 1 }, &[f32s(&[2, 3], &logs)]).remove(0);
        close(&out.data, &[0.125, 0.25, 0.625, 0.375, 0.375, 0.25]);
        let out = run(Softmax { axis: 0 }, &[f32s(&[2, 3], &logs)]).remove(0);
        close(&out.data, &[0.25, 0.4, 5.0 / 7.0, 0.75, 0.6, 2.0 / 7.0]);
        let shifted = run(Softmax { axis: 0 }, &[f32s(&[2], &[1000.0, 1000.0])]).remove(0);
        close(&shifted.data, &[0.5, 0.5]);
        assert!(fails(Softmax { axis: 2 }, &[ramp(&[2, 3])]).contains("axis"));
    }

    #[test]
    fn layer_norm_standardises() {
        let out = run(
            LayerNorm { eps: 0.0 },
            &[f32s(&[1, 2], &[3.0, 7.0]), f32s(&[2], &[2.0, 10.0]), f32s(&[2], &[0.5, 1.0])],
        );
        close(&out[0].data, &[-1.5, 11.0]);
        let plain = run(LayerNorm { eps: 1e-5 }, &[ramp(&[3, 8]), f32s(&[8], &[1.0; 8])]).remove(0);
        for row in plain.data.chunks(8) {
            assert!(row.iter().sum::<f64>().abs() < 1e-9);
            assert!((row.iter().map(|v| v * v).sum::<f64>() / 8.0 - 1.0).abs() < 1e-3);
        }
        assert!(fails(LayerNorm { eps: 0.0 }, &[ramp(&[2, 3]), ramp(&[2])]).contains("extent"));
    }

    #[test]
    fn rms_norm_scales_to_unit_mean_square() {
        let out = run(RmsNorm { eps: 0.0 }, &[f32s(&[1, 2], &[1.0, 7.0]), f32s(&[2], &[1.0, 2.0])]);
        close(&out[0].data, &[0.2, 2.8]);
        assert!(fails(RmsNorm { eps: 0.0 }, &[ramp(&[2, 3]), ramp(&[4])]).contains("extent"));
    }

    #[test]
    fn l2_normalize_gives_unit_rows_and_keeps_zero() {
        let out = run(L2Normalize { eps: 1e-12 }, &[f32s(&[2, 2], &[3.0, 4.0, 0.0, 0.0])]).remove(0);
        close(&out.data, &[0.6, 0.8, 0.0, 0.0]);
    }

    #[test]
    fn normalisations_refuse_absurd_parameters_and_types() {
        let (x, w) = (ramp(&[2, 3]), ramp(&[3]));
        for eps in [f64::NAN, f64::INFINITY, -1e-5] {
            assert!(fails(LayerNorm { eps }, &[x.clone(), w.clone()]).contains("eps"));
            assert!(fails(L2Normalize { eps }, std::slice::from_ref(&x)).contains("eps"));
            assert!(fails(RmsNorm { eps }, &[x.clone(), w.clone()]).contains("eps"));
            let add_norm = AddNorm { kind: NormKind::Rms, eps, sum: false };
            assert!(fails(add_norm, &[x.clone(), x.clone(), w.clone()]).contains("eps"));
        }
        let plain = LayerNorm { eps: 1e-5 };
        assert!(fails(plain.clone(), std::slice::from_ref(&x)).contains("at least 2"));
        let four = [x.clone(), w.clone(), w.clone(), w.clone()];
        assert!(fails(plain.clone(), &four).contains("2 or 3"));
        assert!(fails(plain.clone(), &[x.clone(), w, x.clone()]).contains("rank 1"));
        assert!(fails(plain, &[x.clone(), i32s(&[3], &[0.0; 3])]).contains("element types"));
        let ints = i32s(&[2], &[0.0; 2]);
        assert!(fails(Softmax { axis: 0 }, std::slice::from_ref(&ints)).contains("float"));
        assert!(fails(Softmax { axis: usize::MAX }, &[x]).contains("axis"));
        assert!(fails(L2Normalize { eps: 0.0 }, &[ints]).contains("float"));
    }

    /// Lines gathered along the axis, each divided by its own sum.
    #[test]
    fn softmax_of_a_cube_runs_along_the_middle() {
        let x = ramp(&[2, 3, 4]);
        let out = run(Softmax { axis: 1 }, std::slice::from_ref(&x)).remove(0);
        for (i, k) in (0..2).flat_map(|i| (0..4).map(move |k| (i, k))) {
            let line = |t: &Tensor| [0, 1, 2].map(|j| t.data[(i * 3 + j) * 4 + k]);
            let raised = line(&x).map(f64::exp);
            close(&line(&out), &raised.map(|e| e / raised.iter().sum::<f64>()));
        }
    }
}
