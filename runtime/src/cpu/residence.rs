//! Where the weights of a CPU session are: mapped from the engine file, or inside a budget.
//!
//! If all are resident the file is mapped, and the system decides which pages stay. Under a budget nothing is mapped: weights
//! that never move share one block, each of the others has pages of its own for its resident slices, and the rest comes
//! through the ring, or by the row for tables. The sizes of all these are the placement's numbers, exactly.
//!
//! Weights in the engine file are read ahead by [`Readers`]; those of a model folder or of expressions are read or computed
//! when they are due, by the thread that needs them.
//!
//! Invariant: between steps the first copies of a step are in their slots or under way. A step that fails breaks it; the next
//! one restores it by [`Streamed::begin`].

use std::ops::Range;

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::plan::stream::{Copy, Cut, Demand, Item, Placement};
use millrace_ir::{Error, Id, Kind, Result, WeightId};

use super::readers::Readers;
use crate::budget::Residency;
use crate::direct::DirectFile;
use crate::engine::Engine;
use crate::mapping::Pages;
use crate::memory::{Region, host_memory};
use crate::weights::{Origin, Supply, Weights};

/// Rows of a table that the calling thread reads by itself; for more the readers are faster.
const FEW_ROWS: usize = 4;

fn not_placed() -> Error {
    let message = "the weights are in no place: a change of budget has failed";
    Error::new(Kind::OutOfMemory, "run/not-placed", message).hint("set a weight budget that fits")
}

fn internal(message: &str) -> Error {
    Error::new(Kind::Internal, "run/streaming", message)
}

enum Place {
    Nowhere,
    Whole(Weights),
    Streamed(Box<Streamed>),
}

/// See the module.
pub(super) struct Residence {
    place: Place,
    /// Whether weights of a model folder have been compared with their hashes.
    checked: bool,
}

impl Residence {
    /// No weight is anywhere.
    pub fn new() -> Residence {
        Residence { place: Place::Nowhere, checked: false }
    }

    /// Brings the weights to where `residency` has them. What goes is given back before memory is taken for what comes.
    ///
    /// # Errors
    /// Those of reading weights, `run/out-of-memory`; the weights are then in no place.
    pub fn place(
        &mut self,
        engine: &Engine,
        source: Option<&dyn TensorSource>,
        residency: &Residency,
    ) -> Result<()> {
        let before = std::mem::replace(&mut self.place, Place::Nowhere);
        if residency.placement.is_resident() {
            drop(before);
            self.place = Place::Whole(Weights::load(engine, source)?);
            self.checked = true;
            return Ok(());
        }
        let mut supply = Supply::new(engine, source);
        if !self.checked {
            supply.check_bound()?;
            self.checked = true;
        }
        let before = if let Place::Streamed(streamed) = before { Some(streamed) } else { None };
        self.place = Place::Streamed(Box::new(Streamed::new(before, &mut supply, residency)?));
        Ok(())
    }

    /// What of the weights streams, if any does.
    ///
    /// # Errors
    /// `run/not-placed`.
    pub fn streamed(&mut self) -> Result<Option<&mut Streamed>> {
        match &mut self.place {
            Place::Nowhere => Err(not_placed()),
            Place::Whole(_) => Ok(None),
            Place::Streamed(streamed) => Ok(Some(streamed)),
        }
    }

    /// By weight: where it is, or its resident part.
    pub fn regions(&self, bound: usize) -> Vec<Option<Region>> {
        let mut regions = vec![None; bound];
        match &self.place {
            Place::Nowhere => {}
            Place::Whole(weights) => {
                regions
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, r)| *r = weights.region(WeightId::from_index(i)));
            }
            Place::Streamed(streamed) => {
                for (index, item) in streamed.demand.items.iter().enumerate() {
                    regions[item.weight.index()] = Some(streamed.resident(index));
                }
            }
        }
        regions
    }

    /// Bytes of resident weights and of the ring, if less than all is resident.
    pub fn bytes(&self) -> Option<(u64, u64)> {
        match &self.place {
            Place::Nowhere => Some((0, 0)),
            Place::Whole(_) => None,
            Place::Streamed(s) => {
                let held: u64 = s.held.iter().flatten().map(Pages::len).sum();
                Some((s.fixed.len() + held, s.slots.iter().map(Pages::len).sum()))
            }
        }
    }
}

/// Where tiles come from.
#[derive(Clone, Copy, Debug)]
enum Home {
    /// Byte of the engine file at which the weight begins.
    File(u64),
    /// A model folder, an expression, or an engine in memory.
    Elsewhere,
}

/// See the module.
pub(crate) struct Streamed {
    /// Before what it fills, so that it ends first.
    readers: Option<Readers>,
    slots: Vec<Pages>,
    /// By slot: the copy that is in it, or under way to it.
    content: Vec<Option<usize>>,
    fixed: Pages,
    /// By item: its place in `fixed`.
    fixed_at: Vec<Option<u64>>,
    /// By item: its resident slices.
    held: Vec<Option<Pages>>,
    homes: Vec<Home>,
    /// By position in the execution order: the copies that the node reads.
    copies: Vec<Range<usize>>,
    demand: Demand,
    placement: Placement,
    /// Whether a step is running, or has failed.
    amid: bool,
    /// Bytes brought in for the step.
    pub moved: u64,
}

/// Bytes of the weight that a run of slices is made of: first byte and length, part by part.
fn ranges(item: &Item, first: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let parts = if let Some(Cut::Tiles { parts, .. }) = item.cut { parts } else { 1 };
    let slice = item.slice_bytes / parts;
    let slices = item.slices;
    (0..parts).map(move |part| ((part * slices + first) * slice, count * slice))
}

/// Where the runs of `ranges` lie one behind the other in `region`.
fn pieces(item: &Item, first: u64, count: u64, region: Region) -> Result<Vec<(u64, Region)>> {
    let mut at = 0;
    let piece = |(from, len)| {
        let part = region.part(at, len).ok_or_else(|| internal("a tile exceeds its memory"))?;
        at += len;
        Ok((from, part))
    };
    ranges(item, first, count).map(piece).collect()
}

impl Streamed {
    fn new(
        before: Option<Box<Streamed>>,
        supply: &mut Supply<'_>,
        residency: &Residency,
    ) -> Result<Streamed> {
        let Residency { demand, ring, placement, .. } = residency;
        let count = demand.items.len();
        let mut homes = Vec::with_capacity(count);
        for item in &demand.items {
            homes.push(match supply.origin(item.weight, item.bytes)? {
                Origin::Stored(record) => supply.in_file(record)?.map_or(Home::Elsewhere, Home::File),
                Origin::Bound(_) | Origin::Computed => Home::Elsewhere,
            });
        }
        let mut copies = vec![0..0; demand.nodes];
        for (index, copy) in placement.copies.iter().enumerate() {
            let range = &mut copies[demand.uses[copy.user].node];
            let start = if range.start == range.end { index } else { range.start };
            *range = start..index + 1;
        }
        let fixed = |item: &Item| !item.streams(ring.small);
        let (mut fixed_at, mut fixed_len) = (vec![None; count], 0);
        for (index, item) in demand.items.iter().enumerate().filter(|(_, item)| fixed(item)) {
            fixed_at[index] = Some(fixed_len);
            fixed_len += ring.padded(item.bytes);
        }
        // Which items never move is the same under every budget.
        let (known, mut held) = match before {
            Some(before) => (Some(before.fixed), before.held),
            None => (None, Vec::new()),
        };
        held.resize_with(count, || None);
        let size = |index: usize| {
            let item = &demand.items[index];
            ring.padded(placement.resident[index] * item.slice_bytes)
        };
        for (index, pages) in held.iter_mut().enumerate() {
            pages.take_if(|pages| pages.len() != size(index));
        }
        let slots = (0..if placement.slot_bytes > 0 { placement.slots } else { 0 })
            .map(|_| Pages::new(placement.slot_bytes, "the weight ring"))
            .collect::<Result<Vec<Pages>>>()?;
        let load_fixed = known.is_none();
        let fixed = match known {
            Some(fixed) => fixed,
            None => Pages::new(fixed_len, "weights")?,
        };
        // The page cache helps if it keeps all of what is read step by step.
        let direct = placement.moved() > host_memory("MemAvailable:") / 2;
        let readers = match supply.file() {
            Some((file, path)) => {
                Some(Readers::new(DirectFile::new(file, path, direct)?, placement.slots + 1)?)
            }
            None => None,
        };
        let mut streamed = Streamed {
            readers,
            content: vec![None; slots.len()],
            slots,
            fixed,
            fixed_at,
            held,
            homes,
            copies,
            demand: demand.clone(),
            placement: placement.clone(),
            amid: true,
            moved: 0,
        };
        streamed.load(supply, load_fixed, size)?;
        streamed.begin()?;
        streamed.end();
        Ok(streamed)
    }

    /// Brings in what is to be resident and is not.
    fn load(&mut self, supply: &mut Supply<'_>, fixed: bool, size: impl Fn(usize) -> u64) -> Result<()> {
        let block = Region::writable(self.fixed.bytes_mut());
        for index in 0..self.demand.items.len() {
            let slices = self.placement.resident[index];
            if let Some(at) = self.fixed_at[index] {
                let region = block.part(at, self.demand.items[index].bytes);
                let region = region.ok_or_else(|| internal("a weight exceeds its memory"))?;
                if fixed {
                    self.bring(supply, index, (0, slices), region)?;
                }
            } else if slices > 0 && self.held[index].is_none() {
                let mut pages = Pages::new(size(index), "weights")?;
                let region = Region::writable(pages.bytes_mut());
                self.held[index] = Some(pages);
                self.bring(supply, index, (0, slices), region)?;
            }
        }
        match &self.readers {
            Some(readers) => readers.wait(self.loading()),
            None => Ok(()),
        }
    }

    /// The ticket of reads that are not for the ring.
    fn loading(&self) -> usize {
        self.placement.slots
    }

    /// Reads slices into a region that `self` owns and does not touch before the readers have been waited for.
    fn bring(
        &self,
        supply: &mut Supply<'_>,
        index: usize,
        (first, count): (u64, u64),
        region: Region,
    ) -> Result<()> {
        let item = &self.demand.items[index];
        let pieces = pieces(item, first, count, region)?;
        match (&self.readers, self.homes[index]) {
            (Some(readers), Home::File(start)) => {
                let reads = pieces.into_iter().map(|(from, region)| (start + from, region));
                // SAFETY: pages that live longer than the readers; they are read after `wait` only.
                unsafe { readers.submit(self.loading(), reads, false) };
                Ok(())
            }
            _ => pieces.into_iter().try_for_each(|(from, region)| {
                // SAFETY: the region is of pages that nobody uses meanwhile.
                supply.read(item.weight, from, unsafe { region.slice_mut() }?)
            }),
        }
    }

    /// The resident slices of an item; nothing where there are none.
    fn resident(&self, index: usize) -> Region {
        let item = &self.demand.items[index];
        let (bytes, at, len) = match (self.fixed_at[index], &self.held[index]) {
            (Some(at), _) => (self.fixed.bytes(), at, item.bytes),
            (None, Some(pages)) => (pages.bytes(), 0, self.placement.resident[index] * item.slice_bytes),
            (None, None) => (&[][..], 0, 0),
        };
        let region = Region::read_only(bytes);
        region.part(at, len).unwrap_or(Region::read_only(&[]))
    }

    /// The copies that the node at position `at` reads, all of one weight.
    pub fn copies(&self, at: usize) -> Range<usize> {
        self.copies.get(at).cloned().unwrap_or(0..0)
    }

    /// A copy with its weight and the weight's resident slices.
    pub fn copy(&self, index: usize) -> (&Item, u64, &Copy) {
        let copy = &self.placement.copies[index];
        (&self.demand.items[copy.item], self.placement.resident[copy.item], copy)
    }

    /// The item of a table that is not resident, if `weight` is one.
    pub fn table(&self, weight: WeightId) -> Option<usize> {
        let index = self.demand.items.iter().position(|item| item.weight == weight)?;
        let afar = self.demand.items[index].cut == Some(Cut::Rows) && self.placement.resident[index] == 0;
        (afar && self.fixed_at[index].is_none()).then_some(index)
    }

    /// Begins a step: the first copies are in their slots or under way when this returns.
    pub fn begin(&mut self) -> Result<()> {
        self.moved = 0;
        if !std::mem::replace(&mut self.amid, true) {
            return Ok(());
        }
        if let Some(readers) = &self.readers {
            readers.drain();
        }
        self.content.fill(None);
        let first = self.slots.len().min(self.placement.copies.len());
        (0..first).try_for_each(|copy| self.enqueue(copy))
    }

    /// Ends a step that went well.
    pub fn end(&mut self) {
        self.amid = false;
    }

    /// Starts bringing a copy into its slot, which nobody uses.
    fn enqueue(&mut self, index: usize) -> Result<()> {
        let copy = self.placement.copies[index];
        self.content[copy.slot] = None;
        let (Some(readers), Home::File(start)) = (&self.readers, self.homes[copy.item]) else {
            // It is read when it is due.
            return Ok(());
        };
        let region = Region::writable(self.slots[copy.slot].bytes_mut());
        let pieces = pieces(&self.demand.items[copy.item], copy.first, copy.count, region)?;
        let reads = pieces.into_iter().map(|(from, region)| (start + from, region));
        // SAFETY: the slot lives longer than the readers, its kernel has ended, and it is read after `wait` only.
        unsafe { readers.submit(copy.slot, reads, false) };
        self.content[copy.slot] = Some(index);
        Ok(())
    }

    /// The bytes of a copy, once they are there.
    pub fn arrive(&mut self, supply: &mut Supply<'_>, index: usize) -> Result<Region> {
        let copy = self.placement.copies[index];
        let item = self.demand.items[copy.item].clone();
        if self.content[copy.slot] != Some(index) {
            let region = Region::writable(self.slots[copy.slot].bytes_mut());
            for (from, region) in pieces(&item, copy.first, copy.count, region)? {
                // SAFETY: nothing is under way to the slot, and its kernel has ended.
                supply.read(item.weight, from, unsafe { region.slice_mut() }?)?;
            }
            self.content[copy.slot] = Some(index);
        } else if let Some(readers) = &self.readers {
            readers.wait(copy.slot)?;
        }
        // A tile that keeps its slot is brought in once.
        self.moved += self.placement.next(index).map_or(0, |_| copy.bytes);
        let region = Region::read_only(self.slots[copy.slot].bytes());
        region.part(0, copy.bytes).ok_or_else(|| internal("a tile exceeds its slot"))
    }

    /// Tells that the kernel of a copy has ended.
    pub fn leave(&mut self, index: usize) -> Result<()> {
        match self.placement.next(index) {
            Some(next) => self.enqueue(next),
            None => Ok(()),
        }
    }

    /// Reads rows of a table that is not resident: row `places[i]` of `width` bytes into row `i` of `out`. Returns the bytes
    /// read: neighbours are read at once and repetitions once.
    pub fn rows(
        &self,
        supply: &mut Supply<'_>,
        index: usize,
        width: usize,
        places: &[usize],
        out: &mut [u8],
    ) -> Result<u64> {
        let item = &self.demand.items[index];
        let inside = |place: &usize| {
            (*place as u64 + 1).checked_mul(width as u64).is_some_and(|end| end <= item.bytes)
        };
        if places.len().checked_mul(width) != Some(out.len()) || !places.iter().all(inside) {
            return Err(internal("rows leave their table"));
        }
        if out.is_empty() {
            return Ok(0);
        }
        let mut order: Vec<usize> = (0..places.len()).collect();
        order.sort_unstable_by_key(|row| (places[*row], *row));
        let mut repeated: Vec<(usize, usize)> = Vec::new();
        // First row of the table, first row of the result, rows.
        let mut runs: Vec<(usize, usize, usize)> = Vec::new();
        let mut last = None;
        for row in order {
            match (last, runs.last_mut()) {
                (Some((place, first)), _) if place == places[row] => {
                    repeated.push((first, row));
                    continue;
                }
                (_, Some((place, first, count)))
                    if *place + *count == places[row] && *first + *count == row =>
                {
                    *count += 1;
                }
                _ => runs.push((places[row], row, 1)),
            }
            last = Some((places[row], row));
        }
        match (&self.readers, self.homes[index]) {
            (Some(readers), Home::File(start)) if runs.len() > FEW_ROWS => {
                let region = Region::writable(out);
                let part = |(place, row, count): &(usize, usize, usize)| {
                    let part = region.part((row * width) as u64, (count * width) as u64)?;
                    Some((start + (place * width) as u64, part))
                };
                let reads: Option<Vec<(u64, Region)>> = runs.iter().map(part).collect();
                let reads = reads.ok_or_else(|| internal("rows exceed their result"))?;
                // SAFETY: `out` is borrowed exclusively, and untouched until `wait` has returned.
                unsafe { readers.submit(self.loading(), reads, true) };
                readers.wait(self.loading())?;
            }
            (readers, home) => {
                for (place, row, count) in &runs {
                    let out = &mut out[row * width..(row + count) * width];
                    let from = (place * width) as u64;
                    match (readers, home) {
                        (Some(readers), Home::File(start)) => readers.read(start + from, out)?,
                        _ => supply.read(item.weight, from, out)?,
                    }
                }
            }
        }
        for (from, to) in repeated {
            out.copy_within(from * width..(from + 1) * width, to * width);
        }
        Ok(runs.iter().map(|(_, _, count)| (count * width) as u64).sum())
    }
}
