//! From solved offsets to offsets that hold for every shape.

use std::collections::BTreeMap;

use super::item::{Item, Packing};
use crate::dim::{Bindings, Dim};

/// Most arguments of a `max` before it is replaced by a simpler upper bound; the second is for plans that the first
/// makes too large.
const MOST_ARGUMENTS: [usize; 2] = [6, 24];

/// `bytes` rounded up to a multiple of `align`. Where rounding each coefficient costs under 2 %, that shorter form
/// is taken; otherwise the exact one with `ceildiv`.
pub fn aligned_size(bytes: &Dim, align: u64) -> Dim {
    let align = align as i64;
    let rounded = bytes.linear_upper_bound(align);
    // Compare coefficients: the rounded form dominates the plain one, and 1.02 times the plain one dominates it.
    let generous = bytes.mul(&Dim::from(51i64)).dominates(&rounded.mul(&Dim::from(50i64)));
    if generous { rounded } else { bytes.align_up(align) }
}

/// Symbolic offsets that keep the vertical order of `packing`, and the size of the arena. Two items that live
/// together never overlap under any binding, because the upper one starts at or above the lower one's end.
///
/// `maxima` is the binding that `packing` was solved at. Where simplifying the offsets costs more than 1 % there, more
/// exact ones are taken; and where those cost more too, the solved numbers, which hold for every binding because sizes
/// grow with every symbol.
pub fn symbolic(
    items: &[Item],
    sizes: &[Dim],
    packing: &Packing,
    align: u64,
    maxima: &Bindings,
) -> (Vec<Dim>, Dim) {
    let allowed = packing.peak.saturating_add(packing.peak / 100);
    for most_arguments in MOST_ARGUMENTS {
        let (offsets, total) = stacked(items, sizes, packing, align, most_arguments);
        if total.extent(maxima).is_some_and(|t| t <= allowed) {
            return (offsets, total);
        }
    }
    let number = |n: u64| Dim::from(i64::try_from(n).unwrap_or(i64::MAX));
    (packing.offsets.iter().map(|o| number(*o)).collect(), number(packing.peak))
}

/// Items are stacked from the bottom up on a skyline over time: at each instant the top item starts at or above the end
/// of everything below it, so an item only has to clear the tops it covers. Equal maxima are computed once.
fn stacked(
    items: &[Item],
    sizes: &[Dim],
    packing: &Packing,
    align: u64,
    most_arguments: usize,
) -> (Vec<Dim>, Dim) {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|i| (packing.offsets[*i], *i));
    let mut dims = Interned::new(align, most_arguments);
    let sizes: Vec<u32> = sizes.iter().map(|s| dims.id(s.clone())).collect();
    let zero = dims.id(Dim::from(0i64));
    let mut ends = vec![zero; items.len()];
    let mut offsets = vec![zero; items.len()];
    let mut total = zero;
    // Skyline: start of a section -> the item on top, until the next section.
    let mut skyline: BTreeMap<usize, Option<usize>> = BTreeMap::from([(0, None)]);
    for &i in &order {
        let item = &items[i];
        if item.start >= item.end {
            continue;
        }
        let mut below: Vec<usize> = Vec::new();
        let first = skyline.range(..=item.start).next_back().and_then(|(_, top)| *top);
        below.extend(first);
        below.extend(skyline.range(item.start + 1..item.end).filter_map(|(_, top)| *top));
        below.sort_unstable();
        below.dedup();
        let mut tops: Vec<u32> = below.iter().map(|j| ends[*j]).collect();
        tops.sort_unstable();
        tops.dedup();
        let offset = tops.into_iter().fold(zero, |offset, top| dims.max(offset, top));
        offsets[i] = offset;
        ends[i] = dims.sum(offset, sizes[i]);
        total = dims.max(total, ends[i]);
        // The item is the top of its whole lifetime from here on.
        let after = skyline.range(..=item.end).next_back().and_then(|(_, top)| *top);
        let covered: Vec<usize> = skyline.range(item.start..=item.end).map(|(at, _)| *at).collect();
        covered.into_iter().for_each(|at| {
            skyline.remove(&at);
        });
        skyline.insert(item.start, Some(i));
        skyline.insert(item.end, after);
    }
    (
        offsets.into_iter().map(|id| dims.list[id as usize].clone()).collect(),
        dims.list[total as usize].clone(),
    )
}

/// Dims by number, so that repeated layers cost one computation each.
struct Interned {
    align: u64,
    most_arguments: usize,
    list: Vec<Dim>,
    ids: BTreeMap<Dim, u32>,
    maxima: BTreeMap<(u32, u32), u32>,
    sums: BTreeMap<(u32, u32), u32>,
}

impl Interned {
    fn new(align: u64, most_arguments: usize) -> Self {
        let (ids, maxima, sums) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Interned { align, most_arguments, list: Vec::new(), ids, maxima, sums }
    }

    fn id(&mut self, dim: Dim) -> u32 {
        let next = self.list.len() as u32;
        *self.ids.entry(dim).or_insert_with_key(|dim| {
            self.list.push(dim.clone());
            next
        })
    }

    fn max(&mut self, a: u32, b: u32) -> u32 {
        let key = (a.min(b), a.max(b));
        if a == b {
            return a;
        }
        if let Some(known) = self.maxima.get(&key) {
            return *known;
        }
        let dim = bounded(
            self.list[key.0 as usize].max_of(&self.list[key.1 as usize]),
            self.align,
            self.most_arguments,
        );
        let id = self.id(dim);
        self.maxima.insert(key, id);
        id
    }

    fn sum(&mut self, a: u32, b: u32) -> u32 {
        if let Some(known) = self.sums.get(&(a, b)) {
            return *known;
        }
        let id = self.id(bounded(
            self.list[a as usize].add(&self.list[b as usize]),
            self.align,
            self.most_arguments,
        ));
        self.sums.insert((a, b), id);
        id
    }
}

fn bounded(dim: Dim, align: u64, most_arguments: usize) -> Dim {
    if dim.function_arguments() > most_arguments { dim.linear_upper_bound(align as i64) } else { dim }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::Sym;
    use crate::plan::pack;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        /// Offsets solved at one binding are disjoint and aligned at every other.
        #[test]
        fn offsets_hold_for_every_binding(
            shapes in prop::collection::vec((0i64..90, 0i64..90, 0i64..200, 0usize..12, 1usize..5), 1..14),
            a in 1u64..100, b in 1u64..100,
        ) {
            let sym = |n| Dim::from(Sym::new(n).unwrap());
            let sizes: Vec<Dim> = shapes
                .iter()
                .map(|(x, y, c, _, _)| sym("a").mul(&Dim::from(*x)).add(&sym("b").mul(&Dim::from(*y))).add(&Dim::from(*c)))
                .map(|bytes| aligned_size(&bytes, 64))
                .collect();
            let bind = |a, b| {
                let mut bindings = Bindings::new();
                bindings.set(Sym::new("a").unwrap(), a);
                bindings.set(Sym::new("b").unwrap(), b);
                bindings
            };
            let maxima = bind(100, 100);
            let items: Vec<Item> = shapes
                .iter()
                .zip(&sizes)
                .map(|((.., start, life), size)| Item { size: size.extent(&maxima).unwrap(), start: *start, end: start + life, align: 64 })
                .collect();
            let (offsets, total) = symbolic(&items, &sizes, &pack(&items), 64, &maxima);
            for bindings in [bind(a, b), maxima, bind(1, 1)] {
                let at = |d: &Dim| d.extent(&bindings).unwrap();
                for (i, x) in items.iter().enumerate() {
                    prop_assert_eq!(at(&offsets[i]) % 64, 0);
                    prop_assert!(at(&offsets[i]) + at(&sizes[i]) <= at(&total));
                    for (j, y) in items.iter().enumerate().skip(i + 1) {
                        let together = x.start < y.end && y.start < x.end;
                        let clear = at(&offsets[i]) + at(&sizes[i]) <= at(&offsets[j])
                            || at(&offsets[j]) + at(&sizes[j]) <= at(&offsets[i]);
                        prop_assert!(!together || clear);
                    }
                }
            }
        }
    }
}
