//! Sessions as models: a decoder for [`crate::generation`], an encoder for embeddings.

use std::borrow::Cow;

use millrace_ir::manifest::{LanguageModel, ModelKind};
use millrace_ir::{Bindings, DType, Error, Kind, Result, Sym};

use crate::generation::{EmbedLimits, EmbedModel, ModelLimits, StepInputs, StepModel, argmax_rows};
use crate::lent::Lent;
use crate::options::Device;
use crate::session::{Session, TensorRef};

fn i32_bytes(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Calls `run` with i32 tensors.
fn with_i32<T>(inputs: &[(&[i32], Vec<u64>)], run: impl FnOnce(&[TensorRef<'_>]) -> Result<T>) -> Result<T> {
    let bytes: Vec<Vec<u8>> = inputs.iter().map(|(v, _)| i32_bytes(v)).collect();
    let tensors: Vec<TensorRef<'_>> = inputs
        .iter()
        .zip(&bytes)
        .map(|((_, shape), bytes)| TensorRef { dtype: DType::I32, shape, bytes })
        .collect();
    run(&tensors)
}

/// Output 0 of the last step as f32 rows.
fn f32_output(session: &Session<'_>) -> Result<Vec<f32>> {
    let output = session.read_output(0)?;
    if output.dtype != DType::F32 {
        let message = "the engine's output is not an f32 tensor";
        return Err(Error::new(Kind::Incompatible, "run/bad-output", message));
    }
    Ok(output.bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect())
}

fn limits_of<'s>(session: &'s Session<'_>, kind: ModelKind) -> Result<&'s LanguageModel> {
    session.engine().need_kind(kind)?;
    session
        .engine()
        .manifest()
        .model
        .as_ref()
        .ok_or_else(|| Error::new(Kind::BadInput, "engine/manifest", "the manifest has no limits"))
}

/// A session of a decoder engine.
pub struct Decoder<'s, 'e> {
    session: &'s mut Session<'e>,
    lent: Option<Lent<'s>>,
    limits: ModelLimits,
    /// Most columns of the block table, if its width is rounded up so that steps recur while sequences grow.
    widest_table: Option<usize>,
}

/// Input number of the token ids of decoders.
const TOKEN_IDS: usize = 0;

/// Input number of the block table of decoders.
const BLOCK_TABLE: usize = 4;

/// The width that a block table of `width` columns is given, at most `widest`.
fn rounded_width(width: usize, widest: usize) -> usize {
    width.next_power_of_two().min(widest).max(width)
}

/// A block table of `width` columns with zeros up to `wide` columns; they are never read, since `kv_lens` bounds what
/// is.
fn widened(table: &[i32], width: usize, wide: usize) -> Vec<i32> {
    let mut out = Vec::with_capacity(table.len() / width.max(1) * wide);
    for row in table.chunks_exact(width.max(1)) {
        out.extend(row);
        out.resize(out.len() + wide - width, 0);
    }
    out
}

impl<'s, 'e> Decoder<'s, 'e> {
    /// A decoder over `session`.
    ///
    /// # Errors
    /// `run/wrong-kind` if the engine is no decoder.
    pub fn new(session: &'s mut Session<'e>) -> Result<Self> {
        let model = limits_of(session, ModelKind::Decoder)?;
        let limits = ModelLimits {
            vocab_size: model.vocab_size as usize,
            max_batch_size: model.max_batch_size as usize,
            max_input_len: model.max_input_len as usize,
            max_seq_len: model.max_seq_len as usize,
            max_num_tokens: model.max_num_tokens as usize,
            max_logit_rows: model.max_logit_rows as usize,
            tokens_per_block: model.tokens_per_block as usize,
            pages: session.kv_pages() as usize,
            eos: model.eos.clone(),
            bos: model.bos,
        };
        let widest_table = match session.device() {
            Device::Cpu => None,
            Device::Cuda(_) => widest_table(session),
        };
        Ok(Decoder { session, lent: None, limits, widest_table })
    }

    /// A decoder over `session` whose steps run in `lent` memory; see [`Session::run_in`].
    ///
    /// # Errors
    /// As [`Decoder::new`].
    pub fn new_in(session: &'s mut Session<'e>, lent: Lent<'s>) -> Result<Self> {
        Ok(Decoder { lent: Some(lent), ..Decoder::new(session)? })
    }

    /// The session.
    pub fn session(&self) -> &Session<'e> {
        self.session
    }
}

impl StepModel for Decoder<'_, '_> {
    fn limits(&self) -> ModelLimits {
        self.limits.clone()
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut Vec<f32>) -> Result<()> {
        self.run(inputs, |session, tensors, lent| session.run_lent(tensors, lent))?;
        *logits = f32_output(self.session)?;
        Ok(())
    }

    fn step_argmax(&mut self, inputs: &StepInputs, tokens: &mut Vec<u32>) -> Result<()> {
        let indices = self.run(inputs, |session, tensors, lent| session.run_argmax_with(tensors, 0, lent))?;
        tokens.clear();
        tokens.extend(indices.iter().map_while(|index| u32::try_from(*index).ok()));
        if tokens.len() == indices.len() {
            return Ok(());
        }
        // A row has no largest logit: the logits tell why.
        argmax_rows(&f32_output(self.session)?, self.limits.vocab_size, tokens)
    }

    fn start_argmax(&mut self, inputs: &StepInputs, fed: bool) -> Result<bool> {
        if !self.session.runs_ahead() {
            return Ok(false);
        }
        let input = fed.then_some(TOKEN_IDS);
        self.run(inputs, |session, tensors, _| session.start_argmax(tensors, 0, input))
    }

    fn take_argmax(&mut self) -> Result<Vec<i32>> {
        self.session.take_argmax()
    }
}

/// The symbols of a decoder's step.
fn symbols(t: u64, b: u64, r: u64, p: u64) -> Bindings {
    let mut bindings = Bindings::new();
    for (name, value) in [("t", t), ("b", b), ("r", r), ("p", p)] {
        if let Some(sym) = Sym::new(name) {
            bindings.set(sym, value);
        }
    }
    bindings
}

/// Most columns of the block table.
fn widest_table(session: &Session<'_>) -> Option<usize> {
    let module = session.engine().module();
    let (_, ty) = module.input_types().into_iter().nth(BLOCK_TABLE)?;
    let columns = ty.shape.get(1)?.extent(&Bindings::maxima(&module.dims))?;
    usize::try_from(columns).ok()
}

impl<'s, 'e> Decoder<'s, 'e> {
    /// Calls `run` with the session and the inputs as tensors.
    fn run<T>(
        &mut self,
        inputs: &StepInputs,
        run: impl FnOnce(&mut Session<'e>, &[TensorRef<'_>], Option<&mut Lent<'s>>) -> Result<T>,
    ) -> Result<T> {
        inputs.check(&self.limits)?;
        let (t, b) = (inputs.tokens() as u64, inputs.sequences() as u64);
        let r = inputs.logit_rows.len() as u64;
        let width = inputs.pages_per_seq;
        let wide = self.widest_table.map(|widest| rounded_width(width, widest));
        // A profile may take the step, but not at the rounded width.
        let wide = wide.filter(|w| self.session.takes(&symbols(t, b, r, *w as u64))).unwrap_or(width);
        let table = match wide {
            _ if wide == width => Cow::Borrowed(&inputs.block_table),
            _ => Cow::Owned(widened(&inputs.block_table, width, wide)),
        };
        let tensors: [(&[i32], Vec<u64>); 6] = [
            (&inputs.token_ids, vec![t]),
            (&inputs.positions, vec![t]),
            (&inputs.seq_starts, vec![b + 1]),
            (&inputs.kv_lens, vec![b]),
            (&table, vec![b, wide as u64]),
            (&inputs.logit_rows, vec![r]),
        ];
        with_i32(&tensors, |tensors| run(self.session, tensors, self.lent.as_mut()))
    }
}

/// A session of an encoder engine.
pub struct Encoder<'s, 'e> {
    session: &'s mut Session<'e>,
    lent: Option<Lent<'s>>,
    limits: EmbedLimits,
}

impl<'s, 'e> Encoder<'s, 'e> {
    /// An encoder over `session`.
    ///
    /// # Errors
    /// `run/wrong-kind` if the engine is no encoder.
    pub fn new(session: &'s mut Session<'e>) -> Result<Self> {
        let model = limits_of(session, ModelKind::Encoder)?;
        let limits = EmbedLimits {
            vocab_size: model.vocab_size as usize,
            max_batch_size: model.max_batch_size as usize,
            max_input_len: model.max_input_len as usize,
            max_num_tokens: model.max_num_tokens as usize,
        };
        Ok(Encoder { session, lent: None, limits })
    }

    /// An encoder over `session` whose steps run in `lent` memory; see [`Session::run_in`].
    ///
    /// # Errors
    /// As [`Encoder::new`].
    pub fn new_in(session: &'s mut Session<'e>, lent: Lent<'s>) -> Result<Self> {
        Ok(Encoder { lent: Some(lent), ..Encoder::new(session)? })
    }
}

impl EmbedModel for Encoder<'_, '_> {
    fn limits(&self) -> EmbedLimits {
        self.limits
    }

    fn embed(&mut self, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
        let mut starts = vec![0i32];
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for sequence in ids {
            tokens.extend(sequence.iter().map(|t| *t as i32));
            positions.extend(0..sequence.len() as i32);
            starts.push(tokens.len() as i32);
        }
        let types = vec![0i32; tokens.len()];
        let (t, b) = (tokens.len() as u64, ids.len() as u64);
        let tensors: [(&[i32], Vec<u64>); 4] =
            [(&tokens, vec![t]), (&positions, vec![t]), (&types, vec![t]), (&starts, vec![b + 1])];
        with_i32(&tensors, |tensors| self.session.run_lent(tensors, self.lent.as_mut()))?;
        let all = f32_output(self.session)?;
        let width = all.len().checked_div(ids.len()).unwrap_or(0);
        Ok(all.chunks_exact(width.max(1)).map(<[f32]>::to_vec).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_grow_by_doubling_within_the_engine() {
        let widths: Vec<usize> = (1..=9).map(|w| rounded_width(w, 6)).collect();
        // What is too wide already is for the session to refuse.
        assert_eq!(widths, [1, 2, 4, 4, 6, 6, 7, 8, 9]);
    }

    #[test]
    fn padding_keeps_rows() {
        assert_eq!(widened(&[1, 2, 3, 4, 5, 6], 3, 4), [1, 2, 3, 0, 4, 5, 6, 0]);
        assert_eq!(widened(&[7], 1, 1), [7]);
    }

    #[test]
    fn sessions_may_move_to_another_thread() {
        fn sent<T: Send>() {}
        sent::<Session<'_>>();
    }
}
