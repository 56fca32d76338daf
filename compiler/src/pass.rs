//! What a pass is, and what it may say while it runs.
//!
//! A pass is small: a name, a line of help, the phases it accepts, the phase it leaves, and a function. Everything
//! else (phase gate, verification, timing, dumps, bisection, reproducers) is the pass manager's.

use millrace_ir::tensor::Tensor;
use millrace_ir::{Graph, Module, NodeId, Phase, Result, WeightId};

use crate::numbers::Seeded;
use crate::options::{PassOption, PassOptions};

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

    /// Whether a module cannot reach phase [`Pass::leaves`] without it, so that bisection never leaves it out.
    fn required(&self) -> bool {
        false
    }

    /// The options it takes.
    fn options(&self) -> &'static [PassOption] {
        &[]
    }

    /// The pass with other options than the defaults; a pass that declares options gives it.
    fn with_options(&self, _options: &PassOptions) -> Option<Box<dyn Pass>> {
        None
    }

    /// Longer documentation for `millrace explain`: text, or the source file, whose header it shows.
    fn doc(&self) -> &'static str {
        crate::passes::pages::doc(self.name())
    }

    /// A small filetest that the pass changes, for `millrace explain`.
    fn example(&self) -> &'static str {
        crate::passes::pages::example(self.name())
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

/// One numbered event of a pipeline: the run of a pass (without a node), or a rewrite in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Its number, from 1.
    pub number: u64,
    /// The pass.
    pub pass: &'static str,
    /// The node, as it was called at that moment; none for the run of a pass.
    pub node: Option<NodeId>,
    /// Source layer of the node, empty if it has none.
    pub loc: String,
}

impl std::fmt::Display for Rewrite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rewrite {} of pass {}", self.number, self.pass)?;
        match self.node {
            Some(node) if self.loc.is_empty() => write!(f, " at {node}"),
            Some(node) => write!(f, " at {node} ({})", self.loc),
            None => f.write_str(", its run as a whole"),
        }
    }
}

/// Numbers what passes do, and stops them from doing more than a limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbering {
    /// What is beyond this number does not happen.
    pub limit: Option<u64>,
    /// Whether [`Numbering::events`] is filled.
    pub trace: bool,
    /// How many numbers were given.
    pub count: u64,
    /// What each number stands for.
    pub events: Vec<Rewrite>,
}

/// What passes share: remarks, counters, numbering and the target's facts.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// Remarks in order, at most [`Context::REMARKS`].
    pub remarks: Vec<Remark>,
    /// Remarks that found no room.
    pub remarks_left_out: u64,
    /// Named counters, in order of first use.
    pub stats: Vec<(String, u64)>,
    /// Numbers of rewrites.
    pub numbering: Numbering,
    /// Rows of a packed weight panel.
    pub panel: usize,
    /// Whether matmul weights of 16-bit elements are stored in cores.
    pub cores: bool,
    /// Whether nodes that one launch runs are joined.
    pub launch_groups: bool,
    /// Alignment of arenas and offsets.
    pub align: u64,
    /// Seeded weights whose numbers were read.
    pub(crate) seeded: Seeded,
}

impl Context {
    /// Most remarks that are kept.
    pub const REMARKS: usize = 10_000;

    /// The facts of a target.
    pub fn of(target: &crate::target::Target) -> Self {
        let crate::target::Target { name: _, panel, cores, launch_groups, align, without: _ } = target;
        Context {
            panel: *panel,
            cores: *cores,
            launch_groups: *launch_groups,
            align: *align,
            ..Context::default()
        }
    }

    /// A context of the same target that has seen nothing.
    pub fn target_facts(&self) -> Self {
        let Context { panel, cores, launch_groups, align, .. } = *self;
        Context { panel, cores, launch_groups, align, ..Context::default() }
    }

    /// The facts of the CPU target.
    pub fn cpu() -> Self {
        // The file is part of the program, and a test reads it.
        crate::target::Target::named("cpu").map(|t| Self::of(&t)).unwrap_or_default()
    }

    /// The numbers of a weight that is in no file, for passes that decide by them.
    ///
    /// # Errors
    /// If they are in a file, or the weight's expression is broken.
    pub fn numbers(&mut self, module: &Module, weight: WeightId) -> Result<Tensor> {
        self.seeded.numbers(module, weight)
    }

    /// Adds to a counter. The cost grows with the number of counters, so passes count once, not for each node.
    pub fn count(&mut self, name: &str, by: u64) {
        match self.stats.iter_mut().find(|(n, _)| n == name) {
            Some((_, value)) => *value += by,
            None => self.stats.push((name.to_string(), by)),
        }
    }

    /// Says something about a node.
    pub fn remark(&mut self, pass: &'static str, graph: &Graph, node: NodeId, message: impl Into<String>) {
        if self.remarks.len() >= Self::REMARKS {
            self.remarks_left_out += 1;
            return;
        }
        self.remarks.push(Remark { pass, node, loc: layer(graph, node), message: message.into() });
    }

    /// Takes over the remarks of passes that ran on a part of the module.
    pub(crate) fn take_remarks(&mut self, other: Context) {
        let room = Self::REMARKS.saturating_sub(self.remarks.len());
        self.remarks_left_out += other.remarks_left_out + other.remarks.len().saturating_sub(room) as u64;
        self.remarks.extend(other.remarks.into_iter().take(room));
    }

    /// Says why a rewrite does not happen.
    pub fn blocked(&mut self, pass: &'static str, graph: &Graph, node: NodeId, reason: &str) {
        self.remark(pass, graph, node, format!("blocked: {reason}"));
    }

    /// [`Context::blocked`], unless it was said already: for passes that run several times in a pipeline and decline
    /// few nodes.
    pub(crate) fn blocked_once(&mut self, pass: &'static str, graph: &Graph, node: NodeId, reason: &str) {
        let said = |r: &Remark| {
            (r.pass, r.node) == (pass, node) && r.message.strip_prefix("blocked: ") == Some(reason)
        };
        if !self.remarks.iter().any(said) {
            self.blocked(pass, graph, node, reason);
        }
    }

    /// Gives the rewrite of `node` that is about to happen a number; false if it is beyond the limit and must not
    /// happen. [`crate::rewrite::rewrite`] asks for every patch; other passes ask before each change that stands on
    /// its own, which makes a wrong one findable.
    pub fn allow(&mut self, pass: &'static str, graph: &Graph, node: NodeId) -> bool {
        self.number(pass, Some((graph, node)))
    }

    /// [`Context::allow`] for the run of a pass as a whole.
    pub(crate) fn allow_run(&mut self, pass: &'static str) -> bool {
        self.number(pass, None)
    }

    fn number(&mut self, pass: &'static str, node: Option<(&Graph, NodeId)>) -> bool {
        self.numbering.count += 1;
        let number = self.numbering.count;
        if self.numbering.trace {
            let loc = node.map_or_else(String::new, |(graph, node)| layer(graph, node));
            self.numbering.events.push(Rewrite { number, pass, node: node.map(|(_, n)| n), loc });
        }
        self.numbering.limit.is_none_or(|limit| number <= limit)
    }
}

/// The first source layer of a node, empty if it has none.
fn layer(graph: &Graph, node: NodeId) -> String {
    let loc = graph.nodes.get(node).and_then(|n| n.loc.first());
    loc.map_or_else(String::new, ToString::to_string)
}
