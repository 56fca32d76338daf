//! A placement as text.

use std::fmt::Write as _;

use super::demand::{Cut, Demand};
use super::place::Placement;
use crate::graph::Module;

/// The placement's schedule: totals, what is resident of each weight, and each copy with its slices, its slot, the kernel
/// that it comes after and the node that waits for it. Copies are numbered as in [`Placement::copies`].
pub fn schedule(module: &Module, demand: &Demand, placement: &Placement) -> String {
    let mut text = String::new();
    let name = |item: usize| {
        let weight = demand.items[item].weight;
        module.weights.get(weight).map_or_else(|| weight.to_string(), |w| format!("@{}", w.name))
    };
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "device {} bytes: resident {}, ring {} = {} slots of {}\nmoved {} bytes a step in {} copies",
        placement.device_bytes(),
        placement.resident_bytes,
        placement.ring_bytes(),
        if placement.slot_bytes == 0 { 0 } else { placement.slots },
        placement.slot_bytes,
        placement.moved(),
        placement.moving().count(),
    );
    for (index, item) in demand.items.iter().enumerate() {
        let (resident, tile) = (placement.resident[index], placement.tile[index]);
        let what = match (item.cut, resident) {
            (None, _) => "stays".to_string(),
            (Some(Cut::Rows), 0) => "rows are read where they lie".to_string(),
            (_, resident) if resident == item.slices => "resident".to_string(),
            (_, resident) => format!(
                "slices 0..{resident} resident, {resident}..{} in tiles of {tile} x {} bytes",
                item.slices, item.slice_bytes
            ),
        };
        let _ = writeln!(text, "weight {} ({} bytes): {what}", name(index), item.bytes);
    }
    for (index, copy) in placement.copies.iter().enumerate() {
        let node = demand.uses.get(copy.user).and_then(|user| module.graph.order.get(user.node));
        let node = node.map_or_else(|| "?".to_string(), ToString::to_string);
        let issue = match copy.after {
            after if after == index => "before the first step".to_string(),
            after if after < index => format!("after the kernel of copy {after}"),
            after => format!("after the kernel of copy {after} of the step before"),
        };
        let _ = writeln!(
            text,
            "copy {index}: {}[{}..{}] {} bytes to slot {}, {issue}, for {node}",
            name(copy.item),
            copy.first,
            copy.first + copy.count,
            copy.bytes,
            copy.slot,
        );
    }
    text
}
