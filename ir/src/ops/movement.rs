//! Ops that move elements without arithmetic: cast, broadcast, reshape, transpose, slice, concat, iota, select.

use super::broadcasting::{broadcast_shapes, source_index};
use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_axis, need_dim, need_same_dtype};
use crate::attr::{Attr, AttrReader, Attrs};
use crate::dim::{Bindings, Dim, MAX_EXTENT};
use crate::dtype::DType;
use crate::tensor::{Tensor, round_to, strides};
use crate::types::{Shape, TensorType, product};

fn dims(shape: &[Dim]) -> Attr {
    Attr::List(shape.iter().cloned().map(Attr::Dim).collect())
}

/// Other element type; `%1 = cast %0 {to = bf16}`. Floats are rounded to nearest even. Integers drop the fraction,
/// saturate, and take 0 for NaN; `bool` tells whether the element differs from 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Cast {
    /// Element type of the result.
    pub to: DType,
}

impl OpDef for Cast {
    const NAMES: &'static [&'static str] = &["cast"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("to", self.to);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Cast { to: attrs.dtype("to")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        Ok(vec![x.with_dtype(self.to)])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.operand(0)?.clone();
        out.dtype = self.to;
        out.data.iter_mut().for_each(|v| {
            *v = if self.to == DType::I64 { (*v as i64) as f64 } else { round_to(self.to, *v) };
        });
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits { elementwise: true, ..OpTraits::plain(Numerics::Rounded) }
    }
}

/// Repeats elements to a larger shape by numpy rules; `%1 = broadcast %0 {shape = [$t, 64]}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Broadcast {
    /// Shape of the result.
    pub shape: Shape,
}

impl OpDef for Broadcast {
    const NAMES: &'static [&'static str] = &["broadcast"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("shape", dims(&self.shape));
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Broadcast { shape: attrs.dims("shape")?.into() })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        if broadcast_shapes(&x.shape, &self.shape)? != self.shape {
            return Err(format!("{x} does not broadcast to the asked shape"));
        }
        Ok(vec![TensorType { dtype: x.dtype, shape: self.shape.clone() }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let x = ctx.operand(0)?;
        let mut out = ctx.empty(0)?;
        let shape = out.shape.clone();
        out.data.iter_mut().enumerate().for_each(|(i, v)| *v = x.data[source_index(i, &shape, &x.shape)]);
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Exact)
    }
}

/// Other shape, same elements in row-major order; `%1 = reshape %0 {shape = [$t, 4, 64]}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshape {
    /// Shape of the result.
    pub shape: Shape,
}

/// Fails if `elements` may have saturated: such a number proves nothing.
fn need_countable(elements: &Dim) -> Result<(), String> {
    let mut ones = Bindings::new();
    elements.symbols().into_iter().for_each(|sym| ones.set(sym, 1));
    match elements.eval(&ones) {
        Some(count) if count <= MAX_EXTENT => Ok(()),
        _ => Err(format!("more than {MAX_EXTENT} elements")),
    }
}

impl OpDef for Reshape {
    const NAMES: &'static [&'static str] = &["reshape"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("shape", dims(&self.shape));
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Reshape { shape: attrs.dims("shape")?.into() })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        let elements = product(&self.shape);
        need_dim("the number of elements", &elements, &x.elements())?;
        need_countable(&elements)?;
        Ok(vec![TensorType { dtype: x.dtype, shape: self.shape.clone() }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let (x, mut out) = (ctx.operand(0)?, ctx.empty(0)?);
        if x.data.len() != out.data.len() {
            return Err(format!("{} elements do not fill {:?}", x.data.len(), out.shape));
        }
        out.data.copy_from_slice(&x.data);
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits { view: true, in_place: Some(0), ..OpTraits::plain(Numerics::Exact) }
    }
}

/// Axes permuted: result axis `i` is operand axis `perm[i]`; `%1 = transpose %0 {perm = [1, 0]}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Transpose {
    /// Operand axis of each result axis.
    pub perm: Vec<usize>,
}

/// Whether `perm` names each of `0..perm.len()` once.
pub fn is_permutation(perm: &[usize]) -> bool {
    let mut seen = vec![false; perm.len()];
    perm.iter().all(|p| seen.get_mut(*p).is_some_and(|s| !std::mem::replace(s, true)))
}

impl OpDef for Transpose {
    const NAMES: &'static [&'static str] = &["transpose"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("perm", self.perm.clone());
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Transpose { perm: attrs.usizes("perm")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        if self.perm.len() != x.rank() || !is_permutation(&self.perm) {
            return Err(format!("{:?} is no permutation of the axes of {x}", self.perm));
        }
        Ok(vec![TensorType {
            dtype: x.dtype,
            shape: self.perm.iter().map(|p| x.shape[*p].clone()).collect(),
        }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let x = ctx.operand(0)?;
        let mut out = ctx.empty(0)?;
        if out.data.is_empty() {
            return Ok(vec![out]);
        }
        let (from, to) = (x.strides(), out.strides());
        let shape = out.shape.clone();
        for (at, v) in out.data.iter_mut().enumerate() {
            let source: usize =
                (0..shape.len()).map(|axis| at / to[axis] % shape[axis] * from[self.perm[axis]]).sum();
            *v = x.data[source];
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Exact)
    }
}

/// Elements `start, start + step, ..` before `end` along one axis;
/// `%1 = slice %0 {axis = 1, start = 0, end = 64}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    /// The axis.
    pub axis: usize,
    /// First element.
    pub start: Dim,
    /// One past the last element.
    pub end: Dim,
    /// Distance of elements, at least 1.
    pub step: usize,
}

impl OpDef for Slice {
    const NAMES: &'static [&'static str] = &["slice"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("axis", self.axis);
        attrs.set("start", self.start.clone());
        attrs.set("end", self.end.clone());
        attrs.set_unless("step", self.step, 1);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Slice {
            axis: attrs.usize("axis")?,
            start: attrs.dim("start")?,
            end: attrs.dim("end")?,
            step: attrs.usize_or("step", 1)?,
        })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        need_axis(self.axis, x)?;
        let step = i64::try_from(self.step).ok().filter(|s| *s > 0).ok_or("step must be at least 1")?;
        let extent = &x.shape[self.axis];
        let outside = |d: &Dim| d.as_const().is_some_and(|c| c < 0);
        let gaps =
            [self.start.clone(), self.end.sub(&self.start), extent.sub(&self.end), extent.sub(&self.start)];
        if gaps.iter().any(outside) {
            return Err(format!("{}..{} is no range of an axis of {extent}", self.start, self.end));
        }
        let mut shape = x.shape.clone();
        shape[self.axis] = self.end.sub(&self.start).ceil_div(step);
        Ok(vec![TensorType { dtype: x.dtype, shape }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let x = ctx.operand(0)?;
        let mut out = ctx.empty(0)?;
        let (start, end) = (ctx.extent(&self.start)?, ctx.extent(&self.end)?);
        if start > end || end > x.shape[self.axis] {
            return Err(format!("{start}..{end} is no range of an axis of {}", x.shape[self.axis]));
        }
        if out.data.is_empty() {
            return Ok(vec![out]);
        }
        let (from, to) = (x.strides(), strides(&out.shape));
        let shape = out.shape.clone();
        for (at, v) in out.data.iter_mut().enumerate() {
            let source: usize = (0..shape.len())
                .map(|axis| {
                    let c = at / to[axis] % shape[axis];
                    from[axis] * if axis == self.axis { start + c * self.step } else { c }
                })
                .sum();
            *v = x.data[source];
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Exact)
    }
}

/// Operands joined along one axis; `%2 = concat %0, %1 {axis = 0}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Concat {
    /// The axis.
    pub axis: usize,
}

impl OpDef for Concat {
    const NAMES: &'static [&'static str] = &["concat"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("axis", self.axis);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Concat { axis: attrs.usize("axis")? })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        ctx.at_least(1)?;
        let first = &ctx.operands[0];
        need_axis(self.axis, first)?;
        let mut shape = first.shape.clone();
        for other in &ctx.operands[1..] {
            need_same_dtype(first, other)?;
            let fits = other.rank() == first.rank()
                && (0..first.rank()).all(|axis| axis == self.axis || other.shape[axis] == first.shape[axis]);
            if !fits {
                return Err(format!("{other} cannot follow {first} along axis {}", self.axis));
            }
            shape[self.axis] = shape[self.axis].add(&other.shape[self.axis]);
        }
        Ok(vec![TensorType { dtype: first.dtype, shape }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.empty(0)?;
        if out.data.is_empty() {
            return Ok(vec![out]);
        }
        let inner: usize = out.shape[self.axis + 1..].iter().product();
        let outer: usize = out.shape[..self.axis].iter().product();
        let mut at = 0;
        for o in 0..outer {
            for x in ctx.operands {
                let run = x.shape[self.axis] * inner;
                out.data[at..at + run].copy_from_slice(&x.data[o * run..(o + 1) * run]);
                at += run;
            }
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Exact)
    }
}

/// Coordinates along one axis; `%0 = iota {shape = [$t], axis = 0, dtype = i32}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Iota {
    /// Shape of the result.
    pub shape: Shape,
    /// The axis whose coordinate each element holds.
    pub axis: usize,
    /// Element type.
    pub dtype: DType,
}

impl OpDef for Iota {
    const NAMES: &'static [&'static str] = &["iota"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("shape", dims(&self.shape));
        attrs.set("axis", self.axis);
        attrs.set("dtype", self.dtype);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Iota {
            shape: attrs.dims("shape")?.into(),
            axis: attrs.usize("axis")?,
            dtype: attrs.dtype("dtype")?,
        })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [] = ctx.exactly()?;
        let ty = TensorType { dtype: self.dtype, shape: self.shape.clone() };
        need_axis(self.axis, &ty)?;
        if self.dtype == DType::Bool {
            return Err("truth values do not count".into());
        }
        Ok(vec![ty])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.empty(0)?;
        if out.data.is_empty() {
            return Ok(vec![out]);
        }
        let (stride, extent) = (out.strides()[self.axis], out.shape[self.axis]);
        out.data.iter_mut().enumerate().for_each(|(i, v)| *v = (i / stride % extent) as f64);
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Exact)
    }
}

/// `a` where the condition holds, else `b`, all broadcast; `%3 = select %cond, %a, %b`.
#[derive(Clone, Debug, PartialEq)]
pub struct Select;

impl OpDef for Select {
    const NAMES: &'static [&'static str] = &["select"];
    fn attrs(&self) -> Attrs {
        Attrs::default()
    }
    fn from_attrs(_: &str, _: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Select)
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [c, a, b] = ctx.exactly()?;
        if c.dtype != DType::Bool {
            return Err(format!("the condition must be bool, not {c}"));
        }
        need_same_dtype(a, b)?;
        let shape = broadcast_shapes(&broadcast_shapes(&c.shape, &a.shape)?, &b.shape)?;
        Ok(vec![TensorType { dtype: a.dtype, shape }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.empty(0)?;
        let shape = out.shape.clone();
        let read = |x: &Tensor, at: usize| x.data[source_index(at, &shape, &x.shape)];
        let [c, a, b] = [ctx.operand(0)?, ctx.operand(1)?, ctx.operand(2)?];
        out.data
            .iter_mut()
            .enumerate()
            .for_each(|(i, v)| *v = read(if read(c, i) != 0.0 { a } else { b }, i));
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits { elementwise: true, ..OpTraits::plain(Numerics::Exact) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Op;
    use super::super::testing::{f32s, fails, i32s, ramp, run};
    use super::*;
    use crate::dim::Sym;

    #[test]
    fn cast_rounds() {
        let out = run(Cast { to: DType::BF16 }, &[f32s(&[2], &[1.00390625, -2.0])]).remove(0);
        assert_eq!(out.data, [1.0, -2.0]);
    }

    #[test]
    fn broadcast_repeats_rows() {
        let shape: Shape = [2usize, 3].map(Dim::from).to_vec().into();
        let out = run(Broadcast { shape: shape.clone() }, &[f32s(&[3], &[1.0, 2.0, 3.0])]).remove(0);
        assert_eq!(out.data, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
        assert!(fails(Broadcast { shape }, &[ramp(&[4])]).contains("broadcast"));
    }

    #[test]
    fn reshape_keeps_order_and_count() {
        let out =
            run(Reshape { shape: [3usize, 2].map(Dim::from).to_vec().into() }, &[ramp(&[2, 3])]).remove(0);
        assert_eq!(out.data, ramp(&[2, 3]).data);
        assert!(
            fails(Reshape { shape: vec![Dim::from(5usize)].into() }, &[ramp(&[2, 3])]).contains("elements")
        );
    }

    #[test]
    fn transpose_by_hand_and_inverse() {
        let x = f32s(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(run(Transpose { perm: vec![1, 0] }, &[x]).remove(0).data, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        let x = ramp(&[2, 3, 4]);
        let turned = run(Transpose { perm: vec![2, 0, 1] }, std::slice::from_ref(&x)).remove(0);
        assert_eq!(run(Transpose { perm: vec![1, 2, 0] }, &[turned]).remove(0), x);
        assert!(fails(Transpose { perm: vec![0, 0] }, &[ramp(&[2, 2])]).contains("permutation"));
    }

    #[test]
    fn slices_then_concat_is_identity() {
        let x = ramp(&[2, 5, 3]);
        let part = |start: usize, end: usize| Slice {
            axis: 1,
            start: Dim::from(start),
            end: Dim::from(end),
            step: 1,
        };
        let left = run(part(0, 2), std::slice::from_ref(&x)).remove(0);
        let right = run(part(2, 5), std::slice::from_ref(&x)).remove(0);
        assert_eq!(run(Concat { axis: 1 }, &[left, right]).remove(0), x);
        let odd = Slice { axis: 0, start: Dim::from(1usize), end: Dim::from(6usize), step: 2 };
        assert_eq!(run(odd, &[f32s(&[6], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0])]).remove(0).data, [1.0, 3.0, 5.0]);
        assert!(fails(part(2, 9), std::slice::from_ref(&x)).contains("range"));
        assert!(fails(Slice { step: 0, ..part(0, 1) }, std::slice::from_ref(&x)).contains("step"));
        assert!(fails(Concat { axis: 1 }, &[x, ramp(&[2, 5, 4])]).contains("cannot follow"));
    }

    #[test]
    fn iota_counts_along_its_axis() {
        let shape: Shape = [2usize, 3].map(Dim::from).to_vec().into();
        let out = run(Iota { shape: shape.clone(), axis: 1, dtype: DType::I32 }, &[]).remove(0);
        assert_eq!(out.data, [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]);
        assert!(fails(Iota { shape, axis: 2, dtype: DType::I32 }, &[]).contains("axis"));
    }

    #[test]
    fn select_chooses() {
        let cond = Tensor::from_values(DType::Bool, &[2, 1], vec![1.0, 0.0]).unwrap();
        let out = run(Select, &[cond, f32s(&[2], &[1.0, 2.0]), f32s(&[], &[9.0])]).remove(0);
        assert_eq!(out.data, [1.0, 2.0, 9.0, 9.0]);
        assert!(fails(Select, &[ramp(&[2]), ramp(&[2]), ramp(&[2])]).contains("bool"));
    }

    #[test]
    fn casts_to_integers_truncate_and_saturate() {
        let x = f32s(&[5], &[1.5, -1.5, 1e30, f64::NAN, 0.0]);
        let to = |to| run(Cast { to }, std::slice::from_ref(&x)).remove(0).data;
        assert_eq!(to(DType::I64), [1.0, -1.0, i64::MAX as f64, 0.0, 0.0]);
        assert_eq!(to(DType::I32), [1.0, -1.0, 2147483647.0, 0.0, 0.0]);
        assert_eq!(to(DType::I8), [1.0, -1.0, 127.0, 0.0, 0.0]);
        assert_eq!(to(DType::U8), [1.0, 0.0, 255.0, 0.0, 0.0]);
        assert_eq!(to(DType::Bool), [1.0, 1.0, 1.0, 1.0, 0.0]);
    }

    /// Products beyond 64 bits saturate, and saturated numbers are equal without being so.
    #[test]
    fn reshape_believes_no_saturated_count() {
        let t = Dim::from(Sym::new("t").unwrap());
        let ty = |shape: &[Dim]| TensorType { dtype: DType::F32, shape: shape.to_vec().into() };
        let infer =
            |from: &[Dim], to: &[Dim]| Op::from(Reshape { shape: to.to_vec().into() }).infer(&[ty(from)]);
        let c = |v: i64| Dim::from(v);
        let big = c(1 << 40);
        for lead in [c(1), t.clone()] {
            let from = [lead.clone(), big.clone(), big.clone()];
            let message = infer(&from, &[lead, big.clone(), big.clone(), c(2)]).unwrap_err();
            assert!(message.contains("more than"), "{message}");
        }
        let split = infer(&[t.mul(&c(4)), c(6)], &[t.clone(), c(8), c(3)]).unwrap();
        assert_eq!(split, [ty(&[t.clone(), c(8), c(3)])]);
        assert!(infer(&[t.clone(), c(6)], &[c(6)]).unwrap_err().contains("elements"));
    }

    /// Coordinate by coordinate, `out[i, j, k] = x[j, k, i]`.
    #[test]
    fn transpose_follows_coordinates() {
        let x = ramp(&[2, 3, 4]);
        let out = run(Transpose { perm: vec![2, 0, 1] }, std::slice::from_ref(&x)).remove(0);
        assert_eq!(out.shape, [4, 2, 3]);
        for (i, j, k) in (0..4).flat_map(|i| (0..2).flat_map(move |j| (0..3).map(move |k| (i, j, k)))) {
            assert_eq!(out.data[(i * 2 + j) * 3 + k], x.data[(j * 3 + k) * 4 + i]);
        }
        for perm in [vec![0, 1], vec![0, 1, 3], vec![0, 1, 1], vec![0, 1, 2, 3], vec![usize::MAX; 3]] {
            assert!(fails(Transpose { perm }, std::slice::from_ref(&x)).contains("permutation"));
        }
    }

    #[test]
    fn slices_have_symbolic_bounds() {
        let t = Dim::from(Sym::new("t").unwrap());
        let ty = |extent: &Dim| TensorType { dtype: DType::F32, shape: vec![extent.clone()].into() };
        let slice = |start: Dim, end: Dim, step| Op::from(Slice { axis: 0, start, end, step });
        let c = |v: i64| Dim::from(v);
        assert_eq!(slice(t.sub(&c(1)), t.clone(), 1).infer(&[ty(&t)]), Ok(vec![ty(&c(1))]));
        assert_eq!(slice(c(1), t.clone(), 3).infer(&[ty(&t)]), Ok(vec![ty(&t.sub(&c(1)).ceil_div(3))]));
        for (start, end) in
            [(c(-1), c(2)), (c(3), c(2)), (c(0), c(6)), (c(6), t.clone()), (c(i64::MIN), t.clone())]
        {
            assert!(slice(start, end, 1).infer(&[ty(&c(5))]).unwrap_err().contains("range"));
        }
        assert!(slice(c(0), t.add(&c(1)), 1).infer(&[ty(&t)]).unwrap_err().contains("range"));
        assert!(slice(c(0), c(1), usize::MAX).infer(&[ty(&t)]).unwrap_err().contains("step"));

        // Bounds that types do not settle are settled by values.
        let (x, mut bindings) = (ramp(&[5]), Bindings::new());
        let op = slice(c(1), t.clone(), 2);
        let results = op.infer(&[ty(&c(5))]).unwrap();
        for (value, expected) in
            [(1, Ok(vec![])), (4, Ok(vec![x.data[1], x.data[3]])), (0, Err(())), (6, Err(()))]
        {
            bindings.set(Sym::new("t").unwrap(), value);
            let found = op.eval(&EvalCtx { operands: &[&x], results: &results, bindings: &bindings });
            assert_eq!(found.map(|mut out| out.remove(0).data).map_err(|_| ()), expected, "$t = {value}");
        }
    }

    #[test]
    fn concat_joins_in_order_and_refuses_strangers() {
        let joined = run(Concat { axis: 0 }, &[f32s(&[1], &[1.0]), f32s(&[0], &[]), f32s(&[2], &[2.0, 3.0])]);
        assert_eq!(joined[0].data, [1.0, 2.0, 3.0]);
        let columns =
            run(Concat { axis: 1 }, &[f32s(&[2, 1], &[1.0, 2.0]), f32s(&[2, 2], &[3.0, 4.0, 5.0, 6.0])]);
        assert_eq!(columns[0].data, [1.0, 3.0, 4.0, 2.0, 5.0, 6.0]);
        assert!(fails(Concat { axis: 0 }, &[]).contains("at least 1"));
        assert!(fails(Concat { axis: 1 }, &[ramp(&[2])]).contains("axis"));
        assert!(fails(Concat { axis: 0 }, &[ramp(&[2]), ramp(&[2, 1])]).contains("cannot follow"));
        assert!(fails(Concat { axis: 0 }, &[ramp(&[2]), i32s(&[1], &[0.0])]).contains("element types"));
    }

    #[test]
    fn select_and_broadcast_refuse_what_does_not_fit() {
        let cond = Tensor::zeros(DType::Bool, &[2]).unwrap();
        assert!(fails(Select, &[cond.clone(), ramp(&[2]), ramp(&[3])]).contains("do not broadcast"));
        assert!(fails(Select, &[cond.clone(), ramp(&[2]), i32s(&[2], &[0.0; 2])]).contains("element types"));
        assert!(fails(Select, &[cond, ramp(&[2])]).contains("takes 3"));
        for shape in [vec![], vec![Dim::from(1usize)], vec![Dim::from(2usize), Dim::from(1usize)]] {
            assert!(fails(Broadcast { shape: shape.into() }, &[ramp(&[1, 3])]).contains("broadcast"));
        }
        let shape = vec![Dim::from(2usize)];
        assert!(
            fails(Iota { shape: shape.clone().into(), axis: 0, dtype: DType::Bool }, &[]).contains("count")
        );
        assert!(
            fails(Iota { shape: shape.into(), axis: 0, dtype: DType::I32 }, &[ramp(&[2])])
                .contains("takes 0")
        );
    }
}
