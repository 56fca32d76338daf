//! A region of elementwise operations in one node:
//! `%2 = pointwise %0, %1 {body = [mul(i0, i1), silu(t0)], out = [t1]}`.

use super::binary::BinaryFn;
use super::broadcasting::{broadcast_shapes, source_index};
use super::def::{EvalCtx, InferCtx, Numerics, OpDef, OpTraits};
use super::unary::UnaryFn;
use crate::attr::{Attr, AttrReader, Attrs, as_float};
use crate::dtype::DType;
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
}

/// Elementwise steps over operands broadcast to one shape; each `out` source is a result.
#[derive(Clone, Debug, PartialEq)]
pub struct Pointwise {
    /// Steps in order; each may read earlier ones.
    pub body: Vec<Step>,
    /// What each result is.
    pub out: Vec<Source>,
    /// Element type of each result.
    pub dtypes: Vec<DType>,
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
            (name, [a]) => {
                UnaryFn::parse(name).map(|f| Step::Unary(f, *a)).ok_or_else(|| format!("`{name}` is no step"))
            }
            (name, [a, b]) => BinaryFn::parse(name)
                .map(|f| Step::Binary(f, *a, *b))
                .ok_or_else(|| format!("`{name}` is no step")),
            _ => Err(format!("`{attr}` is no step")),
        }
    }

    /// What the step reads.
    pub fn sources(&self) -> Vec<Source> {
        match self {
            Step::Unary(_, a) | Step::Cast(_, a) => vec![*a],
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
            Step::Binary(b, x, y) => Step::Binary(*b, f(*x), f(*y)),
            Step::Select(c, x, y) => Step::Select(f(*c), f(*x), f(*y)),
        }
    }
}

impl Pointwise {
    /// The shape all operands broadcast to.
    pub fn shape(operands: &[TensorType]) -> Result<Shape, String> {
        operands.iter().try_fold(Shape::new(), |acc, ty| broadcast_shapes(&acc, &ty.shape))
    }
}

impl OpDef for Pointwise {
    const NAMES: &'static [&'static str] = &["pointwise"];

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("body", Attr::List(self.body.iter().map(Step::attr).collect()));
        attrs.set("out", Attr::List(self.out.iter().map(|s| s.attr()).collect()));
        attrs.set("dtypes", self.dtypes.clone());
        attrs
    }

    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        let body = attrs.list("body")?.iter().map(Step::parse).collect::<Result<_, _>>()?;
        let out = attrs.list("out")?.iter().map(Source::parse).collect::<Result<_, _>>()?;
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
        let known = |source: &Source, before: usize| match source {
            Source::Input(i) => *i < ctx.operands.len(),
            Source::Step(t) => *t < before,
            Source::Const(_) => true,
        };
        for (at, step) in self.body.iter().enumerate() {
            if let Some(bad) = step.sources().iter().find(|s| !known(s, at)) {
                return Err(format!("step t{at} reads `{}`, which does not exist before it", bad.attr()));
            }
        }
        if self.out.is_empty() || self.out.len() != self.dtypes.len() {
            return Err("out and dtypes must name the same positive number of results".into());
        }
        if let Some(bad) = self.out.iter().find(|s| !known(s, self.body.len())) {
            return Err(format!("result `{}` does not exist", bad.attr()));
        }
        let shape = Self::shape(ctx.operands)?;
        Ok(self.dtypes.iter().map(|dtype| TensorType { dtype: *dtype, shape: shape.clone() }).collect())
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let mut results = (0..self.out.len()).map(|i| ctx.empty(i)).collect::<Result<Vec<_>, _>>()?;
        let shape = results[0].shape.clone();
        let mut steps = vec![0.0; self.body.len()];
        for at in 0..results[0].elements() {
            let inputs: Vec<f64> =
                ctx.operands.iter().map(|x| x.data[source_index(at, &shape, &x.shape)]).collect();
            let read = |source: &Source, steps: &[f64]| match source {
                Source::Input(i) => inputs[*i],
                Source::Step(t) => steps[*t],
                Source::Const(c) => *c,
            };
            for (t, step) in self.body.iter().enumerate() {
                steps[t] = match step {
                    Step::Unary(f, a) => f.apply(read(a, &steps)),
                    Step::Binary(f, a, b) => f.apply(read(a, &steps), read(b, &steps)),
                    Step::Select(c, a, b) => read(if read(c, &steps) != 0.0 { a } else { b }, &steps),
                    Step::Cast(dtype, a) => round_to(*dtype, read(a, &steps)),
                };
            }
            for (result, source) in results.iter_mut().zip(&self.out) {
                result.data[at] = read(source, &steps);
            }
        }
        Ok(results)
    }

    fn traits(&self) -> OpTraits {
        OpTraits {
            elementwise: true,
            in_place: Some(0),
            fused_only: true,
            ..OpTraits::plain(Numerics::Accumulated)
        }
    }
}
