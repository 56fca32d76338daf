//! Mean over the rows of each packed sequence: `%3 = mean_pool %0, %seq_starts`.

use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_float, need_index, need_rank};
use super::paging::sequences;
use crate::attr::{AttrReader, Attrs};
use crate::dim::Dim;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// `x [t, h]`, `seq_starts i32[b + 1]`, result `[b, h]`; an empty sequence gives zeros.
#[derive(Clone, Debug, PartialEq)]
pub struct MeanPool;

impl OpDef for MeanPool {
    const NAMES: &'static [&'static str] = &["mean_pool"];

    fn attrs(&self) -> Attrs {
        Attrs::default()
    }

    fn from_attrs(_: &str, _: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(MeanPool)
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x, seq_starts] = ctx.exactly()?;
        need_float("operand 0", x)?;
        need_rank("operand 0", x, 2)?;
        need_index("seq_starts", seq_starts)?;
        need_rank("seq_starts", seq_starts, 1)?;
        let sequences = seq_starts.shape[0].sub(&Dim::from(1i64));
        Ok(vec![TensorType::new(x.dtype, [sequences, x.shape[1].clone()])])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let x = ctx.operand(0)?;
        let mut out = ctx.empty(0)?;
        let width = x.shape[1];
        for (s, (start, end)) in sequences(ctx.operand(1)?, x.shape[0])?.into_iter().enumerate() {
            for row in start..end {
                for c in 0..width {
                    out.data[s * width + c] += x.data[row * width + c] / (end - start) as f64;
                }
            }
        }
        Ok(vec![out])
    }

    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Accumulated)
    }
}
