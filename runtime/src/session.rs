//! A session: an engine with memory. Runs one step at a time, with static or dynamic allocation.
//!
//! Static: arena, inputs and outputs are allocated once at the upper bounds of the symbols; no step allocates.
//! Dynamic: a step allocates its arena for its own shape and gives it back; inputs and outputs have their own size too.
//! Both evaluate the same symbolic plan.

use std::ops::{Deref, DerefMut};
use std::path::PathBuf;

use millrace_ir::bind::bind;
use millrace_ir::checkpoint::{Checkpoint, TensorSource};
use millrace_ir::{Bindings, DType, Error, Id, Kind, Module, Result, StateId, TensorType};
use millrace_kernels::cpu::Pool;

use crate::cpu::{Program, Regions};
use crate::engine::Engine;
use crate::ledger::{Class, Ledger};
use crate::memory::{Buffer, Region};
use crate::profile::{Profile, sequences};
use crate::weights::Weights;

/// When activation memory is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Allocation {
    /// Once, at the upper bounds.
    #[default]
    Static,
    /// For each step, at its shape.
    Dynamic,
}

/// How a session is set up.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// When activation memory is allocated.
    pub allocation: Allocation,
    /// Threads; all processors by default.
    pub threads: Option<usize>,
    /// Bound on all bytes the session holds.
    pub cap: Option<u64>,
    /// Cache pages; the engine's maximum by default.
    pub kv_pages: Option<u64>,
    /// Model folder that a stripped engine takes its weights from.
    pub weights: Option<PathBuf>,
}

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

/// See the module.
pub struct Session<'e> {
    engine: &'e Engine,
    pool: Pool,
    program: Program,
    weights: Weights,
    states: Vec<Option<Buffer>>,
    state_shapes: Vec<(StateId, Vec<u64>)>,
    maxima: Bindings,
    arenas: Vec<Buffer>,
    inputs: Vec<Buffer>,
    outputs: Vec<Buffer>,
    output_shapes: Vec<Vec<u64>>,
    allocation: Allocation,
    cap: Option<u64>,
    ledger: Ledger,
    profile: Option<Profile>,
}

/// The symbol that sizes caches.
const PAGES: &str = "pages";

fn no_size(what: &str) -> Error {
    Error::new(Kind::BadInput, "run/no-size", format!("the size of {what} has no value"))
        .hint("every symbol of the graph must occur in an input or a state")
}

fn bytes_at(ty: &TensorType, bindings: &Bindings, what: &str) -> Result<u64> {
    ty.bytes().extent(bindings).ok_or_else(|| no_size(what))
}

impl<'e> Session<'e> {
    /// Allocates what the options ask for. All sizes are known and compared with the cap before the first allocation.
    ///
    /// # Errors
    /// `run/cap` if the cap does not suffice, `run/out-of-memory`, `engine/stripped` without a weight folder,
    /// `engine/kernel` if the engine names kernels this runtime does not have.
    pub fn new(engine: &'e Engine, options: SessionOptions) -> Result<Session<'e>> {
        let module = engine.module();
        if engine.manifest().target != "cpu" {
            let message = format!("the engine is for {}, this runtime runs cpu", engine.manifest().target);
            return Err(
                Error::new(Kind::Incompatible, "engine/target", message).hint("compile with --target cpu")
            );
        }
        let program = Program::new(module)?;
        let mut maxima = Bindings::maxima(&module.dims);
        if let (Some(pages), Some(decl)) =
            (options.kv_pages, module.dims.iter().find(|d| d.sym.name() == PAGES))
        {
            if !(decl.min..=decl.max).contains(&pages) {
                let message = format!("{pages} cache pages are outside {}..={}", decl.min, decl.max);
                return Err(Error::new(Kind::Usage, "run/bad-pages", message));
            }
            maxima.set(decl.sym, pages);
        }
        let mut session = Session {
            engine,
            pool: Pool::new(options.threads.unwrap_or_else(default_threads)),
            program,
            weights: Weights::none(),
            states: Vec::new(),
            state_shapes: Vec::new(),
            maxima,
            arenas: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            output_shapes: Vec::new(),
            allocation: options.allocation,
            cap: options.cap,
            ledger: Ledger::default(),
            profile: None,
        };
        session.check_cap()?;
        let checkpoint = options.weights.as_deref().map(Checkpoint::open).transpose()?;
        session.weights = Weights::load(engine, checkpoint.as_ref().map(|c| c as &dyn TensorSource))?;
        session.ledger.set(Class::Weights, session.weights.total());
        session.states.resize_with(module.states.bound(), || None);
        for (id, state) in module.states.iter() {
            let bytes = bytes_at(&state.ty, &session.maxima, &state.name)?;
            session.states[id.index()] = Some(Buffer::zeroed(bytes, "the cache")?);
            session.ledger.add(Class::Kv, bytes);
            let shape = state.ty.shape_at(&session.maxima).ok_or_else(|| no_size(&state.name))?;
            session.state_shapes.push((id, shape));
        }
        if session.allocation == Allocation::Static {
            session.allocate(&session.maxima.clone())?;
        }
        Ok(session)
    }

    fn module(&self) -> &'e Module {
        self.engine.module()
    }

    /// Bytes the session will hold in each class at `bindings`.
    ///
    /// # Errors
    /// `run/no-size` if a size has no value.
    pub fn required(&self, bindings: &Bindings) -> Result<[(Class, u64); 4]> {
        let module = self.module();
        let mut kv = 0;
        for (_, state) in module.states.iter() {
            kv += bytes_at(&state.ty, bindings, &state.name)?;
        }
        let mut io = 0;
        for (name, ty) in module.input_types().into_iter().chain(module.output_types()) {
            io += bytes_at(ty, bindings, name)?;
        }
        let mut activations = 0;
        for (_, arena) in module.arenas.iter() {
            activations += arena.size.extent(bindings).ok_or_else(|| no_size(&arena.name))?;
        }
        let reader = millrace_ir::weights::WeightReader::new(module);
        let weights = module.used_weights().into_iter().map(|w| reader.len(w)).sum::<Result<u64>>()?;
        Ok([(Class::Weights, weights), (Class::Activations, activations), (Class::Io, io), (Class::Kv, kv)])
    }

    fn check_cap(&self) -> Result<()> {
        let Some(cap) = self.cap else { return Ok(()) };
        // A dynamic session is asked for the smallest step at load and for each step's own shape later.
        let bindings = match self.allocation {
            Allocation::Static => self.maxima.clone(),
            Allocation::Dynamic => {
                let mut minima = Bindings::minima(&self.module().dims);
                self.maxima.iter().filter(|(s, _)| s.name() == PAGES).for_each(|(s, v)| minima.set(s, v));
                minima
            }
        };
        self.check_cap_at(cap, &bindings)
    }

    fn check_cap_at(&self, cap: u64, bindings: &Bindings) -> Result<()> {
        let required = self.required(bindings)?;
        let total: u64 = required.iter().map(|(_, b)| b).sum();
        if total <= cap {
            return Ok(());
        }
        let holders: Vec<String> = required.iter().map(|(c, b)| format!("{} {b}", c.name())).collect();
        Err(Error::new(
            Kind::OutOfMemory,
            "run/cap",
            format!("{total} bytes are needed, the cap is {cap} ({})", holders.join(", ")),
        )
        .hint("raise --memory-cap, use --memory dynamic, or compile with smaller limits"))
    }

    /// Allocates arena, inputs and outputs for `bindings`.
    fn allocate(&mut self, bindings: &Bindings) -> Result<()> {
        let module = self.module();
        self.release();
        if let Some(cap) = self.cap {
            self.check_cap_at(cap, bindings)?;
        }
        for (_, arena) in module.arenas.iter() {
            let bytes = arena.size.extent(bindings).ok_or_else(|| no_size(&arena.name))?;
            self.arenas.push(Buffer::zeroed(bytes, "activations")?);
            self.ledger.add(Class::Activations, bytes);
        }
        for (name, ty) in module.input_types() {
            let bytes = bytes_at(ty, bindings, name)?;
            self.inputs.push(Buffer::zeroed(bytes, "inputs")?);
            self.ledger.add(Class::Io, bytes);
        }
        for (name, ty) in module.output_types() {
            let bytes = bytes_at(ty, bindings, name)?;
            self.outputs.push(Buffer::zeroed(bytes, "outputs")?);
            self.ledger.add(Class::Io, bytes);
        }
        Ok(())
    }

    fn release(&mut self) {
        self.arenas.clear();
        self.inputs.clear();
        self.outputs.clear();
        self.ledger.set(Class::Activations, 0);
        self.ledger.set(Class::Io, 0);
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

    /// Changes the allocation until the guard is dropped; works in both directions.
    ///
    /// # Errors
    /// `run/cap` or `run/out-of-memory` when changing to static; the session then stays as it was.
    pub fn allocation(&mut self, allocation: Allocation) -> Result<AllocationGuard<'_, 'e>> {
        let before = self.allocation;
        self.set_allocation(allocation)?;
        Ok(AllocationGuard { session: self, before })
    }

    fn set_allocation(&mut self, allocation: Allocation) -> Result<()> {
        if allocation == self.allocation {
            return Ok(());
        }
        match allocation {
            Allocation::Static => {
                let maxima = self.maxima.clone();
                if let Err(error) = self.allocate(&maxima) {
                    self.release();
                    return Err(error);
                }
            }
            Allocation::Dynamic => self.release(),
        }
        self.allocation = allocation;
        Ok(())
    }

    /// Clears every state to zero.
    pub fn reset_states(&mut self) {
        self.states.iter_mut().flatten().for_each(|b| b.bytes_mut().fill(0));
    }

    /// Runs one step. `inputs` are in the order of the graph's inputs; outputs are read by [`Session::output`].
    ///
    /// # Errors
    /// `run/bad-inputs`, `run/bad-dtype`, `run/bad-shape`, `run/out-of-range` for inputs that do not fit, `run/cap` and
    /// `run/out-of-memory` for dynamic sessions, `run/bad-index` for index values that point nowhere.
    pub fn run(&mut self, inputs: &[TensorRef<'_>]) -> Result<()> {
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
        if let Some(profile) = &mut self.profile {
            let names: Vec<&str> = declared.iter().map(|(n, _)| *n).collect();
            profile.begin(bindings.clone(), sequences(&names, inputs), module.graph.order.len());
        }
        if self.allocation == Allocation::Dynamic {
            self.allocate(&bindings)?;
        }
        for (buffer, input) in self.inputs.iter_mut().zip(inputs) {
            buffer.bytes_mut()[..input.bytes.len()].copy_from_slice(input.bytes);
        }
        let outputs: Vec<(Vec<u64>, u64)> = module
            .output_types()
            .into_iter()
            .map(|(name, ty)| {
                let shape = ty.shape_at(&bindings).ok_or_else(|| no_size(name))?;
                Ok((shape, bytes_at(ty, &bindings, name)?))
            })
            .collect::<Result<_>>()?;
        let part = |buffer: &mut Buffer, bytes: u64| {
            buffer.region().part(0, bytes).ok_or_else(|| no_size("a buffer"))
        };
        let regions = Regions {
            inputs: self
                .inputs
                .iter_mut()
                .zip(inputs)
                .map(|(b, i)| part(b, i.bytes.len() as u64))
                .collect::<Result<_>>()?,
            outputs: self
                .outputs
                .iter_mut()
                .zip(&outputs)
                .map(|(b, (_, n))| part(b, *n))
                .collect::<Result<_>>()?,
            arenas: self.arenas.iter_mut().map(Buffer::region).collect(),
            states: self.states.iter_mut().map(|s| s.as_mut().map(Buffer::region)).collect(),
            weights: module.weights.ids().fold(
                vec![None; module.weights.bound()],
                |mut all: Vec<Option<Region>>, id| {
                    all[id.index()] = self.weights.region(id);
                    all
                },
            ),
        };
        self.output_shapes = outputs.into_iter().map(|(shape, _)| shape).collect();
        let result = self.program.run(module, &self.pool, &regions, &bindings, self.profile.as_mut());
        if let Some(profile) = &mut self.profile {
            profile.end();
        }
        if self.allocation == Allocation::Dynamic {
            self.arenas.clear();
            self.ledger.set(Class::Activations, 0);
        }
        result
    }

    /// Attaches a profile that records every step from here on; returns the one attached before.
    pub fn attach_profile(&mut self, profile: Profile) -> Option<Profile> {
        self.profile.replace(profile)
    }

    /// Detaches the profile, which ends recording.
    pub fn detach_profile(&mut self) -> Option<Profile> {
        self.profile.take()
    }

    /// Threads that kernels use.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Output `index` of the last step.
    pub fn output(&self, index: usize) -> Option<TensorRef<'_>> {
        let shape = self.output_shapes.get(index)?;
        let (_, ty) = self.module().output_types().into_iter().nth(index)?;
        let bytes = usize::try_from(millrace_ir::types::const_bytes(ty.dtype, shape)?).ok()?;
        Some(TensorRef { dtype: ty.dtype, shape, bytes: self.outputs.get(index)?.bytes().get(..bytes)? })
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
        // Going back to static can fail for lack of memory; the session then stays dynamic and usable.
        let _ = self.session.set_allocation(self.before);
    }
}
