//! Device memory that sessions take turns in.
//!
//! Steps run after the call that enqueued them has returned. So each turn waits, on the device, for the end of the turn before
//! it where that was in another stream.

use std::sync::Arc;

use millrace_ir::Result;

use super::driver::{Block, Context, Event, Stream};
use super::range::Range;

/// See the module.
pub(crate) struct DeviceArena {
    block: Block,
    ended: Event,
    /// The stream of the last turn.
    last: Option<Arc<Stream>>,
    device: u32,
}

impl DeviceArena {
    /// `bytes` on device `index`.
    pub fn new(index: u32, bytes: u64) -> Result<DeviceArena> {
        let context = Context::retain(index)?;
        Ok(DeviceArena {
            block: Block::new(&context, bytes, "an arena")?,
            ended: Event::new(&context, false)?,
            last: None,
            device: index,
        })
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.block.range().len
    }

    /// Number of the device.
    pub fn device(&self) -> u32 {
        self.device
    }

    /// Where it is.
    pub(super) fn range(&self) -> Range {
        self.block.range()
    }

    /// Begins a turn in `stream`.
    pub(super) fn begin(&mut self, stream: &Arc<Stream>) -> Result<()> {
        if self.last.as_ref().is_some_and(|last| !Arc::ptr_eq(last, stream)) {
            stream.wait(&self.ended)?;
        }
        Ok(())
    }

    /// Ends a turn: all its work is in `stream`.
    pub(super) fn end(&mut self, stream: &Arc<Stream>) -> Result<()> {
        self.last = Some(stream.clone());
        self.ended.record(stream)
    }
}
