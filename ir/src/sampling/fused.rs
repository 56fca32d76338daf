//! Samples of the ops that passes make.

use super::Sample;
use super::contraction::eps;
use super::draft::{Draft, MOST, TAME};
use super::elementwise::{binary_range, unary_range};
use super::known::{Known, computes};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Operand, WeightExpr};
use crate::ops::add_norm::NormKind;
use crate::ops::binary::BinaryFn;
use crate::ops::fused_matmul::Epilogue;
use crate::ops::pointwise::{Source, Step};
use crate::ops::reduce::ReduceFn;
use crate::ops::unary::UnaryFn;
use crate::ops::{AddNorm, FusedMatmul, Op, Pointwise};
use crate::types::TensorType;

impl Sample for FusedMatmul {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let x = draft.float(1, -8.0, 8.0);
        let ty = draft.ty(x);
        let k = ty.last();
        k.as_const()?;
        let width = |draft: &mut Draft| draft.width().as_const().unwrap_or(1) as usize;
        let glu = draft.random.once_in(3);
        let first = width(draft);
        let segments = match (glu, draft.random.below(3)) {
            (true, _) => vec![first, first],
            (false, 0) => vec![first, width(draft), width(draft)],
            (false, _) => vec![first],
        };
        let rows: usize = segments.iter().sum();
        let plain = TensorType::new(ty.dtype, [Dim::from(rows), k.clone()]);
        let w = draft.weight(plain, -0.5, 0.5);
        let panel = draft.random.pick(&[0, 0, 32, 8]);
        let whole = matches!(w, Operand::Weight(_)) && k.as_const().is_some_and(|k| k % 8 == 0);
        let cores = panel == 0 && whole && draft.random.once_in(2);
        let weight = match w {
            Operand::Weight(of) if panel > 0 => {
                let panels: usize = segments.iter().map(|s| s.div_ceil(panel)).sum();
                let ty = TensorType::new(ty.dtype, [Dim::from(panels), k, Dim::from(panel)]);
                draft.add_weight(
                    ty,
                    WeightExpr::Pack { panel, segments: segments.clone().into(), of },
                    (-0.5, 0.5),
                )
            }
            Operand::Weight(of) if cores => {
                let panels: usize = segments.iter().map(|s| s.div_ceil(8)).sum();
                let (columns, eight) = (Dim::from(k.as_const().unwrap_or(0) / 8), Dim::from(8usize));
                let ty = TensorType::new(ty.dtype, [Dim::from(panels), columns, eight.clone(), eight]);
                let expr = WeightExpr::Cores { segments: segments.clone().into(), alternate: glu, of };
                draft.add_weight(ty, expr, (-0.5, 0.5))
            }
            other => other,
        };
        let mut operands = vec![x, weight];
        let mut epilogue = Vec::new();
        if draft.random.once_in(2) {
            epilogue.push(Epilogue::Bias);
            operands.push(draft.value(&TensorType::new(ty.dtype, [rows]), -1.0, 1.0));
        }
        if glu {
            epilogue.push(Epilogue::Glu(draft.random.pick(&Epilogue::ACTIVATIONS)));
        }
        for _ in 0..draft.random.below(3) {
            let step = match draft.random.below(3) {
                0 => Epilogue::Activation(draft.random.pick(&Epilogue::ACTIVATIONS)),
                1 => Epilogue::Residual,
                _ => Epilogue::Mul,
            };
            if step.has_operand() {
                if segments.len() > 1 && !glu {
                    continue;
                }
                let mut shape = ty.shape.clone();
                shape.pop();
                shape.push(Dim::from(first));
                operands.push(draft.value(&TensorType { dtype: ty.dtype, shape }, -2.0, 2.0));
            }
            epilogue.push(step);
        }
        let out = draft.random.once_in(8).then(|| draft.float_type());
        Some((
            FusedMatmul { segments: segments.into(), panel, cores, epilogue: epilogue.into(), out }.into(),
            operands,
        ))
    }

    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let k = operands[0].ty.last().as_const()? as f64;
        let mut bound = k * operands[0].bound() * operands[1].bound();
        let mut more = operands[2..].iter();
        for step in &self.epilogue {
            bound = match step {
                Epilogue::Bias | Epilogue::Residual => bound + more.next()?.bound(),
                Epilogue::Mul => bound * more.next()?.bound(),
                // No activation exceeds its operand or 1.
                Epilogue::Activation(_) => bound.max(1.0),
                Epilogue::Glu(_) => bound * bound.max(1.0),
            };
        }
        Some((-bound, bound))
    }
}

/// Functions without a jump or a pole.
const SMOOTH: [UnaryFn; 10] = [
    UnaryFn::Neg,
    UnaryFn::Abs,
    UnaryFn::Sigmoid,
    UnaryFn::Silu,
    UnaryFn::Tanh,
    UnaryFn::Gelu,
    UnaryFn::GeluTanh,
    UnaryFn::Relu,
    UnaryFn::Erf,
    UnaryFn::Sin,
];

impl Sample for Pointwise {
    fn sample(_: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let first = draft.tame(0);
        let ty = draft.ty(first);
        let mut operands = vec![first];
        for _ in 0..draft.random.below(3) {
            let shape = draft.broadcastable(&ty.shape);
            let dtype = if draft.random.once_in(4) { draft.float_type() } else { ty.dtype };
            operands.push(draft.value(&TensorType { dtype, shape: shape.into() }, -2.0, 2.0));
        }
        let steps = draft.random.between(1, 6);
        let reduces = !ty.shape.is_empty() && draft.random.once_in(2);
        let mut body: Vec<Step> = Vec::new();
        for at in 0..steps {
            let inputs = operands.len();
            let mut source = || match draft.random.below(5) {
                0 => Source::Const(draft.random.pick(&[0.5, -1.0, 2.0, 0.0])),
                1 | 2 if at > 0 => {
                    Source::Step(if draft.random.once_in(3) { draft.random.below(at) } else { at - 1 })
                }
                _ => Source::Input(draft.random.below(inputs)),
            };
            let (a, b, c) = (source(), source(), source());
            let step = match draft.random.below(if reduces { 11 } else { 8 }) {
                8.. => Step::Reduce(draft.random.pick(&ReduceFn::ALL), a),
                0..=2 => Step::Unary(draft.random.pick(&SMOOTH), a),
                3..=5 => {
                    let smooth = [BinaryFn::Add, BinaryFn::Sub, BinaryFn::Mul, BinaryFn::Max, BinaryFn::Min];
                    Step::Binary(draft.random.pick(&smooth), a, b)
                }
                6 => Step::Cast(draft.random.pick(&[DType::BF16, DType::F16, DType::F32]), a),
                _ => {
                    // A condition on an operand is exact; on a step it could jump.
                    let operand = Source::Input(draft.random.below(operands.len()));
                    let compare = draft.random.pick(&[BinaryFn::Lt, BinaryFn::Ge, BinaryFn::Ne]);
                    body.push(Step::Binary(compare, operand, Source::Const(0.25)));
                    Step::Select(Source::Step(body.len() - 1), b, c)
                }
            };
            // Sources counted steps before the comparison was added; they still exist.
            body.push(step);
        }
        let mut sources = vec![Source::Step(body.len() - 1)];
        for _ in 0..draft.random.below(4) / 2 {
            sources.push(Source::Step(draft.random.below(body.len())));
        }
        let mut region = Pointwise::elementwise(body, sources, Vec::new());
        let inputs: Vec<bool> = operands.iter().map(|o| Pointwise::is_per_row(&draft.ty(*o).shape)).collect();
        let phases = region.phases(&inputs);
        for out in &mut region.out {
            out.per_row = reduces && phases.is_per_row(&out.source) && !draft.random.once_in(3);
            region.dtypes.push(draft.float_type());
        }
        if region.out.len() == 2 && draft.random.once_in(2) {
            region.out.swap(0, 1);
        }
        Some((region.into(), operands))
    }

    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let mut known: Vec<(f64, f64, bool)> = Vec::new();
        // The longest row; symbols are small.
        let last = operands.iter().filter_map(|o| o.ty.shape.last());
        let longest = last.map(|d| d.as_const().unwrap_or(MOST as i64)).max().unwrap_or(1) as f64;
        for step in &self.body {
            let read = |source: &Source| match source {
                Source::Input(i) => (operands[*i].low, operands[*i].high, operands[*i].exact),
                Source::Step(t) => known[*t],
                Source::Const(c) => (*c, *c, true),
            };
            let range = match step {
                Step::Unary(f, a) => {
                    let (low, high, exact) = read(a);
                    let (low, high) = unary_range(*f, low, high, exact)?;
                    (low, high, false)
                }
                Step::Binary(f, a, b) => {
                    let (x, y) = (read(a), read(b));
                    let (low, high) = binary_range(*f, (x.0, x.1), (y.0, y.1), x.2 && y.2)?;
                    (low, high, f.compares())
                }
                Step::Select(c, a, b) => {
                    let (condition, x, y) = (read(c), read(a), read(b));
                    if !condition.2 {
                        return None;
                    }
                    (x.0.min(y.0), x.1.max(y.1), false)
                }
                Step::Cast(_, a) => {
                    let (low, high, _) = read(a);
                    (low, high, false)
                }
                Step::Reduce(ReduceFn::Sum, a) => {
                    let (low, high, _) = read(a);
                    (low.min(low * longest), high.max(high * longest), false)
                }
                Step::Reduce(_, a) => {
                    let (low, high, _) = read(a);
                    (low, high, false)
                }
            };
            if range.0.abs().max(range.1.abs()) > 1000.0 {
                return None;
            }
            known.push(range);
        }
        let low = known.iter().map(|k| k.0).fold(f64::INFINITY, f64::min);
        Some((low, known.iter().map(|k| k.1).fold(f64::NEG_INFINITY, f64::max)))
    }
}

impl Sample for AddNorm {
    fn sample(name: &str, draft: &mut Draft) -> Option<(Op, Vec<Operand>)> {
        let kind = if name == "add_rms_norm" { NormKind::Rms } else { NormKind::Layer };
        let x = draft.tame(1);
        let ty = draft.ty(x);
        if !computes(ty.dtype) {
            return None;
        }
        ty.last().as_const()?;
        let vector = TensorType::new(ty.dtype, [ty.last()]);
        let mut operands = vec![x, draft.value(&ty, -TAME, TAME), draft.value(&vector, -2.0, 2.0)];
        if kind == NormKind::Layer {
            operands.push(draft.value(&vector, -2.0, 2.0));
        }
        let eps = eps(draft, ty.dtype);
        Some((AddNorm { kind, eps, sum: draft.random.once_in(2) }.into(), operands))
    }

    fn range(&self, operands: &[Known]) -> Option<(f64, f64)> {
        let n = operands[0].ty.last().as_const()? as f64;
        let bias = operands.get(3).map_or(0.0, Known::bound);
        let normed = n.sqrt() * operands[2].bound() + bias;
        let bound = normed.max(operands[0].bound() + operands[1].bound());
        Some((-bound, bound))
    }
}
