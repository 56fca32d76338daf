//! Makes a module that shows a fault as small as it can, keeping the fault: delta debugging on graphs.
//!
//! A **candidate** is a smaller module; it is verified, and taken if the caller's predicate still holds. Candidates
//! come in a fixed order, so the result is a function of module and predicate:
//!
//! 1. one output instead of many, then an inner value instead of the output: what lies after the fault goes;
//! 2. stretches of nodes become fresh inputs, halves first, single nodes last: what lies before the fault goes;
//! 3. a node forwards an operand of its result's type, or becomes a weight of zeros;
//! 4. inputs of one type become one input;
//! 5. weights become splats of zero or one;
//! 6. symbols become constants, and constant extents smaller ones;
//! 7. source names go, and inputs and weights get short names.
//!
//! The number of candidates grows with the number of nodes times a small factor, and is bounded by [`CANDIDATES`].

mod candidates;
mod edit;

use millrace_ir::Module;
use millrace_ir::verify::check;

use crate::differential;
use crate::pass::Context;
use crate::pipeline::{Manager, Pipeline, Step};

/// Most candidates that are tried.
pub const CANDIDATES: usize = 50_000;

/// Most rounds over all kinds of candidates.
const ROUNDS: usize = 8;

/// The smallest module found for which `fails` holds; `module` itself if `fails` does not hold for it.
///
/// `fails` sees only modules that obey the verifier's rules (and `module` as it is).
pub fn reduce(module: &Module, fails: &mut dyn FnMut(&Module) -> bool) -> Module {
    if !fails(module) {
        return module.clone();
    }
    let mut search = Search { best: module.clone(), fails, left: CANDIDATES };
    for _ in 0..ROUNDS {
        let before = search.best.clone();
        candidates::outputs(&mut search);
        candidates::nodes(&mut search);
        candidates::forwards(&mut search);
        candidates::inputs(&mut search);
        candidates::weights(&mut search);
        candidates::extents(&mut search);
        candidates::names(&mut search);
        if search.best == before || search.left == 0 {
            break;
        }
    }
    let mut best = search.best;
    best.compact();
    best
}

/// The smallest failing module so far, and what is asked of the next.
struct Search<'a> {
    best: Module,
    fails: &'a mut dyn FnMut(&Module) -> bool,
    left: usize,
}

impl Search<'_> {
    /// Takes the candidate if there is one, it is legal and it fails.
    fn take(&mut self, candidate: Option<Module>) -> bool {
        let Some(mut candidate) = candidate else { return false };
        candidate.compact();
        if self.left == 0 || candidate == self.best || check(&candidate).is_err() {
            return false;
        }
        self.left -= 1;
        let taken = (self.fails)(&candidate);
        if taken {
            self.best = candidate;
        }
        taken
    }
}

/// The shortest pipeline found for which `fails` holds: steps are dropped, groups of all kinds become their steps.
pub fn reduce_pipeline(pipeline: &Pipeline, fails: &mut dyn FnMut(&Pipeline) -> bool) -> Pipeline {
    let mut best = pipeline.steps().to_vec();
    let mut width = best.len().max(1);
    loop {
        let mut at = 0;
        while at < best.len() {
            let end = (at + width).min(best.len());
            let mut shorter = best.clone();
            shorter.drain(at..end);
            if fails(&Pipeline::new(shorter.clone())) {
                best = shorter;
                continue;
            }
            let inner = match &best[at] {
                Step::Group(inner)
                | Step::Fixpoint { steps: inner, .. }
                | Step::Rolled { steps: inner, .. } => Some(inner.clone()),
                Step::Pass(_) => None,
            };
            if let (1, Some(inner)) = (width, inner) {
                let mut flat = best.clone();
                flat.splice(at..at + 1, inner);
                if fails(&Pipeline::new(flat.clone())) {
                    best = flat;
                    continue;
                }
            }
            at = end;
        }
        if width == 1 {
            return Pipeline::new(best);
        }
        width = width.div_ceil(2);
    }
}

/// How a pipeline fails on a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Symptom {
    /// A pass ends with the error of this code, which includes panics and broken rules.
    Error(&'static str),
    /// The outputs differ.
    Differs,
    /// An external command ends with this status.
    Status(i32),
}

impl std::fmt::Display for Symptom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Symptom::Error(code) => write!(f, "error {code}"),
            Symptom::Differs => f.write_str("different outputs"),
            Symptom::Status(status) => write!(f, "exit status {status} of the command"),
        }
    }
}

/// Runs `pipeline` on a copy of `module`, verifying after every pass; what goes well is judged by `finished`, which
/// gets the module before and after.
pub fn symptom(
    module: &Module,
    pipeline: &Pipeline,
    finished: &mut dyn FnMut(&Module, &Module) -> Option<Symptom>,
) -> Option<Symptom> {
    let mut after = module.clone();
    let mut manager = Manager { verify_each: true, ..Manager::default() };
    match manager.run(pipeline, &mut after, &mut Context::cpu()) {
        Err(error) => Some(Symptom::Error(error.code())),
        Ok(()) => finished(module, &after),
    }
}

/// Whether `after` computes something else than `before`, by [`differential`]; none if `before` cannot be evaluated.
pub fn differs(before: &Module, after: &Module) -> Option<Symptom> {
    let bindings = differential::small_bindings(before);
    let expected = differential::outputs(before, &bindings).ok()?;
    match differential::outputs(after, &bindings) {
        Err(error) => Some(Symptom::Error(error.code())),
        Ok(found) => differential::same(before, &expected, &found).is_err().then_some(Symptom::Differs),
    }
}
