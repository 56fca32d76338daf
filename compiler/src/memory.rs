//! Memory of the compiler itself: its peak by phase, and how it stays under a limit.
//!
//! What a compile takes is the graph, the model's small files, buffers of the weight writer and, for GPUs, the threads that build
//! kernels. Weights pass through the buffers and are never held. Buffers and threads shrink to stay under a limit, which changes
//! no byte of the engine; the rest is estimated before work starts, and a limit below it is an error.

use std::sync::{Arc, Mutex};

use millrace_ir::{Error, Kind, Result};

/// What to measure and to bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Measure the peak of each phase. Resets the process's own record of its peak.
    pub measure: bool,
    /// Bound on the process's resident set.
    pub limit: Option<u64>,
}

/// The largest resident set of the process during a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhasePeak {
    /// Import, passes, plan, kernels or writing.
    pub phase: &'static str,
    /// Bytes.
    pub bytes: u64,
    /// Whether the system recorded the peak; else it is the resident set at the end of the phase, or of its parts.
    pub exact: bool,
}

/// A line of the system's account of this process, in bytes.
fn status(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?.trim().strip_suffix("kB")?;
    line.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes of this process in memory; 0 where the system does not tell.
pub fn resident_set() -> u64 {
    status("VmRSS:").unwrap_or(0)
}

/// Forgets the recorded peak; false where the system does not allow it.
fn reset() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Measures phases, one after the other; clones share what they measure.
#[derive(Clone, Debug, Default)]
pub struct Meter(Option<Arc<Mutex<Vec<PhasePeak>>>>);

impl Meter {
    /// Begins the first phase, if anything is to be measured.
    pub fn start(options: MemoryOptions) -> Meter {
        if !options.measure {
            return Meter(None);
        }
        reset();
        Meter(Some(Arc::default()))
    }

    /// Ends a phase or a part of it, and begins the next.
    pub fn lap(&self, phase: &'static str) {
        let Some(phases) = &self.0 else { return };
        let recorded = status("VmHWM:");
        let exact = recorded.is_some() && reset();
        let bytes = if exact { recorded } else { status("VmRSS:") }.unwrap_or(0);
        let Ok(mut phases) = phases.lock() else { return };
        match phases.iter_mut().find(|p| p.phase == phase) {
            Some(known) => (known.bytes, known.exact) = (known.bytes.max(bytes), known.exact && exact),
            None => phases.push(PhasePeak { phase, bytes, exact }),
        }
    }

    /// What was measured.
    pub fn phases(&self) -> Vec<PhasePeak> {
        let phases = self.0.as_ref().and_then(|phases| phases.lock().ok());
        phases.map_or_else(Vec::new, |phases| phases.clone())
    }
}

/// Buffers of the weight writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// Bytes of one.
    pub chunk: u64,
    /// Those between the reading and the writing thread; each of the two has one more.
    pub in_flight: usize,
}

impl Default for Buffers {
    fn default() -> Self {
        Buffers { chunk: 4 << 20, in_flight: 3 }
    }
}

impl Buffers {
    const LEAST: Buffers = Buffers { chunk: 64 << 10, in_flight: 1 };

    fn bytes(self) -> u64 {
        self.chunk * (self.in_flight as u64 + 2)
    }

    /// The largest that fit into `room` bytes.
    fn within(room: u64) -> Buffers {
        let full = Buffers::default();
        if full.bytes() <= room {
            return full;
        }
        let mut buffers = Buffers { in_flight: 1, ..full };
        while buffers.bytes() > room && buffers.chunk > Self::LEAST.chunk {
            buffers.chunk /= 2;
        }
        buffers
    }
}

/// What a compile will take, as far as it is known before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Estimate {
    /// Resident set of the process before.
    pub before: u64,
    /// Bytes of the model's small files, or of IR text.
    pub files: u64,
    /// Bytes that the graph takes for each of those bytes.
    pub growth: u64,
    /// Layers of the model.
    pub layers: u64,
    /// Whether kernels are built.
    pub kernels: bool,
}

/// Code of the compiler and tables of fixed size, as they come into memory.
const BASE: u64 = 12 << 20;

/// Graph, plan and texts of one layer.
const LAYER: u64 = 256 << 10;

/// The kernel compiler's library.
const KERNEL_BASE: u64 = 48 << 20;

/// One thread that compiles kernels.
const KERNEL_THREAD: u64 = 64 << 20;

/// How a compile stays under a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shares {
    /// The writer's buffers.
    pub buffers: Buffers,
    /// Most threads that build kernels.
    pub threads: Option<usize>,
}

impl Estimate {
    fn fixed(&self) -> u64 {
        let graph = self.files.saturating_mul(self.growth).saturating_add(self.layers.saturating_mul(LAYER));
        self.before.saturating_add(BASE).saturating_add(graph)
    }

    /// The least limit that can be met.
    pub fn least(&self) -> u64 {
        let kernels = if self.kernels { KERNEL_BASE + KERNEL_THREAD } else { 0 };
        self.fixed().saturating_add(kernels.max(Buffers::LEAST.bytes()))
    }

    /// Buffers and threads for `limit`.
    ///
    /// # Errors
    /// `compile/host-memory` with the bytes that are needed.
    pub fn shares(&self, limit: Option<u64>) -> Result<Shares> {
        let Some(limit) = limit else { return Ok(Shares::default()) };
        let least = self.least();
        if limit < least {
            let message = format!("compiling needs about {least} bytes of host memory, the limit is {limit}");
            // The next process may begin with some pages more than this one.
            let enough = least.div_ceil(1 << 20) + 1;
            return Err(Error::new(Kind::OutOfMemory, "compile/host-memory", message)
                .hint(format!("use --host-mem-limit {enough}MiB or more")));
        }
        let room = limit - self.fixed();
        let threads = (room.saturating_sub(KERNEL_BASE) / KERNEL_THREAD).max(1);
        Ok(Shares {
            buffers: Buffers::within(room),
            threads: Some(usize::try_from(threads).unwrap_or(usize::MAX)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn estimate() -> Estimate {
        Estimate { before: 8 * MIB, files: MIB, growth: 2, layers: 8, kernels: true }
    }

    #[test]
    fn buffers_and_threads_shrink_with_the_limit() {
        let estimate = estimate();
        assert_eq!(estimate.least(), (8 + 12 + 2 + 2 + 112) * MIB);
        let roomy = estimate.shares(Some(estimate.least() + 64 * MIB)).unwrap();
        assert_eq!((roomy.buffers, roomy.threads), (Buffers::default(), Some(2)));
        assert_eq!(estimate.shares(Some(estimate.least())).unwrap().threads, Some(1));
        let error = estimate.shares(Some(estimate.least() - 1)).unwrap_err();
        assert_eq!((error.code(), error.kind()), ("compile/host-memory", Kind::OutOfMemory));
        assert!(error.to_string().contains("--host-mem-limit 137MiB"), "{error}");
        assert_eq!(estimate.shares(None).unwrap(), Shares { buffers: Buffers::default(), threads: None });
        let plain = Estimate { kernels: false, ..estimate };
        let tight = plain.shares(Some(plain.least())).unwrap();
        assert_eq!(tight.buffers, Buffers::LEAST);
        for room in [192 << 10, MIB, 5 * MIB, 13 * MIB, 20 * MIB, 100 * MIB] {
            let buffers = Buffers::within(room);
            assert!(buffers.bytes() <= room, "{room}: {buffers:?}");
            assert!(
                buffers == Buffers::default() || 3 * 2 * buffers.chunk > room.min(3 * 8 * MIB),
                "{room}: {buffers:?}"
            );
        }
    }

    #[test]
    fn phases_keep_their_largest_part() {
        assert!(Meter::default().phases().is_empty());
        let meter = Meter::start(MemoryOptions { measure: true, limit: None });
        meter.lap("passes");
        let block = vec![1u8; 64 << 20];
        assert_eq!(block.iter().map(|b| u64::from(*b)).sum::<u64>(), 64 << 20);
        meter.lap("passes");
        drop(block);
        meter.lap("plan");
        let phases = meter.phases();
        assert_eq!(phases.iter().map(|p| p.phase).collect::<Vec<_>>(), ["passes", "plan"]);
        if status("VmRSS:").is_some() {
            assert!(phases[0].bytes > 64 << 20, "{phases:?}");
        }
    }
}
