//! `millrace bench`: the field's sweep over batch sizes and lengths.

use std::path::PathBuf;
use std::time::Instant;

use millrace::generation::{Generator, Request};
use millrace::ir::manifest::ModelKind;
use millrace::ir::weights::normal;
use millrace::kernels::cpu::Isa;
use millrace::{Class, Decoder, Engine, Result};
use serde_json::json;

use super::compile::ModelOptions;
use super::run::{MemoryOptions, open};
use super::{print, print_json, usage};

/// Time prefill and decoding over batch sizes and lengths.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file or a model folder
    engine: PathBuf,
    /// Batch sizes, separated by semicolons
    #[arg(long, default_value = "1")]
    batch_size: String,
    /// Input and output lengths, such as 256,32;128,128
    #[arg(long, default_value = "128,32")]
    input_output_len: String,
    /// Counted runs of each row, after one that is not
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Form of the report: table, md, csv or json
    #[arg(short, long, default_value = "table")]
    output: String,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    model_options: ModelOptions,
}

struct Row {
    batch: usize,
    input: usize,
    output: usize,
    prefill_ms: [f64; 3],
    decode_ms: [f64; 3],
    activations: u64,
}

fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
    [at(0), at(values.len() / 2), at(values.len().saturating_sub(1))]
}

fn measure(args: &Args, engine: &Engine, batch: usize, input: usize, output: usize) -> Result<Row> {
    let vocab = engine.manifest().model.as_ref().map_or(2, |m| m.vocab_size);
    let requests: Vec<Request> = (0..batch)
        .map(|b| {
            let ids = (0..input)
                .map(|i| ((normal(b as u64 + 1, i as u64).abs() * 0.37).fract() * vocab as f64) as u32)
                .map(|t| t.min(vocab as u32 - 1))
                .collect();
            Request { stop_at_eos: false, ..Request::greedy(ids, output) }
        })
        .collect();
    let mut session = engine.session(args.memory.resolve()?)?;
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for run in 0..=args.runs {
        let mut model = Decoder::new(&mut session)?;
        let mut generator = Generator::new(&mut model)?;
        let start = Instant::now();
        let mut first = None;
        let mut seen = 0;
        generator.generate(&requests, |_, _| {
            seen += 1;
            if seen == batch {
                first = Some(start.elapsed());
            }
        })?;
        let total = start.elapsed().as_secs_f64();
        if run > 0 {
            let first = first.map_or(total, |f| f.as_secs_f64());
            prefill.push(first * 1e3);
            decode.push((total - first) * 1e3 / output.saturating_sub(1).max(1) as f64);
        }
    }
    let activations = session.ledger().peak(Class::Activations);
    Ok(Row { batch, input, output, prefill_ms: spread(prefill), decode_ms: spread(decode), activations })
}

fn numbers(text: &str, separator: char) -> Result<Vec<usize>> {
    text.split(separator)
        .map(str::trim)
        .filter(|t| !t.is_empty())
        .map(|t| {
            t.parse().ok().filter(|n| *n > 0).ok_or_else(|| {
                usage("usage/sweep", format!("`{t}` is no positive number"))
                    .hint("write --batch-size \"1;32\" --input-output-len \"256,32;128,128\"")
            })
        })
        .collect()
}

const COLUMNS: [&str; 15] = [
    "batch_size",
    "input_len",
    "output_len",
    "prefill_ms",
    "prefill_ms_min",
    "prefill_ms_max",
    "decode_ms_per_step",
    "decode_ms_min",
    "decode_ms_max",
    "decode_tokens_per_s",
    "activation_bytes",
    "runs",
    "threads",
    "hardware",
    "build",
];

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    if !["table", "md", "csv", "json"].contains(&args.output.as_str()) {
        return Err(
            usage("usage/output", format!("`{}` is no form", args.output)).hint("use table, md, csv or json")
        );
    }
    let batches = numbers(&args.batch_size, ';')?;
    let mut lengths = Vec::new();
    for pair in args.input_output_len.split(';').filter(|p| !p.trim().is_empty()) {
        match numbers(pair, ',')?.as_slice() {
            [input, output] => lengths.push((*input, *output)),
            _ => {
                return Err(usage("usage/sweep", format!("`{pair}` is no pair of lengths"))
                    .hint("write 256,32;128,128"));
            }
        }
    }
    let (engine, _scratch) = open(&args.engine, &args.model_options)?;
    engine.need_kind(ModelKind::Decoder)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let hardware = format!("{} {:?} {threads} threads", std::env::consts::ARCH, Isa::detect());
    let build = format!(
        "millrace {} engine {}",
        env!("CARGO_PKG_VERSION"),
        &millrace::compiler::compile::hex(&engine.file().identity())[..12]
    );
    let mut rows: Vec<Vec<serde_json::Value>> = Vec::new();
    for batch in &batches {
        for (input, output) in &lengths {
            let row = measure(args, &engine, *batch, *input, *output)?;
            let [p_min, p, p_max] = row.prefill_ms;
            let [d_min, d, d_max] = row.decode_ms;
            let round = |v: f64| json!((v * 1e4).round() / 1e4);
            let rate = if d > 0.0 { row.batch as f64 * 1e3 / d } else { 0.0 };
            rows.push(vec![
                json!(row.batch),
                json!(row.input),
                json!(row.output),
                round(p),
                round(p_min),
                round(p_max),
                round(d),
                round(d_min),
                round(d_max),
                round(rate),
                json!(row.activations),
                json!(args.runs),
                json!(threads),
                json!(hardware),
                json!(build),
            ]);
        }
    }
    let cell = |v: &serde_json::Value| v.as_str().map_or_else(|| v.to_string(), str::to_string);
    match args.output.as_str() {
        "json" => {
            let objects = rows.iter().map(|row| {
                COLUMNS
                    .iter()
                    .map(|c| c.to_string())
                    .zip(row.iter().cloned())
                    .collect::<serde_json::Map<_, _>>()
            });
            print_json(&json!(objects.collect::<Vec<_>>()))
        }
        "csv" => {
            print(&format!("{}\n", COLUMNS.join(",")))?;
            rows.iter().try_for_each(|row| {
                print(&format!("{}\n", row.iter().map(cell).collect::<Vec<_>>().join(",")))
            })
        }
        "md" => {
            print(&format!("| {} |\n|{}\n", COLUMNS.join(" | "), " --- |".repeat(COLUMNS.len())))?;
            rows.iter().try_for_each(|row| {
                print(&format!("| {} |\n", row.iter().map(cell).collect::<Vec<_>>().join(" | ")))
            })
        }
        _ => {
            print(&format!(
                "{hardware}, {build}\n{:>6} {:>6} {:>6} {:>22} {:>26} {:>10}\n",
                "batch", "input", "output", "prefill ms", "decode ms a step", "tokens/s"
            ))?;
            rows.iter().try_for_each(|r| {
                let f = |i: usize| r[i].as_f64().unwrap_or(0.0);
                print(&format!(
                    "{:>6} {:>6} {:>6} {:>8.2} ({:>5.2}..{:>5.2}) {:>10.3} ({:>6.3}..{:>6.3}) {:>10.1}\n",
                    cell(&r[0]),
                    cell(&r[1]),
                    cell(&r[2]),
                    f(3),
                    f(4),
                    f(5),
                    f(6),
                    f(7),
                    f(8),
                    f(9)
                ))
            })
        }
    }
}
