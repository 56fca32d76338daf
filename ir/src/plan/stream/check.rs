//! Proves a placement: budget, coverage, and that no slot is overwritten while it is needed.
//!
//! Shares no code with the placing: sizes are summed again, and the steps are played slot by slot.

use super::demand::{Cut, Demand, Item};
use super::place::Placement;
use crate::error::{Error, Kind, Result};

fn fault(message: impl Into<String>) -> Error {
    Error::new(Kind::Internal, "plan/stream", message)
}

/// Checks `placement` against `demand` and `budget`.
///
/// # Errors
/// `plan/stream` says what is wrong.
pub fn check(demand: &Demand, placement: &Placement, budget: u64) -> Result<()> {
    sizes(demand, placement, budget)?;
    coverage(demand, placement)?;
    slots(placement)
}

/// Sums are what they say, and within the budget.
fn sizes(demand: &Demand, placement: &Placement, budget: u64) -> Result<()> {
    let items = demand.items.len();
    if placement.resident.len() != items || placement.tile.len() != items {
        return Err(fault(format!("{} of {items} weights are placed", placement.resident.len())));
    }
    let mut sum = 0u64;
    for (index, (item, resident)) in demand.items.iter().zip(&placement.resident).enumerate() {
        let streams = placement.tile[index] > 0;
        let rows = item.cut == Some(Cut::Rows) && *resident == 0;
        if *resident > item.slices {
            return Err(fault(format!("weight {index} has {resident} of {} slices", item.slices)));
        }
        if *resident < item.slices && !streams && !rows {
            return Err(fault(format!("weight {index} neither streams nor is it resident")));
        }
        if *resident < item.slices && item.cut.is_none() {
            return Err(fault(format!("weight {index} must stay resident")));
        }
        let bytes =
            resident.checked_mul(item.slice_bytes).and_then(|b| b.checked_next_multiple_of(placement.align));
        let total = bytes.and_then(|b| sum.checked_add(b));
        sum = total.ok_or_else(|| fault("sizes exceed 64 bits"))?;
    }
    if sum != placement.resident_bytes {
        let message = format!("residents have {sum} bytes, the placement says {}", placement.resident_bytes);
        return Err(fault(message));
    }
    let ring = (placement.slots as u64).checked_mul(placement.slot_bytes);
    let device = ring.and_then(|ring| ring.checked_add(sum)).ok_or_else(|| fault("sizes exceed 64 bits"))?;
    if device > budget {
        return Err(fault(format!("{device} bytes are placed in {budget}")));
    }
    if !placement.slot_bytes.is_multiple_of(placement.align) {
        return Err(fault(format!("slots of {} bytes are not aligned", placement.slot_bytes)));
    }
    Ok(())
}

/// Where tiles of a weight may begin.
fn granule(item: &Item) -> u64 {
    match item.cut {
        Some(Cut::Tiles { granule, .. }) => granule.max(1),
        _ => item.slices.max(1),
    }
}

/// Every use finds the slices that are not resident, in order, and no copy is for nothing.
fn coverage(demand: &Demand, placement: &Placement) -> Result<()> {
    let mut copies = placement.copies.iter().peekable();
    let mut streamed_by = None;
    for (user, read) in demand.uses.iter().enumerate() {
        let item = demand.items.get(read.item).ok_or_else(|| fault("a use has no weight"))?;
        let mut known = placement.resident[read.item];
        if item.cut == Some(Cut::Rows) && known == 0 {
            continue;
        }
        while let Some(copy) = copies.next_if(|c| c.user == user) {
            if copy.item != read.item || copy.first != known || copy.count == 0 {
                return Err(fault(format!(
                    "use {user} gets slices {}+{} after {known}",
                    copy.first, copy.count
                )));
            }
            if !copy.first.is_multiple_of(granule(item)) {
                return Err(fault(format!("use {user} gets a tile that begins at slice {}", copy.first)));
            }
            let bytes = copy.count.checked_mul(item.slice_bytes);
            if Some(copy.bytes) != bytes || copy.bytes > placement.slot_bytes {
                let message =
                    format!("a copy of {} bytes for a slot of {}", copy.bytes, placement.slot_bytes);
                return Err(fault(message));
            }
            // A launch gives its slots up together: it must not wait for a copy that its own end enqueues.
            if streamed_by
                .replace((read.node, read.item))
                .is_some_and(|(n, i)| n == read.node && i != read.item)
            {
                return Err(fault(format!("node {} reads two weights that stream", read.node)));
            }
            known = known.saturating_add(copy.count);
            let tile = placement.tile[read.item];
            if copy.count > tile || copy.count < tile && known < item.slices {
                return Err(fault(format!("a tile of {} slices instead of {tile}", copy.count)));
            }
        }
        if known != item.slices {
            return Err(fault(format!("use {user} finds {known} of {} slices", item.slices)));
        }
    }
    match copies.next() {
        Some(copy) => Err(fault(format!("use {} does not take its copy", copy.user))),
        None => Ok(()),
    }
}

/// Two steps by the runtime's rule: what a slot holds at each use.
fn slots(placement: &Placement) -> Result<()> {
    let mut slots: Vec<Option<usize>> = vec![None; placement.slots];
    for (index, copy) in placement.copies.iter().enumerate().take(placement.slots) {
        let slot =
            slots.get_mut(copy.slot).ok_or_else(|| fault(format!("there is no slot {}", copy.slot)))?;
        if slot.replace(index).is_some() {
            return Err(fault(format!("two copies are in slot {} at the beginning", copy.slot)));
        }
    }
    for _ in 0..2 {
        for (index, copy) in placement.copies.iter().enumerate() {
            if slots.get(copy.slot).copied().flatten() != Some(index) {
                return Err(fault(format!("copy {index} is not in its slot when it is used")));
            }
            let next = placement.next(index).unwrap_or(index);
            if placement.copies.get(next).is_none_or(|c| c.slot != copy.slot || c.after != index) {
                return Err(fault(format!("copy {next} does not wait for copy {index}")));
            }
            slots[copy.slot] = Some(next);
        }
    }
    Ok(())
}
