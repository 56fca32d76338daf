//! Measures the candidates of a module's matmul sites on a GPU, and makes a tuning of the best.
//!
//! The compiler lists what there is to choose, the runtime times launch tables; this module knows both. The time it is
//! given is shared out evenly: kernels are built best first, of every choice the first before any second, until more
//! than half of it is spent, and each choice is measured for an equal part of the rest.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use millrace_compiler::codegen::cuda::{Builder, Built, Trial, TrialBuffer, TrialFill, TrialProduct};
use millrace_compiler::tuning::{Entry, Tuning, VERSION};
use millrace_ir::launch::Bundle;
use millrace_ir::{Kind, Result};
use millrace_kernels::cuda::matmul::choice::library_key;
use millrace_runtime::cuda::{Bench, Product, Timed, TimedBuffer, Timer, distance};

/// Part of the time that may go into building kernels.
const BUILDING: f64 = 0.6;

/// Kernels that are built before the time is looked at.
const BATCH: usize = 48;

/// Rounds in which all candidates are timed before the best are timed again.
const FIRST: usize = 3;

/// Most rounds.
const MOST: usize = 25;

/// Candidates that are timed again beside the built-in one, and as many of a library.
const FINALISTS: usize = 3;

/// Most rows without a comparison with a library.
const FEW: u64 = 64;

/// Algorithms of a library that are timed.
const ALGORITHMS: usize = 6;

/// By how much a candidate must be faster than the built-in one to replace it.
const GAIN: f64 = 0.99;

/// How far results may be from those of the built-in candidate. Orders of sums differ, and 16-bit results are rounded.
const DISTANCE: f64 = 0.01;

/// How to measure.
#[derive(Clone, Debug)]
pub struct TuneOptions {
    /// Time for everything.
    pub time: Duration,
    /// How kernels are built.
    pub builder: Builder,
    /// Whether products of a library are among the candidates.
    pub library: bool,
}

/// What became of a choice.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Its key.
    pub key: String,
    /// Sites of the module it is for.
    pub sites: usize,
    /// Rows it was measured with.
    pub rows: u64,
    /// Operations of the step, for rates.
    pub operations: f64,
    /// Name and median seconds of each candidate that was timed, the built-in one first if it was.
    pub times: Vec<(String, f64)>,
    /// Index into `times` of the chosen kernel, if there is a choice.
    pub chosen: Option<usize>,
    /// Index into `times` of the library's way, if it is faster than the best kernel.
    pub by_library: Option<usize>,
    /// Median seconds of the bare product by cuBLASLt's best algorithm, where the library is there and cannot be chosen.
    pub library: Option<f64>,
    /// Candidates that were not timed, and why.
    pub skipped: Vec<(String, String)>,
}

impl Measured {
    /// Seconds of the built-in candidate and of the chosen one.
    pub fn seconds(&self) -> Option<(f64, f64)> {
        Some((self.times.first()?.1, self.times.get(self.chosen?)?.1))
    }

    /// What a tuning has of it: keys with indices into `times`.
    pub fn choices(&self) -> Vec<(String, usize)> {
        let own = self.chosen.map(|chosen| (self.key.clone(), chosen));
        own.into_iter().chain(self.by_library.map(|way| (library_key(&self.key), way))).collect()
    }

    /// Decides between what was timed; `own` tells which of `times` are kernels.
    fn choose(&mut self, own: &[bool]) {
        let best = |wanted: bool| {
            let of = (0..self.times.len()).filter(|at| own[*at] == wanted);
            of.min_by(|a, b| self.times[*a].1.total_cmp(&self.times[*b].1))
        };
        let Some(kernel) = best(true) else { return };
        let kernel = if self.times[kernel].1 < self.times[0].1 * GAIN { kernel } else { 0 };
        self.chosen = Some(kernel).filter(|_| own.iter().filter(|o| **o).count() > 1);
        self.by_library = best(false).filter(|way| self.times[*way].1 < self.times[kernel].1 * GAIN);
    }
}

/// Measures `trials`, all of the device's architecture, and tells of each as soon as it is known.
///
/// # Errors
/// What keeps kernels from being built at all, and `cuda/poisoned` if the device fails before anything is known. A
/// candidate that cannot be built, loaded or run is left out.
pub fn tune(
    timer: &mut Timer,
    trials: &[Trial],
    options: &TuneOptions,
    tell: &mut dyn FnMut(&Measured),
) -> Result<Tuning> {
    let start = Instant::now();
    let bundles = build(trials, &options.builder, start + options.time.mul_f64(BUILDING))?;
    let device = timer.device().name.clone();
    let driver = format!("{}.{}", timer.driver() / 1000, timer.driver() % 1000 / 10);
    let mut tuning = Tuning::default();
    for (at, (trial, bundles)) in trials.iter().zip(bundles).enumerate() {
        let left = options.time.saturating_sub(start.elapsed());
        let share = left / u32::try_from(trials.len() - at).unwrap_or(u32::MAX);
        let measured = match measure(timer, trial, bundles, options.library, Instant::now() + share) {
            Ok(measured) => measured,
            // What was measured before the device failed still holds.
            Err(error) if error.code() == "cuda/poisoned" && !tuning.entries.is_empty() => break,
            Err(error) => return Err(error),
        };
        for (key, chosen) in measured.choices() {
            let nanoseconds = |s: f64| (s * 1e9).round().max(1.0) as u64;
            let (candidate, seconds) = measured.times[chosen].clone();
            let entry = Entry {
                candidate,
                nanoseconds: nanoseconds(seconds),
                built_in_nanoseconds: nanoseconds(measured.times[0].1),
                device: device.clone(),
                driver: driver.clone(),
                version: VERSION.to_string(),
            };
            tuning.entries.insert(key, entry);
        }
        tell(&measured);
    }
    Ok(tuning)
}

/// For each candidate of each trial its bundle, or why there is none.
type Bundles = Vec<Vec<std::result::Result<Bundle, String>>>;

/// Builds kernels of all trials, those of better candidates first.
fn build(trials: &[Trial], builder: &Builder, until: Instant) -> Result<Bundles> {
    let most = trials.iter().map(|t| t.candidates.len()).max().unwrap_or(0);
    let ranked =
        (0..most).flat_map(|rank| trials.iter().filter_map(move |t| Some((t, t.candidates.get(rank)?))));
    let mut orders = Vec::new();
    let mut known: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for (trial, candidate) in ranked {
        for order in candidate.orders(trial.arch) {
            known.entry((order.source.text.as_str(), trial.arch.name())).or_insert_with(|| {
                orders.push(order);
                orders.len() - 1
            });
        }
    }
    let mut built: Vec<Result<Built>> = Vec::new();
    for batch in orders.chunks(BATCH) {
        if !built.is_empty() && Instant::now() >= until {
            break;
        }
        let batch = builder.build_each(batch);
        // Without a compiler nothing more can come.
        if built.is_empty() && batch.iter().all(Result::is_err) {
            batch.into_iter().next().transpose()?;
            break;
        }
        built.extend(batch);
    }
    let bundle = |trial: &Trial, candidate: &millrace_compiler::codegen::cuda::TrialCandidate| {
        let mut own = Vec::new();
        for order in candidate.orders(trial.arch) {
            let at = known.get(&(order.source.text.as_str(), trial.arch.name())).copied();
            match at.and_then(|at| built.get(at)) {
                Some(Ok(built)) => own.push(built.clone()),
                Some(Err(error)) => return Err(error.to_string()),
                None => return Err("no time left to build it".to_string()),
            }
        }
        Ok(candidate.bundle(own))
    };
    Ok(trials.iter().map(|t| t.candidates.iter().map(|c| bundle(t, c)).collect()).collect())
}

/// Builds kernels of all candidates into the builder's cache: how many there are, and what failed.
pub fn build_all(trials: &[Trial], builder: &Builder) -> (usize, Vec<String>) {
    let mut orders = Vec::new();
    let mut known = std::collections::BTreeSet::new();
    for trial in trials {
        for order in trial.candidates.iter().flat_map(|c| c.orders(trial.arch)) {
            if known.insert((order.source.text.as_str(), trial.arch.name())) {
                orders.push(order);
            }
        }
    }
    let failed = builder.build_each(&orders).into_iter().filter_map(|b| b.err().map(|e| e.to_string()));
    (orders.len(), failed.collect())
}

fn timed_buffer(buffer: &TrialBuffer) -> TimedBuffer {
    let random = match buffer.fill {
        TrialFill::Random(most) => Some(most),
        TrialFill::Result => None,
    };
    TimedBuffer { operand: buffer.operand, dtype: buffer.dtype, bytes: buffer.bytes, random }
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::INFINITY)
}

/// A candidate on the device.
struct Running {
    name: String,
    by_library: bool,
    timed: Timed,
    seconds: Vec<f64>,
}

impl Running {
    fn median(&self) -> f64 {
        median(&self.seconds)
    }

    fn time(&mut self, bench: &mut Bench<'_>) -> Result<()> {
        self.seconds.push(bench.time(&self.timed)?);
        Ok(())
    }
}

fn measure(
    timer: &mut Timer,
    trial: &Trial,
    bundles: Vec<std::result::Result<Bundle, String>>,
    with_library: bool,
    until: Instant,
) -> Result<Measured> {
    let mut measured = Measured {
        key: trial.key.clone(),
        sites: trial.sites,
        rows: trial.at,
        operations: trial.operations,
        times: Vec::new(),
        chosen: None,
        by_library: None,
        library: None,
        skipped: Vec::new(),
    };
    let buffers: Vec<TimedBuffer> = trial.buffers.iter().map(timed_buffer).collect();
    let mut bench = match timer.bench(&buffers, &trial.bindings) {
        Ok(bench) => bench,
        Err(error) if error.kind() == Kind::OutOfMemory => {
            measured.skipped = trial.candidates.iter().map(|c| (c.name.clone(), error.to_string())).collect();
            return Ok(measured);
        }
        Err(error) => return Err(error),
    };
    let has_library = bench.has_library();
    let mut running: Vec<Running> = Vec::new();
    let mut expected = Vec::new();
    for (index, (candidate, bundle)) in trial.candidates.iter().zip(bundles).enumerate() {
        let mut skip = |why: String| measured.skipped.push((candidate.name.clone(), why));
        if candidate.by_library && !(with_library && has_library) {
            continue;
        }
        // Nothing replaces what is built in without having been compared with it.
        if index > 0 && running.is_empty() {
            skip("the built-in candidate did not run".to_string());
            continue;
        }
        if index > 1 && Instant::now() >= until {
            skip("no time left to measure it".to_string());
            continue;
        }
        let tried = bundle.map_err(|why| (why, None)).and_then(|bundle| {
            let timed = bench.prepare(bundle).map_err(|e| (e.to_string(), Some(e)))?;
            let found = bench.results(&timed).map_err(|e| (e.to_string(), Some(e)))?;
            Ok((timed, found))
        });
        let (timed, found) = match tried {
            Ok(both) => both,
            Err((_, Some(error))) if error.code() == "cuda/poisoned" => return Err(error),
            Err((why, _)) => {
                skip(why);
                continue;
            }
        };
        if index == 0 {
            expected = found;
        } else {
            let pairs = expected.iter().zip(&found);
            let far = pairs.map(|(e, f)| distance(e, f)).fold(0.0, f64::max);
            if far > DISTANCE {
                skip(format!("its results differ from those of the built-in candidate by {far:.3}"));
                continue;
            }
        }
        let (name, by_library) = (candidate.name.clone(), candidate.by_library);
        running.push(Running { name, by_library, timed, seconds: Vec::new() });
    }
    // What engines cannot choose: the library computes less than the site.
    let mut compared: Vec<(Timed, Vec<f64>)> = Vec::new();
    let comparable = with_library && trial.candidates.iter().all(|c| !c.by_library);
    if trial.rows.first > FEW && comparable && !running.is_empty() {
        let TrialProduct { extents: [m, n, k], x, w, dtypes: (dtype, out), alone } = trial.product;
        let product = Product { m, n, k, dtype, out };
        match bench.products(product, x, w, ALGORITHMS) {
            Ok(ways) => {
                for way in ways {
                    if alone {
                        let found = bench.results(&way)?;
                        let far =
                            expected.iter().zip(&found).map(|(e, f)| distance(e, f)).fold(0.0, f64::max);
                        if far > DISTANCE {
                            let why = format!("its results differ by {far:.3}");
                            measured.skipped.push(("cuBLASLt".to_string(), why));
                            continue;
                        }
                    }
                    compared.push((way, Vec::new()));
                }
            }
            Err(error) if error.code() == "cuda/poisoned" => return Err(error),
            Err(error) => measured.skipped.push(("cuBLASLt".to_string(), error.to_string())),
        }
    }
    for round in 0..MOST {
        if round >= FIRST && Instant::now() >= until {
            break;
        }
        let mut order: Vec<usize> = (0..running.len()).collect();
        if round >= FIRST {
            order.sort_by(|a, b| running[*a].median().total_cmp(&running[*b].median()));
            // Of kernels and of the library's ways each, since the best of each is told.
            let mut left = [FINALISTS; 2];
            order.retain(|index| {
                let left = &mut left[usize::from(running[*index].by_library)];
                let stays = *left > 0;
                *left -= usize::from(stays);
                stays
            });
            if !order.contains(&0) && !running.is_empty() {
                order.push(0);
            }
        }
        // In turn, so that a change of clocks meets all.
        for index in order {
            running[index].time(&mut bench)?;
        }
        for (way, seconds) in &mut compared {
            seconds.push(bench.time(way)?);
        }
    }
    measured.library = compared.iter().map(|(_, seconds)| median(seconds)).min_by(f64::total_cmp);
    measured.times = running.iter().map(|r| (r.name.clone(), r.median())).collect();
    let own: Vec<bool> = running.iter().map(|r| !r.by_library).collect();
    measured.choose(&own);
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is chosen of a built-in kernel, another, and two ways of a library with these times.
    fn chosen(times: &[(f64, bool)]) -> Vec<(String, usize)> {
        let mut measured = Measured {
            key: "k".into(),
            sites: 1,
            rows: 1,
            operations: 1.0,
            times: times.iter().map(|(seconds, _)| (String::new(), *seconds)).collect(),
            chosen: None,
            by_library: None,
            library: None,
            skipped: Vec::new(),
        };
        measured.choose(&times.iter().map(|(_, own)| *own).collect::<Vec<_>>());
        measured.choices()
    }

    #[test]
    fn kernels_and_the_library_are_chosen_apart() {
        let key = |library: bool, at| (if library { "k library" } else { "k" }.to_string(), at);
        let of = |times: [f64; 4]| chosen(&[0, 1, 2, 3].map(|at| (times[at], at < 2)));
        assert_eq!(of([10.0, 8.0, 9.0, 7.0]), [key(false, 1), key(true, 3)]);
        assert_eq!(of([10.0, 8.0, 9.0, 8.5]), [key(false, 1)], "a kernel is faster");
        assert_eq!(of([10.0, 9.95, 9.93, 20.0]), [key(false, 0)], "less than a percent");
        assert_eq!(of([10.0, 9.95, 9.8, 9.7]), [key(false, 0), key(true, 3)]);
        assert_eq!(
            chosen(&[(10.0, true), (5.0, false)]),
            [key(true, 1)],
            "one kernel is no choice of kernels"
        );
        assert_eq!(chosen(&[(10.0, true)]), []);
        assert_eq!(chosen(&[]), []);
    }
}
