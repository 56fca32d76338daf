//! A region of elementwise operations and row reductions in one node:
//! `%2 = pointwise %0, %1 {body = [mul(i0, i1), silu(t0)], out = [t1], dtypes = [f32]}`.
//!
//! Operands broadcast to one shape, the *region's shape*; a *row* runs along its last axis. A step has a value per
//! element, or one *per row*: a reduction has, and so has every step whose sources all have. What is read per row
//! repeats along the row. A result is a value per element, or `row(t1)`, one per row, with last extent 1.
//!
//! The program is plain data: operands are inputs by position, `body` the instructions in order (each reads earlier
//! ones, so there are no cycles), [`Step::Reduce`] the reductions, and `out` says which values are results.
//! [`Pointwise::phases`] says what is per row and how often a row has to be visited.

use super::binary::BinaryFn;
use super::broadcasting::{broadcast_shapes, source_index};
use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits};
use super::reduce::ReduceFn;
use super::unary::UnaryFn;
use crate::attr::{Attr, AttrReader, Attrs, as_float};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::list::List;
use crate::tensor::{Tensor, round_to};
use crate::types::{Shape, TensorType};

/// What a step reads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Source {
    /// Operand `i3` of the node.
    Input(usize),
    /// Result `t2` of an earlier step.
    Step(usize),
    /// A number.
    Const(f64),
}

/// One operation of the region.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Function of one source.
    Unary(UnaryFn, Source),
    /// Function of two sources; comparisons give 1 or 0.
    Binary(BinaryFn, Source, Source),
    /// Second source where the first is not 0, else the third.
    Select(Source, Source, Source),
    /// Rounding to an element type, as a cast does.
    Cast(DType, Source),
    /// The source combined along the row; a source per row counts once for each element.
    Reduce(ReduceFn, Source),
}

/// A result of the region.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Out {
    /// What is stored.
    pub source: Source,
    /// One value per row, `row(t1)`: the last extent is 1. The source must be per row.
    pub per_row: bool,
}

impl Out {
    /// A result of the region's shape.
    pub const fn full(source: Source) -> Self {
        Out { source, per_row: false }
    }

    /// A result with one value per row.
    pub const fn row(source: Source) -> Self {
        Out { source, per_row: true }
    }
}

/// Steps over operands broadcast to one shape; see the module.
#[derive(Clone, Debug, PartialEq)]
pub struct Pointwise {
    /// Steps in order, at most [`Pointwise::MAX_STEPS`]; each may read earlier ones.
    pub body: List<Step>,
    /// What each result is; at most [`Pointwise::MAX_RESULTS`].
    pub out: List<Out>,
    /// Element type of each result.
    pub dtypes: List<DType>,
}

impl Source {
    fn attr(self) -> Attr {
        match self {
            Source::Input(i) => Attr::Word(format!("i{i}")),
            Source::Step(t) => Attr::Word(format!("t{t}")),
            Source::Const(c) => Attr::Float(c),
        }
    }

    fn parse(attr: &Attr) -> Result<Self, String> {
        if let Attr::Word(w) = attr {
            if let Some(index) = w.strip_prefix('i').and_then(|n| n.parse().ok()) {
                return Ok(Source::Input(index));
            }
            if let Some(index) = w.strip_prefix('t').and_then(|n| n.parse().ok()) {
                return Ok(Source::Step(index));
            }
        }
        as_float("body", attr).map(Source::Const)
    }
}

impl Step {
    fn attr(&self) -> Attr {
        let call = |name: &str, args: Vec<Attr>| Attr::Call(name.to_string(), args);
        match self {
            Step::Unary(f, a) => call(f.name(), vec![a.attr()]),
            Step::Binary(f, a, b) => call(f.name(), vec![a.attr(), b.attr()]),
            Step::Select(c, a, b) => call("select", vec![c.attr(), a.attr(), b.attr()]),
            Step::Cast(dtype, a) => call("cast", vec![a.attr(), Attr::from(*dtype)]),
            Step::Reduce(f, a) => call(f.name(), vec![a.attr()]),
        }
    }

    fn parse(attr: &Attr) -> Result<Self, String> {
        let Attr::Call(name, args) = attr else { return Err(format!("`{attr}` is no step")) };
        if let ("cast", [source, Attr::Word(dtype)]) = (name.as_str(), args.as_slice()) {
            let dtype = DType::parse(dtype).ok_or_else(|| format!("`{dtype}` is no element type"))?;
            return Ok(Step::Cast(dtype, Source::parse(source)?));
        }
        let sources = args.iter().map(Source::parse).collect::<Result<Vec<_>, _>>()?;
        match (name.as_str(), sources.as_slice()) {
            ("select", [c, a, b]) => Ok(Step::Select(*c, *a, *b)),
            (name, [a]) => UnaryFn::parse(name)
                .map(|f| Step::Unary(f, *a))
                .or_else(|| ReduceFn::parse(name).map(|f| Step::Reduce(f, *a)))
                .ok_or_else(|| format!("`{name}` is no step")),
            (name, [a, b]) => BinaryFn::parse(name)
                .map(|f| Step::Binary(f, *a, *b))
                .ok_or_else(|| format!("`{name}` is no step")),
            _ => Err(format!("`{attr}` is no step")),
        }
    }

    /// What the step reads.
    pub fn sources(&self) -> Vec<Source> {
        match self {
            Step::Unary(_, a) | Step::Cast(_, a) | Step::Reduce(_, a) => vec![*a],
            Step::Binary(_, a, b) => vec![*a, *b],
            Step::Select(c, a, b) => vec![*c, *a, *b],
        }
    }

    /// The step with every source replaced by `f(source)`.
    #[must_use]
    pub fn map(&self, f: impl Fn(Source) -> Source) -> Step {
        match self {
            Step::Unary(u, a) => Step::Unary(*u, f(*a)),
            Step::Cast(d, a) => Step::Cast(*d, f(*a)),
            Step::Reduce(r, a) => Step::Reduce(*r, f(*a)),
            Step::Binary(b, x, y) => Step::Binary(*b, f(*x), f(*y)),
            Step::Select(c, x, y) => Step::Select(f(*c), f(*x), f(*y)),
        }
    }
}

impl Out {
    fn attr(self) -> Attr {
        let source = self.source.attr();
        if self.per_row { Attr::Call("row".to_string(), vec![source]) } else { source }
    }

    fn parse(attr: &Attr) -> Result<Self, String> {
        match attr {
            Attr::Call(name, args) if name == "row" && args.len() == 1 => {
                Source::parse(&args[0]).map(Out::row)
            }
            Attr::Call(..) => Err(format!("`{attr}` is no result")),
            other => Source::parse(other).map(Out::full),
        }
    }
}

impl Pointwise {
    /// Most steps.
    pub const MAX_STEPS: usize = 256;
    /// Most operands.
    pub const MAX_OPERANDS: usize = 64;
    /// Most results.
    pub const MAX_RESULTS: usize = 16;

    /// A region of elementwise steps with results of its shape.
    pub fn elementwise(body: Vec<Step>, out: Vec<Source>, dtypes: Vec<DType>) -> Self {
        Pointwise { body: body.into(), out: out.into_iter().map(Out::full).collect(), dtypes: dtypes.into() }
    }

    /// The shape all operands broadcast to.
    pub fn shape(operands: &[TensorType]) -> Result<Shape, String> {
        operands.iter().try_fold(Shape::new(), |acc, ty| broadcast_shapes(&acc, &ty.shape))
    }

    /// Whether an operand of this shape has one value per row: no axis, or a last extent of 1.
    pub fn is_per_row(shape: &[Dim]) -> bool {
        shape.last().is_none_or(|d| d.as_const() == Some(1))
    }

    /// Whether the region has rows to be visited as a whole: reductions, or results per row.
    pub fn has_rows(&self) -> bool {
        self.body.iter().any(|s| matches!(s, Step::Reduce(..))) || self.out.iter().any(|o| o.per_row)
    }

    /// What every step and result reads.
    fn check_sources(&self, operands: usize) -> Result<(), String> {
        let known = |source: &Source, before: usize| match source {
            Source::Input(i) => *i < operands,
            Source::Step(t) => *t < before,
            Source::Const(_) => true,
        };
        for (at, step) in self.body.iter().enumerate() {
            if let Some(bad) = step.sources().iter().find(|s| !known(s, at)) {
                return Err(format!("step t{at} reads `{}`, which does not exist before it", bad.attr()));
            }
        }
        match self.out.iter().find(|o| !known(&o.source, self.body.len())) {
            Some(bad) => Err(format!("result `{}` does not exist", bad.attr())),
            None => Ok(()),
        }
    }
}

impl OpDef for Pointwise {
    const NAMES: &'static [&'static str] = &["pointwise"];

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("body", Attr::List(self.body.iter().map(Step::attr).collect()));
        attrs.set("out", Attr::List(self.out.iter().map(|o| o.attr()).collect()));
        attrs.set("dtypes", self.dtypes.clone());
        attrs
    }

    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        let body = attrs.list("body")?.iter().map(Step::parse).collect::<Result<_, _>>()?;
        let out = attrs.list("out")?.iter().map(Out::parse).collect::<Result<_, _>>()?;
        let dtypes = attrs
            .list("dtypes")?
            .iter()
            .map(|a| match a {
                Attr::Word(w) => DType::parse(w).ok_or_else(|| format!("`{w}` is no element type")),
                other => Err(format!("`{other}` is no element type")),
            })
            .collect::<Result<_, _>>()?;
        Ok(Pointwise { body, out, dtypes })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        for (what, count, most) in [
            ("steps", self.body.len(), Self::MAX_STEPS),
            ("operands", ctx.operands.len(), Self::MAX_OPERANDS),
            ("results", self.out.len(), Self::MAX_RESULTS),
        ] {
            if count > most {
                return Err(format!("has {count} {what}, at most {most} are allowed"));
            }
        }
        if self.out.is_empty() || self.out.len() != self.dtypes.len() {
            return Err("out and dtypes must name the same positive number of results".into());
        }
        self.check_sources(ctx.operands.len())?;
        let shape = Self::shape(ctx.operands)?;
        let mut row = shape.clone();
        match row.last_mut() {
            Some(last) => *last = Dim::from(1i64),
            None if self.has_rows() => return Err("has rows, but its operands have no axis".into()),
            None => {}
        }
        let inputs: Vec<bool> = ctx.operands.iter().map(|ty| Self::is_per_row(&ty.shape)).collect();
        let phases = self.phases(&inputs);
        if let Some(bad) = self.out.iter().find(|o| o.per_row && !phases.is_per_row(&o.source)) {
            return Err(format!("result `{}` has a value per element, not one per row", bad.attr()));
        }
        let typed = |(out, dtype): (&Out, &DType)| TensorType {
            dtype: *dtype,
            shape: if out.per_row { row.clone() } else { shape.clone() },
        };
        Ok(self.out.iter().zip(&self.dtypes).map(typed).collect())
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut results = (0..self.out.len()).map(|i| ctx.empty(i)).collect::<Result<Vec<_>, _>>()?;
        if results.iter().all(|r| r.data.is_empty()) {
            return Ok(results);
        }
        let shape = ctx.operands.iter().try_fold(Vec::new(), |acc, x| broadcast_extents(&acc, &x.shape))?;
        // The operands' types say what is per row; a last extent that happens to be 1 repeats just as well.
        let once: Vec<bool> = ctx.operands.iter().map(|x| x.shape.last().is_none_or(|n| *n == 1)).collect();
        let phases = self.phases(&once);
        let columns = shape.last().copied().unwrap_or(1);
        let leading = &shape[..shape.len().saturating_sub(1)];
        let rows = if leading.contains(&0) { 0 } else { leading.iter().product() };
        let row_shape: Vec<usize> = shape.last().map(|_| [leading, &[1]].concat()).unwrap_or_default();
        for row in 0..rows {
            // Each value has an element per column, or one.
            let mut inputs: Vec<Vec<f64>> = Vec::with_capacity(ctx.operands.len());
            for (x, per_row) in ctx.operands.iter().zip(&once) {
                inputs.push(if *per_row {
                    vec![x.data[source_index(row, &row_shape, &x.shape)]]
                } else {
                    let element = |c| x.data[source_index(row * columns + c, &shape, &x.shape)];
                    (0..columns).map(element).collect()
                });
            }
            let mut steps: Vec<Vec<f64>> = Vec::with_capacity(self.body.len());
            for (step, per_row) in self.body.iter().zip(&phases.per_row) {
                let read = |source: &Source, column: usize| read(source, column, &inputs, &steps);
                let element = |c: usize| match step {
                    Step::Unary(f, a) => f.apply(read(a, c)),
                    Step::Binary(f, a, b) => f.apply(read(a, c), read(b, c)),
                    Step::Select(x, a, b) => read(if read(x, c) != 0.0 { a } else { b }, c),
                    Step::Cast(dtype, a) => round_to(*dtype, read(a, c)),
                    Step::Reduce(f, a) => {
                        let total = (0..columns).fold(f.start(), |acc, c| f.combine(acc, read(a, c)));
                        if *f == ReduceFn::Mean { total / columns as f64 } else { total }
                    }
                };
                let count = if *per_row { 1 } else { columns };
                let values: Vec<f64> = (0..count).map(element).collect();
                steps.push(values);
            }
            for (result, out) in results.iter_mut().zip(&self.out) {
                let count = if out.per_row { 1 } else { columns };
                for c in 0..count {
                    result.data[row * count + c] = read(&out.source, c, &inputs, &steps);
                }
            }
        }
        Ok(results)
    }

    fn traits(&self) -> OpTraits {
        OpTraits {
            elementwise: !self.has_rows(),
            in_place: Some(0),
            fused_only: true,
            ..OpTraits::plain(Numerics::Accumulated)
        }
    }
}

/// A source in a column: what is per row has one element.
fn read(source: &Source, column: usize, inputs: &[Vec<f64>], steps: &[Vec<f64>]) -> f64 {
    let element = |values: &[f64]| if let [one] = values { *one } else { values[column] };
    match source {
        Source::Input(i) => element(&inputs[*i]),
        Source::Step(t) => element(&steps[*t]),
        Source::Const(c) => *c,
    }
}

/// Numpy broadcasting of extents.
fn broadcast_extents(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let rank = a.len().max(b.len());
    let at = |shape: &[usize], axis: usize| (axis + shape.len()).checked_sub(rank).map_or(1, |i| shape[i]);
    (0..rank)
        .map(|axis| match (at(a, axis), at(b, axis)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            (x, y) => Err(format!("extents {x} and {y} do not broadcast")),
        })
        .collect()
}
