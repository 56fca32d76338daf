//! Element types of host kernels.

use half::{bf16, f16};

/// A float type that kernels load as f32 and store rounded to nearest even.
pub trait Element: Copy + Send + Sync + Default + PartialEq + std::fmt::Debug + 'static {
    /// Exact value.
    fn to_f32(self) -> f32;
    /// Nearest value.
    fn from_f32(value: f32) -> Self;
    /// How vector code widens the type.
    const WIDEN: Widen;

    /// Converts a slice; `to` has the length of `from`.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t = f.to_f32();
        }
    }

    /// Converts a slice; `to` has the length of `from`.
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self]) {
        for (t, f) in to.iter_mut().zip(from) {
            *t = Self::from_f32(*f);
        }
    }

    /// The slice itself if the type is f32.
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }
}

/// How vector code widens an element type to f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Widen {
    /// f32 already.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// IEEE half.
    F16,
}

impl Element for f32 {
    const WIDEN: Widen = Widen::F32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
    fn as_f32(slice: &[f32]) -> Option<&[f32]> {
        Some(slice)
    }
}

impl Element for bf16 {
    const WIDEN: Widen = Widen::Bf16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let nan = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { nan as u16 } else { rounded as u16 })
    }
}

impl Element for f16 {
    const WIDEN: Widen = Widen::F16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounding_agrees_with_the_half_crate() {
        let mut bits = 1u32;
        for _ in 0..20_000 {
            bits = bits.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            let value = f32::from_bits(bits);
            let (ours, theirs) = (<bf16 as Element>::from_f32(value), bf16::from_f32(value));
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{value}");
        }
    }
}
