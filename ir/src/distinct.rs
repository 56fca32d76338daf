//! Equal things are checked once: the distinct types of a module, and the distinct ops among its nodes. In a model of
//! repeated layers both are few, whatever the number of nodes.

use std::collections::HashMap;
use std::mem::{Discriminant, discriminant};

use crate::arena::Id;
use crate::dim::Dim;
use crate::graph::*;
use crate::ops::{Op, SharedOp};
use crate::types::{TensorType, mix};

/// Number of a distinct type.
pub type TypeId = u32;

/// The number of a type that nobody has.
const NOBODY: TypeId = TypeId::MAX;

/// Most types of one fingerprint that are compared; a forged module with more of them gains equal types with two numbers.
const COMPARED: usize = 16;

/// Shapes by address that are remembered; a power of two.
const SHAPES: usize = 256;

/// The types of a module's values, weights and states by number: equal numbers are equal types.
pub struct Types<'a> {
    by_fingerprint: HashMap<u64, Vec<TypeId>>,
    /// The last type whose shape had an address that falls here. Types of repeated layers share their shapes, so that
    /// most need no comparison; the borrow keeps every shape where it is.
    by_address: Vec<Option<(&'a TensorType, TypeId)>>,
    list: Vec<&'a TensorType>,
    values: Vec<TypeId>,
    weights: Vec<TypeId>,
    states: Vec<TypeId>,
}

impl<'a> Types<'a> {
    /// The types of `module`.
    pub fn of(module: &'a Module) -> Self {
        let mut types = Types::of_declarations(module);
        for (id, value) in module.graph.values.iter() {
            types.add(id, &value.ty);
        }
        types
    }

    /// The types of `module`'s weights and states; those of its values are to be added.
    pub(crate) fn of_declarations(module: &'a Module) -> Self {
        let mut types = Types {
            by_fingerprint: HashMap::new(),
            by_address: vec![None; SHAPES],
            list: Vec::new(),
            values: vec![0; module.graph.values.bound()],
            weights: vec![NOBODY; module.weights.bound()],
            states: vec![NOBODY; module.states.bound()],
        };
        for (id, weight) in module.weights.iter() {
            types.weights[id.index()] = types.number(&weight.ty);
        }
        for (id, state) in module.states.iter() {
            types.states[id.index()] = types.number(&state.ty);
        }
        types
    }

    /// Adds the type of a value.
    pub(crate) fn add(&mut self, id: ValueId, ty: &'a TensorType) {
        self.values[id.index()] = self.number(ty);
    }

    /// Adds the type of a value that has that of another one.
    pub(crate) fn add_copy(&mut self, from: ValueId, to: ValueId) {
        self.values[to.index()] = self.values[from.index()];
    }

    /// The number of the type of a weight or state, if it exists.
    pub(crate) fn declared(&self, operand: Operand) -> Option<TypeId> {
        let ty = match operand {
            Operand::Value(_) => None,
            Operand::Weight(w) => self.weights.get(w.index()),
            Operand::State(s) => self.states.get(s.index()),
        };
        ty.copied().filter(|ty| *ty != NOBODY)
    }

    fn number(&mut self, ty: &'a TensorType) -> TypeId {
        let address = ty.shape.address();
        // Allocations are multiples of 16 bytes apart.
        let slot = ((address >> 4) ^ (address >> 12) ^ ty.dtype as usize) % SHAPES;
        if let Some((known, id)) = self.by_address[slot]
            && known.dtype == ty.dtype
            && known.shape.is_shared_with(&ty.shape)
        {
            return id;
        }
        let id = self.number_by_value(ty);
        self.by_address[slot] = Some((ty, id));
        id
    }

    fn number_by_value(&mut self, ty: &'a TensorType) -> TypeId {
        let known = self.by_fingerprint.entry(ty.fingerprint()).or_default();
        if let Some(id) = known.iter().take(COMPARED).find(|id| self.list[**id as usize] == ty) {
            return *id;
        }
        let id = self.list.len() as TypeId;
        self.list.push(ty);
        known.push(id);
        id
    }

    /// The distinct types, by number.
    pub fn list(&self) -> &[&'a TensorType] {
        &self.list
    }

    /// The number of a value's type.
    pub fn value(&self, id: ValueId) -> TypeId {
        self.values[id.index()]
    }

    /// The number of an operand's type.
    pub fn operand(&self, operand: Operand) -> TypeId {
        match operand {
            Operand::Value(v) => self.values[v.index()],
            Operand::Weight(w) => self.weights[w.index()],
            Operand::State(s) => self.states[s.index()],
        }
    }
}

/// What was found out about dims, each with a number that makes it another key.
pub struct Dims<'a, T> {
    by_fingerprint: HashMap<u64, Vec<u32>>,
    /// The last entry whose dim is in memory at an address that falls here. Dims of repeated layers share their terms.
    by_address: Vec<u32>,
    list: Vec<(&'a Dim, u64, T)>,
}

/// Dims by address that are remembered; a power of two.
const ADDRESSES: usize = 256;

impl<'a, T> Dims<'a, T> {
    /// Nothing is known.
    pub fn new() -> Self {
        Dims { by_fingerprint: HashMap::new(), by_address: vec![u32::MAX; ADDRESSES], list: Vec::new() }
    }

    fn slot(dim: &Dim, number: u64) -> usize {
        // The upper bits of a product depend on all bits of its factors.
        (mix(dim.address(), number) >> 32) as usize % ADDRESSES
    }

    /// What is known of `dim` with `number`.
    pub fn get(&self, dim: &Dim, number: u64) -> Option<&T> {
        if let Some((known, n, about)) = self.list.get(self.by_address[Self::slot(dim, number)] as usize)
            && *n == number
            && known.is_shared_with(dim)
        {
            return Some(about);
        }
        let known = self.by_fingerprint.get(&mix(dim.fingerprint(), number))?;
        let mut known = known.iter().map(|at| &self.list[*at as usize]);
        known.find(|(d, n, _)| *n == number && *d == dim).map(|(_, _, about)| about)
    }

    /// Remembers `about` for `dim` with `number`, unless many others have its fingerprint.
    pub fn remember(&mut self, dim: &'a Dim, number: u64, about: T) {
        let known = self.by_fingerprint.entry(mix(dim.fingerprint(), number)).or_default();
        if known.len() < COMPARED {
            let at = self.list.len() as u32;
            known.push(at);
            self.by_address[Self::slot(dim, number)] = at;
            self.list.push((dim, number, about));
        }
    }
}

impl<T> Default for Dims<'_, T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Most different parameters of one kind of op that are remembered.
const REMEMBERED: usize = 64;

/// Ops of one kind with what was found out about each.
type Kind<'a, T> = (Discriminant<Op>, Vec<(&'a SharedOp, T)>);

/// Ops that were seen, with what was found out about each.
pub(crate) struct Ops<'a, T>(Vec<Kind<'a, T>>);

impl<'a, T> Ops<'a, T> {
    pub(crate) fn new() -> Self {
        Ops(Vec::new())
    }

    /// What is known of an op equal to `op` for which `fits` holds.
    pub(crate) fn find(&self, op: &SharedOp, fits: impl Fn(&T) -> bool) -> Option<&T> {
        let kind = discriminant(&**op);
        let (_, known) = self.0.iter().find(|(k, _)| *k == kind)?;
        known.iter().find(|(known, about)| fits(about) && *known == op).map(|(_, about)| about)
    }

    /// Remembers `about` for `op`, if there is room.
    pub(crate) fn remember(&mut self, op: &'a SharedOp, about: T) {
        let kind = discriminant(&**op);
        let at = self.0.iter().position(|(k, _)| *k == kind).unwrap_or_else(|| {
            self.0.push((kind, Vec::new()));
            self.0.len() - 1
        });
        if self.0[at].1.len() < REMEMBERED {
            self.0[at].1.push((op, about));
        }
    }
}
