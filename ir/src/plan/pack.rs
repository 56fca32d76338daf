//! Packing buffers with lifetimes into the smallest arena: a portfolio that stops at the lower bound.
//!
//! Constructive packings first; if none reaches the goal, the items are cut where nothing lives across, and each part
//! that is too high is searched ([`super::search`]) with several orders and growing budgets. Work is bounded by
//! counts, never by the clock, so that equal items give equal offsets everywhere.

use super::greedy::{best_fit, first_fit, squeaky_wheel};
use super::item::{Item, Packing, lower_bound};
use super::search::{Found, Sections};
use super::windows::windows;

/// Neighbours that one constructive packing may look at.
const GREEDY_WORK: usize = 40_000_000;

/// Most items of a part that is searched.
const SEARCHED: usize = 2_500;

/// Rounds of the squeaky wheel.
const WHEEL_ROUNDS: usize = 300;

/// Placements of one restart of the search.
const RESTART: u64 = 300;

/// How much to try, and when to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// A packing of this height is good enough; 0 asks for the lowest.
    pub capacity: u64,
    /// Steps of the search, all in all: a placement, or a look at one section. About two million a second.
    pub steps: u64,
}

impl Default for Effort {
    fn default() -> Self {
        Effort { capacity: 0, steps: 1_000_000 }
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
        peak = search(items, &mut offsets, goal, effort.steps);
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
fn search(items: &[Item], offsets: &mut [u64], goal: u64, steps: u64) -> u64 {
    let height = |part: &[u32], offsets: &[u64]| {
        part.iter().map(|i| offsets[*i as usize] + items[*i as usize].size).max().unwrap_or(0)
    };
    let parts = parts(items);
    let high: Vec<&Vec<u32>> = parts.iter().filter(|p| height(p, offsets) > goal).collect();
    let each = steps / high.len().max(1) as u64;
    let mut reached = goal;
    for part in high.into_iter().filter(|p| p.len() <= SEARCHED) {
        let own: Vec<Item> = part.iter().map(|i| items[*i as usize]).collect();
        let searches = [Direction::forwards(&own), Direction::backwards(&own)];
        let sections = searches.each_ref().map(|d| Sections::of(&d.items));
        let (mut left, mut top) = (each, height(part, offsets));
        let mut missed = false;
        // The goal itself first, with half of the budget; then between the goal and what is known.
        let mut low = reached;
        let mut capacity = low;
        let mut share = left / 2;
        while capacity < top && left > 0 {
            let (found, used) = restarts(&searches, &sections, capacity, share.min(left));
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

/// Searches `items` with fixed ones at the bottom and ceilings `(start, end, offset)`; returns offsets and steps.
pub(super) fn search_between(
    items: &[Item],
    bottom: &[(u32, u64)],
    ceilings: &[(usize, usize, u64)],
    capacity: u64,
    steps: u64,
) -> (Option<Vec<u64>>, u64) {
    let end = items.iter().map(|i| i.end).max().unwrap_or(0);
    let directions = [Direction::forwards(items), Direction::backwards(items)];
    let sections = [false, true].map(|mirrored| {
        let direction = &directions[usize::from(mirrored)];
        let mut sections = Sections::of(&direction.items);
        let place = |i: u32| direction.index.iter().position(|x| *x == i).unwrap_or(0) as u32;
        sections.fix(bottom.iter().map(|(i, offset)| (place(*i), *offset)).collect());
        for (from, to, cap) in ceilings {
            let (from, to) = (*from.min(&end), *to.min(&end));
            let (from, to) = if mirrored { (end - to, end - from) } else { (from, to) };
            sections.cap(from, to, *cap);
        }
        sections
    });
    restarts(&directions, &sections, capacity, steps)
}

/// A part in one direction of time, in order of birth: a search that fails from one end may be easy from the other.
struct Direction {
    items: Vec<Item>,
    /// The part's number of each item.
    index: Vec<u32>,
}

impl Direction {
    fn forwards(part: &[Item]) -> Self {
        let mut index: Vec<u32> = (0..part.len() as u32).collect();
        index.sort_by_key(|i| part[*i as usize].start);
        Direction { items: index.iter().map(|i| part[*i as usize]).collect(), index }
    }

    fn backwards(part: &[Item]) -> Self {
        let end = part.iter().map(|i| i.end).max().unwrap_or(0);
        let mirrored: Vec<Item> =
            part.iter().map(|i| Item { start: end - i.end, end: end - i.start.min(i.end), ..*i }).collect();
        Direction::forwards(&mirrored)
    }
}

/// Searches from both ends of time in turn, each time in an order of birth with other noise; returns what was found,
/// and the steps it took.
fn restarts(
    directions: &[Direction; 2],
    sections: &[Sections<'_>; 2],
    capacity: u64,
    budget: u64,
) -> (Option<Vec<u64>>, u64) {
    let span = directions[0].items.iter().map(|i| i.end).max().unwrap_or(0) as f64;
    let mut seed = 0x243f_6a88_85a3_08d3u64;
    let (mut used, mut round) = (0u64, 0u64);
    while used < budget {
        let which = (round % 2) as usize;
        // Noise in units of the whole time; every fourth order also favours large or long-lived items.
        let noise = span * [0.0003, 0.001, 0.003, 0.01][(round / 2 % 4) as usize];
        let weight = if round / 8 % 4 == 3 { 0.1 } else { 0.0 };
        let by_size = round / 32 % 2 == 0;
        let seeds = std::cell::Cell::new(seed);
        let order = sections[which].order(|item| {
            let mut s = seeds.get();
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            seeds.set(s);
            let drawn = if round < 2 { 0.0 } else { (s >> 11) as f64 / (1u64 << 53) as f64 - 0.5 };
            let favour = if by_size { item.size as f64 } else { (item.end - item.start) as f64 };
            -(item.start as f64) + noise * drawn + weight * favour
        });
        seed = seeds.get();
        // Mostly short runs, sometimes a long one that small parts are decided by.
        let run = if round % 64 >= 62 { RESTART * 64 } else { RESTART };
        let (found, steps) = sections[which].search(&order, capacity, run, budget - used);
        used += steps;
        match found {
            Found::Packing(found) => {
                let mut offsets = vec![0; found.len()];
                directions[which].index.iter().zip(found).for_each(|(i, o)| offsets[*i as usize] = o);
                return (Some(offsets), used);
            }
            Found::Impossible => return (None, used),
            Found::Budget => {}
        }
        round += 1;
    }
    (None, used)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::check_packing;
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

    fn instance(text: &str) -> Vec<Item> {
        text.lines()
            .skip(1)
            .map(|line| {
                let fields: Vec<u64> = line.split(',').map(|f| f.parse().unwrap()).collect();
                Item::new(fields[3], fields[1] as usize, fields[2] as usize)
            })
            .collect()
    }

    /// Published hard instances; see tests/data/minimalloc.
    #[test]
    fn hard_instances_fit_their_capacity() {
        for (name, text) in [
            ("A", include_str!("../../../tests/data/minimalloc/A.1048576.csv")),
            ("C", include_str!("../../../tests/data/minimalloc/C.1048576.csv")),
            ("E", include_str!("../../../tests/data/minimalloc/E.1048576.csv")),
        ] {
            let items = instance(text);
            let start = std::time::Instant::now();
            let packing = pack_with(&items, Effort { capacity: 1 << 20, steps: 5_000_000 });
            let seconds = start.elapsed().as_secs_f64();
            check_packing(&items, &packing.offsets, 1 << 20)
                .unwrap_or_else(|(a, b, why)| panic!("{name}: {a} and {b} {why}; peak {}", packing.peak));

            assert!(seconds < 3.0, "{name}: {seconds} s");
        }
    }
}
