//! Files read at explicit offsets.
//!
//! A [`PositionedFile`] is a regular file opened for reading whose length is taken once. Reads name their offset, share no
//! cursor and may run from many threads. It knows nothing about what the bytes mean.

use std::fs::{File, Metadata};
use std::io;
use std::path::Path;

/// An open regular file and the length it had when it was opened.
#[derive(Debug)]
pub(crate) struct PositionedFile {
    file: File,
    len: u64,
    #[cfg(not(unix))]
    cursor: std::sync::Mutex<()>,
}

impl PositionedFile {
    /// Opens `path` for reading. Anything but a regular file (a pipe could block for ever) is an error. With
    /// `follow_links` false the last component of the path must not be a symbolic link.
    pub(crate) fn open(path: &Path, follow_links: bool) -> io::Result<Self> {
        let before = if follow_links { path.metadata()? } else { path.symlink_metadata()? };
        if !before.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        let after = file.metadata()?;
        if !same_file(&before, &after) {
            return Err(io::Error::other("the file was replaced while it was being opened"));
        }
        Ok(PositionedFile {
            file,
            len: after.len(),
            #[cfg(not(unix))]
            cursor: std::sync::Mutex::new(()),
        })
    }

    /// Length in bytes when opened.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `buf` from `offset`.
    #[cfg(unix)]
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, buf, offset)
    }

    /// Fills `buf` from `offset`. The cursor of the file is shared, so reads take turns.
    #[cfg(not(unix))]
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        use std::io::{Read, Seek, SeekFrom};
        let _turn = self.cursor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buf)
    }
}

/// True if both describe one regular file, as far as the system can tell.
#[cfg(unix)]
pub(crate) fn same_file(a: &Metadata, b: &Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    b.is_file() && a.dev() == b.dev() && a.ino() == b.ino()
}

/// True if both describe one regular file, as far as the system can tell.
#[cfg(not(unix))]
pub(crate) fn same_file(_: &Metadata, b: &Metadata) -> bool {
    b.is_file()
}
