//! Rotary position embedding (Su et al. 2021): `%2 = rope %0, %positions {base = 10000.0, layout = half}`.

use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_dim, need_float, need_index, need_rank};
use crate::attr::{Attr, AttrReader, Attrs, as_float};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RopeLayout {
    /// `(i, i + d/2)`, as in Hugging Face checkpoints.
    Half,
    /// `(2i, 2i + 1)`, as in the original paper.
    Interleaved,
}

/// How the frequencies are stretched for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    Default,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context length of the original training.
        original: f64,
    },
}

/// Rotates each pair of a head's first `rotary` elements by `position * frequency`; the rest is copied.
/// `x [t, heads, d]`, `positions i32[t]`, result as `x`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, `theta` in the literature.
    pub base: f64,
    /// Pairing.
    pub layout: RopeLayout,
    /// Frequency scaling.
    pub scaling: RopeScaling,
    /// Number of rotated elements, even; 0 means the whole head.
    pub rotary: usize,
}

impl Rope {
    /// Frequencies in radians per position for `d` rotated elements, `d / 2` of them, rounded to f32 as the
    /// reference implementations hold them.
    pub fn frequencies(&self, d: usize) -> Vec<f32> {
        (0..d / 2)
            .map(|i| {
                let frequency = self.base.powf(-((2 * i) as f64) / d as f64);
                self.scale(frequency) as f32
            })
            .collect()
    }

    fn scale(&self, frequency: f64) -> f64 {
        match self.scaling {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < original / high_freq_factor {
                    frequency
                } else if wavelength > original / low_freq_factor {
                    frequency / factor
                } else {
                    let smooth =
                        (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }

    /// Number of rotated elements of a head of `d`.
    pub fn rotated(&self, d: usize) -> usize {
        if self.rotary == 0 { d } else { self.rotary }
    }
}

impl OpDef for Rope {
    const NAMES: &'static [&'static str] = &["rope"];

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("base", self.base);
        attrs.set("layout", if self.layout == RopeLayout::Half { "half" } else { "interleaved" });
        match self.scaling {
            RopeScaling::Default => {}
            RopeScaling::Linear { factor } => {
                attrs.set("scaling", Attr::Call("linear".into(), vec![factor.into()]));
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let args = [factor, low_freq_factor, high_freq_factor, original];
                attrs.set("scaling", Attr::Call("llama3".into(), args.map(Attr::from).to_vec()));
            }
        }
        attrs.set_unless("rotary", self.rotary, 0);
        attrs
    }

    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        let layout = match attrs.word("layout")? {
            "half" => RopeLayout::Half,
            "interleaved" => RopeLayout::Interleaved,
            other => return Err(format!("layout must be half or interleaved, not `{other}`")),
        };
        let scaling = match attrs.take("scaling") {
            None => RopeScaling::Default,
            Some(Attr::Call(name, args)) => {
                let args = args.iter().map(|a| as_float("scaling", a)).collect::<Result<Vec<_>, _>>()?;
                match (name.as_str(), args.as_slice()) {
                    ("linear", [factor]) => RopeScaling::Linear { factor: *factor },
                    ("llama3", [factor, low, high, original]) => RopeScaling::Llama3 {
                        factor: *factor,
                        low_freq_factor: *low,
                        high_freq_factor: *high,
                        original: *original,
                    },
                    _ => {
                        return Err(
                            "scaling must be linear(factor) or llama3(factor, low, high, original)".into()
                        );
                    }
                }
            }
            Some(other) => return Err(format!("scaling must be a call, not `{other}`")),
        };
        Ok(Rope { base: attrs.float("base")?, layout, scaling, rotary: attrs.usize_or("rotary", 0)? })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x, positions] = ctx.exactly()?;
        need_float("operand 0", x)?;
        need_rank("operand 0", x, 3)?;
        need_index("positions", positions)?;
        need_rank("positions", positions, 1)?;
        need_dim("the number of positions", &positions.shape[0], &x.shape[0])?;
        let d = x.shape[2]
            .as_const()
            .and_then(|d| usize::try_from(d).ok())
            .ok_or("the head size must be constant")?;
        let rotated = self.rotated(d);
        if rotated > d || !rotated.is_multiple_of(2) {
            return Err(format!("rotates {rotated} elements, which must be even and at most {d}"));
        }
        if self.base.is_nan() || self.base <= 0.0 {
            return Err(format!("base must be positive, not {}", self.base));
        }
        Ok(vec![x.clone()])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.operand(0)?.clone();
        let positions = ctx.operand(1)?;
        let (heads, d) = (out.shape[1], out.shape[2]);
        let half = self.rotated(d) / 2;
        let frequencies = self.frequencies(2 * half);
        if heads * d == 0 {
            return Ok(vec![out]);
        }
        for (token, position) in out.data.chunks_mut(heads * d).zip(&positions.data) {
            for head in token.chunks_mut(d) {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (a, b) = match self.layout {
                        RopeLayout::Half => (i, i + half),
                        RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                    };
                    let (sin, cos) = (position * f64::from(*frequency)).sin_cos();
                    (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
                }
            }
        }
        Ok(vec![out])
    }

    fn traits(&self) -> OpTraits {
        OpTraits { in_place: Some(0), ..OpTraits::plain(Numerics::Accumulated) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_short_and_divides_long_wavelengths() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original: 8192.0,
        };
        let plain =
            Rope { base: 500000.0, layout: RopeLayout::Half, scaling: RopeScaling::Default, rotary: 0 };
        let scaled = Rope { scaling, ..plain.clone() };
        let (a, b) = (plain.frequencies(128), scaled.frequencies(128));
        assert_eq!(a[0], b[0]);
        assert!((b[63] - a[63] / 8.0).abs() < 1e-12);
        assert!(b.iter().zip(&a).all(|(s, p)| s <= p && *s >= p / 8.001));
    }

    #[test]
    fn rotation_preserves_pair_norms_and_turns_by_the_angle() {
        for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
            let rope = Rope { base: 100.0, layout, scaling: RopeScaling::Linear { factor: 2.0 }, rotary: 4 };
            let x = Tensor::from_values(crate::DType::F32, &[1, 1, 6], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
                .unwrap();
            let positions = Tensor::from_values(crate::DType::I32, &[1], vec![3.0]).unwrap();
            let operands = [&x, &positions];
            let ty = [TensorType::new(crate::DType::F32, [1usize, 1, 6])];
            let ctx = EvalCtx { operands: &operands, results: &ty, bindings: &crate::Bindings::new() };
            let y = rope.eval(&ctx).unwrap().remove(0).data;
            let pairs = if layout == RopeLayout::Half { [(0, 2), (1, 3)] } else { [(0, 1), (2, 3)] };
            for (i, (a, b)) in pairs.into_iter().enumerate() {
                let before = (x.data[b]).atan2(x.data[a]);
                let after = y[b].atan2(y[a]);
                let angle = 3.0 * 100f64.powf(-(i as f64) / 2.0) / 2.0;
                let turned = (after - before).rem_euclid(std::f64::consts::TAU);
                assert!((turned - angle).abs() < 1e-6, "{layout:?} pair {i}: {turned} {angle}");
                assert!((y[a].hypot(y[b]) - x.data[a].hypot(x.data[b])).abs() < 1e-9);
            }
            assert_eq!(&y[4..], &[5.0, 6.0]);
        }
    }
}
