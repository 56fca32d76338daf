//! Elementwise functions of one float tensor: `%1 = exp %0`.

use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_float};
use crate::attr::{AttrReader, Attrs};
use crate::tensor::Tensor;
use crate::types::TensorType;

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum UnaryFn {
    /// `-x`
    Neg,
    /// `|x|`
    Abs,
    /// `e^x`
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// `1 / sqrt(x)`
    Rsqrt,
    /// `1 / x`
    Recip,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `x * sigmoid(x)`
    Silu,
    /// Hyperbolic tangent.
    Tanh,
    /// `x/2 (1 + erf(x / sqrt 2))` (Hendrycks and Gimpel 2016).
    Gelu,
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, the approximation of the same paper.
    GeluTanh,
    /// `max(x, 0)`
    Relu,
    /// Error function.
    Erf,
    /// Sine.
    Sin,
    /// Cosine.
    Cos,
    /// Largest integer not above.
    Floor,
    /// Smallest integer not below.
    Ceil,
}

impl UnaryFn {
    /// All functions, in the order of [`Unary::NAMES`].
    pub const ALL: [UnaryFn; 18] = [
        UnaryFn::Neg,
        UnaryFn::Abs,
        UnaryFn::Exp,
        UnaryFn::Log,
        UnaryFn::Sqrt,
        UnaryFn::Rsqrt,
        UnaryFn::Recip,
        UnaryFn::Sigmoid,
        UnaryFn::Silu,
        UnaryFn::Tanh,
        UnaryFn::Gelu,
        UnaryFn::GeluTanh,
        UnaryFn::Relu,
        UnaryFn::Erf,
        UnaryFn::Sin,
        UnaryFn::Cos,
        UnaryFn::Floor,
        UnaryFn::Ceil,
    ];

    /// The function spelled `name`.
    pub fn parse(name: &str) -> Option<Self> {
        let index = Unary::NAMES.iter().position(|n| *n == name)?;
        Some(Self::ALL[index])
    }

    /// Its spelling.
    pub fn name(self) -> &'static str {
        Unary::NAMES[self as usize]
    }

    /// The value at `x`.
    pub fn apply(self, x: f64) -> f64 {
        match self {
            UnaryFn::Neg => -x,
            UnaryFn::Abs => x.abs(),
            UnaryFn::Exp => x.exp(),
            UnaryFn::Log => x.ln(),
            UnaryFn::Sqrt => x.sqrt(),
            UnaryFn::Rsqrt => 1.0 / x.sqrt(),
            UnaryFn::Recip => 1.0 / x,
            UnaryFn::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            UnaryFn::Silu => x / (1.0 + (-x).exp()),
            UnaryFn::Tanh => x.tanh(),
            UnaryFn::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
            UnaryFn::GeluTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
            UnaryFn::Relu => x.max(0.0),
            UnaryFn::Erf => erf(x),
            UnaryFn::Sin => x.sin(),
            UnaryFn::Cos => x.cos(),
            UnaryFn::Floor => x.floor(),
            UnaryFn::Ceil => x.ceil(),
        }
    }
}

/// Error function to about 1e-16: Maclaurin series below 2.5, continued fraction of erfc above
/// (Abramowitz and Stegun 7.1.5 and 7.1.14).
pub fn erf(x: f64) -> f64 {
    let magnitude = x.abs();
    if magnitude.is_nan() {
        return f64::NAN;
    }
    let value = if magnitude < 2.5 {
        let (mut term, mut sum, mut n) = (magnitude, magnitude, 0.0);
        while term.abs() > 1e-18 * sum.abs() {
            n += 1.0;
            term *= -magnitude * magnitude / n;
            sum += term / (2.0 * n + 1.0);
        }
        2.0 / std::f64::consts::PI.sqrt() * sum
    } else {
        let mut fraction = magnitude;
        for k in (1..=60).rev() {
            fraction = magnitude + f64::from(k) / 2.0 / fraction;
        }
        1.0 - (-magnitude * magnitude).exp() / (std::f64::consts::PI.sqrt() * fraction)
    };
    value.copysign(x)
}

/// Elementwise function of one float tensor of any shape; the result has the operand's type.
#[derive(Clone, Debug, PartialEq)]
pub struct Unary {
    /// Which function.
    pub function: UnaryFn,
}

impl OpDef for Unary {
    const NAMES: &'static [&'static str] = &[
        "neg",
        "abs",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "recip",
        "sigmoid",
        "silu",
        "tanh",
        "gelu",
        "gelu_tanh",
        "relu",
        "erf",
        "sin",
        "cos",
        "floor",
        "ceil",
    ];

    fn name(&self) -> &'static str {
        self.function.name()
    }

    fn attrs(&self) -> Attrs {
        Attrs::default()
    }

    fn from_attrs(name: &str, _: &mut AttrReader<'_>) -> Result<Self, String> {
        let function = UnaryFn::parse(name).ok_or_else(|| format!("`{name}` is no unary function"))?;
        Ok(Unary { function })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        need_float("the operand", x)?;
        Ok(vec![x.clone()])
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut out = ctx.operand(0)?.clone();
        out.data.iter_mut().for_each(|v| *v = self.function.apply(*v));
        Ok(vec![out])
    }

    fn traits(&self) -> OpTraits {
        let numerics = match self.function {
            UnaryFn::Neg | UnaryFn::Abs | UnaryFn::Relu | UnaryFn::Floor | UnaryFn::Ceil => Numerics::Exact,
            UnaryFn::Sqrt | UnaryFn::Recip => Numerics::Rounded,
            _ => Numerics::Accumulated,
        };
        OpTraits { elementwise: true, in_place: Some(0), ..OpTraits::plain(numerics) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_meets_published_values() {
        // Abramowitz and Stegun, table 7.1.
        for (x, expected) in
            [(0.0, 0.0), (0.5, 0.5204998778), (1.0, 0.8427007929), (2.0, 0.9953222650), (3.0, 0.9999779095)]
        {
            assert!((erf(x) - expected).abs() < 1e-10, "erf({x})");
            assert!((erf(-x) + expected).abs() < 1e-10);
        }
    }

    #[test]
    fn names_and_functions_agree() {
        for function in UnaryFn::ALL {
            assert_eq!(UnaryFn::parse(function.name()), Some(function));
        }
    }

    #[test]
    fn functions_satisfy_identities() {
        for x in [-3.0f64, -0.7, 0.2, 1.9] {
            let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12 * (1.0 + b.abs()), "{a} {b}");
            close(UnaryFn::Sigmoid.apply(x), 0.5 * (1.0 + (x / 2.0).tanh()));
            close(UnaryFn::Silu.apply(x), x * UnaryFn::Sigmoid.apply(x));
            close(UnaryFn::Gelu.apply(x) - UnaryFn::Gelu.apply(-x), x);
            close(UnaryFn::GeluTanh.apply(x) - UnaryFn::GeluTanh.apply(-x), x);
            close(UnaryFn::Sin.apply(x).powi(2) + UnaryFn::Cos.apply(x).powi(2), 1.0);
            close(UnaryFn::Rsqrt.apply(x.abs()) * UnaryFn::Sqrt.apply(x.abs()), 1.0);
            close(UnaryFn::Exp.apply(UnaryFn::Log.apply(x.abs())), x.abs());
        }
    }
}
