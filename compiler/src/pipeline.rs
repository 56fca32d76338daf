//! Pipelines: a string such as `canonicalize,fixpoint{cse,dce},schedule` that parses, prints back and runs.

use std::fmt;
use std::time::{Duration, Instant};

use millrace_ir::nearest::nearest;
use millrace_ir::verify::check;
use millrace_ir::{Error, Kind, Module, Result};

use crate::pass::{Context, Pass};
use crate::passes::registry;

/// Optimisation levels as pipelines.
pub const LEVELS: [&str; 3] = [
    "canonicalize,dce,begin-fusion,schedule,plan-memory,mark-streamable",
    "canonicalize,const-fold,cse,dce,recover,canonicalize,const-fold,cse,dce,fuse-linear,merge-matmuls,fuse-glu,fuse-add-norm,fuse-epilogue,fuse-pointwise,dce,pack-weights,schedule,plan-memory,mark-streamable",
    "fixpoint{canonicalize,const-fold,cse,dce},recover,fixpoint{canonicalize,const-fold,cse,dce},fuse-linear,merge-matmuls,fuse-glu,fuse-add-norm,fuse-epilogue,fuse-pointwise,fixpoint{cse,dce},pack-weights,schedule{search=true},plan-memory,mark-streamable",
];

/// Most rounds of a fixpoint.
const ROUNDS: usize = 8;

/// A parsed pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pipeline(Vec<Step>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Pass { name: String, options: Vec<(String, String)> },
    Fixpoint(Vec<Step>),
}

fn bad(message: String) -> Error {
    Error::new(Kind::Usage, "compile/bad-pipeline", message).hint("`millrace passes` lists all passes")
}

impl Pipeline {
    /// The pipeline of an optimisation level, the highest for numbers above.
    pub fn level(level: usize) -> Self {
        // The level strings are constants that a test parses.
        Self::parse(LEVELS[level.min(LEVELS.len() - 1)]).unwrap_or(Pipeline(Vec::new()))
    }

    /// Parses `name`, `name{option=value,..}` and `fixpoint{..}` separated by commas.
    ///
    /// # Errors
    /// `compile/bad-pipeline` for bad syntax or an unknown pass.
    pub fn parse(text: &str) -> Result<Self> {
        let mut rest = text;
        let steps = parse_steps(&mut rest, 0)?;
        if rest.is_empty() { Ok(Pipeline(steps)) } else { Err(bad(format!("unexpected `{rest}`"))) }
    }
}

fn parse_steps(rest: &mut &str, depth: usize) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    loop {
        *rest = rest.trim_start();
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-')).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        *rest = after.trim_start();
        if name == "fixpoint" {
            if depth > 3 {
                return Err(bad("fixpoints nest too deeply".to_string()));
            }
            *rest = rest.strip_prefix('{').ok_or_else(|| bad("`fixpoint` needs `{`".to_string()))?;
            let inner = parse_steps(rest, depth + 1)?;
            *rest = rest
                .strip_prefix('}')
                .ok_or_else(|| bad("`fixpoint{` is not closed".to_string()))?
                .trim_start();
            steps.push(Step::Fixpoint(inner));
        } else {
            let passes = registry();
            if !passes.iter().any(|p| p.name() == name) {
                let error = bad(format!("there is no pass `{name}`"));
                return Err(match nearest(name, passes.iter().map(|p| p.name())) {
                    Some(close) => bad(format!("there is no pass `{name}`; did you mean `{close}`?")),
                    None => error,
                });
            }
            let mut options = Vec::new();
            if let Some(inner) = rest.strip_prefix('{') {
                let close = inner.find('}').ok_or_else(|| bad(format!("`{name}{{` is not closed")))?;
                for option in inner[..close].split(',').filter(|o| !o.trim().is_empty()) {
                    let (key, value) = option
                        .split_once('=')
                        .ok_or_else(|| bad(format!("option `{option}` has no value")))?;
                    options.push((key.trim().to_string(), value.trim().to_string()));
                }
                *rest = inner[close + 1..].trim_start();
            }
            if !options.is_empty() && name != "schedule" {
                return Err(bad(format!("pass `{name}` takes no options")));
            }
            steps.push(Step::Pass { name: name.to_string(), options });
        }
        match rest.strip_prefix(',') {
            Some(more) => *rest = more,
            None => return Ok(steps),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Pass { name, options } => {
                write!(f, "{name}")?;
                if !options.is_empty() {
                    let options: Vec<String> = options.iter().map(|(k, v)| format!("{k}={v}")).collect();
                    write!(f, "{{{}}}", options.join(","))?;
                }
                Ok(())
            }
            Step::Fixpoint(steps) => {
                let steps: Vec<String> = steps.iter().map(ToString::to_string).collect();
                write!(f, "fixpoint{{{}}}", steps.join(","))
            }
        }
    }
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let steps: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&steps.join(","))
    }
}

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

/// How a pipeline runs.
#[derive(Default)]
pub struct Manager<'a> {
    /// Verify after every pass instead of at phase changes only.
    pub verify_each: bool,
    /// Called after every pass.
    pub observer: Option<&'a mut Observer<'a>>,
    /// Every run of a pass, in order.
    pub runs: Vec<PassRun>,
}

impl Manager<'_> {
    /// Runs `pipeline` on `module`; verifies before the first pass, at every phase change and at the end.
    ///
    /// # Errors
    /// `ir/invalid` for a module that breaks rules (after a pass: a defect, named), `compile/phase` for a pass
    /// that does not accept the module's phase, and the passes' own errors.
    pub fn run(&mut self, pipeline: &Pipeline, module: &mut Module, context: &mut Context) -> Result<()> {
        check(module)?;
        for step in &pipeline.0 {
            self.step(step, module, context)?;
        }
        check(module).map(|_| ()).map_err(|e| e.at("after the pipeline"))
    }

    fn step(&mut self, step: &Step, module: &mut Module, context: &mut Context) -> Result<bool> {
        match step {
            Step::Pass { name, options } => {
                let pass = crate::passes::create(name, options)?;
                self.pass(pass.as_ref(), module, context)
            }
            Step::Fixpoint(steps) => {
                let mut ever = false;
                for _ in 0..ROUNDS {
                    let mut changed = false;
                    for step in steps {
                        changed |= self.step(step, module, context)?;
                    }
                    ever |= changed;
                    if !changed {
                        break;
                    }
                }
                Ok(ever)
            }
        }
    }

    /// Runs one pass under the gates of the manager.
    ///
    /// # Errors
    /// As [`Manager::run`].
    pub fn pass(&mut self, pass: &dyn Pass, module: &mut Module, context: &mut Context) -> Result<bool> {
        let name = pass.name();
        let (first, last) = pass.phases();
        if module.phase < first || module.phase > last {
            return Err(Error::new(
                Kind::Usage,
                "compile/phase",
                format!("pass `{name}` accepts phases {first} to {last}, the module is {}", module.phase),
            )
            .hint("change the order of the pipeline"));
        }
        let start = Instant::now();
        let changed = pass.run(module, context).map_err(|e| e.at(format!("pass {name}")))?;
        let before = module.phase;
        if let Some(phase) = pass.leaves() {
            module.phase = module.phase.max(phase);
        }
        self.runs.push(PassRun { name, time: start.elapsed(), changed, nodes: module.graph.nodes.len() });
        if self.verify_each || module.phase != before {
            check(module).map_err(|e| e.at(format!("after pass {name}")))?;
        }
        if let Some(observer) = &mut self.observer {
            observer(name, module, changed);
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_print_back() {
        for level in LEVELS {
            assert_eq!(Pipeline::parse(level).unwrap().to_string(), level);
        }
    }

    #[test]
    fn slips_are_named() {
        let message = |text: &str| Pipeline::parse(text).unwrap_err().to_string();
        assert!(message("canonicalise").contains("did you mean `canonicalize`"));
        assert!(message("fixpoint{cse").contains("not closed"));
        assert!(message("cse,,dce").contains("no pass ``"));
        assert!(message("cse{x=1}").contains("takes no options"));
        assert!(message("cse dce").contains("unexpected"));
    }
}
