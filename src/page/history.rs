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
    before: Option<(usize, Printed)>,
}

impl Recorder {
    /// Takes note of the module after a pass.
    pub fn observe(&mut self, pass: &'static str, module: &Module, changed: bool) {
        let nodes_after = module.graph.nodes.len();
        let nodes_before = self.before.as_ref().map_or(nodes_after, |(nodes, _)| *nodes);
        // Printed even without a change: the phase may move, and its line belongs to no later diff.
        let after = Printed::of(module);
        let diff = match &self.before {
            Some((_, before)) if changed => {
                // A layer that either side shows is shown on both, or it would look like new.
                let shown = before.layers().chain(after.layers()).collect();
                Some(diff(&before.folded(&shown), &after.folded(&shown)))
            }
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

/// A module as text, and what of it may be left out.
struct Printed {
    text: String,
    /// Lines of weights and states that repeat an earlier one.
    repeated: BTreeSet<usize>,
    groups: Vec<fold::Group>,
    /// Line of the first node.
    first_node: usize,
}

impl Printed {
    fn of(module: &Module) -> Self {
        let first_weight = 1 + module.dims.len();
        let first_state = first_weight + module.weights.len();
        let first_arena = first_state + module.states.len();
        let first_node = first_arena + module.arenas.len() + module.kernels.len() + 1;
        let mut repeated = BTreeSet::new();
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
                WeightExpr::Slice { .. } => "slice",
                WeightExpr::Pack { .. } => "pack",
                WeightExpr::Cores { .. } => "cores",
            };
            let key = (fold::generalise(&weight.name), weight.ty.clone(), kind, weight.stream.is_some());
            if !seen.insert(key) {
                repeated.insert(first_weight + at);
            }
        }
        let mut seen = BTreeSet::new();
        for (at, (_, state)) in module.states.iter().enumerate() {
            if !seen.insert((fold::generalise(&state.name), state.ty.clone())) {
                repeated.insert(first_state + at);
            }
        }
        Printed { text: text::print(module), repeated, groups: fold::groups(module), first_node }
    }

    /// One layer of each variant.
    fn layers(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        self.groups.iter().flat_map(|group| {
            let variants: BTreeSet<usize> = group.blocks.iter().map(|b| b.variant).collect();
            variants.into_iter().filter_map(|v| Some((group.stem.clone(), group.first_of(v)?.index)))
        })
    }

    /// The text with the layers in `shown`, and one weight and state of each kind.
    fn folded(&self, shown: &BTreeSet<(String, u64)>) -> String {
        let mut hidden = self.repeated.clone();
        for group in &self.groups {
            for block in &group.blocks {
                if !shown.contains(&(group.stem.clone(), block.index)) {
                    hidden.extend(block.nodes.clone().map(|at| self.first_node + at));
                }
            }
        }
        let mut out = String::new();
        let mut skipped = false;
        for (number, line) in self.text.lines().enumerate() {
            if hidden.contains(&number) {
                skipped = true;
                continue;
            }
            if std::mem::take(&mut skipped) {
                out.push_str("    // … likewise for the other layers\n");
            }
            out.push_str(line);
            out.push('\n');
        }
        out
    }
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
