//! Times of nodes: a [`Profile`] that is attached to a session records every step it runs; a session without one reads
//! no clock.
//!
//! On the CPU times are measured on the thread that runs the step, so a node's span contains the work of all threads.
//! What lies between spans (checks, places, inputs) belongs to the step alone: spans sum to less than their step. A
//! device measures its own times by events between launches; the time of nodes that it runs together is entered at the
//! last of them that computes.

use std::time::{Duration, Instant};

use millrace_ir::step_cost::Lengths;
use millrace_ir::{Bindings, DType, NodeId};

use crate::session::TensorRef;

/// One node's run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The node.
    pub node: NodeId,
    /// From the start of the profile.
    pub start: Duration,
    /// How long the kernel took, waiting for streamed weights included.
    pub duration: Duration,
    /// How much of that was waiting for streamed weights.
    pub stall: Duration,
    /// Bytes of weights that were brought in for it.
    pub streamed: u64,
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// From the start of the profile.
    pub start: Duration,
    /// From bound inputs to the last node.
    pub duration: Duration,
    /// Values of the symbols.
    pub bindings: Bindings,
    /// Lengths of the packed sequences, if the graph has the inputs `seq_starts` and, with a cache, `kv_lens`.
    pub sequences: Vec<Lengths>,
    /// Nodes in the order they ran; complete if the step succeeded.
    pub spans: Vec<Span>,
}

/// Recorded steps.
#[derive(Clone, Debug)]
pub struct Profile {
    origin: Instant,
    /// Steps in the order they ran.
    pub steps: Vec<Step>,
}

impl Default for Profile {
    fn default() -> Self {
        Self::new()
    }
}

impl Profile {
    /// An empty profile; its time starts here.
    pub fn new() -> Self {
        Profile { origin: Instant::now(), steps: Vec::new() }
    }

    /// Begins a step.
    pub(crate) fn begin(&mut self, bindings: Bindings, sequences: Vec<Lengths>, nodes: usize) {
        let (start, duration) = (self.origin.elapsed(), Duration::ZERO);
        self.steps.push(Step { start, duration, bindings, sequences, spans: Vec::with_capacity(nodes) });
    }

    /// Ends a node that began at `start`.
    pub(crate) fn node(&mut self, node: NodeId, start: Instant) {
        let duration = start.elapsed();
        if let Some(step) = self.steps.last_mut() {
            let start = start.saturating_duration_since(self.origin);
            step.spans.push(Span { node, start, duration, stall: Duration::ZERO, streamed: 0 });
        }
    }

    /// Enters that the last node waited for weights, of which so many bytes were brought in.
    pub(crate) fn streamed(&mut self, stall: Duration, bytes: u64) {
        if let Some(span) = self.steps.last_mut().and_then(|step| step.spans.last_mut()) {
            (span.stall, span.streamed) = (stall, bytes);
        }
    }

    /// Enters a node that a device ran for `seconds`, beginning `after` seconds into the step.
    pub(crate) fn device_node(&mut self, node: NodeId, after: f64, seconds: f64) {
        let span = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        if let Some(step) = self.steps.last_mut() {
            let (start, duration) = (step.start + span(after), span(seconds));
            step.spans.push(Span { node, start, duration, stall: Duration::ZERO, streamed: 0 });
        }
    }

    /// Ends the step.
    pub(crate) fn end(&mut self) {
        let now = self.origin.elapsed();
        if let Some(step) = self.steps.last_mut() {
            step.duration = now.saturating_sub(step.start);
        }
    }
}

/// The lengths that a step's inputs tell, empty if they do not tell them. The values are not trusted: kernels check
/// them later.
pub(crate) fn sequences(names: &[&str], inputs: &[TensorRef<'_>]) -> Vec<Lengths> {
    let find = |name: &str| -> Option<Vec<u64>> {
        let input = names.iter().position(|n| *n == name).and_then(|i| inputs.get(i))?;
        let values =
            input.bytes.as_chunks::<4>().0.iter().map(|c| u64::try_from(i32::from_le_bytes(*c)).ok());
        if input.dtype == DType::I32 { values.collect() } else { None }
    };
    let Some(starts) = find("seq_starts") else { return Vec::new() };
    let keys = find("kv_lens");
    starts
        .windows(2)
        .enumerate()
        .map(|(index, pair)| {
            let queries = pair[1].checked_sub(pair[0])?;
            let keys = match &keys {
                Some(keys) => *keys.get(index)?,
                None => queries,
            };
            (keys >= queries).then_some(Lengths { queries, keys })
        })
        .collect::<Option<Vec<_>>>()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn i32s(values: &[i32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn lengths_come_from_the_inputs() {
        let found = |starts: &[i32], lens: Option<&[i32]>| {
            let (a, b) = (i32s(starts), i32s(lens.unwrap_or(&[])));
            let (na, nb) = ([starts.len() as u64], [lens.map_or(0, <[i32]>::len) as u64]);
            let mut names = vec!["seq_starts"];
            let mut inputs = vec![TensorRef { dtype: DType::I32, shape: &na, bytes: &a }];
            if lens.is_some() {
                names.push("kv_lens");
                inputs.push(TensorRef { dtype: DType::I32, shape: &nb, bytes: &b });
            }
            sequences(&names, &inputs).iter().map(|l| (l.queries, l.keys)).collect::<Vec<_>>()
        };
        assert_eq!(found(&[0, 2, 5], None), [(2, 2), (3, 3)]);
        assert_eq!(found(&[0, 1, 5], Some(&[9, 4])), [(1, 9), (4, 4)]);
        // Values that contradict each other tell nothing.
        assert_eq!(found(&[0, 5, 2], None), []);
        assert_eq!(found(&[0, -1], None), []);
        assert_eq!(found(&[0, 4], Some(&[3])), []);
        assert_eq!(found(&[0, 2, 5], Some(&[9])), []);
        assert_eq!(sequences(&[], &[]), []);
    }
}
