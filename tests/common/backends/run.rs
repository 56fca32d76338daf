//! Runs a case on a backend and compares.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use millrace::compiler::Tuning;
use millrace::compiler::codegen::cuda::splits;
use millrace::compiler::compile::{Progress, prepare_with};
use millrace::compiler::target::TargetChoice;
use millrace::compiler::tuning::{Entry, VERSION};
use millrace::ir::engine::Verify;
use millrace::ir::sampling::Random;
use millrace::ir::tensor::{Tensor, decode};
use millrace::ir::text;
use millrace::{Allocation, CompileOptions, Compiled, Engine, Session, SessionOptions, TensorRef, compile};

use super::case::{Case, Prepared, Source};
use crate::by_library;
use crate::judge::{Judge, Subject};

/// Where a case runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    Cpu,
    CpuReload,
    /// Static memory, launches one by one; memory is poisoned before every step by a step of NaN.
    CudaStatic,
    CudaDynamic,
    /// Every step three times, so that the last two are replays.
    CudaGraph,
    CudaReload,
    /// As [`Backend::CudaGraph`], of an engine that names the library of matrix products wherever it may. Cases without such
    /// a product are left out.
    CudaLibrary,
}

impl Backend {
    pub const ALL: [Backend; 7] = [
        Backend::Cpu,
        Backend::CpuReload,
        Backend::CudaStatic,
        Backend::CudaDynamic,
        Backend::CudaGraph,
        Backend::CudaReload,
        Backend::CudaLibrary,
    ];

    pub fn name(self) -> &'static str {
        ["cpu", "cpu-reload", "cuda-static", "cuda-dynamic", "cuda-graph", "cuda-reload", "cuda-library"]
            [self as usize]
    }

    /// Whether every step runs three times, so that the last two are replays.
    fn replays(self) -> bool {
        matches!(self, Backend::CudaGraph | Backend::CudaLibrary)
    }

    pub fn on_gpu(self) -> bool {
        self >= Backend::CudaStatic
    }
}

/// What became of a case on a backend.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// So many steps were right.
    Right(usize),
    /// The target has no kernel, for a reason that is known.
    Gap(&'static str),
    Wrong(String),
    /// The device has failed; nothing runs on it any more.
    Poisoned(String),
}

/// What a target lacks, and whether a refusal is about it.
pub type Gap = (&'static str, fn(&str) -> bool);

/// What no CUDA kernel computes: a name, and how the compiler's refusal is recognised. Everything else has to compile.
pub const GAPS: [Gap; 1] = [("4-bit elements", |refusal| {
    refusal.contains("i4[") || refusal.contains("i4]") || refusal.contains("i4,") || refusal.contains("i4}")
})];

/// Limits of a run.
#[derive(Clone, Copy)]
pub struct Limits {
    /// Leaves steps with more rows out.
    pub rows: u64,
    /// Runs so many steps at most.
    pub steps: usize,
}

/// A case with what is expected of it.
pub struct Judged {
    prepared: Prepared,
    judge: Judge,
    path: std::path::PathBuf,
    /// Whether a step may read a cache before it writes its own rows.
    reads_first: bool,
}

/// How many cases use the device side by side. A fault is the fault of one of them.
const SIDE_BY_SIDE: usize = 4;
static DEVICE: [Mutex<()>; SIDE_BY_SIDE] = [const { Mutex::new(()) }; SIDE_BY_SIDE];
static TURN: AtomicUsize = AtomicUsize::new(0);

impl Judged {
    /// Draws inputs and evaluates the reference.
    pub fn new(case: &Case, seed: u64, limits: Limits, folder: &Path) -> Result<Judged, String> {
        let path = source_path(case, folder)?;
        let mut prepared = case.prepare(seed).map_err(|e| e.to_string())?;
        let rows = |bindings: &millrace::ir::Bindings| {
            bindings.iter().find(|(s, _)| s.name() == "t").map_or(0, |(_, v)| v)
        };
        // Later steps read what earlier ones have written.
        if prepared.states.is_empty() {
            prepared.steps.retain(|(bindings, _)| rows(bindings) <= limits.rows);
        } else if let Some(end) = prepared.steps.iter().position(|(b, _)| rows(b) > limits.rows.max(64)) {
            prepared.steps.truncate(end);
        }
        prepared.steps.truncate(limits.steps);
        let subject = Subject { module: &prepared.module, source: prepared.source(), strict: case.strict };
        let mut random = Random::new(seed ^ 0x6a75_6467);
        let judge = Judge::over(subject, prepared.states.clone(), prepared.steps.clone(), &mut random)
            .map_err(|e| format!("reference: {e}"))?;
        let reads_first = matches!(case.source, Source::Random(_)) && !prepared.states.is_empty();
        Ok(Judged { prepared, judge, path, reads_first })
    }

    /// Steps that are run.
    pub fn steps(&self) -> usize {
        self.prepared.steps.len()
    }

    /// Runs on several backends of one engine; their results have to be the same bits.
    pub fn run(
        &self,
        case: &Case,
        target: &str,
        backends: &[Backend],
        folder: &Path,
    ) -> Vec<(Backend, Outcome)> {
        // Sums of the library have orders of their own, so its engine is one by itself.
        let (by_library, by_kernels): (Vec<Backend>, Vec<Backend>) =
            backends.iter().partition(|b| **b == Backend::CudaLibrary);
        let mut outcomes = Vec::new();
        for (group, library) in [(by_kernels, false), (by_library, true)] {
            if !group.is_empty() && !outcomes.iter().any(|(_, o)| matches!(o, Outcome::Poisoned(_))) {
                outcomes.extend(self.run_engine(case, target, &group, library, folder));
            }
        }
        outcomes
    }

    /// Runs on several backends of one engine, which names the library of matrix products or does not.
    fn run_engine(
        &self,
        case: &Case,
        target: &str,
        backends: &[Backend],
        library: bool,
        folder: &Path,
    ) -> Vec<(Backend, Outcome)> {
        let all = |outcome: Outcome| backends.iter().map(|b| (*b, outcome.clone())).collect();
        let compiled = match compiled(case, target, &self.path, library) {
            Ok(Some(compiled)) => compiled,
            Ok(None) => return Vec::new(),
            Err(outcome) => return all(outcome),
        };
        let name = case.name.replace('/', "_");
        let file = folder.join(format!("{name}-{}.engine", &target[..3]));
        let read = || {
            compiled.write(&file, &mut |_, _| {}).map_err(|e| e.to_string())?;
            let bytes = std::fs::read(&file).map_err(|e| e.to_string())?;
            Engine::from_bytes(bytes, Verify::Full).map_err(|e| e.to_string())
        };
        let engine = match read() {
            Ok(engine) => engine,
            Err(message) => return all(Outcome::Wrong(format!("engine: {message}"))),
        };
        let mut first: Option<Vec<Vec<Vec<u8>>>> = None;
        let mut outcomes = Vec::new();
        for backend in backends {
            let ran = if matches!(backend, Backend::CpuReload | Backend::CudaReload) {
                Engine::open(&file).map_err(|e| e.to_string()).and_then(|e| self.session(&e, *backend))
            } else {
                self.session(&engine, *backend)
            };
            let outcome = match ran {
                Err(message) if message.contains("cuda/poisoned") => Outcome::Poisoned(message),
                Err(message) => Outcome::Wrong(format!("{message}\n{}", text::print(&compiled.module))),
                Ok(bytes) => match &first {
                    Some(first) if *first != bytes => Outcome::Wrong(format!(
                        "bits differ from those of {}: step {:?}",
                        backends[0].name(),
                        first.iter().zip(&bytes).position(|(a, b)| a != b)
                    )),
                    _ => {
                        first.get_or_insert(bytes);
                        Outcome::Right(self.steps())
                    }
                },
            };
            let poisoned = matches!(outcome, Outcome::Poisoned(_));
            outcomes.push((*backend, outcome));
            if poisoned {
                break;
            }
        }
        let _ = std::fs::remove_file(file);
        outcomes
    }

    /// Bytes of every output of every step.
    fn session(&self, engine: &Engine, backend: Backend) -> Result<Vec<Vec<Vec<u8>>>, String> {
        let turn = TURN.fetch_add(1, Ordering::Relaxed) % SIDE_BY_SIDE;
        let _turn = backend.on_gpu().then(|| DEVICE[turn].lock().unwrap_or_else(|e| e.into_inner()));
        let pages = self.prepared.steps.first();
        let pages = pages.and_then(|(b, _)| b.iter().find(|(s, _)| s.name() == "pages")).map(|(_, v)| v);
        let options = SessionOptions {
            threads: Some(2),
            allocation: if backend == Backend::CudaDynamic {
                Allocation::Dynamic
            } else {
                Allocation::Static
            },
            kv_pages: pages,
            graphs: backend.replays() || backend == Backend::CudaReload,
            ..SessionOptions::default()
        };
        let shown = |e: millrace::Error| format!("{}: {e}", e.code());
        let mut session = engine.session(options).map_err(shown)?;
        let mut bytes = Vec::new();
        let mut products = 0;
        for (at, (_, inputs)) in self.prepared.steps.iter().enumerate() {
            if backend == Backend::CudaStatic {
                run(&mut session, &poison(inputs)).map_err(shown)?;
            }
            let times = if backend.replays() { 3 } else { 1 };
            // What a step finds in a cache it reads first must be what the steps before it wrote, not what it wrote itself.
            let again = self.reads_first && at > 0 && backend.on_gpu();
            for _ in 0..times {
                if at == 0 || again {
                    session.reset_states();
                }
                for (_, before) in &self.prepared.steps[..if again { at } else { 0 }] {
                    run(&mut session, before).map_err(shown)?;
                }
                run(&mut session, inputs).map_err(shown)?;
            }
            let (mut found, mut step) = (Vec::new(), Vec::new());
            for n in 0..self.prepared.module.graph.outputs.len() {
                let output = session.read_output(n).map_err(shown)?;
                let shape = output.shape.iter().map(|d| *d as usize).collect();
                found.push(Tensor { dtype: output.dtype, shape, data: decode(output.dtype, output.bytes) });
                step.push(output.bytes.to_vec());
            }
            self.judge.compare(at, &found)?;
            bytes.push(step);
            products += session.library_report().map_or(0, |report| report.last_products);
        }
        session.synchronize().map_err(shown)?;
        if backend == Backend::CudaLibrary {
            // What the library does not take has a reason; without any, something ran by it.
            let report = session.library_report().ok_or("the engine names no library")?;
            let asked = report.reasons.iter().any(|reason| reason.contains("has no algorithm"));
            if report.version.is_none() && !asked {
                return Err(format!("the library runs nothing: {report}"));
            }
            if report.reasons.is_empty() && products == 0 && self.steps() > 0 {
                return Err("the library ran nothing, and nobody says why".to_string());
            }
        }
        if let Some(report) = session.graph_report().filter(|_| backend.replays()) {
            if let Some(failure) = report.failure {
                return Err(format!("graph: {failure}"));
            }
            if report.replayed < self.steps() as u64 && report.last_launches > 0 {
                return Err(format!("{} of {} steps were replayed", report.replayed, self.steps()));
            }
        }
        Ok(bytes)
    }
}

/// Inputs of the same shape and indices whose floats are no numbers: what a step leaves behind poisons the next.
fn poison(inputs: &[Tensor]) -> Vec<Tensor> {
    let mut inputs = inputs.to_vec();
    for tensor in inputs.iter_mut().filter(|t| t.dtype.is_float()) {
        tensor.data.fill(f64::NAN);
    }
    inputs
}

fn run(session: &mut Session<'_>, inputs: &[Tensor]) -> millrace::Result<()> {
    let bytes: Vec<Vec<u8>> = inputs.iter().map(Tensor::to_bytes).collect();
    let extents: Vec<Vec<u64>> = inputs.iter().map(|t| t.shape.iter().map(|d| *d as u64).collect()).collect();
    let refs: Vec<TensorRef<'_>> = inputs
        .iter()
        .zip(&bytes)
        .zip(&extents)
        .map(|((t, bytes), shape)| TensorRef { dtype: t.dtype, shape, bytes })
        .collect();
    session.run(&refs)
}

/// The file or folder that is compiled.
fn source_path(case: &Case, folder: &Path) -> Result<std::path::PathBuf, String> {
    let source = match &case.source {
        Source::Folder { path, .. } => return Ok(path.clone()),
        Source::Text(source) => source.clone(),
        Source::Random(_) => text::print(&case.prepare(0).map_err(|e| e.to_string())?.module),
    };
    let path = folder.join(format!("{}.ir", case.name.replace('/', "_")));
    std::fs::write(&path, source).map_err(|e| e.to_string())?;
    Ok(path)
}

/// The case for a target; none if it is to name the library and has no product for it.
fn compiled(case: &Case, target: &str, path: &Path, library: bool) -> Result<Option<Compiled>, Outcome> {
    let wrong = |e: millrace::Error| Outcome::Wrong(format!("compile: {}: {e}", e.code()));
    let mut options = case.options();
    options.target = TargetChoice::parse(target).map_err(wrong)?;
    options.pipeline = options.target.level(case.level);
    if let Some(at) = case.split {
        options.tuning = split_tuning(path, &options, at).map_err(wrong)?;
    }
    let refused = |e: millrace::Error| {
        let message = e.to_string();
        let gap = GAPS.iter().find(|(_, is)| e.code() == "compile/no-kernel" && is(&message));
        gap.map_or_else(|| wrong(e), |(name, _)| Outcome::Gap(name))
    };
    if library {
        let prepared = prepare_with(path, &options, None, &mut Progress::default()).map_err(refused)?;
        let named = by_library::tuning(&prepared.module, &options.target.archs, 0);
        if named.entries.is_empty() {
            return Ok(None);
        }
        options.tuning.entries.extend(named.entries);
    }
    compile(path, &options, None).map(Some).map_err(refused)
}

/// Entries that choose the same place of the list for all keys of single rows, the last where there are fewer.
fn split_tuning(path: &Path, options: &CompileOptions, at: usize) -> millrace::Result<Tuning> {
    let prepared = prepare_with(path, options, None, &mut Progress::default())?;
    let mut tuning = Tuning::default();
    for (key, _, names) in options.target.archs.iter().flat_map(|arch| splits(&prepared.module, *arch)) {
        let entry = Entry {
            candidate: names[at.min(names.len() - 1)].clone(),
            nanoseconds: 1,
            built_in_nanoseconds: 1,
            device: "none".into(),
            driver: "none".into(),
            version: VERSION.into(),
        };
        tuning.entries.insert(key, entry);
    }
    Ok(tuning)
}

/// Compiles a case and nothing else.
pub fn build(case: &Case, target: &str, folder: &Path) -> Outcome {
    let built = source_path(case, folder).map_err(Outcome::Wrong).and_then(|path| {
        compiled(case, target, &path, false)?;
        compiled(case, target, &path, true)
    });
    built.map_or_else(|outcome| outcome, |_| Outcome::Right(0))
}
