//! A decoder-like graph of any number of layers, with one name for each weight and layer.

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::rope::{RopeLayout, RopeScaling};
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::ops::{Binary, Embedding, KvAppend, Matmul, PagedAttention, Reshape, RmsNorm, Rope, Unary};
use millrace_ir::{Builder, DType, Dim, Module, Operand, Result, TensorType, WeightExpr};

const HIDDEN: u64 = 512;
const INNER: u64 = 1536;
const HEADS: u64 = 8;
const KV_HEADS: u64 = 2;
const HEAD_DIM: u64 = 64;

/// A decoder of at least `nodes` nodes; one of `21 * n` has n layers.
pub fn decoder(nodes: usize) -> Result<Module> {
    let mut b = Builder::new("decoder");
    let dtype = DType::BF16;
    let tokens = b.dim("t", 1, 2048, Some(8))?;
    let batch = b.dim("b", 1, 8, None)?;
    let width = b.dim("p", 1, 64, None)?;
    let pages = b.dim("pages", 1, 512, None)?;
    let i32s = |shape: Vec<Dim>| TensorType::new(DType::I32, shape);
    let ids = b.input("token_ids", i32s(vec![tokens.clone()]));
    let positions = b.input("positions", i32s(vec![tokens.clone()]));
    let starts = b.input("seq_starts", i32s(vec![batch.add(&Dim::from(1i64))]));
    let lens = b.input("kv_lens", i32s(vec![batch.clone()]));
    let table = b.input("block_table", i32s(vec![batch, width]));
    let weight = |b: &mut Builder, name: &str, shape: &[u64]| {
        let shape: Vec<Dim> = shape.iter().map(|d| Dim::from(*d)).collect();
        let expr = WeightExpr::File { file: "model".to_string(), key: name.to_string() };
        b.weight(name, TensorType::new(dtype, shape), expr)
    };
    let embed = weight(&mut b, "embed.weight", &[1000, HIDDEN]);
    let mut x = b.one(Embedding, &[embed, ids], "embed")?;
    let matmul = Matmul { transpose_b: true, out: None };
    let mut count = 1;
    let mut layer = 0;
    while count < nodes {
        let prefix = format!("layers.{layer}");
        let state =
            || TensorType::new(dtype, [pages.clone(), 16u64.into(), KV_HEADS.into(), HEAD_DIM.into()]);
        let cache = [b.state(&format!("kv{layer}.k"), state()), b.state(&format!("kv{layer}.v"), state())];
        let norm = |b: &mut Builder, x: Operand, name: &str| -> Result<Operand> {
            let w = weight(b, &format!("{name}.weight"), &[HIDDEN]);
            b.one(RmsNorm { eps: 1e-5 }, &[x, w], name)
        };
        let linear = |b: &mut Builder, x: Operand, name: &str, rows: u64, columns: u64| -> Result<Operand> {
            let w = weight(b, &format!("{name}.weight"), &[rows, columns]);
            b.one(matmul.clone(), &[x, w], name)
        };
        let heads = |b: &mut Builder, x: Operand, heads: u64, name: &str| {
            b.one(Reshape { shape: vec![tokens.clone(), heads.into(), HEAD_DIM.into()].into() }, &[x], name)
        };
        let normed = norm(&mut b, x, &format!("{prefix}.input_norm"))?;
        let q = linear(&mut b, normed, &format!("{prefix}.q"), HEADS * HEAD_DIM, HIDDEN)?;
        let k = linear(&mut b, normed, &format!("{prefix}.k"), KV_HEADS * HEAD_DIM, HIDDEN)?;
        let v = linear(&mut b, normed, &format!("{prefix}.v"), KV_HEADS * HEAD_DIM, HIDDEN)?;
        let q = heads(&mut b, q, HEADS, &prefix)?;
        let k = heads(&mut b, k, KV_HEADS, &prefix)?;
        let v = heads(&mut b, v, KV_HEADS, &prefix)?;
        let rope = Rope { base: 1e4, layout: RopeLayout::Half, scaling: RopeScaling::Default, rotary: 0 };
        let q = b.one(rope.clone(), &[q, positions], &prefix)?;
        let k = b.one(rope, &[k, positions], &prefix)?;
        let k = b.one(KvAppend, &[cache[0], k, starts, lens, table], &prefix)?;
        let v = b.one(KvAppend, &[cache[1], v, starts, lens, table], &prefix)?;
        let attention = PagedAttention { scale: 0.125, window: 0 };
        let y = b.one(attention, &[q, k, v, starts, lens, table], &prefix)?;
        let y = b.one(Reshape { shape: vec![tokens.clone(), HIDDEN.into()].into() }, &[y], &prefix)?;
        let y = linear(&mut b, y, &format!("{prefix}.o"), HIDDEN, HIDDEN)?;
        x = b.one(Binary { function: BinaryFn::Add }, &[x, y], &prefix)?;
        let normed = norm(&mut b, x, &format!("{prefix}.post_norm"))?;
        let gate = linear(&mut b, normed, &format!("{prefix}.gate"), INNER, HIDDEN)?;
        let up = linear(&mut b, normed, &format!("{prefix}.up"), INNER, HIDDEN)?;
        let gate = b.one(Unary { function: UnaryFn::Silu }, &[gate], &prefix)?;
        let y = b.one(Binary { function: BinaryFn::Mul }, &[gate, up], &prefix)?;
        let y = linear(&mut b, y, &format!("{prefix}.down"), HIDDEN, INNER)?;
        x = b.one(Binary { function: BinaryFn::Add }, &[x, y], &prefix)?;
        count += 21;
        layer += 1;
    }
    b.output("x", x)?;
    Ok(b.finish())
}
