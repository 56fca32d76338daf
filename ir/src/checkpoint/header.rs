//! The header of one safetensors file: parsing and validation.
//!
//! A file is a little-endian `u64` header length, that many bytes of JSON (`name -> {dtype, shape, data_offsets}`,
//! and `__metadata__`), and the data the offsets point into.
//!
//! Invariants of what [`read`] returns:
//! 1. names are unique, not empty, without control characters;
//! 2. every element type is a [`DType`];
//! 3. the size of a tensor is the product of its extents times the element size;
//! 4. the tensors cover the data exactly: no overlap, no hole, nothing after the last.
//!
//! Names read from the file are quoted and escaped in messages. This file knows nothing of shards and folders.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::problems::Problems;
use super::source::{TensorInfo, dense_bytes};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::positioned::PositionedFile;

/// Largest header accepted, in bytes.
pub(super) const MAX_HEADER: u64 = 100_000_000;
/// Longest tensor name accepted, in bytes.
const MAX_NAME: usize = 4096;
const DAMAGED: &str = "the file is damaged or incomplete: download it again";
const MALFORMED: &str = "the file was not written by a correct safetensors writer: convert the model again";

/// A tensor and where its bytes start in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Located {
    pub(super) info: TensorInfo,
    pub(super) offset: u64,
}

fn bad(code: &'static str, message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, code, message)
}

/// Reads and validates the header of `file`. What is wrong with single tensors goes to `problems`; what makes the
/// header unreadable is the returned error.
pub(super) fn read(label: &str, file: &PositionedFile, problems: &mut Problems) -> Result<Vec<Located>> {
    let truncated = |what: String| bad("checkpoint/truncated", what).at(label).hint(DAMAGED);
    let failed =
        |e: std::io::Error| bad("io/failed", format!("cannot read the header: {e}")).at(label).hint(DAMAGED);
    if file.len() < 8 {
        return Err(truncated(format!("{} bytes are too few for a safetensors file", file.len())));
    }
    let mut word = [0; 8];
    file.read_exact_at(&mut word, 0).map_err(failed)?;
    let length = u64::from_le_bytes(word);
    if length > MAX_HEADER {
        let what = format!("the header claims {length} bytes, more than the limit of {MAX_HEADER}");
        return Err(bad("checkpoint/header-length", what)
            .at(label)
            .hint("check that this is a safetensors file"));
    }
    let data_len = (file.len() - 8)
        .checked_sub(length)
        .ok_or_else(|| truncated(format!("the header claims {length} bytes, the file has {}", file.len())))?;
    // At most MAX_HEADER and at most what the file has.
    let mut json = vec![0; length as usize];
    file.read_exact_at(&mut json, 8).map_err(failed)?;
    if json.first() != Some(&b'{') {
        return Err(bad("checkpoint/header-json", "the header does not start with `{`")
            .at(label)
            .hint(MALFORMED));
    }
    let raw: RawHeader = serde_json::from_slice(&json).map_err(|e| {
        bad("checkpoint/header-json", format!("the header is not valid: {e}")).at(label).hint(MALFORMED)
    })?;
    Ok(validate(label, raw, 8 + length, data_len, problems))
}

fn validate(
    label: &str,
    raw: RawHeader,
    data_start: u64,
    data_len: u64,
    problems: &mut Problems,
) -> Vec<Located> {
    for name in raw.duplicates {
        let what = format!("the key {name:?} occurs twice in the header");
        problems.add(bad("checkpoint/duplicate-key", what).at(label).hint(MALFORMED));
    }
    let mut located = Vec::with_capacity(raw.tensors.len());
    let mut spans = Vec::with_capacity(raw.tensors.len());
    for (name, entry) in raw.tensors {
        let (begin, end) = entry.data_offsets;
        // Spans that are wrong in themselves would only repeat their error as overlaps and holes.
        match check_entry(&name, &entry, data_len) {
            Ok(dtype) => {
                spans.push((begin, end, name.clone()));
                let info = TensorInfo { name, dtype, shape: entry.shape, bytes: end - begin };
                located.push(Located { info, offset: data_start + begin });
            }
            Err(error) => {
                if begin <= end && end <= data_len {
                    spans.push((begin, end, name.clone()));
                }
                problems.add(error.at(format!("{label}: {}", name.escape_debug())));
            }
        }
    }
    check_cover(label, spans, data_len, problems);
    located
}

fn check_entry(name: &str, entry: &Entry, data_len: u64) -> Result<DType> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        let what = format!("a tensor name must have 1 to {MAX_NAME} bytes and no control characters");
        return Err(bad("checkpoint/tensor-name", what).hint(MALFORMED));
    }
    let dtype = parse_dtype(&entry.dtype)?;
    let (begin, end) = entry.data_offsets;
    if begin > end || end > data_len {
        let what = format!("the data range {begin}..{end} leaves the file's {data_len} bytes of data");
        return Err(bad("checkpoint/data-range", what).hint(if begin > end { MALFORMED } else { DAMAGED }));
    }
    let shape = &entry.shape;
    match dense_bytes(dtype, shape) {
        None => Err(bad("checkpoint/tensor-size", format!("the size of {dtype} {shape:?} exceeds 64 bits"))
            .hint(MALFORMED)),
        Some(bytes) if bytes != end - begin => {
            let what = format!("{dtype} {shape:?} needs {bytes} bytes, the header gives it {}", end - begin);
            Err(bad("checkpoint/tensor-size", what).hint(MALFORMED))
        }
        Some(_) => Ok(dtype),
    }
}

fn check_cover(label: &str, mut spans: Vec<(u64, u64, String)>, data_len: u64, problems: &mut Problems) {
    // The first missing or doubled byte explains the file; what follows from a rejected tensor is not repeated.
    let sound = problems.is_empty();
    spans.sort();
    let mut covered = 0;
    let mut last: Option<&str> = None;
    for (begin, end, name) in &spans {
        let place = format!("{label}: {}", name.escape_debug());
        if *begin < covered {
            let what = format!("its data overlaps that of {:?}", last.unwrap_or_default());
            problems.add(bad("checkpoint/overlap", what).at(place).hint(MALFORMED));
        } else if *begin > covered && sound {
            let what = format!("the bytes {covered}..{begin} before its data belong to no tensor");
            problems.add(bad("checkpoint/hole", what).at(place).hint(MALFORMED));
        }
        if *end >= covered {
            covered = *end;
            last = Some(name);
        }
    }
    if covered < data_len && sound {
        let what = format!("the last {} bytes belong to no tensor", data_len - covered);
        problems.add(bad("checkpoint/trailing-bytes", what).at(label).hint(MALFORMED));
    }
}

/// The element type that safetensors spells `name`.
fn parse_dtype(name: &str) -> Result<DType> {
    for dtype in DType::ALL {
        if dtype_name(dtype) == Some(name) {
            return Ok(dtype);
        }
    }
    let known =
        ["F64", "I16", "U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"].contains(&name);
    if known {
        let what = format!("the element type {name} is not supported");
        return Err(Error::new(Kind::Unsupported, "checkpoint/dtype-unsupported", what)
            .hint("convert the tensor to a supported type, for example F32 or BF16"));
    }
    Err(bad("checkpoint/dtype-unknown", format!("{name:?} is not an element type of safetensors"))
        .hint(MALFORMED))
}

/// How safetensors spells `dtype`; `None` if the format cannot hold it.
pub(super) fn dtype_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("F32"),
        DType::F16 => Some("F16"),
        DType::BF16 => Some("BF16"),
        DType::F8E4M3 => Some("F8_E4M3"),
        DType::F8E5M2 => Some("F8_E5M2"),
        DType::I8 => Some("I8"),
        DType::U8 => Some("U8"),
        DType::I4 => None,
        DType::I32 => Some("I32"),
        DType::I64 => Some("I64"),
        DType::Bool => Some("BOOL"),
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The JSON object as written, with the keys that occur more than once.
struct RawHeader {
    tensors: Vec<(String, Entry)>,
    duplicates: Vec<String>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from tensor names to their types")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: Vec::new(), duplicates: Vec::new() };
                let mut seen = BTreeSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        header.duplicates.push(name.clone());
                    }
                    let context = |e: A::Error| A::Error::custom(format!("{name:?}: {e}"));
                    if name == "__metadata__" {
                        let metadata: UniqueMap<String> = map.next_value().map_err(context)?;
                        header.duplicates.extend(metadata.duplicates);
                    } else {
                        let entry = map.next_value().map_err(context)?;
                        header.tensors.push((name, entry));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// A JSON object in file order, with the keys that occur more than once.
pub(super) struct UniqueMap<V> {
    pub(super) entries: Vec<(String, V)>,
    pub(super) duplicates: Vec<String>,
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for MapVisitor<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap<V>, A::Error> {
                let mut found = UniqueMap { entries: Vec::new(), duplicates: Vec::new() };
                let mut seen = BTreeSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        found.duplicates.push(key.clone());
                    }
                    found.entries.push((key, map.next_value()?));
                }
                Ok(found)
            }
        }
        deserializer.deserialize_map(MapVisitor(std::marker::PhantomData))
    }
}
