//! `millrace tune`: measures which kernels are fastest on the GPU of this machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use millrace::compiler::codegen::cuda::{Builder, Trial, trials};
use millrace::compiler::compile::{Progress, prepare_with};
use millrace::compiler::tuning::Tuning;
use millrace::ir::Module;
use millrace::kernels::cuda::Arch;
use millrace::runtime::cuda::{DeviceInfo, Timer, has_library};
use millrace::tune::{Measured, TuneOptions, build_all, tune};
use millrace::{Engine, Error, Kind, Result};
use serde_json::json;

use super::compile::ModelOptions;
use super::{print, print_json, usage};

/// Measure which matmul kernels are fastest on this machine's GPU, for `compile --tuning`.
#[derive(clap::Args)]
pub struct Args {
    /// An engine of the target cuda, a model folder, or a file of IR text; with --merge, tuning files
    #[arg(required = true, value_name = "MODEL")]
    inputs: Vec<PathBuf>,
    /// The tuning file to write; entries of an existing one stay where they are better
    #[arg(short, long, required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Time for building and measuring, such as 60s or 5m
    #[arg(long, default_value = "60s", value_parser = duration)]
    time: Duration,
    /// Only the choices for these numbers of rows, such as 1,32,2048 [default: all]
    #[arg(long, value_name = "ROWS", value_delimiter = ',')]
    rows: Vec<u64>,
    /// Number of the GPU
    #[arg(long, default_value_t = 0)]
    gpu: u32,
    /// Merge tuning files: the better time of each key
    #[arg(long, conflicts_with_all = ["dry_run", "build"])]
    merge: bool,
    /// List sites and candidates; needs no GPU
    #[arg(long)]
    dry_run: bool,
    /// With --dry-run: build all candidates, so that the cache has them
    #[arg(long, requires = "dry_run")]
    build: bool,
    #[command(flatten)]
    model_options: ModelOptions,
    /// Measure kernels alone, even where cuBLASLt is installed
    #[arg(long)]
    no_library: bool,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Reads `90s`, `2m`, or a number of seconds.
pub fn duration(text: &str) -> std::result::Result<Duration, String> {
    let (number, unit) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60.0),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    let seconds = number.parse::<f64>().ok().map(|n| n * unit).filter(|s| (0.001..=86400.0).contains(s));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| format!("`{text}` is no time such as 60s or 5m"))
}

/// The architecture whose kernels a device runs, if `archs` has it.
fn arch_of(device: &DeviceInfo, archs: &[Arch]) -> Result<Arch> {
    let known =
        device.target().and_then(|t| archs.iter().find(|a| a.name() == t || t == "ptx" && a.is_virtual()));
    known.copied().ok_or_else(|| {
        let has: Vec<&str> = archs.iter().map(|a| a.name()).collect();
        let next = device.target().map_or("--target cpu".to_string(), |t| format!("--target cuda:{t}"));
        let message = format!("the target has {}; this GPU is sm_{}", has.join(", "), device.capability);
        Error::new(Kind::Incompatible, "cuda/arch", message).hint(format!("compile with {next}"))
    })
}

/// The module of an engine, or of a model up to its kernels, and its architectures.
fn module(path: &Path, options: &ModelOptions) -> Result<(Module, Vec<Arch>)> {
    let is_engine = path.is_file() && path.extension().is_none_or(|e| e != "ir");
    if is_engine {
        let engine = Engine::open(path)?;
        let archs = engine.file().kernels().filter_map(|(name, _)| Arch::parse(name)).collect();
        return Ok((engine.module().clone(), archs));
    }
    let options = options.resolve_or("cuda")?;
    let prepared = prepare_with(path, &options, None, &mut Progress::default())?;
    Ok((prepared.module, options.target.archs))
}

/// The trials of `module` for `arch`, those for `rows` if any are named.
fn choose(module: &Module, arch: Arch, rows: &[u64]) -> Vec<Trial> {
    let mut all = trials(module, arch);
    all.retain(|t| rows.is_empty() || rows.iter().any(|m| (t.rows.first..=t.rows.last).contains(m)));
    all
}

/// One line about a choice.
fn line(measured: &Measured) -> String {
    let rate = |seconds: f64| measured.operations / seconds / 1e12;
    let mut text = match (measured.seconds(), measured.chosen) {
        (Some((built_in, best)), Some(chosen)) => format!(
            "{}: {:.2} us built in, {:.2} us {} ({:+.1} %, {:.0} TFLOP/s), {} tried\n",
            measured.key,
            built_in * 1e6,
            best * 1e6,
            measured.times[chosen].0,
            (best / built_in - 1.0) * 100.0,
            rate(best),
            measured.times.len(),
        ),
        _ => match measured.times.first() {
            Some((name, seconds)) => format!(
                "{}: {:.2} us {name} ({:.0} TFLOP/s), no other\n",
                measured.key,
                seconds * 1e6,
                rate(*seconds)
            ),
            None => format!("{}: no choice\n", measured.key),
        },
    };
    if let Some((name, seconds)) = measured.by_library.map(|way| &measured.times[way]) {
        let best = measured.seconds().map_or(measured.times[0].1, |(_, best)| best);
        text.push_str(&format!(
            "  {name}: {:.2} us ({:+.1} %, {:.0} TFLOP/s), where cuBLASLt is installed\n",
            seconds * 1e6,
            (seconds / best - 1.0) * 100.0,
            rate(*seconds)
        ));
    }
    if let Some(seconds) = measured.library {
        text.push_str(&format!(
            "  cuBLASLt without what is fused: {:.2} us, {:.0} TFLOP/s\n",
            seconds * 1e6,
            rate(seconds)
        ));
    }
    let without_time = |why: &str| why.starts_with("no time");
    for (name, why) in measured.skipped.iter().filter(|(_, why)| !without_time(why)) {
        text.push_str(&format!("  left out {name}: {}\n", why.lines().next().unwrap_or("")));
    }
    let late = measured.skipped.iter().filter(|(_, why)| without_time(why)).count();
    if late > 0 {
        text.push_str(&format!("  no time left for {late} candidates\n"));
    }
    text
}

fn as_json(measured: &Measured) -> serde_json::Value {
    json!({
        "key": measured.key,
        "sites": measured.sites,
        "rows": measured.rows,
        "chosen": measured.chosen.map(|c| measured.times[c].0.clone()),
        "chosen_library": measured.by_library.map(|way| measured.times[way].0.clone()),
        "times": measured.times.iter().map(|(name, s)| json!({"candidate": name, "us": s * 1e6})).collect::<Vec<_>>(),
        "cublaslt_us": measured.library.map(|s| s * 1e6),
        "left_out": measured.skipped.iter().map(|(name, why)| json!({"candidate": name, "why": why})).collect::<Vec<_>>(),
    })
}

/// Measures the choices of a module on GPU `gpu`; progress goes to standard error.
///
/// # Errors
/// `cuda/no-driver` or `cuda/no-device` without a GPU, `cuda/arch` if `archs` lack its architecture.
pub fn measure(
    module: &Module,
    archs: &[Arch],
    rows: &[u64],
    gpu: u32,
    time: Duration,
    library: bool,
) -> Result<(Tuning, Vec<Measured>)> {
    let mut timer = Timer::open(gpu)?;
    let trials = choose(module, arch_of(timer.device(), archs)?, rows);
    if library && !has_library() {
        eprintln!("cuBLASLt is not installed: kernels are measured alone");
    }
    let mut all = Vec::new();
    let mut tell = |measured: &Measured| {
        eprint!("{}", line(measured));
        all.push(measured.clone());
    };
    let options = TuneOptions { time, builder: Builder::usual(), library };
    let tuning = tune(&mut timer, &trials, &options, &mut tell)?;
    Ok((tuning, all))
}

/// Writes a tuning file; entries of an existing one stay where they are better.
///
/// # Errors
/// `compile/tuning` for an existing file of another form, and what writing gives.
pub fn write(mut tuning: Tuning, path: &Path) -> Result<Tuning> {
    if path.exists() {
        tuning.merge(Tuning::read(path)?);
    }
    tuning.write(path)?;
    Ok(tuning)
}

fn list(args: &Args, path: &Path) -> Result<()> {
    let (module, archs) = module(path, &args.model_options)?;
    let mut out = Vec::new();
    for arch in archs {
        let trials = choose(&module, arch, &args.rows);
        let candidates: usize = trials.iter().map(|t| t.candidates.len()).sum();
        if !args.json {
            print(&format!("{arch}: {} choices, {candidates} candidates\n", trials.len()))?;
        }
        for trial in &trials {
            let wanted = trial.candidates.iter().filter(|c| !(args.no_library && c.by_library));
            let names: Vec<&str> = wanted.map(|c| c.name.as_str()).collect();
            if !args.json {
                let of = if trial.sites == 1 { "site" } else { "sites" };
                print(&format!("{} ({} {of}): {}\n", trial.key, trial.sites, names.join(", ")))?;
            }
            out.push(json!({"key": trial.key, "sites": trial.sites, "rows": trial.at, "candidates": names}));
        }
        if args.build {
            let (kernels, failed) = build_all(&trials, &Builder::usual());
            for why in &failed {
                eprintln!("left out: {why}");
            }
            if !args.json {
                print(&format!("{arch}: {} of {kernels} kernels built\n", kernels - failed.len()))?;
            }
        }
    }
    if args.json { print_json(&json!(out)) } else { Ok(()) }
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    if args.merge {
        let mut tuning = Tuning::default();
        for path in &args.inputs {
            tuning.merge(Tuning::read(path)?);
        }
        if let Some(output) = &args.output {
            tuning.write(output)?;
            print(&format!("wrote {}: {} entries\n", output.display(), tuning.entries.len()))?;
        }
        return Ok(());
    }
    let [path] = args.inputs.as_slice() else {
        return Err(
            usage("usage/one-model", "tune takes one model or engine").hint("several files are for --merge")
        );
    };
    if args.dry_run {
        return list(args, path);
    }
    // Without a GPU the rest of the work would be in vain.
    drop(Timer::open(args.gpu)?);
    let (module, archs) = module(path, &args.model_options)?;
    let (tuning, measured) = measure(&module, &archs, &args.rows, args.gpu, args.time, !args.no_library)?;
    let Some(output) = &args.output else { return Ok(()) };
    let tuning = write(tuning, output)?;
    if args.json {
        return print_json(&json!(measured.iter().map(as_json).collect::<Vec<_>>()));
    }
    let gains = measured.iter().filter(|m| m.chosen.is_some_and(|c| c > 0)).count();
    let by_library = measured.iter().filter(|m| m.by_library.is_some()).count();
    print(&format!(
        "{gains} of {} choices are faster than what is built in, {by_library} faster still by cuBLASLt\nwrote {}: {} entries\n",
        measured.len(),
        output.display(),
        tuning.entries.len()
    ))
}
