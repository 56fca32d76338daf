//! The kinds of candidates, in the order they are tried.

use std::collections::BTreeSet;

use millrace_ir::{Dim, Id, Module, NodeId, Output, ValueId, WeightExpr, WeightId};

use super::Search;
use super::edit::{Fate, merge_inputs, with_dims, with_fates, with_short_names};

/// Most nodes that are tried one by one as the last one, after halving.
const CUTS: usize = 64;

fn keep(module: &Module) -> Vec<Fate> {
    vec![Fate::Keep; module.graph.nodes.bound()]
}

/// The module with one output: this value.
fn cut(module: &Module, value: ValueId) -> Option<Module> {
    let name = module.graph.outputs.first().map_or("y", |o| o.name.as_str()).to_string();
    with_fates(module, &keep(module), vec![Output { name, value }])
}

/// One output instead of several, and as early in the graph as possible.
pub(super) fn outputs(search: &mut Search<'_>) {
    for output in search.best.graph.outputs.clone() {
        if search.best.graph.outputs.len() > 1 {
            let alone = with_fates(&search.best, &keep(&search.best), vec![output]);
            if search.take(alone) {
                break;
            }
        }
    }
    let mut at = 0;
    while search.best.graph.outputs.len() > 1 && at < search.best.graph.outputs.len() {
        let mut fewer = search.best.graph.outputs.clone();
        fewer.remove(at);
        let candidate = with_fates(&search.best, &keep(&search.best), fewer);
        at += usize::from(!search.take(candidate));
    }
    let result = |m: &Module, at: usize| {
        let node: NodeId = *m.graph.order.get(at)?;
        m.graph.nodes[node].results.first().copied()
    };
    // The fault shows in the output and not before it: search for the place in between.
    let (mut low, mut high) = (0, search.best.graph.order.len());
    while high > low + 1 {
        let middle = low + (high - low) / 2;
        let candidate = result(&search.best, middle).and_then(|v| cut(&search.best, v));
        if search.take(candidate) {
            // The order is that of the smaller module now; what precedes the cut is in it.
            high = search.best.graph.order.len().saturating_sub(1);
            low = low.min(high);
        } else {
            low = middle;
        }
    }
    for at in 0..search.best.graph.order.len().min(CUTS) {
        let candidate = result(&search.best, at).and_then(|v| cut(&search.best, v));
        if search.take(candidate) {
            break;
        }
    }
}

/// Stretches of nodes become inputs, long ones first.
pub(super) fn nodes(search: &mut Search<'_>) {
    let mut width = search.best.graph.order.len().div_ceil(2);
    loop {
        let mut at = 0;
        while at < search.best.graph.order.len() {
            let order = &search.best.graph.order;
            let mut fates = keep(&search.best);
            let end = (at + width).min(order.len());
            order[at..end].iter().for_each(|id| fates[id.index()] = Fate::Inputs);
            let candidate = with_fates(&search.best, &fates, search.best.graph.outputs.clone());
            if !search.take(candidate) {
                at = end;
            }
        }
        if width <= 1 {
            return;
        }
        width = width.div_ceil(2);
    }
}

/// Single nodes forward an operand, or become a weight of zeros.
pub(super) fn forwards(search: &mut Search<'_>) {
    let mut at = 0;
    'nodes: while at < search.best.graph.order.len() {
        let id = search.best.graph.order[at];
        for index in 0..search.best.graph.nodes[id].operands.len() {
            let node = &search.best.graph.nodes[id];
            let same = node.results.len() == 1
                && search.best.operand_type(node.operands[index])
                    == &search.best.graph.values[node.results[0]].ty;
            if !same {
                continue;
            }
            let mut fates = keep(&search.best);
            fates[id.index()] = Fate::Forward(index);
            let candidate = with_fates(&search.best, &fates, search.best.graph.outputs.clone());
            if search.take(candidate) {
                continue 'nodes;
            }
        }
        let mut fates = keep(&search.best);
        fates[id.index()] = Fate::Zero;
        let candidate = with_fates(&search.best, &fates, search.best.graph.outputs.clone());
        at += usize::from(!search.take(candidate));
    }
}

/// Inputs of one type become one.
pub(super) fn inputs(search: &mut Search<'_>) {
    let mut gone = 1;
    while gone < search.best.graph.inputs.len() {
        let merged = (0..gone).any(|from| {
            let candidate = merge_inputs(&search.best, from, gone);
            search.take(candidate)
        });
        gone += usize::from(!merged);
    }
}

/// Weights become splats: all of them, then one by one.
pub(super) fn weights(search: &mut Search<'_>) {
    let simple = |m: &Module, which: &dyn Fn(WeightId) -> bool, value: f64| {
        let mut m = m.clone();
        for (_, weight) in m.weights.iter_mut().filter(|(id, _)| which(*id)) {
            if !matches!(weight.expr, WeightExpr::Splat(_)) {
                weight.expr = WeightExpr::Splat(value);
            }
        }
        Some(m)
    };
    for value in [0.0, 1.0] {
        let candidate = simple(&search.best, &|_| true, value);
        search.take(candidate);
    }
    let mut at = 0;
    loop {
        let id = search.best.weights.ids().nth(at);
        let Some(id) = id else { return };
        for value in [0.0, 1.0] {
            let candidate = simple(&search.best, &|w| w == id, value);
            if search.take(candidate) {
                break;
            }
        }
        // A splat may drop the parts it was made of; those that moved here are tried in the next round.
        at += 1;
    }
}

/// Symbols become constants, and large extents small ones.
pub(super) fn extents(search: &mut Search<'_>) {
    for decl in search.best.dims.clone() {
        let small = [1, 2, 3, 4].into_iter().filter(|n| (decl.min..=decl.max).contains(n));
        for value in small.filter(|n| n % decl.multiple.max(1) == 0).chain([decl.min]) {
            let with = [(decl.sym, Dim::from(value as usize))];
            let candidate = with_dims(&search.best, true, &|d| d.substitute(&with));
            if search.take(candidate) {
                break;
            }
        }
    }
    let mut seen = BTreeSet::new();
    loop {
        let largest = constants(&search.best).into_iter().rev().find(|c| *c > 1 && !seen.contains(c));
        let Some(old) = largest else { return };
        seen.insert(old);
        for new in [1, 2, 3, 4, old / 2].into_iter().filter(|new| (1..old).contains(new)) {
            let map = |d: &Dim| if d.as_const() == Some(old) { Dim::from(new) } else { d.clone() };
            let taken = [true, false].iter().any(|attributes| {
                let candidate = with_dims(&search.best, *attributes, &map);
                search.take(candidate)
            });
            if taken {
                break;
            }
        }
    }
}

/// Constant extents of inputs, weights and states.
fn constants(module: &Module) -> BTreeSet<i64> {
    let inputs = module.graph.inputs.iter().map(|v| &module.graph.values[*v].ty);
    let weights = module.weights.iter().map(|(_, w)| &w.ty);
    let states = module.states.iter().map(|(_, s)| &s.ty);
    let dims = inputs.chain(weights).chain(states).flat_map(|ty| &ty.shape);
    dims.filter_map(Dim::as_const).collect()
}

/// Source names go: all of them, then those of single nodes. Inputs and weights get short names.
pub(super) fn names(search: &mut Search<'_>) {
    let candidate = with_short_names(&search.best);
    search.take(candidate);
    let without = |m: &Module, which: &dyn Fn(NodeId) -> bool| {
        let mut m = m.clone();
        m.graph.nodes.iter_mut().filter(|(id, _)| which(*id)).for_each(|(_, n)| n.loc.clear());
        Some(m)
    };
    let candidate = without(&search.best, &|_| true);
    if search.take(candidate) {
        return;
    }
    for id in search.best.graph.order.clone() {
        let candidate = without(&search.best, &|n| n == id);
        search.take(candidate);
    }
}
