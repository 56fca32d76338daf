//! Constructive packings: one pass over the items, each placed once.

use std::collections::{BTreeMap, BTreeSet};

use super::instants::{by_time, dense, end};
use super::item::Item;

/// Placed items by lifetime: those of length up to `2^l` lie in buckets of `2^l` instants, so that the items that
/// meet a lifetime are found by looking at few buckets of each level.
struct Lifetimes {
    /// For each level the last item of each bucket.
    levels: Vec<Vec<u32>>,
    /// The item before each item in its bucket.
    before: Vec<u32>,
    end: usize,
}

const NONE: u32 = u32::MAX;

impl Lifetimes {
    fn of(items: &[Item]) -> Self {
        Lifetimes { levels: Vec::new(), before: vec![NONE; items.len()], end: end(items) }
    }

    fn level(item: &Item) -> usize {
        (item.end.saturating_sub(item.start).max(1)).next_power_of_two().trailing_zeros() as usize
    }

    fn insert(&mut self, index: u32, item: &Item) {
        let level = Self::level(item);
        if self.levels.len() <= level {
            self.levels.resize_with(level + 1, Vec::new);
        }
        let buckets = &mut self.levels[level];
        if buckets.is_empty() {
            buckets.resize((self.end >> level) + 1, NONE);
        }
        let last = &mut buckets[item.start >> level];
        self.before[index as usize] = *last;
        *last = index;
    }

    /// Calls `found` with every item that meets `item`; returns how many were looked at.
    fn meeting(&self, items: &[Item], item: &Item, mut found: impl FnMut(u32)) -> usize {
        let mut looked = 0;
        for (level, buckets) in self.levels.iter().enumerate().filter(|(_, b)| !b.is_empty()) {
            let first = (item.start >> level).saturating_sub(1);
            let last = item.end.saturating_sub(1) >> level;
            for mut at in buckets[first..=last].iter().copied() {
                while at != NONE {
                    looked += 1;
                    if items[at as usize].meets(item) {
                        found(at);
                    }
                    at = self.before[at as usize];
                }
            }
        }
        looked
    }
}

/// Places items in `order`, each in the lowest gap that is free over its lifetime. Gives up after looking at `work`
/// neighbours.
pub(super) fn first_fit(items: &[Item], order: &[u32], work: usize) -> Option<(Vec<u64>, u64)> {
    first_fit_in(&dense(items), order, work)
}

/// [`first_fit`] in dense time.
fn first_fit_in(items: &[Item], order: &[u32], work: usize) -> Option<(Vec<u64>, u64)> {
    let mut offsets = vec![0; items.len()];
    let mut placed = Lifetimes::of(items);
    let (mut peak, mut looked) = (0u64, 0usize);
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for &index in order {
        let item = &items[index as usize];
        if item.size == 0 || item.start >= item.end {
            continue;
        }
        taken.clear();
        looked += placed.meeting(items, item, |other| {
            let low = offsets[other as usize];
            taken.push((low, low + items[other as usize].size));
        });
        if looked > work {
            return None;
        }
        taken.sort_unstable();
        let mut offset = 0u64;
        for (low, high) in &taken {
            if offset.saturating_add(item.size) <= *low {
                break;
            }
            offset = offset.max(item.at_or_above(*high));
        }
        offsets[index as usize] = offset;
        placed.insert(index, item);
        peak = peak.max(offset.saturating_add(item.size));
    }
    Some((offsets, peak))
}

/// Places items in order of birth, each in the smallest hole that holds it, lowest first; holes join when items die.
/// Linear but for the logarithm. Holes reach up to the arena's end, which grows as needed.
pub(super) fn best_fit(items: &[Item]) -> (Vec<u64>, u64) {
    let mut offsets = vec![0u64; items.len()];
    let items = &dense(items)[..];
    let real: Vec<u32> = (0..items.len() as u32)
        .filter(|i| items[*i as usize].size > 0 && items[*i as usize].start < items[*i as usize].end)
        .collect();
    let sorted = |time: fn(&Item) -> usize| {
        let times: Vec<usize> = real.iter().map(|i| time(&items[*i as usize])).collect();
        by_time(&times).into_iter().map(|n| real[n as usize]).collect::<Vec<u32>>()
    };
    let (mut births, deaths) = (sorted(|i| i.start), sorted(|i| i.end));
    // Deaths first; among births of one instant the large ones first.
    for born in births.chunk_by_mut(|a, b| items[*a as usize].start == items[*b as usize].start) {
        born.sort_by_key(|i| u64::MAX - items[*i as usize].size);
    }
    let mut deaths = deaths.into_iter().peekable();
    let mut births = births.into_iter().peekable();
    let mut next = || {
        let birth = births.peek().map(|i| items[*i as usize].start);
        match deaths.next_if(|i| birth.is_none_or(|at| items[*i as usize].end <= at)) {
            Some(death) => Some((false, death)),
            None => births.next().map(|birth| (true, birth)),
        }
    };
    let mut holes: BTreeMap<u64, u64> = BTreeMap::new();
    let mut sizes: BTreeSet<(u64, u64)> = BTreeSet::new();
    let mut top = 0u64;
    while let Some((birth, index)) = next() {
        let item = &items[index as usize];
        if birth {
            let fits = |(len, low): &&(u64, u64)| item.at_or_above(*low) - *low <= *len - item.size;
            let hole = sizes.range((item.size, 0)..).take(64).find(fits).copied();
            match hole {
                Some((len, low)) => {
                    sizes.remove(&(len, low));
                    holes.remove(&low);
                    let at = item.at_or_above(low);
                    offsets[index as usize] = at;
                    for (from, to) in [(low, at), (at + item.size, low + len)] {
                        if from < to {
                            holes.insert(from, to - from);
                            sizes.insert((to - from, from));
                        }
                    }
                }
                None => {
                    // A hole below the top may be extended.
                    let mut low = top;
                    if let Some((&from, &len)) = holes.iter().next_back()
                        && from + len == top
                    {
                        holes.remove(&from);
                        sizes.remove(&(len, from));
                        low = from;
                    }
                    let at = item.at_or_above(low);
                    if low < at {
                        holes.insert(low, at - low);
                        sizes.insert((at - low, low));
                    }
                    offsets[index as usize] = at;
                    top = at.saturating_add(item.size).max(top);
                }
            }
        } else {
            let (mut low, mut len) = (offsets[index as usize], item.size);
            if let Some((&below, &size)) = holes.range(..low).next_back()
                && below + size == low
            {
                holes.remove(&below);
                sizes.remove(&(size, below));
                (low, len) = (below, size + len);
            }
            if let Some(&size) = holes.get(&(low + len)) {
                holes.remove(&(low + len));
                sizes.remove(&(size, low + len));
                len += size;
            }
            holes.insert(low, len);
            sizes.insert((len, low));
        }
    }
    (offsets, top)
}

/// First fit again and again: items that ended above `goal` move towards the front of the order by a drawn step.
/// Returns the lowest packing of `rounds`, or of fewer after looking at `work` neighbours.
pub(super) fn squeaky_wheel(
    items: &[Item],
    goal: u64,
    rounds: usize,
    work: usize,
) -> Option<(Vec<u64>, u64)> {
    let ranked = dense(items);
    let span = items.iter().map(|i| i.end).max().unwrap_or(0).max(1) as f64;
    let most = items.iter().map(|i| i.size).max().unwrap_or(0).max(1) as f64;
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut draw = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut best: Option<(Vec<u64>, u64)> = None;
    let mut left = work;
    for start in 0..3 {
        let mut priority: Vec<f64> = items
            .iter()
            .map(|i| {
                let (life, size) = (i.end.saturating_sub(i.start) as f64 / span, i.size as f64 / most);
                40.0 * [size, (life * size).sqrt(), life][start]
            })
            .collect();
        for _ in 0..rounds / 3 {
            let mut order: Vec<u32> = (0..items.len() as u32).collect();
            order.sort_by(|a, b| priority[*b as usize].total_cmp(&priority[*a as usize]));
            let Some((offsets, peak)) = first_fit_in(&ranked, &order, left) else { return best };
            left = left.saturating_sub(work / rounds.max(1));
            for (i, item) in items.iter().enumerate() {
                if offsets[i].saturating_add(item.size) > goal {
                    priority[i] += 1.0 + 3.0 * draw();
                } else if draw() < 0.02 {
                    priority[i] += 2.0 * draw() - 1.0;
                }
            }
            if best.as_ref().is_none_or(|(_, p)| peak < *p) {
                best = Some((offsets, peak));
                if peak <= goal {
                    return best;
                }
            }
        }
    }
    best
}
