//! Residual addition and normalisation in one node, as the fusion passes make it:
//! `%s, %n = add_rms_norm %x, %r, @w {eps = 1e-5}`.

use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_dim, need_eps, need_float, need_rank};
use crate::attr::{AttrReader, Attrs};
use crate::tensor::{Tensor, round_to};
use crate::types::TensorType;

/// Which normalisation follows the addition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormKind {
    /// [`super::RmsNorm`]
    Rms,
    /// `layer_norm` with weight and bias.
    Layer,
}

/// `s = x + r` rounded to the element type, `n = norm(s)`; `x, r [.., h]`, weight and (layer) bias `[h]`. Results
/// are `s` (unless `sum` is false) and `n`.
#[derive(Clone, Debug, PartialEq)]
pub struct AddNorm {
    /// Which normalisation.
    pub kind: NormKind,
    /// Added to the mean square or the variance.
    pub eps: f64,
    /// Whether the sum is a result.
    pub sum: bool,
}

impl OpDef for AddNorm {
    const NAMES: &'static [&'static str] = &["add_rms_norm", "add_layer_norm"];

    fn name(&self) -> &'static str {
        Self::NAMES[usize::from(self.kind == NormKind::Layer)]
    }

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("eps", self.eps);
        attrs.set_unless("sum", self.sum, false);
        attrs
    }

    fn from_attrs(name: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        let kind = if name == Self::NAMES[0] { NormKind::Rms } else { NormKind::Layer };
        Ok(AddNorm { kind, eps: attrs.float("eps")?, sum: attrs.flag("sum")? })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let vectors = if self.kind == NormKind::Rms { 1 } else { 2 };
        if ctx.operands.len() != 2 + vectors {
            return Err(format!("takes {} operands, got {}", 2 + vectors, ctx.operands.len()));
        }
        let x = &ctx.operands[0];
        need_eps(self.eps)?;
        need_float("operand 0", x)?;
        if &ctx.operands[1] != x {
            return Err(format!("the addends {x} and {} differ in type", ctx.operands[1]));
        }
        for vector in &ctx.operands[2..] {
            need_rank("weight and bias", vector, 1)?;
            need_dim("the extent of weight and bias", &vector.shape[0], &x.last())?;
            if vector.dtype != x.dtype {
                return Err(format!("weight and bias must be {}, not {vector}", x.dtype));
            }
        }
        Ok(vec![x.clone(); if self.sum { 2 } else { 1 }])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let (x, r, weight) = (ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?);
        let mut sum = x.clone();
        sum.data.iter_mut().zip(&r.data).for_each(|(a, b)| *a = round_to(x.dtype, *a + b));
        let mut normed = sum.clone();
        let n = weight.elements().max(1);
        for row in normed.data.chunks_mut(n) {
            let mean = match self.kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => row.iter().sum::<f64>() / n as f64,
            };
            let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n as f64;
            let scale = 1.0 / (variance + self.eps).sqrt();
            for (c, v) in row.iter_mut().enumerate() {
                *v = (*v - mean) * scale * weight.data[c];
                if self.kind == NormKind::Layer {
                    *v += ctx.operand(3)?.data[c];
                }
            }
        }
        Ok(if self.sum { vec![sum, normed] } else { vec![normed] })
    }

    fn traits(&self) -> OpTraits {
        OpTraits { in_place: Some(0), fused_only: true, ..OpTraits::plain(Numerics::Accumulated) }
    }
}
