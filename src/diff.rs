//! What distinguishes two modules: nodes by source layer (repeated layers folded), kernels, bytes, weights.

use std::collections::{BTreeMap, BTreeSet};

use millrace_ir::weights::WeightReader;
use millrace_ir::{Bindings, Id, Module, WeightId, fold, text};
use serde::Serialize;

/// One of the two things compared.
#[derive(Clone, Debug)]
pub struct Side {
    /// The module.
    pub module: Module,
    /// Hashes of the stored bytes of weights by name; weights without one are compared by their expressions.
    pub hashes: BTreeMap<String, String>,
}

impl Side {
    /// A module without stored bytes.
    pub fn of(module: Module) -> Self {
        Side { module, hashes: BTreeMap::new() }
    }

    /// Equal for weights with equal bytes.
    fn weight(&self, id: WeightId) -> String {
        let weight = &self.module.weights[id];
        if let Some(hash) = self.hashes.get(&weight.name) {
            return format!("{} {hash}", weight.ty);
        }
        // Parts by name: ids say nothing across modules.
        let parts = weight.expr.parts();
        let names: Vec<&str> = parts.iter().map(|p| self.module.weights[*p].name.as_str()).collect();
        let mut expr = weight.expr.clone();
        expr.parts_mut().iter_mut().for_each(|part| *part = WeightId::from_index(0));
        format!("{} {expr:?} {names:?}", weight.ty)
    }
}

/// Nodes of a layer that only one side has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LayerDiff {
    /// Source layer, numbers replaced by `*`.
    pub name: String,
    /// Op with its attributes, and how many nodes of it there are before and after.
    pub ops: Vec<(String, usize, usize)>,
}

/// What distinguishes two sides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Diff {
    /// Name, before and after: phase, target, inputs, outputs, symbols.
    pub facts: Vec<(String, String, String)>,
    /// Layers whose nodes differ, by name.
    pub layers: Vec<LayerDiff>,
    /// Kernels by name, with the number of nodes that run them.
    pub kernels: Vec<(String, usize, usize)>,
    /// Bytes of weights that nodes read.
    pub weight_bytes: [u64; 2],
    /// Bytes of arenas at the symbols' upper bounds.
    pub arena_bytes: [u64; 2],
    /// Weights that differ, with `-`, `+` or `~` in front.
    pub weights: Vec<String>,
    /// Whether the texts are equal.
    pub same_text: bool,
}

impl Diff {
    /// Whether nothing differs.
    pub fn equal(&self) -> bool {
        self.same_text && self.same_summary()
    }

    /// Whether layers, kernels, bytes and weights are equal; the texts may differ.
    pub fn same_summary(&self) -> bool {
        let Diff { facts, layers, kernels, weight_bytes, arena_bytes, weights, same_text: _ } = self;
        facts.is_empty()
            && layers.is_empty()
            && kernels.is_empty()
            && weights.is_empty()
            && weight_bytes[0] == weight_bytes[1]
            && arena_bytes[0] == arena_bytes[1]
    }
}

/// Compares two sides.
pub fn diff(before: &Side, after: &Side) -> Diff {
    let sides = [before, after].map(|s| &s.module);
    let mut facts = Vec::new();
    for (name, show) in FACTS {
        let [b, a] = sides.map(show);
        if a != b {
            facts.push((name.to_string(), b, a));
        }
    }
    let mut layers: BTreeMap<String, Vec<(String, usize, usize)>> = BTreeMap::new();
    for ((layer, op), b, a) in unequal(sides.map(nodes)) {
        layers.entry(layer).or_default().push((op, b, a));
    }
    let texts = sides.map(compact_text);
    Diff {
        facts,
        layers: layers.into_iter().map(|(name, ops)| LayerDiff { name, ops }).collect(),
        kernels: unequal(sides.map(kernels)),
        weight_bytes: sides.map(weight_bytes),
        arena_bytes: sides.map(arena_bytes),
        weights: weights(before, after),
        same_text: texts[0] == texts[1],
    }
}

type Fact = (&'static str, fn(&Module) -> String);

const FACTS: [Fact; 5] = [
    ("phase", |m| m.phase.to_string()),
    ("target", |m| m.target.clone().unwrap_or_else(|| "none".to_string())),
    ("inputs", |m| types(m.input_types())),
    ("outputs", |m| types(m.output_types())),
    ("symbols", |m| {
        let symbols = m.dims.iter().map(|d| format!("{} in {}..={} by {}", d.sym, d.min, d.max, d.multiple));
        symbols.collect::<Vec<_>>().join(", ")
    }),
];

fn types(list: Vec<(&str, &millrace_ir::TensorType)>) -> String {
    list.into_iter().map(|(name, ty)| format!("{name}: {ty}")).collect::<Vec<_>>().join(", ")
}

fn compact_text(module: &Module) -> String {
    let mut module = module.clone();
    module.compact();
    text::print(&module)
}

/// Number of nodes by folded layer and op.
fn nodes(module: &Module) -> BTreeMap<(String, String), usize> {
    let mut counts = BTreeMap::new();
    for id in &module.graph.order {
        let Some(node) = module.graph.nodes.get(*id) else { continue };
        let layers: BTreeSet<String> = node.loc.iter().map(|l| fold::generalise(l)).collect();
        let layer = layers.into_iter().collect::<Vec<_>>().join(" + ");
        let attrs: Vec<String> = node.op.attrs().0.iter().map(|(k, v)| format!("{k} = {v}")).collect();
        let op = match attrs.is_empty() {
            true => node.op.name().to_string(),
            false => format!("{} {{{}}}", node.op.name(), attrs.join(", ")),
        };
        let layer = if layer.is_empty() { "(none)".to_string() } else { layer };
        *counts.entry((layer, op)).or_insert(0) += 1;
    }
    counts
}

/// Number of nodes by kernel.
fn kernels(module: &Module) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (_, node) in module.graph.nodes.iter() {
        if let Some(kernel) = node.kernel.and_then(|k| module.kernels.get(k)) {
            *counts.entry(kernel.name.clone()).or_insert(0) += 1;
        }
    }
    counts
}

/// The keys whose counts differ.
fn unequal<K: Ord + Clone>(counts: [BTreeMap<K, usize>; 2]) -> Vec<(K, usize, usize)> {
    let keys: BTreeSet<&K> = counts.iter().flat_map(BTreeMap::keys).collect();
    let count = |side: usize, key: &K| counts[side].get(key).copied().unwrap_or(0);
    let pairs = keys.into_iter().map(|k| (k.clone(), count(0, k), count(1, k)));
    pairs.filter(|(_, b, a)| a != b).collect()
}

fn weight_bytes(module: &Module) -> u64 {
    let reader = WeightReader::new(module);
    module.used_weights().into_iter().filter_map(|w| reader.len(w).ok()).sum()
}

fn arena_bytes(module: &Module) -> u64 {
    let maxima = Bindings::maxima(&module.dims);
    module.arenas.iter().filter_map(|(_, a)| a.size.extent(&maxima)).sum()
}

fn weights(before: &Side, after: &Side) -> Vec<String> {
    let of = |side: &Side| -> BTreeMap<String, String> {
        let used = side.module.used_weights().into_iter();
        used.map(|id| (side.module.weights[id].name.clone(), side.weight(id))).collect()
    };
    let (before, after) = (of(before), of(after));
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| match (before.get(name), after.get(name)) {
            (Some(b), Some(a)) => (a != b).then(|| format!("~ {name}")),
            (Some(_), None) => Some(format!("- {name}")),
            (None, _) => Some(format!("+ {name}")),
        })
        .collect()
}
