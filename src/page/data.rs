//! The facts of a page as JSON. Nodes, values and types are columns of numbers with tables of strings beside them,
//! so that a graph of tens of thousands of nodes stays small.

use std::collections::BTreeMap;

use millrace_compiler::codegen::WeightMode;
use millrace_ir::cost::{Cost, Rates, node_cost};
use millrace_ir::weights::{WeightReader, needs_source};
use millrace_ir::{
    Bindings, Def, Id, Module, Operand, Place, ValueId, Weight, WeightExpr, WeightId, fold, plan,
};
use serde_json::{Value, json};

use super::{Facts, FileFacts, History};

/// Strings by number, in order of first use.
#[derive(Default)]
struct Strings {
    numbers: BTreeMap<String, usize>,
    list: Vec<String>,
}

impl Strings {
    fn number(&mut self, text: impl Into<String>) -> usize {
        let text = text.into();
        if let Some(number) = self.numbers.get(&text) {
            return *number;
        }
        self.numbers.insert(text.clone(), self.list.len());
        self.list.push(text);
        self.list.len() - 1
    }
}

/// Everything the scripts read.
pub(super) fn data(module: &Module, facts: &Facts<'_>, history: Option<&History>) -> Value {
    let mut strings = Strings::default();
    let nodes = nodes(module, &mut strings);
    let values = values(module, &mut strings);
    let (rates, rates_of) = Rates::of_target(&facts.manifest.target);
    let dims: Vec<Value> =
        module.dims.iter().map(|d| json!([d.sym.to_string(), d.min, d.max, d.multiple, d.hint])).collect();
    json!({
        "manifest": facts.manifest,
        "file": facts.file.as_ref().map(|FileFacts { bytes, identity, producer, sections }| json!({
            "bytes": bytes, "identity": identity, "producer": producer, "sections": sections,
        })),
        "phase": module.phase.name(),
        "symbols": dims,
        "inputs": named(module.input_types()),
        "outputs": named(module.output_types()),
        "rates": { "flops": rates.flops, "bytes": rates.bytes, "of": rates_of },
        "memory": memory(module),
        "nodes": nodes,
        "values": values,
        "kernels": module.kernels.iter()
            .map(|(id, k)| json!([id.to_string(), k.name, k.dtypes]))
            .collect::<Vec<_>>(),
        "weights": weights(module, facts.weights, &mut strings),
        "states": states(module, &mut strings),
        "groups": groups(module),
        "buffers": buffers(module),
        "history": history.map(history_json),
        "strings": strings.list,
    })
}

fn named(list: Vec<(&str, &millrace_ir::TensorType)>) -> Vec<Value> {
    list.into_iter().map(|(name, ty)| json!([name, ty.to_string()])).collect()
}

fn nodes(module: &Module, strings: &mut Strings) -> Value {
    let bindings = [Bindings::hints(&module.dims), Bindings::maxima(&module.dims)];
    let (mut ids, mut ops, mut attrs, mut kernels) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut layers, mut operands, mut results) = (Vec::new(), Vec::new(), Vec::new());
    let mut costs = [Vec::new(), Vec::new()];
    for id in &module.graph.order {
        let Some(node) = module.graph.nodes.get(*id) else { continue };
        ids.push(id.index());
        ops.push(strings.number(node.op.name()));
        let text: Vec<String> = node.op.attrs().0.iter().map(|(k, v)| format!("{k} = {v}")).collect();
        attrs.push(strings.number(text.join(", ")));
        kernels.push(node.kernel.map_or(-1, |k| k.index() as i64));
        layers.push(node.loc.iter().map(|l| strings.number(l.as_ref())).collect::<Vec<_>>());
        // Three kinds of operands in one number.
        let encode = |operand: &Operand| match operand {
            Operand::Value(v) => v.index() * 3,
            Operand::Weight(w) => w.index() * 3 + 1,
            Operand::State(s) => s.index() * 3 + 2,
        };
        operands.push(node.operands.iter().map(encode).collect::<Vec<_>>());
        results.push(node.results.iter().map(|r| r.index()).collect::<Vec<_>>());
        for (bindings, list) in bindings.iter().zip(&mut costs) {
            let Cost { flops, read, written } = node_cost(module, *id, bindings).unwrap_or_default();
            list.push([flops, read, written]);
        }
    }
    json!({
        "id": ids, "op": ops, "attrs": attrs, "kernel": kernels, "layers": layers,
        "in": operands, "out": results, "cost": costs,
    })
}

/// Per value: id, type, place (0 for none, else number of its text plus 1), name of an input (likewise).
fn values(module: &Module, strings: &mut Strings) -> Value {
    let (mut ids, mut types, mut places, mut names) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (id, value) in module.graph.values.iter() {
        ids.push(id.index());
        types.push(strings.number(value.ty.to_string()));
        places.push(value.place.as_ref().map_or(0, |place| {
            let text = match place {
                Place::Arena { arena, offset } => {
                    format!("{}[{offset}]", module.arenas.get(*arena).map_or("arena", |a| a.name.as_str()))
                }
                Place::State(state) => {
                    format!("state {}", module.states.get(*state).map_or("", |s| s.name.as_str()))
                }
                Place::Output(n) => format!("output {n}, the caller's"),
            };
            strings.number(text) + 1
        }));
        names.push(match &value.def {
            Def::Input(name) => strings.number(name.as_str()) + 1,
            Def::Node { .. } => 0,
        });
    }
    json!({ "id": ids, "type": types, "place": places, "name": names })
}

/// Activations at the upper bounds, weights that are read, states at the upper bounds.
fn memory(module: &Module) -> Value {
    let maxima = Bindings::maxima(&module.dims);
    let report =
        millrace_compiler::passes::plan_report(module, &maxima).filter(|_| !module.arenas.is_empty());
    let reader = WeightReader::new(module);
    let (mut total, mut streamable) = (0u64, 0u64);
    for id in module.used_weights() {
        let bytes = reader.len(id).unwrap_or(0);
        total = total.saturating_add(bytes);
        if module.weights[id].stream.is_some() {
            streamable = streamable.saturating_add(bytes);
        }
    }
    let states = module.states.iter().filter_map(|(_, s)| s.ty.bytes().extent(&maxima));
    let arena = module.arenas.iter().map(|(_, a)| json!([a.name, a.size.to_string(), a.align]));
    json!({
        "peak": report.map(|r| r.peak_bytes),
        "lower_bound": report.map(|r| r.lower_bound_bytes),
        "buffers": report.map(|r| r.buffers),
        "weights": total,
        "streamable": streamable,
        "states": states.fold(0u64, u64::saturating_add),
        "arenas": arena.collect::<Vec<_>>(),
    })
}

/// Per weight: id, name, type, bytes, first use (position or -1), stream facts, tensors of the checkpoint, how kept.
fn weights(module: &Module, mode: WeightMode, strings: &mut Strings) -> Vec<Value> {
    let reader = WeightReader::new(module);
    let used = module.used_weights();
    let describe = |id: &WeightId| {
        let Weight { name, ty, expr: _, stream } = module.weights.get(*id)?;
        let stream = stream.as_ref().map(|s| json!([s.first_use, s.tile_axis, s.tile_bytes]));
        let bytes = reader.len(*id).unwrap_or(0);
        let from: Vec<usize> = sources(module, *id).into_iter().map(|s| strings.number(s)).collect();
        let ty = strings.number(ty.to_string());
        // 0 bound at load, 1 stored, 2 generated at load.
        let kept = match mode {
            WeightMode::Complete => 1,
            _ if !needs_source(module, *id) => 2,
            WeightMode::Stored => 1,
            WeightMode::Stripped => 0,
        };
        Some(json!([id.index(), name, ty, bytes, stream, from, kept]))
    };
    used.iter().filter_map(describe).collect()
}

/// What the bytes of a weight are made of, at most eight entries.
fn sources(module: &Module, id: WeightId) -> Vec<String> {
    let mut found = Vec::new();
    let mut work = vec![id];
    let mut steps = 0;
    while let Some(id) = work.pop() {
        steps += 1;
        let Some(weight) = module.weights.get(id) else { continue };
        match &weight.expr {
            WeightExpr::File { file: _, key } => found.push(key.clone()),
            WeightExpr::Splat(value) => found.push(format!("splat({value})")),
            WeightExpr::Random { seed, std } => found.push(format!("random(seed {seed}, std {std})")),
            WeightExpr::Dense(values) => found.push(format!("{} literal values", values.len())),
            other => work.extend(other.parts().iter().rev().copied()),
        }
        if found.len() > 8 || steps > 64 {
            found.truncate(8);
            found.push("…".to_string());
            break;
        }
    }
    found
}

fn states(module: &Module, strings: &mut Strings) -> Vec<Value> {
    let maxima = Bindings::maxima(&module.dims);
    module
        .states
        .iter()
        .map(|(id, s)| {
            let bytes = s.ty.bytes().extent(&maxima);
            json!([id.index(), s.name, strings.number(s.ty.to_string()), bytes])
        })
        .collect()
}

/// Per group: stem, common variant, and per block index, start, length and variant.
fn groups(module: &Module) -> Vec<Value> {
    fold::groups(module)
        .iter()
        .map(|g| {
            let blocks: Vec<_> =
                g.blocks.iter().map(|b| json!([b.index, b.nodes.start, b.nodes.len(), b.variant])).collect();
            json!([g.stem, g.common_variant(), blocks])
        })
        .collect()
}

/// Per buffer of the arena at the upper bounds: bytes, offset, birth, death and its values.
fn buffers(module: &Module) -> Vec<Value> {
    if module.arenas.is_empty() {
        return Vec::new();
    }
    let maxima = Bindings::maxima(&module.dims);
    let offset = |value: &ValueId| match module.graph.values.get(*value)?.place.as_ref()? {
        Place::Arena { arena: _, offset } => offset.extent(&maxima),
        Place::State(_) | Place::Output(_) => None,
    };
    plan::liveness(module, true)
        .buffers
        .iter()
        .filter_map(|b| {
            let values: Vec<usize> = b.values.iter().map(|v| v.index()).collect();
            Some(json!([b.bytes.extent(&maxima)?, offset(b.values.first()?)?, b.start, b.end, values]))
        })
        .collect()
}

fn history_json(history: &History) -> Value {
    let passes = history.passes.iter().map(|p| {
        json!({ "name": p.name, "changed": p.changed, "before": p.nodes_before, "after": p.nodes_after, "diff": p.diff })
    });
    let remarks = history
        .remarks
        .iter()
        .map(|r| json!([r.pass, r.node.to_string(), r.loc, r.message, fold::generalise(&r.loc)]));
    json!({
        "passes": passes.collect::<Vec<_>>(),
        "remarks": remarks.collect::<Vec<_>>(),
        "stats": history.stats,
    })
}
