//! NumPy's `.npy` files, versions 1 and 2, C order, little-endian.

use std::path::Path;

use millrace::ir::DType;
use millrace::ir::tensor::{decode, encode};
use millrace::{Error, Kind, Result, TensorRef};

/// An array in memory.
pub struct Array {
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub shape: Vec<u64>,
    /// Elements, little-endian.
    pub bytes: Vec<u8>,
}

fn bad(path: &Path, message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, "npy/malformed", message)
        .at(path.display())
        .hint("save arrays with numpy.save in C order")
}

/// Element types as NumPy spells them, with their widths; `f8` is read as f32.
fn element(descr: &str) -> Option<(DType, usize)> {
    Some(match descr {
        "<f4" => (DType::F32, 4),
        "<f2" => (DType::F16, 2),
        "<f8" => (DType::F32, 8),
        "<i4" => (DType::I32, 4),
        "<i8" => (DType::I64, 8),
        "|i1" => (DType::I8, 1),
        "|u1" => (DType::U8, 1),
        "|b1" => (DType::Bool, 1),
        _ => return None,
    })
}

/// The text after `'key':` in the header's dictionary.
fn field<'a>(header: &'a str, key: &str) -> Option<&'a str> {
    let at = header.find(&format!("'{key}'"))?;
    header[at..].split_once(':').map(|(_, rest)| rest.trim_start())
}

/// Reads an array.
///
/// # Errors
/// I/O failures, `npy/malformed`.
pub fn read(path: &Path) -> Result<Array> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
    let magic = bytes.get(..8).filter(|m| m.starts_with(b"\x93NUMPY"));
    let version = magic.ok_or_else(|| bad(path, "is no .npy file"))?[6];
    let (start, length) = match (version, bytes.get(8..12)) {
        (1, Some(b)) => (10, usize::from(u16::from_le_bytes([b[0], b[1]]))),
        (2, Some(b)) => (12, u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize),
        _ => return Err(bad(path, format!("has format version {version}"))),
    };
    let end = start + length;
    let header = bytes.get(start..end).and_then(|h| std::str::from_utf8(h).ok());
    let header = header.ok_or_else(|| bad(path, "has no header"))?;
    let descr = field(header, "descr").and_then(|d| d.split('\'').nth(1));
    let descr = descr.ok_or_else(|| bad(path, "names no element type"))?;
    let (dtype, width) = element(descr).ok_or_else(|| bad(path, format!("has element type `{descr}`")))?;
    if field(header, "fortran_order").is_none_or(|f| !f.starts_with("False")) {
        return Err(bad(path, "is in Fortran order"));
    }
    let shape = field(header, "shape").and_then(|s| s.strip_prefix('(')).and_then(|s| s.split_once(')'));
    let (shape, _) = shape.ok_or_else(|| bad(path, "has no shape"))?;
    let shape: Vec<u64> = shape
        .split(',')
        .map(str::trim)
        .filter(|d| !d.is_empty())
        .map(|d| d.parse().map_err(|_| bad(path, format!("has extent `{d}`"))))
        .collect::<Result<_>>()?;
    let elements = shape.iter().try_fold(1u64, |acc, d| acc.checked_mul(*d));
    let data = &bytes[end..];
    if elements.and_then(|n| n.checked_mul(width as u64)) != Some(data.len() as u64) {
        return Err(bad(path, format!("holds {} bytes for shape {shape:?}", data.len())));
    }
    let bytes = if descr == "<f8" {
        data.as_chunks::<8>().0.iter().flat_map(|c| (f64::from_le_bytes(*c) as f32).to_le_bytes()).collect()
    } else {
        data.to_vec()
    };
    Ok(Array { dtype, shape, bytes })
}

impl Array {
    /// The array in another element type, if its kind is the same (floats to floats, integers to integers).
    ///
    /// # Errors
    /// `npy/dtype` for other conversions.
    pub fn cast(&self, to: DType) -> Result<Array> {
        let (from, shape) = (self.dtype, self.shape.clone());
        let integers = |d: DType| !d.is_float() && d != DType::Bool;
        if from == to {
            return Ok(Array { dtype: to, shape, bytes: self.bytes.clone() });
        }
        if (from.is_float() && to.is_float()) || (integers(from) && integers(to)) {
            return Ok(Array { dtype: to, shape, bytes: encode(to, &decode(from, &self.bytes)) });
        }
        Err(Error::new(
            Kind::BadInput,
            "npy/dtype",
            format!("an array of {from} does not fit an input of {to}"),
        ))
    }
}

/// Writes a tensor; bf16 and 8-bit floats are written as f32.
///
/// # Errors
/// I/O failures.
pub fn write(path: &Path, tensor: &TensorRef<'_>) -> Result<()> {
    let descr = match tensor.dtype {
        DType::F16 => "<f2",
        DType::I32 => "<i4",
        DType::I64 => "<i8",
        DType::I8 => "|i1",
        DType::U8 => "|u1",
        DType::Bool => "|b1",
        _ => "<f4",
    };
    let data = if descr == "<f4" && tensor.dtype != DType::F32 {
        encode(DType::F32, &decode(tensor.dtype, tensor.bytes))
    } else {
        tensor.bytes.to_vec()
    };
    let shape: Vec<String> = tensor.shape.iter().map(|d| format!("{d},")).collect();
    let mut header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", shape.join(" "));
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend((header.len() as u16).to_le_bytes());
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(path, file).map_err(|e| Error::io("write", path, &e))
}
