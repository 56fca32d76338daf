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
    assert_eq!(place(&demand, least, &ring, &[]).unwrap().device_bytes(), least);
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
    let costs = Costs { nodes: vec![400; 10], link: 1000, ..Costs::default() };
    let told = predict(&demand, &placement, &costs);
    assert_eq!((told.copies, told.compute), (640_000, 4000));
    assert!((640_000..650_000).contains(&told.time), "{}", told.time);
}

#[test]
fn a_large_weight_that_cannot_be_cut_stays_alone() {
    let demand = demand(&[(1, 1000, Cut::Whole), (64, 10, TILES), (64, 10, TILES)]);
    let ring = Ring { slots: 2, slot_bytes: 100, small: 0, align: 1 };
    assert_eq!(minimum(&demand, &ring), 1000 + 2 * 100);
    let placement = place(&demand, 1200, &ring, &[]).unwrap();
    assert_eq!((placement.resident[0], placement.slot_bytes), (1, 100));
    check(&demand, &placement, 1200).unwrap();
    // Three of them cost less in a ring of two.
    let demand = self::demand(&[(1, 1000, Cut::Whole); 3]);
    assert_eq!(minimum(&demand, &ring), 2000);
}

#[test]
fn slots_shrink_when_little_is_missing() {
    let demand = demand(&[(4096, 16 << 10, TILES); 20]);
    let (ring, all) = (Ring::DEFAULT, 20u64 * (64 << 20));
    assert_eq!(resident(&demand, &ring), all);
    // A byte short: three slices of two pass through two slots.
    let placement = place(&demand, all - 1, &ring, &[]).unwrap();
    assert!(placement.moved() <= 3 * (32 << 10), "{}", placement.moved());
    // 1 MiB short: not 65 MiB, but little more than 2.
    let placement = place(&demand, all - (1 << 20), &ring, &[]).unwrap();
    assert!(placement.moved() < 5 << 19, "{}", placement.moved());
    // As short as can be: what smaller slots leave is resident, and no more is used than there is.
    let least = minimum(&demand, &ring);
    let placement = place(&demand, least, &ring, &[]).unwrap();
    assert_eq!(least, 64 << 20);
    assert!(placement.ring_bytes() < least && placement.device_bytes() <= least);
    // Of more weights, the slots are those that were asked for.
    let demand = self::demand(&[(4096, 16 << 10, TILES); 240]);
    assert_eq!(place(&demand, least, &ring, &[]).unwrap().ring_bytes(), least);
}

#[test]
fn weights_that_are_read_often_stay() {
    let mut demand = demand(&[(64, 10, TILES); 4]);
    demand.items[2].uses = 2;
    demand.uses.push(Use { item: 2, node: 4 });
    demand.nodes = 5;
    let ring = Ring { slots: 2, slot_bytes: 40, small: 0, align: 1 };
    let placement = place(&demand, 80 + 640, &ring, &[]).unwrap();
    check(&demand, &placement, 720).unwrap();
    assert_eq!(placement.resident, [0, 0, 64, 0]);
    let placement = place(&demand, 80, &ring, &[]).unwrap();
    assert_eq!(placement.moved(), 5 * 640);
}

/// Of equal weights with equal work the same part streams of any run of them. A link that has as much to do as the
/// processor idles only while the resident prefix of one weight is computed with, for two slots' time at most.
#[test]
fn streaming_is_even() {
    let demand = demand(&[(64, 10, TILES); 50]);
    let ring = Ring { slots: 2, slot_bytes: 80, small: 0, align: 1 };
    let (least, all) = (minimum(&demand, &ring), resident(&demand, &ring));
    for part in 0..20 {
        let budget = least + (all - least) * part / 20;
        let placement = place(&demand, budget, &ring, &[1; 50]).unwrap();
        let gone: Vec<u64> = placement.resident.iter().map(|r| (64 - r) * 10).collect();
        let (sum, mut so_far) = (gone.iter().sum::<u64>(), 0);
        for (index, bytes) in gone.iter().enumerate() {
            so_far += bytes;
            let even = sum * (index as u64 + 1) / 50;
            assert!(
                so_far.abs_diff(even) <= 2 * placement.slot_bytes,
                "{part}: {so_far} of {even} at {index}"
            );
        }
        // A byte a tick, as many ticks of work as there are bytes to move.
        let work = placement.moved() / 50;
        let costs = Costs { nodes: vec![work; 50], link: 1000, ..Costs::default() };
        let (told, spans) = timeline(&demand, &placement, &costs);
        let mut copies = spans.iter().filter(|s| matches!(s.what, Busy::Copy(_)));
        let first = copies.next().unwrap();
        let idle = copies.fold((0, first.end), |(idle, end), copy| (idle.max(copy.start - end), copy.end)).0;
        assert!(idle <= 2 * placement.slot_bytes, "{part}: idle for {idle} of {} ticks", told.time);
    }
}

#[test]
fn a_hundred_thousand_uses_are_placed_in_a_second() {
    let demand = demand(&[(4096, 4096, TILES); 100_000]);
    let all = resident(&demand, &Ring::DEFAULT);
    let start = std::time::Instant::now();
    for budget in [all / 2, all - 1] {
        let placement = place(&demand, budget, &Ring::DEFAULT, &[]).unwrap();
        check(&demand, &placement, budget).unwrap();
    }
    // Two of them on a machine with other work.
    assert!(start.elapsed().as_secs_f64() < 4.0, "{:?}", start.elapsed());
}

#[test]
fn budgets_are_shared_in_proportion() {
    assert_eq!(share(100, &[1000, 3000]), [25, 75]);
    assert_eq!(share(100, &[1, 1, 1]), [33, 33, 33]);
    assert_eq!(share(u64::MAX, &[u64::MAX, 0]), [u64::MAX, 0]);
    assert_eq!(share(100, &[0, 0]), [0, 0]);
    assert!(share(100, &[]).is_empty());
}

#[test]
fn budgets_are_shared_by_benefit() {
    // The second engine gains twice as much from its first 100 bytes, and nothing from more.
    let curves = [vec![(10, 1000), (110, 900), (210, 800)], vec![(20, 500), (120, 300), (220, 300)]];
    assert_eq!(by_benefit(30, &curves).unwrap(), [10, 20]);
    assert_eq!(by_benefit(130, &curves).unwrap(), [10, 120]);
    assert_eq!(by_benefit(250, &curves).unwrap(), [110, 120]);
    assert_eq!(by_benefit(10_000, &curves).unwrap(), [210, 120]);
    assert_eq!(by_benefit(29, &curves).unwrap_err().code(), "run/weight-budget");
    // A flat piece before a steep one is jumped over.
    assert_eq!(by_benefit(210, &[vec![(10, 100), (110, 100), (210, 0)]]).unwrap(), [210]);
    let demand = demand(&[(64, 10, TILES); 10]);
    let ring = Ring { slots: 2, slot_bytes: 80, small: 0, align: 1 };
    let costs = Costs { nodes: vec![100; 10], link: 1000, ..Costs::default() };
    let curve = curve(&demand, &ring, &costs, 8).unwrap();
    assert_eq!((curve[0].0, curve[8]), (160, (6400, 1000)));
    assert!(curve.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 >= pair[1].1), "{curve:?}");
}
