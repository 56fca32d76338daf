//! What kernels of a step take without events between them: the launches of one kernel and kind of layer replayed by
//! themselves, and the step without them.

use std::time::Duration;

use millrace::ir::{Module, NodeId};
use millrace::{Profile, Result, Session};
use serde_json::{Value, json};

use super::profile::{Family, calls, percent};
use crate::cli::ceilings::Ceilings;

/// The calls of one kernel for one kind of layer.
struct Part {
    family: Family,
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

/// Replays the last step of `profile`, which `session` ran; nothing where [`Session::time_nodes`] tells no times.
///
/// # Errors
/// A failure of the device.
pub fn replay(session: &mut Session<'_>, module: &Module, profile: &Profile) -> Result<Option<Replay>> {
    let Some(step) = profile.steps.last() else { return Ok(None) };
    let (mut families, mut nodes) = (Vec::new(), Vec::<Vec<NodeId>>::new());
    for call in calls(module, step) {
        let index = Family::count(&mut families, module, &call);
        nodes.resize_with(families.len(), Vec::new);
        nodes[index].push(call.span.node);
    }
    let all = nodes.concat();
    let others = |own: &Vec<NodeId>| all.iter().copied().filter(|node| !own.contains(node)).collect();
    let without: Vec<Vec<NodeId>> = nodes.iter().map(others).collect();
    let times = session.time_nodes(&[vec![all.clone()], nodes, without].concat())?;
    let Some(step) = times[0] else { return Ok(None) };
    let (own, without) = times[1..].split_at(families.len());
    let times = own.iter().zip(without);
    let mut parts: Vec<Part> = families
        .into_iter()
        .zip(times)
        .map(|(family, (time, without))| Part { family, time: *time, without: *without })
        .collect();
    parts.sort_by_key(|p| std::cmp::Reverse(p.time));
    Ok(Some(Replay { step, parts }))
}

impl Part {
    /// Microseconds of a call.
    fn each(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e6 / self.family.calls as f64
    }

    fn gbs(&self) -> Option<f64> {
        self.time.map(|time| self.family.bytes() as f64 / time.as_secs_f64().max(1e-9) / 1e9)
    }

    /// Microseconds of a call by which the step is longer than without them.
    fn adds(&self, step: Duration) -> Option<f64> {
        self.without.map(|without| self.each(step) - self.each(without))
    }
}

impl Replay {
    /// A heading, and [`COLUMNS`] with lines below.
    pub fn lines(&self, ceilings: &Ceilings) -> (String, Vec<[String; 7]>) {
        let text =
            |value: Option<f64>, digits: usize| value.map_or_else(String::new, |v| format!("{v:.digits$}"));
        let mut lines = vec![COLUMNS.map(str::to_string)];
        lines.extend(self.parts.iter().map(|part| {
            [
                part.family.kernel.clone(),
                part.family.calls.to_string(),
                text(part.time.map(|time| part.each(time)), 2),
                text(part.gbs(), 1),
                text(part.gbs().map(|gbs| percent(gbs, ceilings.read_gbs)), 1),
                text(part.adds(self.step), 2),
                part.family.layers.clone(),
            ]
        }));
        let heading = format!("the last step replayed: {:.3} ms", self.step.as_secs_f64() * 1e3);
        (heading, lines)
    }

    /// Everything.
    pub fn json(&self, ceilings: &Ceilings) -> Value {
        let kernels = self.parts.iter().map(|part| {
            json!({
                "kernel": part.family.kernel,
                "layers": part.family.layers,
                "calls": part.family.calls,
                "us_each": part.time.map(|time| part.each(time)),
                "adds_us_each": part.adds(self.step),
                "read_bytes": part.family.cost.read,
                "written_bytes": part.family.cost.written,
                "gbs": part.gbs(),
                "of_read_rate": part.gbs().map(|gbs| gbs / ceilings.read_gbs),
            })
        });
        json!({"step_us": self.step.as_secs_f64() * 1e6, "kernels": kernels.collect::<Vec<_>>()})
    }
}
