//! The weights of an engine file, mapped read-only; and memory of its own that holds weights.

use std::fs::File;

use memmap2::{Mmap, MmapMut, MmapOptions};
use millrace_ir::{Error, Kind, Result};

/// A read-only mapping of a range of a file.
pub(crate) struct Mapping(Option<Mmap>);

impl Mapping {
    /// Maps `len` bytes at `offset`; the range was checked against the file's length.
    pub fn new(file: &File, offset: u64, len: u64) -> Result<Mapping> {
        let Some(len) = usize::try_from(len).ok().filter(|l| *l > 0) else { return Ok(Mapping(None)) };
        // SAFETY: the mapping is read-only. A program that truncates or rewrites the file while it is mapped breaks
        // the contract that engine files are replaced by renaming, never changed in place (docs/engine-format.md).
        let map = unsafe { MmapOptions::new().offset(offset).len(len).map(file) };
        map.map(|m| Mapping(Some(m))).map_err(|e| {
            Error::new(Kind::OutOfMemory, "run/map-failed", format!("cannot map the weights: {e}"))
        })
    }

    /// A mapping of nothing.
    pub fn new_empty() -> Mapping {
        Mapping(None)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }
}

/// Zeroed pages, touched only when written and given back to the system when dropped.
pub(crate) struct Pages(Option<MmapMut>);

impl Pages {
    /// `len` zero bytes.
    pub fn new(len: u64, what: &str) -> Result<Pages> {
        if len == 0 {
            return Ok(Pages(None));
        }
        let failed = |why: String| {
            let message = format!("cannot allocate {len} bytes for {what}: {why}");
            Error::new(Kind::OutOfMemory, "run/out-of-memory", message)
                .hint("free memory, or set a smaller weight budget")
        };
        let len = usize::try_from(len).map_err(|e| failed(e.to_string()))?;
        MmapMut::map_anon(len).map(|m| Pages(Some(m))).map_err(|e| failed(e.to_string()))
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(&[])
    }

    /// The bytes, mutable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or(&mut [])
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.bytes().len() as u64
    }
}
