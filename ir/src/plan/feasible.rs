//! Instances that are known to fit: packings are drawn or changed, and only sizes and lifetimes are handed out.
//!
//! All numbers follow from a seed. Heights are multiples of 1 KiB; [`CAPACITY`] is the height that fits.

use super::item::Item;

/// Height that every instance fits in.
pub(super) const CAPACITY: u64 = 1 << 20;

const KIB: u64 = 1 << 10;

/// Kinds of instances; see [`instance`].
pub(super) const KINDS: [&str; 11] = [
    "tiling", "dropped", "shrunk", "loose", "split", "grown", "refilled", "joined", "jittered", "mixed",
    "sparse",
];

/// An item with its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) low: u64,
    pub(super) high: u64,
}

impl Placed {
    fn item(&self) -> Item {
        Item::new(self.high - self.low, self.start, self.end)
    }

    fn overlaps(&self, other: &Placed) -> bool {
        self.start < other.end && other.start < self.end && self.low < other.high && other.low < self.high
    }
}

/// Numbers from a seed.
pub(super) struct Draw(u64);

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        Draw(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x243f_6a88_85a3_08d3)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number of `low..high`.
    fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low).max(1)
    }

    fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.within(0, i as u64 + 1) as usize);
        }
    }
}

/// The instance of a kind and a seed; `bases` are packings that fit [`CAPACITY`].
pub(super) fn instance(kind: &str, seed: u64, bases: &[Vec<Placed>]) -> Vec<Item> {
    placed(kind, seed, bases).iter().map(Placed::item).collect()
}

/// [`instance`] with its packing.
fn placed(kind: &str, seed: u64, bases: &[Vec<Placed>]) -> Vec<Placed> {
    let mut draw = Draw::new(seed * 31 + KINDS.iter().position(|k| *k == kind).unwrap_or(99) as u64);
    let count = draw.within(150, 461) as usize;
    let base = |draw: &mut Draw| bases[draw.within(0, bases.len() as u64) as usize].clone();
    let mut placed = match kind {
        "tiling" => tiling(&mut draw, count, 1 << 20),
        "dropped" => {
            let mut placed = tiling(&mut draw, count * 11 / 10, 1 << 20);
            let share = 0.02 + 0.1 * draw.unit();
            placed.retain(|_| !draw.chance(share));
            placed
        }
        "sparse" => {
            let share = 0.05 + 0.25 * draw.unit();
            let mut placed = tiling(&mut draw, (count as f64 / (1.0 - share)) as usize, 1 << 10);
            placed.retain(|_| !draw.chance(share));
            placed
        }
        "shrunk" | "loose" => {
            let mut placed = tiling(&mut draw, count, 400);
            let share = if kind == "loose" { 1.0 } else { 0.3 };
            shrink(&mut draw, &mut placed, share, 0.3);
            placed
        }
        "split" | "grown" => {
            let mut placed = base(&mut draw);
            split(&mut draw, &mut placed, count.max(200));
            if kind == "grown" {
                grow(&mut draw, &mut placed, 0.5);
            }
            placed
        }
        "refilled" => {
            let mut placed = base(&mut draw);
            let share = 0.1 + 0.15 * draw.unit();
            placed.retain(|_| !draw.chance(share));
            refill(&mut draw, &mut placed, count);
            placed
        }
        "joined" => {
            let (first, second) = (base(&mut draw), base(&mut draw));
            joined(&mut draw, &first, &second, count)
        }
        "jittered" => {
            let mut placed = base(&mut draw);
            merge(&mut draw, &mut placed, 0.3);
            split(&mut draw, &mut placed, count.max(180));
            jitter(&mut draw, &mut placed, 0.3);
            shrink(&mut draw, &mut placed, 0.2, 0.1);
            placed
        }
        _ => {
            let mut placed =
                if draw.chance(0.5) { base(&mut draw) } else { tiling(&mut draw, count * 2 / 3, 1 << 20) };
            placed.retain(|_| !draw.chance(0.05));
            merge(&mut draw, &mut placed, 0.2);
            refill(&mut draw, &mut placed, count * 3 / 4);
            split(&mut draw, &mut placed, count);
            jitter(&mut draw, &mut placed, 0.1);
            grow(&mut draw, &mut placed, 0.2);
            placed
        }
    };
    if draw.chance(0.5) {
        let end = placed.iter().map(|p| p.end).max().unwrap_or(0);
        placed.iter_mut().for_each(|p| (p.start, p.end) = (end - p.end, end - p.start));
    }
    draw.shuffle(&mut placed);
    placed
}

/// Cuts the whole rectangle again and again, in time or in height.
fn tiling(draw: &mut Draw, count: usize, span: usize) -> Vec<Placed> {
    let mut placed = vec![Placed { start: 0, end: span, low: 0, high: CAPACITY }];
    while placed.len() < count {
        let weight = |p: &Placed, draw: &mut Draw| {
            (p.end - p.start) as f64 / span as f64 * (p.high - p.low) as f64 * (0.3 + 0.7 * draw.unit())
        };
        let weights: Vec<f64> = placed.iter().map(|p| weight(p, draw)).collect();
        let largest = (0..placed.len()).max_by(|a, b| weights[*a].total_cmp(&weights[*b])).unwrap_or(0);
        cut(draw, &mut placed, largest, 0.5);
    }
    placed
}

/// Cuts one item in time, or in height.
fn cut(draw: &mut Draw, placed: &mut Vec<Placed>, which: usize, in_time: f64) {
    let p = placed[which];
    let (kib, life) = ((p.high - p.low) / KIB, p.end - p.start);
    if draw.chance(in_time) && life >= 2 {
        let at = p.start + draw.within(1, life as u64) as usize;
        placed[which].end = at;
        placed.push(Placed { start: at, ..p });
    } else if kib >= 2 {
        let at = p.low + KIB * draw.within(1 + kib / 8, kib - kib / 8);
        placed[which].high = at;
        placed.push(Placed { low: at, ..p });
    }
}

fn split(draw: &mut Draw, placed: &mut Vec<Placed>, count: usize) {
    while placed.len() < count {
        let which = draw.within(0, placed.len() as u64) as usize;
        cut(draw, placed, which, 0.6);
    }
}

/// Lowers some items by up to a share of their height.
fn shrink(draw: &mut Draw, placed: &mut [Placed], share: f64, most: f64) {
    for p in placed {
        if draw.chance(share) {
            let kib = ((p.high - p.low) as f64 * (1.0 - most * draw.unit())) as u64 / KIB;
            p.high = p.low + KIB * kib.max(1);
        }
    }
}

/// What some items may take of the free heights above or below.
fn grow(draw: &mut Draw, placed: &mut [Placed], share: f64) {
    for i in 0..placed.len() {
        if !draw.chance(share) {
            continue;
        }
        let p = placed[i];
        let together = |o: &&Placed| **o != p && o.start < p.end && p.start < o.end;
        let above = placed.iter().filter(together).filter(|o| o.low >= p.high).map(|o| o.low).min();
        let below = placed.iter().filter(together).filter(|o| o.high <= p.low).map(|o| o.high).max();
        placed[i].high = above.unwrap_or(CAPACITY);
        if draw.chance(0.5) {
            placed[i].low = below.unwrap_or(0);
        }
    }
}

/// Begins or ends some items earlier or later, as far as others let them.
fn jitter(draw: &mut Draw, placed: &mut [Placed], share: f64) {
    let span = placed.iter().map(|p| p.end).max().unwrap_or(1);
    for i in 0..placed.len() {
        if !draw.chance(share) {
            continue;
        }
        let mut p = placed[i];
        let step = 1 + draw.within(0, span as u64 / 50 + 1) as usize;
        match draw.within(0, 4) {
            0 => p.start = p.start.saturating_sub(step),
            1 => p.end = (p.end + step).min(span),
            2 if p.end - p.start > step => p.start += step,
            3 if p.end - p.start > step => p.end -= step,
            _ => {}
        }
        if placed.iter().enumerate().all(|(j, o)| j == i || !o.overlaps(&p)) {
            placed[i] = p;
        }
    }
}

/// Joins some neighbours that make a rectangle.
fn merge(draw: &mut Draw, placed: &mut Vec<Placed>, share: f64) {
    let mut i = 0;
    while i < placed.len() {
        let p = placed[i];
        let beside = |o: &Placed| o.start == p.end && o.low == p.low && o.high == p.high;
        let above = |o: &Placed| o.low == p.high && o.start == p.start && o.end == p.end;
        if let Some(j) = placed.iter().position(|o| beside(o) || above(o))
            && draw.chance(share)
        {
            (placed[i].end, placed[i].high) = (placed[j].end, placed[j].high);
            placed.swap_remove(j);
        }
        i += 1;
    }
}

/// Puts items into free places until there are `count`, or no more are found.
fn refill(draw: &mut Draw, placed: &mut Vec<Placed>, count: usize) {
    let span = placed.iter().map(|p| p.end).max().unwrap_or(1);
    for _ in 0..20_000 {
        if placed.len() >= count {
            return;
        }
        let at = draw.within(0, span as u64) as usize;
        let height = KIB * draw.within(0, CAPACITY / KIB);
        let mut new = Placed { start: at, end: at + 1, low: height, high: height + KIB };
        if placed.iter().any(|o| o.overlaps(&new)) {
            continue;
        }
        let here = placed.iter().filter(|o| o.start <= at && at < o.end);
        let (mut low, mut high) = (0, CAPACITY);
        for o in here {
            if o.high <= height {
                low = low.max(o.high);
            } else {
                high = high.min(o.low);
            }
        }
        if draw.chance(0.3) && high - low > 16 * KIB {
            high = low + (high - low) / 2 / KIB * KIB;
        }
        (new.low, new.high) = (low, high);
        let level = |o: &&Placed| o.low < high && low < o.high;
        new.start = placed.iter().filter(level).filter(|o| o.end <= at).map(|o| o.end).max().unwrap_or(0);
        new.end = placed.iter().filter(level).filter(|o| o.start > at).map(|o| o.start).min().unwrap_or(span);
        if draw.chance(0.3) && new.end - new.start > 8 {
            new.end -= (new.end - new.start) / 3;
        }
        placed.push(new);
    }
}

/// A window of one packing, then a window of another, with items that cross between them.
fn joined(draw: &mut Draw, first: &[Placed], second: &[Placed], count: usize) -> Vec<Placed> {
    let mut placed = Vec::new();
    let mut seam = 0;
    for (n, part) in [first, second].into_iter().enumerate() {
        let span = part.iter().map(|p| p.end).max().unwrap_or(1);
        let from = if n == 0 { 0 } else { (span as f64 * 0.5 * draw.unit()) as usize };
        let to = if n == 0 { span - (span as f64 * 0.5 * draw.unit()) as usize } else { span };
        let upside_down = draw.chance(0.5);
        for p in part.iter().filter(|p| p.start < to && from < p.end) {
            let (low, high) =
                if upside_down { (CAPACITY - p.high, CAPACITY - p.low) } else { (p.low, p.high) };
            let (start, end) = (p.start.max(from) - from + seam, p.end.min(to) - from + seam);
            placed.push(Placed { start, end, low, high });
        }
        if n == 0 {
            seam = to - from;
        }
    }
    placed.retain(|p| !(p.start == seam || p.end == seam) || draw.chance(0.5));
    refill(draw, &mut placed, count.max(250));
    split(draw, &mut placed, count);
    placed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Effort, check_packing, pack_with};

    fn read(text: &str) -> Vec<Vec<u64>> {
        text.lines().skip(1).map(|line| line.split(',').map(|f| f.parse().unwrap()).collect()).collect()
    }

    fn item(fields: &[u64]) -> Item {
        Item::new(fields[3], fields[1] as usize, fields[2] as usize)
    }

    fn fits(name: &str, items: &[Item]) {
        let packing = pack_with(items, Effort { capacity: CAPACITY, ..Effort::default() });
        check_packing(items, &packing.offsets, CAPACITY)
            .unwrap_or_else(|(a, b, why)| panic!("{name}: {a} and {b} {why}; peak {}", packing.peak));
    }

    /// See tests/data/minimalloc.
    #[test]
    fn published_hard_instances_fit_their_capacity() {
        for (name, text) in [
            ("A", include_str!("../../../tests/data/minimalloc/A.1048576.csv")),
            ("C", include_str!("../../../tests/data/minimalloc/C.1048576.csv")),
            ("E", include_str!("../../../tests/data/minimalloc/E.1048576.csv")),
        ] {
            fits(name, &read(text).iter().map(|fields| item(fields)).collect::<Vec<_>>());
        }
    }

    /// Packings of the published instances; see tests/data/packing.
    fn bases() -> Vec<Vec<Placed>> {
        let place =
            |f: &Vec<u64>| Placed { start: f[1] as usize, end: f[2] as usize, low: f[4], high: f[4] + f[3] };
        [
            include_str!("../../../tests/data/packing/A.csv"),
            include_str!("../../../tests/data/packing/C.csv"),
            include_str!("../../../tests/data/packing/E.csv"),
        ]
        .map(|text| read(text).iter().map(place).collect())
        .to_vec()
    }

    #[test]
    fn drawn_instances_are_those_of_packings_that_fit() {
        for kind in KINDS {
            let placed = placed(kind, 7, &bases());
            assert!(placed.len() >= 100, "{kind}: {}", placed.len());
            let items: Vec<Item> = placed.iter().map(Placed::item).collect();
            let offsets: Vec<u64> = placed.iter().map(|p| p.low).collect();
            assert_eq!(check_packing(&items, &offsets, CAPACITY), Ok(()), "{kind}");
        }
    }

    /// Cut, dropped, grown, refilled, joined, jittered: instances of up to 460 items that are known to fit.
    #[test]
    fn drawn_hard_instances_fit_their_capacity() {
        let bases = bases();
        for (kind, seeds) in FITTING {
            for seed in seeds {
                fits(&format!("{kind} {seed}"), &instance(kind, *seed, &bases));
            }
        }
    }

    /// Kinds and seeds that the default effort is known to be enough for.
    const FITTING: [(&str, &[u64]); 11] = [
        ("tiling", &[0, 3]),
        ("dropped", &[0, 2, 4]),
        ("shrunk", &[2]),
        ("loose", &[1]),
        ("split", &[1, 3]),
        ("grown", &[0, 2]),
        ("refilled", &[1, 2]),
        ("joined", &[1, 4]),
        ("jittered", &[3]),
        ("mixed", &[1, 3]),
        ("sparse", &[0, 3, 7]),
    ];
}
