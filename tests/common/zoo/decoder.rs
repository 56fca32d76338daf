//! A decoder over one sequence without a cache.

use millrace::ir::ops::attention::Mask;
use millrace::ir::ops::binary::BinaryFn;
use millrace::ir::ops::rope::{RopeLayout, RopeScaling};
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{Attention, Broadcast, Cast, Embedding, Gather, Iota, Matmul, Rope, Select};
use millrace::ir::{DType, Dim, Module, Operand, TensorType};

use super::spelling::{Dialect, Net, Spelling};

const HIDDEN: u64 = 32;
const HEADS: u64 = 4;
const KV_HEADS: u64 = 2;
const D: u64 = 8;
const INNER: u64 = 64;
const VOCAB: u64 = 64;
const MOST_TOKENS: u64 = 32;
const EPS: f64 = 1e-5;
const BASE: f64 = 10000.0;

/// What distinguishes the decoders.
pub struct Shape {
    dtype: DType,
    dialect: Dialect,
    /// A constant number of tokens, or the symbol `$t`.
    tokens: Option<u64>,
    /// Cosines and sines come from tables by position instead of from frequencies.
    tables: bool,
    /// What masked scores become.
    masked: f64,
}

impl Shape {
    /// The shape of a pair.
    pub fn named(pair: &str) -> Shape {
        let plain = Shape {
            dtype: DType::F32,
            dialect: Dialect::Products,
            tokens: Some(16),
            tables: false,
            masked: f64::NEG_INFINITY,
        };
        match pair {
            "decoder" => plain,
            "decoder_bf16" => Shape { dtype: DType::BF16, ..plain },
            "decoder_tables" => Shape {
                dialect: Dialect::Quotients,
                tokens: None,
                tables: true,
                masked: f64::from(f32::MIN),
                ..plain
            },
            other => panic!("there is no decoder `{other}`"),
        }
    }

    fn note(&self, spelling: Spelling) -> &'static str {
        match (spelling, self.tables, self.dtype) {
            (Spelling::Twin, ..) => {
                "The decoder of the primitive file of the same name with the ops of the table: same inputs, outputs and weights.
                Written by tests/common/zoo: accept changes with MILLRACE_ACCEPT=1 cargo test --test zoo."
            }
            (_, true, _) => {
                "A Llama-like decoder of 2 layers from primitives only: one sequence of $t tokens, rope from tables,
                spelled with pow, sqrt, quotients and transposed weights.
                What a recovery must prove: row p of the tables is cos and sin of p * base^(-2i/d), rounded to f32; scores
                below the diagonal are those a causal mask keeps, and f32's lowest number stands for -inf because every row
                sees itself; the $t rows are one sequence, so seq_starts is [0, $t], which iota, slice and concat can say.
                Written by tests/common/zoo: accept changes with MILLRACE_ACCEPT=1 cargo test --test zoo."
            }
            (_, _, DType::BF16) => {
                "The decoder of primitive_decoder.ir in bf16: norms, rope, attention and activation compute in f32 between
                casts, each with one rounding at its end, as the ops of the table do.
                Written by tests/common/zoo: accept changes with MILLRACE_ACCEPT=1 cargo test --test zoo."
            }
            _ => {
                "A Llama-like decoder of 2 layers from primitives only: one sequence of 16 tokens, rope from frequencies.
                What a recovery must prove: the frequencies are base^(-2i/d), rounded to f32; both operands of the comparison
                are positions in the sequence; a key head serves heads / kv_heads query heads in a row; the 16 rows are one
                sequence, so seq_starts is [0, 16].
                Written by tests/common/zoo: accept changes with MILLRACE_ACCEPT=1 cargo test --test zoo."
            }
        }
    }
}

struct Model<'a> {
    net: Net,
    shape: &'a Shape,
    tokens: Dim,
    positions: Operand,
    /// Cosines and sines `[t, 1, d]` of primitive ones.
    turn: Option<[Operand; 2]>,
    /// Which scores `[t, t]` are kept, of primitive ones.
    kept: Option<Operand>,
    seq_starts: Option<Operand>,
}

/// The model and the comment above it.
pub fn build(spelling: Spelling, shape: &Shape) -> (&'static str, Module) {
    let mut net = Net::new("decoder", spelling, shape.dtype);
    net.dialect = shape.dialect;
    let tokens = match shape.tokens {
        Some(n) => Dim::from(n),
        None => net.builder.dim("t", 1, MOST_TOKENS, Some(8)).unwrap(),
    };
    let ids = TensorType { dtype: DType::I32, shape: vec![tokens.clone()].into() };
    let token_ids = net.builder.input("token_ids", ids.clone());
    let positions = net.builder.input("positions", ids);
    let mut model = Model { net, shape, tokens, positions, turn: None, kept: None, seq_starts: None };
    match spelling {
        Spelling::Primitive => {
            model.turn = Some(model.angles());
            model.kept = Some(model.causal());
        }
        Spelling::Twin => model.seq_starts = Some(model.starts()),
    }
    model.net.at("embed");
    let table = model.net.weight("embed.weight", &[VOCAB, HIDDEN], 1.0);
    let mut x = match spelling {
        Spelling::Primitive => model.net.op(Gather { axis: 0 }, &[table, token_ids]),
        Spelling::Twin => model.net.op(Embedding, &[table, token_ids]),
    };
    for layer in 0..2 {
        x = model.layer(x, &format!("layers.{layer}"));
    }
    let net = &mut model.net;
    let x = net.rms_norm(x, "norm", HIDDEN, EPS);
    net.at("lm_head");
    let head = net.weight("lm_head.weight", &[VOCAB, HIDDEN], 0.15);
    let out = (shape.dtype != DType::F32).then_some(DType::F32);
    let logits = net.op(Matmul { transpose_b: true, out }, &[x, head]);
    net.builder.output("logits", logits).unwrap();
    (shape.note(spelling), model.net.builder.finish())
}

impl Model<'_> {
    /// `[0, t]`.
    fn starts(&mut self) -> Operand {
        self.net.at("seq_starts");
        if let Some(n) = self.shape.tokens {
            return self.net.dense("const.seq_starts", DType::I32, &[2], vec![0.0, n as f64]);
        }
        let count = |extent: Dim| Iota { shape: vec![extent].into(), axis: 0, dtype: DType::I32 };
        let next = self.tokens.add(&Dim::from(1i64));
        let first = self.net.op(count(Dim::from(1i64)), &[]);
        let all = self.net.op(count(next.clone()), &[]);
        let last = self.net.slice(all, 0, self.tokens.clone(), next);
        self.net.concat(first, last, 0)
    }

    /// Cosines and sines of every position, `[t, 1, d]`, both halves alike.
    fn angles(&mut self) -> [Operand; 2] {
        let net = &mut self.net;
        net.at("rope");
        let half = D / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| BASE.powf(-((2 * i) as f64) / D as f64) as f32).collect();
        let parts = if self.shape.tables {
            let table = |net: &mut Net, name: &str, f: fn(f64) -> f64| {
                let rows =
                    (0..MOST_TOKENS).flat_map(|p| frequencies.iter().map(move |w| p as f64 * f64::from(*w)));
                let values = rows.map(|angle| f64::from(f(angle) as f32)).collect();
                net.dense(name, DType::F32, &[MOST_TOKENS, half], values)
            };
            let tables = [table(net, "const.cos", f64::cos), table(net, "const.sin", f64::sin)];
            tables.map(|table| {
                let rows = net.op(Gather { axis: 0 }, &[table, self.positions]);
                net.concat(rows, rows, 1)
            })
        } else {
            let values = frequencies.iter().map(|w| f64::from(*w)).collect();
            let frequencies = net.dense("const.frequencies", DType::F32, &[half], values);
            let at = net.op(Cast { to: DType::F32 }, &[self.positions]);
            let at = net.reshape(at, [self.tokens.clone(), 1i64.into()]);
            let angles = net.binary(BinaryFn::Mul, at, frequencies);
            let angles = net.concat(angles, angles, 1);
            [UnaryFn::Cos, UnaryFn::Sin].map(|f| net.unary(f, angles))
        };
        parts.map(|part| net.reshape(part, [self.tokens.clone(), 1i64.into(), D.into()]))
    }

    /// Whether row `i` sees row `j`: `i >= j`.
    fn causal(&mut self) -> Operand {
        self.net.at("mask");
        let shape = vec![self.tokens.clone(), self.tokens.clone()];
        let [i, j] = [0, 1]
            .map(|axis| self.net.op(Iota { shape: shape.clone().into(), axis, dtype: DType::I32 }, &[]));
        self.net.binary(BinaryFn::Ge, i, j)
    }

    fn rope(&mut self, x: Operand) -> Operand {
        let net = &mut self.net;
        let Some([cos, sin]) = self.turn else {
            let scaling = RopeScaling::Default;
            let rope = Rope { base: BASE, layout: RopeLayout::Half, scaling, rotary: 0 };
            return net.op(rope, &[x, self.positions]);
        };
        let x = net.wide(x);
        let (left, right) = (net.slice(x, 2, 0i64, D / 2), net.slice(x, 2, D / 2, D));
        let minus = net.unary(UnaryFn::Neg, right);
        let turned = net.concat(minus, left, 2);
        let (a, b) = (net.binary(BinaryFn::Mul, x, cos), net.binary(BinaryFn::Mul, turned, sin));
        let y = net.binary(BinaryFn::Add, a, b);
        net.narrow(y)
    }

    fn layer(&mut self, x: Operand, name: &str) -> Operand {
        let normed = self.net.rms_norm(x, &format!("{name}.attention_norm"), HIDDEN, EPS);
        let y = self.attention(normed, &format!("{name}.attention"));
        let net = &mut self.net;
        let y = net.linear(y, &format!("{name}.attention.output"), HIDDEN, HEADS * D, false);
        let x = net.binary(BinaryFn::Add, x, y);
        let normed = net.rms_norm(x, &format!("{name}.mlp_norm"), HIDDEN, EPS);
        let gate = net.linear(normed, &format!("{name}.mlp.gate"), INNER, HIDDEN, false);
        let up = net.linear(normed, &format!("{name}.mlp.up"), INNER, HIDDEN, false);
        net.at(format!("{name}.mlp.act"));
        let gate = net.silu(gate);
        let y = net.binary(BinaryFn::Mul, gate, up);
        let y = net.linear(y, &format!("{name}.mlp.down"), HIDDEN, INNER, false);
        net.binary(BinaryFn::Add, x, y)
    }

    fn attention(&mut self, x: Operand, name: &str) -> Operand {
        let t = self.tokens.clone();
        let parts = [("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)];
        let [q, k, v] = parts.map(|(part, heads)| {
            let y = self.net.linear(x, &format!("{name}.{part}"), heads * D, HIDDEN, false);
            self.net.reshape(y, [t.clone(), heads.into(), D.into()])
        });
        self.net.at(format!("{name}.rope"));
        let [q, k] = [q, k].map(|part| self.rope(part));
        self.net.at(name);
        let net = &mut self.net;
        let y = match (self.kept, self.seq_starts) {
            (None, Some(starts)) => {
                let mask = Mask { scale: 1.0 / (D as f64).sqrt(), causal: true, window: 0 };
                net.op(Attention { mask }, &[q, k, v, starts])
            }
            (kept, _) => {
                let [q, k, v] = [q, k, v].map(|part| net.wide(part));
                // Each key head stands for the query heads that share it.
                let group = HEADS / KV_HEADS;
                let [k, v] = [k, v].map(|part| {
                    let y = net.reshape(part, [t.clone(), KV_HEADS.into(), 1i64.into(), D.into()]);
                    let shape = vec![t.clone(), KV_HEADS.into(), group.into(), D.into()];
                    let y = net.op(Broadcast { shape: shape.into() }, &[y]);
                    net.reshape(y, [t.clone(), HEADS.into(), D.into()])
                });
                let (q, k, v) =
                    (net.transpose(q, [1, 0, 2]), net.transpose(k, [1, 2, 0]), net.transpose(v, [1, 0, 2]));
                let scores = net.scores(q, k, D);
                let masked = net.scalar("masked", self.shape.masked);
                let scores = net.op(Select, &[kept.unwrap(), scores, masked]);
                let weights = net.softmax(scores);
                let y = net.op(Matmul { transpose_b: false, out: None }, &[weights, v]);
                let y = net.transpose(y, [1, 0, 2]);
                net.narrow(y)
            }
        };
        net.reshape(y, [t, (HEADS * D).into()])
    }
}
