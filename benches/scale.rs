//! Cost of compiling against the number of nodes, on decoder-like graphs with one name per weight and layer.
//!
//! `cargo bench --bench scale -- [NODES..]`; without numbers 10,000, 100,000 and 1,000,000. Reports each pass, the whole
//! default pipeline with verification, plan and lowering, and the plan against its lower bound, then medians of interleaved
//! rounds. Every module is compiled by a process of its own, as on the command line: one that has compiled before has memory at hand that
//! is mapped already, for small modules and not for large ones.

#![allow(clippy::print_stdout, clippy::print_stderr)]

#[path = "../tests/common/stack.rs"]
mod stack;

use std::process::Command;
use std::time::Instant;

use millrace::compiler::codegen::lower;
use millrace::compiler::pass::Context;
use millrace::compiler::passes::plan_report;
use millrace::compiler::pipeline::{Manager, Pipeline};
use millrace::ir::verify::check;
use millrace::ir::{Bindings, Result};

/// How often each size is compiled.
const ROUNDS: usize = 7;

/// Set for a process that compiles one module.
const ALONE: &str = "MILLRACE_SCALE_ALONE";

/// What the line with the seconds of the whole begins with.
const WHOLE: &str = "whole";

fn run(nodes: usize) -> Result<()> {
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
    println!("    {WHOLE:<16} {whole:>8.4} s for {} nodes left", module.graph.order.len());
    Ok(())
}

fn main() {
    let mut sizes: Vec<usize> = std::env::args().filter_map(|a| a.replace('_', "").parse().ok()).collect();
    if sizes.is_empty() {
        sizes = vec![10_000, 100_000, 1_000_000];
    }
    if std::env::var_os(ALONE).is_some() {
        let Err(error) = sizes.into_iter().try_for_each(run) else { return };
        eprintln!("{error}");
        std::process::exit(1);
    }
    let mut times = vec![Vec::new(); sizes.len()];
    for round in 0..ROUNDS {
        for (nodes, times) in sizes.iter().zip(&mut times) {
            let text = alone(*nodes);
            if round == 0 {
                print!("{text}");
            }
            let seconds = text
                .lines()
                .filter_map(|l| l.trim().strip_prefix(WHOLE)?.split_whitespace().next()?.parse::<f64>().ok());
            times.extend(seconds);
            assert_eq!(times.len(), round + 1, "{text}");
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

/// What a process says that compiles one module.
fn alone(nodes: usize) -> String {
    let output = std::env::current_exe()
        .and_then(|program| Command::new(program).arg(nodes.to_string()).env(ALONE, "1").output());
    match output {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("{error}"),
    }
}

/// Smallest, median and largest.
fn spread(values: &[f64]) -> [f64; 3] {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]]
}
