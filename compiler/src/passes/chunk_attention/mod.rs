//! Attention run in parts, for machines with little memory: groups of heads whose queries, keys, values and results
//! are alive for one group at a time, or blocks of a matrix of scores.
//!
//! ```text
//! q, k, v = matmul.fused(x, @q+k+v) ; .. ; y = matmul.fused(paged_attention(q, kv_append(k), kv_append(v), ..), @o, r)
//!   ->  k = matmul.fused(x, @k) ; kv_append(k) ; v = matmul.fused(x, @v) ; kv_append(v)
//!       q0 = matmul.fused(x, @q.part0of2) ; a0 = paged_attention(q0, ..) ; y0 = matmul.fused(a0, @o.part0of2, r)
//!       q1 = matmul.fused(x, @q.part1of2) ; a1 = paged_attention(q1, ..) ; y  = matmul.fused(a1, @o.part1of2, y0)
//! ```
//!
//! - **Paged attention**: keys and values go to the cache one after the other, before there are queries (one part: no
//!   more than that, and bits stay as they are). With more parts, every part has the same number of query heads of each
//!   key head, so there are at most as many parts as query heads share a key head.
//! - **Packed attention**: a part is a group of key heads with their query heads.
//! - **Scores** (`softmax(q k^T ..) v` that no attention op stands for): blocks of rows or, where their number is
//!   dynamic, of heads, put together with a `concat`. Bits stay as they are.
//!
//! Rope and norms of heads run in each part. Bias, residual and a norm that was joined with the residual are treated as
//! `chunk-mlp` does, and the price is the same: `x` and `y` are read and written once for each part, and the sum over
//! heads is rounded to the element type after each part.
//!
//! All layers are tried with 1 to 8, 12 and 16 parts (`parts=N`: with N only), and the largest live set at the symbols'
//! upper bounds decides: the fewest parts within 5 % of the best (`limit=BYTES`: the fewest that reach the
//! limit, and nothing where it is kept already). Nothing changes unless it falls (`force=true`: even then). Parts of
//! weights are whole panels of the target. No level runs this pass; together with `chunk-mlp` it goes furthest as
//! `fixpoint{chunk-mlp,chunk-attention}`, because each finds more to gain where the other has been.

mod scores;
mod site;

use std::cell::RefCell;
use std::collections::BTreeSet;

use millrace_ir::names::WeightNames;
use millrace_ir::ops::{FusedMatmul, Reshape};
use millrace_ir::{Dim, Id, Module, NodeId, Op, Operand, Phase, Result};

use self::site::{Chain, Kind, Site};
use super::chunks::{self, Chunks, Pieces, joins, reader};
use crate::options::{PassOption, PassOptions};
use crate::pass::{Context, Pass};
use crate::rewrite::{From, Outcome, Patch, Rule, View, rewrite};

/// See the module.
#[derive(Default)]
pub(super) struct ChunkAttention(Chunks);

const NAME: &str = "chunk-attention";

impl Pass for ChunkAttention {
    fn name(&self) -> &'static str {
        NAME
    }
    fn help(&self) -> &'static str {
        "runs attention in groups of heads or blocks of rows where that lowers the peak"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Fused, Phase::Fused)
    }
    fn options(&self) -> &'static [PassOption] {
        chunks::OPTIONS
    }
    fn with_options(&self, options: &PassOptions) -> Option<Box<dyn Pass>> {
        Some(Box::new(ChunkAttention(Chunks::of(options))))
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        let apply = |module: &mut Module, context: &mut Context, parts| {
            let rule = Parts::new(module, context, parts);
            let (count, bound) = (rewrite(NAME, module, context, &rule)?, rule.bound);
            if count > 0 {
                sink(module, bound);
            }
            Ok(count)
        };
        self.0.run(NAME, &[1, 2, 3, 4, 5, 6, 7, 8, 12, 16], module, context, &apply)
    }
}

/// Moves what was made for the rows of a cache to right before they are appended, so that keys are gone before there
/// are values. Each such node has one reader.
fn sink(module: &mut Module, bound: usize) {
    let graph = &module.graph;
    let mut chains: Vec<(NodeId, Vec<NodeId>)> = Vec::new();
    let mut moved = BTreeSet::new();
    for id in &graph.order {
        let node = &graph.nodes[*id];
        if !matches!(*node.op, Op::KvAppend(_)) {
            continue;
        }
        let mut chain = Vec::new();
        let mut operand = node.operands[1];
        while let Operand::Value(value) = operand
            && let Some(def) = graph.def_node(value).filter(|d| d.index() >= bound)
        {
            chain.push(def);
            operand = graph.nodes[def].operands[0];
        }
        chain.reverse();
        moved.extend(chain.iter().copied());
        chains.push((*id, chain));
    }
    let mut chains = chains.into_iter().peekable();
    let mut order = Vec::with_capacity(graph.order.len());
    for id in graph.order.iter().copied().filter(|id| !moved.contains(id)) {
        if let Some((_, chain)) = chains.next_if(|(append, _)| *append == id) {
            order.extend(chain);
        }
        order.push(id);
    }
    module.graph.order = order;
}

/// The rule for one number of parts.
struct Parts {
    parts: usize,
    panel: usize,
    /// Nodes from here on are the rule's own.
    bound: usize,
    names: RefCell<Option<WeightNames>>,
    /// What [`Rule::look`] found, for [`Rule::prepare`].
    found: RefCell<Option<Found>>,
}

enum Found {
    /// Keys or values get a matmul of their own.
    Rows(Box<Chain>),
    /// A layer in parts.
    Layer(Box<Site>),
}

impl Parts {
    fn new(module: &Module, context: &Context, parts: usize) -> Self {
        let bound = module.graph.nodes.bound();
        let (names, found) = (RefCell::new(None), RefCell::new(None));
        Parts { parts, panel: context.panel.max(1), bound, names, found }
    }

    /// The layer around the matmul `down`, which an attention may feed.
    fn around(
        &self,
        view: &View<'_>,
        down: NodeId,
        norm: Option<NodeId>,
    ) -> std::result::Result<Site, Option<String>> {
        let reshape = view.def(view.node(down).operands[0]).map(|(id, _)| id).ok_or(None)?;
        let attention = match *view.node(reshape).op {
            Op::Reshape(_) => view.def(view.node(reshape).operands[0]).map(|(id, _)| id).ok_or(None)?,
            _ => return Err(None),
        };
        if attention.index() >= self.bound || down.index() >= self.bound {
            return Err(None);
        }
        Site::of(view, attention, (reshape, down, norm), self.parts, self.panel)
    }

    /// The layer around an attention.
    fn behind(&self, view: &View<'_>, attention: NodeId) -> Option<Site> {
        let reshape = reader(view, view.node(attention))?;
        let down = reader(view, view.node(reshape))?;
        chunks::fused(view.node(down))?;
        let norm = reader(view, view.node(down)).filter(|norm| self.joined(view, down, *norm));
        self.around(view, down, norm).ok()
    }

    fn joined(&self, view: &View<'_>, down: NodeId, norm: NodeId) -> bool {
        norm.index() < self.bound && joins(view, down, norm)
    }

    /// Keys or values that end in `id`, go to the cache of an attention that falls into parts, and come out of one
    /// matmul with others.
    fn rows(&self, view: &View<'_>, id: NodeId) -> Option<Chain> {
        let append = reader(view, view.node(id))?;
        if id.index() >= self.bound || !matches!(*view.node(append).op, Op::KvAppend(_)) {
            return None;
        }
        let cache = *view.node(append).results.first()?;
        let attends = |n: &&NodeId| matches!(*view.node(**n).op, Op::PagedAttention(_));
        let attention = *view.users(cache).iter().find(attends)?;
        self.behind(view, attention)?;
        let chain = Chain::of(view, Operand::Value(view.node(id).results[0])).ok()?;
        (chain.product.1.segments.len() > 1).then_some(chain)
    }

    /// The matmul and what follows, for these rows of its weight, as `heads` heads.
    fn rebuild(
        pieces: &mut Pieces<'_>,
        patch: &mut Patch,
        chain: &Chain,
        weights: Vec<Operand>,
        heads: usize,
    ) -> From {
        let mut operands = vec![From::Old(chain.product.0.operands[0])];
        operands.extend(weights.into_iter().map(From::Old));
        let op = &chain.product.1;
        let rows = match operands.get(1) {
            Some(From::Old(Operand::Weight(w))) => pieces.module.weights[*w].ty.shape[0].as_const(),
            _ => None,
        };
        let segments = vec![rows.and_then(|n| usize::try_from(n).ok()).unwrap_or(0)];
        let mut last = patch.node(FusedMatmul { segments: segments.into(), ..op.clone() }, operands);
        for step in &chain.steps {
            let op = match &*step.op {
                Op::Reshape(reshape) => {
                    let mut shape = reshape.shape.clone();
                    shape[1] = Dim::from(heads);
                    Op::from(Reshape { shape })
                }
                other => (*other).clone(),
            };
            let rest = step.operands[1..].iter().copied().map(From::Old);
            last = patch.node(op, [From::New(last, 0)].into_iter().chain(rest));
        }
        From::New(last, 0)
    }

    /// Weight and bias of the rows that `chain` reads.
    fn own_rows(pieces: &mut Pieces<'_>, chain: &Chain) -> Vec<Operand> {
        let cut = |o: &Operand| match o {
            Operand::Weight(w) => Operand::Weight(pieces.cut(*w, chain.start, chain.len)),
            other => *other,
        };
        chain.product.0.operands[1..].iter().map(cut).collect()
    }

    fn build(&self, pieces: &mut Pieces<'_>, site: Site, patch: &mut Patch) {
        let Site { attention, kind, q, kv, mut down, reshape, heads, groups, .. } = site;
        let result = attention.results[0];
        let part_of = |pieces: &mut Pieces<'_>, chain: &Chain, groups: usize, part: usize| {
            let own = Self::own_rows(pieces, chain);
            let cut = |o: Operand| match o {
                Operand::Weight(w) => Operand::Weight(pieces.grouped(w, 0, groups, part)),
                other => other,
            };
            own.into_iter().map(cut).collect::<Vec<_>>()
        };
        if self.parts == 1 {
            let own = Self::own_rows(pieces, &q);
            let queries = Self::rebuild(pieces, patch, &q, own, heads);
            let rest = attention.operands[1..].iter().copied().map(From::Old);
            let made = patch.node(attention.op.clone(), [queries].into_iter().chain(rest));
            patch.replace(result, From::New(made, 0));
            return;
        }
        for part in 0..self.parts {
            let weights = part_of(pieces, &q, groups, part);
            let mut operands = vec![Self::rebuild(pieces, patch, &q, weights, heads / self.parts)];
            match (&kind, &kv) {
                (Kind::Packed { kv_heads }, Some(kv)) => {
                    for chain in kv.iter() {
                        let weights = part_of(pieces, chain, 1, part);
                        operands.push(Self::rebuild(pieces, patch, chain, weights, kv_heads / self.parts));
                    }
                }
                _ => operands.extend(attention.operands[1..3].iter().copied().map(From::Old)),
            }
            operands.extend(attention.operands[3..].iter().copied().map(From::Old));
            let made = patch.node(attention.op.clone(), operands);
            let mut shape = reshape.shape.clone();
            shape[1] = Dim::from(q.len / self.parts);
            let flat = patch.node(Reshape { shape }, [From::New(made, 0)]);
            let weight = match down.weight() {
                Operand::Weight(w) => Operand::Weight(pieces.grouped(w, 1, groups, part)),
                other => other,
            };
            down.add(patch, From::New(flat, 0), From::Old(weight));
        }
        down.finish(patch);
    }
}

impl Rule for Parts {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        let found = match &*node.op {
            Op::Matmul(_) => match scores::look(view, id, self.parts, self.bound) {
                Ok(patch) => return Outcome::Rewrite(patch),
                Err(reason) => Err(reason),
            },
            Op::FusedMatmul(_) => match reader(view, node) {
                Some(norm) if self.joined(view, id, norm) => Err(None),
                _ => self.around(view, id, None),
            },
            Op::AddNorm(_) => {
                let downs = node.operands[..2].iter().filter_map(|o| view.def(*o)).map(|(down, _)| down);
                let of =
                    downs.filter(|d| self.joined(view, *d, id) && reader(view, view.node(*d)) == Some(id));
                // The first layer that applies, or the first reason.
                of.map(|down| self.around(view, down, Some(id)))
                    .reduce(|a, b| a.or_else(|e| b.map_err(|f| e.or(f))))
                    .unwrap_or(Err(None))
            }
            Op::PagedAttention(_) if self.parts == 1 => self.behind(view, id).ok_or(None),
            _ => match self.rows(view, id) {
                Some(chain) => {
                    let patch = Patch::new(chain.nodes.iter().copied());
                    self.found.replace(Some(Found::Rows(Box::new(chain))));
                    return Outcome::Rewrite(patch);
                }
                None => Err(None),
            },
        };
        let anchor = self.parts > 1 || matches!(*node.op, Op::PagedAttention(_));
        match found {
            Ok(site) if anchor && site.applies(self.parts) => {
                let patch = Patch::new(site.sources(self.parts));
                self.found.replace(Some(Found::Layer(Box::new(site))));
                Outcome::Rewrite(patch)
            }
            Err(Some(reason)) => Outcome::Blocked(reason),
            _ => Outcome::NoMatch,
        }
    }

    fn prepare(&self, module: &mut Module, mut patch: Patch) -> Result<Patch> {
        let Some(found) = self.found.take() else { return Ok(patch) };
        let mut names = self.names.borrow_mut();
        let names = names.get_or_insert_with(|| WeightNames::of(module));
        let mut pieces = Pieces { module, names, parts: self.parts };
        match found {
            Found::Rows(chain) => {
                let own = Self::own_rows(&mut pieces, &chain);
                let made = Self::rebuild(&mut pieces, &mut patch, &chain, own, chain.heads);
                patch.replace(chain.end, made);
            }
            Found::Layer(site) => self.build(&mut pieces, *site, &mut patch),
        }
        Ok(patch)
    }
}
