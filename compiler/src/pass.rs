//! What a pass is, and what it may say while it runs.
//!
//! A pass is small: a name, a line of help, the phases it accepts, the phase it leaves, and a function. Everything
//! else (phase gate, verification, timing, dumps, remarks) is the pass manager's.

use millrace_ir::{Module, NodeId, Phase, Result};

/// A transformation of modules.
pub trait Pass: Send + Sync {
    /// Kebab-case verb, as the pipeline string spells it.
    fn name(&self) -> &'static str;

    /// What it does, one line; `millrace passes` shows it.
    fn help(&self) -> &'static str;

    /// The first and last phase it accepts.
    fn phases(&self) -> (Phase, Phase);

    /// The phase it moves the module to, if any; the manager sets it.
    fn leaves(&self) -> Option<Phase> {
        None
    }

    /// Does the work; returns whether the module changed.
    ///
    /// # Errors
    /// Only if the module cannot be compiled; a rewrite that does not apply is a remark.
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool>;
}

/// A message to the user about a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// Pass that speaks.
    pub pass: &'static str,
    /// The node, as it was called at that moment.
    pub node: NodeId,
    /// Source layer of the node.
    pub loc: String,
    /// What happened or did not.
    pub message: String,
}

impl std::fmt::Display for Remark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "remark[{}] {} ({}): {}", self.pass, self.node, self.loc, self.message)
    }
}

/// What passes share: remarks, counters and the target's facts.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// Remarks in order.
    pub remarks: Vec<Remark>,
    /// Named counters, in order of first use.
    pub stats: Vec<(String, u64)>,
    /// Rows of a packed weight panel.
    pub panel: usize,
    /// Alignment of arenas and offsets.
    pub align: u64,
}

impl Context {
    /// The facts of a target.
    pub fn of(target: &crate::target::Target) -> Self {
        Context { panel: target.panel, align: target.align, ..Context::default() }
    }

    /// The facts of the CPU target.
    pub fn cpu() -> Self {
        // The file is part of the program, and a test reads it.
        crate::target::Target::named("cpu").map(|t| Self::of(&t)).unwrap_or_default()
    }

    /// Adds to a counter.
    pub fn count(&mut self, name: &str, by: u64) {
        match self.stats.iter_mut().find(|(n, _)| n == name) {
            Some((_, value)) => *value += by,
            None => self.stats.push((name.to_string(), by)),
        }
    }
}
