//! Graphs that resemble ops and are none: each output differs from an op of the table in one place.
//!
//! Extents coincide where they can (tokens = hidden = 32, heads = tokens of a head's block), so that no type tells a wrong
//! axis from a right one.

use millrace::ir::ops::binary::BinaryFn;
use millrace::ir::ops::reduce::ReduceFn;
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{Cast, Iota, Matmul, Select};
use millrace::ir::{DType, Dim, Module, Operand, TensorType, WeightExpr};

use super::spelling::{Net, Spelling};

/// Tokens and width.
const N: u64 = 32;
const HEADS: u64 = 4;
const KV_HEADS: u64 = 2;
const D: u64 = N / HEADS;

const NOTE: &str = "Lookalikes of norms, activations, softmax, rope and attention, one difference each: a pass that recovers ops
    must leave them alone or recover what they really compute.
    Written by tests/common/zoo: accept changes with MILLRACE_ACCEPT=1 cargo test --test zoo.";

struct Lookalikes {
    net: Net,
    x: Operand,
    positions: Operand,
    eps: Operand,
    w: Operand,
}

/// The graph and the comment above it.
pub fn build() -> (&'static str, Module) {
    let mut net = Net::new("lookalikes", Spelling::Primitive, DType::F32);
    let x = net.builder.input("x", TensorType::new(DType::F32, [N, N]));
    let positions = net.builder.input("positions", TensorType::new(DType::I32, [N]));
    let eps = net.scalar("eps", 0.1);
    let w = net.weight("w", &[N], 0.5);
    let mut all = Lookalikes { net, x, positions, eps, w };
    all.norms();
    all.activations();
    all.softmaxes();
    all.ropes();
    all.attentions();
    (NOTE, all.net.builder.finish())
}

impl Lookalikes {
    fn output(&mut self, name: &str, y: Operand) {
        self.net.builder.output(name, y).unwrap();
    }

    fn mul(&mut self, a: Operand, b: Operand) -> Operand {
        self.net.binary(BinaryFn::Mul, a, b)
    }

    fn add(&mut self, a: Operand, b: Operand) -> Operand {
        self.net.binary(BinaryFn::Add, a, b)
    }

    /// `rsqrt(m + eps)`.
    fn factor(&mut self, m: Operand, eps: Operand) -> Operand {
        let padded = self.add(m, eps);
        self.net.unary(UnaryFn::Rsqrt, padded)
    }

    fn norms(&mut self) {
        let (x, w, eps) = (self.x, self.w, self.eps);
        self.net.at("norm");
        let square = self.mul(x, x);
        let mean_square = self.net.reduce(ReduceFn::Mean, square, 1);
        let mean = self.net.reduce(ReduceFn::Mean, x, 1);
        let centred = self.net.binary(BinaryFn::Sub, x, mean);
        let spread = self.mul(centred, centred);

        // Divided by n - 1.
        let sum = self.net.reduce(ReduceFn::Sum, spread, 1);
        let less = self.net.scalar("less", (N - 1) as f64);
        let variance = self.net.binary(BinaryFn::Div, sum, less);
        let factor = self.factor(variance, eps);
        let y = self.mul(centred, factor);
        let y = self.mul(y, w);
        self.output("unbiased_variance", y);

        // The variance is that of a layer norm, the scaled row is not centred.
        let variance = self.net.reduce(ReduceFn::Mean, spread, 1);
        let factor = self.factor(variance, eps);
        let y = self.mul(x, factor);
        let y = self.mul(y, w);
        self.output("not_centred", y);

        // The other way round.
        let factor = self.factor(mean_square, eps);
        let y = self.mul(centred, factor);
        let y = self.mul(y, w);
        self.output("variance_around_zero", y);

        // Over the tokens.
        let other = self.net.reduce(ReduceFn::Mean, square, 0);
        let factor = self.factor(other, eps);
        let y = self.mul(x, factor);
        let y = self.mul(y, w);
        self.output("norm_over_tokens", y);

        // One weight a row.
        let rows = self.net.weight("rows", &[N, 1], 0.5);
        let factor = self.factor(mean_square, eps);
        let normal = self.mul(x, factor);
        let y = self.mul(normal, rows);
        self.output("weight_per_row", y);

        // One eps a row.
        let many =
            self.net.dense("const.eps_rows", DType::F32, &[N, 1], (0..N).map(|i| i as f64 / 64.0).collect());
        let factor = self.factor(mean_square, many);
        let y = self.mul(x, factor);
        let y = self.mul(y, w);
        self.output("eps_per_row", y);

        // `x / (sqrt(m) + eps)`.
        let root = self.net.unary(UnaryFn::Sqrt, mean_square);
        let divisor = self.add(root, eps);
        let y = self.net.binary(BinaryFn::Div, x, divisor);
        let y = self.mul(y, w);
        self.output("eps_outside_the_root", y);

        // The product of two different rows instead of a square.
        let places = self.net.weight("places", &[N, N], 0.5);
        let shifted = self.add(x, places);
        let product = self.mul(x, shifted);
        let product = self.net.unary(UnaryFn::Abs, product);
        let mean = self.net.reduce(ReduceFn::Mean, product, 1);
        let factor = self.factor(mean, eps);
        let y = self.mul(x, factor);
        let y = self.mul(y, w);
        self.output("no_square", y);
    }

    fn activations(&mut self) {
        let x = self.x;
        self.net.at("activation");
        let [half, one, two, other] = [("half", 0.5), ("one", 1.0), ("two", 2.0), ("other_root", 1.7)]
            .map(|(n, v)| self.net.scalar(n, v));
        let gelu = |all: &mut Self, divisor: Operand, minus: bool, factor: Operand| {
            let inner = all.net.binary(BinaryFn::Div, x, divisor);
            let erf = all.net.unary(UnaryFn::Erf, inner);
            let gate = all.net.binary(if minus { BinaryFn::Sub } else { BinaryFn::Add }, erf, one);
            let part = all.mul(x, factor);
            all.mul(part, gate)
        };
        let root = self.net.scalar("sqrt_two", std::f64::consts::SQRT_2);
        let y = gelu(self, other, false, half);
        self.output("gelu_of_another_width", y);
        let y = gelu(self, root, true, half);
        self.output("gelu_minus_one", y);
        let y = gelu(self, root, false, two);
        self.output("gelu_times_four", y);

        // `x / (1 + e^x)`.
        let power = self.net.unary(UnaryFn::Exp, x);
        let divisor = self.add(power, one);
        let y = self.net.binary(BinaryFn::Div, x, divisor);
        self.output("silu_without_minus", y);
        // `x * sigmoid(2 x)`.
        let twice = self.mul(x, two);
        let gate = self.net.unary(UnaryFn::Sigmoid, twice);
        let y = self.mul(x, gate);
        self.output("silu_of_another_slope", y);
    }

    fn softmaxes(&mut self) {
        let x = self.x;
        self.net.at("softmax");
        let top = self.net.reduce(ReduceFn::Max, x, 1);
        let shifted = self.net.binary(BinaryFn::Sub, x, top);
        let power = self.net.unary(UnaryFn::Exp, shifted);
        let most = self.net.reduce(ReduceFn::Max, power, 1);
        let y = self.net.binary(BinaryFn::Div, power, most);
        self.output("divided_by_the_largest", y);
        let plain = self.net.unary(UnaryFn::Exp, x);
        let sum = self.net.reduce(ReduceFn::Sum, plain, 1);
        let y = self.net.binary(BinaryFn::Div, power, sum);
        self.output("divided_by_the_unshifted_sum", y);
        let sum = self.net.reduce(ReduceFn::Sum, power, 0);
        let y = self.net.binary(BinaryFn::Div, power, sum);
        self.output("divided_by_the_sum_of_columns", y);
        // A shift changes nothing: this one is a softmax over the tokens.
        let low = self.net.reduce(ReduceFn::Min, x, 0);
        let shifted = self.net.binary(BinaryFn::Sub, x, low);
        let power = self.net.unary(UnaryFn::Exp, shifted);
        let sum = self.net.reduce(ReduceFn::Sum, power, 0);
        let y = self.net.binary(BinaryFn::Div, power, sum);
        self.output("shifted_by_the_smallest", y);
    }

    /// Cosines or sines `[n, 1, d]` of position times frequency.
    fn angles(&mut self, function: UnaryFn, name: &str, base: f64) -> Operand {
        let values = (0..D / 2).map(|i| f64::from(base.powf(-((2 * i) as f64) / D as f64) as f32)).collect();
        let frequencies = self.net.dense(&format!("const.{name}"), DType::F32, &[D / 2], values);
        let at = self.net.op(Cast { to: DType::F32 }, &[self.positions]);
        let at = self.net.reshape(at, [N, 1].map(Dim::from));
        let angles = self.mul(at, frequencies);
        let angles = self.net.concat(angles, angles, 1);
        let y = self.net.unary(function, angles);
        self.net.reshape(y, [N, 1, D].map(Dim::from))
    }

    fn ropes(&mut self) {
        self.net.at("rope");
        let x = self.net.reshape(self.x, [N, HEADS, D].map(Dim::from));
        let (left, right) = (self.net.slice(x, 2, 0i64, D / 2), self.net.slice(x, 2, D / 2, D));
        let cos = self.angles(UnaryFn::Cos, "frequencies", 100.0);
        let sin = self.angles(UnaryFn::Sin, "frequencies", 100.0);
        let other = self.angles(UnaryFn::Sin, "other_frequencies", 200.0);
        let turn = |all: &mut Self, name: &str, turned: Operand, cos: Operand, sin: Operand| {
            let (a, b) = (all.mul(x, cos), all.mul(turned, sin));
            let y = all.add(a, b);
            all.output(name, y);
        };
        let minus_left = self.net.unary(UnaryFn::Neg, left);
        let minus_right = self.net.unary(UnaryFn::Neg, right);
        let turned = self.net.concat(minus_right, left, 2);
        turn(self, "rope_of_two_bases", turned, cos, other);
        turn(self, "rope_with_cos_and_sin_swapped", turned, sin, cos);
        let turned = self.net.concat(right, minus_left, 2);
        turn(self, "rope_backwards", turned, cos, sin);
        let turned = self.net.concat(right, left, 2);
        turn(self, "rope_without_minus", turned, cos, sin);
        let turned = self.net.concat(minus_left, right, 2);
        turn(self, "rope_of_unswapped_halves", turned, cos, sin);
    }

    /// Attention of 4 query heads, with what a closure makes of keys and scores.
    fn attend(
        &mut self,
        name: &str,
        shared: [u64; 2],
        scale: f64,
        scores: impl FnOnce(&mut Self, Operand) -> Operand,
    ) {
        self.net.at(name);
        let [q, k, v] = [("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)].map(|(part, heads)| {
            let y = self.net.linear(self.x, part, heads * D, N, false);
            self.net.at(name);
            self.net.reshape(y, [N, heads, D].map(Dim::from))
        });
        // `[n, kv, 1, d]` repeats each key head in a row, `[n, 1, kv, d]` repeats all of them.
        let [k, v] = [k, v].map(|part| {
            let y = self.net.reshape(part, [N, shared[0], shared[1], D].map(Dim::from));
            let repeated = |n: u64| if n == 1 { HEADS / KV_HEADS } else { n };
            let shape = vec![N.into(), repeated(shared[0]).into(), repeated(shared[1]).into(), D.into()];
            let y = self.net.op(millrace::ir::ops::Broadcast { shape: shape.into() }, &[y]);
            self.net.reshape(y, [N, HEADS, D].map(Dim::from))
        });
        let q = self.net.transpose(q, [1, 0, 2]);
        let k = self.net.transpose(k, [1, 2, 0]);
        let v = self.net.transpose(v, [1, 0, 2]);
        let products = self.net.op(Matmul { transpose_b: false, out: None }, &[q, k]);
        let scale = self.net.scalar(&format!("{name}.scale"), scale);
        let scaled = self.mul(products, scale);
        let scores = scores(self, scaled);
        let weights = self.net.softmax(scores);
        let y = self.net.op(Matmul { transpose_b: false, out: None }, &[weights, v]);
        let y = self.net.transpose(y, [1, 0, 2]);
        let y = self.net.reshape(y, [N, N].map(Dim::from));
        self.output(name, y);
    }

    /// Scores where `function(row, column + shift)` holds, -1000 elsewhere.
    fn kept(&mut self, scores: Operand, function: BinaryFn, shift: f64) -> Operand {
        let shape = vec![Dim::from(N), Dim::from(N)];
        let [i, j] = [0, 1]
            .map(|axis| self.net.op(Iota { shape: shape.clone().into(), axis, dtype: DType::I32 }, &[]));
        let ty = TensorType { dtype: DType::I32, shape: Vec::new().into() };
        let shift = self.net.builder.weight(&format!("const.shift_{shift}"), ty, WeightExpr::Splat(shift));
        let j = self.add(j, shift);
        let kept = self.net.binary(function, i, j);
        let low = self.net.scalar("low", -1000.0);
        self.net.op(Select, &[kept, scores, low])
    }

    fn attentions(&mut self) {
        let (rows, all, scale) = ([KV_HEADS, 1], [1, KV_HEADS], 1.0 / (D as f64).sqrt());
        self.attend("attention_of_tiled_heads", all, scale, |_, s| s);
        self.attend("attention_of_negative_scale", rows, -scale, |_, s| s);
        self.attend("attention_to_earlier_rows_only", rows, scale, |a, s| a.kept(s, BinaryFn::Gt, 0.0));
        self.attend("attention_to_later_rows", rows, scale, |a, s| a.kept(s, BinaryFn::Le, 0.0));
        self.attend("attention_one_row_ahead", rows, scale, |a, s| a.kept(s, BinaryFn::Ge, -1.0));
        self.attend("attention_in_a_window", rows, scale, |a, s| {
            let causal = a.kept(s, BinaryFn::Ge, 0.0);
            a.kept(causal, BinaryFn::Lt, 5.0)
        });
        self.attend("attention_with_a_mask", rows, scale, |a, s| {
            let mask = a.net.weight("mask", &[1, 1, N], 1.0);
            a.add(s, mask)
        });
        self.attend("attention_with_a_bias_per_row_and_head", rows, scale, |a, s| {
            let slopes = a.net.weight("slopes", &[HEADS, 1, N], 1.0);
            a.add(s, slopes)
        });
        self.attend("attention_of_capped_scores", rows, scale, |a, s| a.net.unary(UnaryFn::Tanh, s));
        self.attend("attention_of_transposed_scores", rows, scale, |a, s| a.net.transpose(s, [0, 2, 1]));
    }
}
