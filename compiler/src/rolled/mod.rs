//! `rolled{..}`: the repeated layers of a module are rewritten once.
//!
//! A **window** is a stretch of the execution order that repeats; `Layers` finds the longest run of equal windows: same
//! ops, types and wiring, each with its own weights, states and source names. The steps run on two small modules that
//! keep only four and five of the windows: the first ones and the last. Two neighbouring windows of a result that differ
//! by one layer only are its **period**, which is stamped out for the layers that were left out.
//!
//! That this is what the steps would have made of the whole module is not believed: the result for four windows,
//! stamped to five, has to be the result for five, counters and runs of passes have to grow evenly, and the stamped
//! module is verified. Whatever is in doubt ends in the reason why, and the steps run on the whole module. Node and
//! value ids of a stamped module are those of `Module::compact`.
//!
//! This module knows no pass.

mod layers;
mod name;
mod period;
mod stamp;
mod truncate;

use millrace_ir::verify::check;
use millrace_ir::{Arena, Id, Module, Result as Outcome, WeightId};

use crate::manager::{PassRun, Settled};
use crate::pass::Context;

pub(crate) use layers::Layers;

/// Fewest repeated layers for which `rolled{..}` works when the text says nothing: nine are rewritten.
pub const LAYERS: usize = 12;

/// Fewest that the text may ask for.
pub const FEWEST: usize = 6;

/// Layers of the two small modules.
const KEPT: [usize; 2] = [4, 5];

/// Why the layers are not rolled.
type Rolled<T> = Result<T, String>;

/// A small module after the steps.
pub(crate) struct Trial {
    /// The module.
    pub(crate) module: Module,
    /// What the passes counted and said.
    pub(crate) context: Context,
    /// Their runs.
    pub(crate) runs: Vec<PassRun>,
    /// Which of them need not run again.
    pub(crate) settled: Settled,
    /// Whether they changed the module.
    pub(crate) changed: bool,
}

/// What the steps did to the whole module.
pub(crate) struct Whole {
    /// Runs of passes, with the nodes that the whole module would have had.
    pub(crate) runs: Vec<PassRun>,
    /// Which passes need not run again.
    pub(crate) settled: Settled,
    /// Counters, as they would have been.
    pub(crate) stats: Vec<(String, u64)>,
    /// The small module's remarks.
    pub(crate) context: Context,
    /// Whether the module changed.
    pub(crate) changed: bool,
}

/// Runs steps on the layers of `module`, which it replaces.
///
/// # Errors
/// Why the steps have to run on the whole module, which is left as it was.
pub(crate) fn run(
    module: &mut Module,
    layers: &Layers,
    steps: &mut dyn FnMut(Module) -> Outcome<Trial>,
) -> Rolled<Whole> {
    let mut trial =
        |module| steps(module).map_err(|e| format!("a pass failed on few layers: {}", e.message()));
    let [few, more] = KEPT;
    let five = layers.truncate(module, more)?;
    let five_layers = layers.of(&five.module)?;
    if five_layers.count != more {
        return Err("the first and the last layers differ from those between".into());
    }
    let four = five_layers.truncate(&five.module, few)?;
    let origin = five.module.clone();
    let after = [trial(four.module)?, trial(five.module)?];
    let own = |w: WeightId| five_layers.weights.of(w).is_some();
    if let Some(weight) = after[1].context.seeded.iter().find(|w| own(*w)) {
        let name = &origin.weights[weight].name;
        return Err(format!("the seeded numbers of @{name} decided something, and other layers have others"));
    }
    let grown = stamp::stamp(&origin, &five_layers, &four.map, &after[0].module)?;
    if !same(grown.onto(origin), &after[1].module) {
        return Err(format!("the result for {more} layers is not that for {few} layers with one more"));
    }
    let left_out = (layers.count - more) as u64;
    let runs = runs(&after, left_out)?;
    let stats = stats(&after, left_out)?;
    let [_, after] = after;
    let stamped = stamp::stamp(module, layers, &five.map, &after.module)?;
    stamped.replace(module)?;
    let Trial { mut context, settled, changed, .. } = after;
    let read = std::mem::take(&mut context.seeded);
    context.seeded.extend(read.iter().filter_map(|w| five.map.weights.get(w.index()).copied()));
    Ok(Whole { runs, settled, stats, context, changed })
}

impl Layers {
    /// What is said of layers that were rewritten once.
    pub(crate) fn said(&self) -> String {
        let [_, more] = KEPT;
        let Layers { period, count, .. } = self;
        format!(
            "{count} equal layers of {period} nodes: {more} were rewritten and stand for all; remarks are about them"
        )
    }
}

fn same(mut stamped: Module, ran: &Module) -> bool {
    let mut ran = ran.clone();
    ran.compact();
    stamped.compact();
    stamped == ran
}

/// What grows by the difference of the last two for each layer.
fn extrapolate(few: u64, more: u64, layers: u64) -> Option<u64> {
    match more.checked_sub(few) {
        Some(step) => more.checked_add(step.checked_mul(layers)?),
        None => more.checked_sub((few - more).checked_mul(layers)?),
    }
}

fn runs([few, more]: &[Trial; 2], layers: u64) -> Rolled<Vec<PassRun>> {
    let alike = |a: &PassRun, b: &PassRun| (a.name, a.changed) == (b.name, b.changed);
    if few.runs.len() != more.runs.len() || !few.runs.iter().zip(&more.runs).all(|(a, b)| alike(a, b)) {
        return Err("the number of layers changes which passes run".into());
    }
    let of = |(a, b): (&PassRun, &PassRun)| {
        let nodes = extrapolate(a.nodes as u64, b.nodes as u64, layers)? as usize;
        Some(PassRun { name: b.name, time: a.time + b.time, changed: b.changed, nodes })
    };
    let whole: Option<Vec<PassRun>> = few.runs.iter().zip(&more.runs).map(of).collect();
    whole.ok_or_else(|| "the number of nodes does not grow evenly".into())
}

fn stats([few, more]: &[Trial; 2], layers: u64) -> Rolled<Vec<(String, u64)>> {
    let (few, more) = (&few.context.stats, &more.context.stats);
    let names = |stats: &[(String, u64)]| stats.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
    if names(few) != names(more) {
        return Err("the number of layers changes which counters there are".into());
    }
    let of = |((name, a), (_, b)): (&(String, u64), &(String, u64))| {
        Some((name.clone(), extrapolate(*a, *b, layers)?))
    };
    let whole: Option<Vec<_>> = few.iter().zip(more).map(of).collect();
    whole.ok_or_else(|| "a counter does not grow evenly".into())
}

impl stamp::Stamped {
    /// The module it makes of `origin`.
    fn onto(self, mut origin: Module) -> Module {
        origin.weights.reserve(self.weights.len());
        self.weights.into_iter().for_each(|w| {
            origin.weights.push(w);
        });
        Module { phase: self.phase, target: self.target, graph: self.graph, ..origin }
    }

    /// Replaces `origin`, unless the result breaks rules.
    fn replace(self, origin: &mut Module) -> Rolled<()> {
        let weights = origin.weights.bound();
        let (name, dims) = (origin.name.clone(), origin.dims.clone());
        let taken = Module {
            weights: std::mem::take(&mut origin.weights),
            states: std::mem::take(&mut origin.states),
            dims,
            ..Module::new(&name)
        };
        let mut stamped = self.onto(taken);
        match check(&stamped).map(|_| ()) {
            Ok(()) => {
                *origin = stamped;
                Ok(())
            }
            Err(invalid) => {
                let mut kept = Arena::new();
                stamped.weights.truncate(weights);
                std::mem::swap(&mut kept, &mut stamped.weights);
                (origin.weights, origin.states) = (kept, stamped.states);
                Err(format!("the stamped module is invalid: {}", invalid.message()))
            }
        }
    }
}
