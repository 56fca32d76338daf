//! A sentence encoder over a batch of fixed layout.

use millrace::ir::ops::attention::Mask;
use millrace::ir::ops::binary::BinaryFn;
use millrace::ir::ops::reduce::ReduceFn;
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{Attention, Embedding, Gather, L2Normalize, Matmul, MeanPool, Reduce};
use millrace::ir::{DType, Module, Operand, TensorType, WeightExpr};

use super::spelling::{Dialect, Net, Spelling};

const BATCH: u64 = 2;
const TOKENS: u64 = 16;
const HIDDEN: u64 = 32;
const HEADS: u64 = 4;
const D: u64 = HIDDEN / HEADS;
const INNER: u64 = 64;
const VOCAB: u64 = 64;
const EPS: f64 = 1e-5;

const PRIMITIVE_NOTE: &str = "A BERT-like encoder of 2 layers from primitives only: 2 sequences of 16 tokens.
    Layer 0 is spelled with products and rsqrt, layer 1 with pow, sqrt, quotients and transposed weights.
    What a recovery of `attention` must prove: the leading axes [2, 16] are whole sequences of one length, so
    seq_starts is [0, 16, 32]; the added mask is zero everywhere; every row sees its whole sequence.
    Written by tests/common/zoo: accept changes with MILLRACE_ACCEPT=1 cargo test --test zoo.";

const TWIN_NOTE: &str =
    "The encoder of primitive_encoder.ir with the ops of the table: same inputs, outputs and weights.
    Written by tests/common/zoo: accept changes with MILLRACE_ACCEPT=1 cargo test --test zoo.";

/// The model and the comment above it.
pub fn build(spelling: Spelling) -> (&'static str, Module) {
    let mut net = Net::new("encoder", spelling, DType::F32);
    let ids = net.builder.input("token_ids", TensorType::new(DType::I32, [BATCH, TOKENS]));
    net.at("embeddings");
    let table = net.weight("embeddings.word.weight", &[VOCAB, HIDDEN], 1.0);
    let places = net.weight("embeddings.position.weight", &[TOKENS, HIDDEN], 0.5);
    let words = match spelling {
        Spelling::Primitive => net.op(Gather { axis: 0 }, &[table, ids]),
        Spelling::Twin => net.op(Embedding, &[table, ids]),
    };
    let x = net.binary(BinaryFn::Add, words, places);
    let mut x = net.layer_norm(x, "embeddings.norm", HIDDEN, EPS);
    for layer in 0..2 {
        net.dialect = if layer == 0 { Dialect::Products } else { Dialect::Quotients };
        let name = format!("layer.{layer}");
        let y = attention(&mut net, x, &format!("{name}.attention"));
        let y = net.linear(y, &format!("{name}.attention.output"), HIDDEN, HIDDEN, true);
        let y = net.binary(BinaryFn::Add, y, x);
        x = net.layer_norm(y, &format!("{name}.attention.norm"), HIDDEN, EPS);
        let y = net.linear(x, &format!("{name}.up"), INNER, HIDDEN, true);
        net.at(format!("{name}.act"));
        let y = net.gelu(y);
        let y = net.linear(y, &format!("{name}.down"), HIDDEN, INNER, true);
        let y = net.binary(BinaryFn::Add, y, x);
        x = net.layer_norm(y, &format!("{name}.norm"), HIDDEN, EPS);
    }
    let y = pooled(&mut net, x);
    net.builder.output("embedding", y).unwrap();
    let note = if spelling == Spelling::Primitive { PRIMITIVE_NOTE } else { TWIN_NOTE };
    (note, net.builder.finish())
}

fn seq_starts(net: &mut Net) -> Operand {
    let starts = (0..=BATCH).map(|s| (s * TOKENS) as f64).collect();
    net.dense("const.seq_starts", DType::I32, &[BATCH + 1], starts)
}

fn attention(net: &mut Net, x: Operand, name: &str) -> Operand {
    let [q, k, v] =
        ["query", "key", "value"].map(|p| net.linear(x, &format!("{name}.{p}"), HIDDEN, HIDDEN, true));
    net.at(name);
    let flat = [BATCH, TOKENS, HIDDEN].map(Into::into);
    if !net.primitive() {
        let heads = [q, k, v].map(|part| net.reshape(part, [BATCH * TOKENS, HEADS, D].map(Into::into)));
        let mask = Mask { scale: 1.0 / (D as f64).sqrt(), causal: false, window: 0 };
        let starts = seq_starts(net);
        let y = net.op(Attention { mask }, &[heads[0], heads[1], heads[2], starts]);
        return net.reshape(y, flat);
    }
    let [q, k, v] = [q, k, v].map(|part| net.reshape(part, [BATCH, TOKENS, HEADS, D].map(Into::into)));
    let q = net.transpose(q, [0, 2, 1, 3]);
    let k = net.transpose(k, [0, 2, 3, 1]);
    let v = net.transpose(v, [0, 2, 1, 3]);
    let scores = net.scores(q, k, D);
    let ty = TensorType::new(DType::F32, [1, 1, 1, TOKENS]);
    let mask = net.builder.weight("const.mask", ty, WeightExpr::Splat(0.0));
    let scores = net.binary(BinaryFn::Add, scores, mask);
    let weights = net.softmax(scores);
    let y = net.op(Matmul { transpose_b: false, out: None }, &[weights, v]);
    let y = net.transpose(y, [0, 2, 1, 3]);
    net.reshape(y, flat)
}

/// The mean of each sequence, divided by its norm.
fn pooled(net: &mut Net, x: Operand) -> Operand {
    const TINY: f64 = 1e-12;
    net.at("pooling");
    if !net.primitive() {
        let starts = seq_starts(net);
        let rows = net.reshape(x, [BATCH * TOKENS, HIDDEN].map(Into::into));
        let mean = net.op(MeanPool, &[rows, starts]);
        net.at("normalize");
        return net.op(L2Normalize { eps: TINY }, &[mean]);
    }
    let mean = net.op(Reduce { function: ReduceFn::Mean, axes: vec![1], keep: false }, &[x]);
    net.at("normalize");
    let square = net.binary(BinaryFn::Mul, mean, mean);
    let sum = net.reduce(ReduceFn::Sum, square, 1);
    let norm = net.unary(UnaryFn::Sqrt, sum);
    let tiny = net.scalar("tiny", TINY);
    let norm = net.binary(BinaryFn::Max, norm, tiny);
    net.binary(BinaryFn::Div, mean, norm)
}
