//! Finding repeated layers: the longest run of equal windows, and which weights, states and names belong to which.

use std::mem::discriminant;

use millrace_ir::{
    Def, Id, Loc, Module, Node, NodeId, Operand, Phase, StateId, ValueId, Weight, WeightExpr, WeightId,
};

use super::Rolled;

/// Longest window.
const LONGEST: usize = 4096;

/// Comparisons of two nodes that a search may cost, for each node.
const EFFORT: usize = 16;

/// The repeated layers of a module: equal windows of its order.
pub(crate) struct Layers {
    /// Position of the first window.
    pub(super) start: usize,
    /// Nodes of a window.
    pub(super) period: usize,
    /// Number of windows.
    pub(crate) count: usize,
    /// Weights that each window has of its own.
    pub(super) weights: Classes<WeightId>,
    /// States that each window has of its own.
    pub(super) states: Classes<StateId>,
    /// Source names that each window has of its own: the node of a window and which of its names.
    pub(super) locs: Vec<(usize, usize)>,
}

/// Things that play one part in every window.
pub(super) struct Classes<I> {
    /// For each part, the thing of every window.
    pub(super) members: Vec<Vec<I>>,
    /// Part and window of each thing that has one.
    of: Vec<(u32, u32)>,
}

const NONE: (u32, u32) = (u32::MAX, u32::MAX);

impl<I: Id> Classes<I> {
    fn new(bound: usize) -> Self {
        Classes { members: Vec::new(), of: vec![NONE; bound] }
    }

    /// Part and window of a thing, unless it is common to all windows.
    pub(super) fn of(&self, id: I) -> Option<(usize, usize)> {
        let (class, at) = *self.of.get(id.index()).filter(|c| **c != NONE)?;
        Some((class as usize, at as usize))
    }

    fn add(&mut self, members: Vec<I>) -> Rolled<()> {
        for (at, id) in members.iter().enumerate() {
            let slot = self.of.get_mut(id.index()).filter(|c| **c == NONE);
            *slot.ok_or("layers share some of their weights or states")? =
                (self.members.len() as u32, at as u32);
        }
        self.members.push(members);
        Ok(())
    }

    /// Adds the part that `at` gives for each window, or finds it: the same in every window, the part of another place,
    /// or that of another place one window before.
    fn place(&mut self, count: usize, at: &dyn Fn(usize) -> Option<I>) -> Rolled<()> {
        let missing = || "layers are wired differently".to_string();
        let [first, second] = [at(0), at(1)].map(|id| id.ok_or_else(missing));
        let (first, second) = (first?, second?);
        if first == second {
            let all = (2..count).all(|window| at(window) == Some(first));
            return if all { Ok(()) } else { Err("some layers share a weight or state".into()) };
        }
        if let Some((class, window)) = self.of(second) {
            let members = &self.members[class];
            let known = |w: usize| at(w).is_some_and(|id| members.get(w + window - 1) == Some(&id));
            let all =
                window <= 1 && (1..count).all(known) && (window == 0 || members.first() == Some(&first));
            return if all { Ok(()) } else { Err(missing()) };
        }
        let members: Option<Vec<I>> = (0..count).map(at).collect();
        self.add(members.ok_or_else(missing)?)
    }
}

impl Layers {
    /// The longest run of at least `min` equal windows; none if there is none.
    ///
    /// # Errors
    /// Why the layers that were found are of no use.
    pub(crate) fn find(module: &Module, min: usize) -> Rolled<Option<Layers>> {
        let order = &module.graph.order;
        let plain = module.phase <= Phase::Fused && module.arenas.is_empty() && module.kernels.is_empty();
        if !plain || order.len() < min {
            return Ok(None);
        }
        let finder = Finder::of(module);
        let mut best: Option<(usize, usize, usize)> = None;
        let mut effort = order.len() * EFFORT;
        for eighth in [4, 6, 2, 7, 1] {
            let middle = order.len() * eighth / 8;
            if best.is_some_and(|(start, period, count)| (start..start + period * count).contains(&middle)) {
                continue;
            }
            let found = finder.around(middle, min, &mut effort);
            let nodes =
                |run: Option<(usize, usize, usize)>| run.map_or(0, |(_, period, count)| period * count);
            if nodes(found) > nodes(best) {
                best = found;
            }
        }
        best.map(|(start, period, count)| Layers::at(module, &finder, start, period, count)).transpose()
    }

    /// The same layers in a module that has fewer or more of them.
    pub(super) fn of(&self, module: &Module) -> Rolled<Layers> {
        let nodes = module.graph.order.len().saturating_sub(self.start);
        let finder = Finder::of(module);
        let same = |at: &usize| finder.follows(*at, self.period);
        let end = (self.start..self.start + nodes.saturating_sub(self.period)).take_while(same).count();
        Layers::at(module, &finder, self.start, self.period, end / self.period + 1)
    }

    fn at(module: &Module, finder: &Finder<'_>, start: usize, period: usize, count: usize) -> Rolled<Layers> {
        let graph = &module.graph;
        let node = |k: usize, window: usize| &graph.nodes[graph.order[start + window * period + k]];
        let mut weights = Classes::new(module.weights.bound());
        let mut states = Classes::new(module.states.bound());
        let mut named = Vec::new();
        for k in 0..period {
            for (slot, operand) in node(k, 0).operands.iter().enumerate() {
                match operand {
                    Operand::Value(_) => finder.wired(start, period, count, k, slot)?,
                    Operand::Weight(_) => weights.place(count, &|w| match node(k, w).operands.get(slot) {
                        Some(Operand::Weight(id)) => Some(*id),
                        _ => None,
                    })?,
                    Operand::State(_) => states.place(count, &|w| match node(k, w).operands.get(slot) {
                        Some(Operand::State(id)) => Some(*id),
                        _ => None,
                    })?,
                }
            }
            (0..node(k, 0).loc.len()).for_each(|slot| named.push((k, slot)));
        }
        let locs = source_names(&named, count, &|(k, slot), window| &node(k, window).loc[slot])?;
        // What the weights are made of belongs to the layer as well.
        let mut class = 0;
        while class < weights.members.len() {
            let members = weights.members[class].clone();
            let first = &module.weights[members[0]];
            if let Some(other) = members.iter().find(|w| !alike(first, &module.weights[**w])) {
                return Err(format!(
                    "weight @{} is made otherwise than @{}",
                    module.weights[*other].name, first.name
                ));
            }
            for part in 0..first.expr.parts().len() {
                weights.place(count, &|w| module.weights[members[w]].expr.parts().get(part).copied())?;
            }
            class += 1;
        }
        if locs.is_empty() && weights.members.is_empty() && states.members.is_empty() {
            return Err("nothing tells the layers apart: no weight, state or source name".into());
        }
        Ok(Layers { start, period, count, weights, states, locs })
    }

    /// Positions of a window.
    pub(super) fn window(&self, at: usize) -> std::ops::Range<usize> {
        let start = self.start + at * self.period;
        start..start + self.period
    }

    /// The source name of a class in a window.
    pub(super) fn loc<'m>(&self, module: &'m Module, class: usize, window: usize) -> &'m Loc {
        let (k, slot) = self.locs[class];
        &module.graph.nodes[module.graph.order[self.start + window * self.period + k]].loc[slot]
    }
}

/// The places whose source names differ from window to window, each name once.
fn source_names<'m>(
    places: &[(usize, usize)],
    count: usize,
    at: &dyn Fn((usize, usize), usize) -> &'m Loc,
) -> Rolled<Vec<(usize, usize)>> {
    let mut classes: Vec<(usize, usize)> = Vec::new();
    for place in places {
        let (first, second) = (at(*place, 0), at(*place, 1));
        let all = if first == second {
            (2..count).all(|w| at(*place, w) == first)
        } else if let Some(known) = classes.iter().find(|c| at(**c, 1) == second) {
            (0..count).all(|w| at(*place, w) == at(*known, w))
        } else if let Some(known) = classes.iter().find(|c| at(**c, 0) == second) {
            // The name of the window before.
            (1..count).all(|w| at(*place, w) == at(*known, w - 1))
        } else {
            classes.push(*place);
            (1..count).all(|w| at(*place, w) != at(*place, w - 1))
        };
        if !all {
            return Err(format!("source name `{second}` has no counterpart in some layers"));
        }
    }
    Ok(classes)
}

/// Whether two weights are made alike, whatever they are made of and called.
pub(super) fn alike(a: &Weight, b: &Weight) -> bool {
    use WeightExpr::*;
    let made = match (&a.expr, &b.expr) {
        (File { file, .. }, File { file: other, .. }) => file == other,
        (Random { std, .. }, Random { std: other, .. }) => std == other,
        (Concat { axis, parts }, Concat { axis: other, parts: others }) => {
            axis == other && parts.len() == others.len()
        }
        (Transpose { perm, .. }, Transpose { perm: other, .. }) => perm == other,
        (Reshape { .. }, Reshape { .. }) | (Cast { .. }, Cast { .. }) => true,
        (Slice { axis, start, len, .. }, Slice { axis: a, start: s, len: l, .. }) => {
            (axis, start, len) == (a, s, l)
        }
        (Pack { panel, segments, .. }, Pack { panel: p, segments: s, .. }) => (panel, segments) == (p, s),
        (Splat(_) | Dense(_), Splat(_) | Dense(_)) => a.expr == b.expr,
        _ => false,
    };
    made && a.ty == b.ty && a.stream == b.stream
}

/// Whether two nodes are equal but for what they read and are called.
pub(super) fn equal_ops(module: &Module, a: &Node, b: &Node) -> bool {
    let results = |node: &'_ Node| node.results.len();
    let ty = |id: &ValueId| module.graph.values.get(*id).map(|v| (&v.ty, &v.place));
    discriminant(&a.op) == discriminant(&b.op)
        && a.operands.len() == b.operands.len()
        && a.loc.len() == b.loc.len()
        && results(a) == results(b)
        && a.kernel == b.kernel
        && a.op == b.op
        && a.results.iter().zip(&b.results).all(|(x, y)| ty(x) == ty(y))
}

/// Compares positions of the order.
pub(super) struct Finder<'m> {
    module: &'m Module,
    position: Vec<u32>,
}

impl<'m> Finder<'m> {
    pub(super) fn of(module: &'m Module) -> Self {
        let mut position = vec![u32::MAX; module.graph.nodes.bound()];
        module.graph.order.iter().enumerate().for_each(|(at, id)| position[id.index()] = at as u32);
        Finder { module, position }
    }

    pub(super) fn node(&self, at: usize) -> Option<&'m Node> {
        self.module.graph.order.get(at).map(|id: &NodeId| &self.module.graph.nodes[*id])
    }

    /// Where a value is defined: position and number of the result; none for inputs.
    pub(super) fn def(&self, value: ValueId) -> Option<(usize, usize)> {
        match self.module.graph.values.get(value)?.def {
            Def::Node { node, index } => Some((self.position[node.index()] as usize, index)),
            Def::Input(_) => None,
        }
    }

    /// Whether `b` is what `a` is, `period` positions later.
    pub(super) fn shifted(&self, a: ValueId, b: ValueId, period: usize) -> bool {
        self.def(a).zip(self.def(b)).is_some_and(|((at, index), (to, i))| (at + period, index) == (to, i))
    }

    /// Whether the node at `at + period` is that at `at` one window later.
    fn follows(&self, at: usize, period: usize) -> bool {
        let (Some(a), Some(b)) = (self.node(at), self.node(at + period)) else { return false };
        let weight = |id: WeightId| &self.module.weights[id].ty;
        let state = |id: StateId| &self.module.states[id].ty;
        let reads = |(x, y): (&Operand, &Operand)| match (x, y) {
            (Operand::Value(x), Operand::Value(y)) => x == y || self.shifted(*x, *y, period),
            (Operand::Weight(x), Operand::Weight(y)) => x == y || weight(*x) == weight(*y),
            (Operand::State(x), Operand::State(y)) => x == y || state(*x) == state(*y),
            _ => false,
        };
        equal_ops(self.module, a, b) && a.operands.iter().zip(&b.operands).all(reads)
    }

    /// The run of at least `min` equal windows around a position with the shortest window: start, period and count.
    fn around(&self, middle: usize, min: usize, effort: &mut usize) -> Option<(usize, usize, usize)> {
        let nodes = self.module.graph.order.len();
        for period in 1..=LONGEST.min(nodes / min) {
            let forward = (middle..nodes - period).take_while(|at| self.follows(*at, period)).count();
            if forward == 0 && !(middle >= 1 && self.follows(middle - 1, period)) {
                *effort = effort.saturating_sub(2);
                continue;
            }
            let back = (0..middle).rev().take_while(|at| self.follows(*at, period)).count();
            let start = self.after_common(middle - back, period);
            let same = (middle + forward).saturating_sub(start);
            if same >= (min - 1) * period {
                return Some((start, period, same / period + 1));
            }
            *effort = effort.checked_sub(forward + back)?;
        }
        None
    }

    /// The first position from `start` on whose window reads nothing from the windows that they all read.
    fn after_common(&self, start: usize, period: usize) -> usize {
        let mut start = start;
        let mut at = start;
        while at < start + period && at + period < self.module.graph.order.len() {
            let (Some(a), Some(b)) = (self.node(at), self.node(at + period)) else { break };
            let common = a.operands.iter().zip(&b.operands).filter_map(|(x, y)| match (x, y) {
                (Operand::Value(x), Operand::Value(y)) if x == y => self.def(*x).map(|(def, _)| def + 1),
                _ => None,
            });
            match common.max() {
                Some(after) if after > start => (start, at) = (after, after),
                _ => at += 1,
            }
        }
        start
    }

    /// Whether operand `slot` of node `k` is wired alike in all windows: to one value before them all, or to a place
    /// in the same or the previous window.
    fn wired(&self, start: usize, period: usize, count: usize, k: usize, slot: usize) -> Rolled<()> {
        let value = |window: usize| match self.node(start + window * period + k)?.operands.get(slot) {
            Some(Operand::Value(value)) => Some(*value),
            _ => None,
        };
        let (Some(first), Some(second)) = (value(0), value(1)) else {
            return Err("layers are wired differently".into());
        };
        let all = if first == second {
            self.def(first).is_none_or(|(at, _)| at < start) && (2..count).all(|w| value(w) == Some(first))
        } else {
            self.def(first).is_some_and(|(at, _)| at + period >= start)
                && (1..count).all(|w| value(w - 1) != value(w))
        };
        if all { Ok(()) } else { Err("layers are wired differently".into()) }
    }
}
