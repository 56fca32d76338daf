//! From solved offsets to offsets that hold for every shape.

use super::item::{Item, Packing};
use crate::dim::Dim;

/// Most arguments of a `max` before it is replaced by a simpler upper bound.
const MOST_ARGUMENTS: usize = 6;

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
pub fn symbolic(items: &[Item], sizes: &[Dim], packing: &Packing, align: u64) -> (Vec<Dim>, Dim) {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|i| (packing.offsets[*i], *i));
    let zero = Dim::from(0i64);
    let mut offsets = vec![zero.clone(); items.len()];
    let mut total = zero.clone();
    for (rank, &i) in order.iter().enumerate() {
        let mut offset = zero.clone();
        for &j in &order[..rank] {
            if items[j].start < items[i].end && items[i].start < items[j].end {
                offset = bounded(offset.max_of(&offsets[j].add(&sizes[j])), align);
            }
        }
        total = bounded(total.max_of(&offset.add(&sizes[i])), align);
        offsets[i] = offset;
    }
    (offsets, total)
}

fn bounded(dim: Dim, align: u64) -> Dim {
    if dim.function_arguments() > MOST_ARGUMENTS { dim.linear_upper_bound(align as i64) } else { dim }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::{Bindings, Sym};
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
            let (offsets, total) = symbolic(&items, &sizes, &pack(&items), 64);
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
