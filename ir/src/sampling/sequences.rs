//! Samples of ops on packed sequences. Their index operands are the draft's own: only those fit together.

use super::Sample;
use super::draft::{Draft, TAME};
use super::known::{Known, computes};
use crate::dtype::DType;
use crate::graph::Operand;
use crate::ops::attention::Mask;
use crate::ops::rope::{RopeLayout, RopeScaling};
use crate::ops::{Attention, KvAppend, MeanPool, Op, PagedAttention, Rope};
use crate::types::TensorType;

/// Packed rows of `heads` heads of `d`, present or new.
pub(super) fn heads(draft: &mut Draft, dtype: DType, heads: usize, d: usize) -> Operand {
    let ty = TensorType::new(dtype, [draft.rows(), heads.into(), d.into()]);
    draft.value(&ty, -TAME, TAME)
}

impl Sample for Rope {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let even = |k: &Known| {
            let d = k.ty.shape.last().and_then(|d| d.as_const()).unwrap_or(1);
            computes(k.ty.dtype) && k.ty.rank() == 3 && d % 2 == 0 && k.bound() <= TAME
        };
        let x = match draft.find(even) {
            Some(found) => found,
            None => {
                let dtype = draft.float_type();
                let (n, d) = (draft.random.between(1, 4), draft.random.pick(&[2, 4, 8]));
                heads(draft, dtype, n, d)
            }
        };
        let ty = draft.ty(x);
        let d = ty.shape[2].as_const()? as usize;
        let index = draft.random.pick(&[DType::I32, DType::I32, DType::I64]);
        let positions = draft.value(&TensorType::new(index, [ty.shape[0].clone()]), 0.0, 40.0);
        let layout = draft.random.pick(&[RopeLayout::Half, RopeLayout::Interleaved]);
        let scaling = match draft.random.below(4) {
            0 => RopeScaling::Linear { factor: 2.0 },
            1 => RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original: 32.0,
            },
            _ => RopeScaling::Default,
        };
        let rotary = if d > 2 && draft.random.once_in(3) { 2 * draft.random.between(1, d / 2) } else { 0 };
        let base = draft.random.pick(&[100.0, 10000.0]);
        Some((Rope { base, layout, scaling, rotary }.into(), vec![x, positions]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let bound = operands[0].bound() * 2f64.sqrt();
        (operands[1].low >= 0.0 && operands[1].high <= 64.0).then_some((-bound, bound))
    }
}

/// Heads, key heads and head size.
pub(super) fn head_counts(draft: &mut Draft) -> (usize, usize, usize) {
    let kv = draft.random.between(1, 2);
    (kv * draft.random.between(1, 3), kv, draft.random.pick(&[2, 4, 8, 12]))
}

fn scale(draft: &mut Draft) -> f64 {
    draft.random.pick(&[0.25, 0.5, 1.0])
}

fn window(draft: &mut Draft) -> usize {
    if draft.random.once_in(3) { draft.random.between(1, 4) } else { 0 }
}

/// A cache and its head counts, present or new.
fn cache(draft: &mut Draft) -> Option<(usize, TensorType)> {
    if draft.nodes() > 0
        && !draft.random.once_in(4)
        && let Some(found) = draft.find_cache(|_| true)
    {
        let ty = draft.known(draft.cache_version(found)).ty.clone();
        return Some((found, ty));
    }
    let (_, kv, d) = head_counts(draft);
    let dtype = draft.float_type();
    let made = draft.cache(dtype, kv, d);
    Some((made, draft.known(draft.cache_version(made)).ty.clone()))
}

impl Sample for KvAppend {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let (cache, ty) = cache(draft)?;
        let (kv, d) = (ty.shape[2].as_const()? as usize, ty.shape[3].as_const()? as usize);
        let x = heads(draft, ty.dtype, kv, d);
        let [starts, lens, table] = draft.paging();
        Some((KvAppend.into(), vec![draft.cache_version(cache), x, starts, lens, table]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let (state, x) = (&operands[0], &operands[1]);
        Some((state.low.min(x.low), state.high.max(x.high)))
    }
}

impl Sample for PagedAttention {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let (k, ty) = cache(draft)?;
        let v = draft.find_cache(|other| *other == ty)?;
        let (kv, d) = (ty.shape[2].as_const()? as usize, ty.shape[3].as_const()? as usize);
        let group = draft.random.between(1, 3);
        let q = heads(draft, ty.dtype, kv * group, d);
        let [starts, lens, table] = draft.paging();
        let op = PagedAttention { scale: scale(draft), window: window(draft) };
        let (k, v) = (draft.cache_version(k), draft.cache_version(v));
        Some((op.into(), vec![q, k, v, starts, lens, table]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        // Scores far apart make the weights sensitive.
        let scores = operands[0].bound() * operands[1].bound() * self.scale;
        (scores <= 64.0).then_some((operands[2].low.min(0.0), operands[2].high.max(0.0)))
    }
}

impl Sample for Attention {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let (n, kv, d) = head_counts(draft);
        let dtype = draft.float_type();
        let (q, k, v) = (heads(draft, dtype, n, d), heads(draft, dtype, kv, d), heads(draft, dtype, kv, d));
        let [starts, ..] = draft.paging();
        // A mask that is not causal with a window still lets every row see itself.
        let mask = Mask { scale: scale(draft), causal: draft.random.once_in(2), window: window(draft) };
        Some((Attention { mask }.into(), vec![q, k, v, starts]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let scores = operands[0].bound() * operands[1].bound() * self.mask.scale;
        (scores <= 64.0).then_some((operands[2].low, operands[2].high))
    }
}

impl Sample for MeanPool {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let rows = draft.rows();
        let found = draft.find(|k| {
            computes(k.ty.dtype) && k.ty.rank() == 2 && k.ty.shape[0] == rows && k.bound() <= TAME
        })?;
        let [starts, ..] = draft.paging();
        Some((MeanPool.into(), vec![found, starts]))
    }
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        Some((operands[0].low.min(0.0), operands[0].high.max(0.0)))
    }
}
