//! Plays a step of the steady state against costs.

use super::demand::Demand;
use super::place::Placement;

/// Costs in nanoseconds, or in any unit if all agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Costs {
    /// By node in execution order: computing it with all its weights resident.
    pub nodes: Vec<u64>,
    /// Bytes that the link moves in a thousand nanoseconds.
    pub link: u64,
    /// What each copy costs besides.
    pub copy: u64,
    /// What each step costs besides.
    pub step: u64,
}

/// A step of the steady state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// Its time.
    pub time: u64,
    /// Time of its nodes alone.
    pub compute: u64,
    /// Time of its copies alone.
    pub copies: u64,
    /// By node: how long it waited for copies.
    pub stall: Vec<u64>,
}

/// The time of a step that follows another.
pub fn predict(demand: &Demand, placement: &Placement, costs: &Costs) -> Prediction {
    let copies = &placement.copies;
    let moves = copies.len() > placement.slots;
    let length = |index: usize| costs.copy + copies[index].bytes.saturating_mul(1000) / costs.link.max(1);
    let mut arrived = vec![0u64; copies.len()];
    let (mut now, mut link) = (0u64, 0u64);
    let mut time = 0;
    let mut stall = vec![0; demand.nodes];
    for step in 0..3 {
        let begin = now;
        now += costs.step;
        stall.iter_mut().for_each(|s| *s = 0);
        let mut next = 0;
        let mut user = 0;
        for node in 0..demand.nodes {
            let cost = costs.nodes.get(node).copied().unwrap_or(0);
            let mut left = cost;
            while let Some(read) = demand.uses.get(user).filter(|u| u.node == node) {
                let slices = demand.items[read.item].slices.max(1);
                while let Some(copy) = copies.get(next).filter(|c| c.user == user) {
                    if step > 0 || next >= placement.slots {
                        stall[node] += arrived[next].saturating_sub(now);
                        now = now.max(arrived[next]);
                    }
                    let part = (cost as u128 * copy.count as u128 / slices as u128) as u64;
                    now += part.min(left);
                    left -= part.min(left);
                    if moves && let Some(following) = placement.next(next) {
                        link = link.max(now) + length(following);
                        arrived[following] = link;
                    }
                    next += 1;
                }
                user += 1;
            }
            now += left;
        }
        time = now - begin;
    }
    let moved = if moves { (0..copies.len()).map(length).sum() } else { 0 };
    Prediction { time, compute: costs.nodes.iter().sum(), copies: moved, stall }
}
