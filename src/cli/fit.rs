//! `millrace fit`: what an engine will take and how fast it will be, before it runs.

use std::path::PathBuf;

use millrace::compiler::codegen::cuda::Builder;
use millrace::fit::{Fit, Question, Subject};
use millrace::ir::Module;
use millrace::ir::cost::Sustained;
use millrace::ir::launch::{Bundle, LaunchTable};
use millrace::ir::manifest::Manifest;
use millrace::ir::plan::stream::schedule;
use millrace::runtime::needs::demand;
use millrace::{Engine, Result, compile};

use super::compile::ModelOptions;
use super::memory::MemoryOptions;
use super::{print, print_json, size, usage};

/// Tell what an engine or a model folder will take and how fast it will be, without weights, kernels or a device.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file, a model folder, or a file of IR text
    model: PathBuf,
    /// Sequences of a step [default: 1]
    #[arg(long, value_name = "N")]
    batch: Option<u64>,
    /// Tokens of a sequence [default: the engine's limit]
    #[arg(long, value_name = "N")]
    sequence: Option<u64>,
    /// Part of free memory that a cache takes by the formula of the field
    #[arg(long, value_name = "FRACTION", default_value_t = 0.9)]
    kv_fraction: f64,
    /// Bytes a second from where weights that are not resident lie, such as 2GB; `doctor --measure` tells a disk's
    #[arg(long, value_name = "SIZE")]
    link_rate: Option<String>,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    model_options: ModelOptions,
    /// Print what is resident of each weight and every copy of a step instead
    #[arg(long, conflicts_with = "json")]
    schedule: bool,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// A module that could be run, with what goes beside it.
pub struct Planned {
    /// The lowered graph.
    pub module: Module,
    /// What it is.
    pub manifest: Manifest,
    /// The launch table of the first architecture of a GPU engine.
    pub table: Option<LaunchTable>,
}

/// Opens an engine, or plans a folder or IR text: weights are not read, kernels are not built.
pub fn plan(path: &std::path::Path, options: &ModelOptions) -> Result<Planned> {
    let first = |bundles: Vec<Bundle>| bundles.into_iter().next().map(|b| b.table);
    if path.is_dir() || path.extension().is_some_and(|e| e == "ir") {
        let mut options = options.resolve()?;
        options.import.dummy_weights = true;
        options.weight_streaming = true;
        options.builder = Builder { plan_only: true, ..Builder::default() };
        let compiled = compile(path, &options, None)?;
        let table = first(compiled.device.bundles);
        return Ok(Planned { module: compiled.module, manifest: compiled.manifest, table });
    }
    let engine = Engine::open(path)?;
    let tables = super::inspect::tables(&engine)?;
    Ok(Planned {
        module: engine.module().clone(),
        manifest: engine.manifest().clone(),
        table: tables.into_iter().next(),
    })
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let planned = plan(&args.model, &args.model_options)?;
    let device = match args.link_rate.as_deref().map(size::parse).transpose()? {
        Some(0) => return Err(usage("usage/size", "a link of no bytes a second moves nothing")),
        Some(rate) => Some(Sustained::of_target(&planned.manifest.target).with_link(rate as f64)),
        None => None,
    };
    let question = Question {
        session: args.memory.resolve()?,
        batch: args.batch,
        sequence: args.sequence,
        kv_fraction: args.kv_fraction,
        device,
    };
    let Planned { module, manifest, table } = &planned;
    let fit = Fit::of(Subject { module, manifest, table: table.as_ref() }, &question)?;
    if args.schedule {
        return print(&schedule(module, &demand(module, table.as_ref())?, &fit.placement));
    }
    if args.json { print_json(&fit.json()) } else { print(&fit.to_string()) }
}
