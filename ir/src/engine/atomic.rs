//! A file that appears whole or not at all.
//!
//! Bytes go to a temporary file beside the target, named `.TARGET.PID.N.tmp` and locked while its process lives. Only
//! [`AtomicFile::commit`] makes it the target, by a rename after a sync; in every other case dropping removes it. What a
//! killed process left behind for the same target is removed by the next [`AtomicFile::create`]: a temporary file whose
//! lock is free has no owner. This file knows nothing of the format.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Kind, Result};
use crate::positioned::same_file;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A temporary file on its way to become `target`.
#[derive(Debug)]
pub(super) struct AtomicFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl AtomicFile {
    /// Creates the temporary file for `target`, after removing abandoned ones.
    pub(super) fn create(target: &Path) -> Result<Self> {
        let Some(name) = target.file_name() else {
            return Err(Error::new(Kind::Usage, "engine/target", "the path does not name a file")
                .at(target.display())
                .hint("give the path of the engine file to write"));
        };
        if target.is_dir() {
            return Err(Error::new(Kind::Usage, "engine/target", "there is a folder of this name")
                .at(target.display())
                .hint("give the path of the engine file to write"));
        }
        if target.metadata().is_ok_and(|m| !m.is_file()) {
            let message = "the path is a device, pipe or socket, which a rename would replace";
            return Err(Error::new(Kind::Usage, "engine/target", message)
                .at(target.display())
                .hint("give the path of the engine file to write"));
        }
        let folder = folder_of(target);
        remove_abandoned(folder, name);
        loop {
            let mut temporary = OsString::from(".");
            temporary.push(name);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            temporary.push(format!(".{}.{number}.tmp", std::process::id()));
            let path = folder.join(temporary);
            let file = match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(Error::io("create", &path, &e)),
            };
            // Until the lock is held another process may take the file for abandoned; then the next number is tried.
            // Where files cannot be locked, liveness is judged by the process id.
            let lost = matches!(file.try_lock(), Err(TryLockError::WouldBlock)) || !is_at(&file, &path);
            if !lost {
                return Ok(AtomicFile { file, temporary: path, target: target.to_owned(), committed: false });
            }
        }
    }

    /// The file, to write to.
    pub(super) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// The path the file will have.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Makes everything durable and moves it to the target.
    pub(super) fn commit(mut self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io("write", &self.target, &e))?;
        std::fs::rename(&self.temporary, &self.target)
            .map_err(|e| Error::io("rename to", &self.target, &e))?;
        self.committed = true;
        sync_folder(folder_of(&self.target))
            .map_err(|e| Error::io("make the written file durable in", folder_of(&self.target), &e))
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be reported from here; the next writer of this target removes what remains.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

fn folder_of(target: &Path) -> &Path {
    target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn is_at(file: &File, path: &Path) -> bool {
    match (path.symlink_metadata(), file.metadata()) {
        (Ok(a), Ok(b)) => same_file(&a, &b),
        _ => false,
    }
}

#[cfg(unix)]
fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // Some file systems cannot sync folders.
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

#[cfg(not(unix))]
fn sync_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Process id in the name of a temporary file for `target`; `None` for any other name.
fn owner(name: &OsStr, target: &OsStr) -> Option<u32> {
    let rest = name.as_encoded_bytes().strip_prefix(b".")?;
    let rest = rest.strip_prefix(target.as_encoded_bytes())?.strip_prefix(b".")?;
    let (process, number) = std::str::from_utf8(rest).ok()?.strip_suffix(".tmp")?.split_once('.')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if digits(process) && digits(number) { process.parse().ok() } else { None }
}

/// Removes temporary files for `target` without an owner. Failures are left to the next time.
fn remove_abandoned(folder: &Path, target: &OsStr) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Some(process) = owner(&entry.file_name(), target) else { continue };
        let path = entry.path();
        if !path.symlink_metadata().is_ok_and(|m| m.is_file()) {
            continue;
        }
        let Ok(file) = OpenOptions::new().write(true).open(&path) else { continue };
        let abandoned = match file.try_lock() {
            Ok(()) => is_at(&file, &path),
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(_)) => is_dead(process),
        };
        if abandoned {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// True if the process certainly does not live.
fn is_dead(process: u32) -> bool {
    let processes = Path::new("/proc");
    cfg!(target_os = "linux")
        && processes.join("self").exists()
        && !processes.join(process.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn only_a_commit_changes_the_target() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x.engine");
        std::fs::write(&target, "old").unwrap();
        let mut file = AtomicFile::create(&target).unwrap();
        file.file().write_all(b"lost").unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        drop(file);
        assert_eq!(names(folder.path()), ["x.engine"]);
        assert_eq!(std::fs::read(&target).unwrap(), b"old");
        let mut file = AtomicFile::create(&target).unwrap();
        file.file().write_all(b"kept").unwrap();
        file.commit().unwrap();
        assert_eq!(names(folder.path()), ["x.engine"]);
        assert_eq!(std::fs::read(&target).unwrap(), b"kept");
    }

    #[test]
    fn abandoned_files_go_and_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x.engine");
        let live = AtomicFile::create(&target).unwrap();
        let kept = [
            ".x.engine.1.tmp",
            ".x.engine.1.2.tmp.bak",
            ".y.engine.1.2.tmp",
            "x.engine.1.2.tmp",
            ".x.engine.a.2.tmp",
        ];
        for name in kept.iter().chain(&[".x.engine.1.2.tmp", ".x.engine.4000000000.0.tmp"]) {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let other = AtomicFile::create(&target).unwrap();
        let mut expected: Vec<String> = kept.iter().map(|n| n.to_string()).collect();
        for file in [&live, &other] {
            expected.push(file.temporary.file_name().unwrap().to_str().unwrap().to_owned());
        }
        expected.sort();
        assert_eq!(names(folder.path()), expected);
    }

    #[test]
    fn targets_that_are_no_files() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(AtomicFile::create(folder.path()).unwrap_err().code(), "engine/target");
        assert_eq!(AtomicFile::create(Path::new("..")).unwrap_err().code(), "engine/target");
        #[cfg(unix)]
        {
            let socket = folder.path().join("socket");
            let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
            assert_eq!(AtomicFile::create(&socket).unwrap_err().code(), "engine/target");
            assert!(socket.exists());
        }
        let missing = folder.path().join("none").join("x.engine");
        assert_eq!(AtomicFile::create(&missing).unwrap_err().code(), "io/failed");
    }
}
