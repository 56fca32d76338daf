//! Edits of whole modules: each makes a smaller module, or none if the edit makes no sense.

use std::collections::BTreeSet;

use millrace_ir::attr::{Attr, Attrs};
use millrace_ir::names::WeightNames;
use millrace_ir::{Def, Dim, Id, Module, NodeId, Op, Operand, Output, TensorType, Value, Weight, WeightExpr};

/// What becomes of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It stays while something needs it.
    Keep,
    /// Its results become inputs; a node that writes a state forwards the state instead.
    Inputs,
    /// Its only result is replaced by this operand.
    Forward(usize),
    /// Its only result is replaced by a weight of zeros.
    Zero,
}

/// Applies a fate to every node (by its index) and makes `outputs` the outputs; then removes whatever is unused.
pub(super) fn with_fates(module: &Module, fates: &[Fate], outputs: Vec<Output>) -> Option<Module> {
    let mut m = module.clone();
    let mut replaced: Vec<Option<Operand>> = vec![None; m.graph.values.bound()];
    let mut names: BTreeSet<String> = m.input_types().into_iter().map(|(n, _)| n.to_string()).collect();
    let mut number = m.graph.inputs.len();
    let mut weights = WeightNames::of(module);
    for id in module.graph.order.clone() {
        for operand in &mut m.graph.nodes[id].operands {
            *operand = follow(*operand, &replaced);
        }
        let node = &m.graph.nodes[id];
        let fate = match fates.get(id.index()).copied().unwrap_or(Fate::Keep) {
            Fate::Inputs if node.op.traits().writes_state => Fate::Forward(0),
            other => other,
        };
        match fate {
            Fate::Keep => {}
            Fate::Forward(index) => {
                let ([result], Some(operand)) = (&node.results[..], node.operands.get(index)) else {
                    return None;
                };
                replaced[result.index()] = Some(*operand);
            }
            Fate::Zero => {
                let [result] = node.results[..] else { return None };
                let ty = m.graph.values[result].ty.clone();
                ty.const_shape()?;
                let zero = Weight { name: "zero".into(), ty, expr: WeightExpr::Splat(0.0), stream: None };
                let weight = weights.add(&mut m, zero);
                replaced[result.index()] = Some(Operand::Weight(weight));
            }
            Fate::Inputs => {
                for result in node.results.clone() {
                    let ty = m.graph.values[result].ty.clone();
                    let name = fresh(&mut names, &mut number);
                    let input = m.graph.values.push(Value { ty, def: Def::Input(name), place: None });
                    m.graph.inputs.push(input);
                    replaced[result.index()] = Some(Operand::Value(input));
                }
            }
        }
    }
    m.graph.outputs = outputs
        .into_iter()
        .map(|o| match follow(Operand::Value(o.value), &replaced) {
            Operand::Value(value) => Some(Output { value, ..o }),
            _ => None,
        })
        .collect::<Option<_>>()?;
    // An input that is an output says nothing about the nodes.
    let is_input = |o: &Output| matches!(m.graph.values[o.value].def, Def::Input(_));
    if m.graph.outputs.iter().all(is_input) {
        return None;
    }
    tidy(&mut m, |id| fates.get(id.index()).copied().unwrap_or(Fate::Keep) == Fate::Keep);
    Some(m)
}

fn follow(operand: Operand, replaced: &[Option<Operand>]) -> Operand {
    match operand {
        Operand::Value(v) => replaced.get(v.index()).copied().flatten().unwrap_or(operand),
        other => other,
    }
}

/// A name that no input has.
fn fresh(names: &mut BTreeSet<String>, number: &mut usize) -> String {
    loop {
        let name = format!("in{number}");
        *number += 1;
        if names.insert(name.clone()) {
            return name;
        }
    }
}

/// Removes nodes that reach no output and write no state, and inputs, states and symbols that nothing mentions.
fn tidy(m: &mut Module, kept: impl Fn(NodeId) -> bool) {
    let mut live = vec![false; m.graph.nodes.bound()];
    let mut work: Vec<NodeId> = m.graph.outputs.iter().filter_map(|o| m.graph.def_node(o.value)).collect();
    work.extend(m.graph.order.iter().filter(|id| m.graph.nodes[**id].op.traits().writes_state && kept(**id)));
    while let Some(id) = work.pop() {
        if !std::mem::replace(&mut live[id.index()], true) {
            let values = m.graph.nodes[id].operands.iter();
            work.extend(
                values.filter_map(|o| if let Operand::Value(v) = o { m.graph.def_node(*v) } else { None }),
            );
        }
    }
    m.graph.order.retain(|id| live[id.index()]);
    let dead: Vec<NodeId> = m.graph.nodes.ids().filter(|id| !live[id.index()]).collect();
    dead.into_iter().for_each(|id| m.graph.remove_node(id));
    let mut used = vec![false; m.graph.values.bound()];
    let mut states = vec![false; m.states.bound()];
    m.graph.outputs.iter().for_each(|o| used[o.value.index()] = true);
    for operand in m.graph.nodes.iter().flat_map(|(_, n)| &n.operands) {
        match operand {
            Operand::Value(v) => used[v.index()] = true,
            Operand::State(s) => states[s.index()] = true,
            Operand::Weight(_) => {}
        }
    }
    let (inputs, unused): (Vec<_>, Vec<_>) = m.graph.inputs.iter().partition(|v| used[v.index()]);
    m.graph.inputs = inputs;
    unused.into_iter().for_each(|v| drop(m.graph.values.remove(v)));
    let idle: Vec<_> = m.states.ids().filter(|s| !states[s.index()]).collect();
    idle.into_iter().for_each(|s| drop(m.states.remove(s)));
    drop_symbols(m);
}

fn drop_symbols(m: &mut Module) {
    let mut used = BTreeSet::new();
    let mut see = |dim: &Dim| used.extend(dim.symbols());
    m.graph.values.iter().flat_map(|(_, v)| &v.ty.shape).for_each(&mut see);
    m.states.iter().flat_map(|(_, s)| &s.ty.shape).for_each(&mut see);
    m.arenas.iter().for_each(|(_, a)| see(&a.size));
    for (_, node) in m.graph.nodes.iter() {
        node.op.attrs().0.iter().for_each(|(_, attr)| attr.visit_dims(&mut see));
    }
    m.dims.retain(|d| used.contains(&d.sym));
}

/// Maps the extents of inputs, weights and states, and with `attributes` those in ops, and infers all other types.
pub(super) fn with_dims(module: &Module, attributes: bool, map: &dyn Fn(&Dim) -> Dim) -> Option<Module> {
    let mut m = module.clone();
    let shape = |ty: &mut TensorType| ty.shape.iter_mut().for_each(|d| *d = map(d));
    for input in m.graph.inputs.clone() {
        shape(&mut m.graph.values[input].ty);
    }
    for (_, weight) in m.weights.iter_mut() {
        shape(&mut weight.ty);
        if let WeightExpr::Pack { segments, .. } | WeightExpr::Cores { segments, .. } = &mut weight.expr {
            for rows in segments {
                *rows = usize::try_from(map(&Dim::from(*rows)).as_const()?).ok()?;
            }
        }
    }
    m.states.iter_mut().for_each(|(_, s)| shape(&mut s.ty));
    for id in m.graph.order.clone() {
        if attributes {
            let op = &m.graph.nodes[id].op;
            let attrs = Attrs(op.attrs().0.into_iter().map(|(k, v)| (k, map_attr(v, map))).collect());
            let op: Op = Op::from_text(op.name(), &attrs)?.ok()?;
            m.graph.nodes[id].op = op.into();
        }
        let node = &m.graph.nodes[id];
        let types = node.op.infer(&m.operand_types(&node.operands)).ok()?;
        for (result, ty) in node.results.clone().into_iter().zip(types) {
            m.graph.values[result].ty = ty;
        }
    }
    drop_symbols(&mut m);
    Some(m)
}

fn map_attr(attr: Attr, map: &dyn Fn(&Dim) -> Dim) -> Attr {
    let all = |items: Vec<Attr>| items.into_iter().map(|a| map_attr(a, map)).collect();
    match attr {
        Attr::Dim(dim) => Attr::Dim(map(&dim)),
        Attr::Call(name, items) => Attr::Call(name, all(items)),
        Attr::List(items) => Attr::List(all(items)),
        other => other,
    }
}

/// Reads input `from` wherever input `gone` is read.
pub(super) fn merge_inputs(module: &Module, from: usize, gone: usize) -> Option<Module> {
    let (from, gone) = (module.graph.inputs[from], module.graph.inputs[gone]);
    if module.graph.values[from].ty != module.graph.values[gone].ty {
        return None;
    }
    let mut m = module.clone();
    for (_, node) in m.graph.nodes.iter_mut() {
        node.operands
            .iter_mut()
            .filter(|o| **o == Operand::Value(gone))
            .for_each(|o| *o = Operand::Value(from));
    }
    m.graph.outputs.iter_mut().filter(|o| o.value == gone).for_each(|o| o.value = from);
    tidy(&mut m, |_| true);
    Some(m)
}

/// Short names for inputs and weights.
pub(super) fn with_short_names(module: &Module) -> Option<Module> {
    let mut m = module.clone();
    for (at, input) in m.graph.inputs.clone().into_iter().enumerate() {
        m.graph.values[input].def = Def::Input(format!("x{at}"));
    }
    m.weights.iter_mut().enumerate().for_each(|(at, (_, weight))| weight.name = format!("w{at}"));
    Some(m)
}
