//! Nodes that move elements: shapes and index operands resolved, then one kernel call on bytes.

use millrace_ir::ops::Slice;
use millrace_ir::{DType, Op, Result};
use millrace_kernels::cpu::Pool;
use millrace_kernels::cpu::movement;
use millrace_kernels::cpu::view::elements;

use super::execute::{Node, internal};

impl Node<'_> {
    /// A shape of `extents` around `axis`: before, along and behind it, the last in bytes.
    fn around(&self, shape: &[usize], axis: usize, size: usize) -> Result<[usize; 3]> {
        let (before, rest) = shape.split_at_checked(axis).ok_or_else(|| internal("an axis is missing"))?;
        let (extent, behind) = rest.split_first().ok_or_else(|| internal("an axis is missing"))?;
        let too_large = || internal("a tensor is too large");
        let inner = elements(behind)?.checked_mul(size).ok_or_else(too_large)?;
        Ok([elements(before)?, *extent, inner])
    }

    /// Operand `index` as places on an axis of `extent`.
    fn places(&self, index: usize, extent: usize) -> Result<Vec<usize>> {
        match self.ty(index).dtype {
            DType::I64 => movement::places(self.read::<i64>(index)?, extent),
            _ => movement::places(self.read::<i32>(index)?, extent),
        }
    }

    fn bounds(&self, op: &Slice) -> Result<(usize, usize, usize)> {
        let at = |dim: &millrace_ir::Dim| {
            let value = dim.extent(self.bindings).and_then(|v| usize::try_from(v).ok());
            value.ok_or_else(|| internal("a bound of a slice has no value"))
        };
        Ok((at(&op.start)?, at(&op.end)?, op.step))
    }

    /// Runs a node that moves elements.
    pub(super) fn movement(&self, pool: &Pool) -> Result<()> {
        let size = movement::element_size(self.result_ty(0).dtype)?;
        let result = self.shape(self.result_ty(0))?;
        let operand = |index: usize| self.shape(self.ty(index));
        match &*self.node.op {
            Op::Transpose(op) => {
                let (x, out) = (self.read::<u8>(0)?, self.write::<u8>(0)?);
                movement::transpose(pool, size, x, &operand(0)?, &op.perm, out)
            }
            Op::Broadcast(_) => {
                let (x, out) = (self.read::<u8>(0)?, self.write::<u8>(0)?);
                movement::broadcast(pool, size, x, &operand(0)?, &result, out)
            }
            Op::Slice(op) => {
                let (x, out) = (self.read::<u8>(0)?, self.write::<u8>(0)?);
                movement::slice(pool, size, x, &operand(0)?, op.axis, self.bounds(op)?, out)
            }
            Op::Concat(op) => {
                let mut rows = 0;
                let mut parts = Vec::with_capacity(self.operands.len());
                for index in 0..self.operands.len() {
                    let [outer, extent, inner] = self.around(&operand(index)?, op.axis, size)?;
                    let width = extent.checked_mul(inner).ok_or_else(|| internal("a part is too large"))?;
                    rows = outer;
                    parts.push((self.read::<u8>(index)?, width));
                }
                movement::concat(pool, rows, &parts, self.write::<u8>(0)?)
            }
            Op::Gather(_) | Op::Embedding(_) => {
                let axis = if let Op::Gather(op) = &*self.node.op { op.axis } else { 0 };
                let around = self.around(&operand(0)?, axis, size)?;
                let places = self.places(1, around[1])?;
                if let Some(table) = self.table {
                    // The rows of axis 0; nothing stands before them.
                    return table(around[2], &places, self.write::<u8>(0)?);
                }
                movement::gather(pool, self.read::<u8>(0)?, around, &places, self.write::<u8>(0)?)
            }
            Op::Scatter(op) => {
                let around = self.around(&result, op.axis, size)?;
                let places = self.places(1, around[1])?;
                movement::scatter(pool, self.replace::<u8>()?, around, &places, self.read::<u8>(2)?)
            }
            Op::Select(_) => {
                let shapes = [operand(0)?, operand(1)?, operand(2)?];
                let part = |index: usize| Ok((self.read::<u8>(index)?, shapes[index].as_slice()));
                let out = self.write::<u8>(0)?;
                movement::select(pool, size, part(0)?, part(1)?, part(2)?, &result, out)
            }
            Op::Iota(op) => movement::iota(pool, op.dtype, &result, op.axis, self.write::<u8>(0)?),
            op => Err(internal(&format!("`{}` moves nothing", op.name()))),
        }
    }
}
