//! Proves a placement: budget, coverage, and that no slot is overwritten while it is needed.

use super::demand::Demand;
use super::place::Placement;
use crate::error::{Error, Kind, Result};

fn fault(message: String) -> Error {
    Error::new(Kind::Internal, "plan/stream", message)
}

/// Checks `placement` against `demand` and `budget`.
///
/// # Errors
/// `plan/stream` says what is wrong.
pub fn check(demand: &Demand, placement: &Placement, budget: u64) -> Result<()> {
    if placement.device_bytes() > budget {
        return Err(fault(format!("{} bytes are placed in {budget}", placement.device_bytes())));
    }
    // Every use finds the slices that are not resident, in order.
    let mut copies = placement.copies.iter().peekable();
    for (user, read) in demand.uses.iter().enumerate() {
        let item = &demand.items[read.item];
        let mut known = placement.resident[read.item];
        if item.cut == Some(super::Cut::Rows) && known == 0 {
            continue;
        }
        while let Some(copy) = copies.next_if(|c| c.user == user) {
            if copy.item != read.item || copy.first != known || copy.count == 0 {
                return Err(fault(format!(
                    "use {user} gets slices {}+{} after {known}",
                    copy.first, copy.count
                )));
            }
            if copy.bytes != copy.count * item.slice_bytes || copy.bytes > placement.slot_bytes {
                return Err(fault(format!(
                    "a copy of {} bytes for a slot of {}",
                    copy.bytes, placement.slot_bytes
                )));
            }
            known += copy.count;
        }
        if known != item.slices {
            return Err(fault(format!("use {user} finds {known} of {} slices", item.slices)));
        }
    }
    if copies.next().is_some() {
        return Err(fault("a copy has no use".into()));
    }
    // Two steps by the runtime's rule: what a slot holds at each use.
    let mut slots: Vec<Option<usize>> = vec![None; placement.slots];
    for (index, copy) in placement.copies.iter().enumerate().take(placement.slots) {
        *slots.get_mut(copy.slot).ok_or_else(|| fault("a slot does not exist".into()))? = Some(index);
    }
    for _ in 0..2 {
        for (index, copy) in placement.copies.iter().enumerate() {
            if slots.get(copy.slot).copied().flatten() != Some(index) {
                return Err(fault(format!("copy {index} is not in its slot when it is used")));
            }
            if let Some(next) = placement.next(index) {
                let coming = placement.copies.get(next).filter(|c| c.slot == copy.slot && c.after == index);
                if coming.is_none() {
                    return Err(fault(format!("copy {next} does not wait for copy {index}")));
                }
                slots[copy.slot] = Some(next);
            }
        }
    }
    Ok(())
}
