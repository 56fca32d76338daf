//! Cost of compiling against the number of nodes, on decoder-like graphs with one name per weight and layer.
//!
//! `cargo bench --bench scale -- [NODES..]`; without numbers 10,000, 100,000 and 1,000,000. Reports each pass, the whole
//! default pipeline with verification, plan and lowering, and the plan against its lower bound, in each of five interleaved
//! rounds, then medians.

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

/// How often each size is compiled.
const ROUNDS: usize = 5;

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
    let mut times = vec![Vec::new(); sizes.len()];
    for round in 0..ROUNDS {
        println!("round {round}");
        for (nodes, times) in sizes.iter().zip(&mut times) {
            match run(*nodes) {
                Ok(seconds) => times.push(seconds),
                Err(error) => {
                    eprintln!("{error}");
                    std::process::exit(1);
                }
            }
        }
    }
    println!("medians of {ROUNDS} rounds, smallest and largest");
    let mut last: Option<(usize, Vec<f64>)> = None;
    for (nodes, times) in sizes.into_iter().zip(times) {
        let [least, median, most] = spread(&times);
        println!("    {nodes:>9} nodes: {median:.4} s ({least:.4}..{most:.4})");
        if let Some((before, base)) = last {
            let ratios: Vec<f64> = times.iter().zip(&base).map(|(t, b)| t / b).collect();
            let [least, ratio, most] = spread(&ratios);
            let more = nodes as f64 / before as f64;
            println!(
                "              {ratio:.1} ({least:.1}..{most:.1}) times the time for {more:.1} times the nodes"
            );
        }
        last = Some((nodes, times));
    }
}

/// Smallest, median and largest.
fn spread(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]]
}
