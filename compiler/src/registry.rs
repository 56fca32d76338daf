//! The passes and levels that pipelines are made of. [`Registry::standard`] holds Millrace's own; a crate outside adds
//! its passes with [`Registry::with`] and uses them in pipelines, levels and filetests:
//!
//! ```
//! use millrace_compiler::pass::{Context, Pass};
//! use millrace_compiler::registry::Registry;
//! use millrace_ir::{Module, Phase, Result};
//!
//! struct Nothing;
//! impl Pass for Nothing {
//!     fn name(&self) -> &'static str { "nothing" }
//!     fn help(&self) -> &'static str { "does nothing" }
//!     fn phases(&self) -> (Phase, Phase) { (Phase::Imported, Phase::Lowered) }
//!     fn run(&self, _: &mut Module, _: &mut Context) -> Result<bool> { Ok(false) }
//! }
//!
//! let registry = Registry::standard().with(Box::new(Nothing));
//! assert_eq!(registry.pipeline("nothing,fixpoint{cse,dce}")?.to_string(), "nothing,fixpoint{cse,dce}");
//! # Ok::<(), millrace_ir::Error>(())
//! ```

use std::sync::Arc;

use millrace_ir::nearest::nearest;
use millrace_ir::{Error, Kind, Phase, Result};

use crate::manager::Stop;
use crate::pass::Pass;
use crate::pipeline::{LEVELS, Pipeline};

/// Passes by name, in the order of the default pipeline, and levels by number.
#[derive(Clone)]
pub struct Registry {
    passes: Vec<Arc<dyn Pass>>,
    levels: Vec<String>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.passes().map(Pass::name).collect();
        f.debug_struct("Registry").field("passes", &names).field("levels", &self.levels).finish()
    }
}

impl Default for Registry {
    fn default() -> Self {
        Registry::standard()
    }
}

impl Registry {
    /// Millrace's passes and levels.
    pub fn standard() -> Self {
        let passes = crate::passes::all().into_iter().map(Arc::from).collect();
        Registry { passes, levels: LEVELS.iter().map(ToString::to_string).collect() }
    }

    /// Adds a pass; one of the same name is replaced.
    #[must_use]
    pub fn with(mut self, pass: Box<dyn Pass>) -> Self {
        match self.passes.iter_mut().find(|p| p.name() == pass.name()) {
            Some(slot) => *slot = Arc::from(pass),
            None => self.passes.push(Arc::from(pass)),
        }
        self
    }

    /// Replaces a level, or adds one above the highest.
    ///
    /// # Errors
    /// `compile/bad-pipeline` if `pipeline` does not parse.
    pub fn with_level(mut self, level: usize, pipeline: &str) -> Result<Self> {
        let text = self.pipeline(pipeline)?.to_string();
        match self.levels.get_mut(level) {
            Some(slot) => *slot = text,
            None => self.levels.push(text),
        }
        Ok(self)
    }

    /// All passes.
    pub fn passes(&self) -> impl Iterator<Item = &dyn Pass> {
        self.passes.iter().map(AsRef::as_ref)
    }

    /// The levels as pipeline strings.
    pub fn levels(&self) -> &[String] {
        &self.levels
    }

    /// The pass called `name`.
    ///
    /// # Errors
    /// `compile/bad-pipeline`, with the nearest name.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Pass>> {
        if let Some(pass) = self.passes.iter().find(|p| p.name() == name) {
            return Ok(pass.clone());
        }
        let close = nearest(name, self.passes.iter().map(|p| p.name()));
        let close = close.map_or_else(String::new, |c| format!("; did you mean `{c}`?"));
        Err(Error::new(Kind::Usage, "compile/bad-pipeline", format!("there is no pass `{name}`{close}"))
            .hint("`millrace passes` lists all passes"))
    }

    /// Parses a pipeline; see [`Pipeline`] for the grammar.
    ///
    /// # Errors
    /// `compile/bad-pipeline` for bad syntax, an unknown pass or option.
    pub fn pipeline(&self, text: &str) -> Result<Pipeline> {
        Pipeline::parse_with(text, self)
    }

    /// The pipeline of a level, the highest for numbers above.
    ///
    /// # Errors
    /// `compile/bad-pipeline` for a registry without levels.
    pub fn level(&self, level: usize) -> Result<Pipeline> {
        self.pipeline(self.levels.get(level).or(self.levels.last()).map_or("", String::as_str))
    }

    /// Where to stop, from the name of a phase or a pass.
    ///
    /// # Errors
    /// As [`Registry::get`].
    pub fn stop(&self, name: &str) -> Result<Stop> {
        match Phase::parse(name) {
            Some(phase) => Ok(Stop::Phase(phase)),
            None => self.get(name).map(|pass| Stop::Pass(pass.name().to_string())),
        }
    }
}
