//! Sessions as models: a decoder for [`crate::generation`], an encoder for embeddings.

use millrace_ir::manifest::{LanguageModel, ModelKind};
use millrace_ir::{DType, Error, Kind, Result};

use crate::generation::{EmbedLimits, EmbedModel, ModelLimits, StepInputs, StepModel};
use crate::session::{Session, TensorRef};

fn i32_bytes(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Runs a step whose inputs are i32 tensors.
fn run_i32(session: &mut Session<'_>, inputs: &[(&[i32], Vec<u64>)]) -> Result<()> {
    let bytes: Vec<Vec<u8>> = inputs.iter().map(|(v, _)| i32_bytes(v)).collect();
    let tensors: Vec<TensorRef<'_>> = inputs
        .iter()
        .zip(&bytes)
        .map(|((_, shape), bytes)| TensorRef { dtype: DType::I32, shape, bytes })
        .collect();
    session.run(&tensors)
}

/// Output 0 of the last step as f32 rows.
fn f32_output(session: &Session<'_>) -> Result<Vec<f32>> {
    let output = session.output(0).filter(|o| o.dtype == DType::F32).ok_or_else(|| {
        Error::new(Kind::Incompatible, "run/bad-output", "the engine's output is not an f32 tensor")
    })?;
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
    limits: ModelLimits,
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
        Ok(Decoder { session, limits })
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
        inputs.check(&self.limits)?;
        let (t, b) = (inputs.tokens() as u64, inputs.sequences() as u64);
        let tensors: [(&[i32], Vec<u64>); 6] = [
            (&inputs.token_ids, vec![t]),
            (&inputs.positions, vec![t]),
            (&inputs.seq_starts, vec![b + 1]),
            (&inputs.kv_lens, vec![b]),
            (&inputs.block_table, vec![b, inputs.pages_per_seq as u64]),
            (&inputs.logit_rows, vec![inputs.logit_rows.len() as u64]),
        ];
        run_i32(self.session, &tensors)?;
        *logits = f32_output(self.session)?;
        Ok(())
    }
}

/// A session of an encoder engine.
pub struct Encoder<'s, 'e> {
    session: &'s mut Session<'e>,
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
        Ok(Encoder { session, limits })
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
        run_i32(self.session, &tensors)?;
        let all = f32_output(self.session)?;
        let width = all.len().checked_div(ids.len()).unwrap_or(0);
        Ok(all.chunks_exact(width.max(1)).map(<[f32]>::to_vec).collect())
    }
}
