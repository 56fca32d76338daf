//! Packing buffers with lifetimes into the smallest arena: a portfolio that stops at the lower bound.
//!
//! Constructive packings first; if none reaches the goal, the items are cut where nothing lives across, and each part
//! that is too high is searched ([`super::portfolio`]) in several ways. Work is bounded by
//! counts, never by the clock, so that equal items give equal offsets everywhere.

use super::greedy::{best_fit, first_fit, squeaky_wheel};
use super::item::{Item, Packing, lower_bound};
use super::portfolio::{Portfolio, ways};
use super::windows::windows;

/// Neighbours that one constructive packing may look at.
const GREEDY_WORK: usize = 40_000_000;

/// Most items of a part that is searched.
const SEARCHED: usize = 2_500;

/// Rounds of the squeaky wheel.
const WHEEL_ROUNDS: usize = 300;

/// How much to try, and when to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// A packing of this height is good enough; 0 asks for the lowest.
    pub capacity: u64,
    /// Steps of the search, all in all, of 128 items looked at. About two million a second.
    pub steps: u64,
}

impl Default for Effort {
    fn default() -> Self {
        Effort { capacity: 0, steps: 500_000 }
    }
}

/// Packs `items` as low as the default effort can; deterministic.
pub fn pack(items: &[Item]) -> Packing {
    pack_with(items, Effort::default())
}

/// Packs `items`; deterministic.
pub fn pack_with(items: &[Item], effort: Effort) -> Packing {
    let bound = lower_bound(items);
    let goal = bound.max(effort.capacity);
    let (mut offsets, mut peak) = best_fit(items);
    for letters in ["ZL", "AL", "WZ"] {
        if peak <= goal {
            break;
        }
        if let Some((o, p)) = first_fit(items, &order(items, letters), GREEDY_WORK)
            && p < peak
        {
            (offsets, peak) = (o, p);
        }
    }
    if peak > goal {
        peak = search(items, &mut offsets, goal, effort);
    }
    if peak > goal
        && let Some(found) = windows(items, goal, effort.steps)
    {
        peak = items.iter().zip(&found).map(|(i, o)| o + i.size).max().unwrap_or(0);
        offsets = found;
    }
    Packing { offsets, peak, lower_bound: bound }
}

fn order(items: &[Item], letters: &str) -> Vec<u32> {
    let key = |i: u32, letter: char| {
        let item = &items[i as usize];
        let life = item.end.saturating_sub(item.start) as u64;
        let value = |letter| match letter {
            'Z' => item.size,
            'A' => item.size.saturating_mul(life),
            'W' => life,
            _ => u64::MAX - item.start as u64,
        };
        value(letter)
    };
    // By the last letter first: both sorts keep the order of equals, and find much of it already.
    let mut order: Vec<u32> = (0..items.len() as u32).collect();
    for letter in letters.chars().rev() {
        order.sort_by_key(|i| u64::MAX - key(*i, letter));
    }
    order
}

/// Groups of items such that no item of one meets an item of another, in order of time.
fn parts(items: &[Item]) -> Vec<Vec<u32>> {
    let mut by_start: Vec<u32> = (0..items.len() as u32)
        .filter(|i| items[*i as usize].size > 0 && items[*i as usize].start < items[*i as usize].end)
        .collect();
    by_start.sort_by_key(|i| items[*i as usize].start);
    let mut parts: Vec<Vec<u32>> = Vec::new();
    let mut end = 0;
    for i in by_start {
        let item = &items[i as usize];
        match parts.last_mut() {
            Some(part) if item.start < end => part.push(i),
            _ => parts.push(vec![i]),
        }
        end = end.max(item.end);
    }
    parts
}

/// Searches each part that is above `goal`; returns the height of the whole.
fn search(items: &[Item], offsets: &mut [u64], goal: u64, effort: Effort) -> u64 {
    let height = |part: &[u32], offsets: &[u64]| {
        part.iter().map(|i| offsets[*i as usize] + items[*i as usize].size).max().unwrap_or(0)
    };
    let parts = parts(items);
    let high: Vec<&Vec<u32>> = parts.iter().filter(|p| height(p, offsets) > goal).collect();
    let each = effort.steps / high.len().max(1) as u64;
    let mut reached = goal;
    for part in high.into_iter().filter(|p| p.len() <= SEARCHED) {
        let own: Vec<Item> = part.iter().map(|i| items[*i as usize]).collect();
        let ways = ways(&own);
        let mut portfolio = Portfolio::of(&ways);
        let (mut left, mut top) = (each, height(part, offsets));
        let mut missed = false;
        // The goal itself first, with half of the budget or, if it is asked for, most of it; then between the goal and
        // what is known.
        let mut low = reached;
        let mut capacity = low;
        let mut share = if goal == effort.capacity { left - left / 5 } else { left / 2 };
        while capacity < top && left > 0 {
            let (found, used) = portfolio.search(capacity, share.min(left));
            left -= used.min(left);
            match found {
                Some(found) => {
                    part.iter().zip(&found).for_each(|(i, o)| offsets[*i as usize] = *o);
                    top = height(part, offsets);
                }
                None => low = capacity + 1,
            }
            if !std::mem::replace(&mut missed, true)
                && let Some((found, peak)) = squeaky_wheel(&own, low, WHEEL_ROUNDS, GREEDY_WORK)
                && peak < top
            {
                part.iter().zip(&found).for_each(|(i, o)| offsets[*i as usize] = *o);
                top = peak;
            }
            share = (left / 4).max(100_000);
            capacity = low + (top - low.min(top)) / 2;
        }
        reached = reached.max(top);
    }
    parts.iter().map(|p| height(p, offsets)).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::check_packing;
    use crate::plan::search::{Found, Sections};
    use proptest::prelude::*;

    fn items() -> impl Strategy<Value = Vec<Item>> {
        prop::collection::vec((0u64..50, 0usize..20, 1usize..8, 0u32..4), 0..25).prop_map(|v| {
            v.into_iter()
                .map(|(size, start, life, align)| Item { size, start, end: start + life, align: 1 << align })
                .collect()
        })
    }

    /// The lowest height over all orders of first fit from the bottom, which every stable packing is one of.
    fn brute_force(items: &[Item]) -> u64 {
        fn go(items: &[Item], left: &mut Vec<u32>, order: &mut Vec<u32>, best: &mut u64) {
            if left.is_empty() {
                *best = (*best).min(first_fit(items, order, usize::MAX).unwrap().1);
            }
            for n in 0..left.len() {
                let i = left.remove(n);
                order.push(i);
                go(items, left, order, best);
                order.pop();
                left.insert(n, i);
            }
        }
        let mut best = u64::MAX;
        go(items, &mut (0..items.len() as u32).collect(), &mut Vec::new(), &mut best);
        best
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn packings_are_disjoint_and_bounded(items in items()) {
            let packing = pack(&items);
            prop_assert!(packing.peak >= packing.lower_bound);
            prop_assert_eq!(check_packing(&items, &packing.offsets, packing.peak), Ok(()));
            // The bound is the brute-force maximum over instants.
            let brute = (0..30).map(|t| items.iter().filter(|i| i.start <= t && t < i.end).map(|i| i.size).sum::<u64>());
            prop_assert_eq!(packing.lower_bound, brute.max().unwrap_or(0));
        }

        #[test]
        fn small_packings_are_optimal(items in prop::collection::vec((1u64..9, 0usize..6, 1usize..5, 0u32..2), 1..7)) {
            let items: Vec<Item> = items
                .into_iter()
                .map(|(size, start, life, align)| Item { size, start, end: start + life, align: 1 << align })
                .collect();
            prop_assert_eq!(pack(&items).peak, brute_force(&items));
        }

        #[test]
        fn the_search_alone_is_exact(items in prop::collection::vec((1u64..9, 0usize..6, 1usize..5, 0u32..2), 1..7)) {
            let items: Vec<Item> = items
                .into_iter()
                .map(|(size, start, life, align)| Item { size, start, end: start + life, align: 1 << align })
                .collect();
            let best = brute_force(&items);
            let sections = Sections::of(&items);
            for sign in [-1.0, 1.0] {
                let order = sections.order(|i| sign * i.start as f64);
                let Found::Packing(offsets) = sections.search(&order, best, u64::MAX, u64::MAX).0 else {
                    return Err(TestCaseError::fail(format!("no packing at {best}")));
                };
                prop_assert_eq!(check_packing(&items, &offsets, best), Ok(()));
                prop_assert_eq!(sections.search(&order, best - 1, u64::MAX, u64::MAX).0, Found::Impossible);
            }
        }
    }
}
