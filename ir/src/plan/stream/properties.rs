//! Properties of placements over random demands: kept budgets, proofs that find what is wrong, and predictions against a
//! simulation tick by tick.

use std::collections::VecDeque;

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::Id;
use crate::graph::WeightId;

fn cut() -> impl Strategy<Value = Option<Cut>> {
    prop_oneof![
        4 => (1u64..=3).prop_map(|granule| Some(Cut::Tiles { granule, parts: 1 })),
        1 => Just(Some(Cut::Tiles { granule: 1, parts: 2 })),
        1 => Just(Some(Cut::Rows)),
        1 => Just(Some(Cut::Whole)),
        1 => Just(None),
    ]
}

/// Some weights, each read once to three times in any order, each by a node of its own; some nodes read none.
fn demand() -> impl Strategy<Value = Demand> {
    let item = (1u64..40, 1u64..50, cut(), 1usize..=3);
    (prop::collection::vec(item, 1..12), any::<u64>()).prop_map(|(items, seed)| {
        let mut demand = Demand::default();
        let mut reads: Vec<usize> = Vec::new();
        for (index, (slices, slice_bytes, cut, uses)) in items.into_iter().enumerate() {
            let tiles = matches!(cut, Some(Cut::Tiles { .. }));
            let (slices, slice_bytes) = if tiles { (slices, slice_bytes) } else { (1, slices * slice_bytes) };
            // Few weights are read twice.
            let uses = if (seed >> (index % 60)).is_multiple_of(4) { uses } else { 1 };
            let weight = WeightId::from_index(index);
            demand.items.push(Item { weight, bytes: slices * slice_bytes, slices, slice_bytes, cut, uses });
            reads.extend(std::iter::repeat_n(index, uses));
        }
        reads.sort_by_key(|item| (seed.rotate_left(*item as u32 * 7) % 5, *item));
        for item in reads {
            demand.nodes += (seed.rotate_left(demand.nodes as u32) % 3 == 0) as usize;
            demand.uses.push(Use { item, node: demand.nodes });
            demand.nodes += 1;
        }
        demand
    })
}

fn ring() -> impl Strategy<Value = Ring> {
    (2usize..=4, 1u64..600, 0u64..60, prop::sample::select(vec![1u64, 8]))
        .prop_map(|(slots, slot_bytes, small, align)| Ring { slots, slot_bytes, small, align })
}

/// Budgets from the minimum to all, both included.
fn budgets(demand: &Demand, ring: &Ring) -> Vec<u64> {
    let (least, all) = (minimum(demand, ring), resident(demand, ring));
    let mut budgets: Vec<u64> = (0..=24).map(|i| least + (all - least) * i / 24).collect();
    budgets.extend([least + 1, all.saturating_sub(1)]);
    budgets.retain(|b| (least..=all).contains(b));
    budgets.sort_unstable();
    budgets.dedup();
    budgets
}

/// Steps, tick by tick: a processor that runs kernels in order and a link that serves copies in the order of their
/// requests. Returns the time of `mean` steps after `warm` others, and the ticks that each node waited in the last.
fn simulate(
    demand: &Demand,
    placement: &Placement,
    costs: &Costs,
    (warm, mean): (u64, u64),
) -> (u64, Vec<u64>) {
    /// A kernel: its node, the copy it needs, its ticks.
    struct Kernel {
        node: usize,
        needs: Option<usize>,
        ticks: u64,
    }
    let mut kernels = vec![Kernel { node: 0, needs: None, ticks: costs.step }];
    for (node, cost) in costs.nodes.iter().copied().enumerate() {
        let mine: Vec<usize> = (0..placement.copies.len())
            .filter(|i| demand.uses[placement.copies[*i].user].node == node)
            .collect();
        let part = |i: usize| {
            let copy = &placement.copies[i];
            cost * copy.count / demand.items[copy.item].slices
        };
        let resident = cost - mine.iter().map(|i| part(*i)).sum::<u64>();
        kernels.push(Kernel { node, needs: None, ticks: resident });
        for (number, index) in mine.iter().enumerate() {
            let prefix = placement.resident[placement.copies[*index].item] > 0;
            let launch = if number > 0 || prefix { costs.launch } else { 0 };
            kernels.push(Kernel { node, needs: None, ticks: launch });
            kernels.push(Kernel { node, needs: Some(*index), ticks: part(*index) });
        }
    }
    let mut here: Vec<bool> = (0..placement.copies.len()).map(|i| i < placement.slots).collect();
    let (mut queue, mut link) = (VecDeque::<usize>::new(), None::<(usize, u64)>);
    let (mut running, mut at, mut step, mut tick) = (None::<u64>, 0, 0, 0u64);
    let (mut begin, mut waited) = (0, vec![0; demand.nodes]);
    loop {
        let mut progress = true;
        while progress {
            progress = false;
            if let Some((copy, 0)) = link {
                (here[copy], link, progress) = (true, None, true);
            }
            if link.is_none()
                && let Some(copy) = queue.pop_front()
            {
                let bytes: u64 = placement.copies[copy].bytes;
                (link, progress) = (Some((copy, costs.copy + bytes * 1000 / costs.link)), true);
            }
            if running == Some(0) {
                (running, progress) = (None, true);
                // The slot is free once its kernel has ended.
                if let Some(copy) = kernels[at].needs
                    && let Some(next) = placement.next(copy)
                {
                    here[copy] = false;
                    queue.push_back(next);
                }
                at += 1;
            }
            if at == kernels.len() {
                (at, step) = (0, step + 1);
                if step == warm {
                    begin = tick;
                }
                if step == warm + mean {
                    return (tick - begin, waited);
                }
                waited.fill(0);
            }
            if running.is_none() && kernels[at].needs.is_none_or(|copy| here[copy]) {
                (running, progress) = (Some(kernels[at].ticks), true);
            }
        }
        match &mut running {
            Some(left) => *left -= 1,
            None => waited[kernels[at].node] += 1,
        }
        if let Some((_, left)) = &mut link {
            *left -= 1;
        }
        tick += 1;
        assert!(tick < 10_000_000, "the simulation is stuck");
    }
}

/// Everything that a bug in placing could get wrong, by number.
fn corrupt(placement: &mut Placement, kind: usize, at: Index) {
    let index = at.index(placement.copies.len());
    let slots = placement.slots;
    let copy = &mut placement.copies[index];
    match kind {
        0 => copy.slot = (copy.slot + 1) % slots,
        1 => copy.slot += slots,
        2 => copy.first += 1,
        3 => copy.count += 1,
        4 => copy.bytes -= 1,
        5 => copy.item += 1,
        6 => copy.after += slots,
        7 => copy.user += 1,
        8 => drop(placement.copies.remove(index)),
        9 => {
            let twin = *copy;
            placement.copies.insert(index, twin);
        }
        10 => placement.resident[copy.item] += 1,
        11 => placement.tile[copy.item] = 0,
        12 => placement.tile[copy.item] = copy.count - 1,
        13 => placement.slot_bytes = copy.bytes - 1,
        14 => placement.resident_bytes += 1,
        15 => placement.slots += 1,
        16 => placement.slots -= 1,
        _ => placement.copies.rotate_left(1),
    }
}

const CORRUPTIONS: usize = 18;

proptest! {
    #[test]
    fn every_budget_is_kept_and_more_memory_moves_less(demand in demand(), ring in ring()) {
        let least = minimum(&demand, &ring);
        prop_assert!(least <= resident(&demand, &ring));
        let mut before = u64::MAX;
        for budget in budgets(&demand, &ring) {
            let placement = place(&demand, budget, &ring, &[]).unwrap();
            check(&demand, &placement, budget).unwrap();
            prop_assert!(placement.device_bytes() <= budget);
            prop_assert!(placement.slots >= 2);
            let uses = demand.items.iter().map(|i| i.uses as u64).max().unwrap_or(1);
            if uses == 1 {
                let moved = placement.moved();
                prop_assert!(moved <= before, "{budget}: {moved} after {before}");
                // A tile more, and copies that have their slot to themselves in one placement and not in the other.
                let padding = demand.items.len() as u64 * ring.align;
                before = moved.saturating_add(placement.ring_bytes() + placement.slot_bytes + padding);
            }
        }
        let all = place(&demand, resident(&demand, &ring), &ring, &[]).unwrap();
        prop_assert!(all.is_resident() && all.moved() == 0);
        if let Some(less) = least.checked_sub(1) {
            let error = place(&demand, less, &ring, &[]).unwrap_err();
            prop_assert_eq!(error.code(), "run/weight-budget");
            prop_assert!(error.to_string().contains(&least.to_string()));
        }
    }

    #[test]
    fn predictions_are_those_of_a_simulation(
        demand in demand(),
        ring in ring(),
        part in 0u64..=24,
        seed in any::<u64>(),
        (copy, launch, step) in (0u64..4, 0u64..3, 0u64..9),
        link in 200u64..4000,
    ) {
        let (least, all) = (minimum(&demand, &ring), resident(&demand, &ring));
        let placement = place(&demand, least + (all - least) * part / 24, &ring, &[]).unwrap();
        let nodes: Vec<u64> = (0..demand.nodes).map(|n| seed.rotate_left(n as u32 * 5) % 120).collect();
        let costs = Costs { nodes, link, copy, launch, step };
        let told = predict(&demand, &placement, &costs);
        let (time, waited) = simulate(&demand, &placement, &costs, (128, 64));
        prop_assert_eq!(told.time, time / 64);
        // Where steps repeat exactly, so do their waits.
        if time == 64 * told.time && told.stalled() + told.compute + costs.step == told.time {
            prop_assert_eq!(told.stall.iter().sum::<u64>(), waited.iter().sum::<u64>());
        }
        prop_assert!(told.time >= told.copies.max(told.compute));
    }

    #[test]
    fn corrupted_placements_are_refused(
        demand in demand(),
        ring in ring(),
        part in 0u64..20,
        kind in 0..CORRUPTIONS,
        at in any::<Index>(),
    ) {
        let (least, all) = (minimum(&demand, &ring), resident(&demand, &ring));
        let mut placement = place(&demand, least + (all - least) * part / 24, &ring, &[]).unwrap();
        check(&demand, &placement, placement.device_bytes()).unwrap();
        if let Some(less) = placement.device_bytes().checked_sub(1) {
            prop_assert!(check(&demand, &placement, less).is_err(), "over budget");
        }
        let right = placement.clone();
        if !placement.copies.is_empty() {
            corrupt(&mut placement, kind, at);
            // A rotation may bring each copy to where its twin was.
            let same = placement == right;
            prop_assert!(same || check(&demand, &placement, u64::MAX).is_err(), "kind {kind} of {right:?}");
        }
    }
}
