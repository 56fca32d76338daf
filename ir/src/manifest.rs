//! The manifest: what an engine is and what it may be asked for, as JSON. Compiler and runtime share only this, the
//! IR text and the weights.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::shape_profile::ShapeProfile;

/// What kind of model an engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelKind {
    /// A language model step over a paged cache.
    Decoder,
    /// Token ids to one embedding per sequence.
    Encoder,
    /// Any other graph: named tensors in, named tensors out.
    Graph,
}

/// Limits of a language model or encoder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LanguageModel {
    /// Tokens of the vocabulary.
    pub vocab_size: u64,
    /// Most sequences of a step.
    pub max_batch_size: u64,
    /// Longest prompt, in tokens.
    pub max_input_len: u64,
    /// Longest sequence, in tokens.
    pub max_seq_len: u64,
    /// Most packed tokens of a step.
    pub max_num_tokens: u64,
    /// Most rows of logits of a step.
    pub max_logit_rows: u64,
    /// Tokens of one cache page.
    pub tokens_per_block: u64,
    /// End of sequence tokens.
    pub eos: Vec<u32>,
    /// Begin of sequence token.
    pub bos: Option<u32>,
}

/// The manifest of an engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Kind of model.
    pub kind: ModelKind,
    /// The model family, such as `llama`.
    pub family: String,
    /// Target of the kernels, such as `cpu`.
    pub target: String,
    /// Element type of activations and weights.
    pub dtype: DType,
    /// The pipeline that made the engine.
    pub pipeline: String,
    /// Whether weights may be streamed.
    pub weight_streaming: bool,
    /// Limits, for decoders and encoders.
    pub model: Option<LanguageModel>,
    /// Shapes the engine was asked for; without any, one profile takes all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<ShapeProfile>,
}

impl Manifest {
    /// Canonical JSON.
    pub fn to_json(&self) -> Vec<u8> {
        // A struct of plain fields has no reason to fail.
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// Reads and checks a manifest.
    ///
    /// # Errors
    /// `engine/manifest` for malformed JSON or limits that are zero, absurd or contradict each other.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        let bad = |message: String| {
            Error::new(Kind::BadInput, "engine/manifest", message)
                .hint("the file was not written by this version of Millrace or was altered: build it again")
        };
        let manifest: Manifest =
            serde_json::from_slice(bytes).map_err(|e| bad(format!("the manifest is malformed: {e}")))?;
        if let Some(m) = &manifest.model {
            let limits = [
                ("vocab_size", m.vocab_size),
                ("max_batch_size", m.max_batch_size),
                ("max_input_len", m.max_input_len),
                ("max_seq_len", m.max_seq_len),
                ("max_num_tokens", m.max_num_tokens),
                ("max_logit_rows", m.max_logit_rows),
                ("tokens_per_block", m.tokens_per_block),
            ];
            for (name, value) in limits {
                if !(1..=1 << 24).contains(&value) {
                    return Err(bad(format!("{name} is {value}, outside 1..=16777216")));
                }
            }
            if m.max_input_len > m.max_seq_len || m.max_num_tokens < m.max_batch_size {
                return Err(bad("the limits contradict each other".to_string()));
            }
        }
        if manifest.model.is_none() != (manifest.kind == ModelKind::Graph) {
            return Err(bad("limits and kind of model do not go together".to_string()));
        }
        Ok(manifest)
    }
}
