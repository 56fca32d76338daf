//! Runs one engine under several weight budgets in one session, and compares tokens and time per step.
//!
//! Compile an engine with `--weight-streaming`, then run
//! `cargo run --release --example weight_budgets -- ENGINE [PARTS] [BATCH] [PROMPT] [NEW]`, where PARTS are fractions of the
//! streamable bytes such as `1;0.5;0`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use millrace::generation::{Generator, Request};
use millrace::{Decoder, Engine, Error, Kind, Result, SessionOptions, WeightBudget};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, usual: usize| args.get(at).and_then(|a| a.parse().ok()).unwrap_or(usual);
    let path = args.first().ok_or_else(|| Error::new(Kind::Usage, "example/engine", "name an engine"))?;
    let parts = args.get(1).map_or("1;0.75;0.5;0.25;0", String::as_str);
    let (batch, prompt, new) = (number(2, 1), number(3, 128), number(4, 32));

    let engine = Engine::open(path)?;
    let mut session = engine
        .session(SessionOptions { kv_pages: pages(&engine, batch, prompt + new), ..Default::default() })?;
    println!("streamable {}, minimum {}", session.total_device_budget(), session.minimum_budget());
    let ids = |row: usize| (0..prompt).map(|i| (1 + row * 31 + i * 7) as u32 % 250).collect();
    let requests: Vec<Request> = (0..batch).map(|row| Request::greedy(ids(row), new)).collect();
    let mut expected = None;
    for part in parts.split(';').filter_map(|p| p.parse().ok()) {
        let begun = Instant::now();
        let placement = session.set_weight_budget(WeightBudget::Fraction(part))?;
        let (held, moved) = (placement.device_bytes(), placement.moved());
        let placed = begun.elapsed();
        session.reset_states();
        let mut times = Vec::new();
        let mut decoder = Decoder::new(&mut session)?;
        let begun = Instant::now();
        let answers = Generator::new(&mut decoder)?.generate(&requests, |row, _| {
            if row == 0 {
                times.push(begun.elapsed().as_secs_f64() * 1e3);
            }
        })?;
        let mut steps: Vec<f64> = times.windows(2).map(|t| t[1] - t[0]).collect();
        steps.sort_by(f64::total_cmp);
        let tokens: Vec<Vec<u32>> = answers.into_iter().map(|a| a.token_ids).collect();
        let same = *expected.get_or_insert_with(|| tokens.clone()) == tokens;
        println!(
            "{part}: weights hold {held}, a step moves {moved}; placed in {:.2} s, first token {:.1} ms, step {:.3} ms; {}",
            placed.as_secs_f64(),
            times.first().copied().unwrap_or(0.0),
            steps.get(steps.len() / 2).copied().unwrap_or(0.0),
            if same { "same tokens" } else { "OTHER TOKENS" },
        );
    }
    let ledger = session.ledger();
    println!("{ledger}");
    Ok(())
}

/// Cache pages for `batch` sequences of `tokens` tokens.
fn pages(engine: &Engine, batch: usize, tokens: usize) -> Option<u64> {
    let model = engine.manifest().model.as_ref()?;
    let per_page = model.tokens_per_block.max(1) as usize;
    Some((batch * tokens.div_ceil(per_page)) as u64)
}
