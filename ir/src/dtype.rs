//! Element types.
//!
//! A [`DType`] names how one element of a tensor is encoded. The name (`bf16`, `f8e4m3`, ...) is its spelling in
//! the text form, in manifests, in errors and in serialised form. `i4` packs two elements into a byte, so it has a
//! width in bits but no size in bytes; byte counts of whole tensors come from [`DType::bytes_for`]. This file knows
//! no conversion between values.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The encoding of one element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of binary32.
    BF16,
    /// 8-bit float, 4 exponent and 3 mantissa bits, no infinities (OCP "e4m3fn").
    F8E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits (OCP).
    F8E5M2,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 4-bit integer, two to a byte.
    I4,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// One byte, 0 or 1.
    Bool,
}

impl DType {
    /// Every element type, in declaration order.
    pub const ALL: [DType; 11] = [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::I8,
        DType::U8,
        DType::I4,
        DType::I32,
        DType::I64,
        DType::Bool,
    ];

    /// The one spelling.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F8E4M3 => "f8e4m3",
            DType::F8E5M2 => "f8e5m2",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::I4 => "i4",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::Bool => "bool",
        }
    }

    /// The type spelled `name`, or `None`.
    pub fn parse(name: &str) -> Option<DType> {
        DType::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Width of one element in bits as stored.
    pub const fn bits(self) -> usize {
        match self {
            DType::I4 => 4,
            DType::F8E4M3 | DType::F8E5M2 | DType::I8 | DType::U8 | DType::Bool => 8,
            DType::F16 | DType::BF16 => 16,
            DType::F32 | DType::I32 => 32,
            DType::I64 => 64,
        }
    }

    /// Size of one element in bytes; `None` for `i4`, which is smaller than a byte.
    pub const fn size_bytes(self) -> Option<usize> {
        match self.bits() {
            4 => None,
            bits => Some(bits / 8),
        }
    }

    /// Bytes of `elements` densely packed elements, rounded up to a whole byte; `None` on overflow.
    pub const fn bytes_for(self, elements: u64) -> Option<u64> {
        match self.size_bytes() {
            Some(size) => elements.checked_mul(size as u64),
            None => Some(elements.div_ceil(2)),
        }
    }

    /// True for the floating point types.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text was not the name of an element type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown element type `{0}`; known: f32, f16, bf16, f8e4m3, f8e5m2, i8, u8, i4, i32, i64, bool")]
pub struct UnknownDType(pub String);

impl FromStr for DType {
    type Err = UnknownDType;

    fn from_str(name: &str) -> Result<Self, UnknownDType> {
        DType::parse(name).ok_or_else(|| UnknownDType(name.to_owned()))
    }
}

impl Serialize for DType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for DType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_in_text_and_json() {
        for dtype in DType::ALL {
            assert_eq!(DType::parse(dtype.name()), Some(dtype));
            let json = serde_json::to_string(&dtype).unwrap();
            assert_eq!(json, format!("\"{dtype}\""));
            assert_eq!(serde_json::from_str::<DType>(&json).unwrap(), dtype);
        }
        for wrong in ["F32", "", "f8", "float32"] {
            assert_eq!(DType::parse(wrong), None);
        }
        assert!(serde_json::from_str::<DType>("\"f64\"").unwrap_err().to_string().contains("`f64`"));
    }

    #[test]
    fn widths() {
        let sizes: Vec<_> = DType::ALL.into_iter().map(|d| d.size_bytes().unwrap_or(0)).collect();
        assert_eq!(sizes, [4, 2, 2, 1, 1, 1, 1, 0, 4, 8, 1]);
        assert_eq!(DType::I4.bits(), 4);
        assert_eq!(DType::I4.bytes_for(5), Some(3));
        assert_eq!(DType::I4.bytes_for(u64::MAX), Some(1 << 63));
        assert_eq!(DType::I64.bytes_for(1 << 61), None);
        assert_eq!(DType::ALL.into_iter().filter(|d| d.is_float()).count(), 5);
    }
}
