//! Where the weights of a session are: blocks on the device, the ring, and pinned host memory that the ring is filled from.
//!
//! Weights that never move share one block; each of the others has a block of its own for the slices that are resident, so
//! that a change of budget touches only what changes. A weight that streams is in host memory as a whole, and its
//! host copy stays when it becomes resident again. Tables whose rows are read from afar are read there.
//!
//! Invariant: between steps the first copies of a step are in their slots. A step that fails breaks it; [`Residence::heal`]
//! restores it before the next.

use std::sync::{Arc, Mutex, PoisonError};

use millrace_ir::plan::stream::{Cut, Demand, Item, Placement};
use millrace_ir::{Error, Id, Kind, Result};

use super::driver::{Block, Context, Event, Stream};
use super::range::Range;
use super::resolve::{Ring, Tile};
use super::transfer::Pinned;
use super::upload::{Load, Sources, share, upload};
use crate::budget::Residency;
use crate::places::Piece as _;

/// The resident part of a weight that may move.
#[derive(Default)]
struct Held {
    block: Option<Block>,
    slices: u64,
}

/// Streams and events of copies. While a step is recorded for a graph it has others than while it runs.
pub(super) struct Lanes {
    copies: Arc<Stream>,
    /// By slot: its content has arrived.
    arrived: Vec<Event>,
    /// By slot: its content is no longer needed.
    left: Vec<Event>,
}

impl Lanes {
    fn new(context: &Arc<Context>, slots: usize) -> Result<Lanes> {
        let events = || (0..slots).map(|_| Event::new(context, false)).collect::<Result<Vec<_>>>();
        Ok(Lanes { copies: Stream::new(context)?, arrived: events()?, left: events()? })
    }
}

/// See the module.
pub(super) struct Residence {
    fixed: Option<Block>,
    /// By item: where it lies in `fixed`.
    fixed_at: Vec<Option<Range>>,
    /// By item.
    held: Vec<Held>,
    ring: Option<Block>,
    /// By item.
    host: Vec<Option<Pinned>>,
    demand: Demand,
    placement: Option<Placement>,
    running: Option<Lanes>,
    recording: Option<Lanes>,
    /// Whether the ring holds what a step expects.
    intact: bool,
    context: Arc<Context>,
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
    pub fn new(context: &Arc<Context>) -> Residence {
        Residence {
            fixed: None,
            fixed_at: Vec::new(),
            held: Vec::new(),
            ring: None,
            host: Vec::new(),
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
    pub fn place(&mut self, sources: &Sources<'_>, residency: &Residency, threads: usize) -> Result<()> {
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
        let streams =
            |i: &usize| Self::moves(&self.demand.items[*i]) && slices[*i] < self.demand.items[*i].slices;
        let wanted: Vec<usize> =
            (0..slices.len()).filter(|i| streams(i) && self.host[*i].is_none()).collect();
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
            self.running = Some(Lanes::new(&self.context, next.slots)?);
            self.recording = Some(Lanes::new(&self.context, next.slots)?);
        }
        self.placement = Some(next);
        self.heal()
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
        self.host.iter().flatten().map(|p| p.len() as u64).sum()
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
    fn send(&self, copy: usize, stream: &Stream) -> Result<()> {
        let target = self.target(copy)?;
        let placement = self.placement()?;
        let part = &placement.copies[copy];
        let host = self.host[part.item].as_ref().ok_or_else(not_placed)?;
        host.send(stream, part.first * self.demand.items[part.item].slice_bytes, target)
    }

    fn lanes(&self, recorded: bool) -> Result<&Lanes> {
        let lanes = if recorded { &self.recording } else { &self.running };
        lanes.as_ref().ok_or_else(not_placed)
    }

    /// Brings the first copies of a step into their slots if a step may have failed since.
    pub fn heal(&mut self) -> Result<()> {
        let placement = self.placement()?;
        if !self.intact && !placement.copies.is_empty() {
            let lanes = self.lanes(false)?;
            lanes.copies.synchronize()?;
            for copy in 0..placement.copies.len().min(placement.slots) {
                self.send(copy, &lanes.copies)?;
            }
            lanes.copies.synchronize()?;
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

    /// Lets `stream` wait for a copy. `recorded` tells whether the stream records.
    pub fn arrive(&self, copy: usize, stream: &Stream, recorded: bool) -> Result<()> {
        let placement = self.placement()?;
        if placement.moved() == 0 || copy < placement.slots {
            // It was there when the step began.
            return Ok(());
        }
        stream.wait(&self.lanes(recorded)?.arrived[placement.copies[copy].slot])
    }

    /// After the kernels that use a copy: enqueues the next into its slot.
    pub fn leave(&self, copy: usize, stream: &Stream, recorded: bool) -> Result<()> {
        let placement = self.placement()?;
        let (true, Some(next)) = (placement.moved() > 0, placement.next(copy)) else { return Ok(()) };
        let (lanes, slot) = (self.lanes(recorded)?, placement.copies[copy].slot);
        lanes.left[slot].record(stream)?;
        lanes.copies.wait(&lanes.left[slot])?;
        self.send(next, &lanes.copies)?;
        lanes.arrived[slot].record(&lanes.copies)
    }

    /// Ends the copies of a step: `stream` waits for the first ones of the next.
    pub fn join(&self, stream: &Stream, recorded: bool) -> Result<()> {
        let placement = self.placement()?;
        if placement.moved() == 0 {
            return Ok(());
        }
        let lanes = self.lanes(recorded)?;
        // A slot with a single copy keeps it.
        let moving = placement.copies.len().saturating_sub(placement.slots).min(placement.slots);
        lanes.arrived[..moving].iter().try_for_each(|event| stream.wait(event))
    }

    /// A step has been enqueued.
    pub fn end(&mut self) {
        self.intact = true;
    }
}
