//! Memory of a session on a CUDA device, and how it runs steps.
//!
//! Weights, states and counters are allocated at load; activations, inputs, outputs and scratch memory once at the
//! upper bounds (static) or for each step from a stream-ordered pool (dynamic). All inputs of a step lie side by side,
//! so one copy brings them. For each bindings the launches are prepared once; from the second time on a static session
//! records copy, launches and the way back of an argmax as a graph and replays it.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::{Bindings, DType, Error, Id, Kind, Module, Result};

use super::device_arena::DeviceArena;
use super::driver::{Block, Context, Event, Stream};
use super::launch::{Graph, Ready, ReadyLaunch};
use super::program::{Program, bundle};
use super::range::Range;
use super::recent::Recent;
use super::report::{GraphReport, PoolReport};
use super::resolve::{Addresses, Resolved, pack, parts, resolve, workspace_bytes};
use super::transfer::{Landing, Staging};
use super::upload::{Layout, upload};
use crate::budget::Residency;
use crate::engine::Engine;
use crate::options::SessionOptions;
use crate::places::{Piece, Regions};
use crate::profile::Profile;
use crate::session::TensorRef;
use crate::sizes::{StepSizes, bytes_at, no_size};

/// Bindings whose launches stay prepared.
const PREPARED: usize = 48;

/// A step's bindings, and the output whose argmax follows it.
type Key = (Bindings, Option<usize>);

/// Launches at certain bindings and addresses.
struct Prepared {
    moving: Moving,
    resolved: Resolved,
    ready: Vec<Ready>,
    tail: Option<Tail>,
    uses: u64,
    graph: Option<Graph>,
    graph_failed: bool,
}

/// Addresses that may differ from step to step; all others stay from load on.
#[derive(Clone, PartialEq)]
struct Moving {
    inputs: Vec<Range>,
    outputs: Vec<Range>,
    arenas: Vec<Range>,
    workspace: Range,
}

/// The argmax after a step.
struct Tail {
    launch: ReadyLaunch,
    indices: Range,
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
    staging: Option<Staging>,
    /// Indices of an argmax, on the device and on the host.
    indices: Option<(Block, Landing)>,
    events: Vec<Event>,
    arenas: Vec<Block>,
    inputs: Option<Block>,
    outputs: Vec<Block>,
    workspace: Option<Block>,
    counters: Option<Block>,
    states: Vec<Option<Block>>,
    weights: Option<Block>,
    layout: Layout,
    program: Program,
    /// Whether activations, inputs and outputs stay where they are.
    fixed: bool,
    report: GraphReport,
    threads: usize,
    stream: Arc<Stream>,
    recording: Arc<Stream>,
    context: Arc<Context>,
}

fn no_memory() -> Error {
    Error::new(Kind::Internal, "cuda/not-allocated", "a step runs before its memory was allocated")
}

/// Bytes of the indices of an argmax: one i32 for each row of the f32 output with most rows.
fn index_bytes(module: &Module, bindings: &Bindings) -> Result<u64> {
    let mut most = 0;
    for (name, ty) in module.output_types() {
        if let (DType::F32, [rows, _]) = (ty.dtype, ty.shape.as_slice()) {
            most = rows.extent(bindings).ok_or_else(|| no_size(name))?.max(most);
        }
    }
    most.checked_mul(4).ok_or_else(|| no_size("the indices of an argmax"))
}

fn indices_of(bytes: &[u8], rows: u64) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().take(rows as usize).map(|c| i32::from_ne_bytes(*c)).collect()
}

impl Cuda {
    /// Opens the device and loads the engine's code for it; allocates no memory of the session.
    pub fn new(engine: &Engine, index: u32, threads: usize, options: &SessionOptions) -> Result<Cuda> {
        let context = Context::retain(index)?;
        let program = Program::load(&context, bundle(engine, context.info.capability)?)?;
        let stream = match options.stream {
            Some(raw) => Stream::borrowed(&context, raw),
            None => Stream::new(&context)?,
        };
        Ok(Cuda {
            prepared: Recent::new(PREPARED),
            slots: engine.module().graph.outputs.iter().map(|_| Slot::default()).collect(),
            staging: None,
            indices: None,
            events: Vec::new(),
            arenas: Vec::new(),
            inputs: None,
            outputs: Vec::new(),
            workspace: None,
            counters: None,
            states: Vec::new(),
            weights: None,
            layout: Layout::of(engine)?,
            program,
            fixed: false,
            report: GraphReport { enabled: options.graphs, ..GraphReport::default() },
            threads,
            stream,
            recording: Stream::new(&context)?,
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
        let indices = self.indices.as_ref().map(|(block, _)| block);
        [self.workspace.as_ref(), self.counters.as_ref(), indices]
            .into_iter()
            .flatten()
            .map(|b| b.range().len)
            .sum()
    }

    /// Bytes of pinned memory held now.
    pub fn staging_held(&self) -> u64 {
        self.context.pinned()
    }

    /// Brings the weights to where `residency` has them.
    pub fn place(
        &mut self,
        engine: &Engine,
        source: Option<&dyn TensorSource>,
        residency: &Residency,
    ) -> Result<()> {
        if !residency.placement.is_resident() {
            return Err(Error::new(Kind::Internal, "run/streaming", "weights do not stream yet"));
        }
        self.weights = Some(upload(&self.context, engine, source, &self.layout, self.threads)?);
        Ok(())
    }

    /// Allocations of device memory so far.
    pub fn allocations(&self) -> u64 {
        self.context.allocations()
    }

    /// What has become of graphs.
    pub fn graph_report(&self) -> GraphReport {
        let held = self.prepared.values().filter(|p| p.graph.is_some()).count() as u64;
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
        let bytes = index_bytes(module, maxima)?;
        if bytes > 0 && self.program.has_argmax() {
            let landing = Landing::new(&self.stream, bytes as usize)?;
            self.indices = Some((Block::new(&self.context, bytes, "indices")?, landing));
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
        if self.staging.as_ref().is_none_or(|s| (s.len() as u64) < input_bytes) {
            // Graphs name the staging memory that goes.
            self.prepared.clear();
            self.staging = Some(Staging::new(&self.context, input_bytes as usize)?);
        }
        (self.arenas, self.inputs, self.outputs, self.workspace) =
            (arenas, Some(inputs), outputs, Some(workspace));
        self.fixed = fixed;
        Ok(())
    }

    /// Gives back what [`Cuda::allocate`] took.
    pub fn release(&mut self) {
        self.retire_outputs();
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

    fn addresses(&self, module: &Module, moving: &Moving) -> Addresses {
        let range = |block: &Option<Block>| block.as_ref().map_or(Range::EMPTY, Block::range);
        let Moving { inputs, outputs, arenas, workspace } = moving.clone();
        let states = self.states.iter().map(|s| s.as_ref().map(Block::range)).collect();
        let weights = self.layout.ranges(module.weights.bound(), range(&self.weights));
        let regions = Regions { inputs, outputs, arenas, states, weights };
        Addresses { regions, workspace, counters: range(&self.counters) }
    }

    /// Runs one step whose sizes are `sizes`; returns before it has ended, unless `argmax` names an output with its
    /// rows and their width whose argmax the device can tell. Arenas and scratch memory are in `lent` if something was.
    #[allow(clippy::too_many_arguments)]
    pub fn run(
        &mut self,
        module: &Module,
        inputs: &[TensorRef<'_>],
        sizes: &StepSizes,
        bindings: &Bindings,
        argmax: Option<(usize, u64, u64)>,
        mut lent: Option<&mut DeviceArena>,
        profile: Option<&mut Profile>,
    ) -> Result<Option<Vec<i32>>> {
        self.context.enter()?;
        if let Some(lent) = &mut lent {
            lent.begin(&self.stream)?;
        }
        self.retire_outputs();
        let (offsets, bytes) = pack(&sizes.inputs).ok_or_else(|| no_size("inputs"))?;
        let room = self.staging.as_mut().ok_or_else(no_memory)?.fill()?;
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
        let key = (bindings.clone(), argmax.map(|(output, ..)| output));
        let mut prepared = match self.prepared.take(&key) {
            Some(found) if found.moving == moving => found,
            _ => self.prepare(module, moving, bindings, argmax)?,
        };
        prepared.uses += 1;
        let result = match profile {
            Some(profile) => self.run_timed(module, &prepared, arrival, profile),
            None => self.run_fast(&mut prepared, arrival),
        };
        let told = prepared.tail.is_some();
        self.prepared.put(key, prepared);
        if let Some(lent) = lent {
            lent.end(&self.stream)?;
        }
        result?;
        match (argmax, &mut self.indices) {
            (Some((_, rows, _)), Some((_, landing))) if told => {
                landing.wait()?;
                Ok(Some(indices_of(landing.bytes(), rows)))
            }
            _ => Ok(None),
        }
    }

    fn prepare(
        &self,
        module: &Module,
        moving: Moving,
        bindings: &Bindings,
        argmax: Option<(usize, u64, u64)>,
    ) -> Result<Prepared> {
        let addresses = self.addresses(module, &moving);
        let resolved = resolve(module, &self.program.table, &addresses, bindings, self.program.limits)?;
        let ready = self.program.ready(&resolved)?;
        let tail = argmax.map(|(output, rows, width)| self.tail(output, rows, width)).transpose()?.flatten();
        Ok(Prepared { moving, resolved, ready, tail, uses: 0, graph: None, graph_failed: false })
    }

    /// The argmax of an output, if the device can tell it.
    fn tail(&self, output: usize, rows: u64, width: u64) -> Result<Option<Tail>> {
        let Some((block, _)) = &self.indices else { return Ok(None) };
        let from = self.outputs.get(output).and_then(|o| o.range().part(0, rows * width * 4));
        let (Some(from), Some(indices)) = (from, block.range().part(0, rows * 4)) else { return Ok(None) };
        let launch = self.program.argmax(from, indices, rows, width)?;
        Ok(launch.map(|launch| Tail { launch, indices }))
    }

    /// Replays or launches one by one.
    fn run_fast(&mut self, prepared: &mut Prepared, arrival: Range) -> Result<()> {
        let staging = self.staging.as_mut().ok_or_else(no_memory)?;
        let mut landing = self.indices.as_mut().map(|(_, landing)| landing);
        self.report.last_launches = prepared.ready.len() as u64;
        let recurs = self.report.enabled && self.fixed && prepared.uses > 1;
        if recurs && prepared.graph.is_none() && !prepared.graph_failed {
            let recorded = Graph::record(&self.recording, |stream| {
                enqueue(prepared, arrival, staging, landing.as_deref_mut(), stream)
            });
            match recorded {
                Ok(graph) => {
                    self.report.recorded += 1;
                    prepared.graph = Some(graph);
                }
                Err(error) => {
                    prepared.graph_failed = true;
                    self.report.failure = Some(error);
                    self.context.enter()?;
                }
            }
        }
        match &prepared.graph {
            Some(graph) => {
                graph.launch(&self.stream)?;
                self.report.replayed += 1;
                if let (Some(landing), true) = (landing, prepared.tail.is_some()) {
                    landing.expect();
                }
            }
            None => {
                enqueue(prepared, arrival, staging, landing, &self.stream)?;
                self.report.plain += 1;
            }
        }
        staging.sent(&self.stream)
    }

    /// Launches one by one with an event after each step, and waits. Kernels of different steps do not overlap.
    fn run_timed(
        &mut self,
        module: &Module,
        prepared: &Prepared,
        arrival: Range,
        profile: &mut Profile,
    ) -> Result<()> {
        while self.events.len() <= prepared.resolved.steps.len() {
            self.events.push(Event::new(&self.context, true)?);
        }
        let staging = self.staging.as_mut().ok_or_else(no_memory)?;
        staging.send(&self.stream, arrival)?;
        self.events[0].record(&self.stream)?;
        let mut done = 0;
        for ((_, actions), event) in prepared.resolved.steps.iter().zip(&self.events[1..]) {
            let mut overlap = false;
            for ready in &prepared.ready[actions.clone()] {
                ready.enqueue(&self.stream, overlap)?;
                overlap = ready.is_launch();
            }
            event.record(&self.stream)?;
            done = actions.end;
        }
        for ready in &prepared.ready[done..] {
            ready.enqueue(&self.stream, false)?;
        }
        if let (Some(tail), Some((_, landing))) = (&prepared.tail, &mut self.indices) {
            tail.launch.enqueue(&self.stream, false)?;
            landing.receive(&self.stream, tail.indices)?;
        }
        staging.sent(&self.stream)?;
        self.report.last_launches = prepared.ready.len() as u64;
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
        let Some((_, landing)) = &mut self.indices else { return Ok(None) };
        tail.launch.enqueue(&self.stream, false)?;
        landing.receive(&self.stream, tail.indices)?;
        landing.wait()?;
        Ok(Some(indices_of(landing.bytes(), rows)))
    }
}

/// Puts a whole step into `stream`: inputs, launches, and the argmax with its way back.
fn enqueue(
    prepared: &Prepared,
    arrival: Range,
    staging: &mut Staging,
    landing: Option<&mut Landing>,
    stream: &Stream,
) -> Result<()> {
    staging.send(stream, arrival)?;
    // The first kernel follows a copy: there is nothing it could overlap.
    let mut overlap = false;
    for ready in &prepared.ready {
        ready.enqueue(stream, overlap)?;
        overlap = ready.is_launch();
    }
    if let (Some(tail), Some(landing)) = (&prepared.tail, landing) {
        tail.launch.enqueue(stream, false)?;
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
