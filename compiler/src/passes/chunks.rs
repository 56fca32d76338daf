//! What the passes that run layers in parts have in common: trying numbers of parts by the peak they leave, pieces of
//! weights, and a matmul whose inner extent falls into parts that are summed up.

use millrace_ir::distinct::Types;
use millrace_ir::names::WeightNames;
use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::ops::{AddNorm, FusedMatmul, LayerNorm, RmsNorm};
use millrace_ir::{
    Dim, Module, Node, NodeId, Op, Operand, Result, TensorType, ValueId, Weight, WeightExpr, WeightId,
};

use super::schedule::peak;
use crate::options::{OptionKind, PassOption, PassOptions};
use crate::pass::{Context, Numbering};
use crate::rewrite::{From, Patch, View};

/// How far such a pass goes.
#[derive(Default)]
pub(super) struct Chunks {
    /// Parts of each layer; 0 to choose.
    pub parts: usize,
    /// Bytes the peak should not exceed; 0 for as few as pay.
    pub limit: u64,
    /// Whether the peak need not fall.
    pub force: bool,
}

/// The options of [`Chunks`].
pub(super) const OPTIONS: &[PassOption] = &[
    PassOption {
        name: "parts",
        help: "parts of each layer; 0 chooses",
        kind: OptionKind::Integer { default: 0, min: 0, max: 64 },
    },
    PassOption {
        name: "limit",
        help: "bytes of activations to get below with as few parts as possible; 0 takes what pays",
        kind: OptionKind::Integer { default: 0, min: 0, max: i64::MAX },
    },
    PassOption {
        name: "force",
        help: "splits layers where the peak does not fall as well, to test and measure the parts",
        kind: OptionKind::Flag { default: false },
    },
];

/// What one number of parts gives.
struct Trial {
    parts: usize,
    peak: u64,
    /// The first node it rewrites, by its number in the module before.
    first: NodeId,
}

/// Runs all layers of a module in a number of parts; returns the number of rewrites.
pub(super) type Apply<'a> = dyn Fn(&mut Module, &mut Context, usize) -> Result<usize> + 'a;

impl Chunks {
    /// From the options of a pass.
    pub fn of(options: &PassOptions) -> Self {
        let parts = usize::try_from(options.integer("parts")).unwrap_or(0);
        let limit = u64::try_from(options.integer("limit")).unwrap_or(0);
        Chunks { parts, limit, force: options.flag("force") }
    }

    /// The trial to apply: the fewest parts that are good enough, or the lowest peak.
    fn choose<'a>(&self, trials: &'a [Trial]) -> Option<&'a Trial> {
        let best = trials.iter().min_by_key(|t| (t.peak, t.parts))?;
        let enough = if self.limit > 0 { self.limit } else { best.peak.saturating_add(best.peak / 20) };
        Some(trials.iter().find(|t| t.peak <= enough).unwrap_or(best))
    }

    /// Tries `candidates` on copies, lets the largest live set decide, and says in a remark what changed.
    ///
    /// # Errors
    /// As `apply`.
    pub fn run(
        &self,
        name: &'static str,
        candidates: &[usize],
        module: &mut Module,
        context: &mut Context,
        apply: &Apply<'_>,
    ) -> Result<bool> {
        let before = peak_of(module, context.align);
        if self.limit > 0 && before <= self.limit {
            return Ok(false);
        }
        let given = [self.parts];
        let candidates = if self.parts > 0 { &given[..] } else { candidates };
        let mut trials = Vec::new();
        for parts in candidates {
            let mut copy = module.clone();
            let numbering = Numbering { trace: true, ..Numbering::default() };
            let mut scratch = Context { numbering, ..context.target_facts() };
            apply(&mut copy, &mut scratch, *parts)?;
            if let Some(first) = scratch.numbering.events.first().and_then(|event| event.node) {
                trials.push(Trial { parts: *parts, peak: peak_of(&copy, context.align), first });
            }
        }
        let Some(chosen) = self.choose(&trials) else {
            // Nothing applies; this says why.
            let parts = candidates.iter().copied().find(|parts| *parts > 1).unwrap_or(1);
            return Ok(apply(module, context, parts)? > 0);
        };
        // The choice may be a little worse than the best, but never no better than nothing.
        let best = trials.iter().min_by_key(|t| (t.peak, t.parts)).unwrap_or(chosen);
        let chosen = if chosen.peak < before { chosen } else { best };
        if chosen.peak >= before && !self.force {
            let reason = format!("the peak of {before} bytes does not fall");
            context.blocked(name, &module.graph, chosen.first, &reason);
            return Ok(false);
        }
        let Trial { parts, peak, first } = *chosen;
        let noun = if parts == 1 { "part changes" } else { "parts change" };
        let message = format!("{parts} {noun} the peak from {before} to {peak} bytes");
        context.remark(name, &module.graph, first, message);
        if self.limit > 0 && peak > self.limit {
            let message = format!("the limit of {} bytes is not reached", self.limit);
            context.remark(name, &module.graph, first, message);
        }
        let changed = apply(module, context, parts)? > 0;
        let saved = before.saturating_sub(peak_of(module, context.align));
        context.count(&format!("{name}.saved_bytes"), saved);
        Ok(changed)
    }
}

/// Largest live set of a module in its own order.
fn peak_of(module: &Module, align: u64) -> u64 {
    peak(module, &Types::of(module), &module.graph.order, align)
}

/// The answer for something that would fall into parts, but for `reason`.
pub(super) fn blocked<T>(reason: impl Into<String>) -> std::result::Result<T, Option<String>> {
    Err(Some(reason.into()))
}

/// The linear layer in a node.
pub(super) fn fused(node: &Node) -> Option<&FusedMatmul> {
    if let Op::FusedMatmul(fused) = &*node.op { Some(fused) } else { None }
}

/// The only reader of the only result of a node, if there is one.
pub(super) fn reader(view: &View<'_>, node: &Node) -> Option<NodeId> {
    let [result]: [ValueId; 1] = node.results[..].try_into().ok()?;
    view.used_once(result).then(|| view.users(result)[0])
}

/// Whether weight and bias of a linear layer are weights.
pub(super) fn constant(node: &Node, op: &FusedMatmul) -> bool {
    let bias = op.epilogue.iter().filter(|e| e.has_operand()).position(|e| *e == Epilogue::Bias);
    let mut read = [Some(1), bias.map(|at| at + 2)].into_iter().flatten();
    read.all(|at| matches!(node.operands.get(at), Some(Operand::Weight(_))))
}

/// Whether `norm` is an addition and norm that takes the matmul `down` as it is, so that the sum over the parts of
/// `down` may take its other addend.
pub(super) fn joins(view: &View<'_>, down: NodeId, norm: NodeId) -> bool {
    matches!(*view.node(norm).op, Op::AddNorm(_))
        && fused(view.node(down)).is_some_and(|f| f.epilogue.iter().all(|e| *e == Epilogue::Bias))
}

/// A matmul with at most bias and residual behind it, summed up over parts of its inner extent.
#[derive(Clone)]
pub(super) struct Sum {
    down: (Node, FusedMatmul),
    /// The addition and norm that read the result, with the other addend.
    norm: Option<(Node, AddNorm, Operand)>,
    /// The sum so far.
    sum: Option<usize>,
}

impl Sum {
    /// The sum of the matmul `down`, which errors call `called`, and of the addition and norm behind it.
    pub fn of(
        view: &View<'_>,
        down_id: NodeId,
        norm: Option<NodeId>,
        called: &str,
    ) -> std::result::Result<Sum, String> {
        let node = view.node(down_id);
        let Some(down) = fused(node) else { return Err(format!("{called} is no linear layer")) };
        if !down.plain() {
            return Err("the weights are packed already".to_string());
        }
        if down.epilogue.iter().any(|e| !matches!(e, Epilogue::Bias | Epilogue::Residual)) {
            return Err(format!("{called} does more than bias and residual"));
        }
        if down.segments.len() != 1 {
            return Err(format!("{called} has several results"));
        }
        if down.out.is_some_and(|out| out != view.ty(node.operands[0]).dtype) {
            return Err("the result has another element type, partial sums cannot be added to it".to_string());
        }
        if !constant(node, down) {
            return Err("a weight or bias is computed".to_string());
        }
        let norm = norm.and_then(|id| {
            let Op::AddNorm(op) = &*view.node(id).op else { return None };
            let down = Operand::Value(node.results[0]);
            let other = view.node(id).operands[..2].iter().copied().find(|o| *o != down)?;
            Some((view.node(id).clone(), op.clone(), other))
        });
        Ok(Sum { down: (node.clone(), down.clone()), norm, sum: None })
    }

    /// The weight of all parts.
    pub fn weight(&self) -> Operand {
        self.down.0.operands[1]
    }

    /// Adds the product of a part of the input and the columns of the weight for it.
    pub fn add(&mut self, patch: &mut Patch, input: From, weight: From) {
        let (node, down) = &self.down;
        let mut operands = vec![input, weight];
        let mut epilogue = vec![Epilogue::Residual];
        match self.sum {
            Some(sum) => operands.push(From::New(sum, 0)),
            None => {
                epilogue = down.epilogue.to_vec();
                operands.extend(node.operands[2..].iter().copied().map(From::Old));
                if let Some((_, _, addend)) = &self.norm {
                    epilogue.push(Epilogue::Residual);
                    operands.push(From::Old(*addend));
                }
            }
        }
        self.sum = Some(patch.node(FusedMatmul { epilogue: epilogue.into(), ..down.clone() }, operands));
    }

    /// Puts the sum in the place of the matmul, and of the addition and norm behind it.
    pub fn finish(self, patch: &mut Patch) {
        let Some(sum) = self.sum.map(|sum| From::New(sum, 0)) else { return };
        let Some((node, AddNorm { kind, eps, sum: shown }, _)) = self.norm else {
            patch.replace(self.down.0.results[0], sum);
            return;
        };
        let op: Op = match kind {
            NormKind::Rms => RmsNorm { eps }.into(),
            NormKind::Layer => LayerNorm { eps }.into(),
        };
        let vectors = node.operands[2..].iter().copied().map(From::Old);
        let normed = patch.node(op, [sum].into_iter().chain(vectors));
        if shown {
            patch.replace(node.results[0], sum);
        }
        patch.replace(node.results[usize::from(shown)], From::New(normed, 0));
    }
}

/// Makes the weights of the parts.
pub(super) struct Pieces<'a> {
    pub module: &'a mut Module,
    pub names: &'a mut WeightNames,
    pub parts: usize,
}

impl Pieces<'_> {
    fn add(&mut self, name: String, ty: TensorType, expr: WeightExpr) -> WeightId {
        self.names.equal_or_add(self.module, Weight { name, ty, expr, stream: None })
    }

    fn slice(&mut self, of: WeightId, axis: usize, start: usize, len: usize, name: String) -> WeightId {
        let mut ty = self.module.weights[of].ty.clone();
        ty.shape[axis] = Dim::from(len);
        self.add(name, ty, WeightExpr::Slice { axis, start, len, of })
    }

    fn reshape(&mut self, of: WeightId, shape: &[usize], name: String) -> WeightId {
        let ty = TensorType::new(self.module.weights[of].ty.dtype, shape.iter().copied());
        self.add(name, ty, WeightExpr::Reshape { of })
    }

    /// `len` rows from `start` on.
    pub fn cut(&mut self, of: WeightId, start: usize, len: usize) -> WeightId {
        let (of, start) = inside(self.module, of, start, len);
        if self.module.weights[of].ty.shape[0] == Dim::from(len) {
            return of;
        }
        let name = format!("{}.rows{start}-{}", self.module.weights[of].name, start + len);
        self.slice(of, 0, start, len, name)
    }

    /// These rows, each a start and a length, one after another.
    pub fn rows(&mut self, operand: Operand, rows: &[(usize, usize)], part: usize) -> From {
        let Operand::Weight(whole) = operand else { return From::Old(operand) };
        let cuts: Vec<WeightId> = rows.iter().map(|(start, len)| self.cut(whole, *start, *len)).collect();
        let id = match cuts[..] {
            [one] => one,
            _ => {
                let name = self.part(whole, part);
                let mut ty = self.module.weights[whole].ty.clone();
                ty.shape[0] = Dim::from(rows.iter().map(|(_, len)| len).sum::<usize>());
                self.add(name, ty, WeightExpr::Concat { axis: 0, parts: cuts.into() })
            }
        };
        From::Old(Operand::Weight(id))
    }

    /// `len` columns of a matrix from `start` on.
    pub fn columns(&mut self, operand: Operand, start: usize, len: usize, part: usize) -> From {
        let Operand::Weight(of) = operand else { return From::Old(operand) };
        let name = self.part(of, part);
        From::Old(Operand::Weight(self.slice(of, 1, start, len, name)))
    }

    /// Of each of `groups` equal groups of elements along `axis`, part number `part`.
    pub fn grouped(&mut self, of: WeightId, axis: usize, groups: usize, part: usize) -> WeightId {
        let name = self.part(of, part);
        let extent = |dim: &Dim| dim.as_const().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let shape: Vec<usize> = self.module.weights[of].ty.shape.iter().map(extent).collect();
        let len = shape[axis] / groups.max(1) / self.parts;
        if groups == 1 {
            return self.slice(of, axis, part * len, len, name);
        }
        let mut apart = shape.clone();
        apart[axis] /= groups;
        apart.insert(axis, groups);
        let apart = self.reshape(of, &apart, format!("{}.groups", self.module.weights[of].name));
        let cut = self.slice(apart, axis + 1, part * len, len, format!("{name}.groups"));
        let mut joined = shape;
        joined[axis] = groups * len;
        self.reshape(cut, &joined, name)
    }

    fn part(&self, of: WeightId, part: usize) -> String {
        format!("{}.part{part}of{}", self.module.weights[of].name, self.parts)
    }
}

/// The part of a joined weight that holds `len` rows from `start` on, with the place of the rows in it; the weight
/// itself where they lie in several parts or it is not joined.
fn inside(module: &Module, of: WeightId, start: usize, len: usize) -> (WeightId, usize) {
    let WeightExpr::Concat { axis: 0, parts } = &module.weights[of].expr else { return (of, start) };
    let mut first = 0;
    for part in parts {
        let rows = module.weights[*part].ty.shape[0].as_const().and_then(|n| usize::try_from(n).ok());
        let Some(rows) = rows else { break };
        if start >= first && start + len <= first + rows {
            return (*part, start - first);
        }
        first += rows;
    }
    (of, start)
}
