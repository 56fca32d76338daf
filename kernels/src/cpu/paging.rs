//! Packed sequences and paged caches, checked before any kernel reads through them.

use millrace_ir::{Error, Kind, Result};

/// The index operands of paged kernels; see `millrace_ir::ops::paging` for their meaning.
#[derive(Clone, Copy, Debug)]
pub struct Paging<'a> {
    /// `[b + 1]`, rising from 0 to the number of rows.
    pub seq_starts: &'a [i32],
    /// `[b]`, lengths after this step.
    pub kv_lens: &'a [i32],
    /// `[b, blocks]`
    pub block_table: &'a [i32],
    /// Slots of one page.
    pub tokens_per_block: usize,
    /// Pages of the cache.
    pub pages: usize,
}

fn bad(message: String) -> Error {
    Error::new(Kind::BadInput, "run/bad-index", message)
}

/// Row ranges of packed sequences.
///
/// # Errors
/// `run/bad-index` unless `seq_starts` rises from 0 to `rows`.
pub fn spans(seq_starts: &[i32], rows: usize) -> Result<Vec<(usize, usize)>> {
    let valid = seq_starts.first() == Some(&0)
        && seq_starts.last().and_then(|l| usize::try_from(*l).ok()) == Some(rows)
        && seq_starts.windows(2).all(|w| w[0] <= w[1]);
    if !valid {
        return Err(bad(format!("seq_starts must rise from 0 to the {rows} rows")));
    }
    Ok(seq_starts.windows(2).map(|w| (w[0] as usize, w[1] as usize)).collect())
}

impl Paging<'_> {
    /// For each sequence its first row, one past its last row, and its length before this step.
    ///
    /// # Errors
    /// `run/bad-index` if a length, a page or the table's width does not fit.
    pub fn sequences(&self, rows: usize) -> Result<Vec<(usize, usize, usize)>> {
        let spans = spans(self.seq_starts, rows)?;
        if self.kv_lens.len() != spans.len() || self.tokens_per_block == 0 {
            return Err(bad(format!("{} lengths for {} sequences", self.kv_lens.len(), spans.len())));
        }
        let blocks = self.blocks();
        let mut sequences = Vec::with_capacity(spans.len());
        for (s, (start, end)) in spans.into_iter().enumerate() {
            let length = usize::try_from(self.kv_lens[s]).unwrap_or(0);
            let past = length
                .checked_sub(end - start)
                .ok_or_else(|| bad(format!("kv_lens[{s}] = {length} is shorter than the step")))?;
            let needed = length.div_ceil(self.tokens_per_block);
            if needed > blocks {
                return Err(bad(format!(
                    "sequence {s} of {length} tokens needs {needed} blocks, the table has {blocks}"
                )));
            }
            let table = &self.block_table[s * blocks..s * blocks + needed];
            if let Some(page) =
                table.iter().find(|p| usize::try_from(**p).is_ok_and(|p| p >= self.pages) || **p < 0)
            {
                return Err(bad(format!("page {page} of sequence {s} does not exist")));
            }
            sequences.push((start, end, past));
        }
        Ok(sequences)
    }

    /// Columns of the block table.
    pub fn blocks(&self) -> usize {
        self.block_table.len().checked_div(self.kv_lens.len()).unwrap_or(0)
    }

    /// The cache slot of a position; valid after [`Paging::sequences`].
    #[inline(always)]
    pub fn slot(&self, sequence: usize, position: usize) -> usize {
        let page = self.block_table[sequence * self.blocks() + position / self.tokens_per_block];
        page as usize * self.tokens_per_block + position % self.tokens_per_block
    }
}

/// Writes rows `x [t, width]` to their slots of the cache `state [pages, tokens_per_block, width]`.
///
/// # Errors
/// As [`Paging::sequences`].
pub fn kv_append<T: Copy>(state: &mut [T], x: &[T], width: usize, paging: &Paging<'_>) -> Result<()> {
    let rows = x.len().checked_div(width).unwrap_or(0);
    for (s, (start, end, past)) in paging.sequences(rows)?.into_iter().enumerate() {
        for row in start..end {
            let slot = paging.slot(s, past + row - start);
            state[slot * width..(slot + 1) * width].copy_from_slice(&x[row * width..(row + 1) * width]);
        }
    }
    Ok(())
}
