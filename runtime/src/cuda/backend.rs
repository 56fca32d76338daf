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

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::plan::stream::Demand;
use millrace_ir::{Bindings, Error, Id, Kind, Module, Result};

use super::argmax::{Argmax, Tail};
use super::device_arena::DeviceArena;
use super::driver::{Block, Context, Event, Stream};
use super::launch::{Graph, Ready};
use super::program::{Program, bundle};
use super::range::Range;
use super::recent::Recent;
use super::report::{GraphReport, PoolReport};
use super::residence::{Copier, Found, Residence};
use super::resolve::{Addresses, Limits, Resolved, pack, parts, resolve, workspace_bytes};
use super::transfer::{Landing, Staging};
use super::upload::Sources;
use crate::budget::Residency;
use crate::engine::Engine;
use crate::needs;
use crate::options::SessionOptions;
use crate::places::{Piece, Regions};
use crate::profile::Profile;
use crate::session::TensorRef;
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
    states: Vec<Option<Block>>,
    residence: Residence,
    program: Program,
    /// Whether activations, inputs and outputs stay where they are.
    fixed: bool,
    report: GraphReport,
    /// Bytes that context and code took.
    driver_bytes: u64,
    stream: Arc<Stream>,
    recording: Arc<Stream>,
    context: Arc<Context>,
}

fn no_memory() -> Error {
    Error::new(Kind::Internal, "cuda/not-allocated", "a step runs before its memory was allocated")
}

fn indices_of(bytes: &[u8], rows: u64) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().take(rows as usize).map(|c| i32::from_ne_bytes(*c)).collect()
}

impl Cuda {
    /// Opens the device and loads the engine's code for it; allocates no memory of the session.
    pub fn new(engine: &Engine, index: u32, threads: usize, options: &SessionOptions) -> Result<Cuda> {
        let context = Context::retain(index)?;
        let program = Program::load(&context, bundle(engine, Limits::of(&context.info))?)?;
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
            states: Vec::new(),
            residence: Residence::new(&context, options.host_cap, threads),
            program,
            fixed: false,
            report: GraphReport { enabled: options.graphs, ..GraphReport::default() },
            driver_bytes,
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

    /// Where the values of a step whose sizes are `sizes` lie, inputs at `offsets` of their block. Arenas and so many bytes of
    /// scratch memory lie side by side in `lent` if something was.
    fn moving(&self, offsets: &[u64], sizes: &StepSizes, lent: Option<(Range, u64)>) -> Option<Moving> {
        let (arenas, workspace) = match lent {
            Some((lent, scratch)) => {
                let sizes: Vec<u64> = sizes.arenas.iter().copied().chain([scratch]).collect();
                let mut arenas = parts(lent, &pack(&sizes)?.0, &sizes)?;
                let workspace = arenas.pop()?;
                (arenas, workspace)
            }
            None => (self.arenas.iter().map(Block::range).collect(), self.workspace.as_ref()?.range()),
        };
        let outputs = self.outputs.iter().zip(&sizes.outputs).map(|(o, len)| o.range().part(0, *len));
        Some(Moving {
            inputs: parts(self.inputs.as_ref()?.range(), offsets, &sizes.inputs)?,
            outputs: outputs.collect::<Option<_>>()?,
            arenas,
            workspace,
        })
    }

    fn addresses(&self, module: &Module, moving: &Moving) -> Result<Addresses> {
        let range = |block: &Option<Block>| block.as_ref().map_or(Range::EMPTY, Block::range);
        let Moving { inputs, outputs, arenas, workspace } = moving.clone();
        let states = self.states.iter().map(|s| s.as_ref().map(Block::range)).collect();
        let found = self.residence.found(module.weights.bound())?;
        let weights =
            found.iter().map(|f| f.map(|(Found::Whole(range) | Found::Part(range))| range)).collect();
        let regions = Regions { inputs, outputs, arenas, states, weights };
        Ok(Addresses { regions, workspace, counters: range(&self.counters), ring: self.residence.ring()? })
    }

    /// Whether steps can be enqueued ahead.
    pub fn runs_ahead(&self) -> bool {
        self.fixed && self.argmax.is_some()
    }

    /// Forgets the steps ahead, whose argmax nobody wants.
    pub fn drop_ahead(&mut self) {
        self.ahead.clear();
    }

    /// Enqueues one step whose sizes are `sizes`, and what follows it; returns before it has ended. If the argmax was
    /// asked for and the device can tell it, [`Cuda::take`] does. Arenas and scratch memory are in `lent` if something was.
    #[allow(clippy::too_many_arguments)]
    pub fn start(
        &mut self,
        (engine, source): (&Engine, Option<&dyn TensorSource>),
        inputs: &[TensorRef<'_>],
        sizes: &StepSizes,
        bindings: &Bindings,
        after: After,
        mut lent: Option<&mut DeviceArena>,
        profile: Option<&mut Profile>,
    ) -> Result<()> {
        let module = engine.module();
        self.context.enter()?;
        if let Some(lent) = &mut lent {
            lent.begin(&self.stream)?;
        }
        let sources = if self.residence.is_fed() { Some(Sources::of(engine, source)?) } else { None };
        self.residence.heal(sources.as_ref())?;
        self.retire_outputs();
        if self.ahead.len() >= TURNS || (after.fed.is_some() && self.ahead.is_empty()) {
            let message = "steps ahead are taken one by one, and the first is not fed";
            return Err(Error::new(Kind::Usage, "run/bad-order", message));
        }
        let turn = self.ahead.back().map_or(0, |before| (before.turn + 1) % TURNS);
        let (offsets, bytes) = pack(&sizes.inputs).ok_or_else(|| no_size("inputs"))?;
        if self.turns[turn].staging.is_none() {
            let room = self.turns[0].staging.as_ref().ok_or_else(no_memory)?.len();
            self.turns[turn].staging = Some(Staging::new(&self.context, room)?);
        }
        let room = self.turns[turn].staging.as_mut().ok_or_else(no_memory)?.fill()?;
        for (input, at) in inputs.iter().zip(&offsets) {
            let at = *at as usize;
            room.get_mut(at..at + input.bytes.len()).ok_or_else(no_memory)?.copy_from_slice(input.bytes);
        }
        let block = self.inputs.as_ref().ok_or_else(no_memory)?.range();
        let arrival = block.part(0, bytes).ok_or_else(no_memory)?;
        let lent_range = match &lent {
            Some(lent) => Some((lent.range(), self.scratch_bytes(bindings)?)),
            None => None,
        };
        let moving = self.moving(&offsets, sizes, lent_range).ok_or_else(no_memory)?;
        let key = (bindings.clone(), after.argmax.map(|(output, ..)| output), after.fed);
        let mut prepared = match self.prepared.take(&key) {
            Some(found) if found.moving == moving => found,
            _ => self.prepare(module, moving, bindings, after)?,
        };
        prepared.uses += 1;
        self.residence.begin();
        let result = match profile {
            Some(profile) => self.run_timed(module, &prepared, turn, arrival, sources.as_ref(), profile),
            None => self.run_fast(&mut prepared, turn, arrival, sources.as_ref()),
        };
        let result = result.and_then(|()| self.residence.end(sources.as_ref()));
        let told = prepared.tail.is_some();
        self.prepared.put(key, prepared);
        if let Some(lent) = lent {
            lent.end(&self.stream)?;
        }
        result?;
        if let (Some((_, rows, _)), true) = (after.argmax, told) {
            self.ahead.push_back(Ahead { turn, rows });
        }
        Ok(())
    }

    /// The argmax of the first step that was enqueued and not taken, once it has ended; `None` if there is none.
    pub fn take(&mut self) -> Result<Option<Vec<i32>>> {
        let Some(Ahead { turn, rows }) = self.ahead.pop_front() else { return Ok(None) };
        let landing = self.turns[turn].landing.as_mut().ok_or_else(no_memory)?;
        landing.wait()?;
        Ok(Some(indices_of(landing.bytes(), rows)))
    }

    fn prepare(
        &self,
        module: &Module,
        moving: Moving,
        bindings: &Bindings,
        after: After,
    ) -> Result<Prepared> {
        let addresses = self.addresses(module, &moving)?;
        let resolved = resolve(module, &self.program.table, &addresses, bindings, self.program.limits)?;
        let ready = self.program.ready(&resolved)?;
        let feed = after.fed.map(|input| self.feed(&moving, input)).transpose()?;
        let tail =
            after.argmax.map(|(output, rows, width)| self.tail(output, rows, width)).transpose()?.flatten();
        let (uses, graphs, graph_failed) = (0, Default::default(), false);
        Ok(Prepared { moving, resolved, ready, feed, tail, uses, graphs, graph_failed })
    }

    /// The argmax of an output, if the device can tell it.
    fn tail(&self, output: usize, rows: u64, width: u64) -> Result<Option<Tail>> {
        let from = self.outputs.get(output).and_then(|o| o.range().part(0, rows * width * 4));
        match (&self.argmax, from) {
            (Some(argmax), Some(from)) => argmax.tail(&self.program, from, rows, width),
            _ => Ok(None),
        }
    }

    /// The copy of an argmax to input `input`, which has an index a row.
    fn feed(&self, moving: &Moving, input: usize) -> Result<Ready> {
        let to = moving.inputs.get(input).copied();
        let from = to.and_then(|to| self.argmax.as_ref()?.indices(to.len));
        match (from, to) {
            (Some(from), Some(to)) => Ok(Ready::Copy { from, to }),
            _ => Err(Error::new(Kind::Usage, "run/bad-order", format!("input {input} cannot be fed"))),
        }
    }

    /// Replays or launches one by one.
    fn run_fast(
        &mut self,
        prepared: &mut Prepared,
        turn: usize,
        arrival: Range,
        sources: Option<&Sources<'_>>,
    ) -> Result<()> {
        let Turn { staging, landing } = &mut self.turns[turn];
        let staging = staging.as_mut().ok_or_else(no_memory)?;
        let mut landing = landing.as_mut();
        let copier = Copier { residence: &self.residence, sources };
        self.report.last_launches = prepared.launches();
        let recurs = self.report.enabled && self.fixed && prepared.uses > 1 && sources.is_none();
        if recurs && prepared.graphs[turn].is_none() && !prepared.graph_failed {
            let recorded = Graph::record(&self.recording, |stream| {
                enqueue(prepared, arrival, staging, landing.as_deref_mut(), copier, stream, true)
            });
            match recorded {
                Ok(graph) => {
                    self.report.recorded += 1;
                    prepared.graphs[turn] = Some(graph);
                }
                Err(error) => {
                    prepared.graph_failed = true;
                    self.report.failure = Some(error);
                    self.context.enter()?;
                }
            }
        }
        match &prepared.graphs[turn] {
            Some(graph) => {
                graph.launch(&self.stream)?;
                self.report.replayed += 1;
            }
            None => {
                enqueue(prepared, arrival, staging, landing.as_deref_mut(), copier, &self.stream, false)?;
                self.report.plain += 1;
            }
        }
        if let (Some(landing), true) = (landing, prepared.tail.is_some()) {
            landing.expect()?;
        }
        staging.sent(&self.stream)
    }

    /// Launches one by one with an event after each step, and waits. Kernels of different steps do not overlap.
    fn run_timed(
        &mut self,
        module: &Module,
        prepared: &Prepared,
        turn: usize,
        arrival: Range,
        sources: Option<&Sources<'_>>,
        profile: &mut Profile,
    ) -> Result<()> {
        let copier = Copier { residence: &self.residence, sources };
        while self.events.len() <= prepared.resolved.steps.len() {
            self.events.push(Event::new(&self.context, true)?);
        }
        let Turn { staging, landing } = &mut self.turns[turn];
        let staging = staging.as_mut().ok_or_else(no_memory)?;
        staging.send(&self.stream, arrival)?;
        if let Some(feed) = &prepared.feed {
            feed.enqueue(&self.stream, copier, false, false)?;
        }
        self.events[0].record(&self.stream)?;
        let mut done = 0;
        for ((_, actions), event) in prepared.resolved.steps.iter().zip(&self.events[1..]) {
            let mut overlap = false;
            for ready in &prepared.ready[actions.clone()] {
                ready.enqueue(&self.stream, copier, overlap, false)?;
                overlap = ready.is_launch();
            }
            event.record(&self.stream)?;
            done = actions.end;
        }
        for ready in &prepared.ready[done..] {
            ready.enqueue(&self.stream, copier, false, false)?;
        }
        if let (Some(tail), Some(landing)) = (&prepared.tail, landing) {
            tail.launch.enqueue(&self.stream, false)?;
            landing.receive(&self.stream, tail.indices)?;
            landing.expect()?;
        }
        staging.sent(&self.stream)?;
        self.report.last_launches = prepared.launches();
        self.report.plain += 1;
        self.stream.synchronize()?;
        for (index, (nodes, _)) in prepared.resolved.steps.iter().enumerate() {
            let start = self.events[index].seconds_since(&self.events[0])?;
            let end = self.events[index + 1].seconds_since(&self.events[0])?;
            let ids = &module.graph.order[nodes.clone()];
            // What a group takes is entered at its last node that computes.
            let computes = |id: &millrace_ir::NodeId| !module.graph.nodes[*id].op.traits().view;
            let last = ids.iter().rposition(computes).unwrap_or(ids.len().saturating_sub(1));
            for (at, id) in ids.iter().enumerate() {
                let taken = if at == last { (end - start).max(0.0) } else { 0.0 };
                profile.device_node(*id, start.max(0.0), taken);
            }
        }
        Ok(())
    }

    /// The bytes of output `index` of the last step, `len` of them.
    pub fn output(&self, index: usize, len: u64) -> Result<Option<&[u8]>> {
        let (Some(slot), Some(block)) = (self.slots.get(index), self.outputs.get(index)) else {
            return Ok(None);
        };
        if slot.landed.get().is_none() {
            let Some(from) = block.range().part(0, len) else { return Ok(None) };
            let spare = slot.spare.lock().unwrap_or_else(PoisonError::into_inner).take();
            let mut landing = match spare.filter(|l| l.len() as u64 >= len) {
                Some(landing) => landing,
                // Room to grow, so that steps of growing shapes do not pin memory each time.
                None => {
                    let room = len.checked_next_power_of_two().unwrap_or(len).min(block.range().len);
                    Landing::new(&self.stream, room as usize)?
                }
            };
            self.context.enter()?;
            landing.receive(&self.stream, from)?;
            landing.expect()?;
            landing.wait()?;
            // Another thread that was first has fetched the same bytes.
            let _ = slot.landed.set(landing);
        }
        Ok(slot.landed.get().and_then(|landing| landing.bytes().get(..len as usize)))
    }

    /// The argmax of `rows` rows of `width` elements of output `index`; `None` if the device cannot tell.
    pub fn argmax(&mut self, index: usize, rows: u64, width: u64) -> Result<Option<Vec<i32>>> {
        self.context.enter()?;
        let Some(tail) = self.tail(index, rows, width)? else { return Ok(None) };
        self.drop_ahead();
        let Some(landing) = &mut self.turns[0].landing else { return Ok(None) };
        tail.launch.enqueue(&self.stream, false)?;
        landing.receive(&self.stream, tail.indices)?;
        landing.expect()?;
        landing.wait()?;
        Ok(Some(indices_of(landing.bytes(), rows)))
    }
}

/// Puts a whole step into `stream`, which may record: inputs, launches with the copies of weights, and the argmax with its
/// way back.
fn enqueue(
    prepared: &Prepared,
    arrival: Range,
    staging: &mut Staging,
    landing: Option<&mut Landing>,
    copier: Copier<'_>,
    stream: &Stream,
    recorded: bool,
) -> Result<()> {
    staging.send(stream, arrival)?;
    if let Some(feed) = &prepared.feed {
        feed.enqueue(stream, copier, false, recorded)?;
    }
    // The first kernel follows a copy: there is nothing it could overlap.
    let mut overlap = false;
    for ready in &prepared.ready {
        ready.enqueue(stream, copier, overlap, recorded)?;
        overlap = ready.is_launch();
    }
    if let (Some(tail), Some(landing)) = (&prepared.tail, landing) {
        tail.launch.enqueue(stream, overlap)?;
        landing.receive(stream, tail.indices)?;
    }
    Ok(())
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Memory goes once nothing uses it; on a failed device nothing does.
        let _ = self.stream.synchronize();
    }
}
