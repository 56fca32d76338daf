//! The module with few of its layers: the first ones and the last.

use millrace_ir::{
    Arena, Def, Graph, Id, Module, Node, Operand, Output, Results, StateId, Value, ValueId, WeightId,
};

use super::Rolled;
use super::layers::{Finder, Layers};

/// A module with few layers.
pub(super) struct Small {
    pub(super) module: Module,
    pub(super) map: Map,
}

/// Where the parts of a small module come from.
pub(super) struct Map {
    /// Windows of the small module.
    pub(super) kept: usize,
    /// The whole module's weight for each one of the small module.
    pub(super) weights: Vec<WeightId>,
    /// The whole module's state for each one of the small module.
    pub(super) states: Vec<StateId>,
}

impl Map {
    /// The small module's number of a window, which counts `count` in the whole.
    pub(super) fn small(&self, window: usize, count: usize) -> Option<usize> {
        match window {
            _ if window + 1 == count => Some(self.kept - 1),
            _ if window + 1 < self.kept => Some(window),
            _ => None,
        }
    }
}

impl Layers {
    /// The module with the first `kept - 1` layers and the last.
    pub(super) fn truncate(&self, module: &Module, kept: usize) -> Rolled<Small> {
        let mut map = Map { kept, weights: Vec::new(), states: Vec::new() };
        let mut small =
            Module { dims: module.dims.clone(), phase: module.phase, ..Module::new(&module.name) };
        small.target.clone_from(&module.target);
        let stays = |of: Option<(usize, usize)>| of.is_none_or(|(_, w)| map.small(w, self.count).is_some());
        let mut weights = vec![None; module.weights.bound()];
        let mut kept_weights = Vec::new();
        for (id, weight) in module.weights.iter().filter(|(id, _)| stays(self.weights.of(*id))) {
            weights[id.index()] = Some(small.weights.push(weight.clone()));
            kept_weights.push(id);
        }
        let mut states = vec![None; module.states.bound()];
        let mut kept_states = Vec::new();
        for (id, state) in module.states.iter().filter(|(id, _)| stays(self.states.of(*id))) {
            states[id.index()] = Some(small.states.push(state.clone()));
            kept_states.push(id);
        }
        (map.weights, map.states) = (kept_weights, kept_states);
        let shared = || "other parts of the module read weights of the layers in the middle".to_string();
        for (_, weight) in small.weights.iter_mut() {
            for part in weight.expr.parts_mut() {
                *part = weights[part.index()].ok_or_else(shared)?;
            }
        }
        let operand = |operand: Operand, values: &[Option<ValueId>]| match operand {
            Operand::Value(v) => Some(Operand::Value(values[v.index()]?)),
            Operand::Weight(w) => weights[w.index()].map(Operand::Weight),
            Operand::State(s) => states[s.index()].map(Operand::State),
        };
        let last = self.window(self.count - 1);
        let mut graph = Graph { name: module.graph.name.clone(), ..Graph::default() };
        let mut values: Vec<Option<ValueId>> = vec![None; module.graph.values.bound()];
        for input in &module.graph.inputs {
            let id = graph.values.push(module.graph.values[*input].clone());
            values[input.index()] = Some(id);
            graph.inputs.push(id);
        }
        let before = 0..self.window(kept - 1).start;
        // What the last window reads of the one before it, it reads of the last but one that stays.
        let (from, to) = (self.window(self.count - 2), self.window(kept - 2));
        // Only the last window may be read from behind, by nodes and by outputs.
        let only_last = |values: &mut Vec<Option<ValueId>>| {
            for at in self.start..last.start {
                let results = &module.graph.nodes[module.graph.order[at]].results;
                results.iter().for_each(|v| values[v.index()] = None);
            }
        };
        for at in before.chain(last.start..module.graph.order.len()) {
            if at == last.start {
                let finder = Finder::of(module);
                for (a, b) in from.clone().zip(to.clone()) {
                    let (Some(a), Some(b)) = (finder.node(a), finder.node(b)) else { continue };
                    a.results.iter().zip(&b.results).for_each(|(a, b)| values[a.index()] = values[b.index()]);
                }
            }
            if at == last.end {
                only_last(&mut values);
            }
            let node = &module.graph.nodes[module.graph.order[at]];
            let read = node.operands.iter().map(|o| operand(*o, &values)).collect::<Option<Vec<_>>>();
            let operands = read.ok_or("layers are read from outside of their run")?;
            let id = graph.nodes.push(Node {
                op: node.op.clone(),
                operands: operands.into(),
                results: Results::new(),
                loc: node.loc.clone(),
                kernel: None,
                joined: node.joined,
            });
            for (index, result) in node.results.iter().enumerate() {
                let ty = module.graph.values[*result].ty.clone();
                let new = graph.values.push(Value { ty, def: Def::Node { node: id, index }, place: None });
                values[result.index()] = Some(new);
                graph.nodes[id].results.push(new);
            }
            graph.order.push(id);
        }
        only_last(&mut values);
        for Output { name, value } in &module.graph.outputs {
            let value = values[value.index()].ok_or("layers in the middle have outputs")?;
            graph.outputs.push(Output { name: name.clone(), value });
        }
        small.graph = graph;
        debug_assert!(small.arenas == Arena::new());
        Ok(Small { module: small, map })
    }
}
