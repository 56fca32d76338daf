//! Pipelines: a string such as `canonicalize,fixpoint<max=4>{cse,dce},schedule{search=true}` that parses, prints back
//! and runs.
//!
//! ```text
//! pipeline  = [ step { "," step } ]
//! step      = pass [ "{" option "=" value { "," .. } "}" ]
//!           | "(" pipeline ")"                                  a group, so that parts can be put together
//!           | "fixpoint" [ "<max=" number ">" ] "{" pipeline "}"  repeated until nothing changes
//!           | "rolled" [ "<min=" number ">" ] "{" pipeline "}"    repeated layers are rewritten once, see `rolled`
//!           | "O0" | "O1" | "O2"                                a level, spelled out when printed
//! place     = ( "before" | "after" ) ":" pass "=" pipeline        for [`Pipeline::insert`]
//! ```

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use millrace_ir::nearest::nearest;
use millrace_ir::{Error, Kind, Result};

pub use crate::manager::{Controls, Manager, Observer, PassRun, Stop};
use crate::options::PassOptions;
use crate::pass::Pass;
use crate::registry::Registry;
use crate::rolled::FEWEST;
pub use crate::rolled::LAYERS;

/// Optimisation levels as pipelines.
pub const LEVELS: [&str; 3] = [
    "canonicalize,dce,begin-fusion,schedule,group-launches,plan-memory,mark-streamable",
    "rolled{canonicalize,const-fold,cse,dce,recover,canonicalize,const-fold,cse,dce,fuse-linear,merge-matmuls,fuse-glu,fuse-add-norm,fuse-epilogue,fuse-pointwise,dce,pack-weights,schedule},group-launches,plan-memory,mark-streamable",
    "rolled{fixpoint{canonicalize,const-fold,cse,dce},recover,fixpoint{canonicalize,const-fold,cse,dce},fuse-linear,merge-matmuls,fuse-glu,fuse-add-norm,fuse-epilogue,fuse-pointwise,fixpoint{cse,dce},pack-weights,schedule{search=true}},group-launches,plan-memory,mark-streamable",
];

/// Most rounds of a fixpoint that says nothing.
pub const ROUNDS: usize = 8;

/// Deepest nesting of groups and fixpoints.
const DEPTH: usize = 8;

/// A parsed pipeline. It holds its passes, so that it runs without a registry.
#[derive(Clone, Default)]
pub struct Pipeline(Vec<Step>);

/// A part of a pipeline.
#[derive(Clone)]
pub enum Step {
    /// A pass with its options.
    Pass(Call),
    /// Several steps, once.
    Group(Vec<Step>),
    /// Several steps, until a round changes nothing.
    Fixpoint {
        /// Most rounds; [`ROUNDS`] where the text says nothing.
        max: Option<usize>,
        /// The steps of a round.
        steps: Vec<Step>,
    },
    /// Several steps, once, on one of many repeated layers and for all of them.
    Rolled {
        /// Fewest layers; [`LAYERS`] where the text says nothing.
        min: Option<usize>,
        /// The steps.
        steps: Vec<Step>,
    },
}

/// A pass as a pipeline calls it.
#[derive(Clone)]
pub struct Call {
    /// The pass with its options.
    pub pass: Arc<dyn Pass>,
    /// The options, as written.
    pub options: PassOptions,
}

fn bad(message: String) -> Error {
    Error::new(Kind::Usage, "compile/bad-pipeline", message).hint("`millrace passes` lists all passes")
}

impl Pipeline {
    /// The pipeline of an optimisation level, the highest for numbers above.
    pub fn level(level: usize) -> Self {
        // The level strings are constants that a test parses.
        Registry::standard().level(level).unwrap_or_default()
    }

    /// Parses a pipeline of Millrace's passes.
    ///
    /// # Errors
    /// `compile/bad-pipeline` for bad syntax, an unknown pass or option.
    pub fn parse(text: &str) -> Result<Self> {
        Self::parse_with(text, &Registry::standard())
    }

    /// Parses a pipeline of the passes of a registry.
    ///
    /// # Errors
    /// As [`Pipeline::parse`].
    pub fn parse_with(text: &str, registry: &Registry) -> Result<Self> {
        if text.trim().is_empty() {
            return Ok(Pipeline::default());
        }
        let mut parser = Parser { rest: text, registry };
        let steps = parser.steps(0)?;
        match parser.rest {
            "" => Ok(Pipeline(steps)),
            rest => Err(bad(format!("unexpected `{rest}`"))),
        }
    }

    /// A pipeline of these steps.
    pub fn new(steps: Vec<Step>) -> Self {
        Pipeline(steps)
    }

    /// Its steps.
    pub fn steps(&self) -> &[Step] {
        &self.0
    }

    /// The pipeline without the passes of these names.
    #[must_use]
    pub fn without(mut self, names: &[String]) -> Pipeline {
        without(&mut self.0, names);
        self
    }

    /// Puts passes in at a place: `before:pack-weights=chunk-mlp,cse` before the first call of `pack-weights`,
    /// `after:` behind the last one, in whichever group or fixpoint that call stands. The pipeline prints with them.
    ///
    /// # Errors
    /// `compile/bad-pipeline` for bad syntax, an unknown pass, or one that this pipeline does not call.
    pub fn insert(&mut self, place: &str, registry: &Registry) -> Result<()> {
        let parts = place.split_once(':').and_then(|(at, rest)| Some((at.trim(), rest.split_once('=')?)));
        let Some((at @ ("before" | "after"), (anchor, passes))) = parts else {
            let message = format!("`{place}` is no place for passes");
            return Err(Error::new(Kind::Usage, "compile/bad-pipeline", message)
                .hint("write before:PASS=PASSES or after:PASS=PASSES"));
        };
        let anchor = anchor.trim();
        let inserted = Self::parse_with(passes, registry)?.0;
        if inserted.is_empty() {
            return Err(bad(format!("`{place}` puts no pass in")));
        }
        let (first, steps) = (at == "before", &mut self.0);
        if put(steps, first, anchor, inserted).is_some() {
            registry.get(anchor)?;
            let mut names = Vec::new();
            calls(steps, &mut names);
            let close = nearest(anchor, names.iter().copied());
            let close = close.map_or_else(String::new, |c| format!("; did you mean `{c}`?"));
            let message = format!("the pipeline does not call `{anchor}`{close}");
            return Err(Error::new(Kind::Usage, "compile/bad-pipeline", message)
                .hint(format!("it calls {}", names.join(", "))));
        }
        Ok(())
    }
}

impl Step {
    /// The steps inside this one.
    fn inner(&self) -> &[Step] {
        match self {
            Step::Pass(_) => &[],
            Step::Group(steps) | Step::Fixpoint { steps, .. } | Step::Rolled { steps, .. } => steps,
        }
    }

    fn inner_mut(&mut self) -> Option<&mut Vec<Step>> {
        match self {
            Step::Pass(_) => None,
            Step::Group(steps) | Step::Fixpoint { steps, .. } | Step::Rolled { steps, .. } => Some(steps),
        }
    }
}

/// The names of all passes that are called, each once.
fn calls<'a>(steps: &'a [Step], names: &mut Vec<&'a str>) {
    for step in steps {
        match step {
            Step::Pass(call) if !names.contains(&call.pass.name()) => names.push(call.pass.name()),
            other => calls(other.inner(), names),
        }
    }
}

/// Puts steps before the first call of a pass or behind the last one; gives them back if there is none.
fn put(steps: &mut Vec<Step>, first: bool, anchor: &str, mut inserted: Vec<Step>) -> Option<Vec<Step>> {
    let count = steps.len();
    for n in 0..count {
        let at = if first { n } else { count - 1 - n };
        if matches!(&steps[at], Step::Pass(call) if call.pass.name() == anchor) {
            let at = at + usize::from(!first);
            steps.splice(at..at, inserted);
            return None;
        }
        if let Some(inner) = steps[at].inner_mut() {
            inserted = put(inner, first, anchor, inserted)?;
        }
    }
    Some(inserted)
}

/// Leaves out passes by name, also inside of groups, and what is empty then.
fn without(steps: &mut Vec<Step>, names: &[String]) {
    steps.retain_mut(|step| match step {
        Step::Pass(call) => !names.iter().any(|n| n == call.pass.name()),
        Step::Group(inner) | Step::Fixpoint { steps: inner, .. } | Step::Rolled { steps: inner, .. } => {
            without(inner, names);
            !inner.is_empty()
        }
    });
}

struct Parser<'a> {
    rest: &'a str,
    registry: &'a Registry,
}

impl<'a> Parser<'a> {
    /// Skips blanks and then `token`, if it is there.
    fn take(&mut self, token: &str) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn word(&mut self) -> &'a str {
        self.rest = self.rest.trim_start();
        let letter = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let end = self.rest.find(|c| !letter(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest.trim_start();
        word
    }

    fn steps(&mut self, depth: usize) -> Result<Vec<Step>> {
        if depth > DEPTH {
            return Err(bad("the pipeline nests too deeply".to_string()));
        }
        let mut steps = Vec::new();
        loop {
            self.step(depth, &mut steps)?;
            if !self.take(",") {
                return Ok(steps);
            }
        }
    }

    fn step(&mut self, depth: usize, steps: &mut Vec<Step>) -> Result<()> {
        if self.take("(") {
            let inner = self.steps(depth + 1)?;
            if !self.take(")") {
                return Err(bad("`(` is not closed".to_string()));
            }
            steps.push(Step::Group(inner));
            return Ok(());
        }
        let name = self.word();
        let level = name.strip_prefix('O').and_then(|n| n.parse::<usize>().ok());
        if name == "fixpoint" {
            let (max, inner) = self.block(depth, name, "max", 1..=1000)?;
            steps.push(Step::Fixpoint { max, steps: inner });
        } else if name == "rolled" {
            let (min, inner) = self.block(depth, name, "min", FEWEST..=1000)?;
            steps.push(Step::Rolled { min, steps: inner });
        } else if let Some(text) = level.and_then(|n| self.registry.levels().get(n)) {
            let mut inner = Parser { rest: text, registry: self.registry };
            steps.extend(inner.steps(depth + 1)?);
        } else {
            steps.push(Step::Pass(self.call(name)?));
        }
        Ok(())
    }

    /// `<key=N>`, if it is there, and the steps in braces.
    fn block(
        &mut self,
        depth: usize,
        name: &str,
        key: &str,
        range: RangeInclusive<usize>,
    ) -> Result<(Option<usize>, Vec<Step>)> {
        let mut number = None;
        if self.take("<") {
            let known = self.word() == key && self.take("=");
            number = self.word().parse::<usize>().ok().filter(|n| known && range.contains(n));
            if number.is_none() || !self.take(">") {
                let (low, high) = range.into_inner();
                return Err(bad(format!("`{name}<..>` takes {key}=N with N from {low} to {high}")));
            }
        }
        if !self.take("{") {
            return Err(bad(format!("`{name}` needs `{{`")));
        }
        let steps = self.steps(depth + 1)?;
        if !self.take("}") {
            return Err(bad(format!("`{name}{{` is not closed")));
        }
        Ok((number, steps))
    }

    fn call(&mut self, name: &str) -> Result<Call> {
        let pass = self.registry.get(name)?;
        let mut pairs = Vec::new();
        if self.take("{") {
            let close = self.rest.find('}').ok_or_else(|| bad(format!("`{name}{{` is not closed")))?;
            for option in self.rest[..close].split(',').filter(|o| !o.trim().is_empty()) {
                let pair =
                    option.split_once('=').ok_or_else(|| bad(format!("option `{option}` has no value")))?;
                pairs.push((pair.0.trim(), pair.1.trim()));
            }
            self.rest = self.rest[close + 1..].trim_start();
        }
        let options = PassOptions::read(name, pass.options(), &pairs)
            .map_err(|message| bad(message).hint(format!("`millrace explain {name}`")))?;
        if options.is_empty() {
            return Ok(Call { pass, options });
        }
        match pass.with_options(&options) {
            Some(pass) => Ok(Call { pass: Arc::from(pass), options }),
            None => Err(bad(format!("pass `{name}` declares options and does not take them"))),
        }
    }
}

fn join(steps: &[Step]) -> String {
    steps.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.pass.name(), self.options)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Pass(call) => write!(f, "{call}"),
            Step::Group(steps) => write!(f, "({})", join(steps)),
            Step::Fixpoint { max: None, steps } => write!(f, "fixpoint{{{}}}", join(steps)),
            Step::Fixpoint { max: Some(max), steps } => write!(f, "fixpoint<max={max}>{{{}}}", join(steps)),
            Step::Rolled { min: None, steps } => write!(f, "rolled{{{}}}", join(steps)),
            Step::Rolled { min: Some(min), steps } => write!(f, "rolled<min={min}>{{{}}}", join(steps)),
        }
    }
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&join(&self.0))
    }
}

impl fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pipeline({self})")
    }
}

impl PartialEq for Pipeline {
    /// Pipelines are equal that print alike.
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

impl Eq for Pipeline {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_print_back() {
        for level in LEVELS {
            assert_eq!(Pipeline::parse(level).unwrap().to_string(), level);
        }
        assert_eq!(Pipeline::parse("O2").unwrap(), Pipeline::level(2));
        assert_eq!(Pipeline::parse("").unwrap().to_string(), "");
    }

    #[test]
    fn groups_fixpoints_and_options_print_back() {
        let text = "(cse,(dce)),fixpoint<max=4>{cse,fixpoint{dce}},rolled{rolled<min=6>{dce}},schedule{search=false}";
        assert_eq!(Pipeline::parse(text).unwrap().to_string(), text);
        let spaced = " ( cse , (dce) ) , fixpoint < max = 4 > { cse, fixpoint { dce } } , rolled { rolled < min = 6 > { dce } } , schedule { search = false } ";
        assert_eq!(Pipeline::parse(spaced).unwrap().to_string(), text);
    }

    #[test]
    fn passes_are_put_in() {
        let registry = Registry::standard();
        let with = |text: &str, place: &str| {
            let mut pipeline = Pipeline::parse(text)?;
            pipeline.insert(place, &registry).map(|()| pipeline.to_string())
        };
        let text = "cse,fixpoint{cse,(dce,cse)},schedule";
        let before = |place| with(text, place).unwrap();
        assert_eq!(before("before:cse=dce"), "dce,cse,fixpoint{cse,(dce,cse)},schedule");
        assert_eq!(before("after:cse=dce"), "cse,fixpoint{cse,(dce,cse,dce)},schedule");
        assert_eq!(
            before(" before : dce = cse,fixpoint{dce} "),
            "cse,fixpoint{cse,(cse,fixpoint{dce},dce,cse)},schedule"
        );
        assert_eq!(before("after:schedule=chunk-mlp{parts=2}"), format!("{text},chunk-mlp{{parts=2}}"));
        let level = with("O2", "before:pack-weights=chunk-mlp").unwrap();
        assert_eq!(level, LEVELS[2].replace("pack-weights", "chunk-mlp,pack-weights"));
        assert_eq!(Pipeline::parse(&level).unwrap().to_string(), level);
        let message = |place| {
            let error = with(text, place).unwrap_err();
            assert_eq!(error.code(), "compile/bad-pipeline", "{place}");
            error.to_string()
        };
        assert!(
            message("before:schedul=dce").contains("there is no pass `schedul`; did you mean `schedule`?")
        );
        assert!(message("before:recover=dce").contains("does not call `recover`"));
        assert!(message("before:recover=dce").contains("it calls cse, dce, schedule"));
        assert!(message("before:cse=").contains("puts no pass in"));
        assert!(message("before:cse=dcee").contains("did you mean `dce`"));
        for place in ["cse=dce", "before:cse", "behind:cse=dce", "", ":", "before"] {
            assert!(message(place).contains("before:PASS=PASSES"), "{place}");
        }
    }

    #[test]
    fn slips_are_named() {
        let message = |text: &str| Pipeline::parse(text).unwrap_err().to_string();
        assert!(message("canonicalise").contains("did you mean `canonicalize`"));
        assert!(message("fixpoint{cse").contains("not closed"));
        assert!(message("fixpoint<max=0>{cse}").contains("takes max=N"));
        assert!(message("fixpoint<min=3>{cse}").contains("takes max=N"));
        assert!(message("rolled<min=5>{cse}").contains("takes min=N with N from 6"));
        assert!(message("rolled{cse").contains("`rolled{` is not closed"));
        assert!(message("(cse").contains("not closed"));
        assert!(message("()").contains("no pass ``"));
        assert!(message("cse,,dce").contains("no pass ``"));
        assert!(message("cse{x=1}").contains("takes no options"));
        assert!(message("schedule{serach=true}").contains("did you mean `search`?"));
        assert!(message("schedule{search=1}").contains("search=true|false (default false)"));
        assert!(message("cse dce").contains("unexpected"));
        assert!(message("O9").contains("no pass `O9`"));
        assert!(message(&"(".repeat(100_000)).contains("too deeply"));
    }
}
