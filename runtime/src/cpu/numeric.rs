//! Nodes that compute element by element, along axes or over windows: layouts resolved, then one kernel call.

use std::borrow::Cow;

use millrace_ir::ops::pointwise::{Source, Step};
use millrace_ir::ops::{Conv2d as ConvOp, Pointwise, Pool2d as PoolOp, Reduce};
use millrace_ir::{DType, Op, Result};
use millrace_kernels::cpu::Pool;
use millrace_kernels::cpu::conv::Conv2d;
use millrace_kernels::cpu::element::Element;
use millrace_kernels::cpu::numbers;
use millrace_kernels::cpu::pool2d::Pool2d;
use millrace_kernels::cpu::program::{Data, Input, Layout, Out, run as run_program};
use millrace_kernels::cpu::reduce::reduce;
use millrace_kernels::cpu::rows::{Rows, run as run_rows};
use millrace_kernels::cpu::view::{View, elements};

use super::execute::{Node, internal};
use crate::memory::Plain;

/// Steps and results of a pointwise region.
type Program<'a> = (Cow<'a, [Step]>, Cow<'a, [Source]>);

/// Four extents of an image operand.
fn four(shape: &[usize]) -> Result<[usize; 4]> {
    shape.try_into().map_err(|_| internal("an image has four axes"))
}

impl Node<'_> {
    /// The program of an elementwise node.
    fn program(&self) -> Result<Program<'_>> {
        let one = |step: Step| (Cow::Owned(vec![step]), Cow::Owned(vec![Source::Step(0)]));
        Ok(match &*self.node.op {
            Op::Unary(op) => one(Step::Unary(op.function, Source::Input(0))),
            Op::Binary(op) => one(Step::Binary(op.function, Source::Input(0), Source::Input(1))),
            Op::Cast(_) => (Cow::Owned(Vec::new()), Cow::Owned(vec![Source::Input(0)])),
            Op::Pointwise(op) => {
                (Cow::Borrowed(&op.body), Cow::Owned(op.out.iter().map(|o| o.source).collect()))
            }
            op => return Err(internal(&format!("`{}` is not elementwise", op.name()))),
        })
    }

    /// Runs an elementwise node in f32 or, where that is not exact enough, in f64.
    pub(super) fn elementwise(&self, pool: &Pool, in_f32: bool) -> Result<()> {
        let (body, out) = self.program()?;
        let shape = self.shape(self.result_ty(0))?;
        let len = elements(&shape)?;
        let views = (0..self.operands.len())
            .map(|index| {
                let own = self.shape(self.ty(index))?;
                View::broadcast(&shape, &own).ok_or_else(|| internal("an operand does not repeat"))
            })
            .collect::<Result<Vec<_>>>()?;
        if len == 0 {
            return Ok(());
        }
        if in_f32 {
            self.floats(pool, &body, &out, &shape, len, &views)
        } else {
            self.numbers(pool, &body, &out, len, views)
        }
    }

    fn in_place(&self, index: usize) -> bool {
        // Regions without bytes may begin at the same place without being one.
        index == 0 && self.operands[0].len() > 0 && self.operands[0].same(self.results[0])
    }

    fn floats(
        &self,
        pool: &Pool,
        body: &[Step],
        out: &[Source],
        shape: &[usize],
        len: usize,
        views: &[View],
    ) -> Result<()> {
        let columns = shape.last().copied().unwrap_or(1);
        let inputs = views
            .iter()
            .enumerate()
            .map(|(index, view)| self.input(index, view, columns))
            .collect::<Result<Vec<_>>>()?;
        let outputs = self.outputs()?;
        run_program(pool, body, out, columns, len, &inputs, outputs);
        Ok(())
    }

    /// Operand `index` of a region in f32, as it repeats over rows of `columns`.
    fn input<'v>(&self, index: usize, view: &'v View, columns: usize) -> Result<Input<'v>>
    where
        Self: 'v,
    {
        let dtype = self.ty(index).dtype;
        let layout = match (view.extents.as_slice(), view.strides.as_slice()) {
            _ if self.in_place(index) && view.is_dense() && dtype == self.result_ty(0).dtype => Layout::InOut,
            _ if self.in_place(index) => return Err(internal("an operand cannot be replaced")),
            _ if view.is_dense() => Layout::Full,
            (_, [0]) => Layout::Scalar,
            ([_, n], [0, 1]) if *n == columns => Layout::Row,
            ([_, n], [1, 0]) if *n == columns => Layout::Column,
            _ => Layout::Strided(view),
        };
        let data = match (layout, dtype) {
            (Layout::InOut, _) => Data::F32(&[]),
            (_, DType::F32) => Data::F32(self.read(index)?),
            (_, DType::BF16) => Data::Bf16(self.read(index)?),
            (_, DType::F16) => Data::F16(self.read(index)?),
            (_, DType::Bool) => Data::Bool(self.read(index)?),
            (_, other) => return Err(internal(&format!("no region reads {other}"))),
        };
        Ok(Input { data, layout })
    }

    /// The results of a region in f32.
    fn outputs(&self) -> Result<Vec<Out<'_>>> {
        let output = |index| {
            Ok(match self.result_ty(index).dtype {
                DType::F32 => Out::F32(self.write(index)?),
                DType::BF16 => Out::Bf16(self.write(index)?),
                DType::F16 => Out::F16(self.write(index)?),
                DType::Bool => Out::Bool(self.write(index)?),
                other => return Err(internal(&format!("no region writes {other}"))),
            })
        };
        (0..self.results.len()).map(output).collect()
    }

    /// Runs a region that reduces rows.
    pub(super) fn region_of_rows(&self, pool: &Pool, region: &Pointwise) -> Result<()> {
        let types: Vec<_> = (0..self.operands.len()).map(|i| self.ty(i).clone()).collect();
        let shape = Pointwise::shape(&types).map_err(|_| internal("an operand does not repeat"))?;
        let shape = self.extents(&shape)?;
        let Some((columns, leading)) = shape.split_last() else {
            return Err(internal("a region without axes has no rows"));
        };
        let rows = Rows { rows: elements(leading)?, columns: *columns };
        elements(&shape)?;
        let per_row: Vec<bool> = types.iter().map(|ty| Pointwise::is_per_row(&ty.shape)).collect();
        let row_shape = [leading, &[1]].concat();
        let mut views = Vec::with_capacity(types.len());
        for (ty, per_row) in types.iter().zip(&per_row) {
            let view = View::broadcast(if *per_row { &row_shape } else { &shape }, &self.shape(ty)?);
            views.push(view.ok_or_else(|| internal("an operand does not repeat"))?);
        }
        if rows.rows == 0 {
            return Ok(());
        }
        let inputs = views
            .iter()
            .enumerate()
            .map(|(index, view)| self.input(index, view, if per_row[index] { 1 } else { *columns }))
            .collect::<Result<Vec<_>>>()?;
        run_rows(pool, region, &region.phases(&per_row), rows, &inputs, self.outputs()?);
        Ok(())
    }

    fn numbers(
        &self,
        pool: &Pool,
        body: &[Step],
        out: &[Source],
        len: usize,
        views: Vec<View>,
    ) -> Result<()> {
        // An operand that the result replaces is read from a copy.
        let replaced = if !self.operands.is_empty() && self.in_place(0) {
            self.read::<u8>(0)?.to_vec()
        } else {
            Vec::new()
        };
        let mut operands = Vec::with_capacity(views.len());
        for (index, view) in views.into_iter().enumerate() {
            let bytes = if self.in_place(index) { replaced.as_slice() } else { self.read::<u8>(index)? };
            operands.push(numbers::Operand { dtype: self.ty(index).dtype, bytes, view });
        }
        let mut outputs = Vec::with_capacity(self.results.len());
        for index in 0..self.results.len() {
            let dtype = self.result_ty(index).dtype;
            outputs.push(numbers::Output { dtype, bytes: self.write::<u8>(index)? });
        }
        numbers::run(pool, body, out, len, &operands, &mut outputs)
    }

    pub(super) fn reduce<T: Element + Plain>(&self, pool: &Pool, op: &Reduce) -> Result<()> {
        let shape = self.shape(self.ty(0))?;
        reduce(pool, op.function, self.read::<T>(0)?, &shape, &op.axes, self.write::<T>(0)?)
    }

    pub(super) fn conv2d<T: Element + Plain>(&self, pool: &Pool, op: &ConvOp) -> Result<()> {
        let [_, _, oh, ow] = four(&self.shape(self.result_ty(0))?)?;
        let conv = Conv2d {
            x: four(&self.shape(self.ty(0))?)?,
            weight: four(&self.shape(self.ty(1))?)?,
            out: [oh, ow],
            stride: op.stride,
            pad: [op.pad[0], op.pad[1]],
            dilation: op.dilation,
            groups: op.groups,
        };
        let bias = if self.operands.len() > 2 { Some(self.read::<T>(2)?) } else { None };
        conv.run(pool, self.read::<T>(0)?, self.read::<T>(1)?, bias, self.write::<T>(0)?)
    }

    pub(super) fn pool2d<T: Element + Plain>(&self, pool: &Pool, op: &PoolOp) -> Result<()> {
        let [n, c, h, w] = four(&self.shape(self.ty(0))?)?;
        let [_, _, oh, ow] = four(&self.shape(self.result_ty(0))?)?;
        let pooling = Pool2d {
            x: [elements(&[n, c])?, h, w],
            out: [oh, ow],
            kernel: op.kernel,
            stride: op.stride,
            pad: op.pad,
            average: op.average,
            count_include_pad: op.count_include_pad,
        };
        pooling.run(pool, self.read::<T>(0)?, self.write::<T>(0)?)
    }
}
