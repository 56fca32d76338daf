//! Rewrites as patches: a rule looks at the graph and says what should change; [`rewrite`] is the only place that
//! changes it, checks types and joins source names.

use std::cell::RefCell;
use std::collections::BTreeSet;

use millrace_ir::tensor::Tensor;
use millrace_ir::{
    Def, Id, Locs, Module, Node, NodeId, Operand, Operands, Result, SharedOp, TensorType, ValueId, Weight,
    WeightExpr, WeightId,
};

use millrace_ir::names::WeightNames;
use smallvec::SmallVec;

use crate::numbers::Seeded;
use crate::pass::Context;

/// What a rule says about a node.
pub enum Outcome {
    /// The rule is not about this node.
    NoMatch,
    /// The rule would apply, but for this reason.
    Blocked(String),
    /// The rule applies.
    Rewrite(Patch),
}

/// A change: new nodes at the anchor's place, and old values replaced by their results or by other operands.
#[derive(Default)]
pub struct Patch {
    nodes: Vec<(SharedOp, Vec<From>)>,
    weights: Vec<(String, TensorType, WeightExpr)>,
    replace: Vec<(ValueId, From)>,
    sources: Vec<NodeId>,
}

/// Where a patch takes an operand from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum From {
    /// Something that exists.
    Old(Operand),
    /// Result `.1` of the patch's node `.0`.
    New(usize, usize),
    /// Weight number `.0` of the patch.
    Made(usize),
}

impl Patch {
    /// An empty patch that stands for the nodes `sources`: their source names go to every new node.
    pub fn new(sources: impl IntoIterator<Item = NodeId>) -> Self {
        Patch { sources: sources.into_iter().collect(), ..Patch::default() }
    }

    /// Adds a node; returns its number for [`From::New`].
    pub fn node(&mut self, op: impl Into<SharedOp>, operands: impl IntoIterator<Item = From>) -> usize {
        self.nodes.push((op.into(), operands.into_iter().collect()));
        self.nodes.len() - 1
    }

    /// Adds a weight called `name`, or one with a number after it where another weight has the name; a weight of
    /// this name, type and expression is used again.
    pub fn weight(&mut self, name: impl Into<String>, ty: TensorType, expr: WeightExpr) -> From {
        self.weights.push((name.into(), ty, expr));
        From::Made(self.weights.len() - 1)
    }

    /// Replaces every use of `value`.
    pub fn replace(&mut self, value: ValueId, with: From) {
        self.replace.push((value, with));
    }
}

/// Nodes that read a value: mostly one or two.
type Users = SmallVec<[NodeId; 2]>;

/// A view of the graph with its uses, for rules.
pub struct View<'a> {
    /// The module.
    pub module: &'a Module,
    uses: &'a [Users],
    outputs: &'a [bool],
    passed: &'a [bool],
    seeded: &'a RefCell<Seeded>,
}

impl View<'_> {
    /// The node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.module.graph.nodes[id]
    }

    /// The node that defines an operand, with the index of the result.
    pub fn def(&self, operand: Operand) -> Option<(NodeId, usize)> {
        let Operand::Value(value) = operand else { return None };
        match self.module.graph.values.get(value)?.def {
            Def::Node { node, index } => Some((node, index)),
            Def::Input(_) => None,
        }
    }

    /// The nodes that read a value, one entry for each use.
    pub fn users(&self, value: ValueId) -> &[NodeId] {
        &self.uses[value.index()]
    }

    /// Whether exactly one node reads the value, once, and it is no output.
    pub fn used_once(&self, value: ValueId) -> bool {
        self.uses[value.index()].len() == 1 && !self.outputs[value.index()]
    }

    /// Whether the value is an output of the graph.
    pub fn is_output(&self, value: ValueId) -> bool {
        self.outputs[value.index()]
    }

    /// Whether the node stands before the one being looked at. What a patch makes comes after it.
    pub fn passed(&self, id: NodeId) -> bool {
        self.passed.get(id.index()).copied().unwrap_or(false)
    }

    /// The numbers of a weight that is in no file, for rules that decide by them.
    ///
    /// # Errors
    /// If they are in a file, or the weight's expression is broken.
    pub fn numbers(&self, weight: WeightId) -> Result<Tensor> {
        self.seeded.borrow_mut().numbers(self.module, weight)
    }

    /// The type of an operand.
    pub fn ty(&self, operand: Operand) -> &TensorType {
        self.module.operand_type(operand)
    }
}

/// A rewrite rule.
pub trait Rule {
    /// Looks at `node`. May add weights to the module through the outcome's patch only by naming existing ones;
    /// rules that need new weights implement [`Rule::prepare`].
    fn look(&self, view: &View<'_>, node: NodeId) -> Outcome;

    /// Runs right before a patch is applied, to add weights it refers to; gets and returns the patch.
    ///
    /// # Errors
    /// As the pass.
    fn prepare(&self, _module: &mut Module, patch: Patch) -> Result<Patch> {
        Ok(patch)
    }
}

/// Applies `rule` to every node in order until nothing applies; a node made by a patch is looked at as well.
/// Returns the number of rewrites. Each one is asked for with [`Context::allow`]. A rule that applies more than eight times per node is stopped with a remark.
///
/// # Errors
/// If a patch is ill typed, which is a defect of the rule.
pub fn rewrite(
    pass: &'static str,
    module: &mut Module,
    context: &mut Context,
    rule: &dyn Rule,
) -> Result<usize> {
    let mut uses: Vec<Users> = vec![Users::new(); module.graph.values.bound()];
    let mut outputs = vec![false; module.graph.values.bound()];
    for id in &module.graph.order {
        for operand in &module.graph.nodes[*id].operands {
            if let Operand::Value(v) = operand {
                uses[v.index()].push(*id);
            }
        }
    }
    module.graph.outputs.iter().for_each(|o| outputs[o.value.index()] = true);
    let order = std::mem::take(&mut module.graph.order);
    let limit = order.len() * 8 + 64;
    let mut new_order: Vec<NodeId> = Vec::with_capacity(order.len());
    let mut applied = 0;
    let mut stuck = None;
    let mut passed = vec![false; module.graph.nodes.bound()];
    // Collected when the first patch brings a weight.
    let mut names: Option<WeightNames> = None;
    let seeded = RefCell::new(std::mem::take(&mut context.seeded));
    let mut blocked: BTreeSet<(NodeId, String)> = BTreeSet::new();
    // A stack of nodes to look at: patches push their nodes, which come before what follows.
    let mut work: Vec<NodeId> = order.into_iter().rev().collect();
    while let Some(id) = work.pop() {
        if module.graph.nodes.get(id).is_none() {
            continue;
        }
        passed.resize(module.graph.nodes.bound(), false);
        let view = View { module, uses: &uses, outputs: &outputs, passed: &passed, seeded: &seeded };
        let outcome = if applied < limit { rule.look(&view, id) } else { Outcome::NoMatch };
        let outcome = match outcome {
            Outcome::Rewrite(_) if !context.allow(pass, &module.graph, id) => Outcome::NoMatch,
            other => other,
        };
        match outcome {
            Outcome::NoMatch => {
                passed[id.index()] = true;
                new_order.push(id);
            }
            Outcome::Blocked(reason) => {
                if blocked.insert((id, reason.clone())) {
                    context.blocked(pass, &module.graph, id, &reason);
                }
                passed[id.index()] = true;
                new_order.push(id);
            }
            Outcome::Rewrite(patch) => {
                let patch = rule.prepare(module, patch)?;
                let sources = patch.sources.clone();
                let made = apply(module, &mut uses, &mut outputs, &mut names, patch)?;
                applied += 1;
                if applied == limit {
                    stuck = made.first().copied().or(Some(id));
                }
                // The anchor stays (dead, unless it still has users); its replacement is looked at next.
                if is_live(module, &uses, &outputs, id) {
                    passed[id.index()] = true;
                    new_order.push(id);
                }
                for source in sources.into_iter().chain([id]) {
                    retire(module, &mut uses, &outputs, source);
                }
                work.extend(made.into_iter().rev());
            }
        }
    }
    context.seeded = seeded.into_inner();
    new_order.retain(|id| module.graph.nodes.get(*id).is_some());
    module.graph.order = new_order;
    if applied >= limit {
        let id = stuck.or(module.graph.order.first().copied()).unwrap_or_else(|| NodeId::from_index(0));
        let message = format!("stopped after {applied} rewrites: the rule does not settle");
        context.remark(pass, &module.graph, id, message);
    }
    context.count(&format!("{pass}.rewrites"), applied as u64);
    Ok(applied)
}

fn is_live(module: &Module, uses: &[Users], outputs: &[bool], id: NodeId) -> bool {
    let node = &module.graph.nodes[id];
    node.op.traits().writes_state
        || node.results.iter().any(|r| outputs[r.index()] || !uses[r.index()].is_empty())
}

/// Removes a dead node, and whatever it was the last user of.
fn retire(module: &mut Module, uses: &mut [Users], outputs: &[bool], id: NodeId) {
    let mut work = vec![id];
    while let Some(id) = work.pop() {
        let Some(node) = module.graph.nodes.get(id) else { continue };
        if is_live(module, uses, outputs, id) {
            continue;
        }
        for operand in node.operands.clone() {
            if let Operand::Value(v) = operand {
                uses[v.index()].retain(|user| *user != id);
                work.extend(module.graph.def_node(v));
            }
        }
        module.graph.remove_node(id);
    }
}

fn apply(
    module: &mut Module,
    uses: &mut Vec<Users>,
    outputs: &mut Vec<bool>,
    names: &mut Option<WeightNames>,
    patch: Patch,
) -> Result<Vec<NodeId>> {
    let mut weights = Vec::with_capacity(patch.weights.len());
    for (name, ty, expr) in patch.weights {
        let names = names.get_or_insert_with(|| WeightNames::of(module));
        weights.push(names.equal_or_add(module, Weight { name, ty, expr, stream: None }));
    }
    let mut loc: Locs = patch.sources.iter().flat_map(|n| module.graph.nodes[*n].loc.clone()).collect();
    loc.sort();
    loc.dedup();
    let mut made: Vec<NodeId> = Vec::with_capacity(patch.nodes.len());
    let find = |module: &Module, made: &[NodeId], from: From| match from {
        From::Old(operand) => operand,
        From::New(node, result) => Operand::Value(module.graph.nodes[made[node]].results[result]),
        From::Made(weight) => Operand::Weight(weights[weight]),
    };
    for (op, operands) in patch.nodes {
        let operands: Operands = operands.into_iter().map(|f| find(module, &made, f)).collect();
        let id = module.new_node(op, operands, loc.clone())?;
        uses.resize(module.graph.values.bound(), Users::new());
        outputs.resize(module.graph.values.bound(), false);
        for operand in module.graph.nodes[id].operands.clone() {
            if let Operand::Value(v) = operand {
                uses[v.index()].push(id);
            }
        }
        made.push(id);
    }
    for (old, with) in patch.replace {
        let with = find(module, &made, with);
        let (from, to) = (module.graph.values[old].ty.clone(), module.operand_type(with).clone());
        if from != to {
            return Err(millrace_ir::Error::new(
                millrace_ir::Kind::Internal,
                "compile/ill-typed-patch",
                format!("a rewrite replaces {old} of type {from} by one of type {to}"),
            ));
        }
        let users = std::mem::take(&mut uses[old.index()]);
        for user in &users {
            for operand in &mut module.graph.nodes[*user].operands {
                if *operand == Operand::Value(old) {
                    *operand = with;
                }
            }
        }
        if let Operand::Value(new) = with {
            uses[new.index()].extend(users);
            if outputs[old.index()] {
                module.graph.outputs.iter_mut().filter(|o| o.value == old).for_each(|o| o.value = new);
                outputs[new.index()] = true;
                outputs[old.index()] = false;
            }
        }
    }
    Ok(made)
}
