//! Where a step's time goes: times of nodes by kernel and source layers against what the hardware can do, and as a
//! Chrome trace.
//!
//! Layers that differ in numbers alone are one row. Nodes that a device runs together are one call, with the work and the
//! layers of all.
//!
//! Operations and bytes are those of [`millrace::ir::step_cost`]: each byte counts once, whatever caches do. A rate
//! above a ceiling is therefore possible where data stays in a cache.

use std::path::Path;
use std::time::Duration;

use millrace::ir::cost::Cost;
use millrace::ir::step_cost::step_cost;
use millrace::ir::{Module, NodeId};
use millrace::runtime::profile::{Span, Step};
use millrace::{Error, Profile, Result};
use serde_json::{Value, json};

use super::replay::Replay;
use crate::cli::ceilings::Ceilings;

/// Time and work of some nodes.
#[derive(Clone, Default)]
pub struct Family {
    /// What ran them.
    pub kernel: String,
    /// Their layers, numbers left out.
    pub layers: String,
    /// How often it ran.
    pub calls: usize,
    time: Duration,
    /// How much of that was waiting for streamed weights.
    stall: Duration,
    /// Bytes of weights that were brought in meanwhile.
    streamed: u64,
    /// Work of all calls.
    pub cost: Cost,
}

impl Family {
    /// Adds a call to its family among `all`, which begins with its first call, and tells which that is.
    pub fn count(all: &mut Vec<Family>, module: &Module, call: &Call<'_>) -> usize {
        let (kernel, layers) = (kernel(module, call.span.node), call.layers.join(", "));
        let found = all.iter().position(|f| f.kernel == kernel && f.layers == layers);
        let index = found.unwrap_or_else(|| {
            all.push(Family { kernel: kernel.to_string(), layers, ..Family::default() });
            all.len() - 1
        });
        all[index].add(call);
        index
    }

    fn add(&mut self, call: &Call<'_>) {
        self.calls += 1;
        self.time += call.span.duration;
        self.stall += call.span.stall;
        self.streamed += call.span.streamed;
        self.cost = self.cost.plus(call.cost);
    }

    /// Bytes read and written.
    pub fn bytes(&self) -> u64 {
        self.cost.read.saturating_add(self.cost.written)
    }

    /// Billions a second.
    fn rate(&self, count: u64) -> f64 {
        let seconds = self.time.as_secs_f64();
        if seconds > 0.0 { count as f64 / seconds / 1e9 } else { 0.0 }
    }
}

/// Steps of one kind.
struct Phase {
    name: &'static str,
    steps: usize,
    /// Of whole steps.
    total: Family,
    /// By kernel and layers, the longest first.
    families: Vec<Family>,
}

impl Phase {
    fn outside(&self) -> Duration {
        let inside: Duration = self.families.iter().map(|f| f.time).sum();
        self.total.time.saturating_sub(inside)
    }
}

/// A profile by phase, kernel and layers.
pub struct Summary {
    ceilings: Ceilings,
    phases: Vec<Phase>,
    replay: Option<Replay>,
}

fn kernel(module: &Module, node: NodeId) -> &str {
    let kernel = module.graph.nodes.get(node).and_then(|n| n.kernel).and_then(|k| module.kernels.get(k));
    kernel.map_or("none", |k| k.name.as_str())
}

/// Prefill steps have a sequence with several new tokens and a cache; encoders have no cache.
fn phase_of(module: &Module, step: &Step) -> &'static str {
    if module.states.iter().next().is_none() {
        "step"
    } else if step.sequences.iter().any(|s| s.queries > 1) {
        "prefill"
    } else {
        "decode"
    }
}

/// The layers of a node, numbers left out.
fn layers(module: &Module, node: NodeId) -> Vec<String> {
    let pattern = |layer: String| {
        let part = |p: &str| if p.parse::<u64>().is_ok() { "*".to_string() } else { p.to_string() };
        layer.split('.').map(part).collect::<Vec<_>>().join(".")
    };
    module
        .graph
        .nodes
        .get(node)
        .map_or_else(Vec::new, |n| n.loc.iter().map(|l| pattern(l.to_string())).collect())
}

/// A node with time, and what ran with it.
pub struct Call<'a> {
    /// Of the node that has the time.
    pub span: &'a Span,
    /// Layers of all, numbers left out.
    pub layers: Vec<String>,
    /// Work of all.
    pub cost: Cost,
}

/// The calls of a step. What has no time of its own ran with the next that has.
pub fn calls<'a>(module: &Module, step: &'a Step) -> Vec<Call<'a>> {
    let (mut calls, mut cost, mut names) = (Vec::new(), Cost::default(), Vec::new());
    for (at, span) in step.spans.iter().enumerate() {
        cost = cost.plus(step_cost(module, span.node, &step.bindings, &step.sequences).unwrap_or_default());
        for layer in layers(module, span.node) {
            if !names.contains(&layer) {
                names.push(layer);
            }
        }
        if !span.duration.is_zero() || at + 1 == step.spans.len() {
            calls.push(Call { span, layers: std::mem::take(&mut names), cost: std::mem::take(&mut cost) });
        }
    }
    calls
}

/// Adds up a profile of `module`, whose last step may have been replayed.
pub fn summarise(module: &Module, profile: &Profile, ceilings: Ceilings, replay: Option<Replay>) -> Summary {
    let mut phases: Vec<Phase> = Vec::new();
    for step in &profile.steps {
        let name = phase_of(module, step);
        let index = phases.iter().position(|p| p.name == name).unwrap_or_else(|| {
            phases.push(Phase { name, steps: 0, total: Family::default(), families: Vec::new() });
            phases.len() - 1
        });
        let phase = &mut phases[index];
        phase.steps += 1;
        let time = phase.total.time + step.duration;
        for call in calls(module, step) {
            Family::count(&mut phase.families, module, &call);
            phase.total.add(&call);
        }
        // What lies between the calls is the step's as well.
        phase.total.time = time;
    }
    phases.iter_mut().for_each(|p| p.families.sort_by_key(|f| std::cmp::Reverse(f.time)));
    Summary { ceilings, phases, replay }
}

const COLUMNS: [&str; 9] =
    ["kernel", "calls", "ms", "share %", "GFLOP/s", "% of peak", "GB/s", "% of read rate", "layers"];

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Hundredths.
pub fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole * 100.0 } else { 0.0 }
}

/// Lines of columns, numbers between the first and the last.
fn aligned<const N: usize>(lines: &[[String; N]]) -> String {
    let line = |line: &[String; N]| {
        let [name, cells @ .., layers] = line.as_slice() else { return String::new() };
        let cells: String = cells.iter().map(|c| format!(" {c:>14}")).collect();
        format!("{}\n", format!("  {name:<28}{cells}  {layers}").trim_end())
    };
    lines.iter().map(line).collect()
}

/// The same as a table of markdown; the first line names the columns.
fn markdown<const N: usize>(lines: &[[String; N]]) -> String {
    let mut text = String::new();
    for (index, line) in lines.iter().enumerate() {
        text += &format!("| {} |\n", line.join(" | "));
        if index == 0 {
            text += &format!("| ---{} | --- |\n", " | ---:".repeat(N.saturating_sub(2)));
        }
    }
    text
}

impl Summary {
    fn head(&self, phase: &Phase) -> String {
        format!(
            "{}: {} steps of {:.3} ms, kernel by kernel; ceilings {}",
            phase.name,
            phase.steps,
            ms(phase.total.time) / phase.steps.max(1) as f64,
            self.ceilings.line()
        )
    }

    /// [`COLUMNS`] and the cells below them, the last ones for the time between kernels, for waiting inside kernels with the
    /// rate at which weights streamed, if any did, and for the whole.
    fn lines(&self, phase: &Phase) -> Vec<[String; 9]> {
        let share = |time: Duration| format!("{:.1}", percent(ms(time), ms(phase.total.time)));
        let line = |name: &str, f: &Family| {
            let (flops, bytes) = (f.rate(f.cost.flops), f.rate(f.bytes()));
            [
                name.to_string(),
                f.calls.to_string(),
                format!("{:.3}", ms(f.time)),
                share(f.time),
                format!("{flops:.1}"),
                self.ceilings.percent_of_peak(flops),
                format!("{bytes:.1}"),
                format!("{:.1}", percent(bytes, self.ceilings.read_gbs)),
                f.layers.clone(),
            ]
        };
        let mut lines = vec![COLUMNS.map(str::to_string)];
        lines.extend(phase.families.iter().map(|f| line(&f.kernel, f)));
        let outside = phase.outside();
        let mut between = [const { String::new() }; 9];
        between[0] = "between kernels".to_string();
        between[2] = format!("{:.3}", ms(outside));
        between[3] = share(outside);
        lines.push(between);
        if phase.total.streamed > 0 {
            let Family { stall, streamed, .. } = phase.total;
            let mut waiting = [const { String::new() }; 9];
            waiting[0] = "waiting for weights".to_string();
            waiting[2] = format!("{:.3}", ms(stall));
            waiting[3] = share(stall);
            waiting[6] = format!("{:.1}", phase.total.rate(streamed));
            lines.push(waiting);
        }
        lines.push(line("total", &phase.total));
        lines
    }

    /// Aligned columns.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for phase in &self.phases {
            text += &format!("{}\n", self.head(phase));
            text += &aligned(&self.lines(phase));
        }
        if let Some((heading, lines)) = self.replay.as_ref().map(|r| r.lines(&self.ceilings)) {
            text += &format!("{heading}\n{}", aligned(&lines));
        }
        text
    }

    /// Tables of markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for phase in &self.phases {
            text += &format!("\n{}\n\n{}", self.head(phase), markdown(&self.lines(phase)));
        }
        if let Some((heading, lines)) = self.replay.as_ref().map(|r| r.lines(&self.ceilings)) {
            text += &format!("\n{heading}\n\n{}", markdown(&lines));
        }
        text
    }

    /// Everything, with counts of operations and bytes.
    pub fn json(&self) -> Value {
        let family = |f: &Family, phase: &Phase| {
            let (flops, bytes) = (f.rate(f.cost.flops), f.rate(f.bytes()));
            json!({
                "calls": f.calls,
                "ms": ms(f.time),
                "stall_ms": ms(f.stall),
                "streamed_bytes": f.streamed,
                "share": percent(ms(f.time), ms(phase.total.time)) / 100.0,
                "flops": f.cost.flops,
                "read_bytes": f.cost.read,
                "written_bytes": f.cost.written,
                "gflops": flops,
                "of_peak": self.ceilings.gflops.map(|most| flops / most),
                "gbs": bytes,
                "of_read_rate": percent(bytes, self.ceilings.read_gbs) / 100.0,
            })
        };
        let phases = self.phases.iter().map(|phase| {
            let kernels = phase.families.iter().map(|f| {
                let mut object = json!({"kernel": f.kernel, "layers": f.layers});
                if let (Value::Object(object), Value::Object(rest)) = (&mut object, family(f, phase)) {
                    object.extend(rest);
                }
                object
            });
            json!({
                "phase": phase.name,
                "steps": phase.steps,
                "kernels": kernels.collect::<Vec<_>>(),
                "between_kernels_ms": ms(phase.outside()),
                "total": family(&phase.total, phase),
            })
        });
        json!({
            "ceilings": self.ceilings.json(),
            "phases": phases.collect::<Vec<_>>(),
            "replayed": self.replay.as_ref().map(|replay| replay.json(&self.ceilings)),
        })
    }
}

/// Trace events as `chrome://tracing` and Perfetto read them: one complete event for each node of each step, one process
/// for each row of the sweep.
#[derive(Default)]
pub struct Trace {
    events: Vec<Value>,
    rows: usize,
}

impl Trace {
    /// Adds a row's profile; with ceilings, calls say how near they come.
    pub fn add(&mut self, title: &str, module: &Module, profile: &Profile, ceilings: Option<Ceilings>) {
        self.rows += 1;
        let pid = self.rows;
        self.events.push(json!({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": title}}));
        let us = |time: Duration| time.as_nanos() as f64 / 1e3;
        for (index, step) in profile.steps.iter().enumerate() {
            let mut calls = calls(module, step).into_iter().peekable();
            for span in &step.spans {
                let call = calls.next_if(|c| c.span == span);
                let rates = call.zip(ceilings).map_or(Value::Null, |(call, ceilings)| {
                    let seconds = span.duration.as_secs_f64().max(1e-9);
                    let gflops = call.cost.flops as f64 / seconds / 1e9;
                    let gbs = call.cost.read.saturating_add(call.cost.written) as f64 / seconds / 1e9;
                    json!({
                        "gflops": gflops,
                        "of_peak": ceilings.gflops.map(|most| gflops / most),
                        "gbs": gbs,
                        "of_read_rate": gbs / ceilings.read_gbs,
                    })
                });
                let node = module.graph.nodes.get(span.node);
                let cost = step_cost(module, span.node, &step.bindings, &step.sequences).unwrap_or_default();
                let kernel = kernel(module, span.node);
                self.events.push(json!({
                    "ph": "X",
                    "name": kernel,
                    "cat": node.map_or("", |n| n.op.name()),
                    "pid": pid,
                    "tid": 1,
                    "ts": us(span.start),
                    "dur": us(span.duration),
                    "args": {
                        "node": span.node.to_string(),
                        "kernel": kernel,
                        "layers": node.map_or_else(Vec::new, |n| n.loc.iter().map(|l| l.to_string()).collect()),
                        "phase": phase_of(module, step),
                        "step": index,
                        "flops": cost.flops,
                        "read_bytes": cost.read,
                        "written_bytes": cost.written,
                        "rates": rates,
                        "stall_us": us(span.stall),
                        "streamed_bytes": span.streamed,
                    },
                }));
            }
        }
    }

    /// Writes the file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(self, path: &Path) -> Result<()> {
        let text = json!({"displayTimeUnit": "ms", "traceEvents": self.events}).to_string();
        std::fs::write(path, text).map_err(|e| Error::io("write", path, &e))
    }
}
