//! Tuning files: which candidate a measurement chose for each kind of matmul or decode attention site.
//!
//! A file is JSON: a number that names the form, and entries by *key*. A key says everything about site and architecture
//! that a time depends on, a candidate is called by its stable name; see [`millrace_kernels::cuda::matmul::choice`]
//! and [`millrace_kernels::cuda::attention::splits`].
//! Files of several models and devices can be merged: of two entries for a key the one with the better time stays. The
//! text is a function of the entries. What a file chooses is an input of a build like any option; it needs no GPU.
//!
//! A library of matrix products has entries of its own beside those of kernels. It is chosen where it is faster than the
//! kernel would be; without it, or where it is not wanted, the kernel's entry says which runs.

use std::collections::BTreeMap;
use std::path::Path;

use millrace_ir::{Error, Kind, Result};
use millrace_kernels::cuda::Choices;
use millrace_kernels::cuda::matmul::choice::kernel_key;
use serde::{Deserialize, Serialize};

/// Version of this program, which entries carry: kernels of another version have other times.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The form of the file.
const FORMAT: u32 = 1;

/// Most bytes of a file.
const MAX_BYTES: u64 = 64 << 20;

/// Chosen candidates by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuning {
    /// Entries by key.
    pub entries: BTreeMap<String, Entry>,
}

/// What was measured for a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Name of the best candidate.
    pub candidate: String,
    /// Its time.
    pub nanoseconds: u64,
    /// The time of what is built in.
    pub built_in_nanoseconds: u64,
    /// Name of the device.
    pub device: String,
    /// What CUDA the driver is for, such as `13.0`.
    pub driver: String,
    /// Version of the program that measured.
    pub version: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    millrace_tuning: u32,
    entries: BTreeMap<String, Entry>,
}

fn malformed(what: impl std::fmt::Display) -> Error {
    Error::new(Kind::BadInput, "compile/tuning", format!("the tuning file is malformed: {what}"))
        .hint("`millrace tune` writes such files")
}

impl Tuning {
    /// Reads a file.
    ///
    /// # Errors
    /// What reading gives, and `compile/tuning` for a file of another form.
    pub fn read(path: &Path) -> Result<Tuning> {
        let io = |e: &std::io::Error| Error::io("read", path, e);
        let len = std::fs::metadata(path).map_err(|e| io(&e))?.len();
        if len > MAX_BYTES {
            return Err(malformed(format!("it has {len} bytes")).at(path.display()));
        }
        Tuning::parse(&std::fs::read(path).map_err(|e| io(&e))?).map_err(|e| e.at(path.display()))
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// `compile/tuning`.
    pub fn parse(bytes: &[u8]) -> Result<Tuning> {
        let file: File = serde_json::from_slice(bytes).map_err(malformed)?;
        if file.millrace_tuning != FORMAT {
            return Err(malformed(format!("its form is {}, not {FORMAT}", file.millrace_tuning)));
        }
        Ok(Tuning { entries: file.entries })
    }

    /// The text of the file, entries in the order of their keys.
    pub fn to_text(&self) -> String {
        let file = File { millrace_tuning: FORMAT, entries: self.entries.clone() };
        // A struct of plain fields has no reason to fail.
        let mut text = serde_json::to_string_pretty(&file).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Writes the file; another process sees the old text or the new one.
    ///
    /// # Errors
    /// What writing gives.
    pub fn write(&self, path: &Path) -> Result<()> {
        let part = path.with_extension(format!("part{}", std::process::id()));
        std::fs::write(&part, self.to_text())
            .and_then(|()| std::fs::rename(&part, path))
            .map_err(|e| Error::io("write", path, &e))
    }

    /// Takes the entries of `other`. Of two for a key the one of this version stays, of those the better time, and of
    /// equal times the name that comes first: the order of files does not matter.
    pub fn merge(&mut self, other: Tuning) {
        let rank = |e: &Entry| {
            let Entry { candidate, nanoseconds, built_in_nanoseconds, device, driver, version } = e.clone();
            (version != VERSION, nanoseconds, candidate, built_in_nanoseconds, device, driver, version)
        };
        for (key, entry) in other.entries {
            let better = self.entries.get(&key).is_none_or(|old| rank(&entry) < rank(old));
            if better {
                self.entries.insert(key, entry);
            }
        }
    }

    /// What code generation takes from the file: entries of this version; those of a library only `with_library`, and where it is
    /// faster than what would run in its place.
    pub fn choices(&self, with_library: bool) -> Choices {
        let taken = |(key, entry): &(&String, &Entry)| {
            let current = entry.version == VERSION;
            current && kernel_key(key).is_none_or(|kernel| with_library && self.is_faster(entry, kernel))
        };
        self.entries.iter().filter(taken).map(|(key, e)| (key.clone(), e.candidate.clone())).collect()
    }

    /// Whether a library's `entry` is faster than what runs without it: what is chosen for the key `kernel`, where that was measured
    /// on the same kind of device, and else what is built in.
    fn is_faster(&self, entry: &Entry, kernel: &str) -> bool {
        let measured = |e: &&Entry| e.version == VERSION && e.device == entry.device;
        let own = self.entries.get(kernel).filter(measured);
        entry.nanoseconds < own.map_or(entry.built_in_nanoseconds, |own| own.nanoseconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(candidate: &str, nanoseconds: u64, version: &str) -> Entry {
        Entry {
            candidate: candidate.into(),
            nanoseconds,
            built_in_nanoseconds: 100,
            device: "NVIDIA H200".into(),
            driver: "13.0".into(),
            version: version.into(),
        }
    }

    fn tuning(entries: &[(&str, Entry)]) -> Tuning {
        Tuning { entries: entries.iter().map(|(k, e)| (k.to_string(), e.clone())).collect() }
    }

    #[test]
    fn text_and_entries_are_the_same_thing() {
        let all = tuning(&[("b", entry("x", 5, VERSION)), ("a", entry("y", 6, "0"))]);
        let text = all.to_text();
        assert!(text.find("\"a\"").unwrap() < text.find("\"b\"").unwrap());
        assert_eq!(Tuning::parse(text.as_bytes()).unwrap(), all);
        let file = tempfile::tempdir().unwrap();
        let path = file.path().join("t.json");
        all.write(&path).unwrap();
        assert_eq!(Tuning::read(&path).unwrap(), all);
    }

    #[test]
    fn merging_keeps_the_best_in_any_order() {
        let one = tuning(&[("a", entry("x", 5, VERSION)), ("b", entry("x", 1, "0"))]);
        let two = tuning(&[
            ("a", entry("y", 4, VERSION)),
            ("b", entry("y", 9, VERSION)),
            ("c", entry("z", 1, VERSION)),
        ]);
        let (mut left, mut right) = (one.clone(), two.clone());
        left.merge(two);
        right.merge(one);
        assert_eq!(left.to_text(), right.to_text());
        let names: Vec<&str> = left.entries.values().map(|e| e.candidate.as_str()).collect();
        assert_eq!(names, ["y", "y", "z"]);
    }

    #[test]
    fn entries_of_other_versions_choose_nothing() {
        let all = tuning(&[("a", entry("x", 5, "0.0.0")), ("b", entry("y", 5, VERSION))]);
        let choices = all.choices(true);
        assert_eq!((choices.get("a"), choices.get("b")), (None, Some("y")));
    }

    #[test]
    fn a_library_is_chosen_where_it_is_faster() {
        let chosen = |own: Option<Entry>, library: Entry, wanted: bool| {
            let mut all = tuning(&[("a library", library)]);
            all.entries.extend(own.map(|e| ("a".to_string(), e)));
            let choices = all.choices(wanted);
            assert_eq!(choices.get("a").is_some(), all.entries.contains_key("a"), "kernels stay chosen");
            choices.get("a library").is_some()
        };
        let library = |nanoseconds| entry("cublaslt-0", nanoseconds, VERSION);
        let own = |nanoseconds| Some(entry("x", nanoseconds, VERSION));
        assert!(chosen(own(60), library(50), true) && !chosen(own(60), library(50), false));
        assert!(!chosen(own(50), library(50), true) && !chosen(own(40), library(50), true));
        // Alone, it is compared with what is built in.
        assert!(chosen(None, library(99), true) && !chosen(None, library(100), true));
        assert!(!chosen(None, entry("cublaslt-0", 50, "0"), true));
        // Times of other devices tell nothing.
        let elsewhere = Entry { device: "another".into(), ..entry("x", 40, VERSION) };
        assert!(chosen(Some(elsewhere), library(50), true));
    }

    #[test]
    fn kernels_and_libraries_merge_apart() {
        let one = tuning(&[("a", entry("x", 60, VERSION)), ("a library", entry("cublaslt-0", 50, VERSION))]);
        let two = tuning(&[("a", entry("y", 55, VERSION)), ("a library", entry("cublaslt-2", 58, VERSION))]);
        let (mut left, mut right) = (one.clone(), two.clone());
        left.merge(two);
        right.merge(one);
        assert_eq!(left.to_text(), right.to_text());
        let choices = left.choices(true);
        assert_eq!((choices.get("a"), choices.get("a library")), (Some("y"), Some("cublaslt-0")));
    }

    #[test]
    fn other_files_are_refused() {
        for text in ["", "{}", "[]", "{\"millrace_tuning\": 2, \"entries\": {}}", "{\"millrace_tuning\": 1}"]
        {
            assert_eq!(Tuning::parse(text.as_bytes()).unwrap_err().code(), "compile/tuning", "{text}");
        }
    }
}
