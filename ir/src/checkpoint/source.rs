//! Where weight bytes come from.
//!
//! A [`TensorSource`] gives the bytes of named tensors on demand, at any offset, from any thread. Terms: a *key* is the
//! public name of a tensor in the source model. Invariant: [`TensorInfo::bytes`] is the exact number of bytes that can
//! be read. This file knows no file format.

use std::collections::BTreeMap;

use crate::dtype::DType;
use crate::error::{Error, Kind, Result};

/// What is known of a tensor without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The key.
    pub name: String,
    /// Element type as stored.
    pub dtype: DType,
    /// Extents, outermost first, row-major; empty for a scalar.
    pub shape: Vec<u64>,
    /// Stored size: the product of the extents times the element size.
    pub bytes: u64,
}

/// Named tensors that can be read piecewise.
pub trait TensorSource: Send + Sync {
    /// Type and shape of `key`; `None` if there is no such tensor.
    fn info(&self, key: &str) -> Option<TensorInfo>;

    /// Fills `buf` with the bytes of `key` from byte `offset` on.
    ///
    /// # Errors
    /// `checkpoint/no-tensor` if the key is unknown, `checkpoint/read-range` if the range leaves the tensor, or an I/O
    /// failure.
    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// All bytes of `key`.
    ///
    /// # Errors
    /// As [`TensorSource::read_at`].
    fn read_all(&self, key: &str) -> Result<Vec<u8>> {
        let info = self.info(key).ok_or_else(|| no_tensor(key))?;
        let len = usize::try_from(info.bytes).map_err(|_| {
            Error::new(Kind::OutOfMemory, "checkpoint/too-large", "the tensor exceeds the address space")
                .at(key)
                .hint("read the tensor in pieces")
        })?;
        let mut bytes = vec![0; len];
        self.read_at(key, 0, &mut bytes)?;
        Ok(bytes)
    }
}

/// The error for an unknown key.
pub(crate) fn no_tensor(key: &str) -> Error {
    Error::new(Kind::BadInput, "checkpoint/no-tensor", format!("there is no tensor {key:?}"))
        .hint("check that the weights belong to this model's config.json")
}

/// Checks that `len` bytes at `offset` lie inside the tensor.
pub(crate) fn check_range(info: &TensorInfo, offset: u64, len: usize) -> Result<()> {
    let end = u64::try_from(len).ok().and_then(|len| offset.checked_add(len));
    if end.is_some_and(|end| end <= info.bytes) {
        return Ok(());
    }
    let what = format!("cannot read {len} bytes at offset {offset}: the tensor has {} bytes", info.bytes);
    Err(Error::new(Kind::Usage, "checkpoint/read-range", what)
        .at(&info.name)
        .hint("read inside the tensor's bytes"))
}

/// Stored bytes of a dense tensor; `None` on overflow.
pub(crate) fn dense_bytes(dtype: DType, shape: &[u64]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent))?;
    dtype.bytes_for(elements)
}

/// Tensors held in memory.
#[derive(Clone, Debug, Default)]
pub struct MemorySource {
    tensors: BTreeMap<String, (TensorInfo, Vec<u8>)>,
}

impl MemorySource {
    /// A source without tensors.
    pub fn new() -> Self {
        MemorySource::default()
    }

    /// Adds a tensor, replacing one of the same name.
    ///
    /// # Errors
    /// `checkpoint/tensor-size` if the number of bytes is not what `dtype` and `shape` ask for.
    pub fn insert(&mut self, name: &str, dtype: DType, shape: &[u64], bytes: Vec<u8>) -> Result<()> {
        let info =
            TensorInfo { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes: bytes.len() as u64 };
        if dense_bytes(dtype, shape) != Some(info.bytes) {
            let what = format!("{} bytes given for {dtype} {shape:?}", bytes.len());
            return Err(Error::new(Kind::Usage, "checkpoint/tensor-size", what).at(name));
        }
        self.tensors.insert(name.to_owned(), (info, bytes));
        Ok(())
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.values().map(|(info, _)| info)
    }
}

impl TensorSource for MemorySource {
    fn info(&self, key: &str) -> Option<TensorInfo> {
        self.tensors.get(key).map(|(info, _)| info.clone())
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let (info, bytes) = self.tensors.get(key).ok_or_else(|| no_tensor(key))?;
        check_range(info, offset, buf.len())?;
        // The range lies inside `bytes`, whose length is a usize.
        let start = offset as usize;
        buf.copy_from_slice(&bytes[start..start + buf.len()]);
        Ok(())
    }
}
