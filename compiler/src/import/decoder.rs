//! Decoders: llama, mistral, qwen2 and qwen3 as one step graph over packed tokens and a paged cache.

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::rope::RopeLayout;
use millrace_ir::ops::{
    Binary, Embedding, Gather, KvAppend, Matmul, PagedAttention, Reshape, RmsNorm, Rope, Unary,
};
use millrace_ir::{Builder, DType, Dim, Module, Operand, Result, TensorType};

use super::config::{Family, ModelConfig};
use super::folder::Limits;
use super::tensors::Tensors;

/// Names of the step's inputs, in order.
pub const INPUTS: [&str; 6] =
    ["token_ids", "positions", "seq_starts", "kv_lens", "block_table", "logit_rows"];

struct Step<'a, 'b> {
    builder: Builder,
    tensors: Tensors<'b>,
    config: &'a ModelConfig,
    tokens: Dim,
    positions: Operand,
    paging: [Operand; 3],
}

/// Builds the step graph: token ids to logits of the asked rows.
pub(super) fn build(
    name: &str,
    config: &ModelConfig,
    limits: &Limits,
    dtype: DType,
    source: Option<&dyn TensorSource>,
    names: Vec<String>,
) -> Result<Module> {
    let mut builder = Builder::new(name);
    let blocks = limits.max_seq_len.div_ceil(limits.tokens_per_block);
    let tokens = builder.dim("t", 1, limits.max_num_tokens, Some(limits.max_batch_size))?;
    let batch = builder.dim("b", 1, limits.max_batch_size, None)?;
    let rows = builder.dim("r", 1, limits.max_logit_rows, None)?;
    let width = builder.dim("p", 1, blocks, None)?;
    let pages = builder.dim("pages", 1, limits.max_pages(), None)?;
    let i32s = |shape: Vec<Dim>| TensorType::new(DType::I32, shape);
    let token_ids = builder.input(INPUTS[0], i32s(vec![tokens.clone()]));
    let positions = builder.input(INPUTS[1], i32s(vec![tokens.clone()]));
    let seq_starts = builder.input(INPUTS[2], i32s(vec![batch.add(&Dim::from(1i64))]));
    let kv_lens = builder.input(INPUTS[3], i32s(vec![batch.clone()]));
    let block_table = builder.input(INPUTS[4], i32s(vec![batch, width]));
    let logit_rows = builder.input(INPUTS[5], i32s(vec![rows]));
    let state = [pages, limits.tokens_per_block.into(), config.kv_heads.into(), config.head_dim.into()];
    let state = TensorType::new(dtype, state);
    let mut step = Step {
        builder,
        tensors: Tensors::new(source, names, "", dtype),
        config,
        tokens,
        positions,
        paging: [seq_starts, kv_lens, block_table],
    };
    let embed = step.weight("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size]);
    let mut x = step.builder.one(Embedding, &[embed, token_ids], "model.embed_tokens")?;
    for layer in 0..config.layers as usize {
        let k = step.builder.state(&format!("kv{layer}.k"), state.clone());
        let v = step.builder.state(&format!("kv{layer}.v"), state.clone());
        x = step.layer(layer, x, k, v)?;
    }
    let x = step.builder.one(Gather { axis: 0 }, &[x, logit_rows], "model.norm")?;
    let x = step.norm(x, "model.norm", config.hidden_size)?;
    let head = if config.tied {
        embed
    } else {
        step.weight("lm_head.weight", &[config.vocab_size, config.hidden_size])
    };
    let logits = step.builder.one(
        Matmul { transpose_b: true, out: (dtype != DType::F32).then_some(DType::F32) },
        &[x, head],
        "lm_head",
    )?;
    step.builder.output("logits", logits)?;
    let tied = config.tied;
    step.tensors
        .finish(|name| name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight"))?;
    Ok(step.builder.finish())
}

impl Step<'_, '_> {
    fn weight(&mut self, name: &str, shape: &[u64]) -> Operand {
        self.tensors.get(&mut self.builder, name, shape)
    }

    fn norm(&mut self, x: Operand, name: &str, width: u64) -> Result<Operand> {
        let weight = self.weight(&format!("{name}.weight"), &[width]);
        self.builder.one(RmsNorm { eps: self.config.norm_eps }, &[x, weight], name)
    }

    fn linear(&mut self, x: Operand, name: &str, rows: u64, columns: u64, bias: bool) -> Result<Operand> {
        let weight = self.weight(&format!("{name}.weight"), &[rows, columns]);
        let y = self.builder.one(Matmul { transpose_b: true, out: None }, &[x, weight], name)?;
        if !bias {
            return Ok(y);
        }
        let bias = self.weight(&format!("{name}.bias"), &[rows]);
        self.builder.one(Binary { function: BinaryFn::Add }, &[y, bias], name)
    }

    fn heads(&mut self, x: Operand, heads: u64, name: &str) -> Result<Operand> {
        let shape = vec![self.tokens.clone(), heads.into(), self.config.head_dim.into()];
        self.builder.one(Reshape { shape: shape.into() }, &[x], name)
    }

    fn layer(&mut self, layer: usize, x: Operand, k_state: Operand, v_state: Operand) -> Result<Operand> {
        let config = self.config;
        let prefix = format!("model.layers.{layer}");
        let (hidden, heads, kv_heads, d) =
            (config.hidden_size, config.heads, config.kv_heads, config.head_dim);
        let attention = format!("{prefix}.self_attn");
        let normed = self.norm(x, &format!("{prefix}.input_layernorm"), hidden)?;
        let q = self.linear(normed, &format!("{attention}.q_proj"), heads * d, hidden, config.qkv_bias)?;
        let k = self.linear(normed, &format!("{attention}.k_proj"), kv_heads * d, hidden, config.qkv_bias)?;
        let v = self.linear(normed, &format!("{attention}.v_proj"), kv_heads * d, hidden, config.qkv_bias)?;
        let mut q = self.heads(q, heads, &format!("{attention}.q_proj"))?;
        let mut k = self.heads(k, kv_heads, &format!("{attention}.k_proj"))?;
        let v = self.heads(v, kv_heads, &format!("{attention}.v_proj"))?;
        if config.family == Family::Qwen3 {
            q = self.norm(q, &format!("{attention}.q_norm"), d)?;
            k = self.norm(k, &format!("{attention}.k_norm"), d)?;
        }
        let rope = Rope {
            base: config.rope_base,
            layout: RopeLayout::Half,
            scaling: config.rope_scaling,
            rotary: 0,
        };
        let loc = format!("{attention}.rotary_emb");
        let q = self.builder.one(rope.clone(), &[q, self.positions], &loc)?;
        let k = self.builder.one(rope, &[k, self.positions], &loc)?;
        let [starts, lens, table] = self.paging;
        let k = self.builder.one(KvAppend, &[k_state, k, starts, lens, table], &attention)?;
        let v = self.builder.one(KvAppend, &[v_state, v, starts, lens, table], &attention)?;
        let scale = 1.0 / (d as f64).sqrt();
        let window = config.windows[layer] as usize;
        let y = self.builder.one(
            PagedAttention { scale, window },
            &[q, k, v, starts, lens, table],
            &attention,
        )?;
        let flat = vec![self.tokens.clone(), (heads * d).into()];
        let y = self.builder.one(Reshape { shape: flat.into() }, &[y], &attention)?;
        let y = self.linear(y, &format!("{attention}.o_proj"), hidden, heads * d, config.o_bias)?;
        let x = self.builder.one(Binary { function: BinaryFn::Add }, &[x, y], &prefix)?;
        let normed = self.norm(x, &format!("{prefix}.post_attention_layernorm"), hidden)?;
        let mlp = format!("{prefix}.mlp");
        let inner = config.intermediate_size;
        let gate = self.linear(normed, &format!("{mlp}.gate_proj"), inner, hidden, config.mlp_bias)?;
        let up = self.linear(normed, &format!("{mlp}.up_proj"), inner, hidden, config.mlp_bias)?;
        let gate =
            self.builder.one(Unary { function: config.activation }, &[gate], &format!("{mlp}.act_fn"))?;
        let y = self.builder.one(Binary { function: BinaryFn::Mul }, &[gate, up], &mlp)?;
        let y = self.linear(y, &format!("{mlp}.down_proj"), hidden, inner, config.mlp_bias)?;
        self.builder.one(Binary { function: BinaryFn::Add }, &[x, y], &prefix)
    }
}
