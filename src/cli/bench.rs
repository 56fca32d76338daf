//! `millrace bench`: the field's sweep over batch sizes and lengths.

mod profile;
mod replay;
mod report;

use std::path::PathBuf;
use std::time::Instant;

use millrace::fit::Step;
use millrace::generation::{EmbedModel, Generator, Request};
use millrace::ir::cost::Sustained;
use millrace::ir::manifest::ModelKind;
use millrace::ir::weights::normal;
use millrace::kernels::cpu::Isa;
use millrace::{Allocation, Class, Decoder, Encoder, Engine, Profile, Result, Session, WeightBudget};
use serde_json::json;

use super::ceilings::Ceilings;
use super::compile::ModelOptions;
use super::memory::{MemoryOptions, tell_shrinks};
use super::run::open;
use super::usage;
use profile::Trace;

/// Time prefill and decoding, or encoding, over batch sizes and lengths.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file or a model folder
    engine: PathBuf,
    /// Batch sizes, separated by semicolons
    #[arg(long, default_value = "1")]
    batch_size: String,
    /// Input and output lengths, such as 256,32;128,128; encoders need no output length
    #[arg(long, default_value = "128,32")]
    input_output_len: String,
    /// Counted runs of each row, after one that is not
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Form of the report: table, md, csv or json
    #[arg(short, long, default_value = "table")]
    output: String,
    /// The same as --output csv
    #[arg(long, conflicts_with = "output")]
    csv: bool,
    /// One more run of each row, timed kernel by kernel against measured ceilings
    #[arg(long)]
    profile: bool,
    /// Write that run as Chrome trace events, one for each node
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    model_options: ModelOptions,
}

/// Smallest, median and largest.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
    [at(0), at(values.len() / 2), at(values.len().saturating_sub(1))]
}

/// One row of the sweep.
#[derive(Clone, Copy)]
struct Work {
    batch: usize,
    input: usize,
    /// New tokens; encoders make none.
    output: usize,
}

/// Milliseconds of one run: to the first token of every sequence (or the whole step of an encoder), and each decode
/// step after it.
struct Times {
    first: f64,
    decode: f64,
}

/// Token ids of sequence `index`.
fn token_ids(engine: &Engine, index: usize, length: usize) -> Vec<u32> {
    let vocab = engine.manifest().model.as_ref().map_or(2, |m| m.vocab_size);
    (0..length)
        .map(|i| ((normal(index as u64 + 1, i as u64).abs() * 0.37).fract() * vocab as f64) as u32)
        .map(|t| t.min(vocab as u32 - 1))
        .collect()
}

fn generate(engine: &Engine, session: &mut Session<'_>, work: Work) -> Result<Times> {
    let requests: Vec<Request> = (0..work.batch)
        .map(|b| Request {
            stop_at_eos: false,
            ..Request::greedy(token_ids(engine, b, work.input), work.output)
        })
        .collect();
    let mut model = Decoder::new(session)?;
    let mut generator = Generator::new(&mut model)?;
    let start = Instant::now();
    // A prefill of several steps gives some sequences later tokens before others have their first.
    let mut first = None;
    let mut begun = vec![false; work.batch];
    let mut waiting = work.batch;
    generator.generate(&requests, |request, _| {
        if !std::mem::replace(&mut begun[request], true) {
            waiting -= 1;
            if waiting == 0 {
                first = Some(start.elapsed());
            }
        }
    })?;
    let total = start.elapsed().as_secs_f64();
    let first = first.map_or(total, |f| f.as_secs_f64());
    let decode = (total - first) * 1e3 / work.output.saturating_sub(1).max(1) as f64;
    Ok(Times { first: first * 1e3, decode })
}

fn encode(engine: &Engine, session: &mut Session<'_>, work: Work) -> Result<Times> {
    let ids: Vec<Vec<u32>> = (0..work.batch).map(|b| token_ids(engine, b, work.input)).collect();
    let mut model = Encoder::new(session)?;
    let limits = model.limits();
    let (batch, length, tokens) = (limits.max_batch_size, limits.max_input_len, limits.max_num_tokens);
    if work.batch > batch || work.input > length || work.batch * work.input > tokens {
        let message = format!("{} x {} does not fit the engine", work.batch, work.input);
        return Err(usage("usage/sweep", message).hint(format!(
            "it takes {batch} sequences of {length} tokens, {tokens} in all: compile with larger limits"
        )));
    }
    let start = Instant::now();
    model.embed(&ids)?;
    Ok(Times { first: start.elapsed().as_secs_f64() * 1e3, decode: 0.0 })
}

/// What stays the same over the sweep.
struct Sweep<'a> {
    args: &'a Args,
    engine: &'a Engine,
    kind: ModelKind,
    threads: usize,
    hardware: String,
    build: String,
}

impl Sweep<'_> {
    fn once(&self, session: &mut Session<'_>, work: Work) -> Result<Times> {
        match self.kind {
            ModelKind::Encoder => encode(self.engine, session, work),
            _ => generate(self.engine, session, work),
        }
    }

    /// The row's cells by column, and the profile if one was asked for.
    fn row(
        &self,
        session: &mut Session<'_>,
        work: Work,
        profiled: bool,
    ) -> Result<(report::Cells, Option<Profile>)> {
        let (mut first, mut decode) = (Vec::new(), Vec::new());
        for run in 0..=self.args.runs {
            let times = self.once(session, work)?;
            if run > 0 {
                first.push(times.first);
                decode.push(times.decode);
            }
        }
        let round = |v: f64| json!((v * 1e4).round() / 1e4);
        let rate = |count: usize, ms: f64| round(if ms > 0.0 { count as f64 * 1e3 / ms } else { 0.0 });
        let ([f_min, f, f_max], [d_min, d, d_max]) = (spread(first), spread(decode));
        let mut cells = vec![("batch_size", json!(work.batch)), ("input_len", json!(work.input))];
        if self.kind == ModelKind::Encoder {
            cells.extend([
                ("step_ms", round(f)),
                ("step_ms_min", round(f_min)),
                ("step_ms_max", round(f_max)),
                ("sequences_per_s", rate(work.batch, f)),
                ("tokens_per_s", rate(work.batch * work.input, f)),
            ]);
        } else {
            cells.extend([
                ("output_len", json!(work.output)),
                ("prefill_ms", round(f)),
                ("prefill_ms_min", round(f_min)),
                ("prefill_ms_max", round(f_max)),
                ("decode_ms_per_step", round(d)),
                ("decode_ms_min", round(d_min)),
                ("decode_ms_max", round(d_max)),
                ("decode_tokens_per_s", rate(work.batch, d)),
            ]);
        }
        cells.extend(self.placed(session, work, &round));
        cells.extend([
            ("activation_bytes", json!(session.ledger().peak(Class::Activations))),
            ("library", json!(library(session))),
            ("runs", json!(self.args.runs)),
            ("threads", json!(self.threads)),
            ("hardware", json!(self.hardware)),
            ("build", json!(self.build)),
        ]);
        let mut profile = None;
        if profiled {
            session.attach_profile(Profile::new());
            self.once(session, work)?;
            profile = session.detach_profile();
        }
        Ok((cells, profile))
    }

    /// Where the weights are, what a step streams, and what a step after half of the output is predicted to take.
    fn placed(
        &self,
        session: &Session<'_>,
        work: Work,
        round: &dyn Fn(f64) -> serde_json::Value,
    ) -> [(&'static str, serde_json::Value); 6] {
        let (demand, placement) = session.placement();
        let (batch, input, output) = (work.batch as u64, work.input as u64, work.output as u64);
        let step = match self.kind {
            ModelKind::Encoder => Step { batch, tokens: input, past: 0 },
            _ => Step { batch, tokens: 1, past: input + output / 2 },
        };
        let (module, manifest) = (self.engine.module(), self.engine.manifest());
        let device = Sustained::of_target(&manifest.target);
        let told = step.predict((module, manifest), &device, (demand, placement));
        [
            ("weights_budget", json!(session.current_weight_budget().to_string())),
            ("resident_bytes", json!(placement.resident_bytes)),
            ("ring_bytes", json!(placement.ring_bytes())),
            ("streamed_bytes_per_step", json!(placement.moved())),
            ("predicted_ms", round(told.time as f64 / 1e6)),
            ("predicted_stall_ms", round(told.stalled() as f64 / 1e6)),
        ]
    }
}

/// What a library did in the last step: nothing to tell where the engine names none.
fn library(session: &Session<'_>) -> String {
    match session.library_report() {
        None => String::new(),
        Some(report) => match report.version {
            Some(version) => format!("cuBLASLt {version}: {} products a step", report.last_products),
            None => "kernels".to_string(),
        },
    }
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

/// Every pair of a batch size and lengths.
fn sweep(args: &Args, kind: ModelKind) -> Result<Vec<Work>> {
    let batches = numbers(&args.batch_size, ';')?;
    let mut lengths = Vec::new();
    for pair in args.input_output_len.split(';').filter(|p| !p.trim().is_empty()) {
        match numbers(pair, ',')?.as_slice() {
            [input] if kind == ModelKind::Encoder => lengths.push((*input, 0)),
            [input, output] => lengths.push((*input, *output)),
            _ => {
                return Err(usage("usage/sweep", format!("`{pair}` is no pair of lengths"))
                    .hint("write 256,32;128,128"));
            }
        }
    }
    Ok(batches
        .iter()
        .flat_map(|batch| lengths.iter().map(|(input, output)| (*batch, *input, *output)))
        .map(|(batch, input, output)| Work { batch, input, output })
        .collect())
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let form = if args.csv { report::Form::Csv } else { report::Form::parse(&args.output)? };
    if args.profile && form == report::Form::Csv {
        return Err(usage("usage/output", "a profile does not fit into one table of csv")
            .hint("use --output json, md or table"));
    }
    let (engine, _scratch) = open(&args.engine, &args.model_options)?;
    let kind = engine.manifest().kind;
    if kind != ModelKind::Encoder {
        engine.need_kind(ModelKind::Decoder)?;
    }
    let works = sweep(args, kind)?;
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.memory.resolve()?.threads.unwrap_or(all).max(1);
    let sweep = Sweep {
        args,
        engine: &engine,
        kind,
        threads,
        hardware: format!("{} {:?} {threads} threads", std::env::consts::ARCH, Isa::detect()),
        build: format!(
            "millrace {} engine {}",
            env!("CARGO_PKG_VERSION"),
            &millrace::compiler::compile::hex(&engine.file().identity())[..12]
        ),
    };
    let mut ceilings = None;
    let mut trace = args.trace.as_ref().map(|_| Trace::default());
    let mut rows = Vec::new();
    // One session serves all rows if its memory does not depend on them: loading weights may take longer than a row. Budgets
    // change while it lives.
    let fractions = args.memory.fractions()?;
    let budgets: Vec<Option<f64>> =
        fractions.map_or_else(|| vec![None], |list| list.into_iter().map(Some).collect());
    let mut kept = None;
    let mut told = 0;
    for (budget, work) in budgets.iter().flat_map(|b| works.iter().map(move |w| (*b, *w))) {
        let mut options = args.memory.resolve()?;
        if let Some(fraction) = budget {
            options.budget = WeightBudget::Fraction(fraction);
        }
        let shared = options.allocation == Allocation::Static;
        let session = match kept.take() {
            Some(session) if shared => kept.insert(session),
            _ => {
                let session = kept.insert(engine.session(options.clone())?);
                tell_shrinks(session);
                args.memory.tell_library(session);
                told = session.library_report().map_or(0, |report| report.reasons.len());
                session
            }
        };
        if budget.is_some() && session.current_weight_budget() != options.budget {
            session.set_weight_budget(options.budget)?;
        }
        if args.profile && ceilings.is_none() {
            // Beside the session: what it measures needs little memory.
            ceilings = Some(Ceilings::of(session.device(), threads)?);
        }
        let (cells, recorded) = sweep.row(session, work, args.profile || args.trace.is_some())?;
        let title = match budget {
            Some(part) => format!("batch {}, input {}, {}% of weights", work.batch, work.input, part * 100.0),
            None => format!("batch {}, input {}", work.batch, work.input),
        };
        if let (Some(trace), Some(recorded)) = (&mut trace, &recorded) {
            trace.add(&title, engine.module(), recorded, ceilings);
        }
        let profile = match ceilings.zip(recorded) {
            Some((ceilings, recorded)) => {
                let replayed = replay::replay(session, engine.module(), &recorded)?;
                Some(profile::summarise(engine.module(), &recorded, ceilings, replayed))
            }
            None => None,
        };
        rows.push(report::Row { title, cells, profile });
    }
    // What the library did not take shows when it is asked.
    if let Some(session) = &kept
        && session.library_report().is_some_and(|report| report.reasons.len() > told)
    {
        args.memory.tell_library(session);
    }
    report::write(form, &rows)?;
    match (&args.trace, trace) {
        (Some(path), Some(trace)) => trace.write(path),
        _ => Ok(()),
    }
}
