//! Elementwise nodes and reductions of rows become pointwise regions, and chains of them one region.
//!
//! ```text
//! mul(sigmoid(x), y)     ->  pointwise(x, y) {body = [sigmoid(i0), mul(t0, i1)], out = [t1]}
//! e = exp(x), neg(e), e  ->  pointwise(x) {body = [exp(i0), neg(t0)], out = [t1, t0]}
//! x / reduce_sum(abs(x)) ->  pointwise(x) {body = [abs(i0), reduce_sum(t0), div(i0, t1)], out = [t2]}
//! ```
//!
//! A region takes in what makes its operands. A value that is read elsewhere as well becomes a further result, unless it
//! is read before the region stands. Reductions run along the last axis; a row goes through the region while it is in
//! cache, so it must not be too long. A reduction with nothing to fuse stays as it is.
//!
//! Within a region values stay in f32; a cast rounds, the store rounds.

use millrace_ir::ops::pointwise::{Out, Source, Step};
use millrace_ir::ops::{Pointwise, Reshape};
use millrace_ir::types::Shape;
use millrace_ir::{Bindings, DType, Dim, NodeId, Op, Operand, Phase, TensorType, ValueId};

use super::rule_pass;
use crate::rewrite::{From, Outcome, Patch, Rule, View};

rule_pass!(
    /// See the module.
    FusePointwise,
    "fuse-pointwise",
    "turns elementwise nodes, reductions of rows and chains of them into pointwise regions",
    (Phase::Fused, Phase::Fused),
    None
);

/// Most steps of a region.
const STEPS: usize = 64;

/// Most operands of a region.
const OPERANDS: usize = 24;

/// Most results of a region.
const RESULTS: usize = 8;

/// Most bytes of f32 that a row with reductions may need at hand: half of a common second-level cache.
const ROW_BYTES: u64 = 1 << 20;

/// Nodes that are, or could be, one region.
#[derive(Clone)]
struct Part {
    region: Pointwise,
    operands: Vec<Operand>,
    /// What the operands broadcast to.
    shape: Shape,
    /// The value that each result stands for.
    results: Vec<ValueId>,
    /// The nodes.
    sources: Vec<NodeId>,
    /// Reshapes of results that stand before the region, and are made again behind it.
    reshapes: Vec<NodeId>,
}

/// Why nodes are no region, if they almost are.
type Reason = String;

fn computes(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16 | DType::Bool)
}

/// The shape of one value per row.
fn row_shape(shape: &Shape) -> Shape {
    let mut row = shape.clone();
    if let Some(last) = row.last_mut() {
        *last = Dim::from(1i64);
    }
    row
}

impl Part {
    /// The node as a region of its own, or the region it is.
    fn of(view: &View<'_>, id: NodeId) -> Option<Part> {
        let node = view.node(id);
        let input = Source::Input;
        let (body, per_row) = match &*node.op {
            Op::Pointwise(_) => (Vec::new(), false),
            Op::Unary(u) => (vec![Step::Unary(u.function, input(0))], false),
            Op::Binary(b) => (vec![Step::Binary(b.function, input(0), input(1))], false),
            Op::Select(_) => (vec![Step::Select(input(0), input(1), input(2))], false),
            Op::Cast(c) => (vec![Step::Cast(c.to, input(0))], false),
            Op::Reduce(r) if r.axes == [view.ty(node.operands[0]).rank() - 1] => {
                (vec![Step::Reduce(r.function, input(0))], true)
            }
            _ => return None,
        };
        let region = match &*node.op {
            Op::Pointwise(region) => region.clone(),
            _ => Pointwise {
                body: body.into(),
                out: vec![Out { source: Source::Step(0), per_row }].into(),
                dtypes: vec![view.module.graph.values[node.results[0]].ty.dtype].into(),
            },
        };
        let types: Vec<TensorType> = node.operands.iter().map(|o| view.ty(*o).clone()).collect();
        let shape = Pointwise::shape(&types).ok()?;
        let mut part = Part {
            region,
            operands: node.operands.to_vec(),
            shape,
            results: node.results.to_vec(),
            sources: vec![id],
            reshapes: Vec::new(),
        };
        part.list_each_operand_once();
        Some(part)
    }

    /// What makes an operand, as a region: a node of its own, or a reduction without its axis that is given it back.
    fn of_operand(view: &View<'_>, operand: Operand) -> Result<Option<Part>, Reason> {
        let Some((id, _)) = view.def(operand) else { return Ok(None) };
        let node = view.node(id);
        match &*node.op {
            Op::Reduce(_) => {
                let Some(part) = Part::of(view, id) else {
                    return Err("an operand reduces another axis than the last".into());
                };
                if part.drops_axis(view) {
                    return Err("an operand is a reduction without its axis".into());
                }
                Ok(Some(part))
            }
            Op::Reshape(Reshape { shape }) => {
                let Some((reduce, _)) = view.def(node.operands[0]) else { return Ok(None) };
                let Op::Reduce(_) = *view.node(reduce).op else { return Ok(None) };
                let Some(mut part) = Part::of(view, reduce) else { return Ok(None) };
                if shape != &row_shape(&part.shape) || !view.used_once(part.results[0]) {
                    return Ok(None);
                }
                part.results = node.results.to_vec();
                part.sources = vec![id, reduce];
                Ok(Some(part))
            }
            _ => Ok(Part::of(view, id)),
        }
    }

    /// Whether the value of a reduction has no last axis, while its region's result has one of extent 1.
    fn drops_axis(&self, view: &View<'_>) -> bool {
        let rank = |v: ValueId| view.module.graph.values[v].ty.rank();
        self.region.out[0].per_row && rank(self.results[0]) < self.shape.len()
    }

    fn reduces(&self) -> bool {
        self.region.body.iter().any(|s| matches!(s, Step::Reduce(..)))
    }

    fn computes(&self, view: &View<'_>) -> bool {
        let operands = self.operands.iter().map(|o| view.ty(*o).dtype);
        operands.chain(self.region.dtypes.iter().copied()).all(computes)
    }

    /// Renames inputs so that each operand stands once. What makes an operand is inlined for each place of it in the
    /// list, so a second place would compute it twice.
    fn list_each_operand_once(&mut self) {
        let mut list: Vec<Operand> = Vec::new();
        let mut index = Vec::with_capacity(self.operands.len());
        for operand in &self.operands {
            index.push(place(&mut list, *operand));
        }
        self.rename(|s| match s {
            Source::Input(i) => Source::Input(index[i]),
            other => other,
        });
        self.operands = list;
    }

    fn rename(&mut self, f: impl Fn(Source) -> Source) {
        self.region.body = self.region.body.iter().map(|s| s.map(&f)).collect();
        self.region.out.iter_mut().for_each(|o| o.source = f(o.source));
    }

    /// Takes what was computed with one value per row into a region of such rows.
    fn widen(&mut self, shape: &Shape) {
        self.region.out.iter_mut().for_each(|o| o.per_row = true);
        self.shape = shape.clone();
    }

    /// One region for this one and `inner`, which makes some of its operands; `kept` says which results of `inner`
    /// stay results. Both have one shape.
    fn with(&self, inner: &Part, kept: impl Fn(ValueId) -> bool) -> Part {
        let made = |o: &Operand| match o {
            Operand::Value(v) => inner.results.iter().position(|r| r == v),
            _ => None,
        };
        let mut operands: Vec<Operand> =
            self.operands.iter().copied().filter(|o| made(o).is_none()).collect();
        let inputs: Vec<usize> = inner.operands.iter().map(|o| place(&mut operands, *o)).collect();
        let shift = inner.region.body.len();
        let from_inner = |s: Source| match s {
            Source::Input(i) => Source::Input(inputs[i]),
            other => other,
        };
        // Operands that stay keep their order, so their places are counted.
        let from_whole: Vec<Source> = self
            .operands
            .iter()
            .map(|o| match made(o) {
                Some(result) => from_inner(inner.region.out[result].source),
                None => Source::Input(operands.iter().position(|p| p == o).unwrap_or(0)),
            })
            .collect();
        let outer = |s: Source| match s {
            Source::Input(i) => from_whole[i],
            Source::Step(t) => Source::Step(t + shift),
            constant => constant,
        };
        let mut body: Vec<Step> = inner.region.body.iter().map(|s| s.map(from_inner)).collect();
        body.extend(self.region.body.iter().map(|s| s.map(outer)));
        let outs = self.region.out.iter().map(|o| Out { source: outer(o.source), ..*o });
        let mut whole = Part {
            region: Pointwise { body: body.into(), out: outs.collect(), dtypes: self.region.dtypes.clone() },
            operands,
            shape: self.shape.clone(),
            results: self.results.clone(),
            sources: self.sources.iter().chain(&inner.sources).copied().collect(),
            reshapes: self.reshapes.iter().chain(&inner.reshapes).copied().collect(),
        };
        for ((value, out), dtype) in inner.results.iter().zip(&inner.region.out).zip(&inner.region.dtypes) {
            if kept(*value) {
                whole.region.out.push(Out { source: from_inner(out.source), ..*out });
                whole.region.dtypes.push(*dtype);
                whole.results.push(*value);
            }
        }
        whole
    }

    /// Lists first an operand that the first result may replace: of its type, and read by nobody else.
    fn list_replaceable_first(&mut self, view: &View<'_>) {
        let ty = &view.module.graph.values[self.results[0]].ty;
        let replaceable = |o: &Operand| match o {
            Operand::Value(v) => {
                let own = view.users(*v).iter().all(|u| self.sources.contains(u)) && !view.is_output(*v);
                own && view.def(*o).is_some() && view.ty(*o) == ty
            }
            _ => false,
        };
        let Some(first) = self.operands.iter().position(replaceable) else { return };
        self.operands[..=first].rotate_right(1);
        self.rename(|s| match s {
            Source::Input(i) if i == first => Source::Input(0),
            Source::Input(i) if i < first => Source::Input(i + 1),
            other => other,
        });
    }

    /// Whether the region stays within what a kernel should be given.
    fn fits(&self, view: &View<'_>) -> Result<(), Reason> {
        if self.region.body.len() > STEPS {
            return Err("the region would have too many steps".into());
        }
        if self.operands.len() > OPERANDS {
            return Err("the region would have too many operands".into());
        }
        if self.results.len() > RESULTS {
            return Err("the region would have too many results".into());
        }
        if !self.reduces() {
            return Ok(());
        }
        let inputs: Vec<bool> =
            self.operands.iter().map(|o| Pointwise::is_per_row(&view.ty(*o).shape)).collect();
        let values = self.region.phases(&inputs).row_values() as u64;
        let longest = self.shape.last().and_then(|n| n.extent(&Bindings::maxima(&view.module.dims)));
        match longest {
            Some(n) if n.saturating_mul(values * 4) <= ROW_BYTES => Ok(()),
            Some(n) => Err(format!("a row of {n} elements is too long to stay in cache")),
            None => Err("the length of a row has no bound".into()),
        }
    }
}

/// The place of `operand` in the list, which it joins if need be.
fn place(list: &mut Vec<Operand>, operand: Operand) -> usize {
    list.iter().position(|o| *o == operand).unwrap_or_else(|| {
        list.push(operand);
        list.len() - 1
    })
}

impl Rule for FusePointwise {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        if let Op::Reshape(_) = *node.op {
            return axis_and_back(view, id);
        }
        let Some(mut whole) = Part::of(view, id) else {
            return match *node.op {
                Op::Reduce(_) if feeds_on_region(view, node.operands[0]) => {
                    Outcome::Blocked("it reduces another axis than the last".into())
                }
                _ => Outcome::NoMatch,
            };
        };
        let (is_region, is_reduction) =
            (matches!(*node.op, Op::Pointwise(_)), matches!(*node.op, Op::Reduce(_)));
        if !whole.computes(view) {
            let silent = is_region || is_reduction;
            return if silent {
                Outcome::NoMatch
            } else {
                Outcome::Blocked("regions compute in floats".into())
            };
        }
        // A reduction alone has a kernel that shares long rows among threads.
        let mut grew = !is_region && !is_reduction;
        let mut declined = None;
        let mut at = 0;
        while let Some(operand) = whole.operands.get(at) {
            match absorb(view, &whole, *operand) {
                Ok(Some(bigger)) => {
                    whole = bigger;
                    grew = true;
                    at = 0;
                    continue;
                }
                Ok(None) => {}
                Err(reason) => declined = declined.or(Some(reason)),
            }
            at += 1;
        }
        if !grew {
            return declined.map_or(Outcome::NoMatch, Outcome::Blocked);
        }
        let drops_axis = is_reduction && whole.drops_axis(view);
        whole.list_replaceable_first(view);
        let mut patch = Patch::new(whole.sources.iter().chain(&whole.reshapes).copied());
        let new = patch.node(whole.region, whole.operands.into_iter().map(From::Old));
        for reshape in whole.reshapes {
            let node = view.node(reshape);
            let made = |v: &ValueId| Operand::Value(*v) == node.operands[0];
            if let Some(index) = whole.results.iter().position(made) {
                let again = patch.node(node.op.clone(), [From::New(new, index)]);
                patch.replace(node.results[0], From::New(again, 0));
            }
        }
        for (index, value) in whole.results.into_iter().enumerate() {
            let made = From::New(new, index);
            if index == 0 && drops_axis {
                let shape = view.module.graph.values[value].ty.shape.clone();
                let dropped = patch.node(Reshape { shape }, [made]);
                patch.replace(value, From::New(dropped, 0));
            } else {
                patch.replace(value, made);
            }
        }
        Outcome::Rewrite(patch)
    }
}

/// Whether a reduction of `operand` could have been part of the region that makes it.
fn feeds_on_region(view: &View<'_>, operand: Operand) -> bool {
    let part = view.def(operand).and_then(|(id, _)| Part::of(view, id));
    part.is_some_and(|part| part.computes(view))
}

/// A region's value per row that loses its last axis and gets it back.
fn axis_and_back(view: &View<'_>, id: NodeId) -> Outcome {
    let node = view.node(id);
    let found = view.def(node.operands[0]).and_then(|(inner, _)| {
        let inner = view.node(inner);
        let Op::Reshape(_) = *inner.op else { return None };
        let (made, _) = view.def(inner.operands[0])?;
        let same = view.ty(inner.operands[0]) == &view.module.graph.values[node.results[0]].ty;
        (same && matches!(*view.node(made).op, Op::Pointwise(_))).then_some(inner.operands[0])
    });
    let Some(operand) = found else { return Outcome::NoMatch };
    let mut patch = Patch::new([id]);
    patch.replace(node.results[0], From::Old(operand));
    Outcome::Rewrite(patch)
}

/// The region with what makes `operand` in it; `None` if nothing elementwise makes it, and the reason if it stays on
/// its own.
fn absorb(view: &View<'_>, whole: &Part, operand: Operand) -> Result<Option<Part>, Reason> {
    let Some(mut inner) = Part::of_operand(view, operand)? else { return Ok(None) };
    if !inner.computes(view) {
        return Err("an operand is computed from integers".into());
    }
    let inside = |user: &NodeId| whole.sources.contains(user) || inner.sources.contains(user);
    let outside =
        |value: ValueId| view.users(value).iter().filter(|u| !inside(u)).copied().collect::<Vec<_>>();
    // The region stands where its last node stood, behind which all other readers have to be. Reshapes follow it.
    let passed = |value: ValueId| outside(value).into_iter().filter(|u| view.passed(*u)).collect::<Vec<_>>();
    for user in inner.results.iter().flat_map(|v| passed(*v)).collect::<Vec<_>>() {
        let node = view.node(user);
        let follows = |u: &NodeId| !inside(u) && !view.passed(*u);
        if !matches!(*node.op, Op::Reshape(_)) || !view.users(node.results[0]).iter().all(follows) {
            return Err("an operand's region is read before this one".into());
        }
        if !whole.reshapes.contains(&user) {
            inner.reshapes.push(user);
        }
    }
    let kept: Vec<ValueId> =
        inner.results.iter().copied().filter(|v| view.is_output(*v) || !outside(*v).is_empty()).collect();
    let mut outer = None;
    if inner.shape != whole.shape {
        let reduces = whole.reduces() || inner.reduces();
        if row_shape(&inner.shape) == whole.shape && !whole.reduces() {
            let mut wide = whole.clone();
            wide.widen(&inner.shape);
            outer = Some(wide);
        } else if row_shape(&whole.shape) == inner.shape && !inner.reduces() && reduces {
            inner.widen(&whole.shape);
        } else {
            return Err("an operand's region has another shape".into());
        }
    }
    let bigger = outer.as_ref().unwrap_or(whole).with(&inner, |v| kept.contains(&v));
    bigger.fits(view)?;
    Ok(Some(bigger))
}
