//! `compile`: the whole way from a folder or an IR file to an engine.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::engine::{SectionKind, WrittenEngine};
use millrace_ir::kernel_sources::KernelSources;
use millrace_ir::launch::Bundle;
use millrace_ir::manifest::{LanguageModel, Manifest, ModelKind};
use millrace_ir::shape_profile::{ShapeProfile, restrict};
use millrace_ir::verify::check;
use millrace_ir::{Bindings, DType, Error, Kind, Module, Phase, Result, text};
use millrace_kernels::cuda::Source;

use crate::codegen::cuda::{self, BuildCounts, Builder};
use crate::codegen::{EngineParts, WeightMode, lower, write_engine};
use crate::import::{Family, Limits, Options, SourceFolder, import};
use crate::memory::{Buffers, Estimate, MemoryOptions, Meter, Shares, resident_set};
use crate::pass::Context;
use crate::passes::{PlanReport, plan_report};
use crate::pipeline::{Controls, Manager, Observer, PassRun, Pipeline};
use crate::target::TargetChoice;
use crate::tuning::Tuning;

/// How to compile.
#[derive(Clone, Debug)]
pub struct CompileOptions {
    /// Sizes and element type.
    pub import: Options,
    /// Passes.
    pub pipeline: Pipeline,
    /// Whether weights may be streamed.
    pub weight_streaming: bool,
    /// Whether the engine carries its weights.
    pub weights: WeightMode,
    /// Verify after every pass.
    pub verify_each: bool,
    /// What to leave out, where to stop, and what to do when a pass fails.
    pub controls: Controls,
    /// What to generate code for.
    pub target: TargetChoice,
    /// How device kernels are built.
    pub builder: Builder,
    /// Shapes the engine is for; all that the limits allow if there are none.
    pub profiles: Vec<ShapeProfile>,
    /// Memory of the compiler itself.
    pub memory: MemoryOptions,
    /// What measurements chose for sites of a GPU engine.
    pub tuning: Tuning,
    /// Whether a GPU engine names a library of matrix products where the tuning chose it. It always has kernels beside.
    pub library: bool,
}

impl Default for CompileOptions {
    fn default() -> Self {
        CompileOptions {
            import: Options::default(),
            pipeline: Pipeline::level(2),
            weight_streaming: false,
            weights: WeightMode::Stored,
            verify_each: false,
            controls: Controls::default(),
            target: TargetChoice::default(),
            builder: Builder::usual(),
            profiles: Vec::new(),
            memory: MemoryOptions::default(),
            tuning: Tuning::default(),
            library: true,
        }
    }
}

/// What passes did and said, up to a failure if there is one.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Runs of passes.
    pub runs: Vec<PassRun>,
    /// Remarks and counters.
    pub context: Context,
}

/// A compiled module with what goes beside it, not yet written.
pub struct Compiled {
    /// The lowered module.
    pub module: Module,
    /// The manifest.
    pub manifest: Manifest,
    /// Runs of passes.
    pub runs: Vec<PassRun>,
    /// Remarks and counters.
    pub context: Context,
    /// The folder, if the model came from one.
    pub folder: Option<SourceFolder>,
    /// Kernels of a GPU engine.
    pub device: DeviceCode,
    /// Measures the compiler's memory.
    pub meter: Meter,
    buffers: Buffers,
    weights: WeightMode,
    /// Candidates of the tuning that code generation took, by key.
    tuned: BTreeMap<String, String>,
    source_hash: [u8; 32],
}

/// Kernels of a GPU engine; empty for other targets.
#[derive(Clone, Debug, Default)]
pub struct DeviceCode {
    /// Launch table and images of each architecture.
    pub bundles: Vec<Bundle>,
    /// How many kernels came from where.
    pub counts: BuildCounts,
    /// CUDA C++ of every kernel by its hash.
    pub sources: Vec<(String, Arc<Source>)>,
}

/// A model as its importer or author wrote it.
pub struct SourceModel {
    /// The module, before any pass.
    pub module: Module,
    /// The folder, if the model came from one.
    pub folder: Option<SourceFolder>,
    limits: Option<Limits>,
    hash: [u8; 32],
}

impl SourceModel {
    /// Reads the model at `path`, a folder or an `.ir` file.
    ///
    /// # Errors
    /// Everything that can be wrong with the model or the options of its import.
    pub fn read(path: &Path, options: &Options) -> Result<SourceModel> {
        if path.is_dir() {
            let folder = SourceFolder::open(path, options)?;
            let (module, limits) = import(&folder, options)?;
            let mut hasher = blake3::Hasher::new();
            hasher.update(&folder.config_bytes);
            if let Some(checkpoint) = &folder.checkpoint {
                hasher.update(&checkpoint.fingerprint());
            }
            let hash = *hasher.finalize().as_bytes();
            return Ok(SourceModel { module, folder: Some(folder), limits: Some(limits), hash });
        }
        let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
        let source = String::from_utf8(bytes).map_err(|_| {
            Error::new(Kind::BadInput, "ir/syntax", "is neither a model folder nor IR text")
                .at(path.display())
        })?;
        let module = text::parse(&source).map_err(|e| e.at(path.display()))?;
        if module.phase > Phase::Fused {
            let message = format!(
                "the module is {} already; compiling starts from imported, canonical or fused",
                module.phase
            );
            return Err(Error::new(Kind::BadInput, "compile/phase", message).at(path.display()));
        }
        Ok(SourceModel {
            module,
            folder: None,
            limits: None,
            hash: *blake3::hash(source.as_bytes()).as_bytes(),
        })
    }
}

/// Reads the model at `path` (a folder or an `.ir` file) and runs the pipeline. The observer is called once before
/// the first pass, with the name `import`, and after each pass.
///
/// # Errors
/// Everything that can be wrong with the model, the options or the pipeline.
pub fn compile<'a>(
    path: &Path,
    options: &CompileOptions,
    observer: Option<&'a mut Observer<'a>>,
) -> Result<Compiled> {
    compile_with(path, options, observer, &mut Progress::default())
}

/// [`compile`], with what passes did and said in `progress` if it fails.
///
/// # Errors
/// As [`compile`].
pub fn compile_with<'a>(
    path: &Path,
    options: &CompileOptions,
    observer: Option<&'a mut Observer<'a>>,
    progress: &mut Progress,
) -> Result<Compiled> {
    finish(prepare_with(path, options, observer, progress)?, options, progress)
}

/// A planned module, ready for code generation.
pub struct Prepared {
    /// The module.
    pub module: Module,
    folder: Option<SourceFolder>,
    limits: Option<Limits>,
    meter: Meter,
    shares: Shares,
    source_hash: [u8; 32],
}

/// The first part of [`compile_with`]: reads the model and runs the pipeline. Architectures and tuning do not matter yet.
///
/// # Errors
/// As [`compile`].
pub fn prepare_with<'a>(
    path: &Path,
    options: &CompileOptions,
    mut observer: Option<&'a mut Observer<'a>>,
    progress: &mut Progress,
) -> Result<Prepared> {
    let shares = estimate(path, options).shares(options.memory.limit)?;
    let meter = Meter::start(options.memory);
    let SourceModel { mut module, folder, limits, hash: source_hash } =
        SourceModel::read(path, &options.import)?;
    meter.lap("import");
    restrict(&mut module, &options.profiles)?;
    let limits = limits.map(|l| l.within(&module)).transpose()?;
    if let Some(observer) = &mut observer {
        observer("import", &module, true);
    }
    progress.context = Context::of(&options.target.target);
    let controls = options.controls.clone();
    let verify_each = options.verify_each;
    let meter_of_passes = meter.clone();
    let mut manager =
        Manager { verify_each, observer, controls, meter: meter_of_passes, ..Manager::default() };
    let done = manager.run(&options.pipeline, &mut module, &mut progress.context);
    progress.runs = manager.runs;
    done.map_err(|e| e.at(path.display()))?;
    if module.phase != Phase::Planned {
        let message = format!("the pipeline ends in phase {}, an engine needs planned", module.phase);
        return Err(
            Error::new(Kind::Usage, "compile/phase", message).hint("end it with `schedule,plan-memory`")
        );
    }
    if !options.weight_streaming {
        module.weights.iter_mut().for_each(|(_, w)| w.stream = None);
    }
    module.compact();
    Ok(Prepared { module, folder, limits, meter, shares, source_hash })
}

/// The second part of [`compile_with`]: chooses and builds kernels. The options are those of the first part.
///
/// # Errors
/// As [`compile`].
pub fn finish(prepared: Prepared, options: &CompileOptions, progress: &mut Progress) -> Result<Compiled> {
    let Prepared { module, folder, limits, meter, shares, source_hash } = prepared;
    let mut device = DeviceCode::default();
    // What follows the last pass up to here is part of planning.
    meter.lap("plan");
    let mut tuned = BTreeMap::new();
    let module = if options.target.archs.is_empty() {
        lower(module)?
    } else {
        let choices = options.tuning.choices(options.library);
        let context = &mut progress.context;
        tuned = cuda::tuned(&module, &options.target.archs, &options.tuning, options.library, context);
        let mut builder = options.builder.clone();
        if let Some(most) = shares.threads {
            let processors = std::thread::available_parallelism().map_or(1, usize::from);
            builder.threads = Some(builder.threads.unwrap_or(processors).min(most));
        }
        let lowered = cuda::lower(check(&module)?, &options.target.archs, &builder, &choices)?;
        device = DeviceCode { bundles: lowered.bundles, counts: lowered.counts, sources: lowered.sources };
        lowered.module
    };
    check(&module)?;
    meter.lap("kernels");
    let manifest = manifest(&module, folder.as_ref(), limits, options);
    let Progress { runs, context } = std::mem::take(progress);
    let (weights, buffers) = (options.weights, shares.buffers);
    Ok(Compiled {
        module,
        manifest,
        runs,
        context,
        folder,
        device,
        meter,
        buffers,
        weights,
        tuned,
        source_hash,
    })
}

/// What compiling the model at `path` will take, from what is cheap to know.
fn estimate(path: &Path, options: &CompileOptions) -> Estimate {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let kernels = !options.target.archs.is_empty();
    let before = resident_set();
    if !path.is_dir() {
        // A line of text becomes a node with its types, operands and names.
        return Estimate { before, files: size(path), growth: 64, layers: 0, kernels };
    }
    let small = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ];
    let files = small.iter().map(|name| size(&path.join(name))).sum();
    let config = std::fs::read(path.join("config.json")).ok();
    let config = config.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let layers = config.and_then(|c| c.get("num_hidden_layers")?.as_u64()).unwrap_or(0);
    Estimate { before, files, growth: 2, layers, kernels }
}

fn manifest(
    module: &Module,
    folder: Option<&SourceFolder>,
    limits: Option<Limits>,
    options: &CompileOptions,
) -> Manifest {
    let model = folder.zip(limits).map(|(folder, limits)| LanguageModel {
        vocab_size: folder.config.vocab_size,
        max_batch_size: limits.max_batch_size,
        max_input_len: limits.max_input_len,
        max_seq_len: limits.max_seq_len,
        max_num_tokens: limits.max_num_tokens,
        max_logit_rows: limits.max_logit_rows,
        tokens_per_block: limits.tokens_per_block,
        eos: folder.config.eos.clone(),
        bos: folder.config.bos,
    });
    let kind = match folder.map(|f| f.config.family) {
        None => ModelKind::Graph,
        Some(Family::Bert) => ModelKind::Encoder,
        Some(_) => ModelKind::Decoder,
    };
    let family = match folder.map(|f| f.config.family) {
        None => "graph",
        Some(Family::Llama) => "llama",
        Some(Family::Mistral) => "mistral",
        Some(Family::Qwen2) => "qwen2",
        Some(Family::Qwen3) => "qwen3",
        Some(Family::Bert) => "bert",
    };
    let dtype = module
        .weights
        .iter()
        .map(|(_, w)| w.ty.dtype)
        .find(|d| d.is_float())
        .or_else(|| module.graph.values.iter().map(|(_, v)| v.ty.dtype).find(|d| d.is_float()));
    Manifest {
        kind,
        family: family.to_string(),
        target: module.target.clone().unwrap_or_default(),
        dtype: folder.map(|f| f.dtype(options.import.precision)).or(dtype).unwrap_or(DType::F32),
        pipeline: options.pipeline.to_string(),
        weight_streaming: options.weight_streaming,
        model,
        profiles: options.profiles.clone(),
    }
}

impl Compiled {
    /// The activation plan at the upper bounds.
    pub fn plan(&self) -> Option<PlanReport> {
        plan_report(&self.module, &Bindings::maxima(&self.module.dims))
    }

    /// Writes the engine; see [`write_engine`].
    ///
    /// # Errors
    /// As [`write_engine`].
    pub fn write(&self, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<WrittenEngine> {
        let folder = self.folder.as_ref();
        let mut files: Vec<(SectionKind, &[u8])> = Vec::new();
        if let Some(f) = folder {
            let optional = [
                (SectionKind::Tokenizer, &f.tokenizer),
                (SectionKind::TokenizerConfig, &f.tokenizer_config),
                (SectionKind::ChatTemplate, &f.chat_template),
                (SectionKind::GenerationConfig, &f.generation_config),
            ];
            files.extend(optional.into_iter().filter_map(|(k, b)| b.as_deref().map(|b| (k, b))));
            files.push((SectionKind::Config, &f.config_bytes));
        }
        let mut provenance = serde_json::json!({
            "producer": format!("millrace {}", env!("CARGO_PKG_VERSION")),
            "source_hash": hex(&self.source_hash),
            "pipeline": self.manifest.pipeline,
            "weights": match self.weights {
                WeightMode::Stored => "stored",
                WeightMode::Complete => "complete",
                WeightMode::Stripped => "stripped",
            },
            "passes": self.runs.iter().map(|r| r.name).collect::<Vec<_>>(),
        });
        if !self.tuned.is_empty() {
            provenance["tuning"] = serde_json::json!(self.tuned);
        }
        let provenance = serde_json::to_vec_pretty(&provenance).unwrap_or_default();
        let parts = EngineParts {
            manifest: &self.manifest,
            module: check(&self.module)?,
            files,
            bundles: &self.device.bundles,
            sources: &KernelSources::of(
                self.device.sources.iter().map(|(hash, source)| (hash.as_str(), source.text.as_str())),
            ),
            provenance,
            weights: self.weights,
            buffers: self.buffers,
        };
        let source = folder.and_then(|f| f.checkpoint.as_ref()).map(|c| c as &dyn TensorSource);
        let written = write_engine(path, &parts, source, progress);
        self.meter.lap("writing");
        written
    }
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
