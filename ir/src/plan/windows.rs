//! Packing long chains, such as the layers of a deep model: windows of time are searched one after the other, and equal
//! windows once.
//!
//! Time is cut where few bytes live across. What comes into a window lies stacked at the bottom, what goes out at the
//! top; the next window is the same upside down, so that both agree on the items between them.

use std::collections::BTreeMap;

use super::item::{Item, check_packing};
use super::portfolio::search_between;

/// Fewest and most items that begin in a window.
const WINDOW: std::ops::Range<usize> = 24..240;

/// Steps of one window's search.
const STEPS: u64 = 60_000;

/// What makes windows equal: size, lifetime from the window's start and role of each item.
type Shape = Vec<(u64, usize, usize, u8)>;

/// Offsets of all items at most `goal` high, if every window has a packing; looks at about `steps` steps.
pub(super) fn windows(items: &[Item], goal: u64, steps: u64) -> Option<Vec<u64>> {
    // Upside down an offset stays aligned only if everything is.
    if items.iter().any(|i| i.align > 1) {
        return None;
    }
    let mut by_start: Vec<u32> = (0..items.len() as u32)
        .filter(|i| items[*i as usize].size > 0 && items[*i as usize].start < items[*i as usize].end)
        .collect();
    by_start.sort_by_key(|i| (items[*i as usize].start, *i));
    let (first, last) = (by_start.first()?, by_start.iter().map(|i| items[*i as usize].end).max()?);
    let span = last - items[*first as usize].start;
    let mut offsets = vec![0; items.len()];
    // What lives through most of the time lies below everything.
    let mut base = 0u64;
    by_start.retain(|i| {
        let item = &items[*i as usize];
        let permanent = (item.end - item.start) > span / 2;
        if permanent {
            offsets[*i as usize] = base;
            base = base.saturating_add(item.size);
        }
        !permanent
    });
    let capacity = goal.checked_sub(base)?;
    let mut solved: BTreeMap<Shape, Vec<u64>> = BTreeMap::new();
    let mut left = steps.saturating_mul(4);
    let mut incoming: Vec<u32> = Vec::new();
    let (mut from, mut upside_down) = (0, false);
    while from < by_start.len() || !incoming.is_empty() {
        let (until, cut) = next_cut(items, &by_start, from, &incoming);
        let own = &by_start[from..until];
        let crosses = |i: &&u32| items[**i as usize].end > cut;
        let outgoing: Vec<u32> = own.iter().filter(crosses).copied().collect();
        // An item through two cuts would have to lie at both ends.
        if incoming.iter().any(|i| items[*i as usize].end > cut) {
            return None;
        }
        let inner: Vec<u32> = own.iter().filter(|i| !crosses(i)).copied().collect();
        let origin = incoming.iter().chain(own).map(|i| items[*i as usize].start).min()?;
        let key: Shape = [(&incoming, 0u8), (&inner, 1), (&outgoing, 2)]
            .into_iter()
            .flat_map(|(list, kind)| {
                list.iter().map(move |i| {
                    let item = &items[*i as usize];
                    (item.size, item.start - origin, item.end - origin, kind)
                })
            })
            .collect();
        let stacked = |list: &[u32]| -> Vec<u64> {
            list.iter()
                .scan(0u64, |at, i| {
                    let low = *at;
                    *at = at.saturating_add(items[*i as usize].size);
                    Some(low)
                })
                .collect()
        };
        let (bottom, top) = (stacked(&incoming), stacked(&outgoing));
        if !solved.contains_key(&key) {
            let both: Vec<Item> = incoming
                .iter()
                .chain(&inner)
                .map(|i| Item {
                    start: items[*i as usize].start - origin,
                    end: items[*i as usize].end - origin,
                    ..items[*i as usize]
                })
                .collect();
            let fixed: Vec<(u32, u64)> = bottom.iter().enumerate().map(|(n, o)| (n as u32, *o)).collect();
            let mut ceilings = Vec::new();
            for (i, low) in outgoing.iter().zip(&top) {
                let item = &items[*i as usize];
                let cap = capacity.checked_sub(low + item.size)?;
                ceilings.push((item.start - origin, item.end - origin, cap));
            }
            let (found, used) = search_between(&both, &fixed, &ceilings, capacity, STEPS.min(left));
            left = left.saturating_sub(used);
            solved.insert(key.clone(), found?[incoming.len()..].to_vec());
        }
        let mut put = |i: u32, low: u64| {
            let size = items[i as usize].size;
            offsets[i as usize] = base + if upside_down { capacity - low - size } else { low };
        };
        inner.iter().zip(&solved[&key]).for_each(|(i, low)| put(*i, *low));
        for (i, low) in outgoing.iter().zip(&top) {
            put(*i, capacity - low - items[*i as usize].size);
        }
        (from, incoming, upside_down) = (until, outgoing, !upside_down);
    }
    check_packing(items, &offsets, goal).is_ok().then_some(offsets)
}

/// The next cut: how many items begin before it, and its instant. Among the instants that leave a window of the right
/// size the one with the fewest bytes across, the first of equals.
fn next_cut(items: &[Item], by_start: &[u32], from: usize, incoming: &[u32]) -> (usize, usize) {
    let end = by_start.len();
    let (least, most) = ((from + WINDOW.start).min(end), (from + WINDOW.end).min(end));
    let mut best: Option<(u64, usize, usize)> = None;
    for until in least..most {
        let cut = items[by_start[until] as usize].start;
        if until > 0 && items[by_start[until - 1] as usize].start == cut {
            continue;
        }
        if incoming.iter().any(|i| items[*i as usize].end > cut) {
            continue;
        }
        let across = |i: &&u32| items[**i as usize].end > cut;
        let bytes: u64 = by_start[from..until].iter().filter(across).map(|i| items[*i as usize].size).sum();
        if best.is_none_or(|(b, ..)| bytes < b) {
            best = Some((bytes, until, cut));
            if bytes == 0 {
                break;
            }
        }
    }
    best.map_or((end, usize::MAX), |(_, until, cut)| (until, cut))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::lower_bound;

    /// A deep chain whose layers greedy packings leave holes in.
    #[test]
    fn deep_chains_reach_their_bound() {
        let h = 4096;
        let mut items = Vec::new();
        for layer in 0..2_000 {
            let t = layer * 8;
            for (start, end, size) in [
                (0, 6, h),
                (1, 3, 3 * h),
                (2, 4, h),
                (3, 5, h),
                (5, 9, h),
                (6, 8, 4 * h),
                (7, 9, h),
                (8, 12, h),
            ] {
                items.push(Item::new(size, t + start, t + end));
            }
        }
        let bound = lower_bound(&items);
        let offsets = windows(&items, bound, 1_000_000).expect("a packing");
        assert_eq!(check_packing(&items, &offsets, bound), Ok(()));
    }
}
