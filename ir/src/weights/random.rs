//! Reproducible random weights: element `i` of seed `s` is a pure function of both, so any range can be read.

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A standard normal number by the Box-Muller transform of two uniform numbers keyed by `seed` and `index`.
pub fn normal(seed: u64, index: u64) -> f64 {
    let key = mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15));
    let bits = |salt: u64| mix(key ^ mix(index.wrapping_mul(2).wrapping_add(salt)));
    let unit = |bits: u64| (bits >> 11) as f64 / (1u64 << 53) as f64;
    let radius = (-2.0 * (1.0 - unit(bits(0))).ln()).sqrt();
    radius * (std::f64::consts::TAU * unit(bits(1))).cos()
}
