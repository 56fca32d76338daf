//! Blocks of device memory.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::sys;
use millrace_ir::Result;

use super::context::Context;
use super::stream::Stream;
use crate::cuda::range::Range;

/// Device memory, given back when dropped.
#[derive(Debug)]
pub(in crate::cuda) struct Block {
    range: Range,
    pub(super) context: Arc<Context>,
    /// The stream whose order allocation and release follow; without one both take effect at once.
    stream: Option<Arc<Stream>>,
}

impl Block {
    /// `len` bytes, what they hold is unknown.
    pub fn new(context: &Arc<Context>, len: u64, what: &str) -> Result<Block> {
        let mut base = 0;
        if len > 0 {
            context.enter()?;
            // SAFETY: a context is current; the memory is freed when dropped.
            let done = unsafe { sys::cuMemAlloc_v2(&mut base, len as usize) };
            context.check(done, &format!("allocate {len} bytes for {what}"))?;
            context.allocations.fetch_add(1, Ordering::Relaxed);
            context.granules.add(len);
        }
        Ok(Block { range: Range { base, len }, context: context.clone(), stream: None })
    }

    /// `len` bytes from the pool, for work in `stream`.
    pub fn from_pool(stream: &Arc<Stream>, len: u64, what: &str) -> Result<Block> {
        let context = &stream.context;
        let mut base = 0;
        if len > 0 {
            context.enter()?;
            let pool = context.pool()?;
            // SAFETY: pool and stream are live; the memory is freed when dropped.
            let done = unsafe { sys::cuMemAllocFromPoolAsync(&mut base, len as usize, pool, stream.raw) };
            context.check(done, &format!("allocate {len} bytes for {what}"))?;
            context.allocations.fetch_add(1, Ordering::Relaxed);
            context.pooled.fetch_add(len, Ordering::Relaxed);
        }
        Ok(Block { range: Range { base, len }, context: context.clone(), stream: Some(stream.clone()) })
    }

    /// Where it is.
    pub fn range(&self) -> Range {
        self.range
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.range.len == 0 {
            return;
        }
        match &self.stream {
            Some(_) => {
                self.context.pooled.fetch_sub(self.range.len, Ordering::Relaxed);
            }
            None => self.context.granules.remove(self.range.len),
        }
        // SAFETY: the memory is live and this is its owner. `cuMemFree` waits for work that may use it, and the
        // stream-ordered release comes after such work in its stream.
        unsafe {
            sys::cuCtxSetCurrent(self.context.raw);
            match &self.stream {
                Some(stream) => sys::cuMemFreeAsync(self.range.base, stream.raw),
                None => sys::cuMemFree_v2(self.range.base),
            };
        }
    }
}
