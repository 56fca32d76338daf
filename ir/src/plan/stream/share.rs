//! One budget for several engines.

use super::demand::Demand;
use super::place::{minimum, place, resident};
use super::predict::{Costs, predict};
use super::{Placement, Ring};
use crate::error::{Error, Kind, Result};

/// `budget` split in proportion to the streamable bytes of each engine: `floor(s_i / sum(s) x budget)`. The sum of the
/// parts never exceeds the budget.
pub fn share(budget: u64, streamable: &[u64]) -> Vec<u64> {
    let sum: u128 = streamable.iter().map(|s| *s as u128).sum();
    let part = |s: &u64| (*s as u128 * budget as u128).checked_div(sum).unwrap_or(0) as u64;
    streamable.iter().map(part).collect()
}

/// What a budget buys: bytes on the device and predicted step time at `points` budgets from the minimum to all weights,
/// in rising order.
///
/// # Errors
/// As [`place`].
pub fn curve(demand: &Demand, ring: &Ring, costs: &Costs, points: u64) -> Result<Vec<(u64, u64)>> {
    let all = resident(demand, ring);
    let least = minimum(demand, ring).min(all);
    let work = super::work(demand, &costs.nodes);
    let mut curve: Vec<(u64, u64)> = Vec::new();
    for point in 0..=points.max(1) {
        let budget = least + ((all - least) as u128 * point as u128 / points.max(1) as u128) as u64;
        let placement: Placement = place(demand, budget, ring, &work)?;
        let found = (budget, predict(demand, &placement, costs).time);
        if curve.last().is_none_or(|last| last.0 < found.0) {
            curve.push(found);
        }
    }
    Ok(curve)
}

/// `budget` split among engines so that it saves most time: every engine gets its minimum, the rest goes where a byte
/// saves most, as told by the engines' curves ([`curve`]; times may be weighted by how often an engine runs).
///
/// # Errors
/// `run/weight-budget` if the sum of the minima exceeds the budget.
pub fn by_benefit(budget: u64, curves: &[Vec<(u64, u64)>]) -> Result<Vec<u64>> {
    let mut at = vec![0usize; curves.len()];
    let bytes = |at: &[usize]| -> Vec<u64> {
        curves.iter().zip(at).map(|(curve, at)| curve.get(*at).map_or(0, |point| point.0)).collect()
    };
    let least = bytes(&at).into_iter().fold(0u64, u64::saturating_add);
    let Some(mut left) = budget.checked_sub(least) else {
        let message =
            format!("a joint weight budget of {budget} bytes is under the sum {least} of the minima");
        return Err(Error::new(Kind::Usage, "run/weight-budget", message)
            .hint(format!("use a budget of at least {least} bytes, or fewer engines")));
    };
    loop {
        // The step to any later point of any curve that saves most time for each byte; the first among equals.
        let mut best: Option<(u128, u128, usize, usize)> = None;
        for (engine, curve) in curves.iter().enumerate() {
            let Some(here) = curve.get(at[engine]) else { continue };
            for (point, there) in curve.iter().enumerate().skip(at[engine] + 1) {
                let (cost, saved) = (there.0 - here.0, here.1.saturating_sub(there.1));
                if cost > left || saved == 0 {
                    continue;
                }
                let (cost, saved) = (cost.max(1) as u128, saved as u128);
                if best.is_none_or(|(s, c, ..)| saved * c > s * cost) {
                    best = Some((saved, cost, engine, point));
                }
            }
        }
        let Some((_, cost, engine, point)) = best else { return Ok(bytes(&at)) };
        left -= cost as u64;
        at[engine] = point;
    }
}
