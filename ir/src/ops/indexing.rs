//! Ops that read or write at computed places: embedding, gather, scatter.

use super::def::{
    EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_axis, need_dim, need_float, need_index, need_rank,
    need_same_dtype,
};
use crate::attr::{AttrReader, Attrs};
use crate::tensor::Tensor;
use crate::types::TensorType;

fn checked(value: f64, extent: usize) -> Result<usize, String> {
    if value >= 0.0 && value < extent as f64 {
        Ok(value as usize)
    } else {
        Err(format!("index {value} is outside 0..{extent}"))
    }
}

/// Slices `idx` of `x` along `axis`, as numpy's `take`: result `x[..axis] + idx.shape + x[axis+1..]`;
/// `%2 = gather %x, %idx {axis = 0}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Gather {
    /// The axis.
    pub axis: usize,
}

fn take(x: &Tensor, idx: &Tensor, axis: usize, out: &mut Tensor) -> Result<(), String> {
    let extent = x.shape[axis];
    let indices = idx.data.iter().map(|i| checked(*i, extent)).collect::<Result<Vec<_>, _>>()?;
    if out.data.is_empty() {
        return Ok(());
    }
    let inner: usize = x.shape[axis + 1..].iter().product();
    let outer: usize = x.shape[..axis].iter().product();
    let mut at = 0;
    for o in 0..outer {
        for i in &indices {
            let from = (o * extent + i) * inner;
            out.data[at..at + inner].copy_from_slice(&x.data[from..from + inner]);
            at += inner;
        }
    }
    Ok(())
}

impl OpDef for Gather {
    const NAMES: &'static [&'static str] = &["gather"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("axis", self.axis);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Gather { axis: attrs.usize("axis")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x, idx] = ctx.exactly()?;
        need_index("the indices", idx)?;
        need_axis(self.axis, x)?;
        let mut shape = x.shape[..self.axis].to_vec();
        shape.extend(idx.shape.iter().cloned());
        shape.extend(x.shape[self.axis + 1..].iter().cloned());
        Ok(vec![TensorType { dtype: x.dtype, shape: shape.into() }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.empty(0)?;
        take(ctx.operand(0)?, ctx.operand(1)?, self.axis, &mut out)?;
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Exact)
    }
}

/// Rows of a table: `table [v, h]`, `ids` of any shape, result `ids.shape + [h]`; `%1 = embedding @table, %ids`.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding;

impl OpDef for Embedding {
    const NAMES: &'static [&'static str] = &["embedding"];
    fn attrs(&self) -> Attrs {
        Attrs::default()
    }
    fn from_attrs(_: &str, _: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Embedding)
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [table, ids] = ctx.exactly()?;
        need_float("the table", table)?;
        need_rank("the table", table, 2)?;
        need_index("the ids", ids)?;
        let mut shape = ids.shape.clone();
        shape.push(table.shape[1].clone());
        Ok(vec![TensorType { dtype: table.dtype, shape }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.empty(0)?;
        take(ctx.operand(0)?, ctx.operand(1)?, 0, &mut out)?;
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Exact)
    }
}

/// A copy of `x` whose slices `idx[i]` along `axis` are `updates`' slices `i`; the last of equal indices wins;
/// `%3 = scatter %x, %idx, %updates {axis = 0}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Scatter {
    /// The axis.
    pub axis: usize,
}

impl OpDef for Scatter {
    const NAMES: &'static [&'static str] = &["scatter"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("axis", self.axis);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Scatter { axis: attrs.usize("axis")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x, idx, updates] = ctx.exactly()?;
        need_index("the indices", idx)?;
        need_rank("the indices", idx, 1)?;
        need_same_dtype(x, updates)?;
        need_rank("the updates", updates, x.rank())?;
        need_axis(self.axis, x)?;
        for axis in 0..x.rank() {
            let expected = if axis == self.axis { &idx.shape[0] } else { &x.shape[axis] };
            need_dim("an extent of the updates", &updates.shape[axis], expected)?;
        }
        Ok(vec![x.clone()])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.operand(0)?.clone();
        let (idx, updates) = (ctx.operand(1)?, ctx.operand(2)?);
        let extent = out.shape[self.axis];
        let targets = idx.data.iter().map(|i| checked(*i, extent)).collect::<Result<Vec<_>, _>>()?;
        if out.data.is_empty() {
            return Ok(vec![out]);
        }
        let inner: usize = out.shape[self.axis + 1..].iter().product();
        let outer: usize = out.shape[..self.axis].iter().product();
        for o in 0..outer {
            for (i, target) in targets.iter().enumerate() {
                let to = (o * extent + target) * inner;
                let from = (o * idx.data.len() + i) * inner;
                out.data[to..to + inner].copy_from_slice(&updates.data[from..from + inner]);
            }
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits { in_place: Some(0), ..OpTraits::plain(Numerics::Exact) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{f32s, fails, fails_eval, i32s, ramp, run};
    use super::*;

    #[test]
    fn gather_takes_columns() {
        let x = f32s(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let out = run(Gather { axis: 1 }, &[x.clone(), i32s(&[2, 1], &[2.0, 0.0])]).remove(0);
        assert_eq!((out.shape, out.data), (vec![2, 2, 1], vec![3.0, 1.0, 6.0, 4.0]));
        assert!(fails_eval(Gather { axis: 1 }, &[x.clone(), i32s(&[1], &[3.0])]).contains("outside"));
        assert!(fails(Gather { axis: 2 }, &[x.clone(), i32s(&[1], &[0.0])]).contains("axis"));
        assert!(fails(Gather { axis: 0 }, &[x.clone(), x]).contains("i32"));
    }

    #[test]
    fn embedding_takes_rows() {
        let table = f32s(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let out = run(Embedding, &[table.clone(), i32s(&[3], &[2.0, 0.0, 2.0])]).remove(0);
        assert_eq!(out.data, [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        assert!(fails_eval(Embedding, &[table, i32s(&[1], &[-1.0])]).contains("outside"));
    }

    #[test]
    fn scatter_undoes_gather() {
        let x = ramp(&[4, 2]);
        let idx = i32s(&[4], &[2.0, 0.0, 3.0, 1.0]);
        let taken = run(Gather { axis: 0 }, &[x.clone(), idx.clone()]).remove(0);
        let zeros = f32s(&[4, 2], &[0.0; 8]);
        assert_eq!(run(Scatter { axis: 0 }, &[zeros.clone(), idx, taken]).remove(0), x);
        let last = run(
            Scatter { axis: 1 },
            &[f32s(&[1, 2], &[0.0; 2]), i32s(&[2], &[0.0, 0.0]), f32s(&[1, 2], &[7.0, 9.0])],
        );
        assert_eq!(last[0].data, [9.0, 0.0]);
        assert!(
            fails(Scatter { axis: 0 }, &[zeros, i32s(&[3], &[0.0; 3]), ramp(&[2, 2])]).contains("extent")
        );
    }

    #[test]
    fn indices_are_checked_even_if_nothing_is_moved() {
        let (x, idx) = (f32s(&[3, 0], &[]), i32s(&[1], &[3.0]));
        assert!(fails_eval(Gather { axis: 0 }, &[x.clone(), idx.clone()]).contains("3 is outside 0..3"));
        assert!(fails_eval(Embedding, &[x.clone(), idx.clone()]).contains("outside"));
        assert!(fails_eval(Scatter { axis: 0 }, &[x, idx, f32s(&[1, 0], &[])]).contains("outside"));
    }

    #[test]
    fn embedding_keeps_the_shape_of_the_ids() {
        let out = run(Embedding, &[ramp(&[5, 3]), i32s(&[2, 1], &[4.0, 1.0])]).remove(0);
        assert_eq!(out.shape, [2, 1, 3]);
        assert_eq!(out.data, [&ramp(&[5, 3]).data[12..15], &ramp(&[5, 3]).data[3..6]].concat());
        assert!(fails(Embedding, &[ramp(&[5]), i32s(&[1], &[0.0])]).contains("rank 2"));
        assert!(fails(Embedding, &[ramp(&[5, 3]), ramp(&[1])]).contains("i32"));
        assert!(fails(Embedding, &[i32s(&[1, 1], &[0.0]), i32s(&[1], &[0.0])]).contains("float"));
        assert!(fails(Embedding, &[ramp(&[5, 3])]).contains("takes 2"));
    }

    #[test]
    fn scatter_refuses_what_does_not_fit() {
        let (x, idx, updates) = (ramp(&[3, 2]), i32s(&[1], &[1.0]), ramp(&[1, 2]));
        let axis = Scatter { axis: 0 };
        assert!(fails(axis.clone(), &[x.clone(), updates.clone(), updates.clone()]).contains("i32"));
        assert!(fails(axis.clone(), &[x.clone(), i32s(&[1, 1], &[0.0]), updates.clone()]).contains("rank 1"));
        assert!(fails(axis.clone(), &[x.clone(), idx.clone(), ramp(&[2])]).contains("rank 2"));
        assert!(
            fails(axis.clone(), &[x.clone(), idx.clone(), i32s(&[1, 2], &[0.0; 2])])
                .contains("element types")
        );
        assert!(fails(Scatter { axis: usize::MAX }, &[x.clone(), idx, updates.clone()]).contains("axis"));
        assert!(fails_eval(axis, &[x, i32s(&[1], &[-1.0]), updates]).contains("outside"));
    }
}
