//! Steps of a decoder engine on the CPU under a weight budget, beside reading the same file.
//!
//! `cargo bench --bench cpu_streaming -- ENGINE BUDGET_MIB [STEPS]`; a budget of 0 maps the whole file. Prints what is resident and
//! what moves, the times of decode steps of one token, the peak resident set, and how fast threads that do nothing else
//! read the same file, past the page cache: after every step, since a shared disk changes its rate from minute to minute.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millrace::generation::{StepInputs, StepModel};
use millrace::runtime::WeightBudget;
use millrace::{Allocation, Decoder, Engine, Error, Kind, Profile, Result, SessionOptions};

/// `O_DIRECT` of Linux on x86-64.
const DIRECT: i32 = 0o40_000;

/// Threads and bytes of a read, as the runtime has them.
const THREADS: usize = 4;
const CHUNK: u64 = 4 << 20;

fn io(error: std::io::Error) -> Error {
    Error::new(Kind::BadInput, "bench/read", error.to_string())
}

/// Memory on a page.
fn aligned(buffer: &mut Vec<u8>) -> &mut [u8] {
    buffer.resize(CHUNK as usize + 4096, 0);
    let skip = buffer.as_ptr().align_offset(4096);
    &mut buffer[skip..skip + CHUNK as usize]
}

/// GB/s of reading `len` bytes from `start`, which lies on a page.
fn read_rate(path: &str, start: u64, len: u64, flags: i32) -> std::io::Result<f64> {
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let next = AtomicU64::new(0);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let read = || -> std::io::Result<u64> {
            let (mut buffer, mut done) = (Vec::new(), 0);
            let out = aligned(&mut buffer);
            loop {
                let at = next.fetch_add(CHUNK, Ordering::Relaxed);
                if at + CHUNK > len {
                    return Ok(done);
                }
                file.read_exact_at(out, start + at)?;
                done += CHUNK;
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(read)).collect();
        let mut total = 0;
        for thread in threads {
            total += thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a reader panicked")))?;
        }
        Ok(total as f64 / begin.elapsed().as_secs_f64() / 1e9)
    })
}

/// A line of `/proc/self/status` in MiB.
fn status(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default();
    line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse::<f64>().unwrap_or(0.0) / 1024.0
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn run(path: &str, budget: u64, steps: usize) -> Result<()> {
    let engine = Engine::open(path)?;
    let (start, len) = engine.file().weights_range().unwrap_or_default();
    println!("{:.3} GB of weights; resident set {:.0} MiB after opening", len as f64 / 1e9, status("VmRSS"));
    let rate = |flags: i32| read_rate(path, start, len, flags).map_err(io);
    let options = SessionOptions {
        allocation: Allocation::Dynamic,
        budget: if budget > 0 { WeightBudget::Bytes(budget << 20) } else { WeightBudget::Resident },
        ..SessionOptions::default()
    };
    let begin = Instant::now();
    let mut session = engine.session(options)?;
    println!("session in {:.3} s; {}", begin.elapsed().as_secs_f64(), session.ledger());
    let moved = session.placement().1.moved();
    println!("a step moves {:.3} GB in {} tiles", moved as f64 / 1e9, session.placement().1.copies.len());
    let (mut times, mut rates) = (Vec::new(), Vec::new());
    for step in 0..steps {
        session.attach_profile(Profile::new());
        let mut model = Decoder::new(&mut session)?;
        let at = step as i32;
        let inputs = StepInputs {
            token_ids: vec![1000 + at],
            positions: vec![at],
            seq_starts: vec![0, 1],
            kv_lens: vec![at + 1],
            block_table: vec![0],
            pages_per_seq: 1,
            logit_rows: vec![0],
        };
        let begin = Instant::now();
        model.step(&inputs, &mut Vec::new())?;
        let time = begin.elapsed().as_secs_f64();
        let profile = session.detach_profile().unwrap_or_default();
        let spans = profile.steps.iter().flat_map(|s| &s.spans);
        let (stall, bytes) =
            spans.fold((Duration::ZERO, 0), |(time, bytes), s| (time + s.stall, bytes + s.streamed));
        println!(
            "step {step}: {time:.3} s, {:.3} s of it waiting, {:.3} GB streamed, {:.3} GB/s",
            stall.as_secs_f64(),
            bytes as f64 / 1e9,
            bytes as f64 / time / 1e9
        );
        times.push(bytes as f64 / time / 1e9);
        if budget > 0 {
            rates.push(rate(DIRECT)?);
            println!("    reading alone: {:.3} GB/s", rates[step]);
        }
    }
    println!("peak resident set {:.0} MiB", status("VmHWM"));
    if budget > 0 {
        let (step, alone) = (median(&mut times), median(&mut rates));
        println!("medians: {step:.3} GB/s in steps, {alone:.3} GB/s alone: {:.1} %", step / alone * 100.0);
    }
    Ok(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let number = |at: usize, usual: u64| arguments.get(at).and_then(|a| a.parse().ok()).unwrap_or(usual);
    let Some(path) = arguments.first() else {
        eprintln!("usage: cargo bench --bench cpu_streaming -- ENGINE BUDGET_MIB [STEPS]");
        return;
    };
    if let Err(error) = run(path, number(1, 0), number(2, 3) as usize) {
        eprintln!("{error}");
        std::process::exit(1);
    }
}
