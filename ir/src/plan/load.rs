//! How many bytes are alive at each instant.

use super::item::Item;

/// Bytes alive between neighbouring instants.
pub(super) struct Load {
    times: Vec<usize>,
    bytes: Vec<u64>,
    capacity: u64,
}

impl Load {
    /// Everything that `items` take; `capacity` is what later ones have to fit in.
    pub(super) fn of(items: &[Item], capacity: u64) -> Self {
        let mut times: Vec<usize> = items.iter().flat_map(|i| [i.start, i.end]).collect();
        times.sort_unstable();
        times.dedup();
        let mut load = Load { bytes: vec![0; times.len()], times, capacity };
        for item in items {
            for s in load.span(item) {
                load.bytes[s] = load.bytes[s].saturating_add(item.size);
            }
        }
        load
    }

    fn span(&self, item: &Item) -> std::ops::Range<usize> {
        let at = |time: usize| self.times.partition_point(|t| *t < time);
        at(item.start)..at(item.end)
    }

    /// Adds `item`, if it fits.
    pub(super) fn put(&mut self, item: &Item) -> bool {
        let span = self.span(item);
        let fits = self.bytes[span.clone()].iter().all(|b| b.saturating_add(item.size) <= self.capacity);
        if fits {
            self.bytes[span].iter_mut().for_each(|b| *b += item.size);
        }
        fits
    }
}
