//! `millrace eval`: perplexity of a decoder on a text.

use std::path::{Path, PathBuf};

use millrace::generation::{PerplexityOptions, StepInputs, StepModel, perplexity};
use millrace::ir::DType;
use millrace::ir::manifest::ModelKind;
use millrace::{Decoder, Engine, Error, Kind, Result, TensorRef};
use serde_json::json;

use super::compile::ModelOptions;
use super::memory::MemoryOptions;
use super::run::open;
use super::{npy, print, print_json, usage};

/// Measure the perplexity of a decoder on consecutive windows of a text.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file or a model folder
    engine: PathBuf,
    /// The text
    #[arg(long, required_unless_present = "token_ids_file")]
    text_file: Option<PathBuf>,
    /// Token ids instead of a text, separated by commas or blanks; with --logits
    #[arg(long, value_name = "FILE", requires = "logits", conflicts_with = "text_file")]
    token_ids_file: Option<PathBuf>,
    /// Write the logits of every one of the token ids, f32 [tokens, vocabulary], as .npy
    #[arg(long, value_name = "FILE", requires = "token_ids_file")]
    logits: Option<PathBuf>,
    /// Number of windows [default: all whole ones]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Tokens of each window, after the begin of sequence token
    #[arg(long, value_name = "K", default_value_t = 511)]
    window_tokens: usize,
    #[command(flatten)]
    memory: MemoryOptions,
    #[command(flatten)]
    model_options: ModelOptions,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let (engine, _scratch) = open(&args.engine, &args.model_options)?;
    engine.need_kind(ModelKind::Decoder)?;
    if let (Some(ids), Some(out)) = (&args.token_ids_file, &args.logits) {
        return logits(args, &engine, ids, out);
    }
    let Some(file) = &args.text_file else {
        return Err(usage("usage/inputs", "there is no text").hint("add --text-file FILE"));
    };
    let text = std::fs::read_to_string(file).map_err(|e| Error::io("read", file, &e))?;
    let tokens = engine.tokenizer()?.encode(&text, false)?;
    let bos = engine.manifest().model.as_ref().and_then(|m| m.bos).ok_or_else(|| {
        Error::new(Kind::Unsupported, "eval/no-bos", "the model names no begin of sequence token")
    })?;
    let mut session = args.memory.open(&engine)?;
    let options = PerplexityOptions { bos, window_tokens: args.window_tokens, max_windows: args.windows };
    let result = perplexity(&mut Decoder::new(&mut session)?, &tokens, &options)?;
    if args.json {
        return print_json(&json!({"perplexity": result.perplexity, "tokens": result.tokens}));
    }
    print(&format!("perplexity {:.6} over {} tokens\n", result.perplexity, result.tokens))
}

/// Writes the logits of one prefill of the token ids in `file`.
fn logits(args: &Args, engine: &Engine, file: &Path, out: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).map_err(|e| Error::io("read", file, &e))?;
    let ids = text
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter(|t| !t.is_empty())
        .map(|t| t.parse::<i32>().map_err(|_| usage("usage/token-ids", format!("`{t}` is no token id"))))
        .collect::<Result<Vec<i32>>>()?;
    let mut session = args.memory.open(engine)?;
    let mut model = Decoder::new(&mut session)?;
    let limits = model.limits();
    let most = limits.max_logit_rows.min(limits.max_num_tokens).min(limits.max_seq_len);
    if ids.is_empty() || ids.len() > most {
        let message = format!("{} token ids, the engine gives logits of 1 to {most}", ids.len());
        return Err(usage("usage/token-ids", message)
            .hint("compile with larger --max-logit-rows, --max-num-tokens and --max-seq-len"));
    }
    let pages = ids.len().div_ceil(limits.tokens_per_block);
    let rows: Vec<i32> = (0..ids.len() as i32).collect();
    let inputs = StepInputs {
        positions: rows.clone(),
        seq_starts: vec![0, ids.len() as i32],
        kv_lens: vec![ids.len() as i32],
        block_table: (0..pages as i32).collect(),
        pages_per_seq: pages,
        logit_rows: rows,
        token_ids: ids,
    };
    let mut logits = Vec::new();
    model.step(&inputs, &mut logits)?;
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    let shape = [inputs.token_ids.len() as u64, limits.vocab_size as u64];
    npy::write(out, &TensorRef { dtype: DType::F32, shape: &shape, bytes: &bytes })
}
