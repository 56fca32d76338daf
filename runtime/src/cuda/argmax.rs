//! The argmax of rows on a device: its memory, and what finds it.
//!
//! One block of device memory holds, for the output with most rows, the indices that are found, a counter a row and the
//! scratch of the blocks that share a row. Counters are zero between launches.

use std::sync::Arc;

use millrace_ir::{Bindings, DType, Module, Result};
use millrace_kernels::cuda::argmax::parts;

use super::driver::{Block, Context, Stream};
use super::launch::ReadyLaunch;
use super::program::Program;
use super::range::Range;
use super::resolve::{pack, parts as cut};
use crate::places::Piece;
use crate::sizes::no_size;

/// Most rows: the grid has them along its second axis.
const MAX_ROWS: u64 = 65535;

/// See the module.
pub(super) struct Argmax {
    block: Block,
    rows: u64,
    indices: Range,
    counters: Range,
    scratch: Range,
}

/// What follows a step: the argmax of an output.
pub(super) struct Tail {
    pub launch: ReadyLaunch,
    /// An i32 a row.
    pub indices: Range,
}

/// Rows of the f32 output with most of them.
fn most_rows(module: &Module, bindings: &Bindings) -> Result<u64> {
    let mut most = 0;
    for (name, ty) in module.output_types() {
        if let (DType::F32, [rows, _]) = (ty.dtype, ty.shape.as_slice()) {
            most = rows.extent(bindings).ok_or_else(|| no_size(name))?.max(most);
        }
    }
    Ok(most)
}

impl Argmax {
    /// Memory for the outputs of `module`; `None` if none has rows or the engine has no such kernel.
    pub fn new(
        context: &Arc<Context>,
        stream: &Stream,
        program: &Program,
        module: &Module,
        maxima: &Bindings,
    ) -> Result<Option<Argmax>> {
        let rows = most_rows(module, maxima)?.min(MAX_ROWS);
        if rows == 0 || !program.has_argmax() {
            return Ok(None);
        }
        // Blocks of all rows together: two for each multiprocessor, or one a row.
        let blocks = rows + 2 * u64::from(context.info.multiprocessors);
        let sizes = [rows * 4, rows * 4, blocks * 8];
        let missing = || no_size("the indices of an argmax");
        let (offsets, bytes) = pack(&sizes).ok_or_else(missing)?;
        let block = Block::new(context, bytes, "indices")?;
        stream.zero(block.range())?;
        let places = cut(block.range(), &offsets, &sizes).ok_or_else(missing)?;
        let [indices, counters, scratch] = places[..] else { return Err(missing()) };
        Ok(Some(Argmax { block, rows, indices, counters, scratch }))
    }

    /// Bytes held.
    pub fn held(&self) -> u64 {
        self.block.range().len
    }

    /// The first `len` bytes of the indices, if there are as many.
    pub fn indices(&self, len: u64) -> Option<Range> {
        self.indices.part(0, len)
    }

    /// Bytes of the indices of all rows.
    pub fn index_bytes(&self) -> u64 {
        self.indices.len
    }

    /// What finds the argmax of `rows` rows of `width` elements at `from`, if there is room for it.
    pub fn tail(&self, program: &Program, from: Range, rows: u64, width: u64) -> Result<Option<Tail>> {
        if rows == 0 || rows > self.rows {
            return Ok(None);
        }
        let parts = parts(rows, width, program.multiprocessors);
        let place = self.indices.part(0, rows * 4).zip(self.scratch.part(0, rows * u64::from(parts) * 8));
        let Some((indices, best)) = place else { return Ok(None) };
        let launch = program.argmax(&[from, indices, best, self.counters], [parts, rows as u32], width)?;
        Ok(launch.map(|launch| Tail { launch, indices }))
    }
}
