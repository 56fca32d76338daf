//! One weight budget for several sessions.

use millrace_ir::cost::Sustained;
use millrace_ir::plan::stream::{by_benefit, costs, curve, share, times};
use millrace_ir::{Bindings, Error, Kind, Result};

use crate::budget::WeightBudget;
use crate::session::Session;

/// How sessions share a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// In proportion to the streamable bytes of each.
    Proportional,
    /// Each its minimum, and the rest where a byte saves most of the predicted time of a typical step.
    ByBenefit,
}

/// Points of the curves that [`Share::ByBenefit`] looks at.
const POINTS: u64 = 32;

/// Bytes of `budget` for each of `sessions`; nothing changes yet. Their sum does not exceed the budget.
///
/// # Errors
/// `run/weight-budget` if a part is under the minimum of its session; it names both.
pub fn shares(sessions: &[&mut Session<'_>], budget: u64, how: Share) -> Result<Vec<u64>> {
    let parts = match how {
        Share::Proportional => {
            let streamable: Vec<u64> = sessions.iter().map(|s| s.total_device_budget()).collect();
            share(budget, &streamable)
        }
        Share::ByBenefit => {
            let one = |session: &&mut Session<'_>| {
                let module = session.engine().module();
                let device = Sustained::of_target(module.target.as_deref().unwrap_or(""));
                let times = times(module, &device, &Bindings::hints(&module.dims), &[]);
                curve(session.placement().0, &session.ring(), &costs(&device, times), POINTS)
            };
            by_benefit(budget, &sessions.iter().map(one).collect::<Result<Vec<_>>>()?)?
        }
    };
    for (index, (session, part)) in sessions.iter().zip(&parts).enumerate() {
        let least = session.minimum_budget();
        if *part < least {
            let message = format!("of {budget} bytes session {index} gets {part}, its minimum is {least}");
            return Err(Error::new(Kind::Usage, "run/weight-budget", message)
                .hint("use a larger joint budget, or share it by benefit"));
        }
    }
    Ok(parts)
}

/// Gives each session its part of `budget`, those that give memory up before those that take it, so that together they never
/// hold more than before or than the budget. Returns the parts. If one cannot take its part, all go back to where they were.
///
/// # Errors
/// As [`shares`] and [`Session::set_weight_budget`].
pub fn set_joint_budget(sessions: &mut [&mut Session<'_>], budget: u64, how: Share) -> Result<Vec<u64>> {
    let parts = shares(sessions, budget, how)?;
    let mut order: Vec<usize> = (0..sessions.len()).collect();
    order.sort_by_key(|i| i128::from(parts[*i]) - i128::from(sessions[*i].device_budget()));
    let mut changed: Vec<(usize, WeightBudget)> = Vec::new();
    for index in order {
        let before = sessions[index].current_weight_budget();
        if let Err(error) = sessions[index].set_weight_budget(WeightBudget::Bytes(parts[index])) {
            for (index, before) in changed.into_iter().rev() {
                // What a session had fitted; if it does not any more, the session keeps what it has.
                let _ = sessions[index].set_weight_budget(before);
            }
            return Err(error);
        }
        changed.push((index, before));
    }
    Ok(parts)
}
