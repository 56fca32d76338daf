//! Random graphs: modules that verify, with inputs that their ops accept, for property tests of everything that
//! transforms or runs graphs.
//!
//! An op says with [`Sample`] how it is put into a random graph; the op table asks for it, so an op without does not
//! compile. [`graph`] strings such ops together with *motifs*, the shapes that passes look for. Everything follows from
//! the seed. [`layered`] repeats such a graph as the layers of a model.
//!
//! Values stay *tame*: with every value goes what is [`Known`] of its elements, and an op is proposed only where its
//! result is bounded and not sensitive without bound (no logarithm near 0, no quotient by nearly 0). A value is *exact*
//! if every legal implementation gives the same bits; ops with jumps (comparisons, `floor`, casts to integers) read
//! exact values only, so that a difference of two implementations stays a rounding.

mod case;
mod contraction;
mod draft;
mod elementwise;
mod fused;
mod indexing;
mod known;
mod layers;
mod motifs;
mod movement;
mod random;
mod sequences;
mod spelled;
mod stacking;
mod weights;

pub use case::{Fill, RandomGraph};
pub use draft::Draft;
pub use known::Known;
pub use layers::{Layered, layered};
pub use random::Random;

use crate::graph::{Operand, Phase};
use crate::ops::{Op, OpDef};

/// How an op family is put into random graphs.
pub trait Sample: OpDef {
    /// An op spelled `name` with operands that it accepts, from the draft or made for it; `None` if the draft has
    /// nothing that fits.
    fn sample(name: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)>;

    /// Bounds of the results' elements; `None` where the op has no value, jumps, or is sensitive without bound.
    fn range(&self, operands: &[Known]) -> Option<(f64, f64)>;
}

/// The random graph of a seed, of about `size` nodes. A quarter of the graphs is in phase fused with fused ops, the
/// others are imported.
pub fn graph(seed: u64, size: usize) -> RandomGraph {
    let phase = if seed % 4 == 3 { Phase::Fused } else { Phase::Imported };
    let mut draft = Draft::new(seed, phase);
    grow(&mut draft, size);
    draft.finish(seed)
}

/// Adds nodes until there are about `size`.
fn grow(draft: &mut Draft, size: usize) {
    let names = Op::all_names();
    let fused = ["matmul.fused", "pointwise", "add_rms_norm", "add_layer_norm"];
    // Most proposals succeed; the bound ends a draft in which nothing fits any more.
    for _ in 0..size * 4 {
        if draft.nodes() >= size {
            break;
        }
        if draft.random.once_in(4) {
            motifs::add(draft);
        } else if draft.phase() == Phase::Fused && draft.random.once_in(3) {
            let name = draft.random.pick(&fused);
            draft.propose(name);
        } else {
            let name = draft.random.pick(&names);
            draft.propose(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::eval::evaluate;
    use crate::tensor::Tensor;
    use crate::text::{parse, print};
    use crate::verify::check;
    use crate::weights::WeightReader;

    fn outputs(graph: &RandomGraph, seed: u64) -> Vec<Tensor> {
        let mut random = Random::new(seed);
        let bindings = graph.bindings(&mut random);
        let inputs = graph.inputs(&bindings, &mut random);
        let mut states = graph.states(&bindings, &mut random);
        evaluate(&graph.module, &mut WeightReader::new(&graph.module), &inputs, &mut states)
            .unwrap_or_else(|e| panic!("seed {seed}: {e}\n{}", print(&graph.module)))
    }

    #[test]
    fn graphs_verify_follow_from_the_seed_and_evaluate() {
        let mut names: BTreeMap<&str, usize> = BTreeMap::new();
        for seed in 0..400 {
            let graph = graph(seed, 14);
            check(&graph.module).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            let text = print(&graph.module);
            assert_eq!(print(&super::graph(seed, 14).module), text, "seed {seed}");
            assert_eq!(print(&parse(&text).unwrap()), text, "seed {seed}");
            for (_, node) in graph.module.graph.nodes.iter() {
                *names.entry(node.op.name()).or_default() += 1;
            }
            let outputs = outputs(&graph, seed);
            for (output, found) in graph.module.graph.outputs.iter().zip(&outputs) {
                let finite = found.data.iter().all(|v| v.is_finite());
                assert!(finite, "seed {seed}: {} is not finite\n{text}", output.value);
            }
        }
        let missing: Vec<&str> =
            Op::all_names().into_iter().filter(|n| names.get(n).copied().unwrap_or(0) < 3).collect();
        assert!(missing.is_empty(), "hardly sampled: {missing:?}");
    }

    #[test]
    fn layers_verify_follow_from_the_seed_and_evaluate() {
        let (mut finite, mut all) = (0, 0);
        let mut planted: BTreeMap<&str, usize> = BTreeMap::new();
        for seed in 0..200 {
            let Layered { graph, layers, planted: what } = layered(seed, 8);
            what.into_iter().for_each(|w| *planted.entry(w).or_default() += 1);
            check(&graph.module).unwrap_or_else(|e| panic!("seed {seed}: {e}\n{}", print(&graph.module)));
            assert!(layers.iter().all(|n| (3..=12).contains(n)), "seed {seed}: {layers:?}");
            let text = print(&graph.module);
            assert_eq!(print(&layered(seed, 8).graph.module), text, "seed {seed}");
            assert_eq!(print(&parse(&text).unwrap()), text, "seed {seed}");
            let outputs = outputs(&graph, seed);
            all += outputs.len();
            finite += outputs.iter().filter(|t| t.data.iter().all(|v| v.is_finite())).count();
        }
        // What is planted may lead out of the bounds that keep drafts tame.
        assert!(finite * 50 > all * 49, "{finite} of {all} outputs are finite");
        assert!(planted.len() > 7 && planted.values().all(|n| *n > 2), "{planted:?}");
    }

    /// No element leaves the bounds that were derived for it, which is what keeps the graphs tame.
    #[test]
    fn bounds_hold() {
        for seed in 0..200 {
            let graph = graph(seed, 14);
            let mut random = Random::new(seed);
            let bindings = graph.bindings(&mut random);
            let inputs = graph.inputs(&bindings, &mut random);
            let mut states = graph.states(&bindings, &mut random);
            let outputs =
                evaluate(&graph.module, &mut WeightReader::new(&graph.module), &inputs, &mut states).unwrap();
            for (bounds, found) in graph.output_bounds.iter().zip(&outputs) {
                for v in &found.data {
                    let slack = 0.05 * (1.0 + bounds.0.abs().max(bounds.1.abs()));
                    let inside = (bounds.0 - slack..=bounds.1 + slack).contains(v);
                    assert!(inside, "seed {seed}: {v} is outside {bounds:?}\n{}", print(&graph.module));
                }
            }
        }
    }
}
