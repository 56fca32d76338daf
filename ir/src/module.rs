//! Queries and edits of modules that keep their tables consistent.

use crate::arena::Arena;
use crate::error::{Error, Kind, Result};
use crate::graph::*;
use crate::ops::SharedOp;
use crate::types::TensorType;

impl Module {
    /// An empty imported module with one empty graph `main`.
    pub fn new(name: &str) -> Self {
        Module {
            name: name.to_string(),
            phase: Phase::Imported,
            target: None,
            dims: Vec::new(),
            weights: Arena::new(),
            states: Arena::new(),
            arenas: Arena::new(),
            kernels: Arena::new(),
            graph: Graph { name: "main".to_string(), ..Graph::default() },
        }
    }

    /// The type of an operand.
    pub fn operand_type(&self, operand: Operand) -> &TensorType {
        match operand {
            Operand::Value(v) => &self.graph.values[v].ty,
            Operand::Weight(w) => &self.weights[w].ty,
            Operand::State(s) => &self.states[s].ty,
        }
    }

    /// The types of a node's operands.
    pub fn operand_types(&self, operands: &[Operand]) -> Vec<TensorType> {
        operands.iter().map(|o| self.operand_type(*o).clone()).collect()
    }

    /// Infers the results of a node and adds it to the arenas without a place in the order.
    pub fn new_node(
        &mut self,
        op: impl Into<SharedOp>,
        operands: impl Into<Operands>,
        loc: impl Into<Locs>,
    ) -> Result<NodeId> {
        let (op, operands, loc) = (op.into(), operands.into(), loc.into());
        let types = self.operand_types(&operands);
        let results = op.infer(&types).map_err(|message| {
            Error::new(Kind::BadInput, "ir/ill-typed", format!("`{}` {message}", op.name()))
                .at(loc.first().map_or("graph", |l| l))
        })?;
        let node = self.graph.nodes.push(Node {
            op,
            operands,
            results: Results::new(),
            loc,
            kernel: None,
            joined: false,
        });
        let ids = results
            .into_iter()
            .enumerate()
            .map(|(index, ty)| {
                self.graph.values.push(Value { ty, def: Def::Node { node, index }, place: None })
            })
            .collect();
        self.graph.nodes[node].results = ids;
        Ok(node)
    }

    /// The state a value is a version of, following writes back to the state operand.
    pub fn state_of(&self, operand: Operand) -> Option<StateId> {
        let mut at = operand;
        // Each step goes to an operand of the defining node; a chain longer than the graph is a cycle.
        for _ in 0..=self.graph.nodes.len() {
            match at {
                Operand::State(state) => return Some(state),
                Operand::Weight(_) => return None,
                Operand::Value(value) => {
                    let Def::Node { node, index: 0 } = self.graph.values.get(value)?.def else { return None };
                    let node = self.graph.nodes.get(node)?;
                    if !node.op.traits().writes_state {
                        return None;
                    }
                    at = *node.operands.first()?;
                }
            }
        }
        None
    }

    /// Bytes of all weights that nodes read, in the order of first use, each once.
    pub fn used_weights(&self) -> Vec<WeightId> {
        let mut seen = vec![false; self.weights.bound()];
        let mut used = Vec::new();
        for node in &self.graph.order {
            for operand in &self.graph.nodes[*node].operands {
                if let Operand::Weight(w) = operand
                    && !std::mem::replace(&mut seen[crate::Id::index(*w)], true)
                {
                    used.push(*w);
                }
            }
        }
        used
    }

    /// Renumbers nodes and values in execution order and drops tombstones and unreferenced weights, states
    /// and kernels.
    pub fn compact(&mut self) {
        use crate::arena::Id;
        let Module {
            name: _,
            phase: _,
            target: _,
            dims: _,
            weights,
            states: _,
            arenas: _,
            kernels: _,
            graph,
        } = self;
        if is_compact(graph) {
            compact_weights(weights, graph);
            return;
        }
        let Graph { name: _, inputs, outputs, nodes, values, order } = graph;
        let mut new_values = Arena::new();
        let mut map = vec![None; values.bound()];
        let mut new_nodes = Arena::new();
        for input in inputs.iter_mut() {
            if let Some(value) = values.remove(*input) {
                let id: ValueId = new_values.push(value);
                map[input.index()] = Some(id);
                *input = id;
            }
        }
        for id in std::mem::take(order) {
            let Some(mut node) = nodes.remove(id) else { continue };
            for operand in &mut node.operands {
                if let Operand::Value(v) = operand
                    && let Some(new) = map[v.index()]
                {
                    *v = new;
                }
            }
            let new_id = NodeId::from_index(new_nodes.bound());
            for result in &mut node.results {
                if let Some(mut value) = values.remove(*result) {
                    if let Def::Node { node, .. } = &mut value.def {
                        *node = new_id;
                    }
                    let id = new_values.push(value);
                    map[result.index()] = Some(id);
                    *result = id;
                }
            }
            order.push(new_nodes.push(node));
        }
        for output in outputs.iter_mut() {
            if let Some(new) = map.get(output.value.index()).copied().flatten() {
                output.value = new;
            }
        }
        *values = new_values;
        *nodes = new_nodes;
        compact_weights(weights, &mut self.graph);
    }
}

/// Whether [`Module::compact`] would leave nodes and values as they are.
fn is_compact(graph: &Graph) -> bool {
    use crate::arena::Id;
    let Graph { name: _, inputs, outputs: _, nodes, values, order } = graph;
    let mut next = 0..values.bound();
    nodes.len() == nodes.bound()
        && values.len() == values.bound()
        && order.len() == nodes.len()
        && inputs.iter().all(|v| next.next() == Some(v.index()))
        && order.iter().enumerate().all(|(at, id)| {
            id.index() == at && nodes[*id].results.iter().all(|v| next.next() == Some(v.index()))
        })
        && next.is_empty()
}

/// Keeps weights that a node reads, directly or through another weight's expression.
fn compact_weights(weights: &mut Arena<WeightId, Weight>, graph: &mut Graph) {
    use crate::arena::Id;
    let mut live = vec![false; weights.bound()];
    let read = graph.nodes.iter().flat_map(|(_, n)| &n.operands);
    let mut work: Vec<WeightId> = Vec::new();
    for first in read.filter_map(|o| if let Operand::Weight(w) = o { Some(*w) } else { None }) {
        work.push(first);
        while let Some(id) = work.pop() {
            if let Some(flag) = live.get_mut(id.index())
                && !std::mem::replace(flag, true)
                && let Some(weight) = weights.get(id)
            {
                work.extend(weight.expr.parts());
            }
        }
    }
    if weights.len() == weights.bound() && live.iter().all(|live| *live) {
        return;
    }
    let mut map = vec![None; weights.bound()];
    let mut kept = Arena::new();
    for index in 0..live.len() {
        let id = WeightId::from_index(index);
        if live[index]
            && let Some(weight) = weights.remove(id)
        {
            map[index] = Some(kept.push(weight));
        }
    }
    let renamed = |id: &mut WeightId| {
        if let Some(new) = map.get(id.index()).copied().flatten() {
            *id = new;
        }
    };
    kept.iter_mut()
        .for_each(|(_, w): (WeightId, &mut Weight)| w.expr.parts_mut().iter_mut().for_each(renamed));
    for (_, node) in graph.nodes.iter_mut() {
        for operand in &mut node.operands {
            if let Operand::Weight(w) = operand {
                renamed(w);
            }
        }
    }
    *weights = kept;
}

impl WeightExpr {
    /// The weights this expression reads, in order.
    pub fn parts(&self) -> &[WeightId] {
        match self {
            WeightExpr::File { .. }
            | WeightExpr::Splat(_)
            | WeightExpr::Random { .. }
            | WeightExpr::Dense(_) => &[],
            WeightExpr::Concat { parts, .. } => parts,
            WeightExpr::Transpose { of, .. }
            | WeightExpr::Reshape { of }
            | WeightExpr::Cast { of }
            | WeightExpr::Slice { of, .. }
            | WeightExpr::Pack { of, .. }
            | WeightExpr::Cores { of, .. } => std::slice::from_ref(of),
        }
    }

    /// The same for renaming.
    pub fn parts_mut(&mut self) -> &mut [WeightId] {
        match self {
            WeightExpr::File { .. }
            | WeightExpr::Splat(_)
            | WeightExpr::Random { .. }
            | WeightExpr::Dense(_) => &mut [],
            WeightExpr::Concat { parts, .. } => parts,
            WeightExpr::Transpose { of, .. }
            | WeightExpr::Reshape { of }
            | WeightExpr::Cast { of }
            | WeightExpr::Slice { of, .. }
            | WeightExpr::Pack { of, .. }
            | WeightExpr::Cores { of, .. } => std::slice::from_mut(of),
        }
    }
}

impl Graph {
    /// Removes a node that is not in the order any more, with its results.
    pub fn remove_node(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.remove(id) {
            for result in node.results {
                self.values.remove(result);
            }
        }
    }

    /// Launch groups of nodes in `order`: positions of nodes that are launched together.
    pub fn launch_groups(&self, order: &[NodeId]) -> Vec<std::ops::Range<usize>> {
        let mut groups: Vec<std::ops::Range<usize>> = Vec::with_capacity(order.len());
        for (at, id) in order.iter().enumerate() {
            match groups.last_mut() {
                Some(last) if self.nodes[*id].joined => last.end = at + 1,
                _ => groups.push(at..at + 1),
            }
        }
        groups
    }

    /// The node that defines a value.
    pub fn def_node(&self, value: ValueId) -> Option<NodeId> {
        match self.values.get(value)?.def {
            Def::Node { node, .. } => Some(node),
            Def::Input(_) => None,
        }
    }
}
