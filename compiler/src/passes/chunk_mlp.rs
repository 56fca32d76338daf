//! Feed-forward layers run in parts of their intermediate width, for machines with little memory: the widest
//! activation of most models is alive for one part at a time.
//!
//! ```text
//! h = matmul.fused(x, @up) {epilogue = [glu(silu)]} ; y = matmul.fused(h, @down, r) {epilogue = [residual]}
//!   ->  h0 = matmul.fused(x, @up.part0of2) {..} ; y0 = matmul.fused(h0, @down.part0of2, r) {epilogue = [residual]}
//!       h1 = matmul.fused(x, @up.part1of2) {..} ; y  = matmul.fused(h1, @down.part1of2, y0) {epilogue = [residual]}
//! ```
//!
//! The first part takes the bias and the residual; one that was joined with the norm behind it (`add_rms_norm`) comes
//! out of it again, so that it dies before the second part. It costs time: `x` and `y` are read and written once for
//! each part. The sum over the intermediate width is rounded to the element type after each part: f32 results move
//! by rounding, bf16 results by up to one rounding for each part.
//!
//! All layers are tried with 2, 4 and 8 parts (`parts=N`: with N only), and the largest live set at the symbols' upper
//! bounds decides: the fewest parts within 5 % of the best (`limit=BYTES`: the fewest that reach the limit, and nothing
//! where it is kept already). Nothing changes unless it falls (`force=true`: even then). A part is a whole number of
//! the target's weight panels. No level runs this pass.

use std::cell::RefCell;

use millrace_ir::distinct::Types;
use millrace_ir::names::WeightNames;
use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::ops::{AddNorm, FusedMatmul, LayerNorm, RmsNorm};
use millrace_ir::{
    Dim, Id, Module, Node, NodeId, Op, Operand, Phase, Result, ValueId, Weight, WeightExpr, WeightId,
};

use super::schedule::peak;
use crate::options::{OptionKind, PassOption, PassOptions};
use crate::pass::{Context, Numbering, Pass};
use crate::rewrite::{From, Outcome, Patch, Rule, View, rewrite};

/// See the module.
#[derive(Default)]
pub(super) struct ChunkMlp {
    /// Parts of each layer; 0 to choose.
    parts: usize,
    /// Bytes the peak should not exceed; 0 for as few as pay.
    limit: u64,
    /// Whether the peak need not fall.
    force: bool,
}

const NAME: &str = "chunk-mlp";

/// What one number of parts gives.
struct Trial {
    parts: usize,
    peak: u64,
    /// The first node it rewrites, by its number in the module before.
    first: NodeId,
}

impl ChunkMlp {
    /// Tries `parts` on a copy; none if no layer takes them.
    fn trial(&self, module: &Module, context: &Context, parts: usize) -> Result<Option<Trial>> {
        let mut copy = module.clone();
        let numbering = Numbering { trace: true, ..Numbering::default() };
        let mut scratch = Context { numbering, ..context.target_facts() };
        rewrite(NAME, &mut copy, &mut scratch, &Chunk::new(module, context, parts))?;
        let first = scratch.numbering.events.first().and_then(|event| event.node);
        Ok(first.map(|first| Trial { parts, peak: peak_of(&copy, context.align), first }))
    }

    /// The trial to apply: the fewest parts that are good enough, or the lowest peak.
    fn choose<'a>(&self, trials: &'a [Trial]) -> Option<&'a Trial> {
        let best = trials.iter().min_by_key(|t| (t.peak, t.parts))?;
        let enough = if self.limit > 0 { self.limit } else { best.peak.saturating_add(best.peak / 20) };
        Some(trials.iter().find(|t| t.peak <= enough).unwrap_or(best))
    }
}

impl Pass for ChunkMlp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn help(&self) -> &'static str {
        "runs feed-forward layers in parts of their intermediate width where that lowers the peak"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Fused, Phase::Fused)
    }
    fn options(&self) -> &'static [PassOption] {
        &[
            PassOption {
                name: "parts",
                help: "parts of each layer; 0 chooses among 2, 4 and 8",
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
        ]
    }
    fn with_options(&self, options: &PassOptions) -> Option<Box<dyn Pass>> {
        let parts = usize::try_from(options.integer("parts")).unwrap_or(0);
        let limit = u64::try_from(options.integer("limit")).unwrap_or(0);
        Some(Box::new(ChunkMlp { parts, limit, force: options.flag("force") }))
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let before = peak_of(module, context.align);
        if self.parts == 1 || (self.limit > 0 && before <= self.limit) {
            return Ok(false);
        }
        let candidates = if self.parts > 0 { vec![self.parts] } else { vec![2, 4, 8] };
        let mut trials = Vec::new();
        for parts in &candidates {
            trials.extend(self.trial(module, context, *parts)?);
        }
        let Some(chosen) = self.choose(&trials) else {
            // Nothing applies; this says why.
            return Ok(rewrite(NAME, module, context, &Chunk::new(module, context, candidates[0]))? > 0);
        };
        if chosen.peak >= before && !self.force {
            let reason = format!("the peak of {before} bytes does not fall");
            context.blocked(NAME, &module.graph, chosen.first, &reason);
            return Ok(false);
        }
        let parts = chosen.parts;
        let message = format!("{parts} parts change the peak from {before} to {} bytes", chosen.peak);
        context.remark(NAME, &module.graph, chosen.first, message);
        if self.limit > 0 && chosen.peak > self.limit {
            let message = format!("the limit of {} bytes is not reached", self.limit);
            context.remark(NAME, &module.graph, chosen.first, message);
        }
        let rule = Chunk::new(module, context, parts);
        let changed = rewrite(NAME, module, context, &rule)? > 0;
        context.count("chunk-mlp.saved_bytes", before.saturating_sub(peak_of(module, context.align)));
        Ok(changed)
    }
}

/// The rule for one number of parts.
struct Chunk {
    parts: usize,
    panel: usize,
    /// Nodes from here on are the rule's own.
    bound: usize,
    names: RefCell<Option<WeightNames>>,
    /// What [`Rule::look`] found, for [`Rule::prepare`].
    layer: RefCell<Option<Layer>>,
}

/// A layer that falls into parts.
#[derive(Clone)]
struct Layer {
    up: (Node, FusedMatmul),
    down: (Node, FusedMatmul),
    /// Rows of `up` in one part.
    width: usize,
    /// The addition and norm that read the result, with the other addend.
    norm: Option<(Node, AddNorm, Operand)>,
}

fn fused(node: &Node) -> Option<&FusedMatmul> {
    if let Op::FusedMatmul(fused) = &node.op { Some(fused) } else { None }
}

/// The only reader of the only result of a node, if there is one.
fn reader(view: &View<'_>, node: &Node) -> Option<NodeId> {
    let [result]: [ValueId; 1] = node.results[..].try_into().ok()?;
    view.used_once(result).then(|| view.users(result)[0])
}

impl Chunk {
    fn new(module: &Module, context: &Context, parts: usize) -> Self {
        let bound = module.graph.nodes.bound();
        let (names, layer) = (RefCell::new(None), RefCell::new(None));
        Chunk { parts, panel: context.panel.max(1), bound, names, layer }
    }

    /// The layer that ends in `down`: with its sources, no layer, or the reason why it does not fall into parts.
    fn layer(
        &self,
        view: &View<'_>,
        down_id: NodeId,
        norm: Option<NodeId>,
    ) -> std::result::Result<(Vec<NodeId>, Layer), Option<String>> {
        let down_node = view.node(down_id);
        let down = fused(down_node).filter(|_| down_id.index() < self.bound).ok_or(None)?;
        let (up_id, _) = view.def(down_node.operands[0]).ok_or(None)?;
        let up_node = view.node(up_id);
        let up = fused(up_node).filter(|_| up_id.index() < self.bound).ok_or(None)?;
        let activates = |e: &Epilogue| matches!(e, Epilogue::Activation(_) | Epilogue::Glu(_));
        if !up.epilogue.iter().any(activates) {
            return Err(None);
        }
        let blocked = |reason: &str| Err(Some(reason.to_string()));
        if reader(view, up_node) != Some(down_id) {
            return blocked("the intermediate has other uses");
        }
        if !up.plain() || !down.plain() {
            return blocked("the weights are packed already");
        }
        let after_bias = up.epilogue.strip_prefix(&[Epilogue::Bias]).unwrap_or(&up.epilogue);
        if !matches!(after_bias, [step] if activates(step)) {
            return blocked("the first matmul does more than bias and activation");
        }
        if down.epilogue.iter().any(|e| !matches!(e, Epilogue::Bias | Epilogue::Residual)) {
            return blocked("the second matmul does more than bias and residual");
        }
        if down.segments.len() != 1 {
            return blocked("the second matmul has several results");
        }
        let dtype = |o: Operand| view.ty(o).dtype;
        if down.out.is_some_and(|out| out != dtype(down_node.operands[0])) {
            return blocked("the result has another element type, partial sums cannot be added to it");
        }
        let constant = |node: &Node, f: &FusedMatmul| {
            let bias = f.epilogue.iter().filter(|e| e.has_operand()).position(|e| *e == Epilogue::Bias);
            [Some(1), bias.map(|at| at + 2)]
                .into_iter()
                .flatten()
                .all(|at| matches!(node.operands.get(at), Some(Operand::Weight(_))))
        };
        if !constant(up_node, up) || !constant(down_node, down) {
            return blocked("a weight or bias is computed");
        }
        let whole = up.segments[0];
        let unit = self.parts * self.panel;
        if whole == 0 || !whole.is_multiple_of(unit) {
            let reason = match self.panel {
                1 => format!("a width of {whole} does not fall into {} parts", self.parts),
                panel => {
                    format!(
                        "a width of {whole} does not fall into {} parts of {panel}-row panels",
                        self.parts
                    )
                }
            };
            return Err(Some(reason));
        }
        let mut sources = vec![up_id, down_id];
        let norm = norm.and_then(|id| {
            let Op::AddNorm(op) = &view.node(id).op else { return None };
            let down_value = Operand::Value(down_node.results[0]);
            let other = view.node(id).operands[..2].iter().copied().find(|o| *o != down_value)?;
            sources.push(id);
            Some((view.node(id).clone(), op.clone(), other))
        });
        let (up, down) = ((up_node.clone(), up.clone()), (down_node.clone(), down.clone()));
        Ok((sources, Layer { up, down, width: whole / self.parts, norm }))
    }

    /// Adds the parts of a layer to `patch`.
    fn build(&self, module: &mut Module, names: &mut WeightNames, layer: Layer, patch: &mut Patch) {
        let Layer { up: (up_node, up), down: (down_node, down), width, norm } = layer;
        let mut pieces = Pieces { module, names, parts: self.parts };
        let mut sum = None;
        for part in 0..self.parts {
            let whole = up.segments[0];
            let starts: Vec<usize> = (0..up.segments.len()).map(|s| s * whole + part * width).collect();
            let mut operands = vec![From::Old(up_node.operands[0])];
            for operand in &up_node.operands[1..] {
                operands.push(pieces.rows(*operand, &starts, width, part));
            }
            let segments = vec![width; up.segments.len()];
            let made = patch.node(FusedMatmul { segments, ..up.clone() }, operands);
            let weight = pieces.columns(down_node.operands[1], part * width, width, part);
            let mut operands = vec![From::New(made, 0), weight];
            let mut epilogue = vec![Epilogue::Residual];
            match sum {
                Some(sum) => operands.push(From::New(sum, 0)),
                None => {
                    epilogue = down.epilogue.clone();
                    operands.extend(down_node.operands[2..].iter().copied().map(From::Old));
                    if let Some((_, _, addend)) = &norm {
                        epilogue.push(Epilogue::Residual);
                        operands.push(From::Old(*addend));
                    }
                }
            }
            sum = Some(patch.node(FusedMatmul { epilogue, ..down.clone() }, operands));
        }
        let Some(sum) = sum.map(|sum| From::New(sum, 0)) else { return };
        let Some((node, AddNorm { kind, eps, sum: shown }, _)) = norm else {
            patch.replace(down_node.results[0], sum);
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
struct Pieces<'a> {
    module: &'a mut Module,
    names: &'a mut WeightNames,
    parts: usize,
}

impl Pieces<'_> {
    fn add(
        &mut self,
        name: String,
        mut like: Weight,
        axis: usize,
        extent: usize,
        expr: WeightExpr,
    ) -> WeightId {
        like.ty.shape[axis] = Dim::from(extent);
        let weight = Weight { name, ty: like.ty, expr, stream: None };
        self.names.equal_or_add(self.module, weight)
    }

    /// `len` elements of each of `starts` along the first axis.
    fn rows(&mut self, operand: Operand, starts: &[usize], len: usize, part: usize) -> From {
        let Operand::Weight(whole) = operand else { return From::Old(operand) };
        let cuts: Vec<WeightId> = starts
            .iter()
            .map(|start| {
                let (of, start) = inside(self.module, whole, *start, len);
                let source = self.module.weights[of].clone();
                let name = format!("{}.rows{start}-{}", source.name, start + len);
                self.add(name, source, 0, len, WeightExpr::Slice { axis: 0, start, len, of })
            })
            .collect();
        let id = match cuts[..] {
            [one] => one,
            _ => {
                let source = self.module.weights[whole].clone();
                let name = format!("{}.part{part}of{}", source.name, self.parts);
                let extent = len * cuts.len();
                self.add(name, source, 0, extent, WeightExpr::Concat { axis: 0, parts: cuts })
            }
        };
        From::Old(Operand::Weight(id))
    }

    /// `len` columns of a matrix from `start` on.
    fn columns(&mut self, operand: Operand, start: usize, len: usize, part: usize) -> From {
        let Operand::Weight(of) = operand else { return From::Old(operand) };
        let source = self.module.weights[of].clone();
        let name = format!("{}.part{part}of{}", source.name, self.parts);
        let id = self.add(name, source, 1, len, WeightExpr::Slice { axis: 1, start, len, of });
        From::Old(Operand::Weight(id))
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

impl Rule for Chunk {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        // An addition and norm that only the second matmul's addition feeds is looked at instead of that matmul.
        let joined = |down: NodeId, norm: NodeId| {
            norm.index() < self.bound
                && matches!(view.node(norm).op, Op::AddNorm(_))
                && fused(view.node(down)).is_some_and(|f| f.epilogue.iter().all(|e| *e == Epilogue::Bias))
        };
        let found = match &node.op {
            Op::FusedMatmul(_) => match reader(view, node) {
                Some(norm) if joined(id, norm) => Err(None),
                _ => self.layer(view, id, None),
            },
            Op::AddNorm(_) => {
                let downs = node.operands[..2].iter().filter_map(|o| view.def(*o)).map(|(down, _)| down);
                let of = downs.filter(|d| joined(*d, id) && reader(view, view.node(*d)) == Some(id));
                // The first layer that applies, or the first reason.
                let mut found = Err(None);
                for down in of {
                    match (&found, self.layer(view, down, Some(id))) {
                        (Ok(_), _) | (Err(Some(_)), Err(_)) => {}
                        (_, next) => found = next,
                    }
                }
                found
            }
            _ => Err(None),
        };
        match found {
            Ok((sources, layer)) => {
                self.layer.replace(Some(layer));
                Outcome::Rewrite(Patch::new(sources))
            }
            Err(Some(reason)) => Outcome::Blocked(reason),
            Err(None) => Outcome::NoMatch,
        }
    }

    fn prepare(&self, module: &mut Module, mut patch: Patch) -> Result<Patch> {
        if let Some(layer) = self.layer.take() {
            let mut names = self.names.borrow_mut();
            let names = names.get_or_insert_with(|| WeightNames::of(module));
            self.build(module, names, layer, &mut patch);
        }
        Ok(patch)
    }
}

/// Largest live set of a module in its own order.
fn peak_of(module: &Module, align: u64) -> u64 {
    peak(module, &Types::of(module), &module.graph.order, align)
}
