//! Cost of compiling against the number of nodes, on decoder-like graphs with one name per weight and layer.
//!
//! `cargo bench --bench scale -- [NODES..]`; without numbers 10,000, 100,000 and 1,000,000. Reports each pass, the whole
//! default pipeline with verification, plan and lowering, and the plan against its lower bound.

use std::time::Instant;

use millrace::compiler::codegen::lower;
use millrace::compiler::pass::Context;
use millrace::compiler::passes::plan_report;
use millrace::compiler::pipeline::{Manager, Pipeline};
use millrace::ir::ops::binary::BinaryFn;
use millrace::ir::ops::rope::{RopeLayout, RopeScaling};
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{Binary, Embedding, KvAppend, Matmul, PagedAttention, Reshape, RmsNorm, Rope, Unary};
use millrace::ir::verify::check;
use millrace::ir::{Bindings, Builder, DType, Dim, Module, Operand, Result, TensorType, WeightExpr};

const HIDDEN: u64 = 512;
const INNER: u64 = 1536;
const HEADS: u64 = 8;
const KV_HEADS: u64 = 2;
const HEAD_DIM: u64 = 64;

/// A decoder of at least `nodes` nodes.
fn decoder(nodes: usize) -> Result<Module> {
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
            b.one(Reshape { shape: vec![tokens.clone(), heads.into(), HEAD_DIM.into()] }, &[x], name)
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
        let y = b.one(Reshape { shape: vec![tokens.clone(), HIDDEN.into()] }, &[y], &prefix)?;
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

fn run(nodes: usize) -> Result<f64> {
    let start = Instant::now();
    let mut module = decoder(nodes)?;
    let built = start.elapsed().as_secs_f64();
    let count = module.graph.order.len();
    let mut context = Context::cpu();
    let mut manager = Manager::default();
    let start = Instant::now();
    manager.run(&Pipeline::level(2), &mut module, &mut context)?;
    let pipeline = start.elapsed().as_secs_f64();
    module.compact();
    let module = lower(check(&module)?);
    let verified = check(&module).map(|_| ());
    verified?;
    let whole = start.elapsed().as_secs_f64();
    let plan = plan_report(&module, &Bindings::maxima(&module.dims));
    println!("{count} nodes: built in {built:.2} s");
    let mut passes: Vec<(&str, f64)> = Vec::new();
    for run in &manager.runs {
        match passes.iter_mut().find(|(n, _)| *n == run.name) {
            Some((_, time)) => *time += run.time.as_secs_f64(),
            None => passes.push((run.name, run.time.as_secs_f64())),
        }
    }
    let mut inside = 0.0;
    for (name, seconds) in passes {
        inside += seconds;
        println!("    {name:<16} {seconds:>8.3} s");
    }
    println!("    {:<16} {:>8.3} s", "verification", pipeline - inside);
    println!("    {:<16} {:>8.3} s", "lower, verify", whole - pipeline);
    if let Some(plan) = plan {
        println!(
            "    {} buffers, peak {} bytes, lower bound {} bytes",
            plan.buffers, plan.peak_bytes, plan.lower_bound_bytes
        );
    }
    println!("    {:<16} {whole:>8.3} s for {} nodes left", "whole", module.graph.order.len());
    Ok(whole)
}

fn main() {
    let mut sizes: Vec<usize> = std::env::args().filter_map(|a| a.replace('_', "").parse().ok()).collect();
    if sizes.is_empty() {
        sizes = vec![10_000, 100_000, 1_000_000];
    }
    let mut last: Option<(usize, f64)> = None;
    for nodes in sizes {
        match run(nodes) {
            Ok(seconds) => {
                if let Some((before, time)) = last {
                    let (more, longer) = (nodes as f64 / before as f64, seconds / time);
                    println!("    {longer:.1} times the time for {more:.1} times the nodes");
                }
                last = Some((nodes, seconds));
            }
            Err(error) => {
                eprintln!("{error}");
                std::process::exit(1);
            }
        }
    }
}
