//! Root mean square normalisation (Zhang and Sennrich 2019): `%1 = rms_norm %0, @w {eps = 1e-5}`.

use super::def::{
    EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_dim, need_eps, need_float, need_rank, need_same_dtype,
};
use crate::attr::{AttrReader, Attrs};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// `y = x / sqrt(mean(x^2) + eps) * w` over the last axis; `x [.., n]`, `w [n]`, result as `x`.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f64,
}

impl OpDef for RmsNorm {
    const NAMES: &'static [&'static str] = &["rms_norm"];

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("eps", self.eps);
        attrs
    }

    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(RmsNorm { eps: attrs.float("eps")? })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x, w] = ctx.exactly()?;
        need_eps(self.eps)?;
        need_float("operand 0", x)?;
        need_same_dtype(x, w)?;
        need_rank("the weight", w, 1)?;
        need_dim("the weight's extent", &w.shape[0], &x.last())?;
        Ok(vec![x.clone()])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.operand(0)?.clone();
        let weight = ctx.operand(1)?;
        for row in out.data.chunks_mut(weight.elements().max(1)) {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + self.eps).sqrt();
            row.iter_mut().zip(&weight.data).for_each(|(v, w)| *v *= scale * w);
        }
        Ok(vec![out])
    }

    fn traits(&self) -> OpTraits {
        OpTraits { in_place: Some(0), ..OpTraits::plain(Numerics::Accumulated) }
    }
}
