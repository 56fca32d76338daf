//! Attention over packed sequences without a cache, as encoders use it:
//! `%4 = attention %q, %k, %v, %seq_starts {scale = 0.125}`.

use super::def::{
    EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_dim, need_float, need_index, need_rank,
    need_same_dtype,
};
use super::paging::sequences;
use crate::attr::{AttrReader, Attrs};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Who may see whom, and the score's scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    /// Factor on `q . k`.
    pub scale: f64,
    /// Position `i` sees positions `j <= i` only.
    pub causal: bool,
    /// With a value w, position `i` sees only `j > i - w`; 0 means no window.
    pub window: usize,
}

impl Mask {
    pub(super) fn write(&self, attrs: &mut Attrs) {
        attrs.set("scale", self.scale);
        attrs.set_unless("causal", self.causal, false);
        attrs.set_unless("window", self.window, 0);
    }

    pub(super) fn read(attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Mask {
            scale: attrs.float("scale")?,
            causal: attrs.flag("causal")?,
            window: attrs.usize_or("window", 0)?,
        })
    }

    /// Whether position `i` sees position `j`.
    pub fn sees(&self, i: usize, j: usize) -> bool {
        (!self.causal || j <= i) && (self.window == 0 || j + self.window > i)
    }
}

/// Checks `q [t, heads, d]` against keys or values with `kv_heads` heads: the sizes agree and the query heads
/// divide evenly.
pub(super) fn need_heads(q: &TensorType, kv_heads: &crate::Dim, d: &crate::Dim) -> Result<(), String> {
    need_float("the queries", q)?;
    need_rank("the queries", q, 3)?;
    need_dim("the head size of keys and values", d, &q.shape[2])?;
    match (q.shape[1].as_const(), kv_heads.as_const()) {
        (Some(heads), Some(kv)) if heads > 0 && kv > 0 && heads % kv == 0 => Ok(()),
        (heads, kv) => Err(format!("{heads:?} query heads cannot share {kv:?} key heads")),
    }
}

/// `softmax(scale q k^T + mask) v` within each sequence; `q [t, heads, d]`, `k, v [t, kv_heads, d]`,
/// `seq_starts i32[b + 1]`, result as `q`. Query head `h` uses key head `h / (heads / kv_heads)`.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Mask and scale.
    pub mask: Mask,
}

/// One query row against a list of key and value rows: the definition of attention.
pub(super) fn attend(q: &[f64], keys: &[&[f64]], values: &[&[f64]], scale: f64, out: &mut [f64]) {
    let scores: Vec<f64> =
        keys.iter().map(|k| scale * q.iter().zip(*k).map(|(a, b)| a * b).sum::<f64>()).collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
    let total: f64 = weights.iter().sum();
    for (weight, value) in weights.iter().zip(values) {
        out.iter_mut().zip(*value).for_each(|(o, v)| *o += weight / total * v);
    }
}

impl OpDef for Attention {
    const NAMES: &'static [&'static str] = &["attention"];

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        self.mask.write(&mut attrs);
        attrs
    }

    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Attention { mask: Mask::read(attrs)? })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [q, k, v, seq_starts] = ctx.exactly()?;
        need_rank("the keys", k, 3)?;
        if k != v {
            return Err(format!("keys {k} and values {v} differ in type"));
        }
        need_same_dtype(q, k)?;
        need_heads(q, &k.shape[1], &k.shape[2])?;
        need_dim("the number of keys", &k.shape[0], &q.shape[0])?;
        need_index("seq_starts", seq_starts)?;
        need_rank("seq_starts", seq_starts, 1)?;
        Ok(vec![q.clone()])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let [q, k, v] = [ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?];
        let mut out = ctx.empty(0)?;
        let (heads, d, kv_heads) = (q.shape[1], q.shape[2], k.shape[1]);
        let group = heads / kv_heads.max(1);
        for (start, end) in sequences(ctx.operand(3)?, q.shape[0])? {
            for row in start..end {
                for head in 0..heads {
                    let visible: Vec<usize> =
                        (start..end).filter(|j| self.mask.sees(row - start, j - start)).collect();
                    let rows = |x: &'_ Tensor| -> Vec<Vec<f64>> {
                        visible
                            .iter()
                            .map(|j| (j * kv_heads + head / group) * d)
                            .map(|at| x.data[at..at + d].to_vec())
                            .collect()
                    };
                    let (keys, values) = (rows(k), rows(v));
                    let at = (row * heads + head) * d;
                    attend(
                        &q.data[at..at + d],
                        &keys.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                        &values.iter().map(Vec::as_slice).collect::<Vec<_>>(),
                        self.mask.scale,
                        &mut out.data[at..at + d],
                    );
                }
            }
        }
        Ok(vec![out])
    }

    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Accumulated)
    }
}
