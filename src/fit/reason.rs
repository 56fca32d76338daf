//! Why the largest class is as large as it is.

use millrace_ir::plan::liveness;
use millrace_ir::plan::stream::{Demand, Placement};
use millrace_ir::{Bindings, Module, TensorType};
use millrace_runtime::Class;
use serde_json::{Value, json};

/// The largest class and what is largest in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The class.
    pub class: Class,
    /// What makes it large, in words.
    pub words: String,
    /// Its largest parts: name and bytes.
    pub parts: Vec<(String, u64)>,
}

/// How many parts are told.
const PARTS: usize = 3;

impl Reason {
    /// The reason for the largest of `classes` at `bindings`.
    pub(super) fn of(
        module: &Module,
        demand: &Demand,
        placement: &Placement,
        classes: &[(Class, u64)],
        bindings: &Bindings,
    ) -> Reason {
        // The first among equals.
        let largest = classes.iter().rev().max_by_key(|(_, bytes)| *bytes);
        let class = largest.map_or(Class::Weights, |(class, _)| *class);
        let (words, mut parts) = match class {
            Class::Weights => weights(module, demand, placement),
            Class::Activations => activations(module, bindings),
            Class::Kv => states(module, bindings),
            Class::Io => io(module, bindings),
            Class::Ring => {
                let words = format!("{} slots of {} bytes", placement.slots, placement.slot_bytes);
                (words, Vec::new())
            }
            other => (other.name().to_string(), Vec::new()),
        };
        parts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        parts.truncate(PARTS);
        Reason { class, words, parts }
    }

    /// As JSON.
    pub(super) fn json(&self) -> Value {
        let parts: Vec<Value> =
            self.parts.iter().map(|(name, bytes)| json!({"name": name, "bytes": bytes})).collect();
        json!({"class": self.class.name(), "reason": self.words, "parts": parts})
    }
}

type Parts = (String, Vec<(String, u64)>);

fn weights(module: &Module, demand: &Demand, placement: &Placement) -> Parts {
    let parts = demand.items.iter().zip(&placement.resident).map(|(item, resident)| {
        let name = module.weights.get(item.weight).map_or("", |w| w.name.as_str());
        (format!("@{name}"), resident * item.slice_bytes)
    });
    let parts: Vec<(String, u64)> = parts.filter(|(_, bytes)| *bytes > 0).collect();
    (format!("{} of {} weights are resident", parts.len(), demand.items.len()), parts)
}

/// The node at which most bytes are alive, and what is alive there.
fn activations(module: &Module, bindings: &Bindings) -> Parts {
    let live = liveness(module, true);
    let extent = |bytes: &millrace_ir::Dim| bytes.extent(bindings).unwrap_or(0);
    let nodes = module.graph.order.len();
    let mut change = vec![0i128; nodes + 1];
    for buffer in &live.buffers {
        let bytes = extent(&buffer.bytes) as i128;
        change[buffer.start.min(nodes)] += bytes;
        change[buffer.end.min(nodes)] -= bytes;
    }
    let (mut now, mut most, mut at) = (0, 0, 0);
    for (position, change) in change.iter().enumerate() {
        now += change;
        if now > most {
            (most, at) = (now, position);
        }
    }
    let words = match module.graph.order.get(at) {
        Some(id) => {
            let node = &module.graph.nodes[*id];
            let layer = node.loc.first().map_or("", |l| l.as_ref());
            format!(
                "{id} {} of {layer} has {most} bytes alive, with {}",
                node.op.name(),
                super::show_bindings(bindings)
            )
        }
        None => "nothing is alive".to_string(),
    };
    let alive = live.buffers.iter().filter(|b| (b.start..b.end).contains(&at));
    let parts = alive.filter_map(|b| {
        let value = *b.values.first()?;
        let ty = &module.graph.values.get(value)?.ty;
        Some((format!("{value} {ty}"), extent(&b.bytes)))
    });
    (words, parts.collect())
}

fn states(module: &Module, bindings: &Bindings) -> Parts {
    let pages = bindings.iter().find(|(s, _)| s.name() == "pages").map_or(0, |(_, v)| v);
    let parts = module.states.iter().map(|(_, s)| (s.name.clone(), size(&s.ty, bindings)));
    (format!("{} states of {pages} pages", module.states.len()), parts.collect())
}

fn io(module: &Module, bindings: &Bindings) -> Parts {
    let all = module.input_types().into_iter().chain(module.output_types());
    let parts = all.map(|(name, ty)| (format!("{name} {ty}"), size(ty, bindings)));
    (format!("inputs and outputs with {}", super::show_bindings(bindings)), parts.collect())
}

fn size(ty: &TensorType, bindings: &Bindings) -> u64 {
    ty.bytes().extent(bindings).unwrap_or(0)
}
