//! Cost of compiling against the number of nodes, on decoder-like graphs with one name per weight and layer.
//!
//! `cargo bench --bench scale -- [NODES..]`; without numbers 10,000, 100,000 and 1,000,000. Reports each pass, the whole
//! default pipeline with verification, plan and lowering, and the plan against its lower bound.

#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../tests/common/stack.rs"]
mod stack;

use std::time::Instant;

use millrace::compiler::codegen::lower;
use millrace::compiler::pass::Context;
use millrace::compiler::passes::plan_report;
use millrace::compiler::pipeline::{Manager, Pipeline};
use millrace::ir::verify::check;
use millrace::ir::{Bindings, Result};

fn run(nodes: usize) -> Result<f64> {
    let start = Instant::now();
    let mut module = stack::decoder(nodes)?;
    let built = start.elapsed().as_secs_f64();
    let count = module.graph.order.len();
    let mut context = Context::cpu();
    let mut manager = Manager::default();
    let start = Instant::now();
    manager.run(&Pipeline::level(2), &mut module, &mut context)?;
    let pipeline = start.elapsed().as_secs_f64();
    module.compact();
    let module = lower(module)?;
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
    let rolling = manager.rolling.as_secs_f64();
    println!("    {:<16} {rolling:>8.3} s", "rolling");
    println!("    {:<16} {:>8.3} s", "verification", pipeline - inside - rolling);
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
