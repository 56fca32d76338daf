//! Streams and events.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;
use millrace_ir::{Error, Kind, Result};

use super::context::Context;
use crate::cuda::range::Range;

/// A stream that the caller of this library made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStream(usize);

impl RawStream {
    /// Names a `CUstream` of the device's primary context.
    ///
    /// # Safety
    /// The stream must stay valid as long as a session uses it, and must not be capturing.
    pub unsafe fn new(stream: *mut c_void) -> RawStream {
        RawStream(stream as usize)
    }
}

/// A stream: work in order.
#[derive(Debug)]
pub(in crate::cuda) struct Stream {
    pub(in crate::cuda) raw: sys::CUstream,
    owned: bool,
    pub(in crate::cuda) context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}
// SAFETY: as for `Context`.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream of its own, not ordered with the default stream.
    pub fn new(context: &Arc<Context>) -> Result<Arc<Stream>> {
        context.enter()?;
        let mut raw = null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: a context is current; the stream is destroyed when dropped.
        context.check(unsafe { sys::cuStreamCreate(&mut raw, flags) }, "make a stream")?;
        Ok(Arc::new(Stream { raw, owned: true, context: context.clone() }))
    }

    /// The caller's stream.
    pub fn borrowed(context: &Arc<Context>, stream: RawStream) -> Arc<Stream> {
        Arc::new(Stream { raw: stream.0 as sys::CUstream, owned: false, context: context.clone() })
    }

    /// Waits for all work.
    pub fn synchronize(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the stream is live.
        self.context.check(unsafe { sys::cuStreamSynchronize(self.raw) }, "run a step")
    }

    /// What is enqueued from here on waits for the point that `event` marks.
    pub fn wait(&self, event: &Event) -> Result<()> {
        // SAFETY: both are live and of one context.
        self.context.check(unsafe { sys::cuStreamWaitEvent(self.raw, event.raw, 0) }, "wait for an event")
    }

    /// Fills device memory with zeros.
    pub fn zero(&self, range: Range) -> Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: device memory only; the range is inside a block by construction of ranges.
        let done = unsafe { sys::cuMemsetD8Async(range.base, 0, range.len as usize, self.raw) };
        self.context.check(done, "clear memory")
    }

    /// Copies between ranges of device memory of the same length.
    pub fn copy(&self, from: Range, to: Range) -> Result<()> {
        if to.len == 0 || from == to {
            return Ok(());
        }
        // SAFETY: device memory only; both ranges are inside blocks by construction of ranges.
        let done =
            unsafe { sys::cuMemcpyDtoDAsync_v2(to.base, from.base, from.len.min(to.len) as usize, self.raw) };
        self.context.check(done, "copy on the device")
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: the stream is live and this is its owner; work in it goes on.
            unsafe {
                sys::cuCtxSetCurrent(self.context.raw);
                sys::cuStreamDestroy_v2(self.raw);
            }
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(in crate::cuda) struct Event {
    pub(super) raw: sys::CUevent,
    pub(super) context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}
// SAFETY: as for `Context`.
unsafe impl Sync for Event {}

impl Event {
    /// An event; one without `timing` is cheaper.
    pub fn new(context: &Arc<Context>, timing: bool) -> Result<Event> {
        context.enter()?;
        let flags = match timing {
            true => sys::CUevent_flags::CU_EVENT_DEFAULT,
            false => sys::CUevent_flags::CU_EVENT_DISABLE_TIMING,
        };
        let mut raw = null_mut();
        // SAFETY: a context is current; the event is destroyed when dropped.
        context.check(unsafe { sys::cuEventCreate(&mut raw, flags as u32) }, "make an event")?;
        Ok(Event { raw, context: context.clone() })
    }

    /// Marks the end of what `stream` holds.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both are live and of one context.
        self.context.check(unsafe { sys::cuEventRecord(self.raw, stream.raw) }, "record an event")
    }

    /// Waits for the point; returns at once if it was never recorded.
    pub fn synchronize(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the event is live.
        self.context.check(unsafe { sys::cuEventSynchronize(self.raw) }, "run a step")
    }

    /// Seconds from `start` to this event; both must have passed.
    pub fn seconds_since(&self, start: &Event) -> Result<f64> {
        type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;
        let missing = || Error::new(Kind::Device, "cuda/driver", "the driver does not tell times");
        let mut milliseconds = 0f32;
        // The declarations have only a later version of this function, which drivers before 12.8 lack.
        // SAFETY: every driver has this one, with this signature. Both events are live; the result is written to a
        // live number.
        let got = unsafe {
            let elapsed = sys::culib().get::<Elapsed>(b"cuEventElapsedTime\0").map_err(|_| missing())?;
            elapsed(&mut milliseconds, start.raw, self.raw)
        };
        self.context.check(got, "read a time").map(|()| f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event is live and this is its owner.
        unsafe {
            sys::cuCtxSetCurrent(self.context.raw);
            sys::cuEventDestroy_v2(self.raw);
        }
    }
}
