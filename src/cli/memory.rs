//! Options of sessions that say how much memory they may take, and the lines that tell what was taken.

use std::path::PathBuf;

use millrace::ir::Bindings;
use millrace::ir::plan::stream::Ring;
use millrace::runtime::options::OnOutOfMemory;
use millrace::{Allocation, Class, Engine, ProfileChoice, Result, Session, SessionOptions, WeightBudget};

use super::{size, usage};

/// Options of sessions.
#[derive(clap::Args, Clone)]
pub struct MemoryOptions {
    /// When activation memory is allocated: static, on-profile-change or dynamic
    #[arg(long, default_value = "static")]
    memory: String,
    /// Profile of the engine that steps run under [default: for each step the smallest that takes it]
    #[arg(long, value_name = "NAME")]
    shape_profile: Option<String>,
    /// Bound on all memory of the session, with a unit
    #[arg(long, value_name = "SIZE")]
    memory_cap: Option<String>,
    /// Memory for weights, ring included: 6GiB, 40% of what can stream, auto, auto:2GiB (leaves 2 GiB free) or resident
    #[arg(long, value_name = "BUDGET")]
    weights_budget: Option<String>,
    /// Part of the streamable weights that stays in memory, 0.0 to 1.0; `bench` takes several: "0.0;0.5;1.0"
    #[arg(long, value_name = "FRACTION", conflicts_with = "weights_budget")]
    gpu_weights_percent: Option<String>,
    /// Bytes of a slot of the ring that weights stream through [default: 32MiB]
    #[arg(long, value_name = "SIZE")]
    ring_slot: Option<String>,
    /// Slots of the ring, at least 2 [default: 2]
    #[arg(long, value_name = "N")]
    ring_slots: Option<usize>,
    /// Queues of a GPU that take copies in turn, fewer than slots
    #[arg(long, value_name = "N", default_value_t = 1)]
    copy_queues: usize,
    /// Weights of fewer bytes never stream [default: 1MiB]
    #[arg(long, value_name = "SIZE")]
    ring_small: Option<String>,
    /// On a GPU, bound on pinned host memory for weights that stream; the rest comes from the engine file in every step
    #[arg(long, value_name = "SIZE")]
    host_cap: Option<String>,
    /// What to do when memory does not suffice: fail, or shrink the weight budget and say so
    #[arg(long, value_name = "ACTION", default_value = "fail")]
    on_oom: String,
    /// Pages of the KV cache [default: as many as the engine's limits need]
    #[arg(long, value_name = "N")]
    kv_pages: Option<u64>,
    /// Threads [default: all processors]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// On a GPU, launch kernels one by one instead of replaying CUDA graphs
    #[arg(long)]
    no_graphs: bool,
    /// On a GPU, run the engine's own kernels even where it names cuBLASLt and that is installed
    #[arg(long)]
    no_library: bool,
    /// On a GPU, begin each step of greedy decoding when the host has seen the tokens of the one before
    #[arg(long)]
    no_ahead: bool,
    /// Model folder for an engine built with --strip-weights
    #[arg(long, value_name = "DIR")]
    weights: Option<PathBuf>,
}

impl MemoryOptions {
    /// The session's options.
    ///
    /// # Errors
    /// Unknown words and sizes without a unit.
    pub fn resolve(&self) -> Result<SessionOptions> {
        let allocation = match self.memory.as_str() {
            "static" => Allocation::Static,
            "on-profile-change" => Allocation::OnProfileChange,
            "dynamic" => Allocation::Dynamic,
            other => {
                return Err(usage("usage/memory", format!("`{other}` is no allocation"))
                    .hint("use static, on-profile-change or dynamic"));
            }
        };
        let profile = self.shape_profile.as_deref().map_or(ProfileChoice::Automatic, ProfileChoice::from);
        let on_out_of_memory = match self.on_oom.as_str() {
            "fail" => OnOutOfMemory::Fail,
            "shrink" => OnOutOfMemory::ShrinkWeights,
            other => {
                return Err(
                    usage("usage/on-oom", format!("`{other}` is no action")).hint("use fail or shrink")
                );
            }
        };
        let budget = match (&self.weights_budget, self.fractions()?.as_deref()) {
            (Some(text), _) => budget(text)?,
            (None, None | Some([])) => WeightBudget::default(),
            // A list is walked by the verb; the session begins with its first.
            (None, Some([first, ..])) => WeightBudget::Fraction(*first),
        };
        Ok(SessionOptions {
            allocation,
            profile,
            budget,
            ring: ring(self.ring_slot.as_deref(), self.ring_slots, self.ring_small.as_deref())?,
            copy_queues: self.copy_queues,
            on_out_of_memory,
            kv_pages: self.kv_pages,
            threads: self.threads,
            host_cap: self.host_cap.as_deref().map(size::parse).transpose()?,
            cap: self.memory_cap.as_deref().map(size::parse).transpose()?,
            weights: self.weights.clone(),
            graphs: !self.no_graphs,
            library: !self.no_library,
            ahead: !self.no_ahead,
            ..SessionOptions::default()
        })
    }

    /// The values of `--gpu-weights-percent`.
    ///
    /// # Errors
    /// `usage/weights-percent`.
    pub fn fractions(&self) -> Result<Option<Vec<f64>>> {
        self.gpu_weights_percent.as_deref().map(fractions).transpose()
    }

    /// A session of `engine`; for verbs that run it under one budget.
    ///
    /// # Errors
    /// As [`MemoryOptions::resolve`] and [`Engine::session`].
    pub fn open<'e>(&self, engine: &'e Engine) -> Result<Session<'e>> {
        if let Some(list) = self.fractions()?
            && list.len() > 1
        {
            let message = "this verb takes one --gpu-weights-percent";
            return Err(usage("usage/weights-percent", message).hint("a list is for bench"));
        }
        let session = engine.session(self.resolve()?)?;
        tell_shrinks(&session);
        self.tell_library(&session);
        Ok(session)
    }
}

impl MemoryOptions {
    /// Reports on standard error that kernels run where the engine names a library, unless that was asked for.
    pub fn tell_library(&self, session: &Session<'_>) {
        let report = session.library_report().filter(|report| !self.no_library && !report.reasons.is_empty());
        if let Some(report) = report {
            eprintln!("{report}");
        }
    }
}

/// Reports on standard error how often and why the session shrank its weight budget.
pub fn tell_shrinks(session: &Session<'_>) {
    for shrink in session.shrinks() {
        eprintln!("{shrink}");
    }
}

/// A ring of the command line's words.
///
/// # Errors
/// `usage/size`, and `usage/ring` for a ring that cannot work.
pub fn ring(slot: Option<&str>, slots: Option<usize>, small: Option<&str>) -> Result<Ring> {
    let bytes = |text: Option<&str>, default: u64| text.map_or(Ok(default), size::parse);
    let ring = Ring {
        slot_bytes: bytes(slot, Ring::DEFAULT.slot_bytes)?,
        slots: slots.unwrap_or(Ring::DEFAULT.slots),
        small: bytes(small, Ring::DEFAULT.small)?,
        ..Ring::DEFAULT
    };
    if ring.slots < 2 || ring.slots > 1024 || ring.slot_bytes == 0 {
        let message = format!("a ring of {} slots of {} bytes cannot work", ring.slots, ring.slot_bytes);
        return Err(usage("usage/ring", message)
            .hint("use 2 to 1024 slots that are not empty, such as --ring-slots 2 --ring-slot 32MiB"));
    }
    Ok(ring)
}

/// A weight budget: `6GiB`, `40%`, `auto`, `auto:2GiB` or `resident`. A bare number is an error, because people mean
/// different things by it.
///
/// # Errors
/// `usage/weights-budget`.
pub fn budget(text: &str) -> Result<WeightBudget> {
    let bad = |message: &str| {
        usage("usage/weights-budget", format!("weight budget `{text}` {message}"))
            .hint("write 6GiB, 40% (of what can stream), auto, auto:2GiB (leaves 2 GiB free) or resident")
    };
    if let Some(percent) = text.strip_suffix('%') {
        let value: f64 = percent.trim().parse().map_err(|_| bad("is no percentage"))?;
        return match (0.0..=100.0).contains(&value) {
            true => Ok(WeightBudget::Fraction(value / 100.0)),
            false => Err(bad("is not between 0% and 100%")),
        };
    }
    match text.split_once(':') {
        None if text == "resident" => Ok(WeightBudget::Resident),
        None if text == "auto" => Ok(WeightBudget::Auto { reserve: 0 }),
        Some(("auto", reserve)) => {
            let reserve = size::parse(reserve).map_err(|_| bad("has a reserve that is no size"))?;
            Ok(WeightBudget::Auto { reserve })
        }
        _ if !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || c == '.') => {
            Err(bad("has no unit"))
        }
        _ => size::parse(text).map(WeightBudget::Bytes).map_err(|_| bad("is none")),
    }
}

/// Fractions from 0 to 1, separated by semicolons.
fn fractions(text: &str) -> Result<Vec<f64>> {
    let bad = |part: &str| {
        usage("usage/weights-percent", format!("`{part}` is no fraction")).hint(
            "--gpu-weights-percent takes fractions from 0.0 to 1.0 of what can stream; for percentages use \
             --weights-budget 40%",
        )
    };
    let parts = text.split(';').map(str::trim).filter(|part| !part.is_empty());
    let list: Vec<f64> = parts
        .map(|part| part.parse().ok().filter(|f| (0.0..=1.0).contains(f)).ok_or_else(|| bad(part)))
        .collect::<Result<_>>()?;
    if list.is_empty() { Err(bad(text)) } else { Ok(list) }
}

/// The largest resident set of this process so far, where the system tells.
fn peak_resident_set() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?.trim().strip_suffix("kB")?;
    line.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Where memory went, in the field's words: one line a fact, then the ledger. `built` tells that the engine was compiled
/// by this process.
///
/// # Errors
/// `cuda/poisoned` on a device that has failed.
pub fn report(session: &Session<'_>, built: bool) -> Result<String> {
    use std::fmt::Write;
    let (ledger, engine) = (session.ledger(), session.engine());
    let module = engine.module();
    let mut text = String::new();
    let mut line = |words: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "[memory] {words}");
    };
    let peak = |class: Class| ledger.peak(class);
    let (demand, placement) = session.placement();
    let (available, total) = session.memory()?;
    line(format!("Loaded engine size: {}", size::show(engine.file().file_len())));
    let at_build = match peak_resident_set().filter(|_| built) {
        Some(bytes) => size::show(bytes),
        None => "the engine was not built by this process".to_string(),
    };
    line(format!("Peak memory usage during engine building: CPU: {at_build}"));
    line(format!("Total Weights Memory: {}", size::show(demand.total())));
    let activations =
        module.arenas.iter().filter_map(|(_, a)| a.size.extent(&Bindings::maxima(&module.dims)));
    line(format!("Total Activation Memory: {}", size::show(activations.sum())));
    line(format!("Allocated {} for execution context memory.", size::show(peak(Class::Activations))));
    let buffers = peak(Class::Io) + peak(Class::Workspace) + peak(Class::Library);
    line(format!("Allocated {} for the runtime buffers.", size::show(buffers)));
    if let Some(report) = session.library_report() {
        line(report.to_string());
    }
    line(format!("Allocated {} for the decoder.", size::show(0)));
    line(format!(
        "Allocated {} for resident weights and {} for the weight ring ({} slots of {}).",
        size::show(placement.resident_bytes),
        size::show(placement.ring_bytes()),
        if placement.slot_bytes == 0 { 0 } else { placement.slots },
        size::show(placement.slot_bytes)
    ));
    line(format!(
        "Memory usage when calculating max tokens in paged kv cache: total: {}, available: {}",
        size::show(total),
        size::show(available)
    ));
    if let Some(model) = engine.manifest().model.as_ref().filter(|_| session.kv_pages() > 0) {
        let pages = session.kv_pages();
        let tokens = pages.saturating_mul(model.tokens_per_block);
        line(format!("Number of blocks in KV cache primary pool: {pages}"));
        line("Number of blocks in KV cache secondary pool: 0".to_string());
        line(format!("Number of tokens per block: {}", model.tokens_per_block));
        let most = millrace::generation::blocks_per_sequence(model.max_seq_len, model.tokens_per_block);
        line(format!("Max KV cache blocks per sequence: {most}"));
        let bytes = size::show(ledger.now(Class::Kv));
        line(format!("Allocated {bytes} for max tokens in paged KV cache ({tokens})."));
    }
    Ok(format!("{text}memory: {ledger}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_need_units() {
        assert_eq!(budget("6GiB").unwrap(), WeightBudget::Bytes(6 << 30));
        assert_eq!(budget("0B").unwrap(), WeightBudget::Bytes(0));
        assert_eq!(budget("40%").unwrap(), WeightBudget::Fraction(0.4));
        assert_eq!(budget("auto").unwrap(), WeightBudget::Auto { reserve: 0 });
        assert_eq!(budget("auto:2GiB").unwrap(), WeightBudget::Auto { reserve: 2 << 30 });
        assert_eq!(budget("resident").unwrap(), WeightBudget::Resident);
        let bad = ["100", "0.5", "-1", "101%", "-3%", "x%", "%", "auto:", "auto:5", "most", "", "NaN%"];
        for text in bad {
            let error = budget(text).unwrap_err();
            assert_eq!(error.code(), "usage/weights-budget", "{text}");
            assert!(error.to_string().contains("auto:2GiB"), "{error}");
        }
        assert!(budget("100").unwrap_err().to_string().contains("has no unit"));
    }

    #[test]
    fn fractions_are_no_percentages() {
        assert_eq!(fractions("0.0;0.3; 1").unwrap(), [0.0, 0.3, 1.0]);
        for text in ["20", "20%", "-0.1", "", ";", "nan", "0.3,0.4"] {
            assert_eq!(fractions(text).unwrap_err().code(), "usage/weights-percent", "{text}");
        }
    }

    #[test]
    fn rings_have_slots() {
        assert_eq!(ring(None, None, None).unwrap(), Ring::DEFAULT);
        let small = ring(Some("4KiB"), Some(3), Some("0B")).unwrap();
        assert_eq!((small.slot_bytes, small.slots, small.small), (4096, 3, 0));
        assert_eq!(ring(None, Some(1), None).unwrap_err().code(), "usage/ring");
        assert_eq!(ring(Some("0B"), None, None).unwrap_err().code(), "usage/ring");
        assert_eq!(ring(Some("32"), None, None).unwrap_err().code(), "usage/size");
    }
}
