//! What computing with streamed weights costs, by the counts of [`crate::cost`].

use super::demand::Demand;
use super::predict::Costs;
use crate::cost::Sustained;
use crate::dim::Bindings;
use crate::graph::Module;
use crate::step_cost::{Lengths, step_cost};

/// Nanoseconds of `seconds`, at least one where there is anything.
fn nanoseconds(seconds: f64) -> u64 {
    (seconds * 1e9).ceil() as u64
}

/// Nanoseconds of each node in execution order with all weights at hand, in a step over `sequences`. A node that is
/// launched adds the cost of the launch, nodes that are launched together do so once, views cost nothing. Nodes
/// whose extents are unbound count as nothing.
pub fn times(module: &Module, device: &Sustained, bindings: &Bindings, sequences: &[Lengths]) -> Vec<u64> {
    let graph = &module.graph;
    let mut times = Vec::with_capacity(graph.order.len());
    for group in graph.launch_groups(&graph.order) {
        let mut launched = false;
        for id in &graph.order[group] {
            let cost = step_cost(module, *id, bindings, sequences).unwrap_or_default();
            let mut seconds = device.seconds(cost);
            if !launched && !graph.nodes[*id].op.traits().view {
                launched = true;
                seconds += device.launch;
            }
            times.push(nanoseconds(seconds));
        }
    }
    times
}

/// For each use, the time from the end of the node before it that reads weights to the end of its own node: what a copy
/// for it can hide behind.
pub fn work(demand: &Demand, times: &[u64]) -> Vec<u64> {
    let mut next = 0;
    let mut gap = |node: usize| -> u64 {
        let span = times.get(next..=node).unwrap_or(&[]);
        next = next.max(node + 1);
        span.iter().sum()
    };
    demand.uses.iter().map(|user| gap(user.node).max(1)).collect()
}

/// The costs of a step for [`super::predict`].
pub fn costs(device: &Sustained, times: Vec<u64>) -> Costs {
    Costs {
        nodes: times,
        link: (device.link / 1e6).max(1.0) as u64,
        copy: nanoseconds(device.copy),
        launch: nanoseconds(device.launch),
        step: nanoseconds(device.step),
    }
}
