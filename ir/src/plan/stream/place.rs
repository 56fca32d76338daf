//! Chooses what is resident and lists the copies of a step.

use super::Ring;
use super::demand::{Cut, Demand, Item};
use crate::error::{Error, Kind, Result};

/// One copy of a step: a tile, for one use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Index into [`Demand::items`].
    pub item: usize,
    /// Index into [`Demand::uses`].
    pub user: usize,
    /// First slice.
    pub first: u64,
    /// Slices.
    pub count: u64,
    /// Bytes.
    pub bytes: u64,
    /// Slot that it goes to.
    pub slot: usize,
    /// The copy that was in the slot before, whose kernel must have ended: of this step if it is a lower number, else
    /// of the step before.
    pub after: usize,
}

/// What is resident and what is copied, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// By item: the first slices, which stay on the device. 0 for tables whose rows are read where they lie.
    pub resident: Vec<u64>,
    /// By item: the slices of its tiles, but for the last; 0 for items that do not stream.
    pub tile: Vec<u64>,
    /// Copies of a step in the order of their uses.
    pub copies: Vec<Copy>,
    /// Slots.
    pub slots: usize,
    /// Bytes of a slot, 0 if nothing streams.
    pub slot_bytes: u64,
    /// Bytes of resident weights, each padded to the alignment.
    pub resident_bytes: u64,
    /// The alignment.
    pub align: u64,
}

impl Placement {
    /// Bytes of the ring.
    pub fn ring_bytes(&self) -> u64 {
        self.slots as u64 * self.slot_bytes
    }

    /// Bytes on the device: residents and ring.
    pub fn device_bytes(&self) -> u64 {
        self.resident_bytes + self.ring_bytes()
    }

    /// Bytes copied in each step of the steady state. A copy that has its slot to itself is not repeated.
    pub fn moved(&self) -> u64 {
        self.moving().map(|copy| copy.bytes).sum()
    }

    /// The copies that every step of the steady state repeats.
    pub fn moving(&self) -> impl Iterator<Item = &Copy> {
        self.copies.iter().enumerate().filter(|(index, _)| self.next(*index).is_some()).map(|(_, copy)| copy)
    }

    /// The copy that goes into the slot of copy `index` once its kernel has been enqueued; of the next step if its
    /// number is not higher. `None` where it is the copy itself, which then stays.
    pub fn next(&self, index: usize) -> Option<usize> {
        let slot = self.copies.get(index)?.slot;
        let other = index + self.slots;
        let next = if other < self.copies.len() { other } else { slot };
        (next != index).then_some(next)
    }

    /// Whether all weights are resident.
    pub fn is_resident(&self) -> bool {
        self.slot_bytes == 0 && self.resident.iter().all(|r| *r > 0)
    }
}

/// Slices of a tile, and tiles, of an item in slots of `slot` bytes.
fn tiles(item: &Item, slot: u64) -> (u64, u64) {
    let Some(Cut::Tiles { granule, .. }) = item.cut else { return (item.slices, 1) };
    let count = item.bytes.div_ceil(slot.max(1)).max(1);
    let fit = slot / item.slice_bytes.max(1) / granule * granule;
    let even = item.slices.div_ceil(count).next_multiple_of(granule);
    let tile = even.min(fit.max(granule)).min(item.slices).max(1);
    (tile, item.slices.div_ceil(tile))
}

/// The least that a slot must hold for an item to stream; `None` for one that is not copied.
fn piece(item: &Item, ring: &Ring) -> Option<u64> {
    let bytes = match item.cut {
        _ if !item.streams(ring.small) => return None,
        Some(Cut::Tiles { granule, .. }) => granule.min(item.slices).max(1).saturating_mul(item.slice_bytes),
        Some(Cut::Whole) => item.bytes,
        Some(Cut::Rows) | None => return None,
    };
    Some(ring.padded(bytes))
}

/// What streams if slots hold pieces of up to `piece` bytes.
#[derive(Clone, Copy)]
struct Pieces {
    piece: u64,
    /// Padded bytes of the items that then stream.
    streams: u64,
    /// The largest of them.
    largest: u64,
}

/// One for each size of pieces, the smallest first. Items with larger pieces stay: a weight that cannot be cut costs
/// less as a resident than as a measure of all slots, unless there are several.
fn options(demand: &Demand, ring: &Ring) -> Vec<Pieces> {
    let mut pieces: Vec<(u64, u64)> =
        demand.items.iter().filter_map(|i| Some((piece(i, ring)?, ring.padded(i.bytes)))).collect();
    pieces.sort_unstable();
    let mut options: Vec<Pieces> = Vec::new();
    let (mut streams, mut largest) = (0, 0);
    for (piece, bytes) in pieces {
        streams += bytes;
        largest = bytes.max(largest);
        match options.last_mut() {
            Some(last) if last.piece == piece => (last.streams, last.largest) = (streams, largest),
            _ => options.push(Pieces { piece, streams, largest }),
        }
    }
    options
}

/// Padded bytes of the items that are copied if they stream, and of those that cannot stream.
fn split(demand: &Demand, ring: &Ring) -> (u64, u64) {
    let bytes = |keep: &dyn Fn(&Item) -> bool| -> u64 {
        demand.items.iter().filter(|i| keep(i)).map(|i| ring.padded(i.bytes)).sum()
    };
    (bytes(&|i| piece(i, ring).is_some()), bytes(&|i| !i.streams(ring.small)))
}

/// Bytes that a budget must have: the ring, every weight that cannot stream, and weights in pieces so large that keeping
/// them takes less.
pub fn minimum(demand: &Demand, ring: &Ring) -> u64 {
    let (copied, fixed) = split(demand, ring);
    let slots = ring.slots.max(2) as u64;
    let least = |o: Pieces| {
        let slot = ring.padded(o.piece.max(ring.slot_bytes.min(o.largest)));
        (copied - o.streams).saturating_add(slots.saturating_mul(slot))
    };
    fixed + options(demand, ring).into_iter().map(least).min().unwrap_or(0).min(copied)
}

/// Bytes that a link could move while a copy has its fixed costs, with room to spare: on an H200 they are 2.5 to 4.5 us, 140 to 250 KiB.
/// A step takes within 1 % of its shortest time with any value from 160 to 640 KiB; large slots keep it near the time of its bytes alone.
const COPY_COST: u64 = 640 << 10;

/// The bytes of a slot for `missing` bytes that do not fit: streaming with slots of `s` bytes moves `missing + slots s` bytes
/// in about `missing / s` copies more, so that `s` is the root of `missing COPY_COST / slots`. If too little streams in
/// pieces of that size, the least larger size at which enough does. `None` if there is none.
fn slot_bytes(demand: &Demand, ring: &Ring, missing: u64) -> Option<u64> {
    let slots = ring.slots.max(2) as u64;
    let root = (missing as u128 * COPY_COST as u128 / slots as u128).isqrt();
    let usual = ring.padded(u64::try_from(root).unwrap_or(u64::MAX).clamp(1, ring.slot_bytes.max(1)));
    let slot = |o: &Pieces| o.piece.max(usual.min(o.largest));
    let enough = |o: &Pieces| o.streams >= missing.saturating_add(slots.saturating_mul(slot(o)));
    options(demand, ring).iter().find(|o| enough(o)).map(slot)
}

/// Bytes of all weights when all are resident.
pub fn resident(demand: &Demand, ring: &Ring) -> u64 {
    demand.items.iter().map(|i| ring.padded(i.bytes)).sum()
}

/// What is resident under `budget` bytes for weights and ring together.
///
/// First stay weights that cannot stream, then those that several nodes read, then matrices; tables that are read by
/// the row come last, since reading their rows from afar costs least. Matrices lose tiles evenly over `work` (the
/// time that computing with each use takes, in any unit; bytes if empty), so that copies are due at an even rate.
///
/// # Errors
/// `run/weight-budget` if the budget is under [`minimum`]; it names the minimum.
pub fn place(demand: &Demand, budget: u64, ring: &Ring, work: &[u64]) -> Result<Placement> {
    let mut placement = Placement {
        resident: demand.items.iter().map(|i| i.slices).collect(),
        tile: vec![0; demand.items.len()],
        copies: Vec::new(),
        slots: ring.slots.max(2),
        slot_bytes: 0,
        resident_bytes: resident(demand, ring),
        align: ring.align.max(1),
    };
    if placement.resident_bytes <= budget {
        return Ok(placement);
    }
    let least = minimum(demand, ring);
    if budget < least {
        let message = format!("a weight budget of {budget} bytes is under the minimum of {least} bytes");
        return Err(Error::new(Kind::Usage, "run/weight-budget", message)
            .hint(format!("use a budget of at least {least} bytes, a fraction, or auto")));
    }
    // Tables whose rows are read from afar go first.
    let rows: Vec<usize> = (0..demand.items.len())
        .filter(|i| demand.items[*i].cut == Some(Cut::Rows) && demand.items[*i].streams(ring.small))
        .collect();
    for index in rows {
        placement.resident[index] = 0;
        placement.resident_bytes -= ring.padded(demand.items[index].bytes);
        if placement.resident_bytes <= budget {
            return Ok(placement);
        }
    }
    let missing = placement.resident_bytes - budget;
    let Some(slot) = slot_bytes(demand, ring, missing) else {
        // The ring takes more than it saves: everything that is copied stays, or the budget would be under the minimum.
        return Err(Error::new(Kind::Internal, "plan/stream", format!("no ring fits into {budget} bytes")));
    };
    placement.slot_bytes = slot;
    let room = budget - placement.ring_bytes();
    // Weights that several nodes read stay as long as they fit.
    let streams = |i: &usize| piece(&demand.items[*i], ring).is_some_and(|piece| piece <= slot);
    let (mut once, mut often): (Vec<usize>, Vec<usize>) =
        (0..demand.items.len()).filter(streams).partition(|i| demand.items[*i].uses < 2);
    let mut kept = placement.resident_bytes - bytes_of(demand, ring, once.iter().chain(&often));
    often.sort_by_key(|i| demand.items[*i].bytes / demand.items[*i].uses as u64);
    for index in often {
        let bytes = ring.padded(demand.items[index].bytes);
        if kept + bytes <= room {
            kept += bytes;
        } else {
            once.push(index);
        }
    }
    once.sort_unstable();
    spread(demand, &mut placement, &once, room - kept, ring, work);
    placement.resident_bytes =
        demand.items.iter().zip(&placement.resident).map(|(i, r)| ring.padded(r * i.slice_bytes)).sum();
    list(demand, &mut placement);
    Ok(placement)
}

fn bytes_of<'a>(demand: &Demand, ring: &Ring, items: impl Iterator<Item = &'a usize>) -> u64 {
    items.map(|i| ring.padded(demand.items[*i].bytes)).sum()
}

/// Leaves at most `room` bytes of `items` resident: tiles stream at an even rate over the work.
fn spread(demand: &Demand, placement: &mut Placement, items: &[usize], room: u64, ring: &Ring, work: &[u64]) {
    let mut weight = vec![0u128; demand.items.len()];
    for (index, user) in demand.uses.iter().enumerate() {
        weight[user.item] += work.get(index).copied().unwrap_or(demand.items[user.item].bytes).max(1) as u128;
    }
    let all: u128 = items.iter().map(|i| weight[*i]).sum();
    let total: u64 = items.iter().map(|i| demand.items[*i].bytes).sum();
    let slot = placement.slot_bytes;
    let cut: Vec<(u64, u64)> = items.iter().map(|i| tiles(&demand.items[*i], slot)).collect();
    // The resident bytes if `target` bytes are to stream: error diffusion along the execution order.
    let choose = |target: u64| -> (Vec<u64>, u64) {
        let (mut done, mut streamed, mut kept) = (0u128, 0u128, 0u64);
        let mut resident = Vec::with_capacity(items.len());
        for (index, (tile, count)) in items.iter().zip(&cut) {
            let item = &demand.items[*index];
            done += weight[*index];
            let due = (target as u128 * done / all.max(1)).saturating_sub(streamed);
            let tile_bytes = (tile * item.slice_bytes) as u128;
            let number = ((due + tile_bytes / 2) / tile_bytes.max(1)).min(*count as u128) as u64;
            let stay = ((count - number) * tile).min(item.slices);
            streamed += ((item.slices - stay) * item.slice_bytes) as u128;
            kept += ring.padded(stay * item.slice_bytes);
            resident.push(stay);
        }
        (resident, kept)
    };
    // Rounding may keep a little more than asked, so the target may lie above what must go, up to twice the total.
    let (mut low, mut high) = (total.saturating_sub(room), total.saturating_mul(2).saturating_add(slot));
    while low < high {
        let middle = low + (high - low) / 2;
        if choose(middle).1 <= room { high = middle } else { low = middle + 1 }
    }
    let (mut resident, mut kept) = choose(low);
    // Weights of little work may have kept too much; then the last ones give it up.
    for ((index, (tile, _)), stay) in items.iter().zip(&cut).zip(&mut resident).rev() {
        let item = &demand.items[*index];
        while kept > room && *stay > 0 {
            // What stays begins a tile.
            let less = (*stay - 1) / tile * tile;
            kept = kept - ring.padded(*stay * item.slice_bytes) + ring.padded(less * item.slice_bytes);
            *stay = less;
        }
    }
    // What rounding left over holds a few tiles more.
    for ((index, (tile, _)), stay) in items.iter().zip(&cut).zip(&mut resident) {
        let item = &demand.items[*index];
        let more = (*stay + tile).min(item.slices);
        let grown = kept - ring.padded(*stay * item.slice_bytes) + ring.padded(more * item.slice_bytes);
        if *stay < item.slices && grown <= room {
            (*stay, kept) = (more, grown);
        }
    }
    for ((index, (tile, _)), stay) in items.iter().zip(&cut).zip(resident) {
        placement.resident[*index] = stay;
        if stay < demand.items[*index].slices {
            placement.tile[*index] = *tile;
        }
    }
}

/// Lists the copies of a step.
fn list(demand: &Demand, placement: &mut Placement) {
    for (user, read) in demand.uses.iter().enumerate() {
        let (item, tile) = (&demand.items[read.item], placement.tile[read.item]);
        let mut first = placement.resident[read.item];
        while tile > 0 && first < item.slices {
            let count = tile.min(item.slices - first);
            let slot = placement.copies.len() % placement.slots;
            let bytes = count * item.slice_bytes;
            placement.copies.push(Copy { item: read.item, user, first, count, bytes, slot, after: 0 });
            first += count;
        }
    }
    let (count, slots) = (placement.copies.len(), placement.slots);
    for (index, copy) in placement.copies.iter_mut().enumerate() {
        // The last copy of the step that has this slot, for the first.
        copy.after = if index >= slots { index - slots } else { index + (count - 1 - index) / slots * slots };
    }
}
