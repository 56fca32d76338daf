//! A session: an engine with memory. Runs one step at a time.
//!
//! Static: arena, inputs and outputs are allocated once, for the largest step of any profile; no step allocates.
//! On profile change: for the largest step of one profile, which a shape or the caller selects.
//! Dynamic: a step allocates its arena for its own shape and gives it back; inputs and outputs have their own size too.
//! User managed: the caller lends memory for the arena, to this session or to several in turns.
//! All evaluate the same symbolic plan.

mod allocation;

use std::ops::{Deref, DerefMut};

use millrace_ir::bind::bind;
use millrace_ir::checkpoint::{Checkpoint, TensorSource};
use millrace_ir::plan::stream::{self, Demand, Placement, Ring};
use millrace_ir::{Bindings, DType, Error, Kind, Module, Result, StateId, TensorType};

use crate::budget::{Residency, WeightBudget};
use crate::cpu::Cpu;
use crate::cuda::{After, Cuda, GraphReport, PoolReport};
use crate::engine::Engine;
use crate::ledger::{Class, Ledger, Reconciliation};
use crate::lent::Lent;
use crate::memory::{host_memory, resident_set};
use crate::needs::{self, PAGES, Squeeze};
use crate::options::{Allocation, Device, OnOutOfMemory, SessionOptions};
use crate::profile::{Profile, sequences};
use crate::sizes::{StepSizes, no_size, state_bytes};
use crate::weights::Supply;

use allocation::{Bounds, Held, Need};

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
        Ok(session)
    }

    fn module(&self) -> &'e Module {
        self.engine.module()
    }

    /// Bytes the session will hold in each class with memory for a step at `bindings`, staging memory left out. Cache pages need
    /// no value.
    ///
    /// # Errors
    /// `run/no-size` if a size has no value.
    pub fn required(&self, bindings: &Bindings) -> Result<Vec<(Class, u64)>> {
        self.required_with(&self.need_at(bindings)?)
    }

    /// Bytes by class if steps allocate `need`.
    fn required_with(&self, need: &Need) -> Result<Vec<(Class, u64)>> {
        let mut required = vec![
            (Class::Weights, self.residency.placement.resident_bytes),
            (Class::Ring, self.residency.placement.ring_bytes()),
            (Class::Activations, need.sizes.activations()),
            (Class::Io, need.sizes.io()),
            (Class::Kv, state_bytes(self.module(), &self.maxima)?),
        ];
        if let Backend::Cuda(cuda) = &self.backend {
            required.push((Class::Workspace, need.scratch.saturating_add(cuda.counter_bytes())));
        }
        Ok(required)
    }

    /// Compares what is needed at load with the cap and with the free memory of a device.
    fn check_memory(&self) -> Result<()> {
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

    fn check_cap_at(&self, cap: u64, need: &Need) -> Result<()> {
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
    fn advice(&self, required: &[(Class, u64)], limit: u64, raise: &str) -> String {
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
    fn shrunk(&mut self, error: Error, need: &Need) -> Result<Placement> {
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
    fn allocate(&mut self, need: &Need, fixed: bool) -> Result<()> {
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

    fn allocate_on_backend(&mut self, need: &Need, fixed: bool) -> Result<()> {
        match &mut self.backend {
            Backend::Cpu(cpu) => cpu.allocate(&need.sizes),
            Backend::Cuda(cuda) => cuda.allocate(&need.sizes, need.scratch, fixed),
        }
    }

    fn release(&mut self) {
        on_backend!(&mut self.backend, b => b.release());
        self.held = Held::Nothing;
        self.ledger.set(Class::Activations, 0);
        self.ledger.set(Class::Io, 0);
        self.note_device_memory();
    }

    /// Enters the weights into the ledger.
    fn note_weights(&mut self) {
        let placement = &self.residency.placement;
        let (mut resident, mut ring) = (placement.resident_bytes, placement.ring_bytes());
        match &self.backend {
            Backend::Cpu(cpu) => (resident, ring) = cpu.weight_bytes().unwrap_or((resident, ring)),
            Backend::Cuda(cuda) => {
                (resident, ring) = cuda.weight_bytes();
                self.ledger.set(Class::HostWeights, cuda.host_weight_bytes());
            }
        }
        self.ledger.set(Class::Weights, resident);
        self.ledger.set(Class::Ring, ring);
    }

    /// The placement of the weights under `budget`.
    fn placement_for(&self, budget: WeightBudget) -> Result<Placement> {
        self.residency.place(budget, || self.room_for_weights(&self.need_of_all()?))
    }

    /// Bytes that weights could take: what is free now and under the cap, besides what the rest of the session takes with
    /// `need`.
    fn room_for_weights(&self, need: &Need) -> Result<u64> {
        let weights = |c: &Class| matches!(c, Class::Weights | Class::Ring);
        let required = self.required_with(need)?;
        let rest: u64 = required.iter().filter(|(c, _)| !weights(c)).map(|(_, b)| b).sum();
        let held = |c: &Class| self.ledger.now(*c);
        let own = |c: &&Class| c.is_own() && !c.is_on_host();
        let own: u64 = Class::ALL.iter().filter(own).map(held).sum();
        let (free, _) = self.memory()?;
        Ok(free.saturating_add(own).min(self.cap.unwrap_or(u64::MAX)).saturating_sub(rest))
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

    /// Bytes of weights that may stream; 0 for an engine compiled without weight streaming.
    pub fn total_device_budget(&self) -> u64 {
        self.residency.streamable()
    }

    /// Bytes that weights and their ring take now.
    pub fn device_budget(&self) -> u64 {
        self.residency.placement.device_bytes()
    }

    /// The least bytes that weights and their ring can take.
    pub fn minimum_budget(&self) -> u64 {
        let Residency { demand, ring, .. } = &self.residency;
        stream::minimum(demand, ring).min(stream::resident(demand, ring))
    }

    /// The bytes that [`WeightBudget::Auto`] would take now.
    ///
    /// # Errors
    /// `run/not-streamable`, `cuda/poisoned` on a device that has failed.
    pub fn automatic_budget(&self, reserve: u64) -> Result<u64> {
        self.placement_for(WeightBudget::Auto { reserve }).map(|p| p.device_bytes())
    }

    /// The budget in force.
    pub fn current_weight_budget(&self) -> WeightBudget {
        self.residency.budget
    }

    /// What is resident and what streams, with the demand whose items and uses it counts.
    pub fn placement(&self) -> (&Demand, &Placement) {
        (&self.residency.demand, &self.residency.placement)
    }

    /// Changes the weight budget between two steps: weights move, results and states stay as they are. Returns the placement
    /// that took effect.
    ///
    /// # Errors
    /// `run/weight-budget` under the minimum, `run/not-streamable` for engines without streamable weights, `run/cap` and
    /// `run/out-of-memory`; the session then stays as it was. If weights could not even go back to where they were, steps
    /// answer `run/not-placed` until a budget takes effect.
    pub fn set_weight_budget(&mut self, budget: WeightBudget) -> Result<&Placement> {
        let placement = self.placement_for(budget)?;
        if placement != self.residency.placement || !self.placed {
            if let Some(cap) = self.cap {
                let before = std::mem::replace(&mut self.residency.placement, placement.clone());
                let fits = self.check_cap_at(cap, &self.standing_need()?);
                self.residency.placement = before;
                fits?;
            }
            self.move_weights(placement)?;
        }
        self.residency.budget = budget;
        Ok(&self.residency.placement)
    }

    /// Makes `placement` take effect, or leaves everything as it was if that is possible.
    fn move_weights(&mut self, placement: Placement) -> Result<()> {
        let before = std::mem::replace(&mut self.residency.placement, placement);
        let moved = self.bring_weights();
        if moved.is_err() {
            self.residency.placement = before;
            self.placed = self.bring_weights().is_ok();
        } else {
            self.placed = true;
        }
        moved
    }

    /// Brings the weights to where `residency` has them.
    fn bring_weights(&mut self) -> Result<()> {
        let source = self.source.as_ref().map(|c| c as &dyn TensorSource);
        let moved = on_backend!(&mut self.backend, b => b.place(self.engine, source, &self.residency));
        self.note_weights();
        self.note_device_memory();
        moved
    }

    /// [`Session::set_weight_budget`] until the guard is dropped.
    ///
    /// # Errors
    /// As there.
    pub fn weight_budget(&mut self, budget: WeightBudget) -> Result<WeightBudgetGuard<'_, 'e>> {
        let before = self.residency.budget;
        self.set_weight_budget(budget)?;
        Ok(WeightBudgetGuard { session: self, before })
    }

    /// Enters what only a device session holds into the ledger.
    fn note_device_memory(&mut self) {
        if let Backend::Cuda(cuda) = &self.backend {
            self.ledger.set(Class::Workspace, cuda.workspace_held());
            self.ledger.set(Class::Staging, cuda.staging_held());
            self.ledger.set(Class::Slack, cuda.slack_bytes());
        }
    }

    /// Compares the ledger with what the system reports. What a driver has taken for itself since the session was opened, such as
    /// for graphs or code that it loads late, is entered under [`Class::Context`].
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

    /// Clears every state to zero. On a device that has failed it does nothing: the next step tells.
    pub fn reset_states(&mut self) {
        on_backend!(&mut self.backend, b => b.reset_states());
    }

    /// Runs one step. `inputs` are in the order of the graph's inputs; outputs are read by [`Session::output`]. On a
    /// device the step may still be running when this returns; reading an output waits for it.
    ///
    /// # Errors
    /// `run/bad-inputs`, `run/bad-dtype`, `run/bad-shape`, `run/out-of-range` for inputs that do not fit, `run/cap` and
    /// `run/out-of-memory` for dynamic sessions, `run/bad-index` for index values that point nowhere,
    /// `cuda/poisoned` on a device that has failed.
    pub fn run(&mut self, inputs: &[TensorRef<'_>]) -> Result<()> {
        self.run_lent(inputs, None)
    }

    /// [`Session::run`] with activations in memory that the caller lends for this step; for [`Allocation::UserManaged`].
    ///
    /// ```no_run
    /// # use millrace_runtime::{Arena, Engine, Session, TensorRef};
    /// # fn turns(large: &mut Session<'_>, small: &mut Session<'_>, inputs: &[TensorRef<'_>]) -> millrace_ir::Result<()> {
    /// let bytes = large.most_lent_bytes()?.max(small.most_lent_bytes()?);
    /// let mut arena = Arena::on(large.device(), bytes)?;
    /// large.run_in(&mut arena.lend(), inputs)?;
    /// small.run_in(&mut arena.lend(), inputs)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Session::run`], `run/lent-too-small` with the bytes that are needed, `run/lent-elsewhere` for memory of another
    /// device, `run/not-user-managed` under other allocations.
    pub fn run_in(&mut self, lent: &mut Lent<'_>, inputs: &[TensorRef<'_>]) -> Result<()> {
        self.run_lent(inputs, Some(lent))
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

    /// [`Session::run`] and then [`Session::argmax`] of an output, on a device without a pause between them.
    ///
    /// # Errors
    /// As those two.
    pub fn run_argmax(&mut self, inputs: &[TensorRef<'_>], output: usize) -> Result<Vec<i32>> {
        self.run_argmax_with(inputs, output, None)
    }

    /// Begins a step and the argmax of output `output`, and returns before they have ended; [`Session::take_argmax`]
    /// waits for them. At most two steps are on their way at once. With `fed` that input of the step is the argmax of
    /// the step begun before it, which nobody has taken yet, and what `inputs` holds there is not read: so a device goes
    /// from step to step without waiting for the host. [`Session::run`] and [`Session::run_argmax`] forget steps that
    /// were not taken.
    ///
    /// Returns false, and has done nothing, where steps cannot be begun ahead: on the CPU, where memory for steps
    /// moves or is lent, and where the engine has no kernel for the argmax.
    ///
    /// # Errors
    /// As [`Session::run`] and [`Session::argmax`]; `run/bad-order` if two steps are on their way, if no step is that
    /// could feed, or if the input has not an i32 a row.
    pub fn start_argmax(
        &mut self,
        inputs: &[TensorRef<'_>],
        output: usize,
        fed: Option<usize>,
    ) -> Result<bool> {
        if !self.runs_ahead() {
            return Ok(false);
        }
        if fed.is_none() {
            self.drop_ahead();
        }
        self.run_with(inputs, Some(output), fed, None).map(|()| true)
    }

    /// The argmax of the first step begun by [`Session::start_argmax`] and not taken, as [`Session::argmax`] tells it;
    /// -2 if the largest element of a row is not finite.
    ///
    /// # Errors
    /// `run/bad-order` if there is none, `cuda/poisoned` on a device that has failed.
    pub fn take_argmax(&mut self) -> Result<Vec<i32>> {
        let told = match &mut self.backend {
            Backend::Cpu(_) => None,
            Backend::Cuda(cuda) => cuda.take()?,
        };
        told.ok_or_else(|| Error::new(Kind::Usage, "run/bad-order", "no step is on its way"))
    }

    /// Whether [`Session::start_argmax`] begins steps.
    pub fn runs_ahead(&self) -> bool {
        match &self.backend {
            Backend::Cpu(_) => false,
            Backend::Cuda(cuda) => self.ahead && self.stays() && cuda.runs_ahead(),
        }
    }

    fn drop_ahead(&mut self) {
        if let Backend::Cuda(cuda) = &mut self.backend {
            cuda.drop_ahead();
        }
    }

    /// Runs a step; a device may begin the argmax of output `argmax` as well.
    fn run_with(
        &mut self,
        inputs: &[TensorRef<'_>],
        argmax: Option<usize>,
        fed: Option<usize>,
        lent: Option<&mut Lent<'_>>,
    ) -> Result<()> {
        let module = self.module();
        let declared = module.input_types();
        if declared.len() != inputs.len() {
            let names: Vec<&str> = declared.iter().map(|(n, _)| *n).collect();
            let message = format!("takes {} inputs, got {}", declared.len(), inputs.len());
            return Err(Error::new(Kind::Usage, "run/bad-inputs", message)
                .hint(format!("inputs are {}", names.join(", "))));
        }
        for ((name, ty), input) in declared.iter().zip(inputs) {
            if ty.dtype != input.dtype {
                let message = format!("holds {}, declared {ty}", input.dtype);
                return Err(Error::new(Kind::BadInput, "run/bad-dtype", message).at(format!("\"{name}\"")));
            }
            let bytes = millrace_ir::types::const_bytes(input.dtype, input.shape);
            if bytes != Some(input.bytes.len() as u64) {
                let message =
                    format!("shape {:?} needs {bytes:?} bytes, got {}", input.shape, input.bytes.len());
                return Err(Error::new(Kind::BadInput, "run/bad-shape", message).at(format!("\"{name}\"")));
            }
        }
        let mut tensors: Vec<(&str, &TensorType, &[u64])> =
            declared.iter().zip(inputs).map(|((n, t), i)| (*n, *t, i.shape)).collect();
        for (id, shape) in &self.state_shapes {
            let state = &module.states[*id];
            tensors.push((&state.name, &state.ty, shape));
        }
        let bindings = bind(&module.dims, &tensors)?;
        self.check_lent(lent.as_ref().map(|l| l.len()), &bindings)?;
        self.hold_for(&bindings)?;
        if let Some(profile) = &mut self.profile {
            let names: Vec<&str> = declared.iter().map(|(n, _)| *n).collect();
            profile.begin(bindings.clone(), sequences(&names, inputs), module.graph.order.len());
        }
        let sizes = StepSizes::at(module, &bindings)?;
        if lent.is_some() {
            self.ledger.set(Class::Activations, sizes.activations());
        }
        self.output_shapes = module
            .output_types()
            .into_iter()
            .map(|(name, ty)| ty.shape_at(&bindings).ok_or_else(|| no_size(name)))
            .collect::<Result<_>>()?;
        let rows = argmax.map(|output| self.rows(output).map(|(rows, width)| (output, rows, width)));
        let profile = self.profile.as_mut();
        let result = match &mut self.backend {
            Backend::Cpu(cpu) => {
                let source = self.source.as_ref().map(|c| c as &dyn TensorSource);
                let supply = Supply::new(self.engine, source);
                let lent = lent.map(Lent::host).transpose();
                lent.and_then(|lent| cpu.run(supply, module, inputs, &sizes, &bindings, lent, profile))
            }
            Backend::Cuda(cuda) => {
                let lent = lent.map(|l| l.device(cuda.index())).transpose();
                let source = self.source.as_ref().map(|c| c as &dyn TensorSource);
                rows.transpose().and_then(|argmax| {
                    let after = After { argmax, fed };
                    cuda.start((self.engine, source), inputs, &sizes, &bindings, after, lent?, profile)
                })
            }
        };
        if let Some(profile) = &mut self.profile {
            profile.end();
        }
        self.after_step();
        self.note_device_memory();
        result
    }

    /// Rows and width of output `index`, which must be f32.
    fn rows(&self, index: usize) -> Result<(u64, u64)> {
        let shape = self.output_shapes.get(index);
        let ty = self.module().output_types().into_iter().nth(index).map(|(_, ty)| ty.dtype);
        let width = shape.and_then(|s| s.last()).copied().filter(|w| *w > 0 && *w <= i32::MAX as u64);
        match (shape, ty, width) {
            (Some(shape), Some(DType::F32), Some(width)) => {
                Ok((shape[..shape.len() - 1].iter().product(), width))
            }
            _ => Err(Error::new(
                Kind::Usage,
                "run/bad-output",
                format!("output {index} of the last step has no rows of f32"),
            )),
        }
    }

    /// For each row of output `index` of the last step, an f32 tensor whose last axis is a row: the index of the
    /// largest element, the lowest among equals; -1 if the row holds a NaN or its largest element is not finite.
    ///
    /// # Errors
    /// `run/bad-output` if there is no such output, `cuda/poisoned` on a device that has failed.
    pub fn argmax(&mut self, index: usize) -> Result<Vec<i32>> {
        let (rows, width) = self.rows(index)?;
        if let Backend::Cuda(cuda) = &mut self.backend
            && let Some(indices) = cuda.argmax(index, rows, width)?
        {
            return Ok(indices);
        }
        let output = self.read_output(index)?;
        let values: Vec<f32> =
            output.bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect();
        Ok(values.chunks_exact(width as usize).map(argmax_row).collect())
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

    /// Output `index` of the last step; `None` if there is none or its device has failed.
    pub fn output(&self, index: usize) -> Option<TensorRef<'_>> {
        self.read_output(index).ok()
    }

    /// [`Session::output`] with the reason for an absence. A device's output is fetched when it is first asked for.
    ///
    /// # Errors
    /// `run/bad-output` if there is no such output, `cuda/poisoned` on a device that has failed.
    pub fn read_output(&self, index: usize) -> Result<TensorRef<'_>> {
        let missing =
            || Error::new(Kind::Usage, "run/bad-output", format!("the last step has no output {index}"));
        let shape = self.output_shapes.get(index).ok_or_else(missing)?;
        let (_, ty) = self.module().output_types().into_iter().nth(index).ok_or_else(missing)?;
        let len = millrace_ir::types::const_bytes(ty.dtype, shape).ok_or_else(missing)?;
        let bytes = match &self.backend {
            Backend::Cpu(cpu) => cpu.output(index),
            Backend::Cuda(cuda) => cuda.output(index, len)?,
        };
        let bytes = usize::try_from(len).ok().and_then(|len| bytes?.get(..len)).ok_or_else(missing)?;
        Ok(TensorRef { dtype: ty.dtype, shape, bytes })
    }
}

fn holders(required: &[(Class, u64)]) -> String {
    let all: Vec<String> = required.iter().map(|(c, b)| format!("{} {b}", c.name())).collect();
    all.join(", ")
}

/// See [`Session::argmax`].
fn argmax_row(row: &[f32]) -> i32 {
    let mut best = 0;
    for (at, value) in row.iter().enumerate() {
        if value.is_nan() {
            return -1;
        }
        if *value > row[best] {
            best = at;
        }
    }
    // The width was compared with the range of i32.
    if row.get(best).is_some_and(|v| v.is_finite()) { best as i32 } else { -1 }
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Restores a session's weight budget when dropped.
pub struct WeightBudgetGuard<'s, 'e> {
    session: &'s mut Session<'e>,
    before: WeightBudget,
}

impl<'e> Deref for WeightBudgetGuard<'_, 'e> {
    type Target = Session<'e>;
    fn deref(&self) -> &Session<'e> {
        self.session
    }
}

impl DerefMut for WeightBudgetGuard<'_, '_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.session
    }
}

impl Drop for WeightBudgetGuard<'_, '_> {
    fn drop(&mut self) {
        // Going back can fail for lack of memory; the session then keeps the budget and stays usable.
        let _ = self.session.set_weight_budget(self.before);
    }
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
