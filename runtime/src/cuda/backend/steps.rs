//! Steps of a session on a device: preparing, enqueueing, recording, timing, and reading what they leave.

use std::sync::PoisonError;

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::{Bindings, Error, Kind, Module, Result};

use super::{After, Ahead, Cuda, Moving, Prepared, TURNS, Turn};
use crate::cuda::argmax::Tail;
use crate::cuda::device_arena::DeviceArena;
use crate::cuda::driver::{Block, Event, Stream};
use crate::cuda::launch::{Graph, Ready};
use crate::cuda::products::Takes;
use crate::cuda::range::Range;
use crate::cuda::residence::{Copier, Found};
use crate::cuda::resolve::{Addresses, pack, parts, resolve};
use crate::cuda::transfer::{Landing, Staging};
use crate::cuda::upload::Sources;
use crate::engine::Engine;
use crate::places::{Piece as _, Regions};
use crate::profile::Profile;
use crate::session::TensorRef;
use crate::sizes::{StepSizes, no_size};

fn no_memory() -> Error {
    Error::new(Kind::Internal, "cuda/not-allocated", "a step runs before its memory was allocated")
}

fn indices_of(bytes: &[u8], rows: u64) -> Vec<i32> {
    bytes.as_chunks::<4>().0.iter().take(rows as usize).map(|c| i32::from_ne_bytes(*c)).collect()
}

impl Cuda {
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
        if result.is_ok() {
            self.residence.end();
        }
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
        let scratch = self.library_workspace.as_ref().map(Block::range);
        let library = scratch.map(|scratch| (&self.supply, scratch));
        let taker = library.map(|(supply, _)| supply as &dyn Takes);
        let (table, limits) = (&self.program.table, self.program.limits);
        let resolved = resolve(module, table, &addresses, bindings, limits, taker)?;
        let ready = self.program.ready(&resolved.actions, library)?;
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
        self.last_products = prepared.products();
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
        copier.join(&self.stream, false)?;
        staging.sent(&self.stream)?;
        self.report.last_launches = prepared.launches();
        self.last_products = prepared.products();
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
    copier.join(stream, recorded)
}
