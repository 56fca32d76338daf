//! Equal things are checked once: the distinct types of a module, and the distinct ops among its nodes. In a model of
//! repeated layers both are few, whatever the number of nodes.

use std::collections::HashMap;

use crate::arena::Id;
use crate::graph::*;
use crate::ops::Op;
use crate::types::TensorType;

/// Number of a distinct type.
pub(super) type TypeId = u32;

/// Distinct types with the first value, weight or state that has each.
pub(super) struct Types<'a> {
    ids: HashMap<&'a TensorType, TypeId>,
    /// The types, by number.
    pub(super) list: Vec<&'a TensorType>,
    values: Vec<TypeId>,
    weights: Vec<TypeId>,
    states: Vec<TypeId>,
}

impl<'a> Types<'a> {
    pub(super) fn of(module: &'a Module) -> Self {
        let mut types = Types {
            ids: HashMap::new(),
            list: Vec::new(),
            values: vec![0; module.graph.values.bound()],
            weights: vec![0; module.weights.bound()],
            states: vec![0; module.states.bound()],
        };
        for (id, value) in module.graph.values.iter() {
            types.values[id.index()] = types.number(&value.ty);
        }
        for (id, weight) in module.weights.iter() {
            types.weights[id.index()] = types.number(&weight.ty);
        }
        for (id, state) in module.states.iter() {
            types.states[id.index()] = types.number(&state.ty);
        }
        types
    }

    fn number(&mut self, ty: &'a TensorType) -> TypeId {
        let next = self.list.len() as TypeId;
        *self.ids.entry(ty).or_insert_with(|| {
            self.list.push(ty);
            next
        })
    }

    /// The number of a value's type.
    pub(super) fn value(&self, id: ValueId) -> TypeId {
        self.values[id.index()]
    }

    /// The number of an operand's type.
    pub(super) fn operand(&self, operand: Operand) -> TypeId {
        match operand {
            Operand::Value(v) => self.values[v.index()],
            Operand::Weight(w) => self.weights[w.index()],
            Operand::State(s) => self.states[s.index()],
        }
    }
}

/// Most different parameters of one op that are remembered.
const REMEMBERED: usize = 64;

/// Ops that were seen, with what was found out about each.
pub(super) struct Ops<'a, T>(HashMap<&'static str, Vec<(&'a Op, T)>>);

impl<'a, T> Ops<'a, T> {
    pub(super) fn new() -> Self {
        Ops(HashMap::new())
    }

    /// What is known of an op equal to `op` for which `fits` holds.
    pub(super) fn find(&self, op: &Op, fits: impl Fn(&T) -> bool) -> Option<&T> {
        self.0
            .get(op.name())?
            .iter()
            .find(|(known, about)| fits(about) && *known == op)
            .map(|(_, about)| about)
    }

    /// Remembers `about` for `op`, if there is room.
    pub(super) fn remember(&mut self, op: &'a Op, about: T) {
        let known = self.0.entry(op.name()).or_default();
        if known.len() < REMEMBERED {
            known.push((op, about));
        }
    }
}
