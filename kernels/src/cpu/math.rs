//! Transcendental functions as branch-free polynomials that vectorise. Relative errors are a few f32 ulps unless
//! noted.

// Constants are written as they round to f32.
#![allow(clippy::excessive_precision)]

use super::simd::dispatch;

/// `e^x`: Cody-Waite reduction by ln 2 and a degree-6 polynomial; 0 below -87.3, infinite above 88.7.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let clamped = x.clamp(-87.3, 88.7);
    // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let shifted = clamped * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let integer = (shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
    let r = n.mul_add_fast(-0.693_145_75, clamped);
    let r = n.mul_add_fast(-1.428_606_8e-6, r);
    let mut p = 1.388_888_9e-3f32;
    p = p * r + 8.333_333_4e-3;
    p = p * r + 4.166_666_7e-2;
    p = p * r + 1.666_666_7e-1;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    // Two factors keep the scale finite at both ends.
    let half = integer >> 1;
    let scale = |e: i32| f32::from_bits((e.wrapping_add(127) << 23) as u32);
    let value = p * scale(half) * scale(integer.wrapping_sub(half));
    let value = if x < -87.3 { 0.0 } else { value };
    if x > 88.7 {
        f32::INFINITY
    } else if x.is_nan() {
        x
    } else {
        value
    }
}

trait MulAddFast {
    fn mul_add_fast(self, a: f32, b: f32) -> f32;
}

impl MulAddFast for f32 {
    /// Product and sum with two roundings; exact enough because the first constant has trailing zeros.
    #[inline(always)]
    fn mul_add_fast(self, a: f32, b: f32) -> f32 {
        self * a + b
    }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent: an odd polynomial below 0.3, the exponential above.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs().min(20.0);
    let large = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    let s = a * a;
    let small = a + a * s * (-0.333_333_34 + s * (0.133_333_34 + s * (-0.053_968_254 + s * 0.021_869_488)));
    let value = if a < 0.3 { small } else { large };
    if x.is_nan() { x } else { value.copysign(x) }
}

/// Of `a >= 0`: the error function by its Maclaurin series, good below 0.6, and its complement by Abramowitz and Stegun
/// 7.1.26, good above (absolute error 1.5e-7).
#[inline(always)]
fn erf_parts(a: f32) -> (f32, f32) {
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let p =
        t * (0.254_829_6 + t * (-0.284_496_72 + t * (1.421_413_8 + t * (-1.453_152_1 + t * 1.061_405_4))));
    let s = a * a;
    let small = std::f32::consts::FRAC_2_SQRT_PI
        * a
        * (1.0
            + s * (-0.333_333_34
                + s * (0.1 + s * (-0.023_809_524 + s * (0.004_629_63 - s * 0.000_757_575_76)))));
    (small, p * exp(-a * a))
}

/// Error function, with an absolute error of 1.5e-7.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    let a = x.abs();
    let (small, rest) = erf_parts(a);
    let value = if a < 0.6 { small } else { 1.0 - rest };
    if x.is_nan() { x } else { value.copysign(x) }
}

/// Exact gelu, `x/2 (1 + erf(x / sqrt 2))`. Far below 0, where the sum cancels, it is the complement.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    let z = x * std::f32::consts::FRAC_1_SQRT_2;
    let (small, rest) = erf_parts(z.abs());
    let near = 1.0 + small.copysign(z);
    let far = if z < 0.0 { rest } else { 2.0 - rest };
    let factor = if z.abs() < 0.6 { near } else { far };
    0.5 * x * factor
}

/// The tanh form of gelu.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    0.5 * x * (1.0 + tanh(0.797_884_6 * (x + 0.044715 * x * x * x)))
}

/// A function a matmul or a gate applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`
    Silu,
    /// Exact gelu.
    Gelu,
    /// tanh form of gelu.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// Hyperbolic tangent.
    Tanh,
    /// `1 / (1 + e^-x)`
    Sigmoid,
}

impl Activation {
    /// All activations.
    pub const ALL: [Activation; 6] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Tanh,
        Activation::Sigmoid,
    ];
}

dispatch! {
    /// Applies `f` to every element.
    pub fn activate(f: Activation, x: &mut [f32]) {
        // Loops rather than closures, which would not be compiled for the instruction set.
        macro_rules! each {
            ($v:ident => $e:expr) => {
                for slot in x.iter_mut() {
                    let $v = *slot;
                    *slot = $e;
                }
            };
        }
        match f {
            Activation::Silu => each!(v => v * sigmoid(v)),
            Activation::Gelu => each!(v => gelu(v)),
            Activation::GeluTanh => each!(v => gelu_tanh(v)),
            Activation::Relu => each!(v => v.max(0.0)),
            Activation::Tanh => each!(v => tanh(v)),
            Activation::Sigmoid => each!(v => sigmoid(v)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use millrace_ir::ops::unary::UnaryFn;

    #[test]
    fn functions_meet_the_reference() {
        type Case = (fn(f32) -> f32, UnaryFn, f64);
        let cases: [Case; 6] = [
            (exp, UnaryFn::Exp, 5e-7),
            (sigmoid, UnaryFn::Sigmoid, 5e-7),
            (tanh, UnaryFn::Tanh, 5e-7),
            (erf, UnaryFn::Erf, 6e-7),
            (gelu, UnaryFn::Gelu, 1e-6),
            (gelu_tanh, UnaryFn::GeluTanh, 1e-6),
        ];
        for (f, reference, tolerance) in cases {
            for i in -4000..4000 {
                let x = i as f32 * 0.005;
                let (found, expected) = (f64::from(f(x)), reference.apply(f64::from(x)));
                let scale = if reference == UnaryFn::Exp { expected } else { 1.0 + expected.abs() };
                assert!(
                    (found - expected).abs() <= tolerance * scale,
                    "{reference:?}({x}) = {found}, {expected}"
                );
            }
        }
        assert_eq!((exp(-200.0), exp(200.0)), (0.0, f32::INFINITY));
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
    }

    /// Far below 0 the error shrinks with the function.
    #[test]
    fn the_tail_of_gelu_does_not_cancel() {
        for i in 0..2000 {
            let x = -4.5 - i as f32 * 0.01;
            let (found, expected) = (f64::from(gelu(x)), UnaryFn::Gelu.apply(f64::from(x)));
            assert!((found - expected).abs() <= 2e-8, "gelu({x}) = {found}, {expected}");
        }
        assert!(gelu(f32::NAN).is_nan());
    }

    #[test]
    fn lanes_do_not_matter() {
        for isa in Isa::available() {
            for f in Activation::ALL {
                let mut all: Vec<f32> = (0..67).map(|i| i as f32 * 0.17 - 5.0).collect();
                let singles: Vec<f32> = all
                    .iter()
                    .map(|v| {
                        let mut one = [*v];
                        activate(isa, f, &mut one);
                        one[0]
                    })
                    .collect();
                activate(isa, f, &mut all);
                assert_eq!(all, singles, "{f:?} {isa:?}");
            }
        }
    }
}
