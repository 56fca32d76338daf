//! Packing buffers with lifetimes into the smallest arena: several greedy orders, then a seeded search around the
//! best, stopping at the lower bound.

/// A buffer with a half-open lifetime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Size in bytes, already padded to the alignment.
    pub size: u64,
    /// First instant of life.
    pub start: usize,
    /// First instant after life.
    pub end: usize,
}

/// Offsets of all items and what they add up to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Offset of each item.
    pub offsets: Vec<u64>,
    /// Highest end.
    pub peak: u64,
    /// Largest sum of sizes alive at one instant: no packing is smaller.
    pub lower_bound: u64,
}

/// The largest sum of sizes alive at one instant.
pub fn lower_bound(items: &[Item]) -> u64 {
    let mut events: Vec<(usize, bool, u64)> = Vec::with_capacity(items.len() * 2);
    for item in items.iter().filter(|i| i.start < i.end) {
        events.push((item.start, true, item.size));
        events.push((item.end, false, item.size));
    }
    // Deaths come before births at the same instant.
    events.sort_unstable();
    let (mut alive, mut most) = (0u64, 0u64);
    for (_, birth, size) in events {
        alive = if birth { alive.saturating_add(size) } else { alive.saturating_sub(size) };
        most = most.max(alive);
    }
    most
}

/// Packs `items`; deterministic. Cost grows with the square of the number of items that live together.
pub fn pack(items: &[Item]) -> Packing {
    let bound = lower_bound(items);
    let by = |key: &dyn Fn(&Item) -> (u64, u64)| {
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|i| key(&items[*i]));
        order
    };
    let life = |i: &Item| i.end.saturating_sub(i.start) as u64;
    let orders = [
        by(&|i| (u64::MAX - i.size, i.start as u64)),
        by(&|i| (i.start as u64, u64::MAX - i.size)),
        by(&|i| (u64::MAX - i.size.saturating_mul(life(i)), i.start as u64)),
        by(&|i| (u64::MAX - life(i), u64::MAX - i.size)),
    ];
    let mut best: Option<(Packing, Vec<usize>)> = None;
    for order in orders {
        let packing = place(items, &order, bound);
        if best.as_ref().is_none_or(|(b, _)| packing.peak < b.peak) {
            best = Some((packing, order));
        }
    }
    let Some((mut packing, mut order)) = best else {
        return Packing { offsets: Vec::new(), peak: 0, lower_bound: 0 };
    };
    // Move one item towards the front of the order at a time; keep what is not worse.
    let rounds = if items.len() <= 512 { 400 } else { 0 };
    let mut seed = 0x243f_6a88_85a3_08d3u64;
    for _ in 0..rounds {
        if packing.peak == bound || order.len() < 2 {
            break;
        }
        let mut draw = |n: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed % n as u64) as usize
        };
        let mut candidate = order.clone();
        let item = candidate.remove(draw(order.len()));
        candidate.insert(draw(order.len()), item);
        let tried = place(items, &candidate, bound);
        if tried.peak <= packing.peak {
            (packing, order) = (tried, candidate);
        }
    }
    packing
}

/// Places items in `order`, each at the lowest gap that is free over its lifetime.
fn place(items: &[Item], order: &[usize], lower_bound: u64) -> Packing {
    let mut offsets = vec![0; items.len()];
    let mut placed: Vec<usize> = Vec::with_capacity(items.len());
    let mut peak = 0;
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for &index in order {
        let item = &items[index];
        taken.clear();
        taken.extend(
            placed
                .iter()
                .filter(|p| items[**p].start < item.end && item.start < items[**p].end)
                .map(|p| (offsets[*p], offsets[*p] + items[*p].size)),
        );
        taken.sort_unstable();
        let mut offset = 0u64;
        for (low, high) in &taken {
            if offset.saturating_add(item.size) <= *low {
                break;
            }
            offset = offset.max(*high);
        }
        offsets[index] = offset;
        placed.push(index);
        peak = peak.max(offset.saturating_add(item.size));
    }
    Packing { offsets, peak, lower_bound }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn items() -> impl Strategy<Value = Vec<Item>> {
        prop::collection::vec((0u64..50, 0usize..20, 1usize..8), 0..25).prop_map(|v| {
            v.into_iter().map(|(size, start, life)| Item { size, start, end: start + life }).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn packings_are_disjoint_and_bounded(items in items()) {
            let packing = pack(&items);
            prop_assert!(packing.peak >= packing.lower_bound);
            prop_assert!(packing.peak <= items.iter().map(|i| i.size).sum::<u64>());
            for (i, a) in items.iter().enumerate() {
                for (j, b) in items.iter().enumerate().skip(i + 1) {
                    let together = a.start < b.end && b.start < a.end;
                    let (x, y) = (packing.offsets[i], packing.offsets[j]);
                    prop_assert!(!together || x + a.size <= y || y + b.size <= x);
                }
            }
            // The bound is the brute-force maximum over instants.
            let brute = (0..30).map(|t| items.iter().filter(|i| i.start <= t && t < i.end).map(|i| i.size).sum::<u64>());
            prop_assert_eq!(packing.lower_bound, brute.max().unwrap_or(0));
        }
    }
}
