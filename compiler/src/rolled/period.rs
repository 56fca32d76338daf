//! What repeats in the small module after the steps: the part of each weight, state and name in its layer, and the
//! stretch of the order that is equal to the next one but for the layer.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

use millrace_ir::{Id, Loc, Module, Operand, StateId, WeightId};

use super::Rolled;
use super::layers::{Finder, Layers, alike, equal_ops};
use super::name::Names;
use super::truncate::Map;

/// What a thing of the small module is to the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// Common to all of them.
    Common,
    /// Of a class and of a layer, which counts in the small module.
    Layer(usize, usize),
    /// Made by the steps.
    Made,
}

/// The small module after the steps, seen from the whole module before them.
pub(super) struct Tags<'a> {
    pub(super) origin: &'a Module,
    pub(super) layers: &'a Layers,
    pub(super) map: &'a Map,
    pub(super) result: &'a Module,
    names: HashMap<&'a str, (usize, usize)>,
}

impl<'a> Tags<'a> {
    pub(super) fn of(
        origin: &'a Module,
        layers: &'a Layers,
        map: &'a Map,
        result: &'a Module,
    ) -> Rolled<Tags<'a>> {
        let mut names = HashMap::new();
        for class in 0..layers.locs.len() {
            for label in 0..map.kept {
                let window = if label + 1 == map.kept { layers.count - 1 } else { label };
                let name: &str = layers.loc(origin, class, window);
                if names.insert(name, (class, label)).is_some() {
                    return Err(format!("source name `{name}` stands for several layers"));
                }
            }
        }
        Ok(Tags { origin, layers, map, result, names })
    }

    fn tag(&self, of: Option<(usize, usize)>) -> Tag {
        let layer = |(class, window)| Some(Tag::Layer(class, self.map.small(window, self.layers.count)?));
        of.and_then(layer).unwrap_or(Tag::Common)
    }

    pub(super) fn weight(&self, id: WeightId) -> Tag {
        let origin = self.map.weights.get(id.index());
        origin.map_or(Tag::Made, |full| self.tag(self.layers.weights.of(*full)))
    }

    pub(super) fn state(&self, id: StateId) -> Tag {
        let origin = self.map.states.get(id.index());
        origin.map_or(Tag::Made, |full| self.tag(self.layers.states.of(*full)))
    }

    pub(super) fn loc(&self, loc: &str) -> Tag {
        self.names.get(loc).map_or(Tag::Common, |(class, label)| Tag::Layer(*class, *label))
    }

    /// The layers that a weight is made of, lowest and highest; none if it is common to all.
    pub(super) fn span(&self, id: WeightId) -> Option<(usize, usize)> {
        match self.weight(id) {
            Tag::Common => None,
            Tag::Layer(_, label) => Some((label, label)),
            Tag::Made => {
                let parts = self.result.weights[id].expr.parts();
                let spans = parts.iter().filter_map(|part| self.span(*part));
                spans.reduce(|(low, high), (l, h)| (low.min(l), high.max(h)))
            }
        }
    }

    /// Whether weight `b` is to its layer what `a` is to the one before.
    pub(super) fn next_weight(&self, a: WeightId, b: WeightId) -> bool {
        match (self.weight(a), self.weight(b)) {
            (Tag::Made, Tag::Made) if a == b => self.span(a).is_none(),
            (Tag::Made, Tag::Made) => {
                let (x, y) = (&self.result.weights[a], &self.result.weights[b]);
                let (from, to) = (x.expr.parts(), y.expr.parts());
                alike(x, y)
                    && Names::of(&x.name, &y.name).is_some()
                    && from.iter().zip(to).all(|(x, y)| self.next_weight(*x, *y))
            }
            (Tag::Common, Tag::Common) => a == b,
            (a, b) => next(a, b),
        }
    }

    fn next_loc(&self, a: &[Loc], b: &[Loc]) -> bool {
        // Names are sorted, so those of two layers may stand in another order: `h.10.x` is before `h.9.x`.
        let follows = |x: &Loc, y: &Loc| match (self.loc(x), self.loc(y)) {
            (Tag::Common, Tag::Common) => x == y,
            (x, y) => next(x, y),
        };
        a.len() == b.len() && a.iter().all(|x| b.iter().any(|y| follows(x, y)))
    }

    /// Whether the node at `at + period` of the result is that at `at` one layer later.
    fn follows(&self, finder: &Finder<'_>, at: usize, period: usize) -> bool {
        let (Some(a), Some(b)) = (finder.node(at), finder.node(at + period)) else { return false };
        let reads = |(x, y): (&Operand, &Operand)| match (x, y) {
            (Operand::Value(x), Operand::Value(y)) => x == y || finder.shifted(*x, *y, period),
            (Operand::Weight(x), Operand::Weight(y)) => self.next_weight(*x, *y),
            (Operand::State(x), Operand::State(y)) => match (self.state(*x), self.state(*y)) {
                (Tag::Common, Tag::Common) => x == y,
                (a, b) => next(a, b),
            },
            _ => false,
        };
        equal_ops(self.result, a, b)
            && a.operands.iter().zip(&b.operands).all(reads)
            && self.next_loc(&a.loc, &b.loc)
    }

    /// Starts and length of the stretches whose next one is equal but for the layer.
    pub(super) fn period(&self, finder: &Finder<'_>) -> Rolled<(RangeInclusive<usize>, usize)> {
        let nodes = self.result.graph.order.len();
        let mut candidates: Vec<(usize, usize)> = self.distances(finder).into_iter().collect();
        // The most frequent distance first.
        candidates.sort_by_key(|(distance, times)| (usize::MAX - times, *distance));
        for (period, _) in candidates.into_iter().take(4) {
            let mut run = 0;
            let mut best = (0, 0);
            for at in 0..nodes.saturating_sub(period) {
                run = if self.follows(finder, at, period) { run + 1 } else { 0 };
                if run > best.1 {
                    best = (at + 1 - run, run);
                }
            }
            let (start, run) = best;
            if run >= period {
                return Ok((start..=start + (run - period), period));
            }
        }
        Err("the rewritten layers differ".into())
    }

    /// How often a distance lies between nodes that begin with the same thing of neighbouring layers.
    fn distances(&self, finder: &Finder<'_>) -> BTreeMap<usize, usize> {
        let mut last: HashMap<(usize, usize, usize, usize), usize> = HashMap::new();
        let mut times = BTreeMap::new();
        for (at, id) in self.result.graph.order.iter().enumerate() {
            let Some(node) = finder.node(at) else { continue };
            debug_assert!(self.result.graph.nodes.get(*id).is_some());
            let mut seen = HashMap::new();
            let of_weight = |id: WeightId, kind: usize| (kind, self.leaf(id));
            let tags = node.operands.iter().enumerate().filter_map(|(slot, operand)| match operand {
                Operand::Weight(w) => Some(of_weight(*w, 3 * slot)),
                Operand::State(s) => Some((3 * slot + 1, self.state(*s))),
                Operand::Value(_) => None,
            });
            let locs = node.loc.iter().map(|l| (2, self.loc(l)));
            for (kind, tag) in tags.chain(locs) {
                let Tag::Layer(class, label) = tag else { continue };
                let first = *seen.entry((kind, class)).or_insert(label);
                if first != label {
                    continue;
                }
                if label > 0
                    && let Some(before) = last.get(&(kind, class, label - 1, node.operands.len()))
                {
                    *times.entry(at - before).or_insert(0) += 1;
                }
                last.entry((kind, class, label, node.operands.len())).or_insert(at);
            }
        }
        times
    }

    /// The first layered weight that a weight is made of.
    fn leaf(&self, id: WeightId) -> Tag {
        match self.weight(id) {
            Tag::Made => {
                let parts = self.result.weights[id].expr.parts();
                let mut leaves = parts.iter().map(|part| self.leaf(*part));
                leaves.find(|t| matches!(t, Tag::Layer(..))).unwrap_or(Tag::Common)
            }
            tag => tag,
        }
    }
}

fn next(a: Tag, b: Tag) -> bool {
    matches!((a, b), (Tag::Layer(x, i), Tag::Layer(y, j)) if x == y && i + 1 == j)
}
