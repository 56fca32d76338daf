//! Writes the layers of a draft out: each with weights, states and names of its own, less regular now and then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::case::RandomGraph;
use super::draft::shuffle;
use super::layers::Run;
use super::random::Random;
use crate::arena::Id;
use crate::graph::*;
use crate::ops::binary::BinaryFn;
use crate::ops::unary::UnaryFn;
use crate::ops::{Binary, LayerNorm, Op, RmsNorm, SharedOp, Unary};
use crate::tensor::round_to;
use crate::types::TensorType;

/// How layers are told apart.
#[derive(Clone, Copy, PartialEq)]
enum Names {
    /// By numbers that grow by a constant.
    Counted { first: usize, step: usize },
    /// By numbers in no order.
    Uneven,
    /// Not at all.
    None,
}

impl Names {
    fn any(random: &mut Random) -> Names {
        match random.below(12) {
            0 => Names::None,
            1 => Names::Uneven,
            2 => Names::Counted { first: random.below(12), step: random.between(1, 3) },
            _ => Names::Counted { first: 0, step: 1 },
        }
    }

    fn layer(self, run: usize, layer: usize) -> String {
        let stem = ["layers", "blocks"][run % 2];
        match self {
            Names::Counted { first, step } => format!("{stem}.{}", first + layer * step),
            Names::Uneven => format!("{stem}.{}", layer * 5 % 13),
            Names::None => stem.to_string(),
        }
    }
}

/// Who has a weight.
#[derive(Clone, Copy, PartialEq)]
enum Owner {
    /// All layers and everybody else.
    All,
    /// Every layer has one.
    Layer,
    /// Every two layers have one.
    Pair,
}

/// What makes a layer another one.
enum Odd {
    Constant(WeightId),
    Op(usize, SharedOp),
    Extra,
    Skip(usize),
    Swapped(usize),
    Name,
}

impl Odd {
    fn said(&self) -> &'static str {
        match self {
            Odd::Constant(_) => "another constant",
            Odd::Op(..) => "another op",
            Odd::Extra => "one more node",
            Odd::Skip(_) => "reads what the first layer got",
            Odd::Swapped(_) => "another order",
            Odd::Name => "another name",
        }
    }
}

/// How the layers of a run are written out.
struct Plan {
    names: Names,
    odd: Option<(usize, Odd)>,
    /// Style of each node's name.
    styles: Vec<usize>,
}

struct Stack<'a> {
    draft: &'a Module,
    runs: &'a [Run],
    plans: Vec<Plan>,
    out: Module,
    /// What stands for a value of the draft.
    values: Vec<Option<Operand>>,
    owners: Vec<Owner>,
    /// The layer whose weight is read from outside of the layers.
    outside: Vec<usize>,
    weights: BTreeMap<(WeightId, usize), WeightId>,
    states: BTreeMap<(StateId, usize), StateId>,
    /// How weights of layers are called.
    weight_names: Names,
    /// Node and layer of each node written; none outside of the layers.
    written: Vec<(usize, Option<usize>)>,
}

/// The layers of `draft` written out, and what was planted.
pub(super) fn stack(
    draft: RandomGraph,
    runs: &[Run],
    random: &mut Random,
) -> (RandomGraph, Vec<&'static str>) {
    let module = &draft.module;
    let graph = &module.graph;
    let plans: Vec<Plan> = runs.iter().map(|run| plan(module, run, random)).collect();
    let mut planted: Vec<&'static str> =
        plans.iter().filter_map(|p| Some(p.odd.as_ref()?.1.said())).collect();
    let mut owners = vec![Owner::All; module.weights.bound()];
    for weight in runs.iter().flat_map(|run| run.weights.clone()) {
        owners[weight] = match random.below(60) {
            0..=4 => Owner::All,
            5 => Owner::Pair,
            _ => Owner::Layer,
        };
    }
    if owners.contains(&Owner::Pair) {
        planted.push("pairs share weights");
    }
    let outside = owners.iter().map(|_| random.below(runs.iter().map(|r| r.layers).min().unwrap_or(1)));
    let mut stack = Stack {
        draft: module,
        runs,
        plans,
        out: Module {
            phase: module.phase,
            target: module.target.clone(),
            dims: module.dims.clone(),
            ..Module::new(&module.name)
        },
        values: vec![None; graph.values.bound()],
        outside: outside.collect(),
        owners,
        weights: BTreeMap::new(),
        states: BTreeMap::new(),
        weight_names: Names::any(random),
        written: Vec::new(),
    };
    let stands_in = |v: &ValueId| {
        let o = Operand::Value(*v);
        runs.iter().flat_map(|r| &r.carried).any(|c| c.taken == o || c.after == o)
    };
    let mut fills = Vec::new();
    for (input, fill) in graph.inputs.iter().zip(&draft.fills).filter(|(v, _)| !stands_in(v)) {
        let id = stack.out.graph.values.push(graph.values[*input].clone());
        stack.out.graph.inputs.push(id);
        stack.values[input.index()] = Some(Operand::Value(id));
        fills.push(fill.clone());
    }
    if random.once_in(3) {
        // All weights of one kind together, layer after layer within.
        for run in runs {
            for weight in run.weights.clone() {
                (0..run.layers).for_each(|layer| {
                    stack.weight(WeightId::from_index(weight), Some(layer));
                });
            }
        }
    }
    let mut at = 0;
    for (index, run) in runs.iter().enumerate() {
        (at..run.nodes.start).for_each(|k| stack.place(k, None));
        stack.run(index);
        at = run.nodes.end;
    }
    (at..graph.order.len()).for_each(|k| stack.place(k, None));
    if stack.outputs(random) {
        planted.push("outputs inside");
    }
    let mut module = stack.out;
    if random.once_in(16) {
        shuffle(&mut module, random);
        planted.push("shuffled");
    }
    module.compact();
    let output_bounds = vec![(f64::NEG_INFINITY, f64::INFINITY); module.graph.outputs.len()];
    (RandomGraph { seed: 0, module, fills, output_bounds, paged: draft.paged }, planted)
}

/// Chooses how a run is written out.
fn plan(draft: &Module, run: &Run, random: &mut Random) -> Plan {
    let odd = random.once_in(3).then(|| (random.below(run.layers), odd(draft, run, random)));
    let styles = run.nodes.clone().map(|_| random.below(16)).collect();
    Plan { names: Names::any(random), odd, styles }
}

fn odd(draft: &Module, run: &Run, random: &mut Random) -> Odd {
    let node = |k: usize| &draft.graph.nodes[draft.graph.order[k]];
    match random.below(6) {
        0 => {
            let constant = |w: &WeightId| {
                let weight = &draft.weights[*w];
                let literal = matches!(weight.expr, WeightExpr::Splat(_) | WeightExpr::Dense(_));
                literal && weight.ty.dtype.is_float()
            };
            let found: Vec<WeightId> =
                run.weights.clone().map(WeightId::from_index).filter(constant).collect();
            if !found.is_empty() {
                return Odd::Constant(random.pick(&found));
            }
        }
        1 => {
            let found: Vec<(usize, SharedOp)> =
                run.nodes.clone().filter_map(|k| Some((k, other(&node(k).op)?))).collect();
            if !found.is_empty() {
                let (k, op) = random.pick(&found);
                return Odd::Op(k, op);
            }
        }
        2 => {
            let touches = |k: usize| node(k).operands.iter().any(|o| draft.state_of(*o).is_some());
            let free = |k: &usize| {
                let reads = |o: &Operand| matches!(o, Operand::Value(v) if node(*k).results.contains(v));
                !(node(k + 1).operands.iter().any(reads) || touches(*k) && touches(k + 1))
            };
            let found: Vec<usize> = (run.nodes.start..run.nodes.end.saturating_sub(1)).filter(free).collect();
            if !found.is_empty() {
                return Odd::Swapped(random.pick(&found));
            }
        }
        3 if !run.carried.is_empty() => return Odd::Skip(random.below(run.carried.len())),
        4 => return Odd::Name,
        _ => {}
    }
    Odd::Extra
}

/// Another op with results of the same type that takes the same operands.
fn other(op: &Op) -> Option<SharedOp> {
    Some(match op {
        Op::Unary(u) if u.function == UnaryFn::Tanh => Unary { function: UnaryFn::Sigmoid }.into(),
        Op::Unary(_) => Unary { function: UnaryFn::Tanh }.into(),
        Op::Binary(b) if b.function.compares() => return None,
        Op::Binary(b) if b.function == BinaryFn::Max => Binary { function: BinaryFn::Min }.into(),
        Op::Binary(_) => Binary { function: BinaryFn::Max }.into(),
        Op::RmsNorm(n) => RmsNorm { eps: n.eps * 2.0 }.into(),
        Op::LayerNorm(n) => LayerNorm { eps: n.eps * 2.0 }.into(),
        _ => return None,
    })
}

impl Stack<'_> {
    /// The weight that stands for one of the draft, in a layer or outside of them.
    fn weight(&mut self, of: WeightId, layer: Option<usize>) -> WeightId {
        let slot = match (self.owners[of.index()], layer.unwrap_or(self.outside[of.index()])) {
            (Owner::All, _) => 0,
            (Owner::Layer, layer) => layer,
            (Owner::Pair, layer) => layer / 2,
        };
        if let Some(made) = self.weights.get(&(of, slot)) {
            return *made;
        }
        let mut new = self.draft.weights[of].clone();
        for part in new.expr.parts_mut() {
            *part = self.weight(*part, Some(slot));
        }
        if let WeightExpr::Random { seed, .. } = &mut new.expr {
            *seed ^= (slot as u64) << 24;
        }
        let run = self.runs.iter().position(|r| r.weights.contains(&of.index()));
        if let Some(run) = run {
            if let Some((odd, Odd::Constant(odd_weight))) = &self.plans[run].odd
                && (*odd, *odd_weight) == (slot, of)
            {
                vary(&mut new.expr, &new.ty);
            }
            if self.owners[of.index()] != Owner::All {
                new.name = match self.weight_names {
                    // Names are unique all the same.
                    Names::None => format!("{}_{}", new.name, (b'a' + slot as u8) as char),
                    names => format!("{}.{}", names.layer(run, slot), new.name),
                };
            }
        }
        let id = self.out.weights.push(new);
        self.weights.insert((of, slot), id);
        id
    }

    fn state(&mut self, of: StateId, layer: usize) -> StateId {
        let draft = self.draft;
        *self.states.entry((of, layer)).or_insert_with(|| {
            let name = format!("cache{}.{layer}", of.index());
            self.out.states.push(State { name, ..draft.states[of].clone() })
        })
    }

    fn operand(&mut self, of: Operand, layer: Option<usize>) -> Operand {
        match of {
            // The draft defines before it uses.
            Operand::Value(v) => self.values[v.index()].unwrap_or(of),
            Operand::Weight(w) => Operand::Weight(self.weight(w, layer)),
            Operand::State(s) => Operand::State(self.state(s, layer.unwrap_or(0))),
        }
    }

    /// Writes a run of layers out.
    fn run(&mut self, run: usize) {
        let of = &self.runs[run];
        let first: Vec<Operand> = of.carried.iter().map(|c| self.operand(c.first, None)).collect();
        let mut carried = first.clone();
        for layer in 0..of.layers {
            let mut nodes: Vec<usize> = of.nodes.clone().collect();
            let mut taken = carried.clone();
            match &self.plans[run].odd {
                Some((odd, what)) if *odd == layer => match what {
                    Odd::Skip(at) => taken[*at] = first[*at],
                    Odd::Swapped(k) => nodes.swap(k - of.nodes.start, k + 1 - of.nodes.start),
                    Odd::Extra => {
                        for x in &mut taken {
                            let op = Unary { function: UnaryFn::Tanh };
                            *x = self.add(op.into(), vec![*x], "extra", usize::MAX, Some(layer));
                        }
                    }
                    _ => {}
                },
                _ => {}
            }
            for (c, taken) in of.carried.iter().zip(taken) {
                self.stands_for(c.taken, taken);
            }
            nodes.into_iter().for_each(|k| self.place(k, Some((run, layer))));
            carried = of.carried.iter().map(|c| self.operand(c.left, Some(layer))).collect();
        }
        for (c, last) in of.carried.iter().zip(carried) {
            self.stands_for(c.after, last);
        }
    }

    fn stands_for(&mut self, of: Operand, operand: Operand) {
        if let Operand::Value(v) = of {
            self.values[v.index()] = Some(operand);
        }
    }

    /// Writes node `k` of the draft, in a layer of a run or outside of them.
    fn place(&mut self, k: usize, layer: Option<(usize, usize)>) {
        let draft = self.draft;
        let node = &draft.graph.nodes[draft.graph.order[k]];
        let operands = node.operands.iter().map(|o| self.operand(*o, layer.map(|l| l.1))).collect();
        let (mut op, mut name) = (node.op.clone(), node.loc[0].to_string());
        if let Some((run, layer)) = layer {
            let plan = &self.plans[run];
            let odd = plan.odd.as_ref().filter(|(odd, _)| *odd == layer).map(|(_, what)| what);
            if let Some(Odd::Op(at, other)) = odd
                && *at == k
            {
                op = other.clone();
            }
            let layer = plan.names.layer(run, layer);
            let spelled = op.name();
            name = match plan.styles[k - self.runs[run].nodes.start] {
                0 => "shared".to_string(),
                1..=4 => layer,
                5 | 6 => format!("{spelled}_{k}.{layer}"),
                7 => format!("{layer}.{spelled}"),
                _ => format!("{layer}.{k}.{spelled}"),
            };
            if let Some(Odd::Name) = odd {
                name.push_str(".other");
            }
        }
        let first = self.add(op, operands, &name, k, layer.map(|l| l.1));
        let Operand::Value(first) = first else { return };
        for (index, result) in node.results.iter().enumerate() {
            self.values[result.index()] = Some(Operand::Value(ValueId::from_index(first.index() + index)));
        }
    }

    /// Adds a node; returns its first result.
    fn add(
        &mut self,
        op: SharedOp,
        operands: Vec<Operand>,
        name: &str,
        k: usize,
        layer: Option<usize>,
    ) -> Operand {
        let loc: Loc = Arc::from(name);
        let id = match self.out.new_node(op, operands.clone(), [loc]) {
            Ok(id) => id,
            // The types are those of the draft, where the node was accepted.
            Err(_) => return operands[0],
        };
        self.out.graph.order.push(id);
        self.written.push((k, layer));
        Operand::Value(self.out.graph.nodes[id].results[0])
    }

    /// Names outputs; whether some are in layers before the last.
    fn outputs(&mut self, random: &mut Random) -> bool {
        let graph = &self.out.graph;
        let read: BTreeSet<Operand> = graph.nodes.iter().flat_map(|(_, n)| n.operands.clone()).collect();
        let after = self.runs.iter().flat_map(|r| &r.carried).filter_map(|c| match c.after {
            Operand::Value(v) => self.values[v.index()],
            _ => None,
        });
        let mut chosen: Vec<Operand> = after.collect();
        let mut inside = false;
        let mut classes: BTreeMap<usize, bool> = BTreeMap::new();
        for (id, (k, layer)) in graph.order.iter().zip(&self.written) {
            let node = &graph.nodes[*id];
            if node.op.traits().writes_state {
                continue;
            }
            let operand = Operand::Value(node.results[0]);
            let wanted = match layer {
                None => random.once_in(if read.contains(&operand) { 10 } else { 1 }),
                // Of every layer or of none, or of single ones.
                Some(_) => *classes.entry(*k).or_insert_with(|| random.once_in(300)) || random.once_in(2000),
            };
            inside |= wanted && layer.is_some();
            if wanted {
                chosen.push(operand);
            }
        }
        chosen.retain(|o| matches!(o, Operand::Value(_)));
        chosen.dedup();
        if chosen.is_empty() {
            chosen.push(Operand::Value(graph.inputs[0]));
        }
        for (n, operand) in chosen.into_iter().enumerate() {
            if let Operand::Value(value) = operand {
                self.out.graph.outputs.push(Output { name: format!("y{n}"), value });
            }
        }
        inside
    }
}

/// Other elements.
fn vary(expr: &mut WeightExpr, ty: &TensorType) {
    let next = |v: f64| round_to(ty.dtype, v + 0.5);
    match expr {
        WeightExpr::Splat(value) => *value = next(*value),
        WeightExpr::Dense(values) => values.iter_mut().take(1).for_each(|v| *v = next(*v)),
        _ => {}
    }
}
