//! One execution of a language model: its inputs, its limits, and the trait that stands for it.
//!
//! The batch is packed: the tokens of all sequences stand one after the other, without padding. One form
//! serves prefill, decode and steps that mix both.

use millrace_ir::{Error, Kind, Result};

use super::sampling::{argmax, infinite_logits, nan_logits};

/// The packed inputs of one step over `b` sequences with `t` tokens in all.
///
/// Sequence `s` owns the rows `seq_starts[s]..seq_starts[s + 1]`, at least one. Its tokens stand at
/// consecutive positions that end at `kv_lens[s] - 1`; the step stores their K and V, then each row attends to
/// the positions up to its own. Position `x` lies in page `block_table[s, x / tokens_per_block]` at slot
/// `x % tokens_per_block`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepInputs {
    /// `[t]`: token ids.
    pub token_ids: Vec<i32>,
    /// `[t]`: position of each token in its sequence, from 0.
    pub positions: Vec<i32>,
    /// `[b + 1]`: first row of each sequence, then `t`.
    pub seq_starts: Vec<i32>,
    /// `[b]`: tokens of each sequence in the KV cache after this step.
    pub kv_lens: Vec<i32>,
    /// `[b, pages_per_seq]`, row-major: pages of each sequence; 0 beyond those that `kv_lens` covers.
    pub block_table: Vec<i32>,
    /// `p`, the width of `block_table`, at least 1: the pages of this step's longest sequence.
    pub pages_per_seq: usize,
    /// `[r]`, `r >= 1`: rows whose logits are wanted, ascending. A step that needs none names its last row.
    pub logit_rows: Vec<i32>,
}

/// What a model can take; known from its engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLimits {
    /// Logits per row.
    pub vocab_size: usize,
    /// Most sequences per step.
    pub max_batch_size: usize,
    /// Most tokens of a prompt.
    pub max_input_len: usize,
    /// Most tokens of a sequence, prompt and answer together.
    pub max_seq_len: usize,
    /// Most packed tokens per step.
    pub max_num_tokens: usize,
    /// Most rows of logits per step.
    pub max_logit_rows: usize,
    /// Tokens per page of the KV cache.
    pub tokens_per_block: usize,
    /// Pages of the KV cache.
    pub pages: usize,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
    /// The token that begins a sequence, if the model has one.
    pub bos: Option<u32>,
}

/// A language model that can execute one step.
pub trait StepModel {
    /// What the model can take; the same at every call.
    fn limits(&self) -> ModelLimits;

    /// Executes one step. `logits` becomes `[r, vocab_size]`, row-major, in the order of `logit_rows`; what it
    /// held is dropped.
    fn step(&mut self, inputs: &StepInputs, logits: &mut Vec<f32>) -> Result<()>;

    /// Executes one step and takes the most likely token of each of `logit_rows`, the lowest among equals: what
    /// greedy decoding needs, without the logits. `tokens` becomes `[r]`; what it held is dropped. A model that can
    /// tell the tokens at less cost than the logits does so here.
    ///
    /// Errors: those of [`StepModel::step`], and those of [`super::Sampler::sample`] placed at the row.
    fn step_argmax(&mut self, inputs: &StepInputs, tokens: &mut Vec<u32>) -> Result<()> {
        let mut logits = Vec::new();
        self.step(inputs, &mut logits)?;
        let limits = self.limits();
        check_logits(&logits, inputs, &limits)?;
        argmax_rows(&logits, limits.vocab_size, tokens)
    }

    /// Begins a step whose most likely tokens [`StepModel::take_argmax`] will tell; false, and nothing done, if the model
    /// cannot. If `fed`, its token ids are the tokens of the step begun before it, one a sequence and not taken yet;
    /// what `inputs` names is not read. Two steps at most are begun and not taken, and those that are not taken are
    /// forgotten when any step begins that is not fed.
    ///
    /// Errors: those of [`StepModel::step`].
    fn start_argmax(&mut self, inputs: &StepInputs, fed: bool) -> Result<bool> {
        let _ = (inputs, fed);
        Ok(false)
    }

    /// Waits for the first step begun and not taken: for each of its `logit_rows` the most likely token, the lowest among
    /// equals; -1 if a logit is NaN, another negative number if the largest is not finite.
    ///
    /// Errors: those of [`StepModel::step`]; `generation/not-begun` if no step was begun.
    fn take_argmax(&mut self) -> Result<Vec<i32>> {
        Err(Error::new(Kind::Internal, "generation/not-begun", "no step was begun"))
    }
}

/// The most likely token of each row of `width` logits.
pub(crate) fn argmax_rows(logits: &[f32], width: usize, tokens: &mut Vec<u32>) -> Result<()> {
    tokens.clear();
    for (row, logits) in logits.chunks_exact(width.max(1)).enumerate() {
        tokens.push(argmax(logits).map_err(|e| e.at(format!("row {row}")))?);
    }
    Ok(())
}

impl<M: StepModel + ?Sized> StepModel for &mut M {
    fn limits(&self) -> ModelLimits {
        (**self).limits()
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut Vec<f32>) -> Result<()> {
        (**self).step(inputs, logits)
    }

    fn step_argmax(&mut self, inputs: &StepInputs, tokens: &mut Vec<u32>) -> Result<()> {
        (**self).step_argmax(inputs, tokens)
    }

    fn start_argmax(&mut self, inputs: &StepInputs, fed: bool) -> Result<bool> {
        (**self).start_argmax(inputs, fed)
    }

    fn take_argmax(&mut self) -> Result<Vec<i32>> {
        (**self).take_argmax()
    }
}

impl<M: StepModel + ?Sized> StepModel for Box<M> {
    fn limits(&self) -> ModelLimits {
        (**self).limits()
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut Vec<f32>) -> Result<()> {
        (**self).step(inputs, logits)
    }

    fn step_argmax(&mut self, inputs: &StepInputs, tokens: &mut Vec<u32>) -> Result<()> {
        (**self).step_argmax(inputs, tokens)
    }

    fn start_argmax(&mut self, inputs: &StepInputs, fed: bool) -> Result<bool> {
        (**self).start_argmax(inputs, fed)
    }

    fn take_argmax(&mut self) -> Result<Vec<i32>> {
        (**self).take_argmax()
    }
}

impl ModelLimits {
    /// Checks that every size is at least 1 and fits 31 bits; `generation/bad-limits` names the first that
    /// does not.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("max_batch_size", self.max_batch_size),
            ("max_input_len", self.max_input_len),
            ("max_seq_len", self.max_seq_len),
            ("max_num_tokens", self.max_num_tokens),
            ("max_logit_rows", self.max_logit_rows),
            ("tokens_per_block", self.tokens_per_block),
            ("pages", self.pages),
        ];
        for (name, size) in sizes {
            if size == 0 || i32::try_from(size).is_err() {
                let message = format!("{name} of the model is {size}, outside of 1 to {}", i32::MAX);
                return Err(Error::new(Kind::Incompatible, "generation/bad-limits", message));
            }
        }
        Ok(())
    }
}

impl StepInputs {
    /// Packed tokens, `t`.
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Sequences, `b`.
    pub fn sequences(&self) -> usize {
        self.kv_lens.len()
    }

    /// Empties everything, keeping memory.
    pub fn clear(&mut self) {
        let StepInputs { token_ids, positions, seq_starts, kv_lens, block_table, pages_per_seq, logit_rows } =
            self;
        for list in [token_ids, positions, seq_starts, kv_lens, block_table, logit_rows] {
            list.clear();
        }
        *pages_per_seq = 0;
    }

    /// Checks the shape, the invariants named at the fields and the `limits`, so that an executor may index
    /// without further checks. Error `generation/bad-step`: a defect of whoever built the inputs.
    pub fn check(&self, limits: &ModelLimits) -> Result<()> {
        let fault = self.fault(limits);
        fault.map_or(Ok(()), |fault| Err(Error::new(Kind::Internal, "generation/bad-step", fault)))
    }

    fn fault(&self, limits: &ModelLimits) -> Option<String> {
        let StepInputs { token_ids, positions, seq_starts, kv_lens, block_table, pages_per_seq, logit_rows } =
            self;
        let (t, b, r) = (token_ids.len(), kv_lens.len(), logit_rows.len());
        let within = |what: &str, n: usize, most: usize| {
            (n == 0 || n > most).then(|| format!("{n} {what} are not in 1..={most}"))
        };
        let counts = within("tokens", t, limits.max_num_tokens)
            .or_else(|| within("sequences", b, limits.max_batch_size))
            .or_else(|| within("logit rows", r, limits.max_logit_rows));
        if counts.is_some() {
            return counts;
        }
        let shapes = positions.len() == t
            && seq_starts.len() == b + 1
            && *pages_per_seq >= 1
            && Some(block_table.len()) == b.checked_mul(*pages_per_seq);
        if !shapes {
            return Some("the lengths of the inputs do not belong together".to_owned());
        }
        let below = |value: i32, end: usize| usize::try_from(value).is_ok_and(|v| v < end);
        if let Some(bad) = token_ids.iter().find(|id| !below(**id, limits.vocab_size)) {
            return Some(format!("token id {bad} is not below {}", limits.vocab_size));
        }
        if let Some(bad) = block_table.iter().find(|page| !below(**page, limits.pages)) {
            return Some(format!("page {bad} is not below {}", limits.pages));
        }
        if logit_rows.iter().any(|row| !below(*row, t)) || logit_rows.windows(2).any(|w| w[0] >= w[1]) {
            return Some("logit_rows are not ascending rows".to_owned());
        }
        if seq_starts[0] != 0 || usize::try_from(seq_starts[b]) != Ok(t) {
            return Some("seq_starts do not cover all rows".to_owned());
        }
        // First that all bounds ascend: then every range below lies within the rows.
        if seq_starts.windows(2).any(|w| w[0] >= w[1]) {
            return Some("a sequence has no rows".to_owned());
        }
        for s in 0..b {
            let rows = seq_starts[s] as usize..seq_starts[s + 1] as usize;
            let kv_len = usize::try_from(kv_lens[s]).unwrap_or(0);
            if kv_len < rows.len() || kv_len > limits.max_seq_len {
                return Some(format!("kv_lens[{s}] is {}, for {} rows", kv_lens[s], rows.len()));
            }
            if kv_len.div_ceil(limits.tokens_per_block.max(1)) > *pages_per_seq {
                return Some(format!("the block table is too narrow for kv_lens[{s}] = {kv_len}"));
            }
            let first = kv_len - rows.len();
            if !positions[rows].iter().zip(first..).all(|(p, x)| usize::try_from(*p) == Ok(x)) {
                return Some(format!("positions of sequence {s} do not end at its kv_len"));
            }
        }
        None
    }
}

/// Builds [`StepInputs`] sequence by sequence.
#[derive(Debug, Default)]
pub(super) struct StepBuilder {
    inputs: StepInputs,
    /// Where each sequence's pages stand in `pages`.
    tables: Vec<usize>,
    pages: Vec<i32>,
}

impl StepBuilder {
    /// Begins a step, dropping the one before.
    pub(super) fn begin(&mut self) {
        self.inputs.clear();
        self.inputs.seq_starts.push(0);
        self.tables.clear();
        self.pages.clear();
    }

    /// Adds `tokens` of a sequence, the first of them at position `first`; `table` are the sequence's pages.
    /// Returns the row of the first token.
    pub(super) fn push(
        &mut self,
        tokens: &[u32],
        first: usize,
        table: &[i32],
        tokens_per_block: usize,
    ) -> i32 {
        let row = self.inputs.token_ids.len() as i32;
        let kv_len = first + tokens.len();
        self.inputs.token_ids.extend(tokens.iter().map(|id| *id as i32));
        self.inputs.positions.extend((first..kv_len).map(|x| x as i32));
        self.inputs.seq_starts.push(row + tokens.len() as i32);
        self.inputs.kv_lens.push(kv_len as i32);
        let used = kv_len.div_ceil(tokens_per_block);
        self.pages.extend(&table[..used.min(table.len())]);
        self.tables.push(self.pages.len());
        row
    }

    /// Asks for the logits of `row`; rows must ascend.
    pub(super) fn want_logits(&mut self, row: i32) {
        self.inputs.logit_rows.push(row);
    }

    /// Lays out the block table. If no logits were asked for, those of the last row are.
    pub(super) fn finish(&mut self) -> &StepInputs {
        let inputs = &mut self.inputs;
        let starts = || std::iter::once(0).chain(self.tables.iter().copied());
        let lengths = || starts().zip(&self.tables).map(|(start, end)| end - start);
        inputs.pages_per_seq = lengths().max().unwrap_or(0).max(1);
        for (start, end) in starts().zip(&self.tables) {
            inputs.block_table.extend(&self.pages[start..*end]);
            let padding = inputs.pages_per_seq - (end - start);
            inputs.block_table.extend(std::iter::repeat_n(0, padding));
        }
        if inputs.logit_rows.is_empty() && !inputs.token_ids.is_empty() {
            inputs.logit_rows.push(inputs.token_ids.len() as i32 - 1);
        }
        inputs
    }
}

/// Checks that a model wrote one row of logits per wanted row.
pub(super) fn check_logits(logits: &[f32], inputs: &StepInputs, limits: &ModelLimits) -> Result<()> {
    let expected = inputs.logit_rows.len().checked_mul(limits.vocab_size);
    if expected == Some(logits.len()) {
        return Ok(());
    }
    let message = format!(
        "the model wrote {} logits for {} rows of {}",
        logits.len(),
        inputs.logit_rows.len(),
        limits.vocab_size
    );
    Err(Error::new(Kind::Internal, "generation/bad-logits", message))
}

/// Checks that a model told one token for each of `rows` wanted rows.
pub(super) fn check_rows(told: usize, rows: usize) -> Result<()> {
    if told == rows {
        return Ok(());
    }
    let message = format!("the model told {told} tokens for {rows} rows");
    Err(Error::new(Kind::Internal, "generation/bad-logits", message))
}

/// Checks that a model told one token of the vocabulary per wanted row.
pub(super) fn check_tokens(tokens: &[u32], inputs: &StepInputs, limits: &ModelLimits) -> Result<()> {
    let bad = tokens.iter().find(|t| **t as usize >= limits.vocab_size);
    if tokens.len() == inputs.logit_rows.len() && bad.is_none() {
        return Ok(());
    }
    let message = format!(
        "the model told tokens {tokens:?} for {} rows of {}",
        inputs.logit_rows.len(),
        limits.vocab_size
    );
    Err(Error::new(Kind::Internal, "generation/bad-logits", message))
}

/// The token that `index` names, as [`StepModel::take_argmax`] tells it.
pub(super) fn token_of(index: i32, limits: &ModelLimits) -> Result<u32> {
    match u32::try_from(index) {
        Ok(token) if (token as usize) < limits.vocab_size => Ok(token),
        Ok(token) => Err(Error::new(
            Kind::Internal,
            "generation/bad-logits",
            format!("the model told token {token} of {}", limits.vocab_size),
        )),
        Err(_) if index == -1 => Err(nan_logits("a logit is not a number")),
        Err(_) => Err(infinite_logits("the largest logit is not finite")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::testing::limits;

    fn two_sequences() -> StepInputs {
        let mut builder = StepBuilder::default();
        builder.begin();
        builder.push(&[5, 6, 7], 2, &[4, 9], 4);
        let row = builder.push(&[8], 0, &[3, 2], 4);
        builder.want_logits(row);
        builder.finish().clone()
    }

    #[test]
    fn packs_sequences_side_by_side() {
        let inputs = two_sequences();
        assert_eq!(inputs.token_ids, [5, 6, 7, 8]);
        assert_eq!(inputs.positions, [2, 3, 4, 0]);
        assert_eq!(inputs.seq_starts, [0, 3, 4]);
        assert_eq!(inputs.kv_lens, [5, 1]);
        assert_eq!((inputs.pages_per_seq, inputs.block_table.as_slice()), (2, &[4, 9, 3, 0][..]));
        assert_eq!(inputs.logit_rows, [3]);
        inputs.check(&ModelLimits { tokens_per_block: 4, ..limits() }).unwrap();
    }

    #[test]
    fn every_broken_invariant_is_found() {
        let limits = ModelLimits { tokens_per_block: 4, ..limits() };
        type Break = fn(&mut StepInputs);
        let breaks: &[(&str, Break)] = &[
            ("token id", |s| s.token_ids[0] = 1 << 20),
            ("token id", |s| s.token_ids[0] = -1),
            ("page", |s| s.block_table[0] = 1 << 20),
            ("logit_rows", |s| s.logit_rows = vec![4]),
            ("logit_rows", |s| s.logit_rows = vec![1, 1]),
            ("logit rows", |s| s.logit_rows.clear()),
            ("lengths", |s| s.pages_per_seq = 1),
            ("lengths", |s| s.positions.truncate(3)),
            ("cover", |s| s.seq_starts[2] = 5),
            ("no rows", |s| s.seq_starts[1] = 4),
            ("no rows", |s| s.seq_starts[1] = 9),
            ("kv_lens[1]", |s| s.kv_lens[1] = 0),
            ("kv_lens[1]", |s| s.kv_lens[1] = -3),
            ("narrow", |s| s.kv_lens[0] = 9),
            ("positions", |s| s.positions[1] = 9),
            ("tokens", StepInputs::clear),
        ];
        for (expected, spoil) in breaks {
            let mut inputs = two_sequences();
            spoil(&mut inputs);
            let error = inputs.check(&limits).unwrap_err();
            assert!(error.message().contains(expected), "{expected}: {error}");
        }
    }
}
