//! Finding repeated layers: the longest run of equal windows, and which weights, states and names belong to which.

use std::mem::discriminant;

use millrace_ir::{
    Def, Id, Loc, Module, Node, NodeId, Operand, Phase, StateId, ValueId, Weight, WeightExpr, WeightId,
};

use super::Rolled;

/// Longest window.
const LONGEST: usize = 4096;

/// Most places where the first window is tried to begin.
const SHIFTS: usize = 256;

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

    /// Adds the thing that plays a part in the next window.
    fn push(&mut self, class: usize, id: I) -> Rolled<()> {
        if class == self.members.len() {
            self.members.push(Vec::new());
        }
        let slot = self.of.get_mut(id.index()).filter(|c| **c == NONE);
        *slot.ok_or("layers share some of their weights or states")? =
            (class as u32, self.members[class].len() as u32);
        self.members[class].push(id);
        Ok(())
    }

    /// The part of two weights of the first windows that others are made of.
    fn part(&self, first: I, second: I) -> Part<I> {
        match self.of(second) {
            _ if first == second => Part::Common(first),
            Some((class, window @ 0..=1)) => Part::Of(class, 1 - window),
            _ => Part::Own(usize::MAX),
        }
    }

    /// Asks for the part of a place in one more window.
    fn next(&mut self, part: Part<I>, window: usize, id: I) -> Rolled<()> {
        if !part.holds(window, id, |class, w| self.members.get(class)?.get(w).copied()) {
            return Err("layers share some of their weights or states".into());
        }
        if let Part::Own(class) = part { self.push(class, id) } else { Ok(()) }
    }
}

/// What stands at a place of every window.
#[derive(Clone, Copy)]
enum Part<T> {
    /// The same.
    Common(T),
    /// Something that no place before has: the next class.
    Own(usize),
    /// The thing of a class, of this window or of the one before.
    Of(usize, usize),
}

impl<T: Copy + PartialEq> Part<T> {
    /// The part of a place by its first two windows; `seen` are those of the classes so far.
    fn of(first: T, second: T, seen: &mut Vec<(T, T)>) -> Self {
        if first == second {
            return Part::Common(first);
        }
        if let Some(class) = seen.iter().position(|(_, known)| *known == second) {
            return Part::Of(class, 0);
        }
        if let Some(class) = seen.iter().position(|(known, _)| *known == second) {
            return Part::Of(class, 1);
        }
        seen.push((first, second));
        Part::Own(seen.len() - 1)
    }

    /// Whether it stands there in a window.
    fn holds(self, window: usize, thing: T, member: impl Fn(usize, usize) -> Option<T>) -> bool {
        match self {
            Part::Common(common) => thing == common,
            Part::Own(class) => window == 0 || member(class, window - 1) != Some(thing),
            Part::Of(class, back) => window < back || member(class, window - back) == Some(thing),
        }
    }
}

/// How an operand is wired in every window.
enum Slot {
    /// To one value before all windows, or to a place of the same or the previous window.
    Value(Option<ValueId>),
    Weight(Part<WeightId>),
    State(Part<StateId>),
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
        let Some((start, period, count)) = best else { return Ok(None) };
        // A window may begin anywhere; where the source's layers begin, no name belongs to two windows.
        let mut reason = None;
        for shift in 0..period.min(SHIFTS) {
            let count = if shift <= finder.rest(start, period, count) { count } else { count - 1 };
            if count < min {
                break;
            }
            match Layers::at(module, &finder, start + shift, period, count) {
                Ok(layers) => return Ok(Some(layers)),
                Err(why) => {
                    reason.get_or_insert(why);
                }
            }
        }
        reason.map_or(Ok(None), Err)
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
        if count < 2 {
            return Err("one layer is no repetition".into());
        }
        let graph = &module.graph;
        let node = |k: usize, window: usize| &graph.nodes[graph.order[start + window * period + k]];
        let mut weights = Classes::new(module.weights.bound());
        let mut states = Classes::new(module.states.bound());
        let (mut seen_weights, mut seen_states, mut seen_names) = (Vec::new(), Vec::new(), Vec::new());
        let (mut slots, mut names, mut locs) = (Vec::new(), Vec::new(), Vec::new());
        let wired = || "layers are wired differently".to_string();
        for k in 0..period {
            let (a, b) = (node(k, 0), node(k, 1));
            for (x, y) in a.operands.iter().zip(&b.operands) {
                slots.push(match (x, y) {
                    (Operand::Value(x), Operand::Value(y)) => {
                        let def = finder.def(*x);
                        let common = x == y && def.is_none_or(|(at, _)| at < start);
                        let near = x != y && def.is_some_and(|(at, _)| at + period >= start);
                        if !common && !near {
                            return Err(wired());
                        }
                        Slot::Value(common.then_some(*x))
                    }
                    (Operand::Weight(x), Operand::Weight(y)) => {
                        Slot::Weight(Part::of(*x, *y, &mut seen_weights))
                    }
                    (Operand::State(x), Operand::State(y)) => Slot::State(Part::of(*x, *y, &mut seen_states)),
                    _ => return Err(wired()),
                });
            }
            for (slot, (x, y)) in a.loc.iter().zip(&b.loc).enumerate() {
                if x != y && seen_names.iter().any(|(_, second)| *second == x) {
                    return Err(format!("source name `{x}` stands in two windows"));
                }
                let part = Part::of(x, y, &mut seen_names);
                if matches!(part, Part::Own(_)) {
                    locs.push((k, slot));
                }
                names.push(part);
            }
        }
        // Window by window, so that each node is visited once.
        for window in 0..count {
            let (mut slot, mut name) = (slots.iter(), names.iter());
            for k in 0..period {
                let here = node(k, window);
                for (at, operand) in here.operands.iter().enumerate() {
                    match (slot.next(), operand) {
                        (Some(Slot::Value(Some(common))), Operand::Value(v)) if common == v => {}
                        (Some(Slot::Value(None)), Operand::Value(_))
                            if window == 0 || node(k, window - 1).operands.get(at) != Some(operand) => {}
                        (Some(Slot::Weight(part)), Operand::Weight(id)) => {
                            weights.next(*part, window, *id)?
                        }
                        (Some(Slot::State(part)), Operand::State(id)) => states.next(*part, window, *id)?,
                        _ => return Err(wired()),
                    }
                }
                for loc in &here.loc {
                    let member = |class: usize, w: usize| {
                        let (k, slot): (usize, usize) = *locs.get(class)?;
                        node(k, w).loc.get(slot)
                    };
                    if !name.next().is_some_and(|part| part.holds(window, loc, member)) {
                        return Err(format!("source name `{loc}` has no counterpart in some layers"));
                    }
                }
            }
        }
        // What the weights are made of belongs to the layer as well.
        let mut class = 0;
        while class < weights.members.len() {
            let members = std::mem::take(&mut weights.members[class]);
            let first = &module.weights[members[0]];
            if let Some(other) = members.iter().find(|w| !alike(first, &module.weights[**w])) {
                let name = &module.weights[*other].name;
                return Err(format!("weight @{name} is made otherwise than @{}", first.name));
            }
            let parts = first.expr.parts().len();
            let part = |w: usize, part: usize| module.weights[members[w]].expr.parts()[part];
            let found: Vec<_> = (0..parts).map(|p| weights.part(part(0, p), part(1, p))).collect();
            weights.members[class].clone_from(&members);
            for (p, mut part_of) in found.into_iter().enumerate() {
                if let Part::Own(new) = &mut part_of {
                    *new = weights.members.len();
                }
                (0..count).try_for_each(|w| weights.next(part_of, w, part(w, p)))?;
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
        (Cores { segments, alternate, .. }, Cores { segments: s, alternate: a, .. }) => {
            (segments, alternate) == (s, a)
        }
        (Splat(_) | Dense(_), Splat(_) | Dense(_)) => a.expr == b.expr,
        _ => false,
    };
    made && a.ty == b.ty && a.stream == b.stream
}

/// Whether two nodes are equal but for what they read and are called.
pub(super) fn equal_ops(module: &Module, a: &Node, b: &Node) -> bool {
    let results = |node: &'_ Node| node.results.len();
    let ty = |id: &ValueId| module.graph.values.get(*id).map(|v| (&v.ty, &v.place));
    discriminant(&*a.op) == discriminant(&*b.op)
        && a.operands.len() == b.operands.len()
        && a.loc.len() == b.loc.len()
        && results(a) == results(b)
        && a.kernel == b.kernel
        && a.joined == b.joined
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

    /// Nodes behind the last of `count` windows that repeat still.
    fn rest(&self, start: usize, period: usize, count: usize) -> usize {
        let last = start + (count - 1) * period;
        (last..last + period).take_while(|at| self.follows(*at, period)).count()
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
}
