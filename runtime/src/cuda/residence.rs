//! Where the weights of a session are: blocks on the device, the ring, and pinned host memory that the ring is filled from.
//!
//! Weights that never move share one block; each of the others has a block of its own for the slices that are resident, so
//! that a change of budget touches only what changes. A weight that streams is in host memory as a whole, and its
//! host copy stays until nothing streams any more. Tables whose rows are read from afar are read there.
//!
//! Host memory may be bounded too. Then what does not fit it comes from the engine file through a few pinned buffers, filled by the
//! thread that enqueues the step, which therefore cannot be a graph.
//!
//! A step's copies are enqueued with its kernels, in one queue or several that take turns, into the same graph if there is one, those
//! with which the next step begins among them: they are under way while the last kernels run. (Leaving those out of the graph, ordered by events between
//! graphs, was tried on an H200 and is no faster.)
//!
//! Invariant: between steps the first copies of a step are in their slots. A step that fails breaks it; [`Residence::heal`]
//! restores it before the next.

use std::sync::{Arc, Mutex, PoisonError};

use millrace_ir::plan::stream::{Cut, Demand, Item, Placement};
use millrace_ir::{Error, Id, Kind, Result};

use super::driver::{Block, Context, Event, Stream};
use super::range::Range;
use super::resolve::{Ring, Tile};
use super::transfer::{Pinned, Staging};
use super::upload::{Load, Piece, Sources, share, upload};
use crate::budget::Residency;
use crate::options::SessionOptions;
use crate::places::Piece as _;

/// The resident part of a weight that may move.
#[derive(Default)]
struct Held {
    block: Option<Block>,
    slices: u64,
}

/// What orders the copies within a step. While a step is recorded for a graph it has others than while it runs.
struct Lanes {
    /// Queues that take the copies in turn, fewer than slots.
    queues: Vec<Arc<Stream>>,
    /// By slot: its content has arrived.
    arrived: Vec<Event>,
    /// By slot: its content is no longer needed.
    left: Vec<Event>,
}

impl Lanes {
    fn new(context: &Arc<Context>, slots: usize, queues: usize) -> Result<Lanes> {
        let (arrived, left) = (events(context, slots)?, events(context, slots)?);
        let queues = (0..queues.clamp(1, slots.max(2) - 1)).map(|_| Stream::new(context));
        Ok(Lanes { queues: queues.collect::<Result<_>>()?, arrived, left })
    }

    /// The queue of the copy that follows `copy`.
    fn queue(&self, copy: usize) -> &Stream {
        &self.queues[copy % self.queues.len()]
    }

    fn synchronize(&self) -> Result<()> {
        self.queues.iter().try_for_each(|queue| queue.synchronize())
    }
}

fn events(context: &Arc<Context>, slots: usize) -> Result<Vec<Event>> {
    (0..slots).map(|_| Event::new(context, false)).collect()
}

/// See the module.
pub(super) struct Residence {
    fixed: Option<Block>,
    /// By item: where it lies in `fixed`.
    fixed_at: Vec<Option<Range>>,
    /// By item.
    held: Vec<Held>,
    ring: Option<Block>,
    /// By item: its copy in host memory.
    host: Vec<Option<Pinned>>,
    /// Most bytes of pinned memory for weights.
    host_cap: Option<u64>,
    /// Queues for copies of a step.
    queues: usize,
    /// Buffers for copies whose weight is not in host memory.
    feeders: Mutex<Feeders>,
    /// Threads that fill.
    threads: usize,
    demand: Demand,
    placement: Option<Placement>,
    running: Option<Lanes>,
    recording: Option<Lanes>,
    /// Whether the ring holds what a step expects.
    intact: bool,
    context: Arc<Context>,
}

/// Buffers that take turns between the file and the ring.
#[derive(Default)]
struct Feeders {
    buffers: Vec<Staging>,
    next: usize,
}

/// Fewest and most buffers of [`Feeders`]: one is filled while others are copied.
const FEEDERS: (u64, u64) = (2, 4);

/// What enqueues the copies of a step.
#[derive(Clone, Copy)]
pub(super) struct Copier<'a> {
    pub residence: &'a Residence,
    /// Where weights come from that are not in host memory; not needed if all are.
    pub sources: Option<&'a Sources<'a>>,
}

/// Where a step finds a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Found {
    /// All of it lies here.
    Whole(Range),
    /// The first slices lie here, the others come through the ring.
    Part(Range),
}

fn not_placed() -> Error {
    Error::new(
        Kind::OutOfMemory,
        "run/not-placed",
        "the weights are in no place: a change of budget has failed",
    )
    .hint("set a weight budget that fits")
}

impl Residence {
    /// No weight is anywhere.
    pub fn new(context: &Arc<Context>, options: &SessionOptions, threads: usize) -> Residence {
        Residence {
            fixed: None,
            fixed_at: Vec::new(),
            held: Vec::new(),
            ring: None,
            host: Vec::new(),
            host_cap: options.host_cap,
            queues: options.copy_queues,
            feeders: Mutex::default(),
            threads,
            demand: Demand::default(),
            placement: None,
            running: None,
            recording: None,
            intact: false,
            context: context.clone(),
        }
    }

    /// Whether an item has a block of its own.
    fn moves(item: &Item) -> bool {
        item.cut.is_some()
    }

    /// Brings the weights to where `residency` has them. No work that uses weights may be running.
    pub fn place(&mut self, sources: &Sources<'_>, residency: &Residency) -> Result<()> {
        let threads = self.threads;
        self.settle()?;
        self.intact = false;
        let next = residency.placement.clone();
        let first = self.fixed_at.is_empty() && self.held.is_empty();
        if first {
            sources.check_bound(threads)?;
            self.demand = residency.demand.clone();
            self.held.resize_with(self.demand.items.len(), Held::default);
            self.host.resize_with(self.demand.items.len(), || None);
        }
        self.placement = None;
        // Memory that goes, before memory that comes.
        let slices: Vec<u64> = next.resident.clone();
        for (held, slices) in self.held.iter_mut().zip(&slices) {
            if held.slices != *slices {
                *held = Held::default();
            }
        }
        if self.ring.as_ref().map_or(0, |b| b.range().len) != next.ring_bytes() {
            self.ring = None;
        }
        let wanted = self.share_host(&next)?;
        self.bring_to_host(sources, &wanted, threads)?;
        let mut loads: Vec<(Range, Load)> = Vec::new();
        if first {
            let items = self.demand.items.iter().enumerate().filter(|(_, item)| !Self::moves(item));
            let load = Load::packed(items.map(|(index, item)| (index, item.bytes)))?;
            let block = Block::new(&self.context, load.bytes, "weights")?;
            self.fixed_at = vec![None; self.demand.items.len()];
            for piece in &load.pieces {
                self.fixed_at[piece.index] = block.range().part(piece.to, piece.len);
            }
            loads.push((block.range(), load));
            self.fixed = Some(block);
        }
        if self.ring.is_none() && next.ring_bytes() > 0 {
            self.ring = Some(Block::new(&self.context, next.ring_bytes(), "the weight ring")?);
        }
        let copies = Stream::new(&self.context)?;
        for (index, slices) in slices.into_iter().enumerate() {
            let item = &self.demand.items[index];
            if !Self::moves(item) || slices == 0 || self.held[index].slices == slices {
                continue;
            }
            let load = Load::prefix(index, slices * item.slice_bytes)?;
            let block = Block::new(&self.context, load.bytes, "weights")?;
            match &mut self.host[index] {
                Some(host) => {
                    let to = block.range().part(0, slices * item.slice_bytes).ok_or_else(not_placed)?;
                    host.send(&copies, 0, to)?;
                }
                None => loads.push((block.range(), load)),
            }
            self.held[index] = Held { block: Some(block), slices };
        }
        upload(&self.context, sources, &loads, threads)?;
        copies.synchronize()?;
        if next.copies.is_empty() {
            (self.running, self.recording) = (None, None);
        } else if self.running.as_ref().is_none_or(|lanes| lanes.arrived.len() != next.slots) {
            self.running = Some(Lanes::new(&self.context, next.slots, self.queues)?);
            self.recording = Some(Lanes::new(&self.context, next.slots, self.queues)?);
        }
        self.placement = Some(next);
        self.heal(Some(sources))
    }

    /// Decides which weights are in host memory, within its bound: those are returned that are not there yet. Tables come
    /// first, since rows are read there; what does not fit is left to [`Feeders`], which are made here.
    fn share_host(&mut self, next: &Placement) -> Result<Vec<usize>> {
        let items = &self.demand.items;
        let streams = |i: &usize| Self::moves(&items[*i]) && next.resident[*i] < items[*i].slices;
        let mut wanted: Vec<usize> = (0..items.len()).filter(streams).collect();
        let Some(cap) = self.host_cap else {
            if wanted.is_empty() {
                self.host.iter_mut().for_each(|host| *host = None);
            }
            wanted.retain(|i| self.host[*i].is_none());
            return Ok(wanted);
        };
        let table = |i: &usize| items[*i].cut == Some(Cut::Rows);
        wanted.sort_by_key(|i| !table(i));
        let all: u64 = wanted.iter().map(|i| items[*i].bytes).sum();
        let tables: u64 = wanted.iter().filter(|i| table(i)).map(|i| items[*i].bytes).sum();
        let slot = next.slot_bytes.max(1);
        let feeders = if all <= cap { 0 } else { (cap.saturating_sub(tables) / slot).min(FEEDERS.1) };
        if all > cap && (feeders < FEEDERS.0 || next.copies.is_empty()) {
            let least = tables + if next.copies.is_empty() { 0 } else { FEEDERS.0 * next.slot_bytes };
            let message = format!("weights need {least} bytes of host memory at least, the cap is {cap}");
            return Err(Error::new(Kind::OutOfMemory, "run/host-cap", message)
                .hint(format!("raise --host-cap to {least} bytes, or keep more weights on the device")));
        }
        let mut room = cap - feeders * next.slot_bytes;
        wanted.retain(|i| {
            let fits = items[*i].bytes <= room;
            room -= if fits { items[*i].bytes } else { 0 };
            fits
        });
        // What is in host memory without need goes first.
        for (index, host) in self.host.iter_mut().enumerate() {
            if !wanted.contains(&index) {
                *host = None;
            }
        }
        let held = self.feeders.get_mut().unwrap_or_else(PoisonError::into_inner);
        if held.buffers.len() as u64 != feeders
            || held.buffers.iter().any(|b| b.len() as u64 != next.slot_bytes)
        {
            held.buffers.clear();
            for _ in 0..feeders {
                held.buffers.push(Staging::new(&self.context, next.slot_bytes as usize)?);
            }
        }
        wanted.retain(|i| self.host[*i].is_none());
        Ok(wanted)
    }

    /// Whether copies of a step come from elsewhere than host memory, so that no graph can make them.
    pub fn is_fed(&self) -> bool {
        self.placement.as_ref().is_some_and(|p| p.copies.iter().any(|c| self.host[c.item].is_none()))
    }

    /// Pins and fills host memory for items.
    fn bring_to_host(&mut self, sources: &Sources<'_>, items: &[usize], threads: usize) -> Result<()> {
        let made: Vec<Mutex<Option<Pinned>>> = items.iter().map(|_| Mutex::new(None)).collect();
        let pin = |(): &mut (), at: usize| -> Result<()> {
            let bytes = usize::try_from(self.demand.items[items[at]].bytes).map_err(|_| not_placed())?;
            let pinned = Pinned::new(&self.context, bytes)?;
            *made[at].lock().unwrap_or_else(PoisonError::into_inner) = Some(pinned);
            Ok(())
        };
        share(items.len(), threads, || self.context.enter(), pin, |()| Ok(()))?;
        let mut made: Vec<Pinned> =
            made.into_iter().filter_map(|m| m.into_inner().unwrap_or_else(PoisonError::into_inner)).collect();
        let loads: Vec<Load> =
            items.iter().map(|i| Load::prefix(*i, self.demand.items[*i].bytes)).collect::<Result<_>>()?;
        sources
            .read(loads.iter().zip(&mut made).map(|(load, to)| (load, to.bytes_mut())).collect(), threads)?;
        items.iter().zip(made).for_each(|(index, pinned)| self.host[*index] = Some(pinned));
        Ok(())
    }

    /// Whether weights are where the last placement has them.
    pub fn placement(&self) -> Result<&Placement> {
        self.placement.as_ref().ok_or_else(not_placed)
    }

    /// Bytes of pinned host memory.
    pub fn host_bytes(&self) -> u64 {
        let feeders = self.feeders.lock().unwrap_or_else(PoisonError::into_inner);
        let buffers = feeders.buffers.iter().map(|b| b.len() as u64);
        self.host.iter().flatten().map(|p| p.len() as u64).chain(buffers).sum()
    }

    /// Bytes of blocks: residents and ring.
    pub fn device_bytes(&self) -> (u64, u64) {
        let held = self.held.iter().filter_map(|h| h.block.as_ref());
        let resident = held.chain(&self.fixed).map(|b| b.range().len).sum();
        (resident, self.ring.as_ref().map_or(0, |b| b.range().len))
    }

    /// By weight: where a step finds it.
    pub fn found(&self, bound: usize) -> Result<Vec<Option<Found>>> {
        let placement = self.placement()?;
        let mut all = vec![None; bound];
        for (index, item) in self.demand.items.iter().enumerate() {
            let block = |held: &Held| {
                held.block.as_ref().and_then(|b| b.range().part(0, held.slices * item.slice_bytes))
            };
            let found = match (self.fixed_at.get(index).copied().flatten(), block(&self.held[index])) {
                (Some(range), _) => Found::Whole(range),
                (None, Some(range)) if placement.resident[index] == item.slices => Found::Whole(range),
                (None, None) if item.cut == Some(Cut::Rows) => match &self.host[index] {
                    Some(host) => Found::Whole(host.range()),
                    None => return Err(not_placed()),
                },
                (None, None) if item.bytes == 0 => Found::Whole(Range::EMPTY),
                (None, prefix) => Found::Part(prefix.unwrap_or(Range::EMPTY)),
            };
            all[item.weight.index()] = Some(found);
        }
        Ok(all)
    }

    /// The part of its slot that a copy fills.
    pub fn target(&self, copy: usize) -> Result<Range> {
        let placement = self.placement()?;
        let ring = self.ring.as_ref().map(Block::range);
        let found = placement.copies.get(copy).zip(ring);
        let range =
            found.and_then(|(copy, ring)| ring.part(copy.slot as u64 * placement.slot_bytes, copy.bytes));
        range.ok_or_else(not_placed)
    }

    /// What comes through the ring.
    pub fn ring(&self) -> Result<Ring> {
        let (placement, demand) = (self.placement()?, &self.demand);
        let mut ring = Ring::default();
        for (index, copy) in placement.copies.iter().enumerate() {
            let item = &demand.items[copy.item];
            ring.copies.push(Tile {
                node: demand.uses[copy.user].node,
                weight: item.weight,
                first: copy.first,
                count: copy.count,
                range: self.target(index)?,
            });
            ring.parts.insert(item.weight, (placement.resident[copy.item], item.slices));
        }
        Ok(ring)
    }

    /// Enqueues a copy into its slot in `stream`.
    fn send(&self, copy: usize, stream: &Stream, sources: Option<&Sources<'_>>) -> Result<()> {
        let target = self.target(copy)?;
        let part = &self.placement()?.copies[copy];
        let from = part.first * self.demand.items[part.item].slice_bytes;
        if let Some(host) = &self.host[part.item] {
            return host.send(stream, from, target);
        }
        let sources = sources.ok_or_else(not_placed)?;
        let mut feeders = self.feeders.lock().unwrap_or_else(PoisonError::into_inner);
        let Feeders { buffers, next } = &mut *feeders;
        let turn = *next % buffers.len().max(1);
        *next = next.wrapping_add(1);
        let buffer = buffers.get_mut(turn).ok_or_else(not_placed)?;
        let piece = Piece { index: part.item, from, len: part.bytes, to: 0 };
        let load = Load { pieces: vec![piece], bytes: part.bytes };
        let room = buffer.fill()?.get_mut(..part.bytes as usize).ok_or_else(not_placed)?;
        sources.read(vec![(&load, room)], self.threads)?;
        buffer.send(stream, target)?;
        buffer.sent(stream)
    }

    fn lanes(&self, recorded: bool) -> Result<&Lanes> {
        let lanes = if recorded { &self.recording } else { &self.running };
        lanes.as_ref().ok_or_else(not_placed)
    }

    /// Waits for copies under way.
    fn settle(&self) -> Result<()> {
        self.running.as_ref().map_or(Ok(()), |lanes| lanes.synchronize())
    }

    /// Brings the first copies of a step into their slots if a step may have failed since.
    pub fn heal(&mut self, sources: Option<&Sources<'_>>) -> Result<()> {
        let placement = self.placement()?;
        if !self.intact && !placement.copies.is_empty() {
            let lanes = self.lanes(false)?;
            lanes.synchronize()?;
            for copy in 0..placement.copies.len().min(placement.slots) {
                self.send(copy, lanes.queue(copy), sources)?;
            }
            lanes.synchronize()?;
        }
        self.intact = true;
        Ok(())
    }

    /// A step begins; until [`Residence::end`] the ring holds what nobody knows.
    pub fn begin(&mut self) {
        self.intact = self.moved() == 0;
    }

    /// Bytes copied by each step.
    pub fn moved(&self) -> u64 {
        self.placement.as_ref().map_or(0, Placement::moved)
    }

    fn arrive(&self, copy: usize, stream: &Stream, recorded: bool) -> Result<()> {
        let placement = self.placement()?;
        if copy < placement.slots {
            // It was there when the step began.
            return Ok(());
        }
        stream.wait(&self.lanes(recorded)?.arrived[placement.copies[copy].slot])
    }

    fn leave(
        &self,
        copy: usize,
        stream: &Stream,
        recorded: bool,
        sources: Option<&Sources<'_>>,
    ) -> Result<()> {
        let placement = self.placement()?;
        let Some(next) = placement.next(copy) else { return Ok(()) };
        let (lanes, slot) = (self.lanes(recorded)?, placement.copies[copy].slot);
        lanes.left[slot].record(stream)?;
        let queue = lanes.queue(copy);
        queue.wait(&lanes.left[slot])?;
        self.send(next, queue, sources)?;
        lanes.arrived[slot].record(queue)
    }

    fn join(&self, stream: &Stream, recorded: bool) -> Result<()> {
        let placement = self.placement()?;
        // A slot with a single copy keeps it.
        let moving = placement.copies.len().saturating_sub(placement.slots).min(placement.slots);
        let lanes = if moving > 0 { self.lanes(recorded)? } else { return Ok(()) };
        lanes.arrived[..moving].iter().try_for_each(|event| stream.wait(event))
    }

    /// A step has been enqueued as a whole.
    pub fn end(&mut self) {
        self.intact = true;
    }
}

impl Copier<'_> {
    /// Lets `stream` wait for a copy. `recorded` tells whether the stream records.
    pub fn arrive(self, copy: usize, stream: &Stream, recorded: bool) -> Result<()> {
        self.residence.arrive(copy, stream, recorded)
    }

    /// After the kernels that use a copy: enqueues the next into its slot.
    pub fn leave(self, copy: usize, stream: &Stream, recorded: bool) -> Result<()> {
        self.residence.leave(copy, stream, recorded, self.sources)
    }

    /// Ends the copies of a step: `stream` waits for the first ones of the next.
    pub fn join(self, stream: &Stream, recorded: bool) -> Result<()> {
        self.residence.join(stream, recorded)
    }
}

impl Drop for Residence {
    fn drop(&mut self) {
        // Copies read host memory that goes. On a failed device none runs.
        let _ = self.settle();
    }
}
