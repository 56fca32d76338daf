//! Encoders: bert with mean pooling and L2 normalisation over packed sequences.

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::ops::attention::Mask;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::{
    Attention, Binary, Embedding, L2Normalize, LayerNorm, Matmul, MeanPool, Reshape, Unary,
};
use millrace_ir::{Builder, DType, Dim, Module, Operand, Result, TensorType};

use super::config::ModelConfig;
use super::folder::Limits;
use super::tensors::Tensors;

/// Names of the step's inputs, in order.
pub const INPUTS: [&str; 4] = ["token_ids", "positions", "type_ids", "seq_starts"];

struct Step<'a, 'b> {
    builder: Builder,
    tensors: Tensors<'b>,
    config: &'a ModelConfig,
    tokens: Dim,
    seq_starts: Operand,
}

/// Builds the graph: token ids to one embedding per sequence.
pub(super) fn build(
    name: &str,
    config: &ModelConfig,
    limits: &Limits,
    dtype: DType,
    normalize: bool,
    source: Option<&dyn TensorSource>,
    names: Vec<String>,
) -> Result<Module> {
    // Checkpoints saved with a head keep the encoder under `bert.`.
    let prefix = if names.iter().any(|n| n.starts_with("bert.embeddings.")) { "bert." } else { "" };
    let mut builder = Builder::new(name);
    let tokens = builder.dim("t", 1, limits.max_num_tokens, Some(limits.max_num_tokens.min(128)))?;
    let batch = builder.dim("b", 1, limits.max_batch_size, None)?;
    let ids = TensorType::new(DType::I32, [tokens.clone()]);
    let token_ids = builder.input(INPUTS[0], ids.clone());
    let positions = builder.input(INPUTS[1], ids.clone());
    let type_ids = builder.input(INPUTS[2], ids);
    let seq_starts = builder.input(INPUTS[3], TensorType::new(DType::I32, [batch.add(&Dim::from(1i64))]));
    let mut step =
        Step { builder, tensors: Tensors::new(source, names, prefix, dtype), config, tokens, seq_starts };
    let h = config.hidden_size;
    let mut x = step.embedding("word_embeddings", config.vocab_size, token_ids)?;
    let p = step.embedding("position_embeddings", config.max_positions, positions)?;
    let t = step.embedding("token_type_embeddings", config.type_vocab_size, type_ids)?;
    x = step.add(x, t, "embeddings")?;
    x = step.add(x, p, "embeddings")?;
    x = step.norm(x, "embeddings.LayerNorm", h)?;
    for layer in 0..config.layers {
        x = step.layer(&format!("encoder.layer.{layer}"), x)?;
    }
    let mut y = step.builder.one(MeanPool, &[x, step.seq_starts], "pooling")?;
    if normalize {
        y = step.builder.one(L2Normalize { eps: 1e-12 }, &[y], "normalize")?;
    }
    if dtype != DType::F32 {
        y = step.builder.one(millrace_ir::ops::Cast { to: DType::F32 }, &[y], "output")?;
    }
    step.builder.output("embedding", y)?;
    let kept = prefix.to_string();
    step.tensors.finish(|name| {
        let inner = name.strip_prefix(kept.as_str());
        inner.is_none_or(|n| n == "embeddings.position_ids" || n.starts_with("pooler."))
            || name.starts_with("cls.")
    })?;
    Ok(step.builder.finish())
}

impl Step<'_, '_> {
    fn weight(&mut self, name: &str, shape: &[u64]) -> Operand {
        self.tensors.get(&mut self.builder, name, shape)
    }

    fn embedding(&mut self, name: &str, rows: u64, ids: Operand) -> Result<Operand> {
        let table = self.weight(&format!("embeddings.{name}.weight"), &[rows, self.config.hidden_size]);
        self.builder.one(Embedding, &[table, ids], &format!("embeddings.{name}"))
    }

    fn add(&mut self, a: Operand, b: Operand, loc: &str) -> Result<Operand> {
        self.builder.one(Binary { function: BinaryFn::Add }, &[a, b], loc)
    }

    fn norm(&mut self, x: Operand, name: &str, width: u64) -> Result<Operand> {
        let weight = self.weight(&format!("{name}.weight"), &[width]);
        let bias = self.weight(&format!("{name}.bias"), &[width]);
        self.builder.one(LayerNorm { eps: self.config.norm_eps }, &[x, weight, bias], name)
    }

    fn linear(&mut self, x: Operand, name: &str, rows: u64, columns: u64) -> Result<Operand> {
        let weight = self.weight(&format!("{name}.weight"), &[rows, columns]);
        let bias = self.weight(&format!("{name}.bias"), &[rows]);
        let y = self.builder.one(Matmul { transpose_b: true, out: None }, &[x, weight], name)?;
        self.add(y, bias, name)
    }

    fn layer(&mut self, prefix: &str, x: Operand) -> Result<Operand> {
        let (h, heads, d) = (self.config.hidden_size, self.config.heads, self.config.head_dim);
        let attention = format!("{prefix}.attention");
        let heads_shape = vec![self.tokens.clone(), heads.into(), d.into()];
        let mut qkv = Vec::with_capacity(3);
        for part in ["query", "key", "value"] {
            let name = format!("{attention}.self.{part}");
            let y = self.linear(x, &name, h, h)?;
            qkv.push(self.builder.one(Reshape { shape: heads_shape.clone().into() }, &[y], &name)?);
        }
        let mask = Mask { scale: 1.0 / (d as f64).sqrt(), causal: false, window: 0 };
        let operands = [qkv[0], qkv[1], qkv[2], self.seq_starts];
        let y = self.builder.one(Attention { mask }, &operands, &format!("{attention}.self"))?;
        let y = self.builder.one(
            Reshape { shape: vec![self.tokens.clone(), h.into()].into() },
            &[y],
            &attention,
        )?;
        let y = self.linear(y, &format!("{attention}.output.dense"), h, h)?;
        let y = self.add(y, x, &attention)?;
        let x = self.norm(y, &format!("{attention}.output.LayerNorm"), h)?;
        let y = self.linear(x, &format!("{prefix}.intermediate.dense"), self.config.intermediate_size, h)?;
        let activation = Unary { function: self.config.activation };
        let y = self.builder.one(activation, &[y], &format!("{prefix}.intermediate"))?;
        let y = self.linear(y, &format!("{prefix}.output.dense"), h, self.config.intermediate_size)?;
        let y = self.add(y, x, prefix)?;
        self.norm(y, &format!("{prefix}.output.LayerNorm"), h)
    }
}
