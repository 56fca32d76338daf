//! Packed sequences and paged caches: the arithmetic that `kv_append`, `paged_attention` and `attention` share.
//!
//! A step packs `t` tokens of `b` sequences without padding: sequence `s` owns the rows
//! `seq_starts[s] .. seq_starts[s + 1]`, `seq_starts[0] = 0`, `seq_starts[b] = t`. `kv_lens[s]` is the length of
//! the sequence after the step, so its row `r` has position `kv_lens[s] - (rows of s) + r`. Position `p` lives in
//! slot `p mod tokens_per_block` of page `block_table[s][p / tokens_per_block]`.

use super::def::{EvalCtx, need_dim, need_index, need_rank};
use crate::dim::Dim;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// One packed row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Sequence the row belongs to.
    pub sequence: usize,
    /// Position in the sequence.
    pub position: usize,
}

/// Values of the paging operands.
#[derive(Clone, Debug)]
pub struct Paging {
    /// Sequence and position of each packed row.
    pub tokens: Vec<Token>,
    tokens_per_block: usize,
    pages: usize,
    blocks: usize,
    table: Vec<f64>,
}

impl Paging {
    /// Checks the types of `seq_starts [b + 1]`, `kv_lens [b]` and `block_table [b, p]`.
    pub fn infer(
        seq_starts: &TensorType,
        kv_lens: &TensorType,
        block_table: &TensorType,
    ) -> Result<(), String> {
        for (what, ty, rank) in
            [("seq_starts", seq_starts, 1), ("kv_lens", kv_lens, 1), ("block_table", block_table, 2)]
        {
            need_index(what, ty)?;
            need_rank(what, ty, rank)?;
        }
        need_dim("seq_starts' extent", &seq_starts.shape[0], &kv_lens.shape[0].add(&Dim::from(1i64)))?;
        need_dim("block_table's rows", &block_table.shape[0], &kv_lens.shape[0])
    }

    /// Reads `seq_starts`, `kv_lens` and `block_table` from the operands at `first` for a cache of `state_shape`.
    pub fn read(ctx: &EvalCtx<'_>, first: usize, state_shape: &[usize], rows: usize) -> Result<Self, String> {
        let kv_lens = ctx.operand(first + 1)?;
        let table = ctx.operand(first + 2)?;
        let spans = sequences(ctx.operand(first)?, rows)?;
        let mut tokens = Vec::with_capacity(rows);
        for (sequence, (start, end)) in spans.into_iter().enumerate() {
            let length = index(kv_lens.data[sequence], "kv_lens")?;
            let past = length
                .checked_sub(end - start)
                .ok_or_else(|| format!("kv_lens[{sequence}] = {length} is shorter than the step"))?;
            tokens.extend((0..end - start).map(|r| Token { sequence, position: past + r }));
        }
        Ok(Paging {
            tokens,
            tokens_per_block: state_shape[1],
            pages: state_shape[0],
            blocks: table.last(),
            table: table.data.clone(),
        })
    }

    /// The cache slot (page times tokens per block plus offset) of a position.
    pub fn slot(&self, sequence: usize, position: usize) -> Result<usize, String> {
        let block = position / self.tokens_per_block.max(1);
        if block >= self.blocks {
            return Err(format!("position {position} of sequence {sequence} is beyond the block table"));
        }
        let page = index(self.table[sequence * self.blocks + block], "block_table")?;
        if page >= self.pages {
            return Err(format!("page {page} of sequence {sequence} does not exist"));
        }
        Ok(page * self.tokens_per_block + position % self.tokens_per_block)
    }
}

/// Row ranges of the sequences in `seq_starts`, checked against `rows`.
pub fn sequences(seq_starts: &Tensor, rows: usize) -> Result<Vec<(usize, usize)>, String> {
    let starts = seq_starts.data.iter().map(|v| index(*v, "seq_starts")).collect::<Result<Vec<_>, _>>()?;
    let valid = starts.first() == Some(&0)
        && starts.last() == Some(&rows)
        && starts.windows(2).all(|pair| pair[0] <= pair[1]);
    if !valid {
        return Err(format!("seq_starts {starts:?} must rise from 0 to the {rows} rows"));
    }
    Ok(starts.windows(2).map(|pair| (pair[0], pair[1])).collect())
}

fn index(value: f64, what: &str) -> Result<usize, String> {
    if value >= 0.0 && value <= (1u64 << 40) as f64 {
        Ok(value as usize)
    } else {
        Err(format!("{what} holds {value}, which is no index"))
    }
}
