//! Writes safetensors files, for tests and examples.
//!
//! Output is a function of the tensors: they are laid out by falling element size, then name, so that every tensor is
//! aligned to its element. Whole files are built in memory, which is fine for small models only.

use std::path::Path;

use super::header::dtype_name;
use super::source::dense_bytes;
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};

/// Name, element type, shape and bytes (row-major, little-endian) of a tensor to write.
pub type NamedTensor<'a> = (&'a str, DType, &'a [u64], &'a [u8]);

/// The bytes of a safetensors file with `tensors`.
///
/// # Errors
/// `checkpoint/tensor-size` if a tensor's bytes do not fit its type and shape, `checkpoint/dtype-unsupported` for `i4`,
/// `checkpoint/duplicate-key` for a name given twice.
pub fn safetensors_bytes(tensors: &[NamedTensor<'_>]) -> Result<Vec<u8>> {
    let mut order: Vec<&NamedTensor<'_>> = tensors.iter().collect();
    order.sort_by_key(|(name, dtype, ..)| (std::cmp::Reverse(dtype.bits()), *name));
    let mut header = serde_json::Map::new();
    let mut end = 0u64;
    for &&(name, dtype, shape, bytes) in &order {
        let Some(spelling) = dtype_name(dtype) else {
            let what = format!("safetensors cannot hold {dtype}");
            return Err(Error::new(Kind::Unsupported, "checkpoint/dtype-unsupported", what).at(name));
        };
        if dense_bytes(dtype, shape) != Some(bytes.len() as u64) {
            let what = format!("{} bytes given for {dtype} {shape:?}", bytes.len());
            return Err(Error::new(Kind::Usage, "checkpoint/tensor-size", what).at(name));
        }
        let begin = end;
        end += bytes.len() as u64;
        let entry = serde_json::json!({ "dtype": spelling, "shape": shape, "data_offsets": [begin, end] });
        if header.insert(name.to_owned(), entry).is_some() {
            let what = "the name is given twice";
            return Err(Error::new(Kind::Usage, "checkpoint/duplicate-key", what).at(name));
        }
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json);
    for (.., bytes) in order {
        file.extend_from_slice(bytes);
    }
    Ok(file)
}

/// Writes one safetensors file.
///
/// # Errors
/// As [`safetensors_bytes`], or an I/O failure.
pub fn write_safetensors(path: &Path, tensors: &[NamedTensor<'_>]) -> Result<()> {
    std::fs::write(path, safetensors_bytes(tensors)?).map_err(|e| Error::io("write", path, &e))
}

/// Writes a folder with one file per shard (name and tensors) and `model.safetensors.index.json`.
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_sharded(folder: &Path, shards: &[(&str, &[NamedTensor<'_>])]) -> Result<()> {
    let mut weight_map = std::collections::BTreeMap::new();
    let mut total_size = 0u64;
    for &(shard, tensors) in shards {
        write_safetensors(&folder.join(shard), tensors)?;
        for &(name, .., bytes) in tensors {
            weight_map.insert(name, shard);
            total_size += bytes.len() as u64;
        }
    }
    let index = serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    let path = folder.join("model.safetensors.index.json");
    std::fs::write(&path, index.to_string()).map_err(|e| Error::io("write", &path, &e))
}
