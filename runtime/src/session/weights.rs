//! Weight budgets of a session.

use std::ops::{Deref, DerefMut};

use millrace_ir::Result;
use millrace_ir::checkpoint::TensorSource;
use millrace_ir::plan::stream::{self, Demand, Placement, Ring};

use super::allocation::Need;
use super::{Backend, Session, on_backend};
use crate::budget::{Residency, WeightBudget};
use crate::ledger::Class;

impl<'e> Session<'e> {
    /// Enters the weights into the ledger.
    pub(super) fn note_weights(&mut self) {
        let placement = &self.residency.placement;
        let (mut resident, mut ring) = (placement.resident_bytes, placement.ring_bytes());
        match &self.backend {
            Backend::Cpu(cpu) => (resident, ring) = cpu.weight_bytes().unwrap_or((resident, ring)),
            Backend::Cuda(cuda) => {
                (resident, ring) = cuda.weight_bytes();
                self.ledger.set(Class::HostWeights, cuda.host_weight_bytes());
            }
        }
        self.ledger.set(Class::Weights, resident);
        self.ledger.set(Class::Ring, ring);
    }

    /// The placement of the weights under `budget`.
    pub(super) fn placement_for(&self, budget: WeightBudget) -> Result<Placement> {
        self.residency.place(budget, || self.room_for_weights(&self.need_of_all()?))
    }

    /// Bytes that weights could take: what is free now and under the cap, besides what the rest of the session takes with
    /// `need`.
    pub(super) fn room_for_weights(&self, need: &Need) -> Result<u64> {
        let weights = |c: &Class| matches!(c, Class::Weights | Class::Ring);
        let required = self.required_with(need)?;
        let rest: u64 = required.iter().filter(|(c, _)| !weights(c)).map(|(_, b)| b).sum();
        let held = |c: &Class| self.ledger.now(*c);
        let own = |c: &&Class| c.is_own() && !c.is_on_host();
        let own: u64 = Class::ALL.iter().filter(own).map(held).sum();
        let (free, _) = self.memory()?;
        Ok(free.saturating_add(own).min(self.cap.unwrap_or(u64::MAX)).saturating_sub(rest))
    }

    /// Bytes of weights that may stream; 0 for an engine compiled without weight streaming.
    pub fn total_device_budget(&self) -> u64 {
        self.residency.streamable()
    }

    /// Bytes that weights and their ring take now.
    pub fn device_budget(&self) -> u64 {
        self.residency.placement.device_bytes()
    }

    /// The least bytes that weights and their ring can take.
    pub fn minimum_budget(&self) -> u64 {
        let Residency { demand, ring, .. } = &self.residency;
        stream::minimum(demand, ring).min(stream::resident(demand, ring))
    }

    /// The bytes that [`WeightBudget::Auto`] would take now.
    ///
    /// # Errors
    /// `run/not-streamable`, `cuda/poisoned` on a device that has failed.
    pub fn automatic_budget(&self, reserve: u64) -> Result<u64> {
        self.placement_for(WeightBudget::Auto { reserve }).map(|p| p.device_bytes())
    }

    /// The ring that weights stream through, as far as a budget lets them.
    pub fn ring(&self) -> Ring {
        self.residency.ring
    }

    /// The budget in force.
    pub fn current_weight_budget(&self) -> WeightBudget {
        self.residency.budget
    }

    /// What is resident and what streams, with the demand whose items and uses it counts.
    pub fn placement(&self) -> (&Demand, &Placement) {
        (&self.residency.demand, &self.residency.placement)
    }

    /// Changes the weight budget between two steps: weights move, results and states stay as they are. Returns the placement
    /// that took effect.
    ///
    /// # Errors
    /// `run/weight-budget` under the minimum, `run/not-streamable` for engines without streamable weights, `run/cap` and
    /// `run/out-of-memory`; the session then stays as it was. If weights could not even go back to where they were, steps
    /// answer `run/not-placed` until a budget takes effect.
    pub fn set_weight_budget(&mut self, budget: WeightBudget) -> Result<&Placement> {
        let placement = self.placement_for(budget)?;
        if placement != self.residency.placement || !self.placed {
            if let Some(cap) = self.cap {
                let before = std::mem::replace(&mut self.residency.placement, placement.clone());
                let fits = self.check_cap_at(cap, &self.standing_need()?);
                self.residency.placement = before;
                fits?;
            }
            self.move_weights(placement)?;
        }
        self.residency.budget = budget;
        Ok(&self.residency.placement)
    }

    /// Makes `placement` take effect, or leaves everything as it was if that is possible.
    pub(super) fn move_weights(&mut self, placement: Placement) -> Result<()> {
        let before = std::mem::replace(&mut self.residency.placement, placement);
        let moved = self.bring_weights();
        if moved.is_err() {
            self.residency.placement = before;
            self.placed = self.bring_weights().is_ok();
        } else {
            self.placed = true;
        }
        moved
    }

    /// Brings the weights to where `residency` has them.
    pub(super) fn bring_weights(&mut self) -> Result<()> {
        let source = self.source.as_ref().map(|c| c as &dyn TensorSource);
        let moved = on_backend!(&mut self.backend, b => b.place(self.engine, source, &self.residency));
        self.note_weights();
        self.note_device_memory();
        moved
    }

    /// [`Session::set_weight_budget`] until the guard is dropped.
    ///
    /// # Errors
    /// As there.
    pub fn weight_budget(&mut self, budget: WeightBudget) -> Result<WeightBudgetGuard<'_, 'e>> {
        let before = self.residency.budget;
        self.set_weight_budget(budget)?;
        Ok(WeightBudgetGuard { session: self, before })
    }
}

/// Restores a session's weight budget when dropped.
pub struct WeightBudgetGuard<'s, 'e> {
    session: &'s mut Session<'e>,
    before: WeightBudget,
}

impl<'e> Deref for WeightBudgetGuard<'_, 'e> {
    type Target = Session<'e>;
    fn deref(&self) -> &Session<'e> {
        self.session
    }
}

impl DerefMut for WeightBudgetGuard<'_, '_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.session
    }
}

impl Drop for WeightBudgetGuard<'_, '_> {
    fn drop(&mut self) {
        // Going back can fail for lack of memory; the session then keeps the budget and stays usable.
        let _ = self.session.set_weight_budget(self.before);
    }
}
