//! Reads at offsets of an engine file, by several threads, through the page cache or past it.
//!
//! Reading past the cache (direct reads) costs neither memory nor a copy, and is what a file needs that memory cannot hold
//! anyway. It wants offsets, lengths and memory on [`BLOCK`]s: what does not lie so, and whatever a file system refuses,
//! goes through the cache.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use millrace_ir::{Error, Kind, Result};

/// What offsets, lengths and memory of direct reads are multiples of.
const BLOCK: usize = 4096;

/// See the module.
pub(crate) struct DirectFile {
    file: File,
    direct: Option<File>,
    /// Whether the file system has refused a direct read.
    refused: AtomicBool,
    path: PathBuf,
}

impl DirectFile {
    /// `file`, which was opened as `path`, with another handle; past the cache if `direct` and the system allows.
    ///
    /// # Errors
    /// `io/failed` if there are no more handles.
    pub fn new(file: &File, path: &Path, direct: bool) -> Result<DirectFile> {
        let direct = if direct { open_direct(file) } else { None };
        let file = file.try_clone().map_err(|e| Error::io("open", path, &e))?;
        Ok(DirectFile { file, direct, refused: AtomicBool::new(false), path: path.to_owned() })
    }

    /// Whether reads go past the cache where they lie on blocks.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some() && !self.refused.load(Ordering::Relaxed)
    }

    /// Fills `out` from `offset`.
    ///
    /// # Errors
    /// `engine/truncated` if the file ends before, `io/failed`.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let done = self.read_blocks(offset, out);
        read_exact_at(&self.file, &mut out[done..], offset + done as u64).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::new(Kind::BadInput, "engine/truncated", "the file became shorter while it was in use")
                    .at(self.path.display())
                    .hint("the file is damaged: copy or build it again")
            }
            _ => Error::io("read", &self.path, &e),
        })
    }

    /// Reads as many blocks past the cache as can be; returns the bytes. Whoever reads the rest meets the errors.
    fn read_blocks(&self, offset: u64, out: &mut [u8]) -> usize {
        let Some(direct) = self.direct.as_ref().filter(|_| self.is_direct()) else { return 0 };
        let aligned = offset.is_multiple_of(BLOCK as u64) && (out.as_ptr() as usize).is_multiple_of(BLOCK);
        let (whole, mut done) = (out.len() / BLOCK * BLOCK, 0);
        while aligned && done < whole {
            match read_at(direct, &mut out[done..whole], offset + done as u64) {
                // At the end of the file there may be less than a block.
                Ok(count) if count > 0 && count % BLOCK == 0 => done += count,
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let refusal = [io::ErrorKind::InvalidInput, io::ErrorKind::Unsupported];
                    if refusal.contains(&e.kind()) {
                        self.refused.store(true, Ordering::Relaxed);
                    }
                    break;
                }
            }
        }
        done
    }
}

#[cfg(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")
))]
fn open_direct(file: &File) -> Option<File> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    /// `O_DIRECT` of Linux.
    const DIRECT: i32 = if cfg!(target_arch = "aarch64") { 0o200_000 } else { 0o40_000 };
    // The same file, even if its name has gone or is another's.
    let name = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).custom_flags(DIRECT).open(name).ok()
}

#[cfg(not(all(
    target_os = "linux",
    any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")
)))]
fn open_direct(_: &File) -> Option<File> {
    None
}

#[cfg(unix)]
fn read_at(file: &File, out: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, out, offset)
}

#[cfg(windows)]
fn read_at(file: &File, out: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, out, offset)
}

fn read_exact_at(file: &File, mut out: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !out.is_empty() {
        match read_at(file, out, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => (out, offset) = (&mut out[count..], offset + count as u64),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Pages;

    #[test]
    fn both_ways_read_the_same_bytes() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let bytes: Vec<u8> = (0..5 * BLOCK + 100).map(|i| (i * 7 + i / 251) as u8).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let path = file.path().to_owned();
        let open = File::open(&path).unwrap();
        // The handle outlives the name.
        drop(file);
        for direct in [false, true] {
            let reader = DirectFile::new(&open, &path, direct).unwrap();
            let mut pages = Pages::new(bytes.len() as u64, "a test").unwrap();
            for (offset, start, len) in [
                (0, 0, bytes.len()),
                (BLOCK, 0, 3 * BLOCK),
                (BLOCK, 64, 2 * BLOCK),
                (77, 77, 5000),
                (9, 0, 0),
            ] {
                let out = &mut pages.bytes_mut()[start..start + len];
                out.fill(0);
                reader.read(offset as u64, out).unwrap();
                assert_eq!(out, &bytes[offset..offset + len], "direct {direct}, {len} bytes at {offset}");
            }
            let error = reader.read(5 * BLOCK as u64, &mut pages.bytes_mut()[..BLOCK]).unwrap_err();
            assert_eq!(error.code(), "engine/truncated");
        }
    }
}
