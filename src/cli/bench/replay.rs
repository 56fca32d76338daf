//! What kernels of a decode step take without events between them: the launches of one kernel and kind of layer replayed
//! by themselves, and the step without them.

use std::time::Duration;

use millrace::ir::cost::Cost;
use millrace::ir::{Module, NodeId};
use millrace::{Profile, Result, Session};
use serde_json::{Value, json};

use super::profile::{calls, kernel, percent};
use crate::cli::ceilings::Ceilings;

/// The calls of one kernel for one kind of layer in a step.
struct Part {
    kernel: String,
    layers: String,
    nodes: Vec<NodeId>,
    calls: usize,
    cost: Cost,
    /// All of them one after the other.
    time: Option<Duration>,
    /// The step without them.
    without: Option<Duration>,
}

/// The last step of a profile, replayed.
pub struct Replay {
    step: Duration,
    parts: Vec<Part>,
}

const COLUMNS: [&str; 7] = ["kernel", "calls", "us each", "GB/s", "% of read rate", "us each adds", "layers"];

/// Replays the last step of `profile`, which `session` ran; nothing where launches are no graph or weights stream.
///
/// # Errors
/// A failure of the device.
pub fn replay(session: &mut Session<'_>, module: &Module, profile: &Profile) -> Result<Option<Replay>> {
    let Some(step) = profile.steps.last() else { return Ok(None) };
    let mut parts: Vec<Part> = Vec::new();
    for call in calls(module, step) {
        let node = call.span.node;
        let (kernel, layers) = (kernel(module, node), call.layers.join(", "));
        let found = parts.iter().position(|p| p.kernel == kernel && p.layers == layers);
        let index = found.unwrap_or_else(|| {
            let (kernel, nodes, cost) = (kernel.to_string(), Vec::new(), Cost::default());
            parts.push(Part { kernel, layers, nodes, calls: 0, cost, time: None, without: None });
            parts.len() - 1
        });
        parts[index].nodes.push(node);
        parts[index].calls += 1;
        parts[index].cost = parts[index].cost.plus(call.cost);
    }
    let all: Vec<NodeId> = parts.iter().flat_map(|p| p.nodes.iter().copied()).collect();
    let mut groups = vec![all.clone()];
    groups.extend(parts.iter().map(|p| p.nodes.clone()));
    let others = |p: &Part| all.iter().copied().filter(|node| !p.nodes.contains(node)).collect();
    groups.extend(parts.iter().map(others));
    let times = session.time_nodes(&groups)?;
    let Some(step) = times[0] else { return Ok(None) };
    let (own, without) = times[1..].split_at(parts.len());
    for ((part, time), without) in parts.iter_mut().zip(own).zip(without) {
        (part.time, part.without) = (*time, *without);
    }
    parts.sort_by_key(|p| std::cmp::Reverse(p.time));
    Ok(Some(Replay { step, parts }))
}

impl Part {
    fn each(&self) -> Option<f64> {
        self.time.map(|time| time.as_secs_f64() * 1e6 / self.calls as f64)
    }

    fn gbs(&self) -> Option<f64> {
        let bytes = self.cost.read.saturating_add(self.cost.written) as f64 / self.calls as f64;
        self.each().map(|us| bytes / us.max(1e-3) / 1e3)
    }

    fn adds(&self, step: Duration) -> Option<f64> {
        let without = self.without?.as_secs_f64();
        Some((step.as_secs_f64() - without) * 1e6 / self.calls as f64)
    }
}

impl Replay {
    /// A heading, and lines below the names of their columns.
    pub fn lines(&self, ceilings: &Ceilings) -> (String, Vec<[String; 7]>) {
        let text =
            |value: Option<f64>, digits: usize| value.map_or_else(String::new, |v| format!("{v:.digits$}"));
        let mut lines = vec![COLUMNS.map(str::to_string)];
        lines.extend(self.parts.iter().map(|part| {
            [
                part.kernel.clone(),
                part.calls.to_string(),
                text(part.each(), 2),
                text(part.gbs(), 1),
                text(part.gbs().map(|gbs| percent(gbs, ceilings.read_gbs)), 1),
                text(part.adds(self.step), 2),
                part.layers.clone(),
            ]
        }));
        let heading = format!("the last step replayed: {:.3} ms", self.step.as_secs_f64() * 1e3);
        (heading, lines)
    }

    /// Everything.
    pub fn json(&self, ceilings: &Ceilings) -> Value {
        let kernels = self.parts.iter().map(|part| {
            json!({
                "kernel": part.kernel,
                "layers": part.layers,
                "calls": part.calls,
                "us_each": part.each(),
                "adds_us_each": part.adds(self.step),
                "read_bytes": part.cost.read,
                "written_bytes": part.cost.written,
                "gbs": part.gbs(),
                "of_read_rate": part.gbs().map(|gbs| gbs / ceilings.read_gbs),
            })
        });
        json!({"step_us": self.step.as_secs_f64() * 1e6, "kernels": kernels.collect::<Vec<_>>()})
    }
}
