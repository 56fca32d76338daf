//! The answer as text and as JSON.

use std::fmt;

use serde_json::{Value, json};

use super::{Fit, Step};

/// Bytes with a readable unit.
fn show(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", units[unit]) }
}

fn milliseconds((time, stall): (u64, u64)) -> String {
    format!("{:.3} ms ({:.3} stalled)", time as f64 / 1e6, stall as f64 / 1e6)
}

fn shape(step: &Step) -> String {
    format!("{} x {} tokens after {}", step.batch, step.tokens, step.past)
}

impl fmt::Display for Fit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, bytes: u64, note: &str| {
            let note = if note.is_empty() { String::new() } else { format!("  {note}") };
            writeln!(f, "{name:<24} {:>12}{note}", show(bytes))
        };
        for (class, bytes) in &self.classes {
            let note = match class {
                millrace_runtime::Class::Ring if *bytes > 0 => {
                    format!("{} slots of {}", self.placement.slots, show(self.placement.slot_bytes))
                }
                millrace_runtime::Class::Kv if self.pages > 0 => {
                    format!("{} pages of {} tokens", self.pages, self.tokens_per_block)
                }
                _ => String::new(),
            };
            line(class.name(), *bytes, &note)?;
        }
        line("total", self.total(), "")?;
        line("with dynamic allocation", self.smallest, "the smallest step")?;
        if self.pinned > 0 {
            line("pinned host memory", self.pinned, "weights that stream; not in the total")?;
        }
        if self.context > 0 {
            line("driver context", self.context, "estimate; not in the total")?;
        }
        writeln!(f, "largest: {}, {}", self.reason.class.name(), self.reason.words)?;
        for (name, bytes) in &self.reason.parts {
            writeln!(f, "  {:>12}  {name}", show(*bytes))?;
        }
        if let Some(cap) = self.cap {
            let total = self.total();
            match total <= cap {
                true => writeln!(f, "fits the cap of {} with {} to spare", show(cap), show(cap - total))?,
                false => {
                    writeln!(f, "exceeds the cap of {} by {}", show(cap), show(total - cap))?;
                    match self.remedies.is_empty() {
                        true => writeln!(f, "  no option makes it fit: compile with smaller limits")?,
                        false => {
                            self.remedies.iter().try_for_each(|r| writeln!(f, "  fits with {r}"))?;
                        }
                    }
                }
            }
            for capacity in &self.capacities {
                writeln!(
                    f,
                    "with {} for weights: {} pages, {} sequences of {} tokens, or {} of {} tokens",
                    show(capacity.weights),
                    capacity.pages,
                    capacity.batch,
                    self.asked.1,
                    self.asked.0,
                    capacity.sequence
                )?;
            }
            if let Some(field) = self.field {
                writeln!(
                    f,
                    "a cache sized by fraction of free memory: {} blocks, {} tokens, {}",
                    field.blocks,
                    field.tokens,
                    show(field.bytes)
                )?;
            }
        }
        let decode = self.steps.0.as_ref();
        write!(f, "predicted for prefill {}", shape(&self.steps.1))?;
        match decode {
            Some(step) => writeln!(f, ", decode {}", shape(step))?,
            None => writeln!(f)?,
        }
        writeln!(
            f,
            "{:>8} {:>12} {:>14} {:>32} {:>32}",
            "budget",
            "on device",
            "moved a step",
            if decode.is_some() { "decode" } else { "" },
            "prefill"
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:>7}% {:>12} {:>14} {:>32} {:>32}",
                row.percent,
                show(row.device),
                show(row.moved),
                row.decode.map_or_else(String::new, milliseconds),
                milliseconds(row.prefill)
            )?;
        }
        if self.streamable == 0 {
            writeln!(f, "no weight is streamable: compile with --weight-streaming for smaller budgets")?;
        }
        Ok(())
    }
}

impl Fit {
    /// The answer as JSON.
    pub fn json(&self) -> Value {
        let step = |s: &Step| json!({"batch": s.batch, "tokens": s.tokens, "past": s.past});
        let time = |(time, stall): (u64, u64)| json!({"ns": time, "stall_ns": stall});
        json!({
            "classes": self.classes.iter().map(|(c, b)| json!({"class": c.name(), "bytes": b})).collect::<Vec<_>>(),
            "total_bytes": self.total(),
            "dynamic_smallest_bytes": self.smallest,
            "pinned_host_bytes": self.pinned,
            "driver_context_estimate_bytes": self.context,
            "weights": {
                "streamable_bytes": self.streamable,
                "minimum_budget_bytes": self.minimum,
                "resident_bytes": self.placement.resident_bytes,
                "ring_bytes": self.placement.ring_bytes(),
                "moved_bytes_per_step": self.placement.moved(),
            },
            "cap_bytes": self.cap,
            "fits": self.fits(),
            "remedies": self.remedies,
            "kv": {
                "pages": self.pages,
                "tokens_per_page": self.tokens_per_block,
                "page_bytes": self.page_bytes,
            },
            "capacity": self.capacities.iter().map(|c| json!({
                "weights_bytes": c.weights,
                "pages": c.pages,
                "batch": {"most": c.batch, "tokens_each": self.asked.1},
                "sequence": {"most": c.sequence, "batch": self.asked.0},
            })).collect::<Vec<_>>(),
            "kv_by_fraction": self.field.map(|k| json!({"blocks": k.blocks, "tokens": k.tokens, "bytes": k.bytes})),
            "steps": {"decode": self.steps.0.as_ref().map(step), "prefill": step(&self.steps.1)},
            "predictions": self.rows.iter().map(|row| json!({
                "percent": row.percent,
                "device_bytes": row.device,
                "moved_bytes": row.moved,
                "decode": row.decode.map(time),
                "prefill": time(row.prefill),
            })).collect::<Vec<_>>(),
            "largest": self.reason.json(),
        })
    }
}
