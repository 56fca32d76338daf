//! Names of a module's weights and states, indexed: what passes that add weights look names up in.

use std::collections::HashMap;

use crate::graph::{Module, Weight, WeightId};

/// The weights of a module by name, and the names that are taken.
#[derive(Clone, Debug, Default)]
pub struct WeightNames {
    /// `None` for the name of a state.
    taken: HashMap<String, Option<WeightId>>,
}

impl WeightNames {
    /// The names of `module`.
    pub fn of(module: &Module) -> Self {
        let weights = module.weights.iter().map(|(id, w)| (w.name.clone(), Some(id)));
        let states = module.states.iter().map(|(_, s)| (s.name.clone(), None));
        WeightNames { taken: weights.chain(states).collect() }
    }

    /// The weight called `name`.
    pub fn get(&self, name: &str) -> Option<WeightId> {
        self.taken.get(name).copied().flatten()
    }

    /// Adds `weight` to the module; if its name is taken, as `name.2`, `name.3` and so on.
    pub fn add(&mut self, module: &mut Module, mut weight: Weight) -> WeightId {
        let base = weight.name.clone();
        let mut n = 1;
        while self.taken.contains_key(&weight.name) {
            n += 1;
            weight.name = format!("{base}.{n}");
        }
        let name = weight.name.clone();
        let id = module.weights.push(weight);
        self.taken.insert(name, Some(id));
        id
    }

    /// The weight of this name (or of this name with a number) that is equal to `weight`, or a new one.
    pub fn equal_or_add(&mut self, module: &mut Module, weight: Weight) -> WeightId {
        let mut name = weight.name.clone();
        let mut n = 1;
        while let Some(taken) = self.taken.get(&name) {
            if let Some(id) = taken
                && module.weights.get(*id).is_some_and(|w| w.ty == weight.ty && w.expr == weight.expr)
            {
                return *id;
            }
            n += 1;
            name = format!("{}.{n}", weight.name);
        }
        self.add(module, weight)
    }

    /// The weight of this name, or a new one.
    pub fn get_or_add(
        &mut self,
        module: &mut Module,
        name: &str,
        make: impl FnOnce(&Module) -> Weight,
    ) -> WeightId {
        match self.get(name) {
            Some(id) => id,
            None => {
                let weight = make(module);
                self.add(module, weight)
            }
        }
    }
}
