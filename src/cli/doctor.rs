//! `millrace doctor`: what this machine has.

use millrace::Result;
use millrace::kernels::cpu::{Isa, Pool, ceilings};
use serde_json::json;

use super::{print, print_json};

/// Report what this machine has and what it can do at most.
#[derive(clap::Args)]
pub struct Args {
    /// Measure arithmetic and memory rates (takes a few seconds)
    #[arg(long)]
    measure: bool,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::detect();
    let rates =
        args.measure.then(|| (ceilings::fma_gflops(&Pool::new(1)), ceilings::read_gbs(&Pool::new(threads))));
    if args.json {
        return print_json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "targets": ["cpu"],
            "cpu": {"threads": threads, "instruction_set": format!("{isa:?}").to_lowercase()},
            "fma_gflops_per_thread": rates.map(|r| r.0),
            "memory_read_gbs": rates.map(|r| r.1),
            "gpu": null,
        }));
    }
    print(&format!(
        "millrace {}\ncpu: {threads} threads, {isa:?}\ngpu: none (this version has no CUDA target)\n",
        env!("CARGO_PKG_VERSION")
    ))?;
    match rates {
        Some((gflops, gbs)) => {
            print(&format!("f32 multiply-add: {gflops:.0} GFLOP/s a thread\nmemory read: {gbs:.1} GB/s\n"))
        }
        None => print("add --measure for arithmetic and memory rates\n"),
    }
}
