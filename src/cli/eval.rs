//! `millrace eval`: perplexity of a decoder on a text.

use std::path::PathBuf;

use millrace::generation::{PerplexityOptions, perplexity};
use millrace::ir::manifest::ModelKind;
use millrace::{Decoder, Error, Kind, Result};
use serde_json::json;

use super::compile::ModelOptions;
use super::run::{MemoryOptions, open};
use super::{print, print_json};

/// Measure the perplexity of a decoder on consecutive windows of a text.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file or a model folder
    engine: PathBuf,
    /// The text
    #[arg(long)]
    text_file: PathBuf,
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
    let text =
        std::fs::read_to_string(&args.text_file).map_err(|e| Error::io("read", &args.text_file, &e))?;
    let tokens = engine.tokenizer()?.encode(&text, false)?;
    let bos = engine.manifest().model.as_ref().and_then(|m| m.bos).ok_or_else(|| {
        Error::new(Kind::Unsupported, "eval/no-bos", "the model names no begin of sequence token")
    })?;
    let mut session = engine.session(args.memory.resolve()?)?;
    let options = PerplexityOptions { bos, window_tokens: args.window_tokens, max_windows: args.windows };
    let result = perplexity(&mut Decoder::new(&mut session)?, &tokens, &options)?;
    if args.json {
        return print_json(&json!({"perplexity": result.perplexity, "tokens": result.tokens}));
    }
    print(&format!("perplexity {:.6} over {} tokens\n", result.perplexity, result.tokens))
}
