//! The weights of an engine file, mapped read-only.

use std::fs::File;

use memmap2::{Mmap, MmapOptions};
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
