//! Memory of a session on a CUDA device, and how it runs steps.
//!
//! Weights, states and counters are allocated at load; activations, inputs, outputs and scratch memory once at the
//! upper bounds (static) or for each step from a stream-ordered pool (dynamic). All inputs of a step lie side by side,
//! so one copy brings them. For each bindings the launches are prepared once; from the second time on a static session
//! records copy, launches and the way back of an argmax as a graph and replays it.
//!
//! What a step needs on the host is a *turn*: its inputs on the way to the device and its argmax on the way back. There
//! are two, so that a step can be enqueued *ahead*: before the one before it has ended, and *fed* with the argmax of that
//! step without a detour by the host.

mod nodes;
mod steps;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::plan::stream::Demand;
use millrace_ir::{Bindings, Id, Module, Result};

use super::argmax::{Argmax, Tail};
use super::driver::{Block, Context, Event, Stream};
use super::launch::{Graph, Ready};
use super::products::Supply;
use super::program::{Program, bundle};
use super::range::Range;
use super::recent::Recent;
use super::report::{GraphReport, LibraryReport, PoolReport};
use super::residence::Residence;
use super::resolve::{Limits, Resolved, pack, workspace_bytes};
use super::transfer::{Landing, Staging};
use super::upload::Sources;
use crate::budget::Residency;
use crate::engine::Engine;
use crate::needs;
use crate::options::SessionOptions;
use crate::sizes::{StepSizes, bytes_at, no_size};

/// Bindings whose launches stay prepared.
const PREPARED: usize = 48;

/// Steps on the way at once.
const TURNS: usize = 2;

/// A step's bindings, the output whose argmax follows it, and the input that is fed.
type Key = (Bindings, Option<usize>, Option<usize>);

/// What follows a step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct After {
    /// An output with its rows and their width, whose argmax is to be told.
    pub argmax: Option<(usize, u64, u64)>,
    /// The input that is the argmax of the step enqueued before.
    pub fed: Option<usize>,
}

/// Launches at certain bindings and addresses.
struct Prepared {
    moving: Moving,
    resolved: Resolved,
    ready: Vec<Ready>,
    /// The copy that feeds an input.
    feed: Option<Ready>,
    tail: Option<Tail>,
    uses: u64,
    /// By turn.
    graphs: [Option<Graph>; TURNS],
    graph_failed: bool,
}

impl Prepared {
    fn launches(&self) -> u64 {
        self.ready.iter().filter(|r| r.is_launch()).count() as u64
    }

    fn products(&self) -> u64 {
        self.ready.iter().filter(|r| r.is_product()).count() as u64
    }
}

/// Addresses that may differ from step to step; all others stay from load on.
#[derive(Clone, PartialEq)]
struct Moving {
    inputs: Vec<Range>,
    outputs: Vec<Range>,
    arenas: Vec<Range>,
    workspace: Range,
}

/// What a step needs on the host while it is on its way.
#[derive(Default)]
struct Turn {
    staging: Option<Staging>,
    landing: Option<Landing>,
}

/// A step on its way whose argmax nobody has taken.
struct Ahead {
    turn: usize,
    rows: u64,
}

/// An output on the host: fetched when first asked for; the memory is used again.
#[derive(Default)]
struct Slot {
    landed: OnceLock<Landing>,
    spare: Mutex<Option<Landing>>,
}

/// Memory and launches of a session. Fields are dropped in this order: graphs first, then what they name.
pub(crate) struct Cuda {
    prepared: Recent<Key, Prepared>,
    slots: Vec<Slot>,
    turns: [Turn; TURNS],
    /// In the order they were enqueued.
    ahead: VecDeque<Ahead>,
    argmax: Option<Argmax>,
    events: Vec<Event>,
    arenas: Vec<Block>,
    inputs: Option<Block>,
    outputs: Vec<Block>,
    workspace: Option<Block>,
    counters: Option<Block>,
    /// Scratch memory of a library, where it computes anything.
    library_workspace: Option<Block>,
    states: Vec<Option<Block>>,
    residence: Residence,
    supply: Supply,
    /// Products of a library in the last step.
    last_products: u64,
    program: Program,
    /// Whether activations, inputs and outputs stay where they are.
    fixed: bool,
    report: GraphReport,
    /// Bytes that context and code took.
    driver_bytes: u64,
    /// Graphs recorded when [`Cuda::has_recorded`] was asked last.
    known_graphs: u64,
    stream: Arc<Stream>,
    recording: Arc<Stream>,
    context: Arc<Context>,
}

impl Cuda {
    /// Opens the device and loads the engine's code for it; allocates no memory of the session.
    pub fn new(engine: &Engine, index: u32, threads: usize, options: &SessionOptions) -> Result<Cuda> {
        let context = Context::retain(index)?;
        let program = Program::load(&context, bundle(engine, Limits::of(&context.info))?)?;
        let supply = Supply::open(&context, &program.table, options.library);
        let stream = match options.stream {
            Some(raw) => Stream::borrowed(&context, raw),
            None => Stream::new(&context)?,
        };
        let recording = Stream::new(&context)?;
        let driver_bytes = context.taken()?;
        Ok(Cuda {
            prepared: Recent::new(PREPARED),
            slots: engine.module().graph.outputs.iter().map(|_| Slot::default()).collect(),
            turns: Default::default(),
            ahead: VecDeque::new(),
            argmax: None,
            events: Vec::new(),
            arenas: Vec::new(),
            inputs: None,
            outputs: Vec::new(),
            workspace: None,
            counters: None,
            library_workspace: None,
            states: Vec::new(),
            residence: Residence::new(&context, options, threads),
            supply,
            last_products: 0,
            program,
            fixed: false,
            report: GraphReport { enabled: options.graphs, ..GraphReport::default() },
            driver_bytes,
            known_graphs: 0,
            stream,
            recording,
            context,
        })
    }

    /// Number of the device.
    pub fn index(&self) -> u32 {
        self.context.info.index
    }

    /// Free and total bytes of the device.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.context.memory()
    }

    /// Bytes of scratch memory at `bindings`.
    pub fn scratch_bytes(&self, bindings: &Bindings) -> Result<u64> {
        workspace_bytes(&self.program.table, bindings)
    }

    /// Bytes of counters.
    pub fn counter_bytes(&self) -> u64 {
        self.program.table.counters
    }

    /// Bytes of scratch memory of a library; 0 where none computes anything.
    pub fn library_bytes(&self) -> u64 {
        self.supply.workspace()
    }

    /// Bytes of scratch memory of a library held now.
    pub fn library_held(&self) -> u64 {
        self.library_workspace.as_ref().map_or(0, |block| block.range().len)
    }

    /// What a library does for the session; `None` where its table names none.
    pub fn library_report(&self) -> Option<LibraryReport> {
        let report = self.supply.report()?;
        Some(LibraryReport { last_products: self.last_products, ..report })
    }

    /// Bytes of scratch memory and counters held now, those of an argmax included.
    pub fn workspace_held(&self) -> u64 {
        let blocks = [self.workspace.as_ref(), self.counters.as_ref()].into_iter().flatten();
        blocks.map(|b| b.range().len).chain(self.argmax.as_ref().map(Argmax::held)).sum()
    }

    /// Bytes of pinned memory held now.
    pub fn staging_held(&self) -> u64 {
        self.context.pinned().saturating_sub(self.residence.host_bytes())
    }

    /// What the weights of `module` can do on this device: tiles as the launch table has them.
    pub fn demand(&self, module: &Module) -> Result<Demand> {
        needs::demand(module, Some(&self.program.table))
    }

    /// Brings the weights to where `residency` has them, once all work is done.
    pub fn place(
        &mut self,
        engine: &Engine,
        source: Option<&dyn TensorSource>,
        residency: &Residency,
    ) -> Result<()> {
        self.context.enter()?;
        self.stream.synchronize()?;
        // Launches and graphs name memory that may go.
        self.prepared.clear();
        let sources = Sources::of(engine, source)?;
        self.residence.place(&sources, residency)
    }

    /// Bytes of resident weights and of the ring on the device.
    pub fn weight_bytes(&self) -> (u64, u64) {
        self.residence.device_bytes()
    }

    /// Bytes of weights in pinned host memory.
    pub fn host_weight_bytes(&self) -> u64 {
        self.residence.host_bytes()
    }

    /// Allocations of device memory so far.
    pub fn allocations(&self) -> u64 {
        self.context.allocations()
    }

    /// Bytes that context and code took when the session was opened.
    pub fn driver_bytes(&self) -> u64 {
        self.driver_bytes
    }

    /// Whether a graph was recorded since this was asked last.
    pub fn has_recorded(&mut self) -> bool {
        std::mem::replace(&mut self.known_graphs, self.report.recorded) != self.report.recorded
    }

    /// Bytes that allocations hold beyond what was asked for.
    pub fn slack_bytes(&self) -> u64 {
        self.context.slack()
    }

    /// Bytes that the device has less of than before the session.
    pub fn taken(&self) -> Result<u64> {
        self.context.taken()
    }

    /// What has become of graphs.
    pub fn graph_report(&self) -> GraphReport {
        let held = self.prepared.values().flat_map(|p| &p.graphs).flatten().count() as u64;
        GraphReport { held, ..self.report.clone() }
    }

    /// What the pool of dynamic allocations holds.
    pub fn pool_report(&self) -> Result<PoolReport> {
        self.context.pool_report()
    }

    /// Gives unused memory of the pool back to the device.
    pub fn trim_pool(&self) -> Result<()> {
        self.stream.synchronize()?;
        self.context.trim_pool()
    }

    /// Waits for all work.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }

    /// Loads weights and allocates states and counters.
    pub fn load(
        &mut self,
        engine: &Engine,
        source: Option<&dyn TensorSource>,
        maxima: &Bindings,
        residency: &Residency,
    ) -> Result<()> {
        let module = engine.module();
        self.place(engine, source, residency)?;
        self.states.resize_with(module.states.bound(), || None);
        for (id, state) in module.states.iter() {
            let bytes = bytes_at(&state.ty, maxima, &state.name)?;
            let block = Block::new(&self.context, bytes, "the cache")?;
            self.stream.zero(block.range())?;
            self.states[id.index()] = Some(block);
        }
        let counters = Block::new(&self.context, self.program.table.counters, "counters")?;
        self.stream.zero(counters.range())?;
        self.counters = Some(counters);
        let scratch = self.supply.workspace();
        if scratch > 0 {
            self.library_workspace = Some(Block::new(&self.context, scratch, "scratch memory of a library")?);
        }
        self.argmax = Argmax::new(&self.context, &self.stream, &self.program, module, maxima)?;
        if let Some(argmax) = &self.argmax {
            for turn in &mut self.turns {
                turn.landing = Some(Landing::new(&self.stream, argmax.index_bytes() as usize)?);
            }
        }
        self.stream.synchronize()
    }

    /// Allocates what a step needs, with `scratch` bytes of scratch memory: to stay where it is if `fixed`, else from the
    /// pool. An earlier allocation must have been released.
    pub fn allocate(&mut self, sizes: &StepSizes, scratch: u64, fixed: bool) -> Result<()> {
        let block = |len: u64, what: &str| match fixed {
            true => Block::new(&self.context, len, what),
            false => Block::from_pool(&self.stream, len, what),
        };
        let blocks = |sizes: &[u64], what| sizes.iter().map(|n| block(*n, what)).collect::<Result<Vec<_>>>();
        let (_, input_bytes) = pack(&sizes.inputs).ok_or_else(|| no_size("inputs"))?;
        let arenas = blocks(&sizes.arenas, "activations")?;
        let inputs = block(input_bytes, "inputs")?;
        let outputs = blocks(&sizes.outputs, "outputs")?;
        let workspace = block(scratch, "scratch memory")?;
        let staging = self.turns[0].staging.as_ref();
        if staging.is_none_or(|s| (s.len() as u64) < input_bytes) {
            // Graphs name the staging memory that goes. Only steps ahead need that of other turns.
            self.prepared.clear();
            self.turns.iter_mut().for_each(|turn| turn.staging = None);
            self.turns[0].staging = Some(Staging::new(&self.context, input_bytes as usize)?);
        }
        (self.arenas, self.inputs, self.outputs, self.workspace) =
            (arenas, Some(inputs), outputs, Some(workspace));
        self.fixed = fixed;
        Ok(())
    }

    /// Gives back what [`Cuda::allocate`] took.
    pub fn release(&mut self) {
        self.retire_outputs();
        self.drop_ahead();
        if self.fixed {
            // Graphs name the memory that goes, and may be running. A failed device runs nothing.
            let _ = self.stream.synchronize();
            self.prepared.clear();
        }
        self.release_arenas();
        self.inputs = None;
        self.outputs.clear();
        self.fixed = false;
    }

    /// Gives back activation and scratch memory.
    pub fn release_arenas(&mut self) {
        self.arenas.clear();
        self.workspace = None;
    }

    /// Clears every state to zero. An error shows in the next step.
    pub fn reset_states(&mut self) {
        for state in self.states.iter().flatten() {
            if self.stream.zero(state.range()).is_err() {
                return;
            }
        }
    }

    /// What outputs of an earlier step took on the host is free again.
    fn retire_outputs(&mut self) {
        for slot in &mut self.slots {
            if let Some(landing) = slot.landed.take() {
                *slot.spare.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(landing);
            }
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Memory goes once nothing uses it; on a failed device nothing does.
        let _ = self.stream.synchronize();
    }
}
