//! Steps of an engine that is not running: sizes of their symbols and predicted times.

use millrace_ir::cost::Sustained;
use millrace_ir::manifest::Manifest;
use millrace_ir::plan::stream::{Demand, Placement, Prediction, costs, predict, times};
use millrace_ir::step_cost::Lengths;
use millrace_ir::{Bindings, Module};

/// A step: how many sequences, the new tokens of each, and the tokens that each has before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Sequences.
    pub batch: u64,
    /// New tokens of each sequence: 1 decodes.
    pub tokens: u64,
    /// Tokens of each sequence that are in the cache already.
    pub past: u64,
}

impl Step {
    /// Values of the symbols of `module` in this step, within their bounds: those of packed models by their names, others at
    /// their hints.
    pub fn bindings(&self, module: &Module, manifest: &Manifest) -> Bindings {
        let mut bindings = Bindings::hints(&module.dims);
        let block = manifest.model.as_ref().map_or(1, |m| m.tokens_per_block.max(1));
        for decl in module.dims.iter().filter(|_| manifest.model.is_some()) {
            let value = match decl.sym.name() {
                "t" => self.batch.saturating_mul(self.tokens),
                "b" | "r" => self.batch,
                "p" => self.past.saturating_add(self.tokens).div_ceil(block),
                _ => continue,
            };
            let value = value.clamp(decl.min, decl.max);
            bindings.set(decl.sym, value.next_multiple_of(decl.multiple.max(1)).min(decl.max));
        }
        bindings
    }

    /// Lengths of its sequences.
    pub fn lengths(&self) -> Vec<Lengths> {
        let keys = self.past.saturating_add(self.tokens);
        (0..self.batch).map(|_| Lengths { queries: self.tokens, keys }).collect()
    }

    /// Nanoseconds of each node of this step with all weights at hand.
    pub fn times(&self, module: &Module, manifest: &Manifest, device: &Sustained) -> Vec<u64> {
        let lengths = if manifest.model.is_some() { self.lengths() } else { Vec::new() };
        times(module, device, &self.bindings(module, manifest), &lengths)
    }

    /// This step under a placement, in nanoseconds.
    pub fn predict(
        &self,
        (module, manifest): (&Module, &Manifest),
        device: &Sustained,
        (demand, placement): (&Demand, &Placement),
    ) -> Prediction {
        predict(demand, placement, &costs(device, self.times(module, manifest, device)))
    }
}
