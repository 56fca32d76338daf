//! How much device memory the weights of a session may take.
//!
//! A budget counts every byte for weights on the device: residents, padded to their alignment, and the ring that the others
//! stream through. Placing is [`millrace_ir::plan::stream`].

use std::fmt;

use millrace_ir::cost::Sustained;
use millrace_ir::plan::stream::{self, Demand, Placement, Ring};
use millrace_ir::{Bindings, Error, Kind, Module, Result};

/// Most slots of a ring.
const SLOTS: usize = 1024;

/// Least alignment of weights: that of all buffers.
const ALIGN: u64 = 64;

/// How much device memory the weights may take; for a CPU session, how much host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum WeightBudget {
    /// All weights stay on the device.
    #[default]
    Resident,
    /// What is free when the budget is set, less what the rest of the session takes and `reserve` bytes; never less than
    /// the minimum and never more than all weights.
    Auto {
        /// Bytes to leave free.
        reserve: u64,
    },
    /// At most this many bytes, ring and weights that cannot stream included.
    Bytes(u64),
    /// This part of the streamable bytes, 0 to 1, above the minimum; 1 is all.
    Fraction(f64),
}

impl fmt::Display for WeightBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightBudget::Resident => f.write_str("resident"),
            WeightBudget::Auto { reserve } => write!(f, "auto, {reserve} bytes in reserve"),
            WeightBudget::Bytes(bytes) => write!(f, "{bytes} bytes"),
            WeightBudget::Fraction(part) => write!(f, "{}%", part * 100.0),
        }
    }
}

impl WeightBudget {
    /// The placement of the weights of `demand` under this budget; `free` tells the bytes that weights could take if asked,
    /// `work` is that of [`stream::place`]. Sessions and reports place by this function alone.
    ///
    /// # Errors
    /// `run/not-streamable` unless all weights stay, if none is marked as streamable; `run/weight-budget` for a fraction that
    /// is none and for a budget under the minimum, which it names; those of `free`.
    pub fn place(
        self,
        demand: &Demand,
        ring: &Ring,
        work: &[u64],
        free: impl FnOnce() -> Result<u64>,
    ) -> Result<Placement> {
        if self != WeightBudget::Resident && demand.items.iter().all(|i| i.cut.is_none()) {
            let message = "the engine was compiled without weight streaming: its weights stay resident";
            return Err(Error::new(Kind::Usage, "run/not-streamable", message)
                .hint("compile with --weight-streaming, or use the budget resident"));
        }
        let least = stream::minimum(demand, ring);
        let bytes = match self {
            WeightBudget::Resident => u64::MAX,
            WeightBudget::Bytes(bytes) => bytes,
            WeightBudget::Auto { reserve } => free()?.saturating_sub(reserve).max(least),
            WeightBudget::Fraction(1.0) => u64::MAX,
            WeightBudget::Fraction(part) if (0.0..1.0).contains(&part) => {
                least.saturating_add((part * demand.streamable(ring.small) as f64) as u64)
            }
            WeightBudget::Fraction(part) => {
                let message = format!("{part} is no fraction of the streamable weights");
                return Err(Error::new(Kind::Usage, "run/weight-budget", message)
                    .hint("use a number from 0 to 1, or 0% to 100%"));
            }
        };
        let placement = stream::place(demand, bytes, ring, work)?;
        stream::check(demand, &placement, bytes)?;
        Ok(placement)
    }
}

/// What computing with each use of a weight costs in a typical step of `module`, for [`stream::place`]: residents are
/// spread by it. A placement that holds for one step holds for all, so that typical sizes stand for every size.
pub fn typical_work(module: &Module, demand: &Demand) -> Vec<u64> {
    let device = Sustained::of_target(module.target.as_deref().unwrap_or(""));
    let times = stream::times(module, &device, &Bindings::hints(&module.dims), &[]);
    stream::work(demand, &times)
}

/// Where the weights of a session are.
#[derive(Clone, Debug)]
pub(crate) struct Residency {
    pub demand: Demand,
    pub ring: Ring,
    pub budget: WeightBudget,
    pub placement: Placement,
    work: Vec<u64>,
}

impl Residency {
    /// All weights of `module` resident. A ring has two slots or more, and what is in it is aligned for every kernel.
    pub fn new(module: &Module, demand: Demand, ring: Ring) -> Result<Residency> {
        let align = ring.align.max(ALIGN).checked_next_power_of_two().unwrap_or(ALIGN);
        let ring = Ring { slots: ring.slots.clamp(2, SLOTS), align, ..ring };
        let work = typical_work(module, &demand);
        let placement = stream::place(&demand, u64::MAX, &ring, &work)?;
        Ok(Residency { demand, ring, budget: WeightBudget::Resident, placement, work })
    }

    /// Bytes that may stream.
    pub fn streamable(&self) -> u64 {
        self.demand.streamable(self.ring.small)
    }

    /// The placement under `budget`; see [`WeightBudget::place`].
    pub fn place(&self, budget: WeightBudget, free: impl FnOnce() -> Result<u64>) -> Result<Placement> {
        budget.place(&self.demand, &self.ring, &self.work, free)
    }
}
