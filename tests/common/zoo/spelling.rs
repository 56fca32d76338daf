//! Layers of models in two spellings.

use std::fmt;

use millrace::ir::ops::binary::BinaryFn;
use millrace::ir::ops::reduce::ReduceFn;
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{
    Binary, Cast, Concat, LayerNorm, Matmul, Reduce, Reshape, RmsNorm, Slice, Transpose, Unary,
};
use millrace::ir::{Builder, DType, Dim, Op, Operand, TensorType, WeightExpr};

/// Which ops a model is written with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spelling {
    /// Elementwise ops, movement, reductions, gather and matmul.
    Primitive,
    /// Every op of the table that an importer may use.
    Twin,
}

impl fmt::Display for Spelling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Spelling::Primitive { "primitive" } else { "twin" })
    }
}

/// Primitive layers come in two dialects, as exporters write them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// `d * d`, `rsqrt` and products; constants on the right.
    Products,
    /// `pow(d, 2)`, `sqrt` and quotients; constants on the left where the op commutes.
    Quotients,
}

/// A model under construction. Layers appear in `loc`; all names of weights are those of the twin, and a constant
/// that only one spelling needs is called `const.*`.
pub struct Net {
    /// The module.
    pub builder: Builder,
    /// Which ops are used.
    pub spelling: Spelling,
    /// Element type of activations and weights.
    pub dtype: DType,
    /// How primitive layers are spelled.
    pub dialect: Dialect,
    loc: String,
    seed: u64,
}

impl Net {
    /// An empty model.
    pub fn new(name: &str, spelling: Spelling, dtype: DType) -> Self {
        Net {
            builder: Builder::new(name),
            spelling,
            dtype,
            dialect: Dialect::Products,
            loc: String::new(),
            seed: 0,
        }
    }

    /// Whether the model is written with primitives.
    pub fn primitive(&self) -> bool {
        self.spelling == Spelling::Primitive
    }

    /// Names the layer that the next nodes belong to.
    pub fn at(&mut self, loc: impl Into<String>) {
        self.loc = loc.into();
    }

    /// Adds a node with one result.
    pub fn op(&mut self, op: impl Into<Op>, operands: &[Operand]) -> Operand {
        let loc = self.loc.clone();
        self.builder.one(op, operands, &loc).unwrap()
    }

    /// A weight of the model: seeded random numbers, near 1 for vectors that multiply.
    pub fn weight(&mut self, name: &str, shape: &[u64], std: f64) -> Operand {
        self.seed += 1;
        let ty = TensorType::new(self.dtype, shape.iter().copied());
        self.builder.weight(name, ty, WeightExpr::Random { seed: self.seed, std })
    }

    /// A literal tensor.
    pub fn dense(&mut self, name: &str, dtype: DType, shape: &[u64], values: Vec<f64>) -> Operand {
        self.builder.weight(name, TensorType::new(dtype, shape.iter().copied()), WeightExpr::Dense(values))
    }

    /// A scalar of f32, the type that primitive layers compute in.
    pub fn scalar(&mut self, name: &str, value: f64) -> Operand {
        let ty = TensorType { dtype: DType::F32, shape: Vec::new().into() };
        self.builder.weight(&format!("const.{name}"), ty, WeightExpr::Splat(f64::from(value as f32)))
    }

    /// An elementwise function of one operand.
    pub fn unary(&mut self, function: UnaryFn, x: Operand) -> Operand {
        self.op(Unary { function }, &[x])
    }

    /// An elementwise function of two operands.
    pub fn binary(&mut self, function: BinaryFn, a: Operand, b: Operand) -> Operand {
        self.op(Binary { function }, &[a, b])
    }

    /// A commutative function of a tensor and a constant, in the dialect's order.
    fn with_constant(&mut self, function: BinaryFn, x: Operand, constant: Operand) -> Operand {
        match self.dialect {
            Dialect::Products => self.binary(function, x, constant),
            Dialect::Quotients => self.binary(function, constant, x),
        }
    }

    /// A reduction over one axis that stays as 1.
    pub fn reduce(&mut self, function: ReduceFn, x: Operand, axis: usize) -> Operand {
        self.op(Reduce { function, axes: vec![axis], keep: true }, &[x])
    }

    /// The same elements in another shape.
    pub fn reshape<const N: usize>(&mut self, x: Operand, shape: [Dim; N]) -> Operand {
        self.op(Reshape { shape: shape.to_vec().into() }, &[x])
    }

    /// Axes permuted.
    pub fn transpose<const N: usize>(&mut self, x: Operand, perm: [usize; N]) -> Operand {
        self.op(Transpose { perm: perm.to_vec() }, &[x])
    }

    /// Part of an axis.
    pub fn slice(&mut self, x: Operand, axis: usize, start: impl Into<Dim>, end: impl Into<Dim>) -> Operand {
        self.op(Slice { axis, start: start.into(), end: end.into(), step: 1 }, &[x])
    }

    /// Two tensors joined.
    pub fn concat(&mut self, a: Operand, b: Operand, axis: usize) -> Operand {
        self.op(Concat { axis }, &[a, b])
    }

    /// `x` in f32, where primitive layers compute.
    pub fn wide(&mut self, x: Operand) -> Operand {
        if self.dtype == DType::F32 { x } else { self.op(Cast { to: DType::F32 }, &[x]) }
    }

    /// `x` in the model's element type.
    pub fn narrow(&mut self, x: Operand) -> Operand {
        if self.dtype == DType::F32 { x } else { self.op(Cast { to: self.dtype }, &[x]) }
    }

    fn last_axis(&self, x: Operand) -> usize {
        self.builder.type_of(x).shape.len() - 1
    }

    /// `x @name.weight^T [+ @name.bias]`. Primitive quotients transpose the weight in the graph.
    pub fn linear(&mut self, x: Operand, name: &str, rows: u64, columns: u64, bias: bool) -> Operand {
        self.at(name);
        let weight = self.weight(&format!("{name}.weight"), &[rows, columns], 0.15);
        let y = if self.primitive() && self.dialect == Dialect::Quotients {
            let turned = self.transpose(weight, [1, 0]);
            self.op(Matmul { transpose_b: false, out: None }, &[x, turned])
        } else {
            self.op(Matmul { transpose_b: true, out: None }, &[x, weight])
        };
        if !bias {
            return y;
        }
        let bias = self.weight(&format!("{name}.bias"), &[rows], 0.1);
        self.binary(BinaryFn::Add, y, bias)
    }

    /// `(x - mean) / sqrt(variance + eps) * w + b`.
    pub fn layer_norm(&mut self, x: Operand, name: &str, width: u64, eps: f64) -> Operand {
        self.at(name);
        let w = self.weight(&format!("{name}.weight"), &[width], 0.5);
        let b = self.weight(&format!("{name}.bias"), &[width], 0.1);
        if !self.primitive() {
            return self.op(LayerNorm { eps }, &[x, w, b]);
        }
        let (axis, eps) = (self.last_axis(x), self.scalar("eps", eps));
        let mean = self.reduce(ReduceFn::Mean, x, axis);
        let centred = self.binary(BinaryFn::Sub, x, mean);
        let square = match self.dialect {
            Dialect::Products => self.binary(BinaryFn::Mul, centred, centred),
            Dialect::Quotients => {
                let two = self.scalar("two", 2.0);
                self.binary(BinaryFn::Pow, centred, two)
            }
        };
        let variance = self.reduce(ReduceFn::Mean, square, axis);
        let padded = self.with_constant(BinaryFn::Add, variance, eps);
        let normal = match self.dialect {
            Dialect::Products => {
                let factor = self.unary(UnaryFn::Rsqrt, padded);
                self.binary(BinaryFn::Mul, centred, factor)
            }
            Dialect::Quotients => {
                let deviation = self.unary(UnaryFn::Sqrt, padded);
                self.binary(BinaryFn::Div, centred, deviation)
            }
        };
        let scaled = self.binary(BinaryFn::Mul, normal, w);
        self.binary(BinaryFn::Add, scaled, b)
    }

    /// `x / sqrt(mean(x^2) + eps) * w`, in f32 with one rounding at the end.
    pub fn rms_norm(&mut self, x: Operand, name: &str, width: u64, eps: f64) -> Operand {
        self.at(name);
        let w = self.weight(&format!("{name}.weight"), &[width], 0.5);
        if !self.primitive() {
            return self.op(RmsNorm { eps }, &[x, w]);
        }
        let (x, w, eps) = (self.wide(x), self.wide(w), self.scalar("eps", eps));
        let axis = self.last_axis(x);
        let square = match self.dialect {
            Dialect::Products => self.binary(BinaryFn::Mul, x, x),
            Dialect::Quotients => {
                let two = self.scalar("two", 2.0);
                self.binary(BinaryFn::Pow, x, two)
            }
        };
        let mean = self.reduce(ReduceFn::Mean, square, axis);
        let padded = self.with_constant(BinaryFn::Add, mean, eps);
        let factor = self.unary(UnaryFn::Rsqrt, padded);
        let normal = self.binary(BinaryFn::Mul, x, factor);
        let y = self.with_constant(BinaryFn::Mul, normal, w);
        self.narrow(y)
    }

    /// `x/2 (1 + erf(x / sqrt 2))`.
    pub fn gelu(&mut self, x: Operand) -> Operand {
        if !self.primitive() {
            return self.unary(UnaryFn::Gelu, x);
        }
        let (half, one) = (self.scalar("half", 0.5), self.scalar("one", 1.0));
        let root = self.scalar("sqrt_two", std::f64::consts::SQRT_2);
        let inner = self.binary(BinaryFn::Div, x, root);
        let erf = self.unary(UnaryFn::Erf, inner);
        let gate = self.with_constant(BinaryFn::Add, erf, one);
        match self.dialect {
            Dialect::Products => {
                let halved = self.binary(BinaryFn::Mul, x, half);
                self.binary(BinaryFn::Mul, halved, gate)
            }
            Dialect::Quotients => {
                let product = self.binary(BinaryFn::Mul, x, gate);
                self.binary(BinaryFn::Mul, half, product)
            }
        }
    }

    /// `x / (1 + e^-x)`.
    pub fn silu(&mut self, x: Operand) -> Operand {
        if !self.primitive() {
            return self.unary(UnaryFn::Silu, x);
        }
        let x = self.wide(x);
        let y = match self.dialect {
            Dialect::Products => {
                let gate = self.unary(UnaryFn::Sigmoid, x);
                self.binary(BinaryFn::Mul, x, gate)
            }
            Dialect::Quotients => {
                let one = self.scalar("one", 1.0);
                let minus = self.unary(UnaryFn::Neg, x);
                let power = self.unary(UnaryFn::Exp, minus);
                let divisor = self.with_constant(BinaryFn::Add, power, one);
                self.binary(BinaryFn::Div, x, divisor)
            }
        };
        self.narrow(y)
    }

    /// `q k^T` times `1 / sqrt(d)`; `k` is transposed already.
    pub fn scores(&mut self, q: Operand, k: Operand, d: u64) -> Operand {
        let scores = self.op(Matmul { transpose_b: false, out: None }, &[q, k]);
        let root = (d as f64).sqrt();
        match self.dialect {
            Dialect::Products => {
                let scale = self.scalar("scale", 1.0 / root);
                self.binary(BinaryFn::Mul, scores, scale)
            }
            Dialect::Quotients => {
                let divisor = self.scalar("sqrt_d", root);
                self.binary(BinaryFn::Div, scores, divisor)
            }
        }
    }

    /// Softmax over the last axis, spelled out.
    pub fn softmax(&mut self, x: Operand) -> Operand {
        let axis = self.last_axis(x);
        let top = self.reduce(ReduceFn::Max, x, axis);
        let shifted = self.binary(BinaryFn::Sub, x, top);
        let power = self.unary(UnaryFn::Exp, shifted);
        let total = self.reduce(ReduceFn::Sum, power, axis);
        self.binary(BinaryFn::Div, power, total)
    }
}
