//! The pass manager: gates phases, verifies, times, numbers, observes and leaves out passes, and turns a pass that
//! panics or breaks a module into an error with a reproducer.
//!
//! A **reproducer** is a filetest that holds the module as it was before the failing pass, and that pass alone as its
//! pipeline. It costs one copy of the module at the start: when something fails, the pipeline runs again from there,
//! verifying after every pass, and stops before the guilty one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use millrace_ir::verify::check;
use millrace_ir::{Error, Kind, Module, Phase, Result, text};

use crate::memory::Meter;
use crate::pass::{Context, Numbering, Pass};
use crate::pipeline::{Call, Pipeline, ROUNDS, Step};
use crate::rolled::{self, LAYERS, Layers, Trial};

/// The name under which `rolled{..}` speaks.
pub const ROLLED: &str = "rolled";

/// Time and effect of one run of a pass.
#[derive(Clone, Debug)]
pub struct PassRun {
    /// Pass.
    pub name: &'static str,
    /// Wall time.
    pub time: Duration,
    /// Whether the module changed.
    pub changed: bool,
    /// Live nodes afterwards.
    pub nodes: usize,
}

/// What the manager calls after a pass: the pass, the module, and whether it changed.
pub type Observer<'a> = dyn FnMut(&'static str, &Module, bool) + 'a;

/// Where a pipeline ends early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// After the first run of this pass.
    Pass(String),
    /// As soon as the module reaches this phase.
    Phase(Phase),
}

/// How a pipeline runs when someone looks for a fault.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    /// Passes that are left out; a phase that one of them leaves is reached without it, unless it is required.
    pub disabled: Vec<String>,
    /// Where to stop.
    pub stop: Option<Stop>,
    /// Numbers up to which rewrites happen; see [`Context::allow`].
    pub limit: Option<u64>,
    /// Records what each number stands for.
    pub trace: bool,
    /// Folder for reproducers; none are written without it.
    pub reproducers: Option<PathBuf>,
    /// Runs the steps of `rolled{..}` on the whole module, so that remarks are about every layer. Observers, limits,
    /// traces and stops ask for it by themselves.
    pub whole: bool,
}

/// How a pipeline runs.
#[derive(Default)]
pub struct Manager<'a> {
    /// Verify after every pass as well.
    pub verify_each: bool,
    /// Called after every pass.
    pub observer: Option<&'a mut Observer<'a>>,
    /// Every run of a pass, in order.
    pub runs: Vec<PassRun>,
    /// Further controls.
    pub controls: Controls,
    /// Whether [`Controls::stop`] ended the run.
    pub stopped: bool,
    /// Which passes need not run again.
    pub settled: Settled,
    /// Time spent in finding repeated layers and in stamping them out.
    pub rolling: Duration,
    /// Measures memory.
    pub meter: Meter,
}

/// The passes that changed nothing since the module last changed.
#[derive(Clone, Debug, Default)]
pub struct Settled {
    /// Counts the runs that changed the module.
    changes: u64,
    /// Calls that changed nothing, with the count then.
    calls: Vec<(String, u64)>,
}

impl Settled {
    fn contains(&self, call: &str) -> bool {
        self.calls.iter().any(|(c, at)| c == call && *at == self.changes)
    }

    fn ran(&mut self, call: &str, changed: bool, moved: bool) {
        self.changes += u64::from(changed || moved);
        self.calls.retain(|(c, _)| c != call);
        if !changed {
            self.calls.push((call.to_string(), self.changes));
        }
    }
}

/// A pass that failed.
struct Failure {
    error: Error,
    /// The pass as the pipeline spells it; none if the pass was not to blame (a phase gate).
    call: Option<String>,
    /// Whether Millrace is at fault, not the model.
    defect: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, call: None, defect: false }
    }
}

impl Manager<'_> {
    /// Runs `pipeline` on `module`; verifies before the first pass, when fusion begins, after stamping repeated
    /// layers and at the end; with `verify_each` after every pass.
    ///
    /// # Errors
    /// `ir/invalid` for a module that breaks rules, `compile/phase` for a pass that does not accept the module's
    /// phase, `compile/pass-panicked` and `compile/pass-broke-module` for a defect of a pass, and the passes' own
    /// errors.
    pub fn run(&mut self, pipeline: &Pipeline, module: &mut Module, context: &mut Context) -> Result<()> {
        check(module)?;
        let Controls { limit, trace, .. } = self.controls;
        if limit.is_some() || trace {
            context.numbering = Numbering { limit, trace, ..Numbering::default() };
        }
        let origin = self.controls.reproducers.is_some().then(|| (module.clone(), context.clone()));
        self.stopped = false;
        self.settled = Settled::default();
        let first = self.runs.len();
        match self.steps(pipeline.steps(), module, context, None).and_then(|_| verified(module, None)) {
            Ok(()) => Ok(()),
            Err(failure) => match (origin, &self.controls.reproducers) {
                (Some(origin), Some(folder)) if failure.defect => {
                    Err(Replay { controls: &self.controls, pipeline, origin, ran: self.runs.len() - first }
                        .reproduce(failure, folder))
                }
                _ => Err(failure.error),
            },
        }
    }

    /// Runs steps; `before` stops before that run of a pass.
    fn steps(
        &mut self,
        steps: &[Step],
        module: &mut Module,
        context: &mut Context,
        before: Option<usize>,
    ) -> Result<bool, Failure> {
        let mut changed = false;
        for step in steps {
            if self.stopped {
                break;
            }
            changed |= match step {
                Step::Pass(_) if before == Some(self.runs.len()) => {
                    self.stopped = true;
                    false
                }
                Step::Pass(call) => self.call(call, module, context)?,
                Step::Group(steps) => self.steps(steps, module, context, before)?,
                Step::Fixpoint { max, steps } => {
                    let (mut ever, mut settled) = (false, false);
                    let rounds = max.unwrap_or(ROUNDS);
                    for _ in 0..rounds {
                        if !self.steps(steps, module, context, before)? || self.stopped {
                            settled = true;
                            break;
                        }
                        ever = true;
                    }
                    if !settled && let Some(id) = module.graph.order.first() {
                        let message =
                            format!("stopped after {rounds} rounds, the last of which changed something");
                        context.remark("fixpoint", &module.graph, *id, message);
                    }
                    ever
                }
                Step::Rolled { min, steps } => {
                    let watched = before.is_some() || self.watched(context);
                    match (!watched).then(|| self.rolled(min.unwrap_or(LAYERS), step, module, context)) {
                        Some(Some(changed)) => changed,
                        _ => self.steps(steps, module, context, before)?,
                    }
                }
            };
        }
        Ok(changed)
    }

    /// Whether somebody looks at what happens inside of a group.
    fn watched(&self, context: &Context) -> bool {
        let Numbering { limit, trace, .. } = context.numbering;
        self.observer.is_some()
            || self.controls.stop.is_some()
            || self.controls.whole
            || limit.is_some()
            || trace
    }

    /// Runs the steps of a `rolled` group for repeated layers; none if they have to run on the whole module.
    fn rolled(
        &mut self,
        min: usize,
        step: &Step,
        module: &mut Module,
        context: &mut Context,
    ) -> Option<bool> {
        let Step::Rolled { steps, .. } = step else { return None };
        let start = Instant::now();
        let layers = match Layers::find(module, min) {
            Ok(layers) => layers?,
            Err(reason) => return self.unrolled(&reason, module, context),
        };
        let mut trial = |mut module: Module| -> Result<Trial> {
            let mut manager = Manager {
                verify_each: self.verify_each,
                controls: Controls { reproducers: None, ..self.controls.clone() },
                settled: self.settled.clone(),
                ..Manager::default()
            };
            let mut inner = context.target_facts();
            // Other layers than these may repeat as well.
            let rolled = manager.rolled(min, step, &mut module, &mut inner);
            let done = match rolled {
                Some(changed) => Ok(changed),
                None => manager.steps(steps, &mut module, &mut inner, None),
            };
            let changed =
                done.and_then(|changed| verified(&module, None).map(|()| changed)).map_err(|f| f.error)?;
            Ok(Trial { module, context: inner, runs: manager.runs, settled: manager.settled, changed })
        };
        let whole = match rolled::run(module, &layers, &mut trial) {
            Ok(whole) => whole,
            Err(reason) => return self.unrolled(&reason, module, context),
        };
        whole.stats.iter().for_each(|(name, value)| context.count(name, *value));
        context.seeded.extend(whole.context.seeded.iter());
        context.take_remarks(whole.context);
        if let Some(first) = module.graph.order.first() {
            context.remark(ROLLED, &module.graph, *first, layers.said());
        }
        let inside: Duration = whole.runs.iter().map(|run| run.time).sum();
        self.rolling += start.elapsed().saturating_sub(inside);
        self.runs.extend(whole.runs);
        self.settled = whole.settled;
        Some(whole.changed)
    }

    /// Says why the steps of a group run on the whole module.
    fn unrolled(&mut self, reason: &str, module: &Module, context: &mut Context) -> Option<bool> {
        if let Some(first) = module.graph.order.first() {
            context.blocked(
                ROLLED,
                &module.graph,
                *first,
                &format!("{reason}; the passes run on all layers"),
            );
        }
        None
    }

    /// Runs one pass under the gates of the manager.
    ///
    /// # Errors
    /// As [`Manager::run`].
    pub fn pass(&mut self, pass: &dyn Pass, module: &mut Module, context: &mut Context) -> Result<bool> {
        self.gated(pass, pass.name(), module, context).map_err(|f| f.error)
    }

    fn call(&mut self, call: &Call, module: &mut Module, context: &mut Context) -> Result<bool, Failure> {
        self.gated(call.pass.as_ref(), &call.to_string(), module, context)
    }

    fn gated(
        &mut self,
        pass: &dyn Pass,
        spelled: &str,
        module: &mut Module,
        context: &mut Context,
    ) -> Result<bool, Failure> {
        let name = pass.name();
        let disabled = self.controls.disabled.iter().any(|d| d == name);
        if disabled && pass.required() {
            return Ok(false);
        }
        let (first, last) = pass.phases();
        if module.phase < first || module.phase > last {
            let message =
                format!("pass `{name}` accepts phases {first} to {last}, the module is {}", module.phase);
            let error = Error::new(Kind::Usage, "compile/phase", message);
            return Err(error.hint("change the order of the pipeline").into());
        }
        // A pass that found nothing to do finds nothing again until another one changes the module.
        if self.settled.contains(spelled) && pass.leaves().is_none_or(|phase| phase <= module.phase) {
            return Ok(false);
        }
        let start = Instant::now();
        let allowed = !disabled && (context.allow_run(name) || pass.required());
        let changed = allowed && guarded(pass, spelled, module, context)?;
        let before = module.phase;
        if let Some(phase) = pass.leaves() {
            module.phase = module.phase.max(phase);
        }
        context.remarks_left_out += context.remarks.len().saturating_sub(Context::REMARKS) as u64;
        context.remarks.truncate(Context::REMARKS);
        let time = start.elapsed();
        // The last pass to reach these phases is followed by passes that build on their promises.
        let gate = module.phase != before && module.phase == Phase::Fused;
        if self.verify_each || gate {
            verified(module, Some((name, spelled)))?;
        }
        self.settled.ran(spelled, changed, module.phase != before);
        self.runs.push(PassRun { name, time, changed, nodes: module.graph.nodes.len() });
        self.meter.lap(if matches!(name, "schedule" | "plan-memory") { "plan" } else { "passes" });
        if let Some(observer) = &mut self.observer {
            observer(name, module, changed);
        }
        self.stopped |= match &self.controls.stop {
            None => false,
            Some(Stop::Pass(stop)) => stop == name,
            Some(Stop::Phase(phase)) => module.phase >= *phase,
        };
        Ok(changed)
    }
}

/// Runs a pass; a panic becomes an error. The only place that catches one.
fn guarded(
    pass: &dyn Pass,
    spelled: &str,
    module: &mut Module,
    context: &mut Context,
) -> Result<bool, Failure> {
    let name = pass.name();
    let failed = |error: Error| {
        let defect = error.kind() == Kind::Internal;
        Failure { error: error.at(format!("pass {name}")), call: Some(spelled.to_string()), defect }
    };
    // After a panic the module is given up, so that nobody sees it half changed.
    match catch_unwind(AssertUnwindSafe(|| pass.run(module, context))) {
        Ok(done) => done.map_err(failed),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
            let message = format!("the pass panicked: {text}");
            Err(failed(Error::new(Kind::Internal, "compile/pass-panicked", message)))
        }
    }
}

/// A module that breaks rules after a pass is the pass's defect.
fn verified(module: &Module, pass: Option<(&str, &str)>) -> Result<(), Failure> {
    check(module).map(|_| ()).map_err(|invalid| {
        let place = pass.map_or("after the pipeline".to_string(), |(name, _)| format!("after pass {name}"));
        let message = format!("a pass broke the module: {}", invalid.message());
        let error = Error::new(Kind::Internal, "compile/pass-broke-module", message).at(place);
        Failure { error, call: pass.map(|(_, spelled)| spelled.to_string()), defect: true }
    })
}

/// A second run of a pipeline that failed, to find the module before the guilty pass.
struct Replay<'a> {
    controls: &'a Controls,
    pipeline: &'a Pipeline,
    origin: (Module, Context),
    /// Runs of passes that ended before the failure.
    ran: usize,
}

impl Replay<'_> {
    fn manager(&self) -> Manager<'static> {
        Manager {
            verify_each: true,
            controls: Controls { reproducers: None, whole: true, ..self.controls.clone() },
            ..Manager::default()
        }
    }

    /// Writes the reproducer and says in the error's hint how to use it.
    fn reproduce(self, failure: Failure, folder: &std::path::Path) -> Error {
        let (mut module, mut context) = self.origin.clone();
        let mut manager = self.manager();
        // Verifying each time may blame an earlier pass than the first run did, and rightly.
        let (failure, at) = match manager.steps(self.pipeline.steps(), &mut module, &mut context, None) {
            Err(earlier) => (earlier, manager.runs.len()),
            Ok(_) => (failure, self.ran),
        };
        let (mut module, mut context) = self.origin.clone();
        let mut manager = self.manager();
        // Everything before the guilty pass went well in the run above.
        let _ = manager.steps(self.pipeline.steps(), &mut module, &mut context, Some(at));
        let call = failure.call.unwrap_or_else(|| self.pipeline.to_string());
        let mut text = format!("// run: opt --passes={call}");
        if let Some(limit) = self.controls.limit {
            text.push_str(&format!(" --opt-bisect-limit={}", limit.saturating_sub(context.numbering.count)));
        }
        text.push_str(&format!("\n// {}: {}\n", failure.error.code(), first_line(failure.error.message())));
        text.push_str(&text::print(&module));
        let name: String = call.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
        let hash = &blake3::hash(text.as_bytes()).to_hex()[..8];
        let path = folder.join(format!("millrace-reproducer-{name}-{hash}.ir"));
        let next = match std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, text)) {
            Ok(()) => format!("`millrace opt --passes='{call}' {}` reproduces it", path.display()),
            Err(e) => format!("cannot write a reproducer to {}: {e}", path.display()),
        };
        let error = Error::new(failure.error.kind(), failure.error.code(), failure.error.message());
        match failure.error.place() {
            Some(place) => error.at(place).hint(next),
            None => error.hint(next),
        }
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or("")
}
