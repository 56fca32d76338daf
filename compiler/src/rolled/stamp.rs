//! Stamping: the result of the steps on few layers becomes that on all of them.
//!
//! The order of the small module is what comes before the period (**head**), the period, its next one, and what comes
//! behind (**tail**). The whole module has the head, the period once for every layer that the period and its next one
//! stand for, and the tail, whose layers count from the end.

use std::collections::{BTreeMap, BTreeSet};

use millrace_ir::{
    Def, Graph, Id, Loc, Locs, Module, Node, NodeId, Operand, Operands, Output, Phase, Results, StateId,
    Value, ValueId, Weight, WeightId,
};

use super::Rolled;
use super::layers::{Classes, Finder, Layers};
use super::name::Names;
use super::period::{Tag, Tags};
use super::truncate::Map;

/// What steps make of a whole module: its weights stay, and these come behind them.
pub(super) struct Stamped {
    pub(super) phase: Phase,
    pub(super) target: Option<String>,
    pub(super) graph: Graph,
    pub(super) weights: Vec<Weight>,
}

/// What `result`, the small module after the steps, is for the whole module `origin`.
///
/// # Errors
/// What in the result cannot be said of all layers.
pub(super) fn stamp(origin: &Module, layers: &Layers, map: &Map, result: &Module) -> Rolled<Stamped> {
    unchanged(origin, map, result)?;
    let tags = Tags::of(origin, layers, map, result)?;
    let finder = Finder::of(result);
    let (starts, period) = tags.period(&finder)?;
    let names = |id: &NodeId| result.graph.nodes[*id].loc.iter().map(|loc| tags.loc(loc)).collect();
    let mut stamper = Stamper {
        start: 0,
        period,
        copies: layers.count - map.kept + 2,
        finder,
        weights: BTreeMap::new(),
        pairs: BTreeMap::new(),
        regions: Vec::new(),
        lowest: [Vec::new(), Vec::new()],
        lowest_name: Vec::new(),
        names: result.graph.order.iter().map(names).collect(),
        values: 0,
        first: vec![0; result.graph.order.len()],
        tags,
    };
    stamper.begin(starts)?;
    let weights = stamper.made()?;
    let graph = stamper.graph()?;
    Ok(Stamped { phase: result.phase, target: result.target.clone(), graph, weights })
}

/// Steps may add weights; those that were there have to stay as they were.
fn unchanged(origin: &Module, map: &Map, result: &Module) -> Rolled<()> {
    let planned = !result.arenas.is_empty() || !result.kernels.is_empty() || result.phase > Phase::Scheduled;
    if planned {
        return Err("memory is planned for all layers at once".into());
    }
    let same = |(at, id): (usize, &WeightId)| {
        let (Some(now), Some(was)) = (result.weights.get(WeightId::from_index(at)), origin.weights.get(*id))
        else {
            return false;
        };
        (&now.name, &now.ty, &now.stream) == (&was.name, &was.ty, &was.stream)
            && super::layers::alike(now, was)
    };
    let inputs = |m: &Module| m.graph.inputs.iter().map(|v| m.graph.values[*v].clone()).collect::<Vec<_>>();
    let states = map
        .states
        .iter()
        .enumerate()
        .all(|(at, id)| result.states.get(StateId::from_index(at)) == origin.states.get(*id));
    let kept = states
        && result.states.len() == map.states.len()
        && map.weights.iter().enumerate().all(same)
        && inputs(result) == inputs(origin)
        && (&result.name, &result.dims, &result.graph.name)
            == (&origin.name, &origin.dims, &origin.graph.name);
    if kept { Ok(()) } else { Err("a pass changed more than nodes".into()) }
}

/// Where a node of the whole module comes from.
#[derive(Clone, Copy, PartialEq)]
enum Region {
    Head,
    /// The period, this often shifted.
    Copy(usize),
    Tail,
}

struct Stamper<'a> {
    tags: Tags<'a>,
    finder: Finder<'a>,
    start: usize,
    period: usize,
    /// How often the whole module has the period.
    copies: usize,
    /// What a weight made for the period, or for its next one, is in each copy.
    weights: BTreeMap<WeightId, Vec<WeightId>>,
    /// The made weights of the period with those of its next one that correspond to them.
    pairs: BTreeMap<WeightId, WeightId>,
    /// Where made weights are read; none for those that nothing reads.
    regions: Vec<Option<Region>>,
    /// The lowest layer of each class of weights and states that the period reads.
    lowest: [Vec<Option<usize>>; 2],
    lowest_name: Vec<Option<usize>>,
    /// What each source name is, by position.
    names: Vec<Vec<Tag>>,
    /// Values of a period.
    values: usize,
    /// First value of each position up to the end of the period, and from the tail on.
    first: Vec<usize>,
}

impl<'a> Stamper<'a> {
    fn node(&self, at: usize) -> Rolled<&'a Node> {
        self.finder.node(at).ok_or_else(|| "the order is short".into())
    }

    /// Layers of the whole module before the last one of the small module.
    fn left_out(&self) -> usize {
        self.tags.layers.count - self.tags.map.kept
    }

    /// Chooses the start of the period: as far from both ends of what repeats as can be, and so that weights are made
    /// either for layers of the period and its next one, or for the first, or for the last layer.
    fn begin(&mut self, starts: std::ops::RangeInclusive<usize>) -> Rolled<()> {
        let middle = (starts.start() + starts.end()) / 2;
        let mut order: Vec<usize> = starts.collect();
        order.sort_by_key(|at| at.abs_diff(middle));
        let mut reason = None;
        for start in order {
            self.start = start;
            match self.survey() {
                Ok(()) => return self.grow_evenly(),
                Err(why) => {
                    reason.get_or_insert(why);
                }
            }
        }
        Err(reason.unwrap_or_else(|| "the rewritten layers differ".into()))
    }

    /// Collects which layers and weights the period is about.
    fn survey(&mut self) -> Rolled<()> {
        let layers = self.tags.layers;
        self.lowest = [vec![None; layers.weights.members.len()], vec![None; layers.states.members.len()]];
        self.lowest_name = vec![None; layers.locs.len()];
        self.values = 0;
        let lower =
            |slot: &mut Option<usize>, label: usize| *slot = Some(slot.map_or(label, |l| l.min(label)));
        let mut layered = false;
        for at in self.start..self.start + self.period {
            let node = self.node(at)?;
            self.values += node.results.len();
            for operand in &node.operands {
                let (tag, kind) = match operand {
                    Operand::Weight(w) => (self.tags.weight(*w), 0),
                    Operand::State(s) => (self.tags.state(*s), 1),
                    Operand::Value(_) => continue,
                };
                layered |= tag != Tag::Common;
                if let Tag::Layer(class, label) = tag {
                    lower(&mut self.lowest[kind][class], label);
                }
            }
            for loc in &node.loc {
                if let Tag::Layer(class, label) = self.tags.loc(loc) {
                    layered = true;
                    lower(&mut self.lowest_name[class], label);
                }
            }
        }
        if !layered {
            return Err("nothing tells the rewritten layers apart".into());
        }
        self.pairs = self.pairs()?;
        self.regions = self.regions()?;
        // Names of weights made for the last layer do not follow those of the layer before it in the small module.
        let last = self.tags.map.kept - 1;
        let seconds: BTreeSet<WeightId> = self.pairs.values().copied().collect();
        for (index, region) in self.regions.iter().enumerate() {
            let id = WeightId::from_index(index);
            let mixed = match (self.tags.span(id), region) {
                _ if seconds.contains(&id) => self.tags.span(id).is_some_and(|(_, high)| high >= last),
                _ if self.pairs.contains_key(&id) => false,
                (Some((low, _)), Some(Region::Tail)) => low < last,
                (Some((_, high)), Some(_)) => high >= last,
                _ => false,
            };
            if mixed {
                let name = &self.tags.result.weights[id].name;
                return Err(format!("@{name} is made of the first or last layers and of others"));
            }
        }
        Ok(())
    }

    /// The window of the whole module that layer `label` of the small one is in a region.
    fn window(&self, lowest: Option<usize>, label: usize, region: Region) -> Rolled<usize> {
        let (kept, count) = (self.tags.map.kept, self.tags.layers.count);
        let window = match region {
            Region::Head if label + 1 < kept => Some(label),
            Region::Copy(copy) if label + copy < count && label + 1 < kept => Some(label + copy),
            Region::Tail if label + 1 == kept || lowest.is_some_and(|low| label > low) => {
                Some(label + self.left_out())
            }
            _ => None,
        };
        window.ok_or_else(|| "the first or last layers are mixed with others".into())
    }

    fn member<I: Id>(&self, classes: &Classes<I>, class: usize, window: usize) -> Rolled<I> {
        let id = classes.members.get(class).and_then(|members| members.get(window));
        id.copied().ok_or_else(|| "there are not so many layers".into())
    }

    fn weight(&self, id: WeightId, region: Region) -> Rolled<WeightId> {
        match self.tags.weight(id) {
            Tag::Common => Ok(self.tags.map.weights[id.index()]),
            Tag::Layer(class, label) => {
                let window = self.window(self.lowest[0][class], label, region)?;
                self.member(&self.tags.layers.weights, class, window)
            }
            Tag::Made => {
                let made = self.weights.get(&id).ok_or("a weight is read before it is made")?;
                let copy = match (made.len(), region) {
                    (1, _) | (_, Region::Head) => 0,
                    (_, Region::Copy(copy)) => copy,
                    (all, Region::Tail) => all - 1,
                };
                Ok(made[copy])
            }
        }
    }

    fn state(&self, id: StateId, region: Region) -> Rolled<StateId> {
        match self.tags.state(id) {
            Tag::Layer(class, label) => {
                let window = self.window(self.lowest[1][class], label, region)?;
                self.member(&self.tags.layers.states, class, window)
            }
            _ => Ok(self.tags.map.states[id.index()]),
        }
    }

    /// The made weights of the period with those of its next one that correspond to them.
    fn pairs(&self) -> Rolled<BTreeMap<WeightId, WeightId>> {
        let mut work = Vec::new();
        for at in self.start..self.start + self.period {
            let (a, b) = (self.node(at)?, self.node(at + self.period)?);
            work.extend(a.operands.iter().zip(&b.operands).filter_map(|pair| match pair {
                (Operand::Weight(a), Operand::Weight(b)) => Some((*a, *b)),
                _ => None,
            }));
        }
        let mut pairs = BTreeMap::new();
        while let Some((a, b)) = work.pop() {
            if a == b || self.tags.weight(a) != Tag::Made {
                continue;
            }
            if *pairs.entry(a).or_insert(b) != b {
                return Err("one made weight corresponds to several".into());
            }
            let result = self.tags.result;
            let parts = |id: WeightId| result.weights[id].expr.parts().iter().copied();
            work.extend(parts(a).zip(parts(b)));
        }
        Ok(pairs)
    }

    /// The weights made by the steps for all layers, in the order in which the steps on all layers make them: what is
    /// made for one layer after the other goes on behind the period's next one.
    fn made(&mut self) -> Rolled<Vec<Weight>> {
        let pairs = std::mem::take(&mut self.pairs);
        let before: BTreeMap<WeightId, WeightId> = pairs.iter().map(|(a, b)| (*b, *a)).collect();
        if before.len() != pairs.len() || pairs.keys().any(|a| before.contains_key(a)) {
            return Err("layers share made weights".into());
        }
        let regions = std::mem::take(&mut self.regions);
        let mut made = Vec::new();
        let mut run: Vec<WeightId> = Vec::new();
        for (index, region) in regions.into_iter().enumerate().skip(self.tags.map.weights.len()) {
            let id = WeightId::from_index(index);
            let Some(region) = region else { continue };
            match before.get(&id) {
                Some(first) => {
                    self.make(&mut made, &self.made_names(&pairs, *first)?, *first, 1)?;
                    run.push(*first);
                    continue;
                }
                None => self.rest(&mut made, &pairs, &mut run)?,
            }
            if pairs.contains_key(&id) {
                self.make(&mut made, &self.made_names(&pairs, id)?, id, 0)?;
                continue;
            }
            let Some(weight) = self.tags.result.weights.get(id) else { continue };
            let mut weight = weight.clone();
            for part in weight.expr.parts_mut() {
                *part = self.weight(*part, region)?;
            }
            self.weights.insert(id, vec![self.number(made.len())]);
            made.push(weight);
        }
        self.rest(&mut made, &pairs, &mut run)?;
        for (first, second) in &pairs {
            let all = self.weights.get(first).cloned().filter(|all| all.len() == self.copies);
            self.weights.insert(*second, all.ok_or("a weight was not made for every layer")?);
        }
        Ok(made)
    }

    /// The id of made weight `at`.
    fn number(&self, at: usize) -> WeightId {
        WeightId::from_index(self.tags.origin.weights.bound() + at)
    }

    /// Makes the rest of what `run` has for the period and its next one.
    fn rest(
        &mut self,
        made: &mut Vec<Weight>,
        pairs: &BTreeMap<WeightId, WeightId>,
        run: &mut Vec<WeightId>,
    ) -> Rolled<()> {
        if !run.is_empty() {
            made.reserve(run.len() * self.copies.saturating_sub(2));
            let names = run.iter().map(|first| self.made_names(pairs, *first)).collect::<Rolled<Vec<_>>>()?;
            for copy in 2..self.copies {
                run.iter().zip(&names).try_for_each(|(first, names)| self.make(made, names, *first, copy))?;
            }
            run.clear();
        }
        Ok(())
    }

    /// What a weight of the period is called in each copy.
    fn made_names(&self, pairs: &BTreeMap<WeightId, WeightId>, first: WeightId) -> Rolled<Names<'a>> {
        let all = &self.tags.result.weights;
        let (Some(weight), Some(second)) = (all.get(first), pairs.get(&first).and_then(|b| all.get(*b)))
        else {
            return Err("a made weight has no counterpart".into());
        };
        let names = Names::of(&weight.name, &second.name);
        names.ok_or_else(|| format!("@{} has no counterpart in some layers", weight.name))
    }

    /// Makes a weight of the period for one copy.
    fn make(
        &mut self,
        made: &mut Vec<Weight>,
        names: &Names<'a>,
        first: WeightId,
        copy: usize,
    ) -> Rolled<()> {
        let Some(weight) = self.tags.result.weights.get(first) else {
            return Err("a made weight has no counterpart".into());
        };
        let name = names.name(copy);
        let name = name.ok_or_else(|| format!("@{} has no counterpart in some layers", weight.name))?;
        let Weight { name: _, ty, expr, stream } = weight;
        let (ty, expr, stream) = (ty.clone(), expr.clone(), stream.clone());
        let mut new = Weight { name, ty, expr, stream };
        for part in new.expr.parts_mut() {
            *part = self.weight(*part, Region::Copy(copy))?;
        }
        let id = self.number(made.len());
        let ids = self.weights.entry(first).or_default();
        if ids.len() != copy {
            return Err("weights are made in another order in some layers".into());
        }
        ids.push(id);
        made.push(new);
        Ok(())
    }

    /// Names of made weights begin with that of a part, or are made of source names; the numbers of either have to grow evenly
    /// then. The last layer has its own names in the small module.
    fn grow_evenly(&self) -> Rolled<()> {
        let (origin, layers) = (self.tags.origin, self.tags.layers);
        let mut classes = vec![false; layers.weights.members.len()];
        let mut of_sources = false;
        let all = &self.tags.result.weights;
        for first in self.pairs.keys() {
            let (name, parts) = (&all[*first].name, all[*first].expr.parts());
            of_sources |= !parts.iter().any(|p| name.starts_with(&all[*p].name));
            for part in parts {
                if let Tag::Layer(class, _) = self.tags.weight(*part) {
                    classes[class] = true;
                }
            }
        }
        let uneven = |name: &str| format!("`{name}` does not count layers evenly");
        for (_, members) in classes.iter().zip(&layers.weights.members).filter(|(used, _)| **used) {
            let name = |w: usize| origin.weights[members[w]].name.as_str();
            let names = Names::of(name(0), name(1)).ok_or_else(|| uneven(name(1)))?;
            if let Some(at) = (2..members.len() - 1).find(|at| !names.is(name(*at), *at)) {
                return Err(uneven(name(at)));
            }
        }
        for class in (0..layers.locs.len()).filter(|_| of_sources) {
            let name = |w: usize| layers.loc(origin, class, w);
            let names = Names::of(name(0), name(1)).ok_or_else(|| uneven(name(1)))?;
            if let Some(at) = (2..layers.count - 1).find(|at| !names.is(name(*at), *at)) {
                return Err(uneven(name(at)));
            }
        }
        Ok(())
    }

    /// Where the made weights are read.
    fn regions(&self) -> Rolled<Vec<Option<Region>>> {
        let paired: BTreeSet<WeightId> = self.pairs.iter().flat_map(|(a, b)| [*a, *b]).collect();
        let mut regions: Vec<Option<Region>> = vec![None; self.tags.result.weights.bound()];
        let tail = self.start + 2 * self.period;
        for (at, id) in self.tags.result.graph.order.iter().enumerate() {
            let region = match at {
                _ if at < self.start => Region::Head,
                _ if at < tail => Region::Copy(0),
                _ => Region::Tail,
            };
            let operands = self.tags.result.graph.nodes[*id].operands.iter();
            let mut work: Vec<WeightId> =
                operands.filter_map(|o| if let Operand::Weight(w) = o { Some(*w) } else { None }).collect();
            while let Some(weight) = work.pop() {
                if self.tags.weight(weight) != Tag::Made {
                    continue;
                }
                let shared = regions[weight.index()].replace(region).is_some_and(|r| r != region);
                if shared && !paired.contains(&weight) && self.tags.span(weight).is_some() {
                    return Err("the first and the last layers share made weights".into());
                }
                work.extend(self.tags.result.weights[weight].expr.parts());
            }
        }
        Ok(regions)
    }

    fn value(&self, id: ValueId, region: Region, reader: usize, slot: usize) -> Rolled<ValueId> {
        let Some((at, index)) = self.finder.def(id) else {
            // Inputs come first and keep their numbers.
            let input = self.tags.result.graph.inputs.iter().position(|v| *v == id);
            return input.map(ValueId::from_index).ok_or_else(|| "a value is defined nowhere".into());
        };
        let outside = || "layers are read from outside of their run".to_string();
        let value = match region {
            Region::Head if at < self.start => self.first[at],
            Region::Head => return Err(outside()),
            Region::Copy(copy) => {
                let next = self.node(reader + self.period)?.operands.get(slot);
                if next == Some(&Operand::Value(id)) {
                    if at >= self.start {
                        return Err(outside());
                    }
                    self.first[at]
                } else {
                    self.placed(at + copy * self.period)
                }
            }
            Region::Tail if at < self.start => self.first[at],
            Region::Tail if at < self.start + self.period => return Err(outside()),
            Region::Tail if at < self.start + 2 * self.period => {
                self.first[at - self.period] + (self.copies - 1) * self.values
            }
            Region::Tail => self.first[at],
        };
        Ok(ValueId::from_index(value + index))
    }

    /// The first value of a position of the whole module before the tail.
    fn placed(&self, at: usize) -> usize {
        match at.checked_sub(self.start) {
            None => self.first[at],
            Some(inside) => {
                self.first[self.start + inside % self.period] + inside / self.period * self.values
            }
        }
    }

    /// Source names in a region, sorted.
    fn locs(&self, at: usize, locs: &[Loc], region: Region) -> Rolled<Locs> {
        let (layers, origin, kept) = (self.tags.layers, self.tags.origin, self.tags.map.kept);
        let mut all = Locs::with_capacity(locs.len());
        let mut labels: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (loc, tag) in locs.iter().zip(&self.names[at]) {
            match *tag {
                Tag::Layer(class, label) if region == Region::Head => {
                    labels.entry(class).or_default().push(label)
                }
                Tag::Layer(class, label) => {
                    let window = self.window(self.lowest_name[class], label, region)?;
                    all.push(layers.loc(origin, class, window).clone());
                }
                _ => all.push(loc.clone()),
            }
        }
        for (class, mut labels) in labels {
            labels.sort();
            // What stands for all layers that there are stands for all that there will be.
            let whole = labels.last() == Some(&(kept - 1));
            if whole && (labels.len() < kept - 1 || labels[0] + labels.len() != kept) {
                return Err("a node stands for the first and the last layers".into());
            }
            let windows = if whole { (labels[0]..layers.count).collect() } else { labels };
            all.extend(windows.into_iter().map(|w| layers.loc(origin, class, w).clone()));
        }
        all.sort();
        all.dedup();
        Ok(all)
    }

    fn graph(&mut self) -> Rolled<Graph> {
        let result = self.tags.result;
        let mut graph = Graph { name: result.graph.name.clone(), ..Graph::default() };
        for input in &result.graph.inputs {
            let id = graph.values.push(result.graph.values[*input].clone());
            graph.inputs.push(id);
        }
        let tail = self.start + 2 * self.period;
        let nodes = self.copies * self.period + result.graph.order.len() - 2 * self.period;
        graph.nodes.reserve(nodes);
        graph.order.reserve(nodes);
        graph.values.reserve(self.copies * self.values + result.graph.values.len());
        (0..self.start).try_for_each(|at| self.place(&mut graph, at, Region::Head))?;
        for copy in 0..self.copies {
            let period = self.start..self.start + self.period;
            period.into_iter().try_for_each(|at| self.place(&mut graph, at, Region::Copy(copy)))?;
        }
        (tail..result.graph.order.len()).try_for_each(|at| self.place(&mut graph, at, Region::Tail))?;
        for Output { name, value } in &result.graph.outputs {
            let value = self.value(*value, Region::Tail, 0, 0)?;
            graph.outputs.push(Output { name: name.clone(), value });
        }
        Ok(graph)
    }

    /// Puts the node at position `at` of the small module at the end of the whole one.
    fn place(&mut self, graph: &mut Graph, at: usize, region: Region) -> Rolled<()> {
        let node = self.node(at)?;
        if !matches!(region, Region::Copy(1..)) {
            self.first[at] = graph.values.bound();
        }
        let mut operands = Operands::with_capacity(node.operands.len());
        for (slot, operand) in node.operands.iter().enumerate() {
            operands.push(match operand {
                Operand::Value(v) => Operand::Value(self.value(*v, region, at, slot)?),
                Operand::Weight(w) => Operand::Weight(self.weight(*w, region)?),
                Operand::State(s) => Operand::State(self.state(*s, region)?),
            });
        }
        let id = NodeId::from_index(graph.nodes.bound());
        let mut results = Results::with_capacity(node.results.len());
        for (index, value) in node.results.iter().enumerate() {
            let ty = self.tags.result.graph.values[*value].ty.clone();
            results.push(graph.values.push(Value { ty, def: Def::Node { node: id, index }, place: None }));
        }
        let loc = self.locs(at, &node.loc, region)?;
        let op = node.op.clone();
        graph.order.push(graph.nodes.push(Node {
            op,
            operands,
            results,
            loc,
            kernel: None,
            joined: node.joined,
        }));
        Ok(())
    }
}
