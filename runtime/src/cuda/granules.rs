//! What allocations take from a device beyond what was asked for.
//!
//! The driver hands out device memory in granules of 2 MiB: a large block takes whole granules, small ones share them, each on a
//! multiple of 512 bytes. The slack is what is left over; the sums here can be a granule above what the driver holds, not below.

use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that the driver hands out at once.
const GRANULE: u64 = 2 << 20;

/// Blocks below this share granules.
const SMALL: u64 = 1 << 20;

/// What small blocks are rounded up to.
const UNIT: u64 = 512;

/// Blocks held now, by what they take.
#[derive(Debug, Default)]
pub(super) struct Granules {
    asked: AtomicU64,
    large: AtomicU64,
    small: AtomicU64,
}

impl Granules {
    fn place(&self, len: u64) -> (&AtomicU64, u64) {
        match len < SMALL {
            true => (&self.small, len.next_multiple_of(UNIT)),
            false => (&self.large, len.next_multiple_of(GRANULE)),
        }
    }

    /// Counts a block.
    pub fn add(&self, len: u64) {
        let (sum, bytes) = self.place(len);
        sum.fetch_add(bytes, Ordering::Relaxed);
        self.asked.fetch_add(len, Ordering::Relaxed);
    }

    /// Counts a block no more.
    pub fn remove(&self, len: u64) {
        let (sum, bytes) = self.place(len);
        sum.fetch_sub(bytes, Ordering::Relaxed);
        self.asked.fetch_sub(len, Ordering::Relaxed);
    }

    /// Bytes that nobody asked for.
    pub fn slack(&self) -> u64 {
        let small = self.small.load(Ordering::Relaxed).next_multiple_of(GRANULE);
        (self.large.load(Ordering::Relaxed) + small).saturating_sub(self.asked.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slack_is_what_rounding_adds() {
        let granules = Granules::default();
        assert_eq!(granules.slack(), 0);
        granules.add(3 << 20);
        assert_eq!(granules.slack(), 1 << 20);
        granules.add(4 << 20);
        assert_eq!(granules.slack(), 1 << 20, "whole granules");
        // Two small blocks share one granule.
        granules.add(1000);
        granules.add(513);
        assert_eq!(granules.slack(), (1 << 20) + GRANULE - 1513);
        granules.remove(3 << 20);
        granules.remove(1000);
        assert_eq!(granules.slack(), GRANULE - 513);
        granules.remove(513);
        granules.remove(4 << 20);
        assert_eq!(granules.slack(), 0);
    }
}
