//! Elementwise nodes become pointwise regions, and chains of them one region.
//!
//! ```text
//! mul(sigmoid(x), y)  ->  pointwise(x, y) {body = [sigmoid(i0), mul(t0, i1)], out = [t1]}
//! ```
//!
//! Within a region values stay in f32; a cast rounds, the store rounds.

use millrace_ir::ops::Pointwise;
use millrace_ir::ops::pointwise::{Source, Step};
use millrace_ir::types::Shape;
use millrace_ir::{DType, Dim, NodeId, Op, Operand, Phase};

use super::rule_pass;
use crate::rewrite::{From, Outcome, Patch, Rule, View};

rule_pass!(
    /// See the module.
    FusePointwise,
    "fuse-pointwise",
    "turns elementwise nodes and chains of them into pointwise regions",
    (Phase::Fused, Phase::Fused),
    None
);

/// Most steps of a region.
const STEPS: usize = 64;

/// Whether a kernel can read an operand of `shape` within a result of `full`: all of it, one element, one row or
/// one column.
fn readable(shape: &[Dim], full: &Shape) -> bool {
    let one = Dim::from(1i64);
    let ones = shape.iter().take_while(|d| **d == one).count();
    let rest = &shape[ones..];
    let is_suffix = full.ends_with(rest) && (rest.len() <= 1 || rest.len() == full.len());
    let is_column = shape.len() == full.len()
        && shape.last() == Some(&one)
        && shape[..shape.len() - 1] == full[..full.len() - 1];
    is_suffix || is_column
}

fn computes(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

/// The node as a region of its own, or the region it is.
fn region(op: &Op, operands: usize, dtype: DType) -> Option<Pointwise> {
    let input = Source::Input;
    let body = match op {
        Op::Pointwise(p) => return Some(p.clone()),
        Op::Unary(u) => vec![Step::Unary(u.function, input(0))],
        Op::Binary(b) => vec![Step::Binary(b.function, input(0), input(1))],
        Op::Select(_) => vec![Step::Select(input(0), input(1), input(2))],
        Op::Cast(c) => vec![Step::Cast(c.to, input(0))],
        _ => return None,
    };
    debug_assert!(operands <= 3);
    Some(Pointwise { body, out: vec![Source::Step(0)], dtypes: vec![dtype] })
}

impl Rule for FusePointwise {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        let result = &view.module.graph.values[node.results[0]].ty;
        let Some(mut whole) = region(&node.op, node.operands.len(), result.dtype) else {
            return Outcome::NoMatch;
        };
        if whole.out.len() != 1 {
            return Outcome::NoMatch;
        }
        let stores = computes(result.dtype) || result.dtype == DType::Bool;
        let loads = |operand: &Operand| {
            let ty = view.ty(*operand);
            computes(ty.dtype) || ty.dtype == DType::Bool
        };
        if !stores || !node.operands.iter().all(loads) {
            return if matches!(node.op, Op::Pointwise(_)) {
                Outcome::NoMatch
            } else {
                Outcome::Blocked("regions compute in floats".into())
            };
        }
        if let Some(bad) = node.operands.iter().find(|o| !readable(&view.ty(**o).shape, &result.shape)) {
            return Outcome::Blocked(format!(
                "operand {} neither fills nor repeats by row or column",
                view.ty(*bad)
            ));
        }
        let mut operands = distinct(&mut whole, &node.operands);
        let mut sources = vec![id];
        let mut grew = !matches!(node.op, Op::Pointwise(_));
        let mut at = 0;
        let mut declined = None;
        while at < operands.len() {
            match absorb(view, &whole, &operands, at, &result.shape) {
                Absorbed::Grown(bigger, now, source) => {
                    (whole, operands) = (bigger, now);
                    sources.push(source);
                    grew = true;
                    at = 0;
                    continue;
                }
                Absorbed::Declined(reason) => declined = declined.or(Some(reason)),
                Absorbed::NoRegion => {}
            }
            at += 1;
        }
        if !grew {
            return declined.map_or(Outcome::NoMatch, |r| Outcome::Blocked(r.into()));
        }
        let mut patch = Patch::new(sources);
        let new = patch.node(whole, operands.into_iter().map(From::Old));
        patch.replace(node.results[0], From::New(new, 0));
        Outcome::Rewrite(patch)
    }
}

/// The operands, each once, with the region's inputs renamed to them. What makes an operand is inlined for each
/// place of it in the list, so a second place would compute it twice.
fn distinct(whole: &mut Pointwise, operands: &[Operand]) -> Vec<Operand> {
    let mut list: Vec<Operand> = Vec::new();
    let mut index = Vec::with_capacity(operands.len());
    for operand in operands {
        index.push(list.iter().position(|o| o == operand).unwrap_or_else(|| {
            list.push(*operand);
            list.len() - 1
        }));
    }
    let renamed = |s: Source| match s {
        Source::Input(i) => Source::Input(index[i]),
        other => other,
    };
    whole.body = whole.body.iter().map(|s| s.map(renamed)).collect();
    whole.out = whole.out.iter().map(|s| renamed(*s)).collect();
    list
}

/// What became of an operand.
enum Absorbed {
    /// The region with the producer in it, its operands, and the producer.
    Grown(Pointwise, Vec<Operand>, NodeId),
    /// The producer stays on its own, for this reason.
    Declined(&'static str),
    /// The producer is no elementwise node.
    NoRegion,
}

/// Inlines the producer of operand `at`, if it is a region of the same shape that nobody else reads.
fn absorb(view: &View<'_>, whole: &Pointwise, operands: &[Operand], at: usize, shape: &Shape) -> Absorbed {
    let (Operand::Value(value), Some((source, 0))) = (operands[at], view.def(operands[at])) else {
        return Absorbed::NoRegion;
    };
    let producer = view.node(source);
    let ty = view.ty(operands[at]);
    let Some(inner) = region(&producer.op, producer.operands.len(), ty.dtype) else {
        return Absorbed::NoRegion;
    };
    let floats = |dtype: DType| computes(dtype) || dtype == DType::Bool;
    let only_here = !view.is_output(value)
        && view.users(value).iter().all(|u| *u == view.users(value)[0])
        && !view.users(value).is_empty();
    if inner.out.len() != 1 || !only_here {
        return Absorbed::Declined("an operand's region has other uses");
    }
    if &ty.shape != shape {
        return Absorbed::Declined("an operand's region has another shape");
    }
    if !floats(ty.dtype) || !producer.operands.iter().all(|o| floats(view.ty(*o).dtype)) {
        return Absorbed::Declined("an operand is computed from integers");
    }
    if !producer.operands.iter().all(|o| readable(&view.ty(*o).shape, shape)) {
        return Absorbed::Declined("an operand of an operand neither fills nor repeats by row or column");
    }
    if inner.body.len() + whole.body.len() > STEPS {
        return Absorbed::Declined("the region would have too many steps");
    }
    // New operand list: the old ones without `at`, then the producer's that are not there yet.
    let mut list: Vec<Operand> =
        operands.iter().enumerate().filter(|(i, _)| *i != at).map(|(_, o)| *o).collect();
    let mut place = |operand: Operand| {
        list.iter().position(|o| *o == operand).unwrap_or_else(|| {
            list.push(operand);
            list.len() - 1
        })
    };
    let inner_inputs: Vec<usize> = producer.operands.iter().map(|o| place(*o)).collect();
    let shift = inner.body.len();
    let from_inner = |s: Source| match s {
        Source::Input(i) => Source::Input(inner_inputs[i]),
        other => other,
    };
    let value_of = from_inner(inner.out[0]);
    let from_whole = |s: Source| match s {
        Source::Input(i) if i == at => value_of,
        Source::Input(i) => Source::Input(if i > at { i - 1 } else { i }),
        Source::Step(t) => Source::Step(t + shift),
        constant => constant,
    };
    let mut body: Vec<Step> = inner.body.iter().map(|s| s.map(from_inner)).collect();
    body.extend(whole.body.iter().map(|s| s.map(from_whole)));
    let out = whole.out.iter().map(|s| from_whole(*s)).collect();
    Absorbed::Grown(Pointwise { body, out, dtypes: whole.dtypes.clone() }, list, source)
}
