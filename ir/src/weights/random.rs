//! Reproducible random weights: element `i` of seed `s` is a pure function of both, so any range can be read.
//!
//! [`normal`] defines the numbers. [`fill`] gives the same bits many at a time: it computes each number to a relative
//! error far below [`DOUBT`], and asks [`normal`] where a number so near could round to either side.

use crate::dtype::DType;

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn key_of(seed: u64) -> u64 {
    mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15))
}

/// 53 random bits.
fn bits(key: u64, index: u64, salt: u64) -> u64 {
    mix(key ^ mix(index.wrapping_mul(2).wrapping_add(salt))) >> 11
}

/// 2^-53.
const UNIT: f64 = 1.0 / (1u64 << 53) as f64;

/// A standard normal number by the Box-Muller transform of two uniform numbers keyed by `seed` and `index`.
pub fn normal(seed: u64, index: u64) -> f64 {
    let key = key_of(seed);
    let unit = |salt: u64| bits(key, index, salt) as f64 * UNIT;
    let radius = (-2.0 * (1.0 - unit(0)).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit(1)).cos()
}

/// Numbers computed at once.
const BLOCK: usize = 64;

/// Units in the last place of an f64 by which [`near`] may differ from [`normal`]: its series end below 2^-41, the
/// factors round below 2^-50, and where [`normal`] itself is less exact, at zeros of the cosine, it is asked.
const DOUBT: u64 = 1 << 18;

/// What the finished bits of an f64 are kept of.
trait Rounded: Copy + Default {
    /// Bytes of an element.
    type Bytes: AsRef<[u8]>;
    /// The element nearest to every number within [`DOUBT`] of the number with these bits; a flag is set if there is none.
    fn near(bits: u64) -> (Self, bool);
    /// The element that [`crate::tensor::encode`] makes.
    fn exact(value: f64) -> Self;
    fn bytes(self) -> Self::Bytes;
}

/// The upper `64 - dropped` bits, rounded to nearest, and whether that is in doubt: `dropped` bits near their half, from
/// which on `slack` more count as the half itself. Doubtful too where `8 - 11` bits of exponent do not suffice.
fn round(bits: u64, dropped: u32, slack: u64) -> (u64, bool) {
    let half = 1u64 << (dropped - 1);
    let low = bits & (2 * half - 1);
    // Normal numbers of 8 bits of exponent, with room for a carry.
    let exponent = (bits >> 52 & 0x7ff).wrapping_sub(1023 - 120);
    let doubt = (low.wrapping_sub(half - DOUBT) <= 2 * DOUBT + slack) | (exponent > 240);
    // The exponent's bias goes from 1023 to 127; the sign goes to its new place.
    let magnitude = (bits & !(1 << 63)).wrapping_sub(896 << 52).wrapping_add(half) >> dropped;
    (bits >> 63 << (60 - dropped) | magnitude, doubt)
}

impl Rounded for u16 {
    type Bytes = [u8; 2];
    fn near(bits: u64) -> (u16, bool) {
        // What the conversion of half drops first are 32 bits.
        let (rounded, doubt) = round(bits, 45, 1 << 32);
        (rounded as u16, doubt)
    }
    fn exact(value: f64) -> u16 {
        half::bf16::from_f64(value).to_bits()
    }
    fn bytes(self) -> [u8; 2] {
        self.to_le_bytes()
    }
}

impl Rounded for u32 {
    type Bytes = [u8; 4];
    fn near(bits: u64) -> (u32, bool) {
        let (rounded, doubt) = round(bits, 29, 0);
        (rounded as u32, doubt)
    }
    fn exact(value: f64) -> u32 {
        (value as f32).to_bits()
    }
    fn bytes(self) -> [u8; 4] {
        self.to_le_bytes()
    }
}

/// `-2 ln(x)` for x in 2^-53..=1, from `m 2^k` with m around 1 and the series of the area tangent.
fn minus_twice_ln(x: f64) -> f64 {
    const ROOT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    let above = x.to_bits().wrapping_sub(ROOT_HALF).wrapping_add(1024 << 52);
    let k = above >> 52;
    let m = f64::from_bits(x.to_bits().wrapping_sub(k.wrapping_sub(1024) << 52));
    // k as a number: the low bits of 2^52.
    let k = f64::from_bits(k | 1075 << 52) - ((1u64 << 52) as f64 + 1024.0);
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut sum = 1.0 / 17.0;
    for odd in [15.0, 13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0f64] {
        sum = sum * z + 1.0 / odd;
    }
    -2.0 * (k * std::f64::consts::LN_2 + 2.0 * s * sum)
}

/// `cos(2 pi t)` for t in 0..1 as the sine of `z = |t - 1/2| - 1/4` turns, which is exact; by its series to the 19th power.
fn cos_turn(z: f64) -> f64 {
    let w = std::f64::consts::TAU * z;
    let square = w * w;
    let mut sum = -1.0 / 121_645_100_408_832_000.0;
    for factorial in [
        355_687_428_096_000.0,
        -1_307_674_368_000.0,
        6_227_020_800.0,
        -39_916_800.0,
        362_880.0,
        -5040.0,
        120.0,
        -6.0,
        1.0f64,
    ] {
        sum = sum * square + 1.0 / factorial;
    }
    w * sum
}

fn fill_as<T: Rounded>(seed: u64, std: f64, first: u64, out: &mut [u8]) {
    let key = key_of(seed);
    let size = size_of::<T>();
    let mut index = first;
    for out in out.chunks_mut(BLOCK * size) {
        let (mut x, mut z) = ([0.5f64; BLOCK], [0.125f64; BLOCK]);
        for (i, (x, z)) in x.iter_mut().zip(&mut z).enumerate() {
            let index = index.wrapping_add(i as u64);
            *x = 1.0 - bits(key, index, 0) as i64 as f64 * UNIT;
            *z = (bits(key, index, 1) as i64 as f64 * UNIT - 0.5).abs() - 0.25;
        }
        let mut rounded = [(T::default(), false); BLOCK];
        for ((to, x), z) in rounded.iter_mut().zip(&x).zip(&z) {
            let value = std * (minus_twice_ln(*x).sqrt() * cos_turn(*z));
            let (near, doubt) = T::near(value.to_bits());
            *to = (near, doubt | (z.abs() < 1.0 / 4096.0));
        }
        for (i, (to, (near, doubt))) in out.chunks_exact_mut(size).zip(&rounded).enumerate() {
            let element = match doubt {
                true => T::exact(std * normal(seed, index.wrapping_add(i as u64))),
                false => *near,
            };
            to.copy_from_slice(element.bytes().as_ref());
        }
        index = index.wrapping_add(BLOCK as u64);
    }
}

/// Fills `out` with the elements from `first` on of `std * normal(seed, ..)`, rounded as [`crate::tensor::encode`] does;
/// false, and nothing done, for types that are not done many at a time.
pub(super) fn fill(dtype: DType, seed: u64, std: f64, first: u64, out: &mut [u8]) -> bool {
    match dtype {
        DType::BF16 if out.len().is_multiple_of(2) => fill_as::<u16>(seed, std, first, out),
        DType::F32 if out.len().is_multiple_of(4) => fill_as::<u32>(seed, std, first, out),
        _ => return false,
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::encode;

    /// Every element against its definition.
    fn check(dtype: DType, seed: u64, std: f64, first: u64, count: usize) {
        let size = dtype.size_bytes().unwrap();
        let mut out = vec![0xaa; count * size];
        assert!(fill(dtype, seed, std, first, &mut out));
        let values: Vec<f64> = (0..count as u64).map(|i| std * normal(seed, first.wrapping_add(i))).collect();
        let expected = encode(dtype, &values);
        if let Some(at) = out.iter().zip(&expected).position(|(a, b)| a != b) {
            let value = values[at / size];
            panic!("{dtype}, seed {seed}, std {std}, element {}: {value:e}", at / size);
        }
    }

    #[test]
    fn many_at_a_time_are_the_same_bits() {
        for dtype in [DType::BF16, DType::F32] {
            for (seed, std, count) in [
                (0, 0.02, 400_000),
                (7, 1.0, 100_000),
                (u64::MAX, -0.3, 50_001),
                (3, 1e-36, 5000),
                (4, 1e38, 5000),
                (5, 0.0, 70),
            ] {
                check(dtype, seed, std, 0, count);
            }
            check(dtype, 9, 0.5, u64::MAX - 40, 63);
            check(dtype, 9, 0.5, 12_345_678_901, 129);
            check(dtype, 9, 0.5, 1, 0);
        }
    }

    #[test]
    fn near_numbers_are_nearer_than_doubt() {
        let (key, mut worst, mut asked) = (key_of(11), 0, 0);
        for index in 0..300_000 {
            let x = 1.0 - bits(key, index, 0) as f64 * UNIT;
            let z = (bits(key, index, 1) as f64 * UNIT - 0.5).abs() - 0.25;
            let near = minus_twice_ln(x).sqrt() * cos_turn(z);
            if z.abs() < 1.0 / 4096.0 {
                asked += 1;
                continue;
            }
            worst = near.to_bits().abs_diff(normal(11, index).to_bits()).max(worst);
        }
        assert!(worst < DOUBT / 16, "{worst}");
        assert!(asked < 600, "{asked}");
    }

    #[test]
    fn other_types_are_left_to_others() {
        assert!(!fill(DType::F16, 1, 1.0, 0, &mut [0; 4]));
        assert!(!fill(DType::F32, 1, 1.0, 0, &mut [0; 6]));
    }
}
