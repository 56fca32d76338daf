//! What the packer packs: sizes with lifetimes, and what it answers.

use super::instants::{dense, end};

/// A buffer with a half-open lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Size in bytes.
    pub size: u64,
    /// First instant of life.
    pub start: usize,
    /// First instant after life.
    pub end: usize,
    /// The offset is a multiple of this; 0 and 1 are free.
    pub align: u64,
}

impl Item {
    /// An item whose offset may be any number.
    pub fn new(size: u64, start: usize, end: usize) -> Self {
        Item { size, start, end, align: 1 }
    }

    /// Whether both live at one instant and need memory.
    pub fn meets(&self, other: &Item) -> bool {
        self.size > 0 && other.size > 0 && self.start < other.end && other.start < self.end
    }

    /// The smallest legal offset at or above `offset`.
    pub fn at_or_above(&self, offset: u64) -> u64 {
        offset.checked_next_multiple_of(self.align.max(1)).unwrap_or(u64::MAX)
    }
}

/// Offsets of all items and what they add up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Offset of each item.
    pub offsets: Vec<u64>,
    /// Highest end.
    pub peak: u64,
    /// Largest sum of sizes alive at one instant: no packing is smaller.
    pub lower_bound: u64,
}

/// The largest sum of sizes alive at one instant.
pub fn lower_bound(items: &[Item]) -> u64 {
    let items = dense(items);
    // What is born less what dies at each instant.
    let mut changes = vec![0i128; end(&items) + 1];
    for item in items.iter().filter(|i| i.start < i.end) {
        changes[item.start] += i128::from(item.size);
        changes[item.end] -= i128::from(item.size);
    }
    let (mut alive, mut most) = (0, 0);
    for change in changes {
        alive += change;
        most = most.max(alive);
    }
    u64::try_from(most).unwrap_or(u64::MAX)
}

/// Proves a packing without help from the packer: every offset is aligned and below `capacity`, and items that live
/// together lie apart. Sweeps over time with the living items ordered by offset.
///
/// # Errors
/// The items at fault (one, twice, if it is alone) and why.
pub fn check_packing(items: &[Item], offsets: &[u64], capacity: u64) -> Result<(), (usize, usize, String)> {
    let mut events: Vec<(usize, bool, usize)> = Vec::with_capacity(items.len() * 2);
    for (index, item) in items.iter().enumerate() {
        let Some(&offset) = offsets.get(index) else {
            return Err((index, index, "has no offset".to_string()));
        };
        if offset % item.align.max(1) != 0 {
            return Err((index, index, format!("offset {offset} is no multiple of {}", item.align)));
        }
        if offset.checked_add(item.size).is_none_or(|end| end > capacity) {
            return Err((index, index, format!("offset {offset} + {} is above {capacity}", item.size)));
        }
        if item.size > 0 && item.start < item.end {
            events.push((item.start, true, index));
            events.push((item.end, false, index));
        }
    }
    events.sort_unstable();
    let mut alive: std::collections::BTreeMap<u64, usize> = std::collections::BTreeMap::new();
    for (_, birth, index) in events {
        let (low, high) = (offsets[index], offsets[index] + items[index].size);
        if !birth {
            alive.remove(&low);
            continue;
        }
        if let Some((_, &other)) = alive.range(..high).next_back()
            && offsets[other] + items[other].size > low
        {
            return Err((other, index, "are alive together in the same bytes".to_string()));
        }
        alive.insert(low, index);
    }
    Ok(())
}
