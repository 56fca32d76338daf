//! Linear layer with everything a matmul kernel can do before it stores:
//! `%4, %5 = matmul.fused %0, @w, @b {segments = [512, 256], panel = 32, epilogue = [bias]}`.

use super::def::{
    EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_dim, need_float, need_rank, need_same_dtype,
};
use super::unary::UnaryFn;
use crate::attr::{Attr, AttrReader, Attrs};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::list::List;
use crate::tensor::Tensor;
use crate::types::TensorType;
use crate::weights::core_rows;

/// A step between the accumulators and the store. Steps run in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Adds an operand `[n]` over all segments.
    Bias,
    /// Applies an activation.
    Activation(UnaryFn),
    /// Adds an operand of the result's shape.
    Residual,
    /// Multiplies by an operand of the result's shape.
    Mul,
    /// With two equal segments `g` and `u`: one result `activation(g) * u`. Only `Bias` may stand before it.
    Glu(UnaryFn),
}

impl Epilogue {
    /// Whether the step reads an operand.
    pub fn has_operand(self) -> bool {
        matches!(self, Epilogue::Bias | Epilogue::Residual | Epilogue::Mul)
    }

    /// Activations that matmul kernels implement.
    pub const ACTIVATIONS: [UnaryFn; 6] =
        [UnaryFn::Silu, UnaryFn::Gelu, UnaryFn::GeluTanh, UnaryFn::Relu, UnaryFn::Tanh, UnaryFn::Sigmoid];

    fn attr(self) -> Attr {
        match self {
            Epilogue::Bias => "bias".into(),
            Epilogue::Residual => "residual".into(),
            Epilogue::Mul => "mul".into(),
            Epilogue::Activation(f) => f.name().into(),
            Epilogue::Glu(f) => Attr::Call("glu".into(), vec![f.name().into()]),
        }
    }

    fn parse(attr: &Attr) -> Result<Self, String> {
        let activation = |name: &str| {
            UnaryFn::parse(name)
                .filter(|f| Self::ACTIVATIONS.contains(f))
                .ok_or_else(|| format!("`{name}` is no epilogue"))
        };
        match attr {
            Attr::Word(w) if w == "bias" => Ok(Epilogue::Bias),
            Attr::Word(w) if w == "residual" => Ok(Epilogue::Residual),
            Attr::Word(w) if w == "mul" => Ok(Epilogue::Mul),
            Attr::Word(w) => activation(w).map(Epilogue::Activation),
            Attr::Call(name, args) => match (name.as_str(), args.as_slice()) {
                ("glu", [Attr::Word(f)]) => activation(f).map(Epilogue::Glu),
                _ => Err(format!("`{attr}` is no epilogue")),
            },
            other => Err(format!("`{other}` is no epilogue")),
        }
    }
}

/// `y = x w^T`, then the epilogue. `x [.., k]`; the weight is `[n, k]`, packed `[panels, k, panel]`, or in cores
/// `[panels, k / 8, 8, 8]` ([`crate::weights::core_rows`]); its rows fall into segments, and each segment is a result `[.., n_s]` (a gated epilogue makes one of two).
#[derive(Clone, Debug, PartialEq)]
pub struct FusedMatmul {
    /// Rows of each segment.
    pub segments: List<usize>,
    /// Rows per panel of a packed weight; 0 for a plain one.
    pub panel: usize,
    /// Whether the weight is in blocks of eight rows by eight columns; `panel` is then 0.
    pub cores: bool,
    /// Steps before the store; operands follow the weight in the order of the steps that need one.
    pub epilogue: List<Epilogue>,
    /// Element type of the results, if it differs from the operand's.
    pub out: Option<DType>,
}

impl FusedMatmul {
    /// The activation of a gated epilogue.
    pub fn glu(&self) -> Option<UnaryFn> {
        self.epilogue.iter().find_map(|e| match e {
            Epilogue::Glu(f) => Some(*f),
            _ => None,
        })
    }

    /// Extent of the last axis of each result.
    pub fn widths(&self) -> Vec<usize> {
        if self.glu().is_some() { self.segments[..1].to_vec() } else { self.segments.clone().to_vec() }
    }

    fn rows(&self) -> Option<usize> {
        self.segments.iter().try_fold(0usize, |acc, s| acc.checked_add(*s))
    }

    /// Whether the weight is neither packed nor in cores.
    pub fn plain(&self) -> bool {
        self.panel == 0 && !self.cores
    }

    /// The weight row that holds output `column` (over all segments) of the packed form: panel and lane.
    fn packed_at(&self, column: usize) -> (usize, usize) {
        let (mut rest, mut panel) = (column, 0);
        for segment in &self.segments {
            if rest < *segment {
                break;
            }
            rest -= segment;
            panel += segment.div_ceil(self.panel);
        }
        (panel + rest / self.panel, rest % self.panel)
    }
}

impl OpDef for FusedMatmul {
    const NAMES: &'static [&'static str] = &["matmul.fused"];

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("segments", self.segments.clone());
        attrs.set_unless("panel", self.panel, 0);
        attrs.set_unless("cores", self.cores, false);
        if !self.epilogue.is_empty() {
            attrs.set("epilogue", Attr::List(self.epilogue.iter().map(|e| e.attr()).collect()));
        }
        if let Some(dtype) = self.out {
            attrs.set("out", dtype);
        }
        attrs
    }

    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        let segments = attrs.usizes("segments")?;
        let panel = attrs.usize_or("panel", 0)?;
        let cores = attrs.flag("cores")?;
        if cores && panel != 0 {
            return Err("a weight in cores has no panel".into());
        }
        let epilogue = match attrs.take("epilogue") {
            None => Vec::new(),
            Some(Attr::List(items)) => items.iter().map(Epilogue::parse).collect::<Result<_, _>>()?,
            Some(other) => return Err(format!("epilogue must be a list, not `{other}`")),
        };
        let out = match attrs.take("out") {
            None => None,
            Some(Attr::Word(w)) => Some(DType::parse(w).ok_or_else(|| format!("`{w}` is no element type"))?),
            Some(other) => return Err(format!("out must be an element type, not `{other}`")),
        };
        Ok(FusedMatmul { segments: segments.into(), panel, cores, epilogue: epilogue.into(), out })
    }

    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        ctx.at_least(2)?;
        let (x, w) = (&ctx.operands[0], &ctx.operands[1]);
        need_float("operand 0", x)?;
        need_same_dtype(x, w)?;
        if x.rank() == 0 {
            return Err("operand 0 must have at least one axis".into());
        }
        let rows = self.rows().filter(|n| *n > 0).ok_or("segments must have a positive sum")?;
        if self.cores {
            need_rank("the weight in cores", w, 4)?;
            let panels = self.segments.iter().map(|s| s.div_ceil(8)).sum::<usize>();
            need_dim("the number of panels", &w.shape[0], &Dim::from(panels))?;
            need_dim("the rows of a core", &w.shape[2], &Dim::from(8usize))?;
            need_dim("the columns of a core", &w.shape[3], &Dim::from(8usize))?;
        } else if self.panel == 0 {
            need_rank("the weight", w, 2)?;
            need_dim("the weight's rows", &w.shape[0], &Dim::from(rows))?;
        } else {
            need_rank("the packed weight", w, 3)?;
            let panels = self.segments.iter().map(|s| s.div_ceil(self.panel)).sum::<usize>();
            need_dim("the number of panels", &w.shape[0], &Dim::from(panels))?;
            need_dim("the panel", &w.shape[2], &Dim::from(self.panel))?;
        }
        let columns = if self.cores { w.shape[1].mul(&Dim::from(8usize)) } else { w.shape[1].clone() };
        need_dim("the weight's columns", &columns, &x.last())?;
        if let Some(at) = self.epilogue.iter().position(|e| matches!(e, Epilogue::Glu(_))) {
            let equal = matches!(self.segments.as_slice(), [a, b] if a == b);
            if !equal || self.epilogue[..at].iter().any(|e| *e != Epilogue::Bias) {
                return Err("glu needs two equal segments and nothing but bias before it".into());
            }
            if self.epilogue[at + 1..].iter().any(|e| matches!(e, Epilogue::Glu(_) | Epilogue::Bias)) {
                return Err("neither bias nor a second glu may follow glu".into());
            }
        }
        let results: Vec<TensorType> = self
            .widths()
            .into_iter()
            .map(|n| {
                let mut shape = x.shape.clone();
                shape.pop();
                shape.push(Dim::from(n));
                TensorType { dtype: self.out.unwrap_or(x.dtype), shape }
            })
            .collect();
        if let Some(dtype) = self.out
            && !dtype.is_float()
        {
            return Err(format!("out must be a float type, not {dtype}"));
        }
        let mut operands = ctx.operands[2..].iter();
        for step in self.epilogue.iter().filter(|e| e.has_operand()) {
            let operand = operands.next().ok_or_else(|| format!("{step:?} lacks its operand"))?;
            need_same_dtype(x, operand)?;
            if *step == Epilogue::Bias {
                need_rank("the bias", operand, 1)?;
                need_dim("the bias", &operand.shape[0], &Dim::from(rows))?;
            } else if results.len() != 1 || operand.shape != results[0].shape {
                return Err(format!("{step:?} needs one result of the operand's shape, {operand}"));
            }
        }
        match operands.next() {
            None => Ok(results),
            Some(extra) => Err(format!("operand {extra} belongs to no epilogue step")),
        }
    }

    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let (x, w) = (ctx.operand(0)?, ctx.operand(1)?);
        let (k, n) = (x.last(), self.segments.iter().sum::<usize>());
        let rows = match x.elements().checked_div(k) {
            Some(rows) => rows,
            None => ctx.empty(0)?.elements() / ctx.empty(0)?.last().max(1),
        };
        let place = if self.cores { core_rows(&self.segments, self.glu().is_some()) } else { Vec::new() };
        let weight = |column: usize, i: usize| {
            if self.cores {
                let row = place[column];
                w.data[((row / 8 * (k / 8) + i / 8) * 8 + row % 8) * 8 + i % 8]
            } else if self.panel == 0 {
                w.data[column * k + i]
            } else {
                let (panel, lane) = self.packed_at(column);
                w.data[(panel * k + i) * self.panel + lane]
            }
        };
        let mut acc = vec![0.0; rows * n];
        for r in 0..rows {
            for c in 0..n {
                acc[r * n + c] = (0..k).map(|i| x.data[r * k + i] * weight(c, i)).sum();
            }
        }
        let mut width = n;
        let mut next = 2;
        for step in &self.epilogue {
            let operand = if step.has_operand() {
                next += 1;
                Some(ctx.operand(next - 1)?)
            } else {
                None
            };
            match (step, operand) {
                (Epilogue::Activation(f), _) => acc.iter_mut().for_each(|v| *v = f.apply(*v)),
                (Epilogue::Bias, Some(b)) => {
                    acc.iter_mut().enumerate().for_each(|(i, v)| *v += b.data[i % width]);
                }
                (Epilogue::Residual, Some(r)) => acc.iter_mut().zip(&r.data).for_each(|(v, r)| *v += r),
                (Epilogue::Mul, Some(m)) => acc.iter_mut().zip(&m.data).for_each(|(v, m)| *v *= m),
                (Epilogue::Glu(f), _) => {
                    let half = width / 2;
                    acc = (0..rows * half)
                        .map(|i| (i / half * width + i % half, half))
                        .map(|(at, half)| f.apply(acc[at]) * acc[at + half])
                        .collect();
                    width = half;
                }
                _ => return Err("an epilogue operand is missing".into()),
            }
        }
        let mut first = 0;
        let mut results = Vec::new();
        for (index, part) in self.widths().into_iter().enumerate() {
            let mut out = ctx.empty(index)?;
            for (i, v) in out.data.iter_mut().enumerate() {
                *v = acc[i / part * width + first + i % part];
            }
            first += part;
            results.push(out);
        }
        Ok(results)
    }

    fn traits(&self) -> OpTraits {
        // A tile of the result is stored after the same tile of the last residual was read.
        let last = self.epilogue.last() == Some(&Epilogue::Residual) && self.widths().len() == 1;
        let in_place = last.then(|| 1 + self.epilogue.iter().filter(|e| e.has_operand()).count());
        OpTraits { in_place, fused_only: true, ..OpTraits::plain(Numerics::Accumulated) }
    }
}
