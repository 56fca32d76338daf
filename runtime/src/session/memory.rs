//! What a session needs, what it holds, and what to do where that does not fit.

use millrace_ir::plan::stream::Placement;
use millrace_ir::{Bindings, Error, Kind, Result};

use super::allocation::{Held, Need};
use super::{Backend, Session, on_backend};
use crate::budget::WeightBudget;
use crate::ledger::{Class, Ledger, Reconciliation};
use crate::memory::{host_memory, resident_set};
use crate::needs::{self, Squeeze};
use crate::options::{Allocation, OnOutOfMemory};
use crate::sizes::state_bytes;

/// A weight budget that the session lowered because memory did not suffice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shrink {
    /// Bytes for weights and ring before.
    pub before: u64,
    /// Bytes since.
    pub after: u64,
    /// What did not fit.
    pub reason: String,
}

impl std::fmt::Display for Shrink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shrink { before, after, reason } = self;
        write!(f, "weights and their ring lowered from {before} to {after} bytes: {reason}")
    }
}

impl<'e> Session<'e> {
    /// Bytes the session will hold in each class with memory for a step at `bindings`, staging memory left out. Cache pages need
    /// no value.
    ///
    /// # Errors
    /// `run/no-size` if a size has no value.
    pub fn required(&self, bindings: &Bindings) -> Result<Vec<(Class, u64)>> {
        self.required_with(&self.need_at(bindings)?)
    }

    /// Bytes by class if steps allocate `need`.
    pub(super) fn required_with(&self, need: &Need) -> Result<Vec<(Class, u64)>> {
        let mut required = vec![
            (Class::Weights, self.residency.placement.resident_bytes),
            (Class::Ring, self.residency.placement.ring_bytes()),
            (Class::Activations, need.sizes.activations()),
            (Class::Io, need.sizes.io()),
            (Class::Kv, state_bytes(self.module(), &self.maxima)?),
        ];
        if let Backend::Cuda(cuda) = &self.backend {
            required.push((Class::Workspace, need.scratch.saturating_add(cuda.counter_bytes())));
            if cuda.library_bytes() > 0 {
                required.push((Class::Library, cuda.library_bytes()));
            }
        }
        Ok(required)
    }

    /// Compares what is needed at load with the cap and with the free memory of a device.
    pub(super) fn check_memory(&self) -> Result<()> {
        let need = self.standing_need()?;
        if let Some(cap) = self.cap {
            self.check_cap_at(cap, &need)?;
        }
        if let Backend::Cuda(cuda) = &self.backend {
            let required = self.required_with(&need)?;
            let total: u64 = required.iter().map(|(_, b)| b).sum();
            let (free, all) = cuda.memory()?;
            if total > free {
                let holders = holders(&required);
                let message =
                    format!("{total} bytes are needed, {free} of the device's {all} are free ({holders})");
                return Err(Error::new(Kind::OutOfMemory, "run/out-of-memory", message).hint(self.advice(
                    &required,
                    free,
                    "free device memory",
                )));
            }
        }
        Ok(())
    }

    pub(super) fn check_cap_at(&self, cap: u64, need: &Need) -> Result<()> {
        let required = self.required_with(need)?;
        let total: u64 = required.iter().map(|(_, b)| b).sum();
        if total <= cap {
            return Ok(());
        }
        let message = format!("{total} bytes are needed, the cap is {cap} ({})", holders(&required));
        Err(Error::new(Kind::OutOfMemory, "run/cap", message).hint(self.advice(
            &required,
            cap,
            "raise --memory-cap",
        )))
    }

    /// Which options would make `required` fit into `limit` bytes, with their values.
    pub(super) fn advice(&self, required: &[(Class, u64)], limit: u64, raise: &str) -> String {
        let lower = needs::lower_bounds(self.module(), &self.maxima);
        let smallest = || Some(self.required(&lower).ok()?.iter().map(|(_, bytes)| bytes).sum());
        let squeeze = Squeeze {
            module: self.module(),
            demand: &self.residency.demand,
            ring: &self.residency.ring,
            required,
            limit,
            pages: self.kv_pages(),
            dynamic: (self.allocation == Allocation::Static).then(smallest).flatten(),
        };
        squeeze.advice(raise)
    }

    /// The placement that fits beside `need` after `error`, if the session may lower its budget and that helps.
    ///
    /// # Errors
    /// `error` where it may not or cannot.
    pub(super) fn shrunk(&mut self, error: Error, need: &Need) -> Result<Placement> {
        let before = self.residency.placement.device_bytes();
        if self.on_out_of_memory == OnOutOfMemory::Fail || error.kind() != Kind::OutOfMemory {
            return Err(error);
        }
        let room = self.room_for_weights(need)?;
        match self.residency.place(WeightBudget::Bytes(room), || Ok(room)) {
            Ok(placement) if placement.device_bytes() < before => {
                let reason = error.message().to_string();
                self.shrinks.push(Shrink { before, after: placement.device_bytes(), reason });
                self.residency.budget = WeightBudget::Bytes(room);
                Ok(placement)
            }
            _ => Err(error),
        }
    }

    /// How often the session lowered its weight budget, and why; see [`OnOutOfMemory::ShrinkWeights`].
    pub fn shrinks(&self) -> &[Shrink] {
        &self.shrinks
    }

    /// Allocates `need`; what is held goes first, unless the cap does not take `need`.
    pub(super) fn allocate(&mut self, need: &Need, fixed: bool) -> Result<()> {
        if let Some(cap) = self.cap
            && let Err(error) = self.check_cap_at(cap, need)
        {
            let placement = self.shrunk(error, need)?;
            self.release();
            self.move_weights(placement)?;
        }
        self.release();
        if let Err(error) = self.allocate_on_backend(need, fixed) {
            // Some of it may be there.
            self.release();
            let placement = self.shrunk(error, need)?;
            self.move_weights(placement)?;
            self.allocate_on_backend(need, fixed).inspect_err(|_| self.release())?;
        }
        self.ledger.set(Class::Activations, need.sizes.activations());
        self.ledger.set(Class::Io, need.sizes.io());
        self.note_device_memory();
        Ok(())
    }

    pub(super) fn allocate_on_backend(&mut self, need: &Need, fixed: bool) -> Result<()> {
        match &mut self.backend {
            Backend::Cpu(cpu) => cpu.allocate(&need.sizes),
            Backend::Cuda(cuda) => cuda.allocate(&need.sizes, need.scratch, fixed),
        }
    }

    pub(super) fn release(&mut self) {
        on_backend!(&mut self.backend, b => b.release());
        self.held = Held::Nothing;
        self.ledger.set(Class::Activations, 0);
        self.ledger.set(Class::Io, 0);
        self.note_device_memory();
    }

    /// Bytes that are free and bytes in all, of the device or of the host for a CPU session.
    ///
    /// # Errors
    /// `cuda/poisoned` on a device that has failed.
    pub fn memory(&self) -> Result<(u64, u64)> {
        match &self.backend {
            Backend::Cpu(_) => Ok((host_memory("MemAvailable:"), host_memory("MemTotal:"))),
            Backend::Cuda(cuda) => cuda.memory(),
        }
    }

    /// Enters what only a device session holds into the ledger.
    pub(super) fn note_device_memory(&mut self) {
        if let Backend::Cuda(cuda) = &self.backend {
            self.ledger.set(Class::Workspace, cuda.workspace_held());
            self.ledger.set(Class::Library, cuda.library_held());
            self.ledger.set(Class::Staging, cuda.staging_held());
            self.ledger.set(Class::Slack, cuda.slack_bytes());
        }
    }

    /// Enters what the driver has taken for itself besides its context, for code that it loads late and for graphs: what the device
    /// has less of than anybody asked for. More than [`LATE`] of it is another process's.
    pub(super) fn note_driver(&mut self) {
        if let Backend::Cuda(cuda) = &self.backend
            && let Ok(taken) = cuda.taken()
            && let late = taken.saturating_sub(self.ledger.on_device())
            && late <= LATE
        {
            self.ledger.set(Class::Context, self.ledger.now(Class::Context) + late);
        }
    }

    /// Compares the ledger with what the system reports. What a driver takes for itself is measured when the session is opened and
    /// whenever it has recorded a graph; what it has taken at other times is entered here, under [`Class::Context`].
    ///
    /// The system does not tell who took memory: the comparison is of use while no other session or process allocates or frees on
    /// the device. Without the driver's management library the context is neither counted nor reported. A CPU session
    /// compares with the growth of the process: pages that were never touched are counted and not reported.
    ///
    /// # Errors
    /// `cuda/poisoned` on a device that has failed.
    pub fn reconcile(&mut self) -> Result<Reconciliation> {
        let (counted, reported) = match &self.backend {
            Backend::Cpu(_) => (self.ledger.total(), resident_set().saturating_sub(self.resident_before)),
            Backend::Cuda(cuda) => {
                cuda.synchronize()?;
                (self.ledger.on_device(), cuda.taken()?)
            }
        };
        let found = Reconciliation { counted, reported };
        if matches!(self.backend, Backend::Cuda(_)) && found.difference() < 0 {
            let late = found.difference().unsigned_abs();
            self.ledger.set(Class::Context, self.ledger.now(Class::Context) + late);
        }
        Ok(found)
    }

    /// Bytes by class.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }
}

/// Most bytes that a driver takes for itself at once after its context and the code of an engine.
const LATE: u64 = 64 << 20;

fn holders(required: &[(Class, u64)]) -> String {
    let all: Vec<String> = required.iter().map(|(c, b)| format!("{} {b}", c.name())).collect();
    all.join(", ")
}
