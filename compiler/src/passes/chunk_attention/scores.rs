//! Attention that is written out: scores, what is done to them, a softmax, and the product with the values.

use millrace_ir::ops::{Concat, Slice};
use millrace_ir::{Dim, Id, Node, NodeId, Op, Operand, WeightExpr};

use super::super::chunks::blocked;
use crate::rewrite::{From, Patch, View};

type Found<T> = Result<T, Option<String>>;

/// Most nodes between the two products.
const LONGEST: usize = 32;

/// A block of everything along one axis of the scores.
struct Block {
    /// The axis, counted from the last.
    behind: usize,
    start: usize,
    len: usize,
}

impl Block {
    /// The block of an operand; the operand itself where it has no such axis or repeats along it.
    fn of(&self, view: &View<'_>, patch: &mut Patch, operand: Operand) -> From {
        let ty = view.ty(operand);
        let Some(axis) = ty.rank().checked_sub(self.behind) else { return From::Old(operand) };
        if ty.shape[axis] == Dim::from(1usize) {
            return From::Old(operand);
        }
        let (start, len) = (self.start, self.len);
        if let Operand::Weight(of) = operand {
            let mut ty = ty.clone();
            ty.shape[axis] = Dim::from(len);
            let name = format!("{}.block{start}-{}", view.module.weights[of].name, start + len);
            return patch.weight(name, ty, WeightExpr::Slice { axis, start, len, of });
        }
        let slice = Slice { axis, start: Dim::from(start), end: Dim::from(start + len), step: 1 };
        From::New(patch.node(slice, [From::Old(operand)]), 0)
    }
}

/// The nodes from the scores to the probabilities that `product` multiplies with the values, in order.
fn chain(view: &View<'_>, product: &Node) -> Found<Vec<(NodeId, usize)>> {
    let mut chain = Vec::new();
    let mut probabilities = false;
    let Operand::Value(mut value) = product.operands[0] else { return Err(None) };
    let shape = &view.ty(product.operands[0]).shape;
    loop {
        let found = view.def(Operand::Value(value)).filter(|(_, index)| *index == 0);
        let seen = probabilities || found.is_some_and(|(id, _)| matches!(*view.node(id).op, Op::Softmax(_)));
        let other = |reason: String| if seen { blocked(reason) } else { Err(None) };
        let Some((id, _)) = found else { return other("scores are no product".into()) };
        let node = view.node(id);
        if !view.used_once(value) {
            return other(format!("the result of `{}` has other uses", node.op.name()));
        }
        if &view.ty(Operand::Value(value)).shape != shape || node.results.len() != 1 || chain.len() > LONGEST
        {
            return other(format!("`{}` stands between scores and values", node.op.name()));
        }
        let path = match &*node.op {
            Op::Matmul(_) if probabilities => {
                chain.push((id, 0));
                chain.reverse();
                return Ok(chain);
            }
            Op::Softmax(op) if op.axis + 1 == shape.len() => {
                probabilities = true;
                Some(0)
            }
            Op::Unary(_) | Op::Binary(_) | Op::Cast(_) | Op::Select(_) | Op::Pointwise(_) => {
                node.operands.iter().position(|o| leads(view, *o, shape))
            }
            _ => None,
        };
        let Some((path, Operand::Value(from))) = path.map(|path| (path, node.operands[path])) else {
            return other(format!("`{}` stands between scores and values", node.op.name()));
        };
        chain.push((id, path));
        value = from;
    }
}

/// Whether an operand of the shape of the scores may come from them.
fn leads(view: &View<'_>, operand: Operand, shape: &[Dim]) -> bool {
    let Some((id, _)) = view.def(operand) else { return false };
    let Operand::Value(value) = operand else { return false };
    let op = &view.node(id).op;
    let elementwise =
        matches!(**op, Op::Unary(_) | Op::Binary(_) | Op::Cast(_) | Op::Select(_) | Op::Pointwise(_));
    (elementwise || matches!(**op, Op::Matmul(_) | Op::Softmax(_)))
        && view.used_once(value)
        && view.ty(operand).shape[..] == *shape
}

/// The attention that ends in the matmul `id`, in `parts` blocks.
pub(super) fn look(view: &View<'_>, id: NodeId, parts: usize, bound: usize) -> Found<Patch> {
    let product = view.node(id);
    if id.index() >= bound {
        return Err(None);
    }
    let chain = chain(view, product)?;
    if parts < 2 || chain.iter().any(|(id, _)| id.index() >= bound) {
        return Err(None);
    }
    let shape = view.ty(product.operands[0]).shape.clone();
    let rank = shape.len();
    if view.ty(Operand::Value(product.results[0])).rank() != rank {
        return blocked("the values have more axes than the scores");
    }
    let extent = |axis: usize| shape[axis].as_const().and_then(|n| usize::try_from(n).ok());
    let falls = |axis: &usize| extent(*axis).is_some_and(|n| n > 0 && n.is_multiple_of(parts));
    let Some(axis) = std::iter::once(rank - 2).chain(0..rank - 2).find(falls) else {
        return blocked(format!(
            "no axis but the last of {} falls into {parts} parts",
            view.ty(product.operands[0])
        ));
    };
    let len = extent(axis).unwrap_or(0) / parts;
    let mut patch = Patch::new(chain.iter().map(|(id, _)| *id).chain([id]));
    let mut results = Vec::new();
    for part in 0..parts {
        let block = Block { behind: rank - axis, start: part * len, len };
        // Along rows, the right operands of products are read whole.
        let right = |patch: &mut Patch, operand: Operand| match axis + 2 == rank {
            true => From::Old(operand),
            false => block.of(view, patch, operand),
        };
        let mut last = None;
        for (id, path) in &chain {
            let node = view.node(*id);
            let mut operands = Vec::new();
            for (at, operand) in node.operands.iter().enumerate() {
                operands.push(match last {
                    None if at == 1 => right(&mut patch, *operand),
                    Some(last) if at == *path => From::New(last, 0),
                    _ => block.of(view, &mut patch, *operand),
                });
            }
            last = Some(patch.node(node.op.clone(), operands));
        }
        let Some(last) = last else { return Err(None) };
        let values = right(&mut patch, product.operands[1]);
        let made = patch.node(product.op.clone(), [From::New(last, 0), values]);
        results.push(From::New(made, 0));
    }
    let joined = patch.node(Concat { axis }, results);
    patch.replace(product.results[0], From::New(joined, 0));
    Ok(patch)
}
