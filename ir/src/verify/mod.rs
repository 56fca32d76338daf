//! The verifier: what makes a module legal in its phase. Errors are collected, never thrown at the first.
//!
//! | rule | invariant |
//! | --- | --- |
//! | V1 | names of weights, states, arenas, symbols, inputs and outputs are unique, non-empty and free of control characters |
//! | V2 | at most 64 symbols, with `1 <= min <= max <= MAX_EXTENT`, `multiple >= 1`, none named like the bounds of tiles in launch tables; every symbol used is declared |
//! | V3 | extents are non-negative at the minima; extents and byte sizes reach at most `MAX_EXTENT` at the maxima; dims stay within `dim::MAX_SIZE` and `dim::MAX_NESTING` |
//! | V4 | weight types are constant and weight expressions well typed, acyclic and at most `weights::MAX_DEPTH` deep |
//! | V5 | the order is a permutation of the nodes; every node has a result; nodes and values agree on who defines what |
//! | V6 | operands exist |
//! | V7 | values are defined before they are used (hence no cycles) |
//! | V8 | declared result types are the inferred ones |
//! | V9 | buffer sizes, arena sizes and offsets are monotone in every symbol |
//! | V10 | each version of a state has at most one writer, and no reader after it |
//! | V11 | fused ops, places and kernels occur exactly in the phases that allow or demand them |
//! | V12 | places exist, are aligned and lie inside their arena; states and outputs hold their own values |
//! | V13 | there is an output, and every output exists |
//! | V14 | source names are not empty |
//!
//! Whether two buffers that live at the same time overlap is the plan checker's question, not the verifier's.

mod graph_rules;
mod module_rules;
mod place_rules;
mod scope;

use std::fmt;
use std::ops::Deref;

use crate::error::{Error, Kind};
use crate::graph::{Module, NodeId};
use crate::text::print_node;

use scope::Scope;

/// Number of a rule, spelled `V7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule(pub u8);

impl Rule {
    /// Number of rules; they are called V1 up to it.
    pub const COUNT: u8 = 14;
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "V{}", self.0)
    }
}

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// The guilty node, if there is one.
    pub node: Option<NodeId>,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}] ", self.rule)?;
        if let Some(node) = self.node {
            write!(f, "{node}: ")?;
        }
        f.write_str(&self.message)
    }
}

/// Proof that a module passed [`verify`]; code generation accepts nothing else.
#[derive(Clone, Copy, Debug)]
pub struct Verified<'a>(&'a Module);

impl<'a> Verified<'a> {
    /// The module.
    pub fn module(self) -> &'a Module {
        self.0
    }
}

impl Deref for Verified<'_> {
    type Target = Module;
    fn deref(&self) -> &Module {
        self.0
    }
}

/// Most violations that are collected.
const LIMIT: usize = 100;

/// Collects violations.
#[derive(Default)]
struct Report {
    found: Vec<Violation>,
}

impl Report {
    fn add(&mut self, rule: u8, node: Option<NodeId>, message: impl Into<String>) {
        if self.found.len() < LIMIT {
            self.found.push(Violation { rule: Rule(rule), node, message: message.into() });
        }
    }

    fn append(&mut self, other: Report) {
        self.found.extend(other.found);
        self.found.truncate(LIMIT);
    }

    /// Whether one of `rules` is broken.
    fn breaks(&self, rules: &[u8]) -> bool {
        self.found.iter().any(|v| rules.contains(&v.rule.0))
    }
}

/// Checks every rule, in time linear in the module. Rules that build on broken ones are not checked.
///
/// # Errors
/// All violations found, at most 100, in the order of the rules' functions.
pub fn verify(module: &Module) -> Result<Verified<'_>, Vec<Violation>> {
    let scope = Scope::without_copies(module);
    match verify_in(module, &scope) {
        Ok(()) => Ok(Verified(module)),
        // What is broken in a layer is reported for its copies too.
        Err(_) if scope.leaves_out() => verify_whole(module).map(|()| Verified(module)),
        Err(found) => Err(found),
    }
}

/// [`verify`] that looks at every node for every rule.
fn verify_whole(module: &Module) -> Result<(), Vec<Violation>> {
    verify_in(module, &Scope::whole(module))
}

fn verify_in(module: &Module, scope: &Scope<'_>) -> Result<(), Vec<Violation>> {
    let mut report = Report::default();
    let mut of_weights = Report::default();
    let names = module_rules::weights(module, &scope.types, &mut of_weights);
    module_rules::names(module, names, &mut report);
    module_rules::symbols(module, scope, &mut report);
    report.append(of_weights);
    graph_rules::structure(module, scope, &mut report);
    // The rules below follow ids and evaluate dims without asking again whether they may.
    if !report.breaks(&[2, 5, 6, 7]) {
        module_rules::sizes(module, &scope.types, &mut report);
        place_rules::phases(module, scope, &mut report);
        if !report.breaks(&[3]) {
            graph_rules::types(module, scope, &mut report);
            let versions = graph_rules::states(module, scope, &mut report);
            place_rules::places(module, scope, &versions, &mut report);
        }
    }
    if report.found.is_empty() { Ok(()) } else { Err(report.found) }
}

/// The violations as text, the guilty line below each.
pub fn report(module: &Module, violations: &[Violation]) -> String {
    let mut text = String::new();
    for violation in violations {
        text.push_str(&format!("{violation}\n"));
        if let Some(node) = violation.node {
            text.push_str(&format!("    {}\n", print_node(module, node)));
        }
    }
    text
}

/// The violations as one error, at most twenty of them shown.
pub fn into_error(module: &Module, violations: &[Violation]) -> Error {
    let shown = &violations[..violations.len().min(20)];
    let mut message = format!("the module breaks {} rule(s)\n{}", violations.len(), report(module, shown));
    message.truncate(message.trim_end().len());
    Error::new(Kind::BadInput, "ir/invalid", message)
        .at(format!("module @{}", module.name))
        .hint("docs/ir.md explains each rule")
}

/// [`verify`] with the violations as one error.
///
/// # Errors
/// `ir/invalid`.
pub fn check(module: &Module) -> crate::error::Result<Verified<'_>> {
    verify(module).map_err(|violations| into_error(module, &violations))
}
