//! Folding with tolerance: pairs of blocks that almost make a rectangle become one, the best pairs first, as long as
//! everything that is alive at any instant still fits.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::fold::{Folded, Join};
use super::item::Item;
use super::load::Load;

/// Largest mismatch of a pair, in thousandths, after which each of the results is taken.
pub(super) const LEVELS: [u32; 3] = [0, 60, 200];

/// A possible join: mismatch, lifetime and the two blocks, the smallest first.
type Pair = Reverse<(u32, usize, u32, u32)>;

/// Folds `items`, which have no alignment, as far as each of [`LEVELS`] allows.
pub(super) fn clusters(items: &[Item], capacity: u64) -> Vec<Folded> {
    let mut folded = Folded::flat(items);
    let mut load = Load::of(items, capacity);
    let mut pairs: BinaryHeap<Pair> = BinaryHeap::new();
    let roots = folded.roots().to_vec();
    for (n, a) in roots.iter().enumerate() {
        for b in &roots[n + 1..] {
            pairs.extend(pair(&folded, *a, *b));
        }
    }
    let mut results: Vec<Folded> = Vec::new();
    for level in LEVELS {
        while let Some(Reverse((mismatch, _, a, b))) = pairs.peek().copied() {
            if mismatch > level {
                break;
            }
            pairs.pop();
            if !folded.is_root(a) || !folded.is_root(b) {
                continue;
            }
            let (x, y) = (folded.item(a), folded.item(b));
            let (join, both) = joined(&x, &y);
            if !load.replace(&x, &y, &both) {
                continue;
            }
            let new = folded.join(join, a, b, both);
            for other in folded.roots().to_vec() {
                if other != new {
                    pairs.extend(pair(&folded, other, new));
                }
            }
        }
        results.push(folded.clone());
    }
    results
}

/// What two items become: a row if one ends before the other begins, otherwise a stack.
fn joined(x: &Item, y: &Item) -> (Join, Item) {
    let (start, end) = (x.start.min(y.start), x.end.max(y.end));
    if x.start < y.end && y.start < x.end {
        (Join::Stack, Item::new(x.size + y.size, start, end))
    } else {
        (Join::Row, Item::new(x.size.max(y.size), start, end))
    }
}

/// The pair of two blocks, if its mismatch is within the last of [`LEVELS`].
fn pair(folded: &Folded, a: u32, b: u32) -> Option<Pair> {
    let (x, y) = (folded.item(a), folded.item(b));
    let (join, both) = joined(&x, &y);
    let life = both.end - both.start;
    let thousandths = |part: u64, of: u64| (part as f64 / of as f64 * 1000.0).ceil() as u32;
    let mismatch = match join {
        Join::Stack => {
            let common = x.end.min(y.end) - x.start.max(y.start);
            thousandths((life - common) as u64, life as u64)
        }
        Join::Row => {
            let empty = life - (x.end - x.start) - (y.end - y.start);
            thousandths(x.size.abs_diff(y.size), both.size) + thousandths(empty as u64, life as u64)
        }
    };
    (mismatch <= LEVELS[LEVELS.len() - 1]).then_some(Reverse((mismatch, life, a, b)))
}
