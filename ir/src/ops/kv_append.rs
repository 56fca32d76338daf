//! Writes the keys or values of a step into the paged cache:
//! `%9 = kv_append @kv0.k, %8, %seq_starts, %kv_lens, %block_table`.

use super::def::{
    EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_dim, need_index, need_rank, need_same_dtype,
};
use super::paging::Paging;
use crate::attr::{AttrReader, Attrs};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Row `i` of `x [t, kv_heads, d]` goes to its position of the cache `state [pages, tokens_per_block, kv_heads, d]`.
/// Positions and pages follow [`Paging`]; the result is the next version of the state, in place.
#[derive(Clone, Debug, PartialEq)]
pub struct KvAppend;

impl OpDef for KvAppend {
    const NAMES: &'static [&'static str] = &["kv_append"];

    fn attrs(&self) -> Attrs {
        Attrs::default()
    }

    fn from_attrs(_: &str, _: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(KvAppend)
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [state, x, seq_starts, kv_lens, block_table] = ctx.exactly()?;
        need_rank("the state", state, 4)?;
        need_rank("the rows", x, 3)?;
        need_same_dtype(state, x)?;
        need_dim("kv heads of the rows", &x.shape[1], &state.shape[2])?;
        need_dim("head size of the rows", &x.shape[2], &state.shape[3])?;
        need_index("seq_starts", seq_starts)?;
        Paging::infer(seq_starts, kv_lens, block_table)?;
        Ok(vec![state.clone()])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut state = ctx.operand(0)?.clone();
        let x = ctx.operand(1)?;
        let paging = Paging::read(ctx, 2, &state.shape, x.shape[0])?;
        let row = x.shape[1] * x.shape[2];
        for (i, token) in paging.tokens.iter().enumerate() {
            let slot = paging.slot(token.sequence, token.position)?;
            state.data[slot * row..(slot + 1) * row].copy_from_slice(&x.data[i * row..(i + 1) * row]);
        }
        Ok(vec![state])
    }

    fn traits(&self) -> OpTraits {
        OpTraits { writes_state: true, ..OpTraits::plain(Numerics::Exact) }
    }
}
