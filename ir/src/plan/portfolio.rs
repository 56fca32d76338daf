//! Searching for one packing in several ways, in turns: folded into blocks and as it is, from both ends of time, in
//! orders with other noise.

use std::cell::Cell;

use super::fold::{Folded, Guesses};
use super::item::{Item, lower_bound};
use super::search::{Found, Sections};

/// Steps that the items as they are get before anything is guessed.
const UNFOLDED_FIRST: u64 = 2_000;

/// Steps of a way's first turn; each later turn has twice as many as the one before.
const FIRST_TURN: u64 = 30_000;

/// How much longer the turns of the first ways are, those with the fewest guesses.
const PREFERENCE: [u64; 2] = [3, 3];

/// Ways that leave out some of the guesses.
const DOUBTS: u64 = 6;

/// Most items that are folded with doubts.
const DOUBTED: usize = 800;

/// What is searched: the items or their blocks, in both directions of time.
pub(super) struct Way {
    folded: Option<Folded>,
    lower_bound: u64,
    directions: [Direction; 2],
}

impl Way {
    fn of(items: &[Item], folded: Option<Folded>) -> Self {
        let directions = [Direction::forwards(items), Direction::backwards(items)];
        Way { folded, lower_bound: lower_bound(items), directions }
    }

    /// Offsets of the items from those of what was searched.
    fn unfolded(&self, offsets: Vec<u64>) -> Vec<u64> {
        match &self.folded {
            Some(folded) => folded.unfold(&offsets),
            None => offsets,
        }
    }
}

/// The ways to search `items`, those with the fewest guesses first.
pub(super) fn ways(items: &[Item]) -> Vec<Way> {
    let mut folds: Vec<Folded> = Vec::new();
    if items.iter().all(|i| i.align <= 1) {
        for (gaps, crowded_rows) in [(true, false), (false, false), (true, true), (false, true)] {
            folds.push(Folded::of(items, Guesses { crowded_rows, gaps, doubts: 0 }));
        }
        if items.len() <= DOUBTED {
            for doubts in 1..=DOUBTS {
                let guesses = Guesses { crowded_rows: doubts % 2 == 0, gaps: doubts % 3 == 0, doubts };
                folds.push(Folded::of(items, guesses));
            }
        }
    }
    let mut ways: Vec<Way> = Vec::new();
    for folded in folds {
        let blocks = folded.items();
        // As many blocks are mostly the same ones.
        let known = ways.iter().any(|w| w.directions[0].items.len() == blocks.len());
        if blocks.len() < items.len() && !known {
            ways.push(Way::of(&blocks, Some(folded)));
        }
    }
    ways.push(Way::of(items, None));
    ways
}

/// A search of one set of items in several ways.
pub(super) struct Portfolio<'a> {
    ways: &'a [Way],
    runs: Vec<Restarts<'a>>,
}

impl<'a> Portfolio<'a> {
    pub(super) fn of(ways: &'a [Way]) -> Self {
        let runs = ways.iter().map(|w| {
            let sections = w.directions.each_ref().map(|d| Sections::of(&d.items));
            Restarts::of(&w.directions, sections)
        });
        Portfolio { ways, runs: runs.collect() }
    }

    /// Searches for a packing of height at most `capacity` in about `budget` steps; returns what was found, and the
    /// steps it took.
    pub(super) fn search(&mut self, capacity: u64, budget: u64) -> (Option<Vec<u64>>, u64) {
        let last = self.ways.len() - 1;
        let mut open: Vec<usize> = (0..=last).filter(|w| self.ways[*w].lower_bound <= capacity).collect();
        let (found, mut used) = self.runs[last].search(capacity, UNFOLDED_FIRST.min(budget));
        match found {
            Found::Packing(found) => return (Some(found), used),
            Found::Impossible => return (None, used),
            Found::Budget => {}
        }
        let mut turn = FIRST_TURN;
        while used < budget && !open.is_empty() {
            let mut at = 0;
            while let Some(&way) = open.get(at).filter(|_| used < budget) {
                let length = turn * PREFERENCE.get(way).copied().unwrap_or(1);
                let (found, steps) = self.runs[way].search(capacity, length.min(budget - used));
                used += steps;
                match found {
                    Found::Packing(found) => return (Some(self.ways[way].unfolded(found)), used),
                    Found::Impossible if way == last => return (None, used),
                    Found::Impossible => {
                        open.remove(at);
                    }
                    Found::Budget => at += 1,
                }
            }
            turn *= 2;
        }
        (None, used)
    }
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
    let (found, used) = Restarts::of(&directions, sections).search(capacity, steps);
    match found {
        Found::Packing(offsets) => (Some(offsets), used),
        Found::Impossible | Found::Budget => (None, used),
    }
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

/// Placements of one run, and how many more for each item.
const RUN: u64 = 300;
const RUN_PER_ITEM: u64 = 2;

/// Searches from both ends of time in turn, each time in an order of birth with other noise.
struct Restarts<'a> {
    directions: &'a [Direction; 2],
    sections: [Sections<'a>; 2],
    span: f64,
    seed: u64,
    round: u64,
}

impl<'a> Restarts<'a> {
    fn of(directions: &'a [Direction; 2], sections: [Sections<'a>; 2]) -> Self {
        let span = directions[0].items.iter().map(|i| i.end).max().unwrap_or(0) as f64;
        Restarts { directions, sections, span, seed: 0x243f_6a88_85a3_08d3, round: 0 }
    }

    /// Returns what was found, and the steps it took.
    fn search(&mut self, capacity: u64, budget: u64) -> (Found, u64) {
        let count = self.directions[0].items.len() as u64;
        let mut used = 0u64;
        while used < budget {
            let round = self.round;
            let which = (round % 2) as usize;
            // Noise in units of the whole time; every fourth order also favours large or long-lived items.
            let noise = self.span * [0.0003, 0.001, 0.003, 0.01][(round / 2 % 4) as usize];
            let weight = if round / 8 % 4 == 3 { 0.1 } else { 0.0 };
            let by_size = (round / 32).is_multiple_of(2);
            let seed = Cell::new(self.seed);
            let order = self.sections[which].order(|item| {
                let mut s = seed.get();
                s ^= s << 13;
                s ^= s >> 7;
                s ^= s << 17;
                seed.set(s);
                let drawn = if round < 2 { 0.0 } else { (s >> 11) as f64 / (1u64 << 53) as f64 - 0.5 };
                let favour = if by_size { item.size as f64 } else { (item.end - item.start) as f64 };
                -(item.start as f64) + noise * drawn + weight * favour
            });
            self.seed = seed.get();
            self.round += 1;
            // Mostly short runs, sometimes a long one that small parts are decided by.
            let long = if round % 64 >= 62 { 64 } else { 1 };
            let run = (RUN + RUN_PER_ITEM * count) * long;
            let (found, steps) = self.sections[which].search(&order, capacity, run, budget - used);
            used += steps;
            match found {
                Found::Packing(found) => {
                    let mut offsets = vec![0; found.len()];
                    self.directions[which]
                        .index
                        .iter()
                        .zip(found)
                        .for_each(|(i, o)| offsets[*i as usize] = o);
                    return (Found::Packing(offsets), used);
                }
                Found::Impossible => return (Found::Impossible, used),
                Found::Budget => {}
            }
        }
        (Found::Budget, used)
    }
}
