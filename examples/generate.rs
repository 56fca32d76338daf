//! Compiles the example model, opens the engine and generates text from two prompts in one batch.
//!
//! Run with `cargo run --release --example generate`.
#![allow(clippy::print_stdout)]

use std::path::Path;

use millrace::generation::{Generator, Request};
use millrace::{CompileOptions, Decoder, Engine, Result, SessionOptions, compile};

fn main() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/models/baker-street-6m");
    let file = std::env::temp_dir().join(format!("millrace-example-{}.engine", std::process::id()));
    compile(&folder, &CompileOptions::default(), None)?.write(&file, &mut |_, _| {})?;

    let engine = Engine::open(&file)?;
    let tokenizer = engine.tokenizer()?;
    let mut session = engine.session(SessionOptions::default())?;
    let mut model = Decoder::new(&mut session)?;
    let prompts = ["\"My dear Holmes,\" said I,", "It was a dark and stormy night, and"];
    let requests = prompts
        .iter()
        .map(|p| Ok(Request::greedy(tokenizer.encode(p, true)?, 24)))
        .collect::<Result<Vec<_>>>()?;
    for (prompt, completion) in
        prompts.iter().zip(Generator::new(&mut model)?.generate(&requests, |_, _| {})?)
    {
        println!("{prompt}{}\n", tokenizer.decode(completion.text_ids(), true)?);
    }
    drop(session);
    std::fs::remove_file(&file).map_err(|e| millrace::Error::io("remove", &file, &e))
}
