//! Random graphs of repeated layers: a prologue, one or two runs of layers, and what follows them.
//!
//! A layer is drafted once. Values that go from layer to layer are **carried**: in the draft an input stands for what a
//! layer reads, and another one for what the last layer leaves. `stacking` writes the layers out, each with weights,
//! states and names of its own, and plants what makes layers less equal.

use super::case::RandomGraph;
use super::draft::Draft;
use super::known::computes;
use super::stacking::stack;
use super::{grow, motifs};
use crate::graph::{Operand, Phase};
use crate::ops::binary::BinaryFn;
use crate::ops::unary::UnaryFn;

/// Bound of what the first layer gets.
const FIRST: f64 = 1.5;

/// Most layers of a run.
const MOST_LAYERS: usize = 12;

/// A random graph of repeated layers.
#[derive(Clone, Debug)]
pub struct Layered {
    /// The graph.
    pub graph: RandomGraph,
    /// Number of layers of each run.
    pub layers: Vec<usize>,
    /// What makes layers less equal.
    pub planted: Vec<&'static str>,
}

/// A run of layers in a draft.
pub(super) struct Run {
    /// Positions of the nodes of a layer.
    pub(super) nodes: std::ops::Range<usize>,
    /// Numbers of the weights that were made for a layer.
    pub(super) weights: std::ops::Range<usize>,
    /// Number of layers.
    pub(super) layers: usize,
    /// What goes from layer to layer.
    pub(super) carried: Vec<Carried>,
}

/// A value that every layer takes and leaves.
pub(super) struct Carried {
    /// What the first layer gets.
    pub(super) first: Operand,
    /// What stands in the draft for what a layer gets.
    pub(super) taken: Operand,
    /// What a layer leaves.
    pub(super) left: Operand,
    /// What stands in the draft for what the last layer leaves.
    pub(super) after: Operand,
}

/// The random graph of a seed whose layers have about `size` nodes each. A quarter of the graphs is in phase fused.
pub fn layered(seed: u64, size: usize) -> Layered {
    let phase = if seed % 4 == 3 { Phase::Fused } else { Phase::Imported };
    let mut draft = Draft::new(seed, phase);
    let more = draft.random.below(4);
    grow(&mut draft, more);
    let runs: Vec<Run> = (0..1 + usize::from(draft.random.once_in(6)))
        .map(|_| {
            let run = run(&mut draft, size);
            let more = draft.nodes() + draft.random.below(4);
            grow(&mut draft, more);
            run
        })
        .collect();
    let mut random = draft.random.clone();
    let layers = runs.iter().map(|run| run.layers).collect();
    let (mut graph, planted) = stack(draft.open(), &runs, &mut random);
    graph.seed = seed;
    Layered { graph, layers, planted }
}

/// Drafts a layer.
fn run(draft: &mut Draft, size: usize) -> Run {
    let layers = draft.random.between(3, MOST_LAYERS);
    let count = draft.random.pick(&[1, 1, 1, 2, 3]);
    // A sum of all that the layers add, or what the last one made.
    let adds: Vec<bool> = (0..count).map(|_| !draft.random.once_in(4)).collect();
    let mut firsts: Vec<Operand> = Vec::new();
    for _ in &adds {
        let found = draft.find(|k| computes(k.ty.dtype) && k.ty.rank() > 0 && k.ty.rank() < 4);
        // A draft begins with an input that is a matrix of floats.
        let ty = match (found, firsts.first()) {
            (_, Some(first)) if draft.random.once_in(2) => draft.ty(*first),
            (Some(found), _) => draft.ty(found),
            (None, _) => continue,
        };
        firsts.push(draft.value(&ty, -FIRST, FIRST));
    }
    let before = draft.offer(|_, _| true);
    let carried: Vec<(Operand, Operand)> = firsts
        .iter()
        .zip(&adds)
        .map(|(first, adds)| {
            let bound = if *adds { FIRST + layers as f64 } else { FIRST };
            (*first, draft.stand_in(draft.ty(*first), -bound, bound))
        })
        .collect();
    let weights = draft.weights();
    let start = draft.nodes();
    // Some of what was there before is read by every layer.
    draft.offer(|random, o| carried.iter().any(|c| c.1 == o) || random.once_in(4));
    for ((_, taken), _) in carried.iter().zip(&adds).filter(|(_, adds)| **adds) {
        if !draft.random.once_in(4) {
            motifs::norm(draft, *taken);
        }
    }
    grow(draft, start + size);
    let left: Vec<Operand> = (0..carried.len()).map(|at| leave(draft, &carried, at, adds[at])).collect();
    let (nodes, weights) = (start..draft.nodes(), weights..draft.weights());
    // What comes behind reads no value of a layer, but now and then one of its weights.
    draft.offer(|random, o| matches!(o, Operand::Weight(_)) && !before.contains(&o) && random.once_in(12));
    draft.offer_also(&before);
    let carried: Vec<Carried> = carried
        .into_iter()
        .zip(left)
        .map(|((first, taken), left)| {
            let (ty, (low, high)) = (draft.ty(taken), (draft.known(taken).low, draft.known(taken).high));
            Carried { first, taken, left, after: draft.stand_in(ty, low, high) }
        })
        .collect();
    Run { nodes, weights, layers, carried }
}

/// What a layer leaves of a carried value.
fn leave(draft: &mut Draft, carried: &[(Operand, Operand)], at: usize, adds: bool) -> Operand {
    let taken = carried[at].1;
    let ty = draft.ty(taken);
    if draft.random.once_in(12) {
        // Handed on, perhaps by another carried value: then it passes a layer by.
        let bound = draft.known(taken).bound();
        let same: Vec<Operand> = carried.iter().map(|c| c.1).collect();
        let fits = |draft: &Draft, o: Operand| draft.ty(o) == ty && draft.known(o).bound() <= bound;
        let same: Vec<Operand> = same.into_iter().filter(|o| fits(draft, *o)).collect();
        return draft.random.pick(&same);
    }
    let made = made(draft, taken).and_then(|mut y| {
        for _ in 0..draft.random.below(3) {
            let other = made(draft, taken)?;
            let function = draft.random.pick(&[BinaryFn::Mul, BinaryFn::Max]);
            y = motifs::binary(draft, function, y, other)?;
        }
        Some(y)
    });
    let Some(made) = made else { return taken };
    let sum = if adds { motifs::binary(draft, BinaryFn::Add, taken, made) } else { Some(made) };
    sum.unwrap_or(taken)
}

/// A value between -1 and 1 of the type of `like`, of what the layer has.
fn made(draft: &mut Draft, like: Operand) -> Option<Operand> {
    let ty = draft.ty(like);
    let rank = ty.rank();
    let wide = draft.random.once_in(2) && rank > 1 && ty.last().as_const().is_some();
    let y = match draft.find(|k| {
        let same = k.ty.dtype == ty.dtype && k.ty.rank() == rank;
        wide && same && k.ty.shape[..rank - 1] == ty.shape[..rank - 1] && k.ty.last().as_const().is_some()
    }) {
        Some(x) => motifs::project(draft, x, &ty.last())?,
        None => draft.find(|k| k.ty == ty)?,
    };
    if draft.known(y).bound() <= 1.0 { Some(y) } else { motifs::unary(draft, UnaryFn::Tanh, y) }
}
