//! Reads the weights of a Hugging Face model folder.
//!
//! A folder holds `model.safetensors`, or *shards* named by `model.safetensors.index.json`. Opening reads and validates
//! the headers only; tensor bytes are read on demand at their offsets, never mapped. Pickle and Python files are never
//! opened.
//!
//! Invariants of an open [`Checkpoint`]:
//! 1. every file is a regular file directly inside the folder; it is a symbolic link only if the caller allowed links;
//! 2. every tensor occurs once, lies inside its file, and its size follows from its type and shape;
//! 3. every tensor the index names is in the shard it names (tensors that a shard has beyond the index are included);
//! 4. files stay open, so replacing a file in the folder does not change what is read.
//!
//! This module must not know what a tensor is for.

mod header;
mod problems;
mod source;
mod write;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

pub use source::{MemorySource, TensorInfo, TensorSource};
pub use write::{NamedTensor, safetensors_bytes, write_safetensors, write_sharded};

use self::header::{Located, UniqueMap};
use self::problems::Problems;
use crate::error::{Error, Kind, Result};
use crate::positioned::PositionedFile;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How a checkpoint is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// Accept weight files that are symbolic links, as in the Hugging Face cache. A link may point anywhere, so this is
    /// for folders whose origin is trusted. Command line: `--follow-links`.
    pub follow_links: bool,
}

/// A weight file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointFile {
    /// File name inside the folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// The validated weights of a model folder.
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    files: Vec<CheckpointFile>,
    handles: Vec<PositionedFile>,
    /// Sorted by name.
    tensors: Vec<TensorInfo>,
    /// File number and offset in it, for each of `tensors`.
    places: Vec<(usize, u64)>,
}

impl Checkpoint {
    /// Opens the weights in `folder` with default options.
    ///
    /// # Errors
    /// As [`Checkpoint::open_with`].
    pub fn open(folder: impl AsRef<Path>) -> Result<Checkpoint> {
        Checkpoint::open_with(folder, &CheckpointOptions::default())
    }

    /// Opens the weights in `folder`: `model.safetensors` if there is one, else the shards of the index.
    ///
    /// # Errors
    /// Codes `checkpoint/...`, or an I/O failure. Several problems are collected into one error, which has the code of
    /// the first and lists up to twenty.
    pub fn open_with(folder: impl AsRef<Path>, options: &CheckpointOptions) -> Result<Checkpoint> {
        let folder = folder.as_ref();
        if !folder.metadata().map_err(|e| Error::io("open the model folder", folder, &e))?.is_dir() {
            return Err(Error::new(Kind::BadInput, "checkpoint/not-a-folder", "this is not a folder")
                .at(folder.display())
                .hint("give the folder that holds config.json and the safetensors files"));
        }
        let weight_map = if entry_exists(&folder.join(SINGLE)) {
            BTreeMap::from([(SINGLE.to_owned(), Vec::new())])
        } else if entry_exists(&folder.join(INDEX)) {
            read_index(folder, options).map_err(|e| e.at(folder.display()))?
        } else {
            return Err(no_weights(folder)?);
        };
        Self::open_shards(folder, weight_map, options).map_err(|e| e.at(folder.display()))
    }

    /// `shards`: file name to the tensors that the index expects in it.
    fn open_shards(
        folder: &Path,
        shards: BTreeMap<String, Vec<String>>,
        options: &CheckpointOptions,
    ) -> Result<Checkpoint> {
        let mut problems = Problems::default();
        let (mut files, mut handles) = (Vec::new(), Vec::new());
        let mut found: BTreeMap<String, (usize, Located)> = BTreeMap::new();
        for (shard, expected) in shards {
            let opened = open_file(folder, &shard, options)
                .and_then(|handle| Ok((header::read(&shard, &handle, &mut problems)?, handle)));
            let (located, handle) = match opened {
                Ok(opened) => opened,
                Err(error) => {
                    problems.add(error);
                    continue;
                }
            };
            let present: BTreeSet<&str> = located.iter().map(|l| l.info.name.as_str()).collect();
            for name in expected.iter().filter(|name| !present.contains(name.as_str())) {
                let what = format!("the index places {name:?} in this file, which does not hold it");
                problems.add(
                    Error::new(Kind::BadInput, "checkpoint/index-mismatch", what)
                        .at(&shard)
                        .hint("the index and the shards are of different versions: download the model again"),
                );
            }
            let number = files.len();
            files.push(CheckpointFile { name: shard, bytes: handle.len() });
            handles.push(handle);
            for tensor in located {
                let name = tensor.info.name.clone();
                // A name doubled inside one file is reported with that file's header.
                if let Some((earlier, _)) = found.insert(name.clone(), (number, tensor))
                    && earlier != number
                {
                    let what = format!("{name:?} is also in {}", files[earlier].name);
                    problems.add(
                        Error::new(Kind::BadInput, "checkpoint/tensor-twice", what)
                            .at(&files[number].name)
                            .hint("remove the file that does not belong to the model"),
                    );
                }
            }
        }
        problems.finish()?;
        let (tensors, places) =
            found.into_values().map(|(file, located)| (located.info, (file, located.offset))).unzip();
        Ok(Checkpoint { folder: folder.to_owned(), files, handles, tensors, places })
    }

    /// The folder as given.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The weight files, by name.
    pub fn files(&self) -> &[CheckpointFile] {
        &self.files
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.position(name).map(|i| &self.tensors[i])
    }

    /// Sum of the bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().fold(0, |sum, t| sum.saturating_add(t.bytes))
    }

    /// BLAKE3 over name, element type and shape of every tensor, in name order: equal for checkpoints of one
    /// architecture however they are sharded, independent of values. Text is preceded by its length as `u32`, extents
    /// are `u64` preceded by their number as `u32`, all little-endian.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"millrace checkpoint 1\0");
        let text = |hasher: &mut blake3::Hasher, text: &str| {
            hasher.update(&(text.len() as u32).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        for TensorInfo { name, dtype, shape, bytes: _ } in &self.tensors {
            text(&mut hasher, name);
            text(&mut hasher, dtype.name());
            hasher.update(&(shape.len() as u32).to_le_bytes());
            for extent in shape {
                hasher.update(&extent.to_le_bytes());
            }
        }
        *hasher.finalize().as_bytes()
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()
    }
}

impl TensorSource for Checkpoint {
    fn info(&self, key: &str) -> Option<TensorInfo> {
        self.tensor(key).cloned()
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let i = self.position(key).ok_or_else(|| source::no_tensor(key).at(self.folder.display()))?;
        source::check_range(&self.tensors[i], offset, buf.len())?;
        let (file, start) = self.places[i];
        self.handles[file].read_exact_at(buf, start + offset).map_err(|e| {
            let path = self.folder.join(&self.files[file].name);
            let error = if e.kind() == std::io::ErrorKind::UnexpectedEof {
                Error::new(
                    Kind::BadInput,
                    "checkpoint/changed",
                    "the file became shorter while it was in use",
                )
                .hint("do not write to the model folder while it is being read")
            } else {
                Error::io("read", &path, &e)
            };
            error.at(key)
        })
    }
}

/// True if there is a directory entry, even a dangling link.
fn entry_exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Opens a file of the folder under the rules for links.
fn open_file(folder: &Path, name: &str, options: &CheckpointOptions) -> Result<PositionedFile> {
    let path = folder.join(name);
    let metadata = path.symlink_metadata().map_err(|e| {
        if e.kind() == std::io::ErrorKind::NotFound {
            Error::new(Kind::BadInput, "checkpoint/missing-file", "the file does not exist")
                .at(name)
                .hint("the download is incomplete: download the model again")
        } else {
            Error::io("open", Path::new(name), &e)
        }
    })?;
    if metadata.is_symlink() && !options.follow_links {
        return Err(Error::new(Kind::BadInput, "checkpoint/symlink", "the file is a symbolic link")
            .at(name)
            .hint("pass --follow-links if you trust the folder (Hugging Face caches consist of links)"));
    }
    PositionedFile::open(&path, options.follow_links).map_err(|e| Error::io("open", Path::new(name), &e))
}

/// Checks that `name` can only be a safetensors file directly inside the folder.
fn check_shard_name(name: &str) -> Result<()> {
    let plain = (1..=255).contains(&name.len())
        && !name.starts_with('.')
        && !name.chars().any(|c| matches!(c, '/' | '\\' | ':') || c.is_control());
    let (code, what) = if !plain {
        ("checkpoint/shard-name", "the index names a file that is not a plain name inside the folder")
    } else if !name.ends_with(".safetensors") {
        ("checkpoint/shard-format", "the index names a file that is not a .safetensors file")
    } else {
        return Ok(());
    };
    Err(Error::new(Kind::BadInput, code, format!("{what}: {name:?}"))
        .at(INDEX)
        .hint("do not trust this folder: a correct index names .safetensors files beside it"))
}

/// The part of the index that is used; its other keys are notes of the writer.
struct RawIndex {
    weight_map: Option<UniqueMap<String>>,
    duplicated: bool,
}

impl<'de> Deserialize<'de> for RawIndex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IndexVisitor;
        impl<'de> Visitor<'de> for IndexVisitor {
            type Value = RawIndex;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with the key `weight_map`")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawIndex, A::Error> {
                let mut index = RawIndex { weight_map: None, duplicated: false };
                while let Some(key) = map.next_key::<String>()? {
                    if key == "weight_map" {
                        let value = map.next_value()?;
                        index.duplicated |= index.weight_map.replace(value).is_some();
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(index)
            }
        }
        deserializer.deserialize_map(IndexVisitor)
    }
}

/// Shard name to the tensors the index places in it.
fn read_index(folder: &Path, options: &CheckpointOptions) -> Result<BTreeMap<String, Vec<String>>> {
    let bad = |code, what: String| {
        Error::new(Kind::BadInput, code, what).at(INDEX).hint("the index is damaged: download it again")
    };
    let file = open_file(folder, INDEX, options)?;
    if file.len() > header::MAX_HEADER {
        let what = format!("{} bytes exceed the limit of {}", file.len(), header::MAX_HEADER);
        return Err(bad("checkpoint/index-length", what));
    }
    let mut json = vec![0; file.len() as usize];
    file.read_exact_at(&mut json, 0).map_err(|e| Error::io("read", Path::new(INDEX), &e))?;
    let index: RawIndex = serde_json::from_slice(&json)
        .map_err(|e| bad("checkpoint/index-json", format!("it is not valid: {e}")))?;
    let Some(weight_map) = index.weight_map else {
        return Err(bad("checkpoint/index-json", "it has no `weight_map`".to_owned()));
    };
    let mut problems = Problems::default();
    let twice = index.duplicated.then(|| "weight_map".to_owned());
    for key in twice.into_iter().chain(weight_map.duplicates) {
        problems.add(bad("checkpoint/duplicate-key", format!("the key {key:?} occurs twice")));
    }
    let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map.entries {
        shards.entry(shard).or_default().push(tensor);
    }
    for shard in shards.keys() {
        if let Err(error) = check_shard_name(shard) {
            problems.add(error);
        }
    }
    problems.finish()?;
    Ok(shards)
}

/// The error for a folder without safetensors weights; `Err` if it cannot be listed.
fn no_weights(folder: &Path) -> Result<Error> {
    let failed = |e: std::io::Error| Error::io("list", folder, &e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let with = |endings: &[&str]| names.iter().find(|n| endings.iter().any(|e| n.ends_with(e)));
    let error = if let Some(other) = with(&[".safetensors"]) {
        let what = format!("there is neither {SINGLE} nor {INDEX}, but {other:?}");
        Error::new(Kind::BadInput, "checkpoint/no-weights", what)
            .hint(format!("rename a single weight file to {SINGLE}; sharded weights need their index"))
    } else if let Some(pickle) = with(&[".bin", ".pt", ".pth", ".ckpt", ".pkl"]) {
        let what = format!("{pickle:?} is a pickle file, which can run code when it is read");
        Error::new(Kind::Unsupported, "checkpoint/pickle", what)
            .hint("convert the model to safetensors first, for example with save_pretrained(safe_serialization=True)")
    } else {
        Error::new(Kind::BadInput, "checkpoint/no-weights", format!("there is neither {SINGLE} nor {INDEX}"))
            .hint("give the folder that holds the model's safetensors files")
    };
    Ok(error.at(folder.display()))
}
