//! Times of some of a step's launches, replayed by themselves.

use millrace_ir::{Module, NodeId, Result};

use super::{Cuda, Prepared};
use crate::cuda::driver::{Block, Event};
use crate::cuda::launch::{Graph, Ready};

/// Launches that a graph has at least, since its own launch takes microseconds.
const LEAST_LAUNCHES: usize = 32;

/// Replays of a graph, of which the median counts.
const REPLAYS: usize = 9;

impl Cuda {
    /// Seconds of the launches of each group of nodes in the step that was prepared last, one after the other and overlapping as
    /// in a step; `None` for groups without launches or with weights that stream, and where the session's memory moves. Whatever
    /// memory holds is computed with.
    pub fn time_nodes(&mut self, module: &Module, groups: &[Vec<NodeId>]) -> Result<Vec<Option<f64>>> {
        self.context.enter()?;
        self.drop_ahead();
        self.stream.synchronize()?;
        while self.events.len() < 2 {
            self.events.push(Event::new(&self.context, true)?);
        }
        // Only memory that the session keeps is there still.
        let kept = |p: &&Prepared| p.moving.arenas.iter().copied().eq(self.arenas.iter().map(Block::range));
        let Some(prepared) = self.prepared.last().filter(|_| self.fixed).filter(kept) else {
            return Ok(vec![None; groups.len()]);
        };
        let mut times = Vec::with_capacity(groups.len());
        for group in groups {
            let of_group = |nodes: &[NodeId]| nodes.iter().any(|node| group.contains(node));
            let steps = prepared.resolved.steps.iter();
            let steps = steps.filter(|(nodes, _)| of_group(&module.graph.order[nodes.clone()]));
            let ready: Vec<&Ready> =
                steps.flat_map(|(_, actions)| &prepared.ready[actions.clone()]).collect();
            if ready.is_empty() || ready.iter().any(|r| r.is_streaming()) {
                times.push(None);
                continue;
            }
            let rounds = LEAST_LAUNCHES.div_ceil(ready.len());
            let graph = Graph::record(&self.recording, |stream| {
                let mut overlap = false;
                for ready in std::iter::repeat_n(&ready, rounds).flatten() {
                    ready.enqueue_alone(stream, overlap)?;
                    overlap = ready.is_launch();
                }
                Ok(())
            })?;
            let mut replays = Vec::with_capacity(REPLAYS);
            for _ in 0..=REPLAYS {
                self.events[0].record(&self.stream)?;
                graph.launch(&self.stream)?;
                self.events[1].record(&self.stream)?;
                self.stream.synchronize()?;
                replays.push(self.events[1].seconds_since(&self.events[0])?);
            }
            // The first one loads the graph.
            let mut replays = replays.split_off(1);
            replays.sort_by(f64::total_cmp);
            times.push(Some(replays[REPLAYS / 2] / rounds as f64));
        }
        Ok(times)
    }
}
