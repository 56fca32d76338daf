//! Writes a graph with the builder, optimises it with a pipeline, and runs it against the reference evaluator.
//!
//! Run with `cargo run --release --example own_graph`.
#![allow(clippy::print_stdout)]

use millrace::Result;
use millrace::compiler::pass::Context;
use millrace::compiler::pipeline::{Manager, Pipeline};
use millrace::ir::ops::binary::BinaryFn;
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{Binary, Matmul, Unary};
use millrace::ir::tensor::Tensor;
use millrace::ir::weights::WeightReader;
use millrace::ir::{Builder, DType, TensorType, WeightExpr, eval, text};

fn main() -> Result<()> {
    let mut b = Builder::new("mlp");
    let tokens = b.dim("t", 1, 64, Some(8))?;
    let x = b.input("x", TensorType::new(DType::F32, [tokens, 32usize.into()]));
    let random = |seed| WeightExpr::Random { seed, std: 0.1 };
    let gate = b.weight("gate", TensorType::new(DType::F32, [64usize, 32]), random(1));
    let up = b.weight("up", TensorType::new(DType::F32, [64usize, 32]), random(2));
    let linear = Matmul { transpose_b: true, out: None };
    let g = b.one(linear.clone(), &[x, gate], "gate_proj")?;
    let u = b.one(linear, &[x, up], "up_proj")?;
    let g = b.one(Unary { function: UnaryFn::Silu }, &[g], "act")?;
    let y = b.one(Binary { function: BinaryFn::Mul }, &[g, u], "mlp")?;
    b.output("y", y)?;
    let original = b.finish();

    let mut optimised = original.clone();
    let pipeline =
        Pipeline::parse("canonicalize,dce,fuse-linear,merge-matmuls,fuse-glu,schedule,plan-memory")?;
    Manager::default().run(&pipeline, &mut optimised, &mut Context::cpu())?;
    optimised.compact();
    println!("{}", text::print(&optimised));

    let data = (0..5 * 32).map(|i| f64::from((i * 37 % 101) as i16) / 50.0 - 1.0).collect();
    let input = Tensor::from_values(DType::F32, &[5, 32], data);
    let inputs: Vec<Tensor> = input.into_iter().collect();
    let before = eval::evaluate(&original, &mut WeightReader::new(&original), &inputs, &mut [])?;
    let after = eval::evaluate(&optimised, &mut WeightReader::new(&optimised), &inputs, &mut [])?;
    let error = before[0].data.iter().zip(&after[0].data).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!("largest difference after {pipeline}: {error:.1e}");
    Ok(())
}
