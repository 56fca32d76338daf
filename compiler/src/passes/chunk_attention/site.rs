//! What `chunk-attention` has to know of an attention: where its operands come from, and where its result goes.

use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::ops::{FusedMatmul, Reshape};
use millrace_ir::{Dim, Node, NodeId, Op, Operand, ValueId};

use super::super::chunks::{Sum, blocked, constant, fused, reader};
use crate::rewrite::View;

type Found<T> = Result<T, Option<String>>;

fn whole(dim: &Dim) -> Option<usize> {
    dim.as_const().and_then(|n| usize::try_from(n).ok())
}

/// Queries, keys or values: some rows of a linear layer, cut into heads, with what is done to heads alone.
#[derive(Clone)]
pub(super) struct Chain {
    /// The linear layer.
    pub product: (Node, FusedMatmul),
    /// First row of its weight.
    pub start: usize,
    /// Number of rows.
    pub len: usize,
    /// What follows, a reshape first.
    pub steps: Vec<Node>,
    /// All nodes, the linear layer first.
    pub nodes: Vec<NodeId>,
    /// The value at the end.
    pub end: ValueId,
    /// Heads.
    pub heads: usize,
}

impl Chain {
    /// What leads to `operand`, or why that is no such chain.
    pub fn of(view: &View<'_>, operand: Operand) -> Found<Chain> {
        let Operand::Value(end) = operand else { return blocked("an operand of attention is constant") };
        let (mut steps, mut nodes) = (Vec::new(), Vec::new());
        let mut value = end;
        let (product, segment) = loop {
            let Some((id, index)) = view.def(Operand::Value(value)) else {
                return blocked("an operand of attention is an input");
            };
            if !view.used_once(value) {
                return blocked("queries, keys or values have other uses");
            }
            let node = view.node(id);
            nodes.push(id);
            let cuts = steps.last().is_some_and(|n: &Node| matches!(*n.op, Op::Reshape(_)));
            match (&*node.op, node.operands.first()) {
                (Op::FusedMatmul(_), _) if cuts => break (node, index),
                (Op::Reshape(_) | Op::Rope(_) | Op::RmsNorm(_), Some(Operand::Value(from))) if !cuts => {
                    steps.push(node.clone());
                    value = *from;
                }
                (op, _) => {
                    return blocked(format!(
                        "queries, keys or values come from `{}`, no linear layer",
                        op.name()
                    ));
                }
            }
        };
        steps.reverse();
        nodes.reverse();
        let Some(op) = fused(product) else { return Err(None) };
        if !op.plain() {
            return blocked("the weights are packed already");
        }
        if !matches!(op.epilogue[..], [] | [Epilogue::Bias]) {
            return blocked("the linear layer of queries, keys or values does more than bias");
        }
        if !constant(product, op) {
            return blocked("a weight or bias is computed");
        }
        let len = op.segments[segment];
        let heads = match &*steps[0].op {
            Op::Reshape(Reshape { shape })
                if shape.len() == 3 && view.ty(steps[0].operands[0]).rank() == 2 =>
            {
                let [heads, d] = [&shape[1], &shape[2]].map(|dim| whole(dim).unwrap_or(0));
                Some(heads).filter(|heads| *heads > 0 && heads * d == len)
            }
            _ => None,
        };
        let Some(heads) = heads else { return blocked("a reshape does more than cut rows into heads") };
        let start = op.segments[..segment].iter().sum();
        Ok(Chain { product: (product.clone(), op.clone()), start, len, steps, nodes, end, heads })
    }
}

/// What kind of attention it is.
pub(super) enum Kind {
    /// Over a paged cache.
    Paged,
    /// Over this step's own keys and values.
    Packed {
        /// Their heads.
        kv_heads: usize,
    },
}

/// An attention with everything that falls into parts with it.
pub(super) struct Site {
    pub attention: Node,
    pub kind: Kind,
    pub q: Chain,
    /// Keys and values, where they fall into parts as well.
    pub kv: Option<[Chain; 2]>,
    /// The matmul behind it.
    pub down: Sum,
    /// What lies between.
    pub reshape: Reshape,
    /// Query heads.
    pub heads: usize,
    /// Equal groups of heads of which every part takes its share.
    pub groups: usize,
    nodes: Vec<NodeId>,
}

impl Site {
    /// The site of an attention whose result goes through `reshape` into the matmul `down` and perhaps a norm.
    pub fn of(
        view: &View<'_>,
        attention: NodeId,
        (reshape_id, down, norm): (NodeId, NodeId, Option<NodeId>),
        parts: usize,
        panel: usize,
    ) -> Found<Site> {
        let node = view.node(attention);
        let heads_of = |operand: usize, axis: usize| whole(&view.ty(node.operands[operand]).shape[axis]);
        let (paged, kv_heads) = match &*node.op {
            Op::PagedAttention(_) => (true, heads_of(1, 2)),
            Op::Attention(_) => (false, heads_of(1, 1)),
            _ => return Err(None),
        };
        let (Some(heads), Some(kv_heads)) = (heads_of(0, 1), kv_heads.filter(|n| *n > 0)) else {
            return Err(None);
        };
        let between = view.node(reshape_id);
        if reader(view, node) != Some(reshape_id) || reader(view, between) != Some(down) {
            return blocked("the result of attention has other uses");
        }
        let Op::Reshape(reshape) = &*between.op else { return Err(None) };
        let q = Chain::of(view, node.operands[0])?;
        if reshape.shape.len() != 2 || reshape.shape[1] != Dim::from(q.len) {
            return blocked("a reshape does more than join heads");
        }
        let share = heads / kv_heads;
        if paged && !share.is_multiple_of(parts) {
            return blocked(format!(
                "the query heads of a key head, {share}, do not fall into {parts} parts"
            ));
        }
        if !paged && !kv_heads.is_multiple_of(parts) {
            return blocked(format!("{kv_heads} key heads do not fall into {parts} parts"));
        }
        let kv = match paged {
            true => None,
            false => Some([Chain::of(view, node.operands[1])?, Chain::of(view, node.operands[2])?]),
        };
        let chains = || std::iter::once(&q).chain(kv.iter().flatten());
        if let Some(odd) = chains().find(|c| parts > 1 && !c.len.is_multiple_of(parts * panel)) {
            return blocked(format!("{} rows do not fall into {parts} parts of {panel}-row panels", odd.len));
        }
        let down_sum = Sum::of(view, down, norm, "the matmul behind attention").map_err(Some)?;
        let mut nodes: Vec<NodeId> = chains().flat_map(|c| c.nodes.iter().copied()).collect();
        nodes.extend([attention, reshape_id, down].into_iter().chain(norm));
        let kind = if paged { Kind::Paged } else { Kind::Packed { kv_heads } };
        let (attention, reshape) = (node.clone(), reshape.clone());
        Ok(Site {
            attention,
            kind,
            q,
            kv,
            down: down_sum,
            reshape,
            heads,
            groups: if paged { kv_heads } else { 1 },
            nodes,
        })
    }

    /// Whether `parts` change anything.
    pub fn applies(&self, parts: usize) -> bool {
        parts > 1 || (matches!(self.kind, Kind::Paged) && self.q.product.1.segments.len() > 1)
    }

    /// The nodes that fall into parts.
    pub fn sources(&self, parts: usize) -> Vec<NodeId> {
        let count = if parts > 1 { self.nodes.len() } else { self.q.nodes.len() + 1 };
        self.nodes[..count].to_vec()
    }
}
