//! A session: an engine with memory. Runs one step at a time.
//!
//! Static: arena, inputs and outputs are allocated once, for the largest step of any profile; no step allocates.
//! On profile change: for the largest step of one profile, which a shape or the caller selects.
//! Dynamic: a step allocates its arena for its own shape and gives it back; inputs and outputs have their own size too.
//! User managed: the caller lends memory for the arena, to this session or to several in turns.
//! All evaluate the same symbolic plan.

mod allocation;
mod memory;
mod steps;
mod weights;

use std::ops::{Deref, DerefMut};

use millrace_ir::checkpoint::{Checkpoint, TensorSource};
use millrace_ir::plan::stream::{Demand, Ring};
use millrace_ir::{Bindings, DType, Error, Kind, Module, Result, StateId};

use crate::budget::Residency;
use crate::cpu::Cpu;
use crate::cuda::{Cuda, GraphReport, LibraryReport, PoolReport};
use crate::engine::Engine;
use crate::ledger::{Class, Ledger};
use crate::lent::Lent;
use crate::memory::resident_set;
use crate::needs::{self, PAGES};
use crate::options::{Allocation, Device, OnOutOfMemory, SessionOptions};
use crate::profile::Profile;
use crate::sizes::{no_size, state_bytes};

use allocation::{Bounds, Held};
pub use memory::Shrink;
pub use weights::WeightBudgetGuard;

/// A tensor of the caller or of a session, dense and row-major, little-endian.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub shape: &'a [u64],
    /// Elements.
    pub bytes: &'a [u8],
}

/// What runs the steps, with its memory.
enum Backend {
    Cpu(Cpu),
    Cuda(Box<Cuda>),
}

/// Runs `$call` on whichever backend there is.
macro_rules! on_backend {
    ($backend:expr, $b:ident => $call:expr) => {
        match $backend {
            Backend::Cpu($b) => $call,
            Backend::Cuda($b) => $call,
        }
    };
}
use on_backend;

/// See the module.
pub struct Session<'e> {
    engine: &'e Engine,
    backend: Backend,
    state_shapes: Vec<(StateId, Vec<u64>)>,
    maxima: Bindings,
    output_shapes: Vec<Vec<u64>>,
    allocation: Allocation,
    bounds: Vec<Bounds>,
    choice: Option<usize>,
    held: Held,
    /// The process's resident set before the session.
    resident_before: u64,
    cap: Option<u64>,
    /// Whether steps may be begun ahead.
    ahead: bool,
    ledger: Ledger,
    profile: Option<Profile>,
    residency: Residency,
    /// Whether the weights are where `residency` says.
    placed: bool,
    source: Option<Checkpoint>,
    on_out_of_memory: OnOutOfMemory,
    shrinks: Vec<Shrink>,
}

fn open_backend(engine: &Engine, options: &SessionOptions) -> Result<Backend> {
    let target = engine.manifest().target.as_str();
    let threads = options.threads.unwrap_or_else(default_threads);
    match (target, options.device) {
        ("cpu", None | Some(Device::Cpu)) => Ok(Backend::Cpu(Cpu::new(engine.module(), threads)?)),
        ("cuda", None | Some(Device::Cuda(_))) => {
            let index = options.device.map_or(0, |d| if let Device::Cuda(index) = d { index } else { 0 });
            Ok(Backend::Cuda(Box::new(Cuda::new(engine, index, threads, options)?)))
        }
        (_, device) => {
            let wanted = match device {
                Some(Device::Cpu) => "the session is to run on cpu",
                Some(Device::Cuda(_)) => "the session is to run on cuda",
                None => "this runtime runs cpu and cuda",
            };
            let hint = match device {
                Some(Device::Cuda(_)) => "compile with --target cuda:ARCH",
                _ => "compile with --target cpu",
            };
            let message = format!("the engine is for {target}, {wanted}");
            Err(Error::new(Kind::Incompatible, "engine/target", message).hint(hint))
        }
    }
}
impl<'e> Session<'e> {
    /// Allocates what the options ask for. All sizes are known and compared with the cap, and with the free memory of
    /// a device, before the first allocation.
    ///
    /// # Errors
    /// `run/cap` if the cap does not suffice, `run/out-of-memory`, `engine/stripped` without a weight folder,
    /// `engine/kernel` if the engine names kernels this runtime does not have, `engine/target` if it is for another
    /// device; `cuda/..` if there is no such device or the engine has no kernels for it.
    pub fn new(engine: &'e Engine, options: SessionOptions) -> Result<Session<'e>> {
        let module = engine.module();
        let resident_before = resident_set();
        let backend = open_backend(engine, &options)?;
        let maxima = needs::upper_bounds(module, options.kv_pages)?;
        let (demand, align) = match &backend {
            Backend::Cpu(_) => (Demand::of(module)?, options.ring.align),
            // That of the blocks of a device.
            Backend::Cuda(cuda) => (cuda.demand(module)?, options.ring.align.max(Ring::DEFAULT.align)),
        };
        let residency = Residency::new(module, demand, Ring { align, ..options.ring })?;
        let mut session = Session {
            engine,
            backend,
            bounds: Bounds::of(engine, &maxima),
            choice: None,
            held: Held::Nothing,
            resident_before,
            state_shapes: Vec::new(),
            maxima,
            output_shapes: Vec::new(),
            allocation: options.allocation,
            cap: options.cap,
            ahead: options.ahead,
            ledger: Ledger::default(),
            profile: None,
            residency,
            placed: true,
            source: None,
            on_out_of_memory: options.on_out_of_memory,
            shrinks: Vec::new(),
        };
        session.choose(&options.profile)?;
        let placement = session.placement_for(options.budget)?;
        (session.residency.placement, session.residency.budget) = (placement, options.budget);
        if let Err(error) = session.check_memory() {
            let placement = session.shrunk(error, &session.standing_need()?)?;
            session.residency.placement = placement;
            session.check_memory()?;
        }
        session.source = options.weights.as_deref().map(Checkpoint::open).transpose()?;
        let source = session.source.as_ref().map(|c| c as &dyn TensorSource);
        on_backend!(&mut session.backend, b => b.load(engine, source, &session.maxima, &session.residency)?);
        session.note_weights();
        session.ledger.set(Class::Kv, state_bytes(module, &session.maxima)?);
        for (id, state) in module.states.iter() {
            let shape = state.ty.shape_at(&session.maxima).ok_or_else(|| no_size(&state.name))?;
            session.state_shapes.push((id, shape));
        }
        session.hold_standing()?;
        session.note_device_memory();
        if let Backend::Cuda(cuda) = &session.backend {
            session.ledger.set(Class::Context, cuda.driver_bytes());
        }
        session.note_driver();
        Ok(session)
    }

    fn module(&self) -> &'e Module {
        self.engine.module()
    }

    /// The engine.
    pub fn engine(&self) -> &'e Engine {
        self.engine
    }

    /// When activation memory is allocated.
    pub fn current_allocation(&self) -> Allocation {
        self.allocation
    }

    /// Cache pages, 0 without a cache.
    pub fn kv_pages(&self) -> u64 {
        self.maxima.iter().find(|(s, _)| s.name() == PAGES).map_or(0, |(_, v)| v)
    }

    /// Changes the allocation until the guard is dropped; works in every direction and any nesting.
    ///
    /// # Errors
    /// `run/cap` or `run/out-of-memory` if the new allocation holds memory that is not there; the session then stays as it was.
    pub fn allocation(&mut self, allocation: Allocation) -> Result<AllocationGuard<'_, 'e>> {
        let before = self.allocation;
        self.set_allocation(allocation)?;
        Ok(AllocationGuard { session: self, before })
    }

    /// Changes the allocation.
    ///
    /// # Errors
    /// As [`Session::allocation`].
    pub fn set_allocation(&mut self, allocation: Allocation) -> Result<()> {
        if allocation == self.allocation {
            return Ok(());
        }
        let before = std::mem::replace(&mut self.allocation, allocation);
        if let Err(error) = self.hold_standing() {
            self.allocation = before;
            // Fails if there is no memory for that any more either; the next step tries again, and tells.
            let _ = self.hold_standing();
            return Err(error);
        }
        Ok(())
    }

    /// Runs a step in memory that the caller lends, if there is any.
    pub(crate) fn run_lent(&mut self, inputs: &[TensorRef<'_>], lent: Option<&mut Lent<'_>>) -> Result<()> {
        self.drop_ahead();
        self.run_with(inputs, None, None, lent)
    }

    /// [`Session::run_argmax`] in memory that the caller lends, if there is any.
    pub(crate) fn run_argmax_with(
        &mut self,
        inputs: &[TensorRef<'_>],
        output: usize,
        lent: Option<&mut Lent<'_>>,
    ) -> Result<Vec<i32>> {
        self.drop_ahead();
        self.run_with(inputs, Some(output), None, lent)?;
        let told = match &mut self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(cuda) => cuda.take()?,
        };
        told.map_or_else(|| self.argmax(output), Ok)
    }

    /// Attaches a profile that records every step from here on; returns the one attached before.
    pub fn attach_profile(&mut self, profile: Profile) -> Option<Profile> {
        self.profile.replace(profile)
    }

    /// Detaches the profile, which ends recording.
    pub fn detach_profile(&mut self) -> Option<Profile> {
        self.profile.take()
    }

    /// Threads that kernels use; 0 on a device.
    pub fn threads(&self) -> usize {
        match &self.backend {
            Backend::Cpu(cpu) => cpu.threads(),
            Backend::Cuda(_) => 0,
        }
    }

    /// Where the session runs.
    pub fn device(&self) -> Device {
        match &self.backend {
            Backend::Cpu(_) => Device::Cpu,
            Backend::Cuda(cuda) => Device::Cuda(cuda.index()),
        }
    }

    /// What has become of CUDA graphs; `None` on the CPU.
    pub fn graph_report(&self) -> Option<GraphReport> {
        match &self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(cuda) => Some(cuda.graph_report()),
        }
    }

    /// What a library of matrix products does for a device session; `None` where its engine names none, and on the CPU.
    pub fn library_report(&self) -> Option<LibraryReport> {
        match &self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(cuda) => cuda.library_report(),
        }
    }

    /// What the memory pool of a device session holds; `None` on the CPU.
    ///
    /// # Errors
    /// `cuda/poisoned` on a device that has failed.
    pub fn pool_report(&self) -> Result<Option<PoolReport>> {
        match &self.backend {
            Backend::Cpu(_) => Ok(None),
            Backend::Cuda(cuda) => cuda.pool_report().map(Some),
        }
    }

    /// Gives pooled memory that is not in use back to the device.
    ///
    /// # Errors
    /// `cuda/poisoned` on a device that has failed.
    pub fn trim_pool(&self) -> Result<()> {
        match &self.backend {
            Backend::Cpu(_) => Ok(()),
            Backend::Cuda(cuda) => cuda.trim_pool(),
        }
    }

    /// Allocations of device memory so far; 0 on the CPU. Steps of a static session make none.
    pub fn allocations(&self) -> u64 {
        match &self.backend {
            Backend::Cpu(_) => 0,
            Backend::Cuda(cuda) => cuda.allocations(),
        }
    }

    /// Waits until the device has done all work of this session.
    ///
    /// # Errors
    /// `cuda/poisoned` on a device that has failed.
    pub fn synchronize(&self) -> Result<()> {
        match &self.backend {
            Backend::Cpu(_) => Ok(()),
            Backend::Cuda(cuda) => cuda.synchronize(),
        }
    }
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Restores a session's allocation when dropped.
pub struct AllocationGuard<'s, 'e> {
    session: &'s mut Session<'e>,
    before: Allocation,
}

impl<'e> Deref for AllocationGuard<'_, 'e> {
    type Target = Session<'e>;
    fn deref(&self) -> &Session<'e> {
        self.session
    }
}

impl DerefMut for AllocationGuard<'_, '_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.session
    }
}

impl Drop for AllocationGuard<'_, '_> {
    fn drop(&mut self) {
        // Going back can fail for lack of memory; the session then stays as it is and usable.
        let _ = self.session.set_allocation(self.before);
    }
}
