use super::*;
use crate::Id;
use crate::graph::WeightId;

/// Items of `(slices, slice bytes, cut)`, each used once, in order.
fn demand(items: &[(u64, u64, Cut)]) -> Demand {
    let item = |(index, (slices, slice_bytes, cut)): (usize, &(u64, u64, Cut))| Item {
        weight: WeightId::from_index(index),
        bytes: slices * slice_bytes,
        slices: *slices,
        slice_bytes: *slice_bytes,
        cut: Some(*cut),
        uses: 1,
    };
    Demand {
        items: items.iter().enumerate().map(item).collect(),
        uses: (0..items.len()).map(|item| Use { item, node: item }).collect(),
        nodes: items.len(),
    }
}

const TILES: Cut = Cut::Tiles { granule: 2, parts: 1 };

#[test]
fn every_budget_is_kept_and_proved() {
    let demand = demand(&[
        (100, 10, Cut::Rows),
        (64, 16, TILES),
        (30, 40, TILES),
        (1, 70, Cut::Whole),
        (1, 5, Cut::Whole),
    ]);
    let ring = Ring { slots: 2, slot_bytes: 256, small: 16, align: 8 };
    let (least, all) = (minimum(&demand, &ring), resident(&demand, &ring));
    assert_eq!(least, 2 * 256 + 8);
    let mut before = u64::MAX;
    for budget in least..=all {
        let placement = place(&demand, budget, &ring, &[]).unwrap();
        check(&demand, &placement, budget).unwrap();
        assert!(placement.moved() <= before, "{budget}: {} > {before}", placement.moved());
        before = placement.moved() + 256;
    }
    assert!(place(&demand, all, &ring, &[]).unwrap().is_resident());
    let error = place(&demand, least - 1, &ring, &[]).unwrap_err();
    assert!(error.to_string().contains(&least.to_string()), "{error}");
}

#[test]
fn the_link_bounds_a_step_of_little_work() {
    let demand = demand(&[(64, 1000, TILES); 10]);
    let ring = Ring { slots: 2, slot_bytes: 16000, small: 0, align: 1 };
    let placement = place(&demand, minimum(&demand, &ring), &ring, &[]).unwrap();
    assert_eq!(placement.moved(), 640_000);
    let costs = Costs { nodes: vec![400; 10], link: 1000, copy: 0, step: 0 };
    let told = predict(&demand, &placement, &costs);
    assert_eq!((told.copies, told.compute), (640_000, 4000));
    assert!((640_000..650_000).contains(&told.time), "{}", told.time);
}
