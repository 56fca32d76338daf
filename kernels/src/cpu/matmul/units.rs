//! In which order threads take the parts of a product, and how much at once.
//!
//! A product is a row of units: one panel times a block of rows, or times one of its halves where there is one block only. Groups
//! of panels come one after the other, within a group the blocks of rows, within a block the panels: a thread packs the
//! rows of a block once for all panels of the group, and the group stays in a cache for all blocks. Threads claim runs of
//! units, shorter ones towards the end, so that all end together.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::simd::{TILE_ROWS, part};

/// Most rows of a block.
const ROWS: usize = 128;

/// Bytes of a group of panels, where there are several blocks of rows.
const GROUP_BYTES: usize = 8 << 20;

/// Fewest panels of a group, which share the packing of rows.
const GROUP_PANELS: usize = 6;

/// Fewest bytes of panels that are worth a claim where rows are few.
const CLAIM_BYTES: usize = 64 << 10;

/// A block of rows, in part or whole, times some panels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rectangle {
    /// Rows of the block.
    pub block: Range<usize>,
    /// Tiles of the block, counted from its first.
    pub tiles: Range<usize>,
    /// Panels.
    pub panels: Range<usize>,
}

/// The units of a product and what is left of them.
pub(super) struct Units {
    m: usize,
    blocks: usize,
    panels: usize,
    /// Panels of a group; the last may have fewer.
    group: usize,
    /// Units of one panel and one block.
    parts: usize,
    /// Fewest units of a run.
    least: usize,
    threads: usize,
    next: AtomicUsize,
}

impl Units {
    /// Units of `m` rows and `panels` panels of `panel_bytes`; neither count is 0.
    pub(super) fn new(m: usize, panels: usize, panel_bytes: usize, threads: usize) -> Self {
        let blocks = m.div_ceil(ROWS);
        let group = match blocks {
            1 => panels,
            _ => (GROUP_BYTES / panel_bytes.max(1)).max(GROUP_PANELS).min(panels),
        };
        let parts = if blocks == 1 && m > 3 * TILE_ROWS && threads > 1 { 2 } else { 1 };
        let least = if m < TILE_ROWS { (CLAIM_BYTES / panel_bytes.max(1)).max(1) } else { 1 };
        Units { m, blocks, panels, group, parts, least, threads, next: AtomicUsize::new(0) }
    }

    /// Group, block, and unit within both, of a unit; and the units that its group and block have.
    fn place(&self, unit: usize) -> (usize, usize, usize, usize) {
        let whole = self.group * self.parts;
        let group = unit / (whole * self.blocks);
        let rest = unit % (whole * self.blocks);
        let own = self.group.min(self.panels - group * self.group) * self.parts;
        (group, rest / own, rest % own, own)
    }

    /// Claims units of one block; `None` when nothing is left.
    pub(super) fn claim(&self) -> Option<Range<usize>> {
        let total = self.blocks * self.panels * self.parts;
        let mut start = self.next.load(Ordering::Relaxed);
        while start < total {
            let (_, _, within, own) = self.place(start);
            let left = total - start;
            let fair = if self.threads == 1 { left } else { (left / (2 * self.threads)).max(self.least) };
            // Halves of one panel go together as long as a run is longer than one of them.
            let fair = if fair > self.parts { fair / self.parts * self.parts } else { fair };
            let end = start + fair.min(own - within);
            match self.next.compare_exchange_weak(start, end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(start..end),
                Err(found) => start = found,
            }
        }
        None
    }

    /// The rectangles of claimed units.
    pub(super) fn rectangles(&self, run: Range<usize>) -> impl Iterator<Item = Rectangle> + '_ {
        let (mut unit, end) = (run.start, run.end);
        std::iter::from_fn(move || {
            if unit >= end {
                return None;
            }
            let (group, block, within, _) = self.place(unit);
            let block = part(self.m, self.blocks, block);
            let tiles = block.len().div_ceil(TILE_ROWS);
            let panel = group * self.group + within / self.parts;
            let (first, left) = (within % self.parts, end - unit);
            // Whole panels together, halves on their own.
            let (parts, panels) = match first == 0 && left >= self.parts {
                true => (0..self.parts, left / self.parts),
                false => (first..first + 1, 1),
            };
            unit += parts.len() * panels;
            let tiles = tiles * parts.start / self.parts..tiles * parts.end / self.parts;
            Some(Rectangle { block, tiles, panels: panel..panel + panels })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_cover_every_tile_of_every_panel_once() {
        for (m, panels, bytes, threads) in [
            (1, 1, 1 << 10, 1),
            (1, 256, 1 << 20, 2),
            (13, 24, 1 << 12, 3),
            (57, 5, 1 << 17, 2),
            (128, 24, 98304, 2),
            (129, 24, 3 << 20, 2),
            (1000, 17, 1 << 20, 4),
            (1000, 17, 1 << 20, 1),
        ] {
            let order = Units::new(m, panels, bytes, threads);
            let mut seen = vec![0; m.div_ceil(ROWS) * 16 * panels];
            while let Some(run) = order.claim() {
                assert!(!run.is_empty());
                let mut blocks = Vec::new();
                for r in order.rectangles(run) {
                    let index = (r.block.start * m.div_ceil(ROWS)).div_ceil(m);
                    assert_eq!(r.block, part(m, m.div_ceil(ROWS), index));
                    blocks.push(r.block);
                    for tile in r.tiles {
                        for panel in r.panels.clone() {
                            seen[(index * 16 + tile) * panels + panel] += 1;
                        }
                    }
                }
                assert!(blocks.windows(2).all(|w| w[0] == w[1]), "a run has one block");
            }
            for (index, count) in seen.iter().enumerate() {
                let (block, tile) = (index / panels / 16, index / panels % 16);
                let tiles = part(m, m.div_ceil(ROWS), block).len().div_ceil(TILE_ROWS);
                assert_eq!(
                    *count,
                    usize::from(tile < tiles),
                    "{m} rows, {panels} panels: tile {tile} of block {block}"
                );
            }
        }
    }

    #[test]
    fn one_thread_takes_a_group_at_once_and_two_end_with_halves() {
        let alone = Units::new(128, 24, 98304, 1);
        assert_eq!((alone.claim(), alone.claim()), (Some(0..24), None));
        let order = Units::new(128, 24, 98304, 2);
        let runs: Vec<usize> = std::iter::from_fn(|| order.claim()).map(|r| r.len()).collect();
        assert_eq!(runs.iter().sum::<usize>(), 48);
        assert_eq!((runs[0], *runs.last().unwrap()), (12, 1));
        assert!(runs.windows(2).all(|w| w[0] >= w[1]), "{runs:?}");
    }
}
