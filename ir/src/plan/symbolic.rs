//! From solved offsets to offsets that hold for every shape.

use std::collections::BTreeMap;

use super::instants::{InstantSet, dense, end};
use super::item::{Item, Packing};
use crate::dim::{Bindings, Dim};
use crate::distinct::Dims;

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

/// Where no item is on top.
const NOTHING: u32 = u32::MAX;

/// Items are stacked from the bottom up on a skyline over time: at each instant the top item starts at or above the end
/// of everything below it, so an item only has to clear the tops it covers. Equal maxima are computed once.
fn stacked(
    items: &[Item],
    sizes: &[Dim],
    packing: &Packing,
    align: u64,
    most_arguments: usize,
) -> (Vec<Dim>, Dim) {
    let items = &dense(items)[..];
    // A stable sort: equal offsets go by index.
    let mut order: Vec<(u64, u32)> = packing.offsets.iter().copied().zip(0..).collect();
    order.sort_by_key(|(offset, _)| *offset);
    let mut dims = Interned::new(align, most_arguments);
    let mut known: Dims<'_, u32> = Dims::new();
    let mut number = |size| match known.get(size, 0) {
        Some(id) => *id,
        None => {
            let id = dims.id(Dim::clone(size));
            known.remember(size, 0, id);
            id
        }
    };
    let sizes: Vec<u32> = sizes.iter().map(&mut number).collect();
    let zero = dims.id(Dim::from(0i64));
    let mut ends = vec![zero; items.len()];
    let mut offsets = vec![zero; items.len()];
    let mut total = zero;
    // Skyline: a section begins at each instant of the set and has one item on top, until the next one begins.
    let last = end(items);
    let mut begins = InstantSet::up_to(last);
    let mut top = vec![NOTHING; last + 1];
    begins.insert(0);
    let top_at =
        |begins: &InstantSet, top: &[u32], at: usize| begins.previous(at).map_or(NOTHING, |at| top[at]);
    let mut tops: Vec<u32> = Vec::new();
    for i in order.into_iter().map(|(_, i)| i as usize) {
        let item = &items[i];
        if item.start >= item.end {
            continue;
        }
        tops.clear();
        let mut see = |below: u32| {
            if below != NOTHING {
                tops.push(ends[below as usize]);
            }
        };
        see(top_at(&begins, &top, item.start));
        let after = top_at(&begins, &top, item.end);
        // The item is the top of its whole lifetime from here on.
        let mut section = begins.next(item.start);
        while let Some(at) = section.filter(|at| *at <= item.end) {
            if at > item.start && at < item.end {
                see(top[at]);
            }
            begins.remove(at);
            section = begins.next(at + 1);
        }
        for (at, on_top) in [(item.start, i as u32), (item.end, after)] {
            begins.insert(at);
            top[at] = on_top;
        }
        tops.sort_unstable();
        tops.dedup();
        let offset = tops.iter().fold(zero, |offset, top| dims.max(offset, *top));
        offsets[i] = offset;
        ends[i] = dims.sum(offset, sizes[i]);
        total = dims.max(total, ends[i]);
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
