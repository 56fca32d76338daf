//! A graph under construction, and where ops find their operands.

use std::collections::BTreeMap;

use super::case::{Fill, RandomGraph};
use super::known::{Known, computes, counts, index_bound};
use super::random::Random;
use crate::arena::Id;
use crate::builder::Builder;
use crate::dim::{Bindings, Dim, Sym};
use crate::dtype::DType;
use crate::graph::{Def, Module, NodeId, Operand, Output, Phase};
use crate::ops::{Numerics, Op};
use crate::types::TensorType;

/// Bound of values that ops like to read.
pub const TAME: f64 = 16.0;

/// Bound of all values: within `f16` with room for sums.
pub const LIMIT: f64 = 2000.0;

/// Most elements of a value at the symbols' upper bounds.
const ELEMENTS: u64 = 1500;

/// Upper bound of all symbols that shapes of values have, those of caches aside.
pub const MOST: u64 = 7;

/// Positions of a page.
pub const TOKENS_PER_BLOCK: usize = 4;

/// A cache and its present version.
struct Cache {
    version: Operand,
    known: Known,
}

/// See the module.
pub struct Draft {
    /// Where choices come from.
    pub random: Random,
    builder: Builder,
    phase: Phase,
    known: BTreeMap<Operand, Known>,
    pool: Vec<Operand>,
    fills: Vec<Fill>,
    nodes: usize,
    weights: usize,
    maxima: Bindings,
    anchored: Vec<Dim>,
    float: DType,
    paging: Option<[Operand; 3]>,
    caches: Vec<Cache>,
    /// What `$s` is a multiple of.
    multiple: u64,
}

impl Draft {
    /// A draft with one or two inputs.
    pub fn new(seed: u64, phase: Phase) -> Self {
        let mut random = Random::new(seed);
        let float = random.pick(&[DType::F32, DType::F32, DType::F32, DType::BF16, DType::BF16, DType::F16]);
        let mut draft = Draft {
            random,
            builder: Builder::new("random"),
            phase,
            known: BTreeMap::new(),
            pool: Vec::new(),
            fills: Vec::new(),
            nodes: 0,
            weights: 0,
            maxima: Bindings::new(),
            anchored: Vec::new(),
            float,
            paging: None,
            caches: Vec::new(),
            multiple: 1,
        };
        let (low, high) = (draft.random.between(1, 2) as u64, draft.random.between(4, 7) as u64);
        let t = draft.symbol("t", low, high, 4);
        let width = draft.width();
        draft.input(TensorType::new(float, [t, width]), Fill::Uniform(-1.5, 1.5));
        if draft.random.once_in(4) {
            let s = draft.symbol("s", 2, 6, 4);
            draft.multiple = 2;
            let width = draft.width();
            draft.input(TensorType::new(float, [s, width]), Fill::Uniform(-1.5, 1.5));
        }
        draft
    }

    /// Declares a symbol; an input of this extent has to follow.
    fn symbol(&mut self, name: &str, min: u64, max: u64, hint: u64) -> Dim {
        // The names are constants of this module, and the ranges are not empty.
        let dim = self.builder.dim(name, min, max, Some(hint)).unwrap_or_else(|_| Dim::from(1i64));
        if let Some(sym) = Sym::new(name) {
            self.maxima.set(sym, max);
        }
        dim
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    /// The phase of the module to be.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The element type most float values have; sometimes another one.
    pub fn float_type(&mut self) -> DType {
        if self.random.once_in(12) {
            self.random.pick(&[DType::F32, DType::BF16, DType::F16])
        } else {
            self.float
        }
    }

    /// `$t`, the number of packed rows.
    pub fn rows(&self) -> Dim {
        self.anchored[0].clone()
    }

    /// A constant extent: mostly small, sometimes wider than a panel or a vector.
    pub fn width(&mut self) -> Dim {
        Dim::from(self.random.pick(&[1usize, 2, 3, 4, 4, 6, 8, 8, 8, 12, 16, 17, 33, 40]))
    }

    /// An extent: a small constant or a symbol that an input binds.
    pub fn extent(&mut self) -> Dim {
        if self.random.once_in(3) {
            let at = self.random.below(self.anchored.len());
            self.anchored[at].clone()
        } else {
            Dim::from(self.random.pick(&[1usize, 2, 3, 4, 5, 8]))
        }
    }

    /// The extent at the symbols' upper bounds.
    pub fn most(&self, dim: &Dim) -> u64 {
        dim.extent(&self.maxima).unwrap_or(u64::MAX)
    }

    /// A random shape.
    pub fn shape(&mut self, rank: usize) -> Vec<Dim> {
        let mut shape: Vec<Dim> = (0..rank.saturating_sub(1)).map(|_| self.extent()).collect();
        if rank > 0 {
            let last = if self.random.once_in(4) { self.extent() } else { self.width() };
            shape.push(last);
        }
        // Now and then there are no elements.
        if rank > 0 && self.random.once_in(24) {
            let axis = self.random.below(rank);
            shape[axis] = Dim::from(0i64);
        }
        shape
    }

    /// What is known of an operand.
    pub fn known(&self, operand: Operand) -> &Known {
        &self.known[&operand]
    }

    /// Its type.
    pub fn ty(&self, operand: Operand) -> TensorType {
        self.known[&operand].ty.clone()
    }

    fn add(&mut self, operand: Operand, known: Known) {
        self.known.insert(operand, known);
        self.pool.push(operand);
    }

    /// A new graph input.
    pub fn input(&mut self, ty: TensorType, fill: Fill) -> Operand {
        for dim in &ty.shape {
            if dim.as_sym().is_some() && !self.anchored.contains(dim) {
                self.anchored.push(dim.clone());
            }
        }
        let operand = self.builder.input(&format!("x{}", self.fills.len()), ty.clone());
        let (low, high) = fill.range(&self.maxima);
        let below = if let Fill::Index(extent) = &fill { Some(extent.clone()) } else { None };
        self.add(operand, Known { ty, low, high, exact: true, below });
        self.fills.push(fill);
        operand
    }

    /// Registers a weight that the builder made.
    pub(super) fn add_weight(
        &mut self,
        ty: TensorType,
        expr: crate::graph::WeightExpr,
        range: (f64, f64),
    ) -> Operand {
        let name = format!("w{}", self.weights);
        self.weights += 1;
        let operand = self.builder.weight(&name, ty.clone(), expr);
        self.add(operand, Known { ty, low: range.0, high: range.1, exact: true, below: None });
        operand
    }

    /// A new input or weight with elements in `low..=high`.
    pub fn fresh(&mut self, ty: TensorType, low: f64, high: f64) -> Operand {
        if ty.const_shape().is_some() && self.random.once_in(2) {
            return self.weight(ty, low, high);
        }
        self.input(ty, Fill::Uniform(low, high))
    }

    /// A value for which `wanted` holds; later ones are preferred.
    pub fn find(&mut self, wanted: impl Fn(&Known) -> bool) -> Option<Operand> {
        let found: Vec<Operand> = self.pool.iter().copied().filter(|o| wanted(&self.known[o])).collect();
        if found.is_empty() {
            return None;
        }
        let at = self.random.below(found.len()).max(self.random.below(found.len()));
        Some(found[at])
    }

    /// A value of exactly this type with elements in `low..=high`, present or new.
    pub fn value(&mut self, ty: &TensorType, low: f64, high: f64) -> Operand {
        let found = if self.random.once_in(4) {
            None
        } else {
            self.find(|k| &k.ty == ty && k.low >= low && k.high <= high)
        };
        found.unwrap_or_else(|| self.fresh(ty.clone(), low.max(-2.0).min(high), high.min(2.0).max(low)))
    }

    /// A float value of at least this rank with elements in `low..=high`, present or new.
    pub fn float(&mut self, rank: usize, low: f64, high: f64) -> Operand {
        let found = if self.random.once_in(10) {
            None
        } else {
            self.find(|k| computes(k.ty.dtype) && k.ty.rank() >= rank && k.low >= low && k.high <= high)
        };
        found.unwrap_or_else(|| {
            let (dtype, more) = (self.float_type(), self.random.below(3));
            let shape = self.shape(rank + more);
            self.fresh(
                TensorType { dtype, shape: shape.into() },
                low.max(-2.0).min(high),
                high.min(2.0).max(low),
            )
        })
    }

    /// A tame float value.
    pub fn tame(&mut self, rank: usize) -> Operand {
        self.float(rank, -TAME, TAME)
    }

    /// An exact float or integer value, for ops that jump.
    pub fn exact(&mut self) -> Operand {
        let found = self.find(|k| k.exact && (computes(k.ty.dtype) || counts(k.ty.dtype)));
        match found {
            Some(operand) => operand,
            None => {
                let (dtype, rank) = (self.float_type(), self.random.below(3));
                let shape = self.shape(rank);
                self.fresh(TensorType { dtype, shape: shape.into() }, -2.0, 2.0)
            }
        }
    }

    /// A shape that broadcasts with `shape`: the same, fewer axes, or some of extent 1.
    pub fn broadcastable(&mut self, shape: &[Dim]) -> Vec<Dim> {
        match self.random.below(5) {
            0 | 1 => shape.to_vec(),
            2 => shape[self.random.below(shape.len() + 1)..].to_vec(),
            3 => shape.last().cloned().into_iter().collect(),
            _ => shape
                .iter()
                .map(|d| if self.random.once_in(2) { Dim::from(1i64) } else { d.clone() })
                .collect(),
        }
    }

    /// Indices of an axis of `extent`, of a random shape of `rank`.
    pub fn indices(&mut self, extent: &Dim, rank: usize) -> Operand {
        if !self.random.once_in(3)
            && let Some(found) = self.find(|k| {
                matches!(k.ty.dtype, DType::I32 | DType::I64) && k.ty.rank() == rank && k.indexes(extent)
            })
        {
            return found;
        }
        let dtype = self.random.pick(&[DType::I32, DType::I32, DType::I64]);
        // Nothing indexes an empty axis.
        let shape = match self.most(extent) {
            0 => vec![Dim::from(0i64); rank.max(1)],
            _ => (0..rank).map(|_| self.extent()).collect(),
        };
        self.input(TensorType { dtype, shape: shape.into() }, Fill::Index(extent.clone()))
    }

    /// `seq_starts`, `kv_lens` and `block_table` of the graph.
    pub fn paging(&mut self) -> [Operand; 3] {
        if let Some(paging) = self.paging {
            return paging;
        }
        let dtype = self.random.pick(&[DType::I32, DType::I32, DType::I32, DType::I64]);
        let b = self.symbol("b", 1, 3, 2);
        let p = self.symbol("p", 1, 2, 2);
        let starts = TensorType::new(dtype, [b.add(&Dim::from(1i64))]);
        let paging = [
            self.input(starts, Fill::SeqStarts),
            self.input(TensorType::new(dtype, [b.clone()]), Fill::KvLens),
            self.input(TensorType::new(dtype, [b, p]), Fill::BlockTable),
        ];
        self.paging = Some(paging);
        paging
    }

    /// A cache for `kv_heads` heads of `d`: its index for [`Draft::cache_version`].
    pub fn cache(&mut self, dtype: DType, kv_heads: usize, d: usize) -> usize {
        self.paging();
        let pages = match Sym::new("pages").filter(|s| self.maxima.get(*s).is_some()) {
            Some(sym) => Dim::from(sym),
            None => self.symbol("pages", 6, 12, 8),
        };
        let shape = [pages, TOKENS_PER_BLOCK.into(), kv_heads.into(), d.into()];
        let ty = TensorType::new(dtype, shape);
        let name = format!("cache{}", self.caches.len());
        let version = self.builder.state(&name, ty.clone());
        let known = Known { ty, low: -1.0, high: 1.0, exact: true, below: None };
        self.known.insert(version, known.clone());
        self.caches.push(Cache { version, known });
        self.caches.len() - 1
    }

    /// A cache for which `wanted` holds.
    pub fn find_cache(&mut self, wanted: impl Fn(&TensorType) -> bool) -> Option<usize> {
        let found: Vec<usize> =
            (0..self.caches.len()).filter(|i| wanted(&self.caches[*i].known.ty)).collect();
        (!found.is_empty()).then(|| self.random.pick(&found))
    }

    /// The present version of a cache.
    pub fn cache_version(&self, cache: usize) -> Operand {
        self.caches[cache].version
    }

    /// Samples an op spelled `name` and adds it; `None` if it does not fit.
    pub fn propose(&mut self, name: &str) -> Option<Vec<Operand>> {
        let (op, operands) = Op::sample(name, self)?;
        if op.traits().fused_only && self.phase < Phase::Fused {
            return None;
        }
        self.results(op, &operands)
    }

    /// Adds a node with one result.
    pub fn node(&mut self, op: impl Into<Op>, operands: &[Operand]) -> Option<Operand> {
        self.results(op, operands)?.first().copied()
    }

    /// Adds a node; `None` if it is ill typed, has no tame value, or is too large.
    pub fn results(&mut self, op: impl Into<Op>, operands: &[Operand]) -> Option<Vec<Operand>> {
        let op: Op = op.into();
        let known: Vec<Known> = operands.iter().map(|o| self.known[o].clone()).collect();
        let types: Vec<TensorType> = known.iter().map(|k| k.ty.clone()).collect();
        let inferred = op.infer(&types).ok()?;
        let large = |ty: &TensorType| self.most(&ty.elements()) > ELEMENTS;
        if inferred.iter().any(|ty| ty.rank() > 5 || large(ty)) {
            return None;
        }
        let (low, high) = op.range(&known)?;
        if !(low.abs() <= LIMIT && high.abs() <= LIMIT) {
            return None;
        }
        let traits = op.traits();
        let name = op.name();
        let exact_op = traits.numerics == Numerics::Exact
            || matches!(op, Op::Cast(_))
            || (!traits.fused_only && inferred.iter().all(|ty| counts(ty.dtype)));
        let exact = exact_op && known.iter().all(|k| k.exact);
        let below = index_bound(&op, &known, &inferred);
        let stem = self.random.pick(&["model.layers.0", "model.layers.1", "model", "block"]);
        let results = self.builder.node(op, operands, &format!("{stem}.{name}")).ok()?;
        self.nodes += 1;
        for (result, ty) in results.iter().zip(inferred) {
            // Integers saturate and floats round; neither leaves the bounds by more than an ulp.
            let known = Known { ty, low, high, exact, below: below.clone() };
            if traits.writes_state {
                self.known.insert(*result, known.clone());
                let old = self.caches.iter_mut().find(|c| Some(&c.version) == operands.first())?;
                *old = Cache { version: *result, known };
            } else {
                self.add(*result, known);
            }
        }
        Some(results)
    }

    /// Completes a module without outputs: its phase, and what symbols and inputs promise.
    fn dress(&self, module: &mut Module) {
        module.dims.iter_mut().filter(|d| d.sym.name() == "s").for_each(|d| d.multiple = self.multiple);
        module.phase = self.phase;
        if self.phase >= Phase::Fused {
            module.target = Some("cpu".to_string());
        }
        // Names of an importer instead of counters, for the inputs that the runtime's errors mention.
        for (fill, id) in self.fills.iter().zip(&module.graph.inputs) {
            if let (Some(name), Def::Input(spelled)) = (fill.name(), &mut module.graph.values[*id].def) {
                *spelled = name.to_string();
            }
        }
    }

    /// The module as far as it is, without outputs, with what its inputs hold.
    pub(super) fn open(mut self) -> RandomGraph {
        let mut module = std::mem::replace(&mut self.builder, Builder::new("")).finish();
        self.dress(&mut module);
        RandomGraph {
            seed: 0,
            module,
            fills: self.fills,
            output_bounds: Vec::new(),
            paged: self.paging.is_some(),
        }
    }

    /// Stands for a value that comes from elsewhere: an input of which nothing is exact.
    pub(super) fn stand_in(&mut self, ty: TensorType, low: f64, high: f64) -> Operand {
        let operand = self.input(ty, Fill::Uniform(low, high));
        self.known.entry(operand).and_modify(|k| k.exact = false);
        operand
    }

    /// Number of weights.
    pub(super) fn weights(&self) -> usize {
        self.weights
    }

    /// Offers nodes the values for which `wanted` holds, and no cache, from here on; returns what was offered.
    pub(super) fn offer(&mut self, mut wanted: impl FnMut(&mut Random, Operand) -> bool) -> Vec<Operand> {
        let before = self.pool.clone();
        self.pool.retain(|o| wanted(&mut self.random, *o));
        self.caches.clear();
        before
    }

    /// Offers these values as well.
    pub(super) fn offer_also(&mut self, more: &[Operand]) {
        self.pool.extend(more);
    }

    /// Names outputs and closes the draft: most values that nobody reads, and some others.
    pub fn finish(mut self, seed: u64) -> RandomGraph {
        let mut module = std::mem::replace(&mut self.builder, Builder::new("")).finish();
        let made: Vec<_> = module.graph.order.iter().map(|id| module.graph.nodes[*id].clone()).collect();
        let read = |o: &Operand| made.iter().any(|n| n.operands.contains(o));
        let mut chosen: Vec<Operand> = Vec::new();
        for node in made.iter().filter(|n| !n.op.traits().writes_state) {
            for result in &node.results {
                let operand = Operand::Value(*result);
                let odds = if read(&operand) { 10 } else { 1 };
                if self.random.once_in(odds) && !self.random.once_in(12) {
                    chosen.push(operand);
                }
            }
        }
        if chosen.is_empty() {
            // Values are never few: a draft begins with an input.
            chosen.extend(self.pool.iter().rev().find(|o| matches!(o, Operand::Value(_))));
        }
        if self.random.once_in(16) {
            // One value under two names, or an input handed through.
            let more =
                if self.random.once_in(2) { chosen[0] } else { Operand::Value(module.graph.inputs[0]) };
            chosen.push(more);
        }
        if !self.caches.is_empty() && self.random.once_in(8) {
            let at = self.random.below(self.caches.len());
            chosen.push(self.caches[at].version);
        }
        let mut output_bounds = Vec::new();
        for (n, operand) in chosen.into_iter().enumerate() {
            if let Operand::Value(value) = operand {
                module.graph.outputs.push(Output { name: format!("y{n}"), value });
                output_bounds.push((self.known[&operand].low, self.known[&operand].high));
            }
        }
        self.dress(&mut module);
        if self.random.once_in(2) {
            shuffle(&mut module, &mut self.random);
            module.compact();
        }
        RandomGraph { seed, module, fills: self.fills, output_bounds, paged: self.paging.is_some() }
    }
}

/// Another order in which operands come before their users. What reads or writes states keeps its order.
pub(super) fn shuffle(module: &mut Module, random: &mut Random) {
    let graph = &module.graph;
    let mut waits: Vec<Vec<NodeId>> = vec![Vec::new(); graph.nodes.bound()];
    let mut touched: Option<NodeId> = None;
    for id in &graph.order {
        let node = &graph.nodes[*id];
        let values = node.operands.iter().filter_map(|o| match o {
            Operand::Value(v) => graph.def_node(*v),
            _ => None,
        });
        waits[id.index()] = values.collect();
        if node.operands.iter().any(|o| module.state_of(*o).is_some()) {
            waits[id.index()].extend(touched);
            touched = Some(*id);
        }
    }
    let mut done = vec![false; graph.nodes.bound()];
    let mut rest = graph.order.clone();
    let mut order = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let ready: Vec<usize> =
            (0..rest.len()).filter(|at| waits[rest[*at].index()].iter().all(|n| done[n.index()])).collect();
        let id = rest.remove(random.pick(&ready));
        done[id.index()] = true;
        order.push(id);
    }
    module.graph.order = order;
}
