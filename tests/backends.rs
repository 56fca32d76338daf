//! The differential suite: the same cases on the CPU and on a GPU in every way a session can run, each against the
//! reference evaluator.
//!
//! ```text
//! cargo test --test backends                      the CPU; the GPU too if there is one
//! cargo test --test backends -- matmul            cases whose name contains a word
//! cargo test --test backends -- --list            names of all cases
//! scripts/gpu_suite.sh                            everything in one folder for a machine with a GPU
//! ```
//!
//! `MILLRACE_REQUIRE_GPU=1` makes a missing GPU an error, `MILLRACE_REQUIRE_LIBRARY=1` a missing cuBLASLt. Further options: `--backends cpu,cuda-graph`, `--max N` cases,
//! `--seed N`, `--graphs N` random graphs, `--rows N` and `--steps N` of a case, `--jobs N` threads, `--compile-only`
//! (fills the kernel cache), `--target cuda:sm_80`, `--cases FILE` (names, one a line), `--seconds N` after which no case
//! begins, which fails.
#![allow(clippy::print_stdout)]

#[path = "common/backends/mod.rs"]
mod backends;
#[path = "common/by_library.rs"]
mod by_library;
#[path = "common/random/judge.rs"]
#[allow(dead_code)]
mod judge;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use backends::case::Case;
use backends::run::{Backend, Judged, Limits, Outcome, build};
use millrace::compiler::codegen::cuda::nvrtc_version;
use millrace::runtime::cuda::{has_library, survey};

struct Options {
    words: Vec<String>,
    list: bool,
    compile_only: bool,
    backends: Option<Vec<Backend>>,
    cases: Option<String>,
    target: String,
    max: usize,
    seed: u64,
    graphs: Option<u64>,
    rows: Option<u64>,
    steps: Option<usize>,
    jobs: usize,
    seconds: u64,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        words: Vec::new(),
        list: false,
        compile_only: false,
        backends: None,
        cases: None,
        target: "cuda:sm_90a".into(),
        max: usize::MAX,
        seed: 0,
        graphs: None,
        rows: None,
        steps: None,
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
        seconds: u64::MAX,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        fn number<T: std::str::FromStr>(text: String) -> Result<T, String> {
            text.parse().map_err(|_| format!("`{text}` is no number"))
        }
        match arg.as_str() {
            "--list" => options.list = true,
            "--compile-only" => options.compile_only = true,
            "--cases" => options.cases = Some(value()?),
            "--target" => options.target = value()?,
            "--max" => options.max = number(value()?)?,
            "--seed" => options.seed = number(value()?)?,
            "--graphs" => options.graphs = Some(number(value()?)?),
            "--rows" => options.rows = Some(number(value()?)?),
            "--steps" => options.steps = Some(number(value()?)?),
            "--seconds" => options.seconds = number(value()?)?,
            "--jobs" | "--test-threads" => options.jobs = number::<usize>(value()?)?.max(1),
            "--backends" => {
                let names = value()?;
                let named = |n: &str| Backend::ALL.into_iter().find(|b| b.name() == n);
                let found: Option<Vec<Backend>> = names.split(',').map(named).collect();
                options.backends = Some(found.ok_or_else(|| format!("`{names}` names another backend"))?);
            }
            // What the usual test runner takes.
            other if other.starts_with('-') => {}
            word => options.words.push(word.to_string()),
        }
    }
    Ok(options)
}

/// What became of all cases.
#[derive(Default)]
struct Report {
    /// By backend: cases, steps, gaps, wrong.
    counts: BTreeMap<Backend, [usize; 4]>,
    gaps: BTreeMap<&'static str, usize>,
    failures: Vec<String>,
    /// What the device failed in.
    poisoned: Option<String>,
}

impl Report {
    fn add(&mut self, case: &Case, outcomes: Vec<(Backend, Outcome)>) {
        for (backend, outcome) in outcomes {
            let counts = self.counts.entry(backend).or_default();
            counts[0] += 1;
            match outcome {
                Outcome::Right(steps) => counts[1] += steps,
                Outcome::Gap(name) => {
                    counts[2] += 1;
                    *self.gaps.entry(name).or_default() += 1;
                }
                Outcome::Wrong(message) => {
                    counts[3] += 1;
                    self.failures.push(format!("{} on {}: {message}", case.name, backend.name()));
                }
                Outcome::Poisoned(message) => {
                    counts[3] += 1;
                    self.failures.push(format!("{} on {}: {message}", case.name, backend.name()));
                    self.poisoned = Some(case.name.clone());
                }
            }
        }
    }

    fn print(&self, seconds: f64) {
        println!("\n{:<14}{:>8}{:>8}{:>14}{:>8}", "backend", "cases", "steps", "unsupported", "wrong");
        for (backend, [cases, steps, gaps, wrong]) in &self.counts {
            println!("{:<14}{cases:>8}{steps:>8}{gaps:>14}{wrong:>8}", backend.name());
        }
        for (gap, count) in &self.gaps {
            println!("no CUDA kernel: {gap} ({count} times)");
        }
        let line = |f: &str| f.lines().next().unwrap_or("").chars().take(300).collect::<String>();
        // The same on several backends is one line.
        let mut lines: BTreeMap<(&str, String), Vec<&str>> = BTreeMap::new();
        for failure in &self.failures {
            let (place, message) = failure.split_once(": ").unwrap_or((failure, ""));
            let (case, backend) = place.split_once(" on ").unwrap_or((place, ""));
            lines.entry((case, line(message))).or_default().push(backend);
        }
        for ((case, message), backends) in lines {
            println!("WRONG {case} on {}: {message}", backends.join(", "));
        }
        println!("{} wrong, {seconds:.1} s", self.failures.len());
    }
}

fn for_each(cases: &[Case], jobs: usize, work: impl Fn(usize, &Case) -> bool + Sync) -> usize {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(cases.len()) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(at) else { break };
                    if !work(at, case) {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    next.load(Ordering::Relaxed).min(cases.len())
}

/// The arguments of a process that goes on with `rest` after the device has failed.
fn go_on(rest: &[Case], folder: &Path) -> bool {
    let file = folder.join("rest");
    let names: String = rest.iter().map(|c| format!("{}\n", c.name)).collect();
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(at) = args.iter().position(|a| a == "--cases") {
        args.drain(at..at + 2);
    }
    let started = std::fs::write(&file, names).and_then(|()| {
        println!("\nthe device has failed: {} cases go on in another process", rest.len());
        Command::new(std::env::current_exe()?).args(args).arg("--cases").arg(&file).status()
    });
    started.is_ok_and(|s| s.success())
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(message) => {
            println!("{message}");
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let folder = folder.path();
    let gpus = survey();
    let gpu = gpus.devices.first();
    let required = std::env::var("MILLRACE_REQUIRE_GPU").is_ok_and(|v| v != "0");
    // Without a GPU it is a test among others: fewer graphs, and no large steps.
    let full = gpu.is_some() || options.compile_only;
    let mut cases = backends::cases(folder, options.graphs.unwrap_or(48));
    if let Some(file) = &options.cases {
        let names = std::fs::read_to_string(file).unwrap_or_default();
        cases.retain(|c| names.lines().any(|n| n == c.name));
    }
    cases.retain(|c| options.words.is_empty() || options.words.iter().any(|w| c.name.contains(w)));
    cases.truncate(options.max);
    if options.list {
        cases.iter().for_each(|c| println!("{}", c.name));
        return ExitCode::SUCCESS;
    }
    let report = Mutex::new(Report::default());
    let add = |case: &Case, outcomes| report.lock().unwrap_or_else(|e| e.into_inner()).add(case, outcomes);
    if options.compile_only {
        for_each(&cases, options.jobs, |_, case| {
            let begun = Instant::now();
            let outcome = build(case, &options.target, folder);
            if begun.elapsed().as_secs() >= 10 {
                println!("{} took {:.0} s", case.name, begun.elapsed().as_secs_f64());
            }
            add(case, vec![(Backend::CudaStatic, outcome)]);
            true
        });
        let report = report.into_inner().unwrap_or_else(|e| e.into_inner());
        report.print(start.elapsed().as_secs_f64());
        return if report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    match gpu {
        Some(gpu) => println!("{} cases, {} (compute capability {})", cases.len(), gpu.name, gpu.capability),
        None => {
            let why = gpus.problem.as_ref().map(ToString::to_string).unwrap_or_default();
            if required {
                println!("a GPU is required: {why}");
                return ExitCode::FAILURE;
            }
            println!("{} cases\n*** THE GPU PART IS SKIPPED: {why} ***", cases.len());
        }
    }
    let library = gpu.is_some() && has_library();
    if gpu.is_some() && !library {
        if std::env::var("MILLRACE_REQUIRE_LIBRARY").is_ok_and(|v| v != "0") {
            println!("cuBLASLt is required and not installed");
            return ExitCode::FAILURE;
        }
        println!("*** {} IS SKIPPED: cuBLASLt is not installed ***", Backend::CudaLibrary.name());
    }
    let wanted: Vec<Backend> = Backend::ALL
        .into_iter()
        .filter(|b| options.backends.as_ref().is_none_or(|list| list.contains(b)))
        .filter(|b| gpu.is_some() || !b.on_gpu())
        .filter(|b| library || *b != Backend::CudaLibrary)
        .collect();
    let (on_gpu, on_cpu): (Vec<Backend>, Vec<Backend>) = wanted.into_iter().partition(|b| b.on_gpu());
    let limits = Limits {
        rows: options.rows.unwrap_or(if full { u64::MAX } else { 33 }),
        steps: options.steps.unwrap_or(if full { usize::MAX } else { 3 }),
    };
    let late = || start.elapsed().as_secs() >= options.seconds;
    let (left_out, on_device) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let done = for_each(&cases, options.jobs, |_, case| {
        if late() {
            left_out.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        let begun = Instant::now();
        let judged = match Judged::new(case, options.seed, limits, folder) {
            Ok(judged) => judged,
            Err(message) => {
                add(case, vec![(Backend::Cpu, Outcome::Wrong(message))]);
                return true;
            }
        };
        let judging = begun.elapsed().as_secs_f64();
        if !on_cpu.is_empty() {
            add(case, judged.run(case, "cpu", &on_cpu, folder));
        }
        let on_host = begun.elapsed().as_secs_f64() - judging;
        let slow = |on_device: f64| {
            if judging + on_host + on_device > 5.0 {
                let name = &case.name;
                println!("{name}: reference {judging:.1} s, CPU {on_host:.1} s, GPU {on_device:.1} s");
            }
        };
        if !on_gpu.is_empty() {
            let outcomes = judged.run(case, &options.target, &on_gpu, folder);
            let poisoned = outcomes.iter().any(|(_, o)| matches!(o, Outcome::Poisoned(_)));
            add(case, outcomes);
            on_device.fetch_add(
                (begun.elapsed().as_secs_f64() * 1e3 - (judging + on_host) * 1e3) as usize,
                Ordering::Relaxed,
            );
            slow(begun.elapsed().as_secs_f64() - judging - on_host);
            return !poisoned;
        }
        slow(0.0);
        true
    });
    // Kernels compile here even if they cannot run.
    if gpu.is_none() && options.words.is_empty() && nvrtc_version().is_ok() {
        let few: Vec<Case> = cases.iter().step_by(cases.len() / 6 + 1).cloned().collect();
        for_each(&few, options.jobs, |_, case| {
            if let Outcome::Wrong(message) = build(case, &options.target, folder) {
                add(case, vec![(Backend::CudaStatic, Outcome::Wrong(message))]);
            }
            true
        });
    }
    let report = report.into_inner().unwrap_or_else(|e| e.into_inner());
    if let Ok(file) = std::env::var("MILLRACE_SUITE_LOG") {
        let _ = std::fs::write(file, report.failures.join("\n\n"));
    }
    report.print(start.elapsed().as_secs_f64());
    let (left_out, on_device) = (left_out.into_inner(), on_device.into_inner());
    if on_device > 0 {
        println!(
            "{:.1} s in compiling for the device, in turns on it, and waiting for them",
            on_device as f64 / 1e3
        );
    }
    if left_out > 0 {
        println!("{left_out} cases were left out: no time");
    }
    let mut right = report.failures.is_empty() && left_out == 0;
    if report.poisoned.is_some() && done < cases.len() {
        right &= go_on(&cases[done..], folder);
    }
    if right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
