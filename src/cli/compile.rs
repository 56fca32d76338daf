//! `millrace compile`: a model folder or IR file becomes an engine.

use std::path::PathBuf;

use indicatif::{ProgressBar, ProgressStyle};
use millrace::compiler::Registry;
use millrace::compiler::codegen::WeightMode;
use millrace::compiler::compile::{Progress, SourceModel, finish, prepare_with};
use millrace::compiler::import::{Options, Precision};
use millrace::compiler::memory::PhasePeak;
use millrace::compiler::pass::Context;
use millrace::compiler::pipeline::{Manager, Observer, Pipeline};
use millrace::compiler::target::TargetChoice;
use millrace::compiler::tuning::Tuning;
use millrace::ir::shape_profile::restrict;
use millrace::ir::{DType, Module, ShapeProfile, text};
use millrace::page::{Facts, Recorder, page};
use millrace::runtime::cuda::Timer;
use millrace::{CompileOptions, Compiled, Error, Result};
use serde_json::json;

use super::control::Control;
use super::{print, print_json, size, usage};

/// Compile a model folder or an .ir file into an engine.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face model folder, or a file of IR text
    model: PathBuf,
    /// The engine to write; with --stop-at, the module as IR text
    #[arg(short, long, required_unless_present_any = ["dry_run", "stop_at"])]
    output: Option<PathBuf>,
    #[command(flatten)]
    pub model_options: ModelOptions,
    /// Shapes the engine is for, such as decode:t=1..64/8,b=1..64/8; repeat for several. Symbols without a range keep that of
    /// the limits
    #[arg(long, value_name = "NAME:SYMBOL=MIN..MAX/OPT,..")]
    profile: Vec<String>,
    /// Leave weights out; loading binds them to the model folder by name and hash
    #[arg(long)]
    strip_weights: bool,
    /// Store also the weights that loading could compute, such as those of --dummy-weights
    #[arg(long, conflicts_with = "strip_weights")]
    complete_weights: bool,
    #[command(flatten)]
    control: Control,
    /// Measure kernels on this machine's GPU for this time first; with --tuning, into that file
    #[arg(long, value_name = "TIME", value_parser = super::tune::duration)]
    tune: Option<std::time::Duration>,
    /// Name no library in the engine, whatever the tuning chose; with --tune, measure none
    #[arg(long)]
    no_library: bool,
    /// Write a page about the engine and what the passes did
    #[arg(long, value_name = "PAGE")]
    html: Option<PathBuf>,
    /// Plan everything, write no engine
    #[arg(long)]
    dry_run: bool,
    /// Bound on the compiler's own memory, with a unit: buffers and kernel threads shrink to stay under it
    #[arg(long, value_name = "SIZE")]
    host_mem_limit: Option<String>,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Options that shape the engine; `run DIR` and `eval DIR` take them too.
#[derive(clap::Args, Clone, Default)]
pub struct ModelOptions {
    /// Target of the kernels: cpu, cuda, or architectures such as cuda:sm_90a,sm_80,ptx [default: cpu]
    #[arg(long)]
    target: Option<String>,
    /// Files of `millrace tune` that choose kernels of GPU engines
    #[arg(long, value_name = "FILE")]
    tuning: Vec<PathBuf>,
    /// Element type: auto, float32, float16 or bfloat16
    #[arg(long, default_value = "auto")]
    pub dtype: String,
    /// Most sequences of a step [default: 8]
    #[arg(long, value_name = "N")]
    max_batch_size: Option<u64>,
    /// Longest prompt in tokens [default: max-seq-len]
    #[arg(long, value_name = "N")]
    max_input_len: Option<u64>,
    /// Longest sequence in tokens [default: the model's, at most 8192]
    #[arg(long, value_name = "N")]
    max_seq_len: Option<u64>,
    /// Most packed tokens of a step
    #[arg(long, value_name = "N")]
    max_num_tokens: Option<u64>,
    /// Most rows of logits of a step [default: max-batch-size]
    #[arg(long, value_name = "N")]
    max_logit_rows: Option<u64>,
    /// Mark weights for streaming
    #[arg(long)]
    weight_streaming: bool,
    /// Seeded random weights; only config.json is read
    #[arg(long)]
    dummy_weights: bool,
    /// Accept symbolic links among the weight files
    #[arg(long)]
    follow_links: bool,
    /// Passes to run instead of a level, such as canonicalize,dce,...
    #[arg(long, value_name = "PASSES", conflicts_with = "opt_level")]
    pipeline: Option<String>,
    /// Optimisation level
    #[arg(short = 'O', value_name = "LEVEL", default_value = "2", value_parser = clap::value_parser!(u8).range(0..=2))]
    opt_level: u8,
}

impl ModelOptions {
    /// The compiler's options.
    ///
    /// # Errors
    /// Unknown target or element type, malformed pipeline.
    pub fn resolve(&self) -> Result<CompileOptions> {
        let mut options = self.resolve_or("cpu")?;
        for path in &self.tuning {
            options.tuning.merge(Tuning::read(path)?);
        }
        Ok(options)
    }

    /// The same with another default target, and without the tuning.
    ///
    /// # Errors
    /// As [`ModelOptions::resolve`].
    pub fn resolve_or(&self, target: &str) -> Result<CompileOptions> {
        let target = TargetChoice::parse(self.target.as_deref().unwrap_or(target))?;
        let precision = match self.dtype.as_str() {
            "auto" => Precision::Auto,
            "float32" | "f32" => Precision::Fixed(DType::F32),
            "float16" | "f16" => Precision::Fixed(DType::F16),
            "bfloat16" | "bf16" => Precision::Fixed(DType::BF16),
            other => {
                return Err(usage("usage/dtype", format!("`{other}` is no element type"))
                    .hint("use auto, float32, float16 or bfloat16"));
            }
        };
        let pipeline = match &self.pipeline {
            Some(text) => Pipeline::parse(text)?,
            None => target.level(self.opt_level as usize),
        };
        Ok(CompileOptions {
            import: Options {
                precision,
                max_batch_size: self.max_batch_size,
                max_input_len: self.max_input_len,
                max_seq_len: self.max_seq_len,
                max_num_tokens: self.max_num_tokens,
                max_logit_rows: self.max_logit_rows,
                dummy_weights: self.dummy_weights,
                follow_links: self.follow_links,
            },
            pipeline,
            weight_streaming: self.weight_streaming,
            weights: WeightMode::Stored,
            target,
            ..CompileOptions::default()
        })
    }
}

impl Args {
    /// The options of a compilation that measures first: a target with kernels to choose from, a GPU, and the tuning
    /// file, which need not be there yet.
    fn tuned(&self) -> Result<CompileOptions> {
        let mut options = self.model_options.resolve_or("cpu")?;
        if options.target.archs.is_empty() {
            return Err(
                usage("usage/tune-target", "--tune measures kernels of GPUs").hint("add --target cuda")
            );
        }
        let files = self.model_options.tuning.as_slice();
        if files.len() > 1 {
            return Err(usage("usage/one-tuning", "--tune writes one tuning file")
                .hint("join the files by `millrace tune --merge`"));
        }
        drop(Timer::open(0)?);
        for path in files.iter().filter(|p| p.exists()) {
            options.tuning.merge(Tuning::read(path)?);
        }
        Ok(options)
    }
}

/// The plan in one line.
pub fn plan_line(compiled: &Compiled) -> String {
    let weights: u64 = weight_bytes(&compiled.module);
    match compiled.plan() {
        Some(plan) => format!(
            "activations {} (lower bound {}, {} buffers), weights {}, {} nodes, {} kernels",
            size::show(plan.peak_bytes),
            size::show(plan.lower_bound_bytes),
            plan.buffers,
            size::show(weights),
            compiled.module.graph.order.len(),
            compiled.module.kernels.len(),
        ),
        None => "no plan".to_string(),
    }
}

/// Activations of the largest step of each profile.
pub fn profiles(module: &Module, profiles: &[ShapeProfile]) -> serde_json::Value {
    let report = |p: &ShapeProfile| json!({"name": p.name, "bytes": p.activation_bytes(module)});
    profiles.iter().map(report).collect()
}

/// The compiler's own peak, in all and by phase.
fn build_memory(compiled: &Compiled) -> serde_json::Value {
    let phases = compiled.meter.phases();
    json!({
        "peak_bytes": phases.iter().map(|p| p.bytes).max(),
        "phases": phases
            .iter()
            .map(|p| json!({"phase": p.phase, "peak_bytes": p.bytes, "exact": p.exact}))
            .collect::<Vec<_>>(),
    })
}

/// Bytes of all weights that nodes read.
pub fn weight_bytes(module: &Module) -> u64 {
    let reader = millrace::ir::weights::WeightReader::new(module);
    module.used_weights().into_iter().filter_map(|w| reader.len(w).ok()).sum()
}

/// Writes the engine with a progress bar on a terminal, and none otherwise.
pub fn write_with_progress(compiled: &Compiled, path: &std::path::Path) -> Result<u64> {
    use std::io::IsTerminal;
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) =
        ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
    {
        bar.set_style(style);
    }
    bar.set_message("writing weights");
    let written = compiled.write(path, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    Ok(written?.len)
}

/// Writes a page; an existing file is replaced.
pub fn write_page(path: &std::path::Path, page: &str) -> Result<()> {
    std::fs::write(path, page).map_err(|e| Error::io("write", path, &e))
}

/// Runs the pipeline up to `--stop-at` and writes the module as text.
fn stop(
    args: &Args,
    options: &CompileOptions,
    observer: &mut dyn FnMut(&'static str, &Module, bool),
) -> Result<()> {
    let mut module = SourceModel::read(&args.model, &options.import)?.module;
    restrict(&mut module, &options.profiles)?;
    observer("import", &module, true);
    let mut context = Context::of(&options.target.target);
    let mut observer = |pass: &'static str, module: &Module, changed: bool| observer(pass, module, changed);
    let mut manager = Manager {
        verify_each: options.verify_each,
        observer: Some(&mut observer),
        controls: options.controls.clone(),
        ..Manager::default()
    };
    let done = manager.run(&options.pipeline, &mut module, &mut context);
    let runs = manager.runs;
    args.control.report(&runs, &context);
    done.map_err(|e| e.at(args.model.display()))?;
    let text = text::print(&module);
    match &args.output {
        Some(path) => std::fs::write(path, text).map_err(|e| Error::io("write", path, &e)),
        None => print(&text),
    }
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let mut options = match args.tune {
        Some(_) => args.tuned()?,
        None => args.model_options.resolve()?,
    };
    let registry = Registry::standard();
    args.control.insert(&mut options.pipeline, &registry)?;
    options.library = !args.no_library;
    options.verify_each = args.control.verify_each;
    options.controls = args.control.controls(&registry)?;
    options.profiles = args.profile.iter().map(|p| ShapeProfile::parse(p)).collect::<Result<_>>()?;
    options.memory.measure = args.json || args.control.wants_stats();
    options.memory.limit = args.host_mem_limit.as_deref().map(size::parse).transpose()?;
    options.weights = match (args.strip_weights, args.complete_weights) {
        (true, _) => WeightMode::Stripped,
        (_, true) => WeightMode::Complete,
        _ => WeightMode::Stored,
    };
    let weights = options.weights;
    let mut dumper = args.control.dumper(&registry)?;
    // The report lists the remarks of every layer.
    options.controls.whole |= args.json;
    let watched = dumper.watches() || args.html.is_some();
    let mut recorder = args.html.as_ref().map(|_| Recorder::default());
    let mut observer = |pass: &'static str, module: &Module, changed: bool| {
        if let Some(recorder) = &mut recorder {
            recorder.observe(pass, module, changed);
        }
        dumper.observe(pass, module, changed);
    };
    let start = std::time::Instant::now();
    if args.control.stop_at.is_some() {
        return stop(args, &options, &mut observer);
    }
    let mut progress = Progress::default();
    let observer: Option<&mut Observer<'_>> = if watched { Some(&mut observer) } else { None };
    let prepared = prepare_with(&args.model, &options, observer, &mut progress);
    let tuned = prepared.and_then(|prepared| {
        if let Some(time) = args.tune {
            let (tuning, _) =
                super::tune::measure(&prepared.module, &options.target.archs, &[], 0, time, options.library)?;
            options.tuning.merge(tuning);
            if let [path] = args.model_options.tuning.as_slice() {
                options.tuning.write(path)?;
            }
        }
        finish(prepared, &options, &mut progress)
    });
    // What was seen up to a failure matters most when there is one.
    let compiled = tuned.inspect_err(|_| args.control.report(&progress.runs, &progress.context))?;
    args.control.report(&compiled.runs, &compiled.context);
    dumper.finish()?;
    let bytes = match &args.output {
        Some(output) if !args.dry_run => Some(write_with_progress(&compiled, output)?),
        _ => None,
    };
    if let Some(path) = &args.html {
        let facts = Facts { manifest: &compiled.manifest, weights, file: None };
        let history = recorder.unwrap_or_default().finish(&compiled.context);
        write_page(path, &page(&compiled.module, &facts, Some(&history)))?;
    }
    let seconds = start.elapsed().as_secs_f64();
    if args.control.wants_stats() {
        for PhasePeak { phase, bytes, exact } in compiled.meter.phases() {
            eprintln!("peak of {phase}: {}{}", size::show(bytes), if exact { "" } else { " at its end" });
        }
    }
    if args.json {
        let plan = compiled.plan();
        return print_json(&json!({
            "engine": args.output.as_ref().filter(|_| bytes.is_some()).map(|p| p.display().to_string()),
            "bytes": bytes,
            "seconds": seconds,
            "manifest": compiled.manifest,
            "nodes": compiled.module.graph.order.len(),
            "kernels": compiled.module.kernels.len(),
            "memory": {
                "activations": plan.map(|p| json!({
                    "peak_bytes": p.peak_bytes,
                    "lower_bound_bytes": p.lower_bound_bytes,
                    "profiles": profiles(&compiled.module, &compiled.manifest.profiles),
                })),
                "weights": { "total_bytes": weight_bytes(&compiled.module) },
                "build": build_memory(&compiled),
            },
            "remarks": compiled.context.remarks.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "stats": compiled.context.stats.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        }));
    }
    print(&format!("plan: {}\n", plan_line(&compiled)))?;
    for profile in &compiled.manifest.profiles {
        let bytes = profile.activation_bytes(&compiled.module).unwrap_or(0);
        print(&format!("profile {profile}: activations {}\n", size::show(bytes)))?;
    }
    if let Some(path) = &args.html {
        print(&format!("wrote {}\n", path.display()))?;
    }
    match (&args.output, bytes) {
        (Some(output), Some(bytes)) => {
            print(&format!("wrote {} ({}) in {seconds:.2} s\n", output.display(), size::show(bytes)))
        }
        _ => print(&format!("dry run in {seconds:.2} s: no engine written\n")),
    }
}
