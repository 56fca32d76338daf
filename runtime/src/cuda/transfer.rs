//! Pinned host memory: what goes to the device passes through [`Staging`], what comes back through [`Landing`].
//!
//! Invariant: nobody on the host touches the bytes while a copy that was enqueued may still use them. Both wait for an
//! event that follows the copy before they hand out their bytes.

use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use cudarc::driver::sys;
use millrace_ir::{Error, Kind, Result};

use super::driver::{Context, Event, Stream};
use super::range::Range;
use crate::places::Piece as _;

/// Page-locked memory, which the device can read too.
#[derive(Debug)]
pub(super) struct Pinned {
    pointer: NonNull<u8>,
    len: usize,
    context: Arc<Context>,
}

// SAFETY: the memory has one owner, which gives it out by Rust's borrowing rules.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// `len` zero bytes.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<Pinned> {
        if len == 0 {
            return Ok(Pinned { pointer: NonNull::dangling(), len, context: context.clone() });
        }
        context.enter()?;
        let mut raw = null_mut();
        // SAFETY: a context is current; the memory is freed when dropped.
        let done = unsafe { sys::cuMemHostAlloc(&mut raw, len, 0) };
        let no_memory = || {
            let message = format!("cannot allocate {len} bytes of pinned memory");
            Error::new(Kind::OutOfMemory, "run/out-of-memory", message)
                .hint("free memory, or raise the limit of locked memory")
        };
        if done == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(no_memory());
        }
        context.check(done, "allocate pinned memory")?;
        let pointer = NonNull::new(raw.cast::<u8>()).ok_or_else(no_memory)?;
        // SAFETY: the memory was just allocated with this length; zeros make every byte a value.
        unsafe { pointer.as_ptr().write_bytes(0, len) };
        context.count_pinned(0, len as u64);
        Ok(Pinned { pointer, len, context: context.clone() })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: owned, initialised; the types around keep copies away while this borrow lives.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }

    /// The bytes. No copy from here may be running.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

impl Pinned {
    /// Bytes of room.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The memory as the device sees it: addresses of the host are addresses of the device too.
    pub fn range(&self) -> Range {
        let base = if self.len == 0 { 0 } else { self.pointer.as_ptr() as u64 };
        Range { base, len: self.len as u64 }
    }

    /// Enqueues a copy of the bytes from `at` on to the device. Whoever enqueues it waits for the stream before the memory is
    /// written or dropped.
    pub fn send(&self, stream: &Stream, at: u64, to: Range) -> Result<()> {
        let Some(from) = self.range().part(at, to.len) else {
            return Err(Error::new(Kind::Internal, "cuda/staging", "more is sent than host memory holds"));
        };
        if to.len == 0 {
            return Ok(());
        }
        // SAFETY: source and target have this length and are live, as the caller promises.
        let done =
            unsafe { sys::cuMemcpyHtoDAsync_v2(to.base, from.base as *const _, to.len as usize, stream.raw) };
        self.context.check(done, "copy to the device")
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated by `cuMemHostAlloc`, and no copy uses it any more. On a failed context the call fails
            // and the memory stays until the process ends.
            unsafe {
                let _ = self.context.enter();
                sys::cuMemFreeHost(self.pointer.as_ptr().cast());
            }
            self.context.count_pinned(self.len as u64, 0);
        }
    }
}

/// Memory on the way to the device.
#[derive(Debug)]
pub(super) struct Staging {
    pinned: Pinned,
    done: Event,
    in_flight: bool,
}

impl Staging {
    /// Room for `len` bytes.
    pub fn new(context: &Arc<Context>, len: usize) -> Result<Staging> {
        Ok(Staging {
            pinned: Pinned::new(context, len)?,
            done: Event::new(context, false)?,
            in_flight: false,
        })
    }

    /// Bytes of room.
    pub fn len(&self) -> usize {
        self.pinned.len
    }

    /// The bytes, once no copy uses them.
    pub fn fill(&mut self) -> Result<&mut [u8]> {
        self.wait()?;
        Ok(self.pinned.bytes_mut())
    }

    fn wait(&mut self) -> Result<()> {
        if self.in_flight {
            self.done.synchronize()?;
            self.in_flight = false;
        }
        Ok(())
    }

    /// Enqueues a copy of the first `to.len` bytes to the device. To be followed by [`Staging::sent`] on the stream
    /// that runs the copy, once for each time it runs.
    pub fn send(&mut self, stream: &Stream, to: Range) -> Result<()> {
        let len = to.len as usize;
        if len > self.pinned.len {
            return Err(Error::new(Kind::Internal, "cuda/staging", "more is sent than staging memory holds"));
        }
        if len == 0 {
            return Ok(());
        }
        // From here on the bytes may be read, even if recording the event fails.
        self.in_flight = true;
        let from = self.pinned.pointer.as_ptr().cast_const().cast();
        // SAFETY: source and target have this length; `fill` and `drop` wait for the copy.
        let done = unsafe { sys::cuMemcpyHtoDAsync_v2(to.base, from, len, stream.raw) };
        self.pinned.context.check(done, "copy to the device")
    }

    /// Notes that all copies from here have been enqueued in `stream`.
    pub fn sent(&mut self, stream: &Stream) -> Result<()> {
        self.in_flight = true;
        self.done.record(stream)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // On a failed device no copy runs any more.
        let _ = self.wait();
    }
}

/// Memory on the way back.
#[derive(Debug)]
pub(super) struct Landing {
    pinned: Pinned,
    stream: Arc<Stream>,
    arrived: Event,
    flight: Flight,
}

/// What is known of a copy on its way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flight {
    /// There is none.
    Landed,
    /// The event follows it.
    Marked,
    /// Some work of the stream is it.
    Unmarked,
}

impl Landing {
    /// Room for `len` bytes that arrive in `stream`.
    pub fn new(stream: &Arc<Stream>, len: usize) -> Result<Landing> {
        Ok(Landing {
            pinned: Pinned::new(&stream.context, len)?,
            stream: stream.clone(),
            arrived: Event::new(&stream.context, false)?,
            flight: Flight::Landed,
        })
    }

    /// Bytes of room.
    pub fn len(&self) -> usize {
        self.pinned.len
    }

    /// Enqueues a copy from the device into the first bytes, in `stream`: that of this landing, or one that is
    /// captured for a graph launched there. To be followed by [`Landing::expect`], once for each time the copy runs.
    pub fn receive(&mut self, stream: &Stream, from: Range) -> Result<()> {
        let len = from.len as usize;
        if len > self.pinned.len {
            return Err(Error::new(Kind::Internal, "cuda/staging", "more arrives than landing memory holds"));
        }
        self.flight = Flight::Unmarked;
        if len == 0 {
            return Ok(());
        }
        let to = self.pinned.pointer.as_ptr().cast();
        // SAFETY: source and target have this length; `bytes` and `drop` wait for the copy.
        let done = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from.base, len, stream.raw) };
        self.pinned.context.check(done, "copy from the device")
    }

    /// Notes that a copy to here has been enqueued in this landing's stream.
    pub fn expect(&mut self) -> Result<()> {
        self.flight = Flight::Unmarked;
        self.arrived.record(&self.stream)?;
        self.flight = Flight::Marked;
        Ok(())
    }

    /// Waits for copies, and for nothing that was enqueued after them.
    pub fn wait(&mut self) -> Result<()> {
        match self.flight {
            Flight::Landed => {}
            Flight::Marked => self.arrived.synchronize()?,
            Flight::Unmarked => self.stream.synchronize()?,
        }
        self.flight = Flight::Landed;
        Ok(())
    }

    /// The bytes; empty while a copy may be running.
    pub fn bytes(&self) -> &[u8] {
        if self.flight == Flight::Landed { self.pinned.bytes() } else { &[] }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // On a failed device no copy runs any more.
        let _ = self.wait();
    }
}
