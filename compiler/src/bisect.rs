//! Finds the rewrite that a fault begins with, by halving the number of rewrites that may happen.

use millrace_ir::Module;

use crate::pass::{Context, Rewrite};
use crate::pipeline::{Controls, Manager, Pipeline};

/// Runs a copy of `module` through `pipeline` with at most `limit` rewrites; none if a pass failed.
fn run(module: &Module, pipeline: &Pipeline, limit: Option<u64>) -> (Option<Module>, Context) {
    let mut module = module.clone();
    let mut context = Context::cpu();
    let controls = Controls { limit, trace: true, ..Controls::default() };
    let mut manager = Manager { controls, ..Manager::default() };
    let done = manager.run(pipeline, &mut module, &mut context);
    (done.ok().map(|()| module), context)
}

/// The first rewrite of `pipeline` on `module` with which `bad` holds for the result; a pipeline that fails is bad
/// as well. None if the whole pipeline is good, or if the module is bad before the first pass.
///
/// The pipeline runs about log2(number of rewrites) times. If badness comes and goes, one of the rewrites at which it
/// comes is found. With no rewrite at all, passes that the phases need run nevertheless; if that is bad, the first
/// such pass that makes it so is the answer.
pub fn bisect(module: &Module, pipeline: &Pipeline, bad: &mut dyn FnMut(&Module) -> bool) -> Option<Rewrite> {
    let mut is_bad = |limit: Option<u64>| {
        let (after, context) = run(module, pipeline, limit);
        (after.is_none_or(|m| bad(&m)), context)
    };
    let (bad_in_full, context) = is_bad(None);
    if !bad_in_full {
        return None;
    }
    let events = context.numbering.events;
    if is_bad(Some(0)).0 {
        return required(module, pipeline, bad);
    }
    // Good with `low` rewrites, bad with `high`.
    let (mut low, mut high) = (0, context.numbering.count);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if is_bad(Some(middle)).0 { high = middle } else { low = middle }
    }
    events.into_iter().find(|e| e.number == high)
}

/// The pass that makes the module bad though no rewrite may happen.
fn required(module: &Module, pipeline: &Pipeline, bad: &mut dyn FnMut(&Module) -> bool) -> Option<Rewrite> {
    if bad(module) {
        return None;
    }
    let mut first: Option<usize> = None;
    let mut runs = 0;
    let mut observer = |_: &'static str, module: &Module, changed: bool| {
        if first.is_none() && changed && bad(module) {
            first = Some(runs);
        }
        runs += 1;
    };
    let controls = Controls { limit: Some(0), trace: true, ..Controls::default() };
    let mut manager = Manager { controls, observer: Some(&mut observer), ..Manager::default() };
    let mut context = Context::cpu();
    // A failure is the last pass's that was begun.
    let _ = manager.run(pipeline, &mut module.clone(), &mut context);
    let mut passes = context.numbering.events.into_iter().filter(|e| e.node.is_none());
    match first {
        Some(at) => passes.nth(at),
        None => passes.next_back(),
    }
}
