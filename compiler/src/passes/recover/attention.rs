//! Attention of whole sequences.
//!
//! ```text
//! matmul(softmax(matmul(q, transpose(k)) * scale + mask), v)  ->  attention(q', k', v', seq_starts) {scale, ..}
//! ```
//!
//! `q [batch.., heads.., s, d]` becomes rows `q' [batch * s, heads, d]` of `batch` sequences of s rows; the movements
//! around it meet those of the model and vanish in `canonicalize`. Scale factors may stand at q, at k or at the
//! scores. Masks are causal or windows, as a select or a sum (see `mask`). Key heads may be fewer than query heads:
//! repeated by broadcast and reshape, or broadcast by the product.

use millrace_ir::ops::attention::Mask;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::{Attention, Binary, Cast, Concat, Iota, Matmul, Op, Reshape, Slice, Transpose};
use millrace_ir::types::{Shape, product};
use millrace_ir::{DType, Dim, Id, NodeId, Operand, TensorType, WeightExpr};

use super::{cast_result, mask, stored_as, widest};
use crate::pattern::{below_casts, constant};
use crate::rewrite::{From, Outcome, Patch, View};

/// Most nodes between the two products.
const CHAIN: usize = 16;

/// The scores between softmax and the first product.
struct Scores {
    nodes: Vec<NodeId>,
    product: NodeId,
    mask: Mask,
}

/// Looks for an attention that ends in this node.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let node = view.node(id);
    let Op::Matmul(outer) = &*node.op else { return Outcome::NoMatch };
    let (probabilities, mut nodes) = below_casts(view, node.operands[0]);
    let Some((softmax, 0)) = view.def(probabilities) else { return Outcome::NoMatch };
    match &*view.node(softmax).op {
        Op::Softmax(s) if s.axis + 1 == view.ty(probabilities).rank() => {}
        _ => return Outcome::NoMatch,
    }
    nodes.push(softmax);
    let scores = match scores(view, view.node(softmax).operands[0]) {
        Ok(Some(scores)) => scores,
        Ok(None) => return Outcome::NoMatch,
        Err(reason) => return Outcome::Blocked(format!("attention: {reason}")),
    };
    nodes.extend(&scores.nodes);
    for inner in &nodes {
        for value in &view.node(*inner).results {
            if !view.used_once(*value) {
                return Outcome::Blocked(format!("attention: {value} has other readers"));
            }
        }
    }
    nodes.push(id);
    rewrite(view, id, outer, &scores, nodes)
        .unwrap_or_else(|reason| Outcome::Blocked(format!("attention: {reason}")))
}

/// Walks from the operand of softmax down to a product of two values; `None` if there is no such way.
fn scores(view: &View<'_>, operand: Operand) -> Result<Option<Scores>, String> {
    let mut found = Scores { nodes: Vec::new(), product: NodeId::from_index(0), mask: mask::open() };
    let mut masks: Vec<Result<Mask, String>> = Vec::new();
    let (mut at, mut scale) = (operand, 1.0);
    for _ in 0..CHAIN {
        let (below, casts) = below_casts(view, at);
        found.nodes.extend(casts);
        let Some((id, 0)) = view.def(below) else { return Ok(None) };
        found.nodes.push(id);
        let node = view.node(id);
        at = match &*node.op {
            Op::Matmul(_) if matches!(node.operands[1], Operand::Value(_)) => {
                found.product = id;
                for mask in masks {
                    found.mask = mask::both(&found.mask, &mask?);
                }
                found.mask.scale = scale;
                return Ok(Some(found));
            }
            Op::Binary(Binary { function }) => {
                let (a, b) = (node.operands[0], node.operands[1]);
                match (function, constant(view, a), constant(view, b)) {
                    (BinaryFn::Mul, _, Some(factor)) => {
                        scale *= factor;
                        a
                    }
                    (BinaryFn::Mul, Some(factor), _) => {
                        scale *= factor;
                        b
                    }
                    (BinaryFn::Div, _, Some(divisor)) => {
                        scale /= divisor;
                        a
                    }
                    (BinaryFn::Add, ..) => {
                        let (score, added) = if leads_to_product(view, a) { (a, b) } else { (b, a) };
                        masks.push(mask::additive(view, added, scale));
                        score
                    }
                    _ => return Ok(None),
                }
            }
            Op::Select(_) => {
                let [truth, a, b] = node.operands[..] else { return Ok(None) };
                let (score, low, visible) = match (constant(view, a), constant(view, b)) {
                    (None, Some(low)) => (a, low, true),
                    (Some(low), None) => (b, low, false),
                    _ => return Ok(None),
                };
                masks.push(if low * scale <= mask::NEVER {
                    mask::condition(view, truth, visible, 8)
                } else {
                    Err(format!("the mask writes {low}, which is not low enough to mean never"))
                });
                score
            }
            _ => return Ok(None),
        };
    }
    Ok(None)
}

/// Whether first operands lead to a product: tells the scores from a mask.
fn leads_to_product(view: &View<'_>, operand: Operand) -> bool {
    let mut at = operand;
    for _ in 0..CHAIN {
        let Some((id, 0)) = view.def(at) else { return false };
        let node = view.node(id);
        at = match &*node.op {
            Op::Matmul(_) => return true,
            Op::Cast(_) => node.operands[0],
            Op::Select(_) if constant(view, node.operands[1]).is_some() => node.operands[2],
            Op::Select(_) => node.operands[1],
            Op::Binary(_) if constant(view, node.operands[0]).is_some() => node.operands[1],
            Op::Binary(_) => node.operands[0],
            _ => return false,
        };
    }
    false
}

/// Keys or values: where they come from and how they become `[lead.., s, d]`.
struct Source {
    operand: Operand,
    /// A reshape of `operand`, then a permutation of it, then the lead shape they have.
    reshape: Option<Shape>,
    perm: Vec<usize>,
    shape: Shape,
    /// Whether the heads, the last lead axis, are fewer than the operand has, each repeated in a row.
    grouped: bool,
}

/// `operand` as `[lead.., s, d]`; `turned` if it stands as `[lead.., d, s]`. Repeated heads are undone if `group`.
fn source(view: &View<'_>, operand: Operand, turned: bool, group: bool) -> Source {
    let mut at = below_casts(view, operand).0;
    let rank = view.ty(operand).rank();
    let mut perm: Vec<usize> = (0..rank).collect();
    if turned {
        perm.swap(rank - 2, rank - 1);
    }
    if let Some((id, _)) = view.def(at)
        && let Op::Transpose(transpose) = &*view.node(id).op
    {
        perm = perm.iter().map(|p| transpose.perm[*p]).collect();
        at = below_casts(view, view.node(id).operands[0]).0;
    }
    let plain = |at: Operand, perm: Vec<usize>| {
        let from = &view.ty(at).shape;
        let shape = perm.iter().map(|p| from[*p].clone()).collect();
        Source { operand: at, reshape: None, perm, shape, grouped: false }
    };
    let Some((heads, base, shape)) = repeated(view, at).filter(|_| group) else { return plain(at, perm) };
    // Only the axis before s counts heads.
    if rank < 3 || perm[rank - 3] != heads {
        return plain(at, perm);
    }
    let result = perm.iter().map(|p| shape[*p].clone()).collect();
    Source { operand: below_casts(view, base).0, reshape: Some(shape), perm, shape: result, grouped: true }
}

/// If each slice along an axis of `operand` is repeated some times in a row: the axis, what is repeated, and the
/// shape before the repetition.
fn repeated(view: &View<'_>, operand: Operand) -> Option<(usize, Operand, Shape)> {
    let (id, _) = view.def(operand)?;
    let node = view.node(id);
    let one = Dim::from(1i64);
    let to = &view.ty(operand).shape;
    let (broadcast, merged) = match *node.op {
        Op::Broadcast(_) => (id, false),
        Op::Reshape(_) => {
            let (below, _) = view.def(node.operands[0])?;
            matches!(*view.node(below).op, Op::Broadcast(_)).then_some((below, true))?
        }
        _ => return None,
    };
    let base = view.node(broadcast).operands[0];
    let (wide, narrow) =
        (&view.ty(Operand::Value(view.node(broadcast).results[0])).shape, &view.ty(base).shape);
    if wide.len() != narrow.len() {
        return None;
    }
    let mut grown = (0..wide.len()).filter(|axis| wide[*axis] != narrow[*axis]);
    let (axis, None) = (grown.next()?, grown.next()) else { return None };
    if narrow[axis] != one {
        return None;
    }
    if !merged {
        return Some((axis, base, narrow.clone()));
    }
    // [.., kv, 1, ..] -> [.., kv, group, ..] -> [.., kv * group, ..]
    let heads = axis.checked_sub(1)?;
    let mut expected = wide.clone();
    let group = expected.remove(axis);
    expected[heads] = expected[heads].mul(&group);
    let mut shape = narrow.clone();
    shape.remove(axis);
    (&expected == to).then_some((heads, base, shape))
}

/// A value times a constant: the value, its factor and the node.
fn unscaled(view: &View<'_>, operand: Operand) -> (Operand, f64) {
    let (below, _) = below_casts(view, operand);
    let Some((id, 0)) = view.def(below) else { return (operand, 1.0) };
    let node = view.node(id);
    let Op::Binary(Binary { function }) = *node.op else { return (operand, 1.0) };
    let (a, b) = (node.operands[0], node.operands[1]);
    let same = |o: Operand| view.ty(o).shape == view.ty(operand).shape;
    match (function, constant(view, a), constant(view, b)) {
        (BinaryFn::Mul, _, Some(factor)) if same(a) => (a, factor),
        (BinaryFn::Mul, Some(factor), _) if same(b) => (b, factor),
        (BinaryFn::Div, _, Some(divisor)) if same(a) => (a, divisor.recip()),
        _ => (operand, 1.0),
    }
}

fn rewrite(
    view: &View<'_>,
    id: NodeId,
    outer: &Matmul,
    scores: &Scores,
    mut nodes: Vec<NodeId>,
) -> Result<Outcome, String> {
    let result = view.node(id).results[0];
    let ty = &view.module.graph.values[result].ty;
    let inner = view.node(scores.product);
    let Op::Matmul(Matmul { transpose_b, .. }) = *inner.op else { return Ok(Outcome::NoMatch) };
    let (q, q_scale) = unscaled(view, inner.operands[0]);
    let (k, k_scale) = unscaled(view, inner.operands[1]);
    let v = view.node(id).operands[1];
    let rank = ty.rank();
    let lead = &ty.shape[..rank - 2];
    // Leading axes are sequences up to `split`, heads from there on.
    let split = match lead {
        [] => 0,
        [only] => usize::from(only.as_const().is_none()),
        _ => 1,
    };
    let queries = source(view, q, false, false);
    let sources = |group| [source(view, k, !transpose_b, group), source(view, v, outer.transpose_b, group)];
    let [mut keys, mut values] = sources(lead.len() == split + 1);
    if keys.grouped != values.grouped || keys.shape != values.shape {
        [keys, values] = sources(false);
    }
    let [rows, width] = [ty.shape[rank - 2].clone(), ty.shape[rank - 1].clone()];
    if queries.shape.len() != rank || queries.shape[..rank - 1] != ty.shape[..rank - 1] {
        return Err("the queries are broadcast".into());
    }
    if queries.shape[rank - 1] != width {
        return Err(format!("keys are {} wide, values {width}", queries.shape[rank - 1]));
    }
    let key_rows = &keys.shape[keys.shape.len() - 2];
    if key_rows != &rows {
        return Err(format!("{rows} queries and {key_rows} keys are no sequence of its own"));
    }
    if keys.shape != values.shape {
        return Err("keys and values have different heads".into());
    }
    let heads = product(&lead[split..]);
    if heads.as_const().is_none() {
        return Err(format!("the number of heads {heads} is not constant"));
    }
    if keys.shape.len() > rank {
        return Err("keys have more axes than queries".into());
    }
    let one = Dim::from(1i64);
    let key_lead: Shape = std::iter::repeat_n(&one, rank - keys.shape.len())
        .chain(&keys.shape[..keys.shape.len() - 2])
        .cloned()
        .collect();
    if key_lead[..split] != lead[..split] {
        return Err("several sequences share their keys".into());
    }
    let own = (split..lead.len()).take_while(|axis| key_lead[*axis] == lead[*axis]).count();
    if !keys.grouped && key_lead[split + own..].iter().any(|d| *d != one) {
        return Err("keys are shared by heads that are not neighbours".into());
    }
    let narrow = widest([&queries, &keys, &values].map(|s| view.ty(s.operand).dtype));
    let (target, replaced) = stored_as(view, result, narrow, &mut nodes);
    let dtype = widest([narrow, target]);
    let mut patch = Patch::new(nodes);
    let sequences = product(&lead[..split]);
    let packed = [queries, keys, values].map(|s| pack(view, &mut patch, s, &lead[..split], rank, dtype));
    let starts = seq_starts(&mut patch, &sequences, &rows);
    let mut mask = scores.mask.clone();
    mask.scale *= q_scale * k_scale;
    if !mask.scale.is_finite() {
        return Err(format!("the scale is {}", mask.scale));
    }
    let attention = patch.node(Attention { mask }, packed.into_iter().chain([starts]));
    // Back to [batch.., heads.., s, d].
    let mut shape: Shape = lead[..split].to_vec().into();
    shape.push(rows.clone());
    shape.extend(lead[split..].iter().cloned());
    shape.push(width);
    let mut back = patch.node(Reshape { shape }, [From::New(attention, 0)]);
    let mut perm: Vec<usize> = (0..split).collect();
    perm.extend(split + 1..rank - 1);
    perm.extend([split, rank - 1]);
    if !is_identity(&perm) {
        back = patch.node(Transpose { perm }, [From::New(back, 0)]);
    }
    let with = cast_result(&mut patch, back, dtype, target);
    patch.replace(replaced, with);
    Ok(Outcome::Rewrite(patch))
}

fn is_identity(perm: &[usize]) -> bool {
    perm.iter().enumerate().all(|(i, p)| i == *p)
}

/// `[batch.., heads.., s, d]` as rows `[batch * s, heads, d]`.
fn pack(
    view: &View<'_>,
    patch: &mut Patch,
    source: Source,
    batch: &[Dim],
    rank: usize,
    dtype: DType,
) -> From {
    let mut at = From::Old(source.operand);
    if view.ty(source.operand).dtype != dtype {
        at = From::New(patch.node(Cast { to: dtype }, [at]), 0);
    }
    if let Some(shape) = source.reshape {
        at = From::New(patch.node(Reshape { shape }, [at]), 0);
    }
    // Missing leading axes have extent 1 and are heads, or there is no batch.
    let own = source.shape.len();
    let split = batch.len().min(own.saturating_sub(2)).min(if own == rank { usize::MAX } else { 0 });
    let mut order: Vec<usize> = (0..split).collect();
    order.push(own - 2);
    order.extend(split..own - 2);
    order.push(own - 1);
    let perm: Vec<usize> = order.iter().map(|axis| source.perm[*axis]).collect();
    if !is_identity(&perm) {
        at = From::New(patch.node(Transpose { perm }, [at]), 0);
    }
    let [rows, width] = [&source.shape[own - 2], &source.shape[own - 1]];
    let heads = product(&source.shape[split..own - 2]);
    let shape = vec![product(batch).mul(rows), heads, width.clone()];
    From::New(patch.node(Reshape { shape: shape.into() }, [at]), 0)
}

/// `[0, s, 2 s, ..]` for `b` sequences of `s` rows.
pub(super) fn seq_starts(patch: &mut Patch, b: &Dim, s: &Dim) -> From {
    let one = Dim::from(1i64);
    let ends = b.add(&one);
    let count = b.as_const().filter(|count| (0..WeightExpr::DENSE_LIMIT as i64).contains(count));
    let multiples = |patch: &mut Patch, count: i64, rows: i64| {
        let values = (0..=count).map(|i| (i * rows) as f64).collect();
        let ty = TensorType::new(DType::I32, [Dim::from(count + 1)]);
        patch.weight(format!("seq_starts.{count}x{rows}"), ty, WeightExpr::Dense(values))
    };
    if let (Some(count), Some(rows)) = (count, s.as_const())
        && count.checked_mul(rows).is_some_and(|total| total <= i64::from(i32::MAX))
    {
        return multiples(patch, count, rows);
    }
    let iota = |shape: Dim| Iota { shape: vec![shape].into(), axis: 0, dtype: DType::I32 };
    let length = match s.as_const() {
        Some(rows) => {
            let ty = TensorType::new(DType::I32, [one]);
            patch.weight(format!("rows.{rows}"), ty, WeightExpr::Splat(rows as f64))
        }
        // The last coordinate of s + 1 is s.
        None => {
            let end = s.add(&one);
            let all = patch.node(iota(end.clone()), []);
            From::New(patch.node(Slice { axis: 0, start: s.clone(), end, step: 1 }, [From::New(all, 0)]), 0)
        }
    };
    if count == Some(1) {
        let ty = TensorType::new(DType::I32, [Dim::from(1i64)]);
        let zero = patch.weight("seq_starts.0", ty, WeightExpr::Splat(0.0));
        return From::New(patch.node(Concat { axis: 0 }, [zero, length]), 0);
    }
    let index = match count {
        Some(count) => multiples(patch, count, 1),
        None => From::New(patch.node(iota(ends), []), 0),
    };
    From::New(patch.node(Binary { function: BinaryFn::Mul }, [index, length]), 0)
}
