//! What the passes did: recorded while they run, with repeated layers folded so that a change of every layer is shown
//! once.

use std::collections::BTreeSet;

use millrace_compiler::pass::{Context, Remark};
use millrace_ir::{Module, WeightExpr, fold, text};
use similar::TextDiff;

/// Most lines of one pass's diff.
const DIFF_LINES: usize = 400;
/// Longest text that is compared, in lines.
const TEXT_LINES: usize = 20_000;

/// One run of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassStep {
    /// The pass; `import` for the module as it came.
    pub name: &'static str,
    /// Whether the module changed.
    pub changed: bool,
    /// Live nodes before.
    pub nodes_before: usize,
    /// Live nodes after.
    pub nodes_after: usize,
    /// Unified diff of the folded texts, if the module changed.
    pub diff: Option<String>,
}

/// Passes and remarks of one compilation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Every run of a pass, in order.
    pub passes: Vec<PassStep>,
    /// Remarks, in order.
    pub remarks: Vec<Remark>,
    /// Counters of the passes.
    pub stats: Vec<(String, u64)>,
}

/// Collects a history; [`Recorder::observe`] fits the compiler's observer.
#[derive(Default)]
pub struct Recorder {
    passes: Vec<PassStep>,
    before: Option<(usize, String)>,
}

impl Recorder {
    /// Takes note of the module after a pass.
    pub fn observe(&mut self, pass: &'static str, module: &Module, changed: bool) {
        let nodes_after = module.graph.nodes.len();
        let nodes_before = self.before.as_ref().map_or(nodes_after, |(nodes, _)| *nodes);
        // The phase may move without a change; its line belongs to no later diff.
        let after = folded_text(module);
        let diff = match &self.before {
            Some((_, before)) if changed => Some(diff(before, &after)),
            _ => None,
        };
        self.passes.push(PassStep { name: pass, changed, nodes_before, nodes_after, diff });
        self.before = Some((nodes_after, after));
    }

    /// The history, with the remarks and counters of the passes.
    pub fn finish(self, context: &Context) -> History {
        History { passes: self.passes, remarks: context.remarks.clone(), stats: context.stats.clone() }
    }
}

/// The module as text with one block of each variant of a repeated layer, and one weight and state of each kind.
pub(super) fn folded_text(module: &Module) -> String {
    let whole = text::print(module);
    let groups = fold::groups(module);
    let first_weight = 1 + module.dims.len();
    let first_state = first_weight + module.weights.len();
    let first_arena = first_state + module.states.len();
    let first_node = first_arena + module.arenas.len() + module.kernels.len() + 1;
    let mut hidden = vec![false; whole.lines().count()];
    let mut hide = |line: usize| {
        if let Some(slot) = hidden.get_mut(line) {
            *slot = true;
        }
    };
    let mut seen = BTreeSet::new();
    for (at, (_, weight)) in module.weights.iter().enumerate() {
        let kind = match &weight.expr {
            WeightExpr::File { .. } => "file",
            WeightExpr::Splat(_) => "splat",
            WeightExpr::Random { .. } => "random",
            WeightExpr::Dense(_) => "dense",
            WeightExpr::Concat { .. } => "concat",
            WeightExpr::Transpose { .. } => "transpose",
            WeightExpr::Reshape { .. } => "reshape",
            WeightExpr::Cast { .. } => "cast",
            WeightExpr::Pack { .. } => "pack",
        };
        let key = (fold::generalise(&weight.name), weight.ty.clone(), kind, weight.stream.is_some());
        if !seen.insert(key) {
            hide(first_weight + at);
        }
    }
    let mut seen = BTreeSet::new();
    for (at, (_, state)) in module.states.iter().enumerate() {
        if !seen.insert((fold::generalise(&state.name), state.ty.clone())) {
            hide(first_state + at);
        }
    }
    for group in &groups {
        let mut seen = BTreeSet::new();
        for block in &group.blocks {
            if !seen.insert(block.variant) {
                block.nodes.clone().for_each(|at| hide(first_node + at));
            }
        }
    }
    let mut out = String::with_capacity(whole.len());
    let mut skipped = 0;
    for (line, hidden) in whole.lines().zip(hidden) {
        if hidden {
            skipped += 1;
            continue;
        }
        if std::mem::take(&mut skipped) > 0 {
            out.push_str("    // … as before, for the other layers\n");
        }
        out.push_str(line);
        out.push('\n');
    }
    out
}

fn diff(before: &str, after: &str) -> String {
    if before.lines().count().max(after.lines().count()) > TEXT_LINES {
        return "(the module is too long to compare)\n".to_string();
    }
    let diff = TextDiff::from_lines(before, after);
    let unified = diff.unified_diff().context_radius(2).to_string();
    let total = unified.lines().count();
    let mut shown: Vec<&str> = unified.lines().take(DIFF_LINES).collect();
    let rest = format!("… {} more lines", total.saturating_sub(DIFF_LINES));
    if total > DIFF_LINES {
        shown.push(&rest);
    }
    shown.join("\n") + "\n"
}
