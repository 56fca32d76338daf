//! Builds a module node by node, inferring every type: what importers, tests and examples write graphs with.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::arena::Arena;
use crate::dim::{Dim, MAX_EXTENT, Sym, SymDecl};
use crate::error::{Error, Kind, Result};
use crate::graph::*;
use crate::ops::{Op, SharedOps};
use crate::types::{SharedShapes, TensorType};

/// A module under construction. Nodes run in the order they are added.
pub struct Builder {
    module: Module,
    weights: Names,
    locs: RecentLocs,
    shapes: SharedShapes,
    ops: SharedOps,
}

/// Weights by name. The table holds no names, which stand in the weights: a second copy of each would leave a hole in
/// the heap between the weights' own.
#[derive(Default)]
struct Names {
    state: RandomState,
    by_hash: HashMap<u64, WeightId>,
}

impl Names {
    /// The weight called `name`, or the free key for it.
    fn find(&self, weights: &Arena<WeightId, Weight>, name: &str) -> std::result::Result<WeightId, u64> {
        let mut key = self.state.hash_one(name);
        while let Some(id) = self.by_hash.get(&key) {
            if weights[*id].name == name {
                return Ok(*id);
            }
            key = key.wrapping_add(1);
        }
        Err(key)
    }
}

/// Source names of the last nodes: a layer's nodes share theirs.
#[derive(Default)]
struct RecentLocs(VecDeque<Loc>);

impl RecentLocs {
    /// Names that are remembered.
    const MOST: usize = 8;

    fn share(&mut self, name: &str) -> Loc {
        if let Some(known) = self.0.iter().find(|known| &***known == name) {
            return known.clone();
        }
        let loc: Loc = Arc::from(name);
        self.0.truncate(Self::MOST - 1);
        self.0.push_front(loc.clone());
        loc
    }
}

impl Builder {
    /// An empty module called `name`.
    pub fn new(name: &str) -> Self {
        Builder {
            module: Module::new(name),
            weights: Names::default(),
            locs: RecentLocs::default(),
            shapes: SharedShapes::default(),
            ops: SharedOps::default(),
        }
    }

    /// Declares a symbol with its range and typical value.
    pub fn dim(&mut self, name: &str, min: u64, max: u64, hint: Option<u64>) -> Result<Dim> {
        let sym = Sym::new(name).ok_or_else(|| {
            Error::new(Kind::BadInput, "ir/bad-name", format!("`{name}` is no symbol name"))
        })?;
        if min > max || max > MAX_EXTENT as u64 {
            return Err(Error::new(
                Kind::BadInput,
                "ir/bad-range",
                format!("{sym} has the empty range {min}..={max}"),
            ));
        }
        self.module.dims.push(SymDecl { sym, min, max, multiple: 1, hint: hint.map(|h| h.clamp(min, max)) });
        Ok(Dim::from(sym))
    }

    /// Adds a graph input.
    pub fn input(&mut self, name: &str, mut ty: TensorType) -> Operand {
        self.shapes.share(&mut ty);
        let value =
            self.module.graph.values.push(Value { ty, def: Def::Input(name.to_string()), place: None });
        self.module.graph.inputs.push(value);
        Operand::Value(value)
    }

    /// Adds a weight, or finds the one of this name.
    pub fn weight(&mut self, name: &str, mut ty: TensorType, expr: WeightExpr) -> Operand {
        let key = match self.weights.find(&self.module.weights, name) {
            Ok(id) => return Operand::Weight(id),
            Err(key) => key,
        };
        self.shapes.share(&mut ty);
        let id = self.module.weights.push(Weight { name: name.to_string(), ty, expr, stream: None });
        self.weights.by_hash.insert(key, id);
        Operand::Weight(id)
    }

    /// Adds a state.
    pub fn state(&mut self, name: &str, mut ty: TensorType) -> Operand {
        self.shapes.share(&mut ty);
        Operand::State(self.module.states.push(State { name: name.to_string(), ty }))
    }

    /// Adds a node and returns its results.
    pub fn node(&mut self, op: impl Into<Op>, operands: &[Operand], loc: &str) -> Result<Vec<Operand>> {
        let loc = self.locs.share(loc);
        let node = self.module.new_node(self.ops.share(op.into()), operands, [loc])?;
        let Graph { nodes, values, order, .. } = &mut self.module.graph;
        order.push(node);
        let shared = |v: &ValueId| {
            self.shapes.share(&mut values[*v].ty);
            Operand::Value(*v)
        };
        Ok(nodes[node].results.iter().map(shared).collect())
    }

    /// Adds a node with one result.
    pub fn one(&mut self, op: impl Into<Op>, operands: &[Operand], loc: &str) -> Result<Operand> {
        Ok(self.node(op, operands, loc)?[0])
    }

    /// Names a value as a graph output.
    pub fn output(&mut self, name: &str, operand: Operand) -> Result<()> {
        let Operand::Value(value) = operand else {
            return Err(Error::new(Kind::BadInput, "ir/bad-output", format!("output `{name}` is no value")));
        };
        self.module.graph.outputs.push(Output { name: name.to_string(), value });
        Ok(())
    }

    /// The type of an operand.
    pub fn type_of(&self, operand: Operand) -> &TensorType {
        self.module.operand_type(operand)
    }

    /// The finished module.
    pub fn finish(self) -> Module {
        self.module
    }
}
