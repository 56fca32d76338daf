//! Aligned buffers and typed views of them. Every view checks its range and alignment; [`Region`] hands out pointers
//! whose disjointness the executor checks node by node.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use half::{bf16, f16};
use millrace_ir::{Error, Kind, Result};

use crate::places::Piece;

/// Alignment of every buffer.
pub(crate) const ALIGN: usize = 64;

/// Zeroed memory aligned to [`ALIGN`]; pages of a large buffer are touched only when written.
pub(crate) struct Buffer {
    pointer: NonNull<u8>,
    len: usize,
    /// Bytes that were allocated before the first.
    skip: usize,
}

/// Bytes from which on a buffer is cleared by taking other memory.
const LARGE: usize = 1 << 20;

/// What a buffer of `len` bytes allocates: room to begin at an aligned byte. An allocation that asks for more alignment than
/// the system gives is zeroed by writing it, each page of it.
fn layout(len: usize) -> Option<Layout> {
    Layout::from_size_align(len.checked_add(ALIGN)?, 1).ok()
}

// SAFETY: the buffer owns its memory and gives it out by Rust's borrowing rules.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes.
    pub fn zeroed(len: u64, what: &str) -> Result<Buffer> {
        let out_of_memory = || {
            Error::new(
                Kind::OutOfMemory,
                "run/out-of-memory",
                format!("cannot allocate {len} bytes for {what}"),
            )
            .hint("free memory, lower the batch or sequence limits, or use --memory dynamic")
        };
        let size = usize::try_from(len).map_err(|_| out_of_memory())?;
        if size == 0 {
            return Ok(Buffer { pointer: NonNull::<Aligned>::dangling().cast(), len: 0, skip: 0 });
        }
        let layout = layout(size).ok_or_else(out_of_memory)?;
        // SAFETY: the layout has a non-zero size.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        let skip = base.as_ptr().addr().wrapping_neg() % ALIGN;
        // SAFETY: less than ALIGN bytes on, and there are ALIGN more than `size`.
        Ok(Buffer { pointer: unsafe { base.add(skip) }, len: size, skip })
    }

    /// Makes every byte zero; a large buffer gives its pages back.
    pub fn clear(&mut self) {
        let fresh = (self.len >= LARGE).then(|| Buffer::zeroed(self.len as u64, "zeros"));
        match fresh {
            Some(Ok(fresh)) => *self = fresh,
            _ => self.bytes_mut().fill(0),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the buffer owns `len` initialised bytes.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }

    /// The bytes, mutable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }

    /// A region over the whole buffer that may be written.
    pub fn region(&mut self) -> Region {
        Region { pointer: self.pointer.as_ptr(), len: self.len, writable: true }
    }
}

impl Region {
    /// A region over borrowed bytes that may be written; the borrow must live as long as the region is used.
    pub fn of(bytes: &mut [u8]) -> Region {
        Region { pointer: bytes.as_mut_ptr(), len: bytes.len(), writable: true }
    }
}

#[repr(align(64))]
struct Aligned;

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: the base and the layout of `zeroed`.
            unsafe {
                let base = self.pointer.sub(self.skip).as_ptr();
                dealloc(base, Layout::from_size_align_unchecked(self.len + ALIGN, 1));
            }
        }
    }
}

/// A range of memory that lives at least as long as the step that uses it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    pointer: *mut u8,
    len: usize,
    writable: bool,
}

/// Types whose every bit pattern is a value.
pub(crate) trait Plain: Copy {}
impl Plain for f32 {}
impl Plain for bf16 {}
impl Plain for f16 {}
impl Plain for i32 {}
impl Plain for i64 {}
impl Plain for u8 {}

impl Piece for Region {
    fn part(self, start: u64, len: u64) -> Option<Region> {
        Region::part(self, start, len)
    }

    fn overlaps(self, other: Region) -> bool {
        Region::overlaps(self, other)
    }

    fn same(self, other: Region) -> bool {
        Region::same(self, other)
    }

    fn bytes(self) -> u64 {
        self.len as u64
    }
}

/// A range of memory that one thread fills while no other touches it.
#[derive(Debug)]
pub(crate) struct Gap {
    pointer: *mut u8,
    len: usize,
}

// SAFETY: whoever made the gap vouches that nobody else touches its memory while it exists.
unsafe impl Send for Gap {}

impl Gap {
    /// The bytes.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: live, writable and untouched by others, as vouched for by `Region::lend`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl Region {
    /// A region that may be written.
    pub fn writable(bytes: &mut [u8]) -> Region {
        Region { pointer: bytes.as_mut_ptr(), len: bytes.len(), writable: true }
    }

    /// Gives the region to another thread to fill; `None` if it must not be written.
    ///
    /// # Safety
    /// Until the gap is dropped the memory lives, and nobody reads or writes it in another way.
    pub unsafe fn lend(self) -> Option<Gap> {
        self.writable.then_some(Gap { pointer: self.pointer, len: self.len })
    }

    /// A region that is only read.
    pub fn read_only(bytes: &[u8]) -> Region {
        Region { pointer: bytes.as_ptr().cast_mut(), len: bytes.len(), writable: false }
    }

    /// Bytes `start .. start + len` of the region.
    pub fn part(self, start: u64, len: u64) -> Option<Region> {
        let (start, len) = (usize::try_from(start).ok()?, usize::try_from(len).ok()?);
        if start.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: inside the region, as just checked.
        Some(Region { pointer: unsafe { self.pointer.add(start) }, len, writable: self.writable })
    }

    /// Whether two regions share a byte.
    pub fn overlaps(self, other: Region) -> bool {
        let (a, b) = (self.pointer as usize, other.pointer as usize);
        a < b + other.len && b < a + self.len && self.len > 0 && other.len > 0
    }

    /// Whether two regions are the same bytes.
    pub fn same(self, other: Region) -> bool {
        self.pointer == other.pointer && self.len == other.len
    }

    /// Bytes.
    pub fn len(self) -> usize {
        self.len
    }

    fn check<T: Plain>(self) -> Result<usize> {
        let fits = self.len.is_multiple_of(size_of::<T>())
            && (self.pointer as usize).is_multiple_of(align_of::<T>());
        if !fits {
            return Err(Error::new(
                Kind::BadInput,
                "run/misaligned",
                "a tensor does not lie on its alignment",
            )
            .hint("the engine is damaged or forged: build it again"));
        }
        Ok(self.len / size_of::<T>())
    }

    /// The elements.
    ///
    /// # Safety
    /// The memory lives for `'a` and nobody writes it meanwhile.
    pub unsafe fn slice<'a, T: Plain>(self) -> Result<&'a [T]> {
        let n = self.check::<T>()?;
        // SAFETY: range and alignment hold, every bit pattern is valid; the caller vouches for the rest.
        Ok(unsafe { std::slice::from_raw_parts(self.pointer.cast(), n) })
    }

    /// The elements, mutable.
    ///
    /// # Safety
    /// The memory lives for `'a` and nobody else reads or writes it meanwhile.
    pub unsafe fn slice_mut<'a, T: Plain>(self) -> Result<&'a mut [T]> {
        let n = self.check::<T>()?;
        if !self.writable {
            return Err(Error::new(Kind::Internal, "run/read-only", "a kernel writes to read-only memory"));
        }
        // SAFETY: range and alignment hold, every bit pattern is valid; the caller vouches for the rest.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), n) })
    }
}

/// A line of the system's account of host memory, in bytes; all there could be where it tells nothing.
pub(crate) fn host_memory(name: &str) -> u64 {
    account("/proc/meminfo", name).unwrap_or(u64::MAX)
}

/// Bytes of this process in memory; 0 where the system does not tell.
pub(crate) fn resident_set() -> u64 {
    account("/proc/self/status", "VmRSS:").unwrap_or(0)
}

/// Line `name` of a file of the system, in bytes.
fn account(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?.trim().strip_suffix("kB")?;
    line.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zero() {
        for len in [0, 1, 63, 64, 65, 4096, LARGE as u64 - 1, LARGE as u64] {
            let mut buffer = Buffer::zeroed(len, "a test").unwrap();
            assert!(buffer.bytes().as_ptr().addr().is_multiple_of(ALIGN));
            assert_eq!(buffer.bytes().len() as u64, len);
            assert!(buffer.bytes().iter().all(|b| *b == 0));
            buffer.bytes_mut().fill(7);
            buffer.clear();
            assert_eq!(buffer.bytes().len() as u64, len);
            assert!(buffer.bytes().iter().all(|b| *b == 0));
        }
        assert_eq!(Buffer::zeroed(u64::MAX, "a test").err().unwrap().code(), "run/out-of-memory");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_that_are_not_written_take_no_memory() {
        const MIB: u64 = 1 << 20;
        let before = resident_set();
        let mut buffer = Buffer::zeroed(512 * MIB, "a test").unwrap();
        let empty = resident_set();
        assert!(empty < before + 64 * MIB, "{before} to {empty} bytes");
        buffer.bytes_mut()[..256 << 20].fill(1);
        let written = resident_set();
        assert!(written > before + 192 * MIB, "{before} to {written} bytes");
        buffer.clear();
        let cleared = resident_set();
        assert!(cleared + 192 * MIB < written, "{written} to {cleared} bytes");
    }
}
