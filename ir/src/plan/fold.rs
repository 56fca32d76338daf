//! Folding: items that very likely lie side by side become one block, so that the search has fewer things to place.
//!
//! - *Stack*: items with the same lifetime lie on top of each other.
//! - *Row*: what dies at an instant hands its place to what is born there with the same size.
//! - *Gap*: bytes that are freed at one instant and all used again at a later one were one empty place in between.
//!
//! Each is a guess: a packing of the blocks is one of the items, but there may be one of the items only. So folding is
//! a first try, for lifetimes that come from cutting larger ones.

use std::collections::BTreeMap;

use super::item::Item;
use super::load::Load;

/// How a block is made of others.
enum Block {
    Item(u32),
    /// A place that stays empty.
    Gap,
    /// From the bottom up.
    Stack(Vec<u32>),
    /// One after the other at the same offset.
    Row(u32, u32),
}

/// Blocks and what they hold.
pub(super) struct Folded {
    blocks: Vec<(Block, Item)>,
    /// The blocks that lie in no other.
    roots: Vec<u32>,
    /// How many items there are.
    items: usize,
}

/// Which guesses are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Guesses {
    /// Also rows where several items end or begin.
    pub(super) crowded_rows: bool,
    /// Also gaps.
    pub(super) gaps: bool,
    /// The seed by which one row in eight is left out; 0 leaves out none.
    pub(super) doubts: u64,
}

impl Folded {
    /// Each item by itself.
    fn flat(items: &[Item]) -> Self {
        let real = |i: &Item| i.size > 0 && i.start < i.end;
        let blocks: Vec<(Block, Item)> =
            (0..).zip(items).filter(|(_, i)| real(i)).map(|(n, i)| (Block::Item(n), *i)).collect();
        Folded { roots: (0..blocks.len() as u32).collect(), blocks, items: items.len() }
    }

    /// Folds `items`, which have no alignment.
    pub(super) fn of(items: &[Item], guesses: Guesses) -> Self {
        let mut folded = Folded::flat(items);
        if guesses.gaps {
            for gap in gaps(items) {
                folded.add(Block::Gap, gap);
            }
        }
        while folded.stack() | folded.row(guesses) {}
        folded
    }

    /// The blocks to pack.
    pub(super) fn items(&self) -> Vec<Item> {
        self.roots.iter().map(|b| self.blocks[*b as usize].1).collect()
    }

    /// Offsets of the items from those of the blocks.
    pub(super) fn unfold(&self, offsets: &[u64]) -> Vec<u64> {
        let mut out = vec![0; self.items];
        let mut open: Vec<(u32, u64)> = self.roots.iter().copied().zip(offsets.iter().copied()).collect();
        while let Some((block, mut offset)) = open.pop() {
            match &self.blocks[block as usize].0 {
                Block::Item(i) => out[*i as usize] = offset,
                Block::Gap => {}
                Block::Row(a, b) => open.extend([(*a, offset), (*b, offset)]),
                Block::Stack(parts) => {
                    for part in parts {
                        open.push((*part, offset));
                        offset += self.blocks[*part as usize].1.size;
                    }
                }
            }
        }
        out
    }

    fn item(&self, block: u32) -> Item {
        self.blocks[block as usize].1
    }

    fn add(&mut self, block: Block, item: Item) {
        self.roots.push(self.blocks.len() as u32);
        self.blocks.push((block, item));
    }

    fn stack(&mut self) -> bool {
        let mut lives: BTreeMap<(usize, usize), Vec<u32>> = BTreeMap::new();
        for &b in &self.roots {
            let item = &self.blocks[b as usize].1;
            lives.entry((item.start, item.end)).or_default().push(b);
        }
        let before = self.roots.len();
        self.roots.clear();
        for ((start, end), parts) in lives {
            if let [one] = *parts {
                self.roots.push(one);
            } else {
                let size = parts.iter().fold(0u64, |sum, p| sum.saturating_add(self.item(*p).size));
                self.add(Block::Stack(parts), Item::new(size, start, end));
            }
        }
        self.roots.len() < before
    }

    fn row(&mut self, guesses: Guesses) -> bool {
        let mut events: BTreeMap<usize, [Vec<u32>; 2]> = BTreeMap::new();
        for &b in &self.roots {
            let item = &self.blocks[b as usize].1;
            events.entry(item.end).or_default()[0].push(b);
            events.entry(item.start).or_default()[1].push(b);
        }
        let mut gone = vec![false; self.blocks.len()];
        let mut rows = Vec::new();
        for [mut ending, mut beginning] in events.into_values() {
            if !guesses.crowded_rows && (ending.len() > 1 || beginning.len() > 1) {
                continue;
            }
            // The shortest first: what was cut last.
            ending.sort_by_key(|b| self.life(*b));
            beginning.sort_by_key(|b| self.life(*b));
            for a in ending {
                let size = self.blocks[a as usize].1.size;
                let fits = |b: &u32| {
                    let free = !gone[*b as usize] && self.blocks[*b as usize].1.size == size;
                    free && !self.doubted(a, *b, guesses.doubts)
                };
                if gone[a as usize] {
                    continue;
                }
                if let Some(b) = beginning.iter().copied().find(fits) {
                    (gone[a as usize], gone[b as usize]) = (true, true);
                    rows.push((a, b));
                }
            }
        }
        self.roots.retain(|b| !gone[*b as usize]);
        let changed = !rows.is_empty();
        for (a, b) in rows {
            let (first, second) = (self.blocks[a as usize].1, self.blocks[b as usize].1);
            self.add(Block::Row(a, b), Item::new(first.size, first.start, second.end));
        }
        changed
    }

    /// Whether a row of these two is left out.
    fn doubted(&self, a: u32, b: u32, seed: u64) -> bool {
        let (a, b) = (self.item(a), self.item(b));
        let mut hash = seed;
        for number in [a.size, a.start as u64, a.end as u64, b.end as u64] {
            hash = (hash ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        }
        seed > 0 && hash >> 61 == 0
    }

    fn life(&self, block: u32) -> usize {
        let item = self.item(block);
        item.end - item.start
    }
}

/// Places that are free from an instant at which bytes are freed to the first one at which as many are used again.
fn gaps(items: &[Item]) -> Vec<Item> {
    let mut change: BTreeMap<usize, i128> = BTreeMap::new();
    for item in items.iter().filter(|i| i.size > 0 && i.start < i.end) {
        *change.entry(item.start).or_default() += i128::from(item.size);
        *change.entry(item.end).or_default() -= i128::from(item.size);
    }
    let (Some((&first, _)), Some((&last, _))) = (change.first_key_value(), change.last_key_value()) else {
        return Vec::new();
    };
    let mut most = 0;
    let mut alive = 0;
    for c in change.values() {
        alive += c;
        most = most.max(alive);
    }
    // Before and after everything the whole arena is free.
    *change.entry(first).or_default() -= most;
    *change.entry(last).or_default() += most;
    let mut freed: Vec<(usize, u64)> = Vec::new();
    let mut gaps = Vec::new();
    for (&at, &c) in change.iter().filter(|(_, c)| **c != 0) {
        let bytes = c.unsigned_abs() as u64;
        if c < 0 {
            freed.push((at, bytes));
        } else if let Some(n) = freed.iter().rposition(|(_, f)| *f == bytes) {
            let (from, _) = freed.remove(n);
            gaps.push(Item::new(bytes, from, at));
        }
    }
    // What does not fit over the whole time was used for something else in between.
    gaps.sort_by_key(|gap| gap.end - gap.start);
    let mut load = Load::of(items, u64::try_from(most).unwrap_or(u64::MAX));
    gaps.retain(|gap| load.put(gap));
    gaps
}
