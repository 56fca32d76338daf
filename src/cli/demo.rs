//! `millrace demo`: the whole way on the example model.

use std::path::PathBuf;
use std::time::Instant;

use millrace::generation::{Generator, Request};
use millrace::ir::{Error, Kind};
use millrace::{Allocation, CompileOptions, Decoder, Engine, Result, SessionOptions, compile};

use super::compile::plan_line;
use super::run::Scratch;
use super::{print, size};

/// Compile the example model, show its memory plan, and generate text with static and with dynamic allocation.
#[derive(clap::Args)]
pub struct Args {
    /// Model folder
    #[arg(long, default_value = "examples/models/baker-street-6m")]
    model: PathBuf,
    /// The prompt
    #[arg(long, default_value = "It was a dark and stormy night, and")]
    prompt: String,
    /// New tokens
    #[arg(long, default_value_t = 48)]
    max_new_tokens: usize,
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut options = CompileOptions::default();
    options.import.precision = millrace::compiler::import::Precision::Fixed(millrace::ir::DType::F32);
    let compiled = compile(&args.model, &options, None)
        .map_err(|e| e.hint("run the demo from the repository's root, or name a folder with --model"))?;
    let scratch = Scratch::new()?;
    let file = scratch.0.join("demo.engine");
    let written = compiled.write(&file, &mut |_, _| {})?;
    print(&format!(
        "compiled {} to {} in {:.2} s\nplan: {}\n",
        args.model.display(),
        size::show(written.len),
        start.elapsed().as_secs_f64(),
        plan_line(&compiled)
    ))?;
    let engine = Engine::open(&file)?;
    let tokenizer = engine.tokenizer()?;
    let request = Request::greedy(tokenizer.encode(&args.prompt, true)?, args.max_new_tokens);
    let mut all = Vec::new();
    for allocation in [Allocation::Static, Allocation::Dynamic] {
        let mut session = engine.session(SessionOptions { allocation, ..SessionOptions::default() })?;
        let start = Instant::now();
        let mut model = Decoder::new(&mut session)?;
        let completion =
            Generator::new(&mut model)?.generate(std::slice::from_ref(&request), |_, _| {})?.remove(0);
        let seconds = start.elapsed().as_secs_f64();
        print(&format!(
            "\n{allocation:?} allocation: {} tokens in {seconds:.3} s ({:.0} tokens/s)\n",
            completion.token_ids.len(),
            completion.token_ids.len() as f64 / seconds
        ))?;
        let ledger = session.ledger();
        for class in ledger.classes() {
            print(&format!(
                "  {:<12} {:>12} now, {:>12} at most\n",
                class.name(),
                size::show(ledger.now(class)),
                size::show(ledger.peak(class))
            ))?;
        }
        if all.is_empty() {
            print(&format!("\n{}{}\n", args.prompt, tokenizer.decode(completion.text_ids(), true)?))?;
        }
        all.push(completion.token_ids);
    }
    if all[0] != all[1] {
        return Err(Error::new(
            Kind::Mismatch,
            "demo/mismatch",
            "static and dynamic allocation gave different tokens",
        ));
    }
    print("\nboth gave the same tokens\n")
}
