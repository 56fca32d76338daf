//! Attention of packed queries over a paged cache:
//! `%9 = paged_attention %q, %k, %v, %seq_starts, %kv_lens, %block_table {scale = 0.125}`.

use super::attention::{Mask, attend, need_heads};
use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_rank, need_same_dtype};
use super::paging::Paging;
use crate::attr::{AttrReader, Attrs};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Each row of `q [t, heads, d]` attends to the positions of its sequence up to its own in the caches
/// `k, v [pages, tokens_per_block, kv_heads, d]`, which already hold this step's rows; result as `q`. Positions and
/// pages follow [`Paging`].
#[derive(Clone, Debug, PartialEq)]
pub struct PagedAttention {
    /// Factor on `q . k`.
    pub scale: f64,
    /// With a value w, position `i` sees only `j > i - w`; 0 means no window.
    pub window: usize,
}

impl OpDef for PagedAttention {
    const NAMES: &'static [&'static str] = &["paged_attention"];

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("scale", self.scale);
        attrs.set_unless("window", self.window, 0);
        attrs
    }

    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(PagedAttention { scale: attrs.float("scale")?, window: attrs.usize_or("window", 0)? })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [q, k, v, seq_starts, kv_lens, block_table] = ctx.exactly()?;
        need_rank("the key cache", k, 4)?;
        if k != v {
            return Err(format!("key cache {k} and value cache {v} differ in type"));
        }
        need_same_dtype(q, k)?;
        need_heads(q, &k.shape[2], &k.shape[3])?;
        Paging::infer(seq_starts, kv_lens, block_table)?;
        Ok(vec![q.clone()])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let [q, k, v] = [ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?];
        let mut out = ctx.empty(0)?;
        let (heads, d, kv_heads) = (q.shape[1], q.shape[2], k.shape[2]);
        let group = heads / kv_heads.max(1);
        let mask = Mask { scale: self.scale, causal: true, window: self.window };
        let paging = Paging::read(ctx, 3, &k.shape, q.shape[0])?;
        for (row, token) in paging.tokens.iter().enumerate() {
            let slots = (0..=token.position)
                .filter(|j| mask.sees(token.position, *j))
                .map(|j| paging.slot(token.sequence, j))
                .collect::<Result<Vec<_>, _>>()?;
            for head in 0..heads {
                let at = |slot: &usize| (slot * kv_heads + head / group) * d;
                let keys: Vec<&[f64]> = slots.iter().map(|s| &k.data[at(s)..at(s) + d]).collect();
                let values: Vec<&[f64]> = slots.iter().map(|s| &v.data[at(s)..at(s) + d]).collect();
                let here = (row * heads + head) * d;
                attend(&q.data[here..here + d], &keys, &values, self.scale, &mut out.data[here..here + d]);
            }
        }
        Ok(vec![out])
    }

    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Accumulated)
    }
}
