//! Dense tensors of the reference evaluator: every element an f64, rounded to the element type.
//!
//! Integers are exact up to 2^53, which covers every index and token id a graph can hold.

use crate::dtype::DType;

/// A tensor with its values in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Element type the values are rounded to.
    pub dtype: DType,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub data: Vec<f64>,
}

impl Tensor {
    /// Most elements the evaluator will hold in one tensor.
    pub const MAX_ELEMENTS: usize = 1 << 30;

    /// A tensor of zeros; `None` if it would be too large.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Option<Tensor> {
        let elements = shape.iter().try_fold(1usize, |acc, d| acc.checked_mul(*d))?;
        (elements <= Self::MAX_ELEMENTS).then(|| Tensor {
            dtype,
            shape: shape.to_vec(),
            data: vec![0.0; elements],
        })
    }

    /// A tensor from values; `None` if the count does not fit the shape.
    pub fn from_values(dtype: DType, shape: &[usize], data: Vec<f64>) -> Option<Tensor> {
        let elements = shape.iter().try_fold(1usize, |acc, d| acc.checked_mul(*d))?;
        (elements == data.len()).then(|| Tensor { dtype, shape: shape.to_vec(), data })
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.data.len()
    }

    /// The last extent, 1 for a scalar.
    pub fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Row-major strides in elements.
    pub fn strides(&self) -> Vec<usize> {
        strides(&self.shape)
    }

    /// Rounds every value to the element type.
    pub fn round(&mut self) {
        let dtype = self.dtype;
        self.data.iter_mut().for_each(|v| *v = round_to(dtype, *v));
    }

    /// The values as little-endian bytes of the element type.
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(self.dtype, &self.data)
    }

    /// A tensor from little-endian bytes; `None` if the count does not fit the shape.
    pub fn from_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Option<Tensor> {
        let elements = shape.iter().try_fold(1usize, |acc, d| acc.checked_mul(*d))?;
        let mut data = decode(dtype, bytes);
        if dtype == DType::I4 {
            data.truncate(elements);
        }
        Tensor::from_values(dtype, shape, data)
    }
}

/// Row-major strides in elements.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    strides
}

/// `value` rounded to nearest even in the element type; integers saturate.
pub fn round_to(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F32 => f64::from(value as f32),
        DType::F16 => half::f16::from_f64(value).to_f64(),
        DType::BF16 => half::bf16::from_f64(value).to_f64(),
        DType::F8E4M3 => minifloat_to_f64(f64_to_minifloat(value, 4, 3), 4, 3),
        DType::F8E5M2 => minifloat_to_f64(f64_to_minifloat(value, 5, 2), 5, 2),
        DType::I8 => f64::from(value as i8),
        DType::U8 => f64::from(value as u8),
        DType::I4 => f64::from((value as i8).clamp(-8, 7)),
        DType::I32 => f64::from(value as i32),
        DType::I64 => (value as i64) as f64,
        DType::Bool => f64::from(u8::from(value != 0.0)),
    }
}

/// Little-endian bytes of `values` in the element type, rounded to nearest even. `i4` packs two to a byte, low
/// half first.
pub fn encode(dtype: DType, values: &[f64]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() * dtype.bits().div_ceil(8));
    match dtype {
        DType::F32 => values.iter().for_each(|v| out.extend_from_slice(&(*v as f32).to_le_bytes())),
        DType::F16 => {
            values.iter().for_each(|v| out.extend_from_slice(&half::f16::from_f64(*v).to_le_bytes()))
        }
        DType::BF16 => {
            values.iter().for_each(|v| out.extend_from_slice(&half::bf16::from_f64(*v).to_le_bytes()))
        }
        DType::F8E4M3 => out.extend(values.iter().map(|v| f64_to_minifloat(*v, 4, 3))),
        DType::F8E5M2 => out.extend(values.iter().map(|v| f64_to_minifloat(*v, 5, 2))),
        DType::I8 => out.extend(values.iter().map(|v| (*v as i8) as u8)),
        DType::U8 => out.extend(values.iter().map(|v| *v as u8)),
        DType::I32 => values.iter().for_each(|v| out.extend_from_slice(&(*v as i32).to_le_bytes())),
        DType::I64 => values.iter().for_each(|v| out.extend_from_slice(&(*v as i64).to_le_bytes())),
        DType::Bool => out.extend(values.iter().map(|v| u8::from(*v != 0.0))),
        DType::I4 => out.extend(values.chunks(2).map(|pair| {
            let nibble = |v: f64| ((v as i8).clamp(-8, 7) as u8) & 0xf;
            nibble(pair[0]) | (pair.get(1).map_or(0, |v| nibble(*v)) << 4)
        })),
    }
    out
}

/// Values of little-endian `bytes`; a trailing partial element is ignored.
pub fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    fn chunks<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|c| f(*c)).collect()
    }
    match dtype {
        DType::F32 => chunks(bytes, |c| f64::from(f32::from_le_bytes(c))),
        DType::F16 => chunks(bytes, |c| half::f16::from_le_bytes(c).to_f64()),
        DType::BF16 => chunks(bytes, |c| half::bf16::from_le_bytes(c).to_f64()),
        DType::F8E4M3 => chunks(bytes, |[b]: [u8; 1]| minifloat_to_f64(b, 4, 3)),
        DType::F8E5M2 => chunks(bytes, |[b]: [u8; 1]| minifloat_to_f64(b, 5, 2)),
        DType::I8 => chunks(bytes, |[b]: [u8; 1]| f64::from(b as i8)),
        DType::U8 => chunks(bytes, |[b]: [u8; 1]| f64::from(b)),
        DType::I32 => chunks(bytes, |c| f64::from(i32::from_le_bytes(c))),
        DType::I64 => chunks(bytes, |c| i64::from_le_bytes(c) as f64),
        DType::Bool => chunks(bytes, |[b]: [u8; 1]| f64::from(u8::from(b != 0))),
        DType::I4 => {
            bytes.iter().flat_map(|b| [((b << 4) as i8) >> 4, (*b as i8) >> 4]).map(f64::from).collect()
        }
    }
}

/// The OCP 8-bit formats: e4m3 has no infinity and one NaN pattern (largest value 448), e5m2 follows IEEE.
fn minifloat_to_f64(byte: u8, exponent_bits: u32, mantissa_bits: u32) -> f64 {
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    let exponent = u32::from(byte & 0x7f) >> mantissa_bits;
    let mantissa = u32::from(byte) & ((1 << mantissa_bits) - 1);
    let bias = (1i32 << (exponent_bits - 1)) - 1;
    let all_ones = exponent == (1 << exponent_bits) - 1;
    if exponent_bits == 5 && all_ones {
        return if mantissa == 0 { sign * f64::INFINITY } else { f64::NAN };
    }
    if exponent_bits == 4 && all_ones && mantissa == 7 {
        return f64::NAN;
    }
    let scale = f64::from(1 << mantissa_bits);
    if exponent == 0 {
        sign * f64::from(mantissa) / scale * 2f64.powi(1 - bias)
    } else {
        sign * (1.0 + f64::from(mantissa) / scale) * 2f64.powi(exponent as i32 - bias)
    }
}

/// Nearest even; values beyond the largest finite one saturate to it, NaN stays NaN.
fn f64_to_minifloat(value: f64, exponent_bits: u32, mantissa_bits: u32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let largest: u8 = if exponent_bits == 4 { 0x7e } else { 0x7b };
    let magnitude = value.abs();
    // Codes of non-negative finite values are ordered like the values, so bisection finds the neighbours.
    let (mut low, mut high) = (0u8, largest);
    if magnitude >= minifloat_to_f64(largest, exponent_bits, mantissa_bits) {
        return sign | largest;
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if minifloat_to_f64(middle, exponent_bits, mantissa_bits) <= magnitude {
            low = middle;
        } else {
            high = middle;
        }
    }
    let below = magnitude - minifloat_to_f64(low, exponent_bits, mantissa_bits);
    let above = minifloat_to_f64(high, exponent_bits, mantissa_bits) - magnitude;
    let code = match below.partial_cmp(&above) {
        Some(std::cmp::Ordering::Less) => low,
        Some(std::cmp::Ordering::Greater) => high,
        _ if low.is_multiple_of(2) => low,
        _ => high,
    };
    sign | code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_in_every_type() {
        for dtype in DType::ALL {
            let values = [0.0, 1.0, 3.0, 1.0];
            let bytes = encode(dtype, &values);
            let expected = if dtype == DType::Bool { vec![0.0, 1.0, 1.0, 1.0] } else { values.to_vec() };
            assert_eq!(decode(dtype, &bytes), expected, "{dtype}");
        }
    }

    #[test]
    fn eight_bit_floats_have_their_published_limits() {
        assert_eq!(round_to(DType::F8E4M3, 1e9), 448.0);
        assert_eq!(round_to(DType::F8E5M2, 1e9), 57344.0);
        assert_eq!(round_to(DType::F8E4M3, 0.0019), 0.001953125);
        assert_eq!(round_to(DType::F8E4M3, 17.0), 16.0); // halfway between 16 and 18, even wins
        assert!(round_to(DType::F8E4M3, f64::NAN).is_nan());
    }

    #[test]
    fn bf16_rounds_to_even() {
        assert_eq!(round_to(DType::BF16, 1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(round_to(DType::BF16, 1.0 + 3.0 / 256.0), 1.015625);
    }
}
