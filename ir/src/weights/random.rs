//! Reproducible random weights: element `i` of seed `s` is a pure function of both, so any range can be read.
//!
//! [`normal`] defines the numbers. [`fill`] gives the same bits many at a time: it computes each number to a known
//! error, and asks [`normal`] where a number so near could round to either side.

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

/// The arguments of a block: 1 less the first uniform number, and the second as [`cos_turn`] takes it.
struct Arguments {
    x: [f64; BLOCK],
    z: [f64; BLOCK],
}

/// An element, and the arithmetic that comes near it.
trait Rounded: Copy + Default {
    /// Elements, and which of them are in doubt.
    fn near(arguments: &Arguments, std: f64) -> ([Self; BLOCK], [bool; BLOCK]);
    /// The element that [`crate::tensor::encode`] makes.
    fn exact(value: f64) -> Self;
    /// The bytes of elements.
    fn store(elements: &[Self], out: &mut [u8]);
}

/// Units in the last place by which numbers that are computed may differ from [`normal`]. In f64 series end below 2^-41 and
/// factors round below 2^-50; in f32 all errors together stay below 2^-20. Where [`normal`] itself is less exact, at zeros
/// of the cosine, it is asked.
const DOUBT: u64 = 1 << 18;
const DOUBT_F32: u32 = 64;

impl Rounded for u16 {
    fn near(Arguments { x, z }: &Arguments, std: f64) -> ([u16; BLOCK], [bool; BLOCK]) {
        const HALF: u32 = 1 << 15;
        let std = std as f32;
        let (mut out, mut doubt) = ([0; BLOCK], [false; BLOCK]);
        // One kind of arithmetic a loop, so that the loops run on several numbers at once.
        let parts = x.map(split_f32);
        let radii = parts.map(|(m, k)| minus_twice_ln_f32(m, k).sqrt());
        let turns = z.map(cos_turn_f32);
        let values: [f32; BLOCK] = std::array::from_fn(|i| std * (radii[i] * turns[i]));
        for ((out, doubt), value) in out.iter_mut().zip(&mut doubt).zip(values) {
            let bits = value.to_bits();
            // The conversion of half ignores what lies below 2^-20 of a number, which is below the doubt too.
            let near_half = (bits & 0xffff).wrapping_sub(HALF - DOUBT_F32) <= 2 * DOUBT_F32;
            let exponent = (bits >> 23 & 0xff).wrapping_sub(8) > 240;
            *out = (bits.wrapping_add(HALF) >> 16) as u16;
            *doubt = near_half | exponent;
        }
        (out, doubt)
    }
    fn exact(value: f64) -> u16 {
        half::bf16::from_f64(value).to_bits()
    }
    fn store(elements: &[Self], out: &mut [u8]) {
        let bytes = out.as_chunks_mut().0.iter_mut();
        bytes.zip(elements).for_each(|(to, element)| *to = element.to_le_bytes());
    }
}

impl Rounded for u32 {
    fn near(Arguments { x, z }: &Arguments, std: f64) -> ([u32; BLOCK], [bool; BLOCK]) {
        const HALF: u64 = 1 << 28;
        let (mut out, mut doubt) = ([0; BLOCK], [false; BLOCK]);
        for (((out, doubt), x), z) in out.iter_mut().zip(&mut doubt).zip(x).zip(z) {
            let value = std * (minus_twice_ln(*x).sqrt() * cos_turn(*z));
            let bits = value.to_bits();
            let near_half = (bits & (2 * HALF - 1)).wrapping_sub(HALF - DOUBT) <= 2 * DOUBT;
            let exponent = (bits >> 52 & 0x7ff).wrapping_sub(1023 - 120) > 240;
            *out = (value as f32).to_bits();
            *doubt = near_half | exponent;
        }
        (out, doubt)
    }
    fn exact(value: f64) -> u32 {
        (value as f32).to_bits()
    }
    fn store(elements: &[Self], out: &mut [u8]) {
        let bytes = out.as_chunks_mut().0.iter_mut();
        bytes.zip(elements).for_each(|(to, element)| *to = element.to_le_bytes());
    }
}

/// `m - 1` and `k` for `x = m 2^k` with m around 1; x in 2^-53..=1.
fn split(x: f64) -> (f64, f64) {
    const ROOT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    let k = x.to_bits().wrapping_sub(ROOT_HALF).wrapping_add(1024 << 52) >> 52;
    let m = f64::from_bits(x.to_bits().wrapping_sub(k.wrapping_sub(1024) << 52));
    // k as a number: the low bits of 2^52.
    (m - 1.0, f64::from_bits(k | 1075 << 52) - ((1u64 << 52) as f64 + 1024.0))
}

/// [`split`] in f32.
fn split_f32(x: f64) -> (f32, f32) {
    let (m, k) = split(x);
    (m as f32, k as f32)
}

/// [`minus_twice_ln`] in f32, of what [`split`] gives.
fn minus_twice_ln_f32(m: f32, k: f32) -> f32 {
    let s = m / (m + 2.0);
    let z = s * s;
    let mut sum = 1.0 / 9.0;
    for odd in [7.0, 5.0, 3.0, 1.0f32] {
        sum = sum * z + 1.0 / odd;
    }
    -2.0 * (k * std::f32::consts::LN_2 + 2.0 * s * sum)
}

/// [`cos_turn`] in f32.
fn cos_turn_f32(z: f64) -> f32 {
    let w = (std::f64::consts::TAU * z) as f32;
    let square = w * w;
    let mut sum = 1.0 / 6_227_020_800.0;
    for factorial in [-39_916_800.0, 362_880.0, -5040.0, 120.0, -6.0, 1.0f32] {
        sum = sum * square + 1.0 / factorial;
    }
    w * sum
}

/// `-2 ln(x)` for x in 2^-53..=1, from `m 2^k` with m around 1 and the series of the area tangent.
fn minus_twice_ln(x: f64) -> f64 {
    let (m, k) = split(x);
    let s = m / (m + 2.0);
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
        let mut arguments = Arguments { x: [0.5; BLOCK], z: [0.125; BLOCK] };
        for (i, (x, z)) in arguments.x.iter_mut().zip(&mut arguments.z).enumerate() {
            let index = index.wrapping_add(i as u64);
            *x = 1.0 - bits(key, index, 0) as i64 as f64 * UNIT;
            *z = (bits(key, index, 1) as i64 as f64 * UNIT - 0.5).abs() - 0.25;
        }
        let (mut elements, mut doubt) = T::near(&arguments, std);
        doubt.iter_mut().zip(&arguments.z).for_each(|(doubt, z)| *doubt |= z.abs() < 1.0 / 4096.0);
        if doubt.iter().fold(false, |any, doubt| any | doubt) {
            for i in (0..BLOCK).filter(|i| doubt[*i]) {
                elements[i] = T::exact(std * normal(seed, index.wrapping_add(i as u64)));
            }
        }
        T::store(&elements, out);
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

    fn f32_radius(x: f64) -> f32 {
        let (m, k) = split_f32(x);
        minus_twice_ln_f32(m, k).sqrt()
    }

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
        let (key, mut worst, mut worst_f32, mut asked) = (key_of(11), 0, 0, 0);
        for index in 0..300_000 {
            let x = 1.0 - bits(key, index, 0) as f64 * UNIT;
            let z = (bits(key, index, 1) as f64 * UNIT - 0.5).abs() - 0.25;
            if z.abs() < 1.0 / 4096.0 {
                asked += 1;
                continue;
            }
            let exact = normal(11, index);
            let near = minus_twice_ln(x).sqrt() * cos_turn(z);
            let near_f32 = f32_radius(x) * cos_turn_f32(z);
            worst = near.to_bits().abs_diff(exact.to_bits()).max(worst);
            worst_f32 = near_f32.to_bits().abs_diff((exact as f32).to_bits()).max(worst_f32);
        }
        assert!(worst < DOUBT / 16, "{worst}");
        assert!(worst_f32 < DOUBT_F32 / 4, "{worst_f32}");
        assert!(asked < 600, "{asked}");
    }

    #[test]
    fn other_types_are_left_to_others() {
        assert!(!fill(DType::F16, 1, 1.0, 0, &mut [0; 4]));
        assert!(!fill(DType::F32, 1, 1.0, 0, &mut [0; 6]));
    }
}
