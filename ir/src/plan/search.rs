//! Canonical depth-first search for a packing under a capacity.
//!
//! In a packing in which no item can be moved down, items in order of offset each lie on top of what was placed
//! before. So it is enough to place items by rising offset, each at the height of the items below it:
//!
//! - *Order*: an offset below that of the item placed last was possible earlier. Equal offsets go by index.
//! - *Dominance*: if some open item would end at or below the offset of the candidate, it could be moved down there.
//! - *Sections*: between two neighbouring instants at which items begin or end, the open items stack. For any of them,
//!   the lowest start plus the sum of the sizes must not pass the capacity; and if it would pass with one more item
//!   from below, that item comes first and the others start above it (edge finding, as in one-machine scheduling).
//! - *Decomposition*: where no open item crosses an instant, both sides are independent.
//!
//! Candidates are tried by rising offset, equal ones in an order that the caller gives; it restarts with others.
//!
//! Canonical order, dominance, sections and decomposition follow M. Moffitt, "MiniMalloc: A Lightweight Memory Allocator
//! for Hardware-Accelerated Machine Learning", ASPLOS 2023.

use super::item::Item;

/// Items looked at in one step.
const LOOKS: u64 = 128;

/// Result of a search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Offsets of all items.
    Packing(Vec<u64>),
    /// There is no packing.
    Impossible,
    /// The budget is spent.
    Budget,
}

/// The sections of a set of items, computed once and shared by all restarts.
pub(super) struct Sections<'a> {
    items: &'a [Item],
    /// First and last-plus-one section of each item.
    spans: Vec<(u32, u32)>,
    /// Items that meet each item.
    meets: Vec<Vec<u32>>,
    /// Items of each section.
    members: Vec<Vec<u32>>,
    /// Sum of sizes in each section.
    totals: Vec<u64>,
    /// Items that lie at the bottom already, in order of offset.
    bottom: Vec<(u32, u64)>,
    /// Highest end of each item.
    item_caps: Vec<u64>,
    /// Highest end in each section.
    section_caps: Vec<u64>,
    /// First instant of each section.
    times: Vec<usize>,
}

impl<'a> Sections<'a> {
    /// Computes sections; items without size or life are ignored by the search and lie at 0.
    pub(super) fn of(items: &'a [Item]) -> Self {
        let real = |i: &&Item| i.size > 0 && i.start < i.end;
        let mut times: Vec<usize> = items.iter().filter(real).flat_map(|i| [i.start, i.end]).collect();
        times.sort_unstable();
        times.dedup();
        let at = |time: usize| times.partition_point(|t| *t < time) as u32;
        let spans: Vec<(u32, u32)> =
            items.iter().map(|i| if real(&i) { (at(i.start), at(i.end)) } else { (0, 0) }).collect();
        let count = times.len().saturating_sub(1);
        let mut members: Vec<Vec<u32>> = vec![Vec::new(); count];
        let mut totals = vec![0u64; count];
        for (index, span) in spans.iter().enumerate() {
            for s in span.0..span.1 {
                members[s as usize].push(index as u32);
                totals[s as usize] = totals[s as usize].saturating_add(items[index].size);
            }
        }
        let mut by_start: Vec<u32> =
            (0..items.len() as u32).filter(|i| spans[*i as usize].0 < spans[*i as usize].1).collect();
        by_start.sort_by_key(|i| (spans[*i as usize].0, *i));
        let mut meets: Vec<Vec<u32>> = vec![Vec::new(); items.len()];
        for (n, &a) in by_start.iter().enumerate() {
            for &b in &by_start[n + 1..] {
                if spans[b as usize].0 >= spans[a as usize].1 {
                    break;
                }
                meets[a as usize].push(b);
                meets[b as usize].push(a);
            }
        }
        Sections {
            items,
            spans,
            meets,
            members,
            bottom: Vec::new(),
            item_caps: vec![u64::MAX; items.len()],
            section_caps: vec![u64::MAX; count],
            totals,
            times,
        }
    }

    /// Fixes some items at the bottom, in order of offset.
    pub(super) fn fix(&mut self, bottom: Vec<(u32, u64)>) {
        self.bottom = bottom;
    }

    /// Nothing may lie above `cap` from `start` to `end`.
    pub(super) fn cap(&mut self, start: usize, end: usize, cap: u64) {
        let covered = |from: usize, to: usize| from < end && start < to;
        for (s, limit) in self.section_caps.iter_mut().enumerate() {
            if covered(self.times[s], self.times[s + 1]) {
                *limit = cap.min(*limit);
            }
        }
        for (item, limit) in self.items.iter().zip(&mut self.item_caps) {
            if covered(item.start, item.end) {
                *limit = cap.min(*limit);
            }
        }
    }

    /// Items by falling `key`, without those that need no memory.
    pub(super) fn order(&self, key: impl Fn(&Item) -> f64) -> Vec<u32> {
        let mut keyed: Vec<(f64, u32)> = (0..self.items.len() as u32)
            .filter(|i| self.spans[*i as usize].0 < self.spans[*i as usize].1)
            .map(|i| (key(&self.items[i as usize]), i))
            .collect();
        keyed.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        keyed.into_iter().map(|(_, i)| i).collect()
    }

    /// Searches for a packing of height at most `capacity`, with at most `placements` placements and about `steps`
    /// steps; returns the steps it took as well.
    pub(super) fn search(&self, order: &[u32], capacity: u64, placements: u64, steps: u64) -> (Found, u64) {
        if self.totals.iter().zip(&self.section_caps).any(|(t, cap)| *t > capacity.min(*cap)) {
            return (Found::Impossible, 1);
        }
        let mut crossing = vec![0u32; self.totals.len() + 1];
        for i in order {
            let (from, to) = self.spans[*i as usize];
            (from + 1..to).for_each(|b| crossing[b as usize] += 1);
        }
        let mut state = State {
            sections: self,
            capacity,
            placements,
            looks: order.len() as u64 * 4,
            most_looks: steps.saturating_mul(LOOKS),
            open: self.spans.iter().map(|s| s.0 < s.1).collect(),
            low: vec![0; self.items.len()],
            bound: vec![0; self.items.len()],
            crossing,
            offsets: vec![0; self.items.len()],
            placed: Vec::new(),
            lows: Vec::new(),
            bounds: Vec::new(),
            queue: Vec::new(),
            dirty: vec![false; self.totals.len()],
            scratch: Vec::new(),
        };
        let fixed = |i: &u32| self.bottom.iter().any(|(b, _)| b == i);
        let mut order: Vec<u32> = order.iter().copied().filter(|i| !fixed(i)).collect();
        for (i, offset) in &self.bottom {
            if !state.put(*i, *offset, &[]).0 {
                return (Found::Impossible, state.looks / LOOKS + 1);
            }
        }
        let found = match state.split(std::mem::take(&mut order), 0, 0) {
            Verdict::Yes => Found::Packing(state.offsets),
            Verdict::No => Found::Impossible,
            Verdict::Spent => Found::Budget,
        };
        (found, state.looks / LOOKS + 1)
    }
}

enum Verdict {
    Yes,
    No,
    Spent,
}

struct State<'a> {
    sections: &'a Sections<'a>,
    capacity: u64,
    /// Placements left.
    placements: u64,
    /// Items looked at, and when to stop.
    looks: u64,
    most_looks: u64,
    open: Vec<bool>,
    /// Height of what was placed below each open item.
    low: Vec<u64>,
    /// Proved lowest offset of each open item.
    bound: Vec<u64>,
    /// Open items that cross the instant before each section.
    crossing: Vec<u32>,
    offsets: Vec<u64>,
    /// Placed items, with the lengths of `lows` and `bounds` before each.
    placed: Vec<(u32, usize, usize)>,
    /// Earlier values of `low`.
    lows: Vec<(u32, u64)>,
    /// Earlier values of `bound`.
    bounds: Vec<(u32, u64)>,
    /// Sections to look at, and whether each is in the queue.
    queue: Vec<u32>,
    dirty: Vec<bool>,
    scratch: Vec<(u64, u32)>,
}

impl State<'_> {
    /// Splits open items where none crosses, and solves the parts; `height` and `last` are the offset and index of
    /// the item placed last.
    fn split(&mut self, mut open: Vec<u32>, height: u64, last: u32) -> Verdict {
        if open.is_empty() {
            return Verdict::Yes;
        }
        let spans = &self.sections.spans;
        let mut by_start = open.clone();
        by_start.sort_unstable_by_key(|i| spans[*i as usize].0);
        let mut end = 0u32;
        let mut bounds: Vec<(u32, u32)> = Vec::new();
        for i in &by_start {
            let span = spans[*i as usize];
            if bounds.is_empty() || span.0 >= end {
                bounds.push(span);
            }
            end = end.max(span.1);
            if let Some(b) = bounds.last_mut() {
                b.1 = end;
            }
        }
        if bounds.len() == 1 {
            return self.place(&open, height, last);
        }
        let mut groups: Vec<Vec<u32>> = vec![Vec::new(); bounds.len()];
        for i in open.drain(..) {
            let at = bounds.partition_point(|b| b.1 <= spans[i as usize].0);
            groups[at].push(i);
        }
        // The part that is hardest to solve first: a failure there saves the others.
        let mut by_size: Vec<usize> = (0..groups.len()).collect();
        by_size.sort_by_key(|g| std::cmp::Reverse(groups[*g].len()));
        let mark = self.placed.len();
        for g in by_size {
            match self.place(&groups[g], height, last) {
                Verdict::Yes => {}
                other => {
                    self.undo(mark);
                    return other;
                }
            }
        }
        Verdict::Yes
    }

    /// Tries the candidates of one part. On failure the state is as before; on success items stay placed.
    fn place(&mut self, open: &[u32], height: u64, last: u32) -> Verdict {
        let items = self.sections.items;
        if let [i] = *open {
            // Nothing else lies here: the item needs no order.
            let offset = items[i as usize].at_or_above(self.low[i as usize]);
            if offset + items[i as usize].size > self.limit(i) {
                return Verdict::No;
            }
            self.put(i, offset, open);
            return Verdict::Yes;
        }
        let mut ceiling = u64::MAX;
        for &i in open {
            let item = &items[i as usize];
            ceiling = ceiling.min(item.at_or_above(self.low[i as usize]) + item.size);
        }
        let mut candidates: Vec<(u64, u32, u32)> = Vec::new();
        for (rank, &i) in open.iter().enumerate() {
            let item = &items[i as usize];
            let offset = item.at_or_above(self.low[i as usize]);
            let ordered = offset > height || (offset == height && i >= last);
            let known = self.bound[i as usize] <= offset;
            if ordered && known && offset < ceiling && offset + item.size <= self.limit(i) {
                candidates.push((offset, rank as u32, i));
            }
        }
        candidates.sort_unstable();
        for (offset, _, i) in candidates {
            if self.placements == 0 || self.looks >= self.most_looks {
                return Verdict::Spent;
            }
            self.placements -= 1;
            self.looks += (open.len() * 2 + self.sections.meets[i as usize].len()) as u64;
            let mark = self.placed.len();
            let (fits, cut) = self.put(i, offset, open);
            if fits {
                let left: Vec<u32> = open.iter().copied().filter(|o| *o != i).collect();
                let verdict = if cut || left.is_empty() {
                    self.split(left, offset, i)
                } else {
                    self.place(&left, offset, i)
                };
                match verdict {
                    Verdict::No => {}
                    other => return other,
                }
            }
            self.undo(mark);
        }
        Verdict::No
    }

    /// Places item `i` of the part `open`; returns whether every section can still hold what is open, and whether
    /// there is a new cut.
    fn put(&mut self, i: u32, offset: u64, open: &[u32]) -> (bool, bool) {
        let sections = self.sections;
        let item = &sections.items[i as usize];
        let top = offset + item.size;
        let (from, to) = sections.spans[i as usize];
        self.offsets[i as usize] = offset;
        self.open[i as usize] = false;
        self.placed.push((i, self.lows.len(), self.bounds.len()));
        let mut cut = false;
        for b in from + 1..to {
            self.crossing[b as usize] -= 1;
            cut |= self.crossing[b as usize] == 0;
        }
        for &j in &sections.meets[i as usize] {
            if self.open[j as usize] && self.low[j as usize] < top {
                self.lows.push((j, self.low[j as usize]));
                self.low[j as usize] = top;
                if !self.raise(j, top) {
                    return (false, cut);
                }
            }
        }
        if open.len() > 1 {
            for &j in open {
                if j != i && self.bound[j as usize] < offset && !self.raise(j, offset) {
                    return (false, cut);
                }
            }
        }
        (self.propagate(), cut)
    }

    fn limit(&self, i: u32) -> u64 {
        self.capacity.min(self.sections.item_caps[i as usize])
    }

    /// Item `j` starts at `bound` or above; returns whether it fits.
    fn raise(&mut self, j: u32, bound: u64) -> bool {
        let item = &self.sections.items[j as usize];
        let bound = item.at_or_above(bound);
        if bound <= self.bound[j as usize] {
            return true;
        }
        self.bounds.push((j, self.bound[j as usize]));
        self.bound[j as usize] = bound;
        let (from, to) = self.sections.spans[j as usize];
        for s in from..to {
            if !std::mem::replace(&mut self.dirty[s as usize], true) {
                self.queue.push(s);
            }
        }
        bound.saturating_add(item.size) <= self.limit(j)
    }

    /// Draws conclusions in every section with a raised item until nothing changes; returns whether all can hold
    /// what is open.
    fn propagate(&mut self) -> bool {
        let mut stack = std::mem::take(&mut self.scratch);
        let mut fits = true;
        while let Some(s) = self.queue.pop() {
            self.dirty[s as usize] = false;
            self.looks += 4 + self.sections.members[s as usize].len() as u64;
            if !fits {
                // The rest of the queue is only emptied.
                continue;
            }
            let capacity = self.capacity.min(self.sections.section_caps[s as usize]);
            stack.clear();
            for &j in &self.sections.members[s as usize] {
                if self.open[j as usize] {
                    stack.push((self.bound[j as usize], j));
                }
            }
            stack.sort_unstable_by(|a, b| b.cmp(a));
            // From the item with the highest bound down: `rest` is the sum of the sizes from there up.
            let mut rest = 0u64;
            for n in 0..stack.len() {
                let (bound, j) = stack[n];
                rest += self.sections.items[j as usize].size;
                if bound + rest > capacity {
                    fits = false;
                    break;
                }
                if n > 0 && stack[n - 1].0 > bound && stack[n - 1].0 + rest > capacity {
                    let above = bound + self.sections.items[j as usize].size;
                    for &(_, k) in &stack[..n] {
                        fits &= self.raise(k, above);
                    }
                }
            }
        }
        self.scratch = stack;
        fits
    }

    /// Takes back placements down to `mark`, the last first.
    fn undo(&mut self, mark: usize) {
        while self.placed.len() > mark {
            let Some((i, lows, bounds)) = self.placed.pop() else { return };
            for (j, low) in self.lows.drain(lows..).rev() {
                self.low[j as usize] = low;
            }
            for (j, bound) in self.bounds.drain(bounds..).rev() {
                self.bound[j as usize] = bound;
            }
            let (from, to) = self.sections.spans[i as usize];
            for b in from + 1..to {
                self.crossing[b as usize] += 1;
            }
            self.open[i as usize] = true;
        }
    }
}
