//! What a node of one step cost, with the lengths its sequences really had.
//!
//! [`crate::cost`] knows only symbols: it takes sequences of a batch for equally long and caches for full. Where a step
//! was run, its lengths are known, and this module counts attention by them. All other ops cost what
//! [`crate::cost::node_cost`] says.

use crate::cost::{Cost, node_cost};
use crate::dim::{Bindings, Dim};
use crate::graph::*;
use crate::ops::Op;

/// A sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Rows of queries.
    pub queries: u64,
    /// Keys after the step; its queries are the last of them. Equal to `queries` without a cache.
    pub keys: u64,
}

impl Lengths {
    /// Pairs of a query and a key it sees. Query `i` stands at position `keys - queries + i`. With `causal` it sees
    /// the keys up to its own position, otherwise all; a `window` other than 0 cuts that to the last `window`
    /// positions up to its own (and, without `causal`, all behind it).
    fn pairs(self, causal: bool, window: u64) -> u64 {
        let first = self.keys.saturating_sub(self.queries);
        let seen = |position: u64| {
            let end = if causal { position + 1 } else { self.keys };
            let start = if window == 0 { 0 } else { (position + 1).saturating_sub(window) };
            end.saturating_sub(start)
        };
        (first..self.keys).fold(0u64, |sum, position| sum.saturating_add(seen(position)))
    }

    /// Keys that at least one query sees.
    fn touched(self, window: u64) -> u64 {
        if window == 0 { self.keys } else { self.keys.min(self.queries.saturating_add(window - 1)) }
    }
}

/// The cost of a node in a step over `sequences`. Attention: `4 d` operations (two products and two sums for each of
/// the `d` elements, scores and weighted sum) for each head and each visible pair of query and key; bytes are queries,
/// results, indices, and each visible key and value once a sequence. Without sequences, and for every other op, the
/// cost by `bindings` alone.
///
/// `None` where [`node_cost`] is `None`.
pub fn step_cost(module: &Module, id: NodeId, bindings: &Bindings, sequences: &[Lengths]) -> Option<Cost> {
    let cost = node_cost(module, id, bindings)?;
    let node = module.graph.nodes.get(id)?;
    let (causal, window) = match &*node.op {
        Op::Attention(op) => (op.mask.causal, op.mask.window),
        Op::PagedAttention(op) => (true, op.window),
        _ => return Some(cost),
    };
    if sequences.is_empty() {
        return Some(cost);
    }
    let window = window as u64;
    let ty = |index: usize| node.operands.get(index).map(|o| module.operand_type(*o));
    let at = |dim: &Dim| dim.extent(bindings);
    let (q, k) = (ty(0)?, ty(1)?);
    let (heads, d) = (at(q.shape.get(1)?)?, at(q.shape.get(2)?)?);
    let pairs = sequences.iter().fold(0u64, |sum, s| sum.saturating_add(s.pairs(causal, window)));
    let flops = pairs.saturating_mul(4).saturating_mul(heads).saturating_mul(d);
    // Keys are [.., kv_heads, d] with and without a cache.
    let kv_heads = at(k.shape.get(k.rank().checked_sub(2)?)?)?;
    let row = kv_heads.saturating_mul(d).saturating_mul(k.dtype.bits() as u64).div_ceil(8);
    let rows = sequences.iter().fold(0u64, |sum, s| sum.saturating_add(s.touched(window)));
    let mut read = rows.saturating_mul(row).saturating_mul(2);
    for index in std::iter::once(0).chain(3..node.operands.len()) {
        read = read.saturating_add(ty(index)?.bytes().extent(bindings)?);
    }
    Some(Cost { flops, read, written: cost.written })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::attention::Mask;
    use crate::text::parse;

    /// Pairs, counted with the mask that defines attention.
    fn counted(lengths: Lengths, mask: &Mask) -> u64 {
        let (queries, keys) = (lengths.queries as usize, lengths.keys as usize);
        (keys - queries..keys).map(|i| (0..keys).filter(|j| mask.sees(i, *j)).count() as u64).sum()
    }

    #[test]
    fn pairs_follow_the_mask() {
        for (queries, keys) in [(1, 1), (1, 9), (5, 5), (3, 8)] {
            for (causal, window) in [(false, 0), (true, 0), (true, 1), (true, 4), (true, 100), (false, 3)] {
                let lengths = Lengths { queries, keys };
                let mask = Mask { scale: 1.0, causal, window };
                let expected = counted(lengths, &mask);
                assert_eq!(lengths.pairs(causal, window as u64), expected, "{lengths:?} {mask:?}");
            }
        }
        // Queries at 5, 6, 7 with a window of 2 see 4 to 7.
        assert_eq!(Lengths { queries: 3, keys: 8 }.touched(2), 4);
        assert_eq!(Lengths { queries: 3, keys: 8 }.touched(0), 8);
        assert_eq!(Lengths { queries: 3, keys: 8 }.touched(100), 8);
    }

    #[test]
    fn attention_by_hand() {
        let module = parse(
            r#"module @m phase imported {
  dim $t in 1..=64
  dim $b in 1..=8
  dim $p in 1..=16
  state @k : bf16[100, 16, 2, 8]
  graph @main(%0 "q": bf16[$t, 4, 8], %1 "kv": bf16[$t, 4, 8], %2 "starts": i32[$b + 1], %3 "lens": i32[$b], %4 "table": i32[$b, $p]) -> ("a": bf16[$t, 4, 8], "o": bf16[$t, 4, 8], "e": bf16[$t, 4, 8]) {
    %5 = attention %0, %1, %1, %2 {scale = 0.5} : bf16[$t, 4, 8]
    %6 = paged_attention %0, @k, @k, %2, %3, %4 {scale = 0.5} : bf16[$t, 4, 8]
    %7 = exp %0 : bf16[$t, 4, 8]
    return %5, %6, %7
  }
}"#,
        )
        .unwrap();
        let mut bindings = Bindings::new();
        for (decl, value) in module.dims.iter().zip([5, 2, 3]) {
            bindings.set(decl.sym, value);
        }
        let cost = |index: usize, lengths: &[(u64, u64)]| {
            let lengths: Vec<Lengths> =
                lengths.iter().map(|(queries, keys)| Lengths { queries: *queries, keys: *keys }).collect();
            step_cost(&module, module.graph.order[index], &bindings, &lengths).unwrap()
        };
        let io = 5 * 4 * 8 * 2;
        // Sequences of 2 and 3: 4 + 9 pairs, 4 heads, 4 * 8 operations each; keys and values once each.
        let packed = cost(0, &[(2, 2), (3, 3)]);
        assert_eq!(packed, Cost { flops: 13 * 4 * 32, read: io + 2 * io + 3 * 4, written: io });
        // One token at 40 keys, four at 10: 40 + (7 + 8 + 9 + 10) pairs; 50 rows of 2 heads in each cache.
        let paged = cost(1, &[(1, 40), (4, 10)]);
        let indices = (3 + 2 + 6) * 4;
        assert_eq!(paged, Cost { flops: 74 * 4 * 32, read: io + indices + 2 * 50 * 2 * 8 * 2, written: io });
        let by_bindings = node_cost(&module, module.graph.order[0], &bindings);
        assert_eq!(Some(cost(0, &[])), by_bindings);
        assert_eq!(cost(2, &[(1, 40), (4, 10)]).flops, 5 * 32);
    }
}
