//! Tables over time: instants are few enough to be indices, and what happens at them is visited in their order.

use std::borrow::Cow;

use super::item::Item;

/// `items` with instants that can be indices: as they are, or, where time is sparse, each instant replaced by its rank.
/// Which items meet, and who is born or dies first, stays the same.
pub(super) fn dense(items: &[Item]) -> Cow<'_, [Item]> {
    let last = end(items);
    if last <= 8 * items.len() + 1024 && items.iter().all(|i| i.start <= last) {
        return Cow::Borrowed(items);
    }
    let mut times: Vec<usize> = items.iter().flat_map(|i| [i.start, i.end]).collect();
    times.sort_unstable();
    times.dedup();
    let rank = |time: usize| times.partition_point(|t| *t < time);
    items.iter().map(|i| Item { start: rank(i.start), end: rank(i.end), ..*i }).collect()
}

/// One past the last instant of life.
pub(super) fn end(items: &[Item]) -> usize {
    items.iter().map(|i| i.end).max().unwrap_or(0)
}

/// The numbers `0..times.len()` by time, equal times by number.
pub(super) fn by_time(times: &[usize]) -> Vec<u32> {
    let mut first = vec![0u32; times.iter().max().map_or(0, |last| last + 2)];
    times.iter().for_each(|t| first[t + 1] += 1);
    (1..first.len()).for_each(|t| first[t] += first[t - 1]);
    let mut order = vec![0; times.len()];
    for (number, time) in times.iter().enumerate() {
        order[first[*time] as usize] = number as u32;
        first[*time] += 1;
    }
    order
}

/// A set of instants.
pub(super) struct InstantSet {
    words: Vec<u64>,
    /// Which words are not empty.
    summary: Vec<u64>,
}

impl InstantSet {
    /// An empty set of instants up to `last`.
    pub(super) fn up_to(last: usize) -> Self {
        let words = last / 64 + 1;
        InstantSet { words: vec![0; words], summary: vec![0; words / 64 + 1] }
    }

    pub(super) fn insert(&mut self, at: usize) {
        self.words[at / 64] |= 1 << (at % 64);
        self.summary[at / 4096] |= 1 << (at / 64 % 64);
    }

    pub(super) fn remove(&mut self, at: usize) {
        self.words[at / 64] &= !(1 << (at % 64));
        if self.words[at / 64] == 0 {
            self.summary[at / 4096] &= !(1 << (at / 64 % 64));
        }
    }

    /// The first instant of the set at or after `at`.
    pub(super) fn next(&self, at: usize) -> Option<usize> {
        let lowest = |word: u64| word.trailing_zeros() as usize;
        let here = self.words.get(at / 64)? & (u64::MAX << (at % 64));
        if here != 0 {
            return Some(at / 64 * 64 + lowest(here));
        }
        let word = at / 64 + 1;
        let mut block = word / 64;
        let mut words = self.summary.get(block)? & (u64::MAX << (word % 64));
        while words == 0 {
            block += 1;
            words = *self.summary.get(block)?;
        }
        let word = block * 64 + lowest(words);
        Some(word * 64 + lowest(self.words[word]))
    }

    /// The last instant of the set at or before `at`.
    pub(super) fn previous(&self, at: usize) -> Option<usize> {
        let highest = |word: u64| 63 - word.leading_zeros() as usize;
        let here = self.words.get(at / 64)? & (u64::MAX >> (63 - at % 64));
        if here != 0 {
            return Some(at / 64 * 64 + highest(here));
        }
        let word = (at / 64).checked_sub(1)?;
        let mut block = word / 64;
        let mut words = self.summary[block] & (u64::MAX >> (63 - word % 64));
        while words == 0 {
            block = block.checked_sub(1)?;
            words = self.summary[block];
        }
        let word = block * 64 + highest(words);
        Some(word * 64 + highest(self.words[word]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn the_set_finds_neighbours_as_a_tree_does(
            changes in prop::collection::vec((0usize..20_000, any::<bool>()), 0..200),
            asked in prop::collection::vec(0usize..20_000, 1..50),
        ) {
            let (mut set, mut tree) = (InstantSet::up_to(20_000), BTreeSet::new());
            for (at, insert) in changes {
                if insert {
                    set.insert(at);
                    tree.insert(at);
                } else {
                    set.remove(at);
                    tree.remove(&at);
                }
            }
            for at in asked {
                prop_assert_eq!(set.next(at), tree.range(at..).next().copied());
                prop_assert_eq!(set.previous(at), tree.range(..=at).next_back().copied());
            }
        }

        #[test]
        fn dense_time_keeps_who_meets(
            lives in prop::collection::vec((0usize..1_000_000, 0usize..1_000_000), 0..20),
        ) {
            let items: Vec<Item> = lives.iter().map(|(start, end)| Item::new(1, *start, *end)).collect();
            let ranked = dense(&items);
            for (a, x) in items.iter().zip(ranked.iter()) {
                for (b, y) in items.iter().zip(ranked.iter()) {
                    prop_assert_eq!(a.meets(b), x.meets(y));
                    prop_assert_eq!(a.start.cmp(&b.end), x.start.cmp(&y.end));
                }
            }
        }

        #[test]
        fn times_are_sorted(times in prop::collection::vec(0usize..50, 0..100)) {
            let mut sorted: Vec<u32> = (0..times.len() as u32).collect();
            sorted.sort_by_key(|i| times[*i as usize]);
            prop_assert_eq!(by_time(&times), sorted);
        }
    }
}
