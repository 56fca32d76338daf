//! Where weights are under a budget, and what processor and link do in a step.

use millrace_ir::cost::Sustained;
use millrace_ir::plan::stream::{Busy, Cut, Demand, Placement, Prediction, Span, costs, timeline};
use millrace_ir::{Id, Result};
use millrace_runtime::needs::demand;
use serde_json::{Value, json};

use crate::fit::{Fit, Question, Step, Subject};

/// See the module.
pub struct Streaming {
    /// What the weights can do.
    pub demand: Demand,
    /// Where they are.
    pub placement: Placement,
    /// Steps by name.
    steps: Vec<(&'static str, Step, Prediction, Vec<Span>)>,
}

impl Streaming {
    /// The placement that `question` asks for, and the timelines of its decode and prefill steps.
    ///
    /// # Errors
    /// As [`Fit::of`].
    pub fn of(subject: Subject<'_>, question: &Question) -> Result<Streaming> {
        let fit = Fit::of(subject, question)?;
        let Subject { module, manifest, table } = subject;
        let demand = demand(module, table)?;
        let device = question.device.unwrap_or_else(|| Sustained::of_target(&manifest.target));
        let (decode, prefill) = fit.steps;
        let named = [("decode", decode), ("prefill", Some(prefill))];
        let play = |(name, step): (&'static str, Option<Step>)| {
            let step = step?;
            let costs = costs(&device, step.times(module, manifest, &device));
            let (told, spans) = timeline(&demand, &fit.placement, &costs);
            Some((name, step, told, spans))
        };
        let steps = named.into_iter().filter_map(play).collect();
        Ok(Streaming { demand, placement: fit.placement, steps })
    }

    /// Weights as id, bytes, slices, resident slices, slices of a tile (0 for none) and how they are cut; copies as weight,
    /// first slice, slices, bytes, slot and position of the node; spans as kind, number, start and end in nanoseconds.
    pub(super) fn json(&self) -> Value {
        let Streaming { demand, placement, steps } = self;
        let weights = demand.items.iter().enumerate().map(|(index, item)| {
            let cut = match item.cut {
                None => "stays",
                Some(Cut::Rows) => "rows",
                Some(Cut::Whole) => "whole",
                Some(Cut::Tiles { .. }) => "tiles",
            };
            let (resident, tile) = (placement.resident[index], placement.tile[index]);
            json!([item.weight.index(), item.bytes, item.slices, resident, tile, cut])
        });
        let copies = placement.copies.iter().map(|c| {
            let node = demand.uses.get(c.user).map_or(0, |u| u.node);
            json!([c.item, c.first, c.count, c.bytes, c.slot, node])
        });
        let span = |s: &Span| match s.what {
            Busy::Node(node) => json!([0, node, s.start, s.end]),
            Busy::Wait(copy) => json!([1, copy, s.start, s.end]),
            Busy::Copy(copy) => json!([2, copy, s.start, s.end]),
        };
        let steps = steps.iter().map(|(name, step, told, spans)| {
            json!({
                "name": name,
                "batch": step.batch, "tokens": step.tokens, "past": step.past,
                "time": told.time, "compute": told.compute, "copies": told.copies, "stall": told.stalled(),
                "spans": spans.iter().map(span).collect::<Vec<_>>(),
            })
        });
        json!({
            "resident": placement.resident_bytes,
            "slots": placement.slots,
            "slot": placement.slot_bytes,
            "moved": placement.moved(),
            "weights": weights.collect::<Vec<_>>(),
            "copies": copies.collect::<Vec<_>>(),
            "steps": steps.collect::<Vec<_>>(),
        })
    }
}
