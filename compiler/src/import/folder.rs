//! The model folder: which files it has, what they say, and the imported module.

use std::path::{Path, PathBuf};

use millrace_ir::checkpoint::{Checkpoint, CheckpointOptions, TensorSource};
use millrace_ir::{DType, Error, Kind, Module, Result};
use serde_json::Value;

use super::config::{Family, ModelConfig, token_ids};
use super::{bert, decoder};

/// Largest small file (configuration, tokenizer) that is read.
const SMALL_FILE: u64 = 64 << 20;

/// Element type of weights and activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Precision {
    /// As the checkpoint says.
    #[default]
    Auto,
    /// This type.
    Fixed(DType),
}

/// Sizes a step may have; `None` means the default of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Options {
    /// Element type.
    pub precision: Precision,
    /// Most sequences of a step; 8 by default.
    pub max_batch_size: Option<u64>,
    /// Longest prompt; the longest sequence by default.
    pub max_input_len: Option<u64>,
    /// Longest sequence; the model's by default, at most 8192.
    pub max_seq_len: Option<u64>,
    /// Most packed tokens of a step; by default one longest prompt, at most 8192.
    pub max_num_tokens: Option<u64>,
    /// Rows of logits of a step; `max_batch_size` by default.
    pub max_logit_rows: Option<u64>,
    /// Weights are seeded random numbers; only `config.json` is read.
    pub dummy_weights: bool,
    /// Accept symbolic links among the weight files.
    pub follow_links: bool,
}

/// The sizes after defaults; stored in the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most sequences of a step.
    pub max_batch_size: u64,
    /// Longest prompt.
    pub max_input_len: u64,
    /// Longest sequence.
    pub max_seq_len: u64,
    /// Most packed tokens of a step.
    pub max_num_tokens: u64,
    /// Most rows of logits of a step.
    pub max_logit_rows: u64,
    /// Tokens of one cache page.
    pub tokens_per_block: u64,
}

impl Limits {
    /// Pages that hold every sequence at its longest.
    pub fn max_pages(&self) -> u64 {
        self.max_batch_size * self.max_seq_len.div_ceil(self.tokens_per_block)
    }

    /// The limits where the symbols of `module` have narrower bounds than these.
    ///
    /// # Errors
    /// `compile/bad-profile` if sequences of a batch do not have a token each.
    pub fn within(self, module: &Module) -> Result<Limits> {
        let most = |name: &str| module.dims.iter().find(|d| d.sym.name() == name).map_or(u64::MAX, |d| d.max);
        let max_seq_len = self.max_seq_len.min(most("p").saturating_mul(self.tokens_per_block));
        let max_num_tokens = self.max_num_tokens.min(most("t"));
        // An encoder takes a text in one step; a decoder's prompt may take several.
        let one_step = if most("p") == u64::MAX { max_num_tokens } else { u64::MAX };
        let limits = Limits {
            max_batch_size: self.max_batch_size.min(most("b")),
            max_input_len: self.max_input_len.min(max_seq_len).min(one_step),
            max_seq_len,
            max_num_tokens,
            max_logit_rows: self.max_logit_rows.min(most("r")),
            tokens_per_block: self.tokens_per_block,
        };
        if limits.max_num_tokens < limits.max_batch_size {
            let message = format!(
                "the profiles take {} tokens a step, and {} sequences that have at least one each",
                limits.max_num_tokens, limits.max_batch_size
            );
            return Err(Error::new(Kind::Usage, "compile/bad-profile", message).hint("bound b by t"));
        }
        Ok(limits)
    }

    fn resolve(config: &ModelConfig, options: &Options, max_length: Option<u64>) -> Result<Limits> {
        let decoder = config.family != Family::Bert;
        let model_max = max_length.unwrap_or(config.max_positions).min(config.max_positions);
        let max_seq_len = options.max_seq_len.unwrap_or(model_max.min(8192));
        let max_input_len = options.max_input_len.unwrap_or(max_seq_len).min(max_seq_len);
        let max_batch_size = options.max_batch_size.unwrap_or(8);
        let natural = if decoder { max_input_len } else { max_input_len.saturating_mul(max_batch_size) };
        let max_num_tokens =
            options.max_num_tokens.unwrap_or(natural.clamp(max_batch_size, 8192.max(max_batch_size)));
        let limits = Limits {
            max_batch_size,
            max_input_len,
            max_seq_len,
            max_num_tokens,
            max_logit_rows: options.max_logit_rows.unwrap_or(max_batch_size),
            tokens_per_block: 32,
        };
        let sizes = [
            ("--max-batch-size", max_batch_size),
            ("--max-input-len", max_input_len),
            ("--max-seq-len", max_seq_len),
            ("--max-num-tokens", max_num_tokens),
            ("--max-logit-rows", limits.max_logit_rows),
        ];
        let wrong = |message: String| Err(Error::new(Kind::Usage, "compile/bad-limit", message));
        for (flag, value) in sizes {
            if !(1..=1 << 24).contains(&value) {
                return wrong(format!("{flag} must be in 1..=16777216, not {value}"));
            }
        }
        if max_seq_len > config.max_positions {
            return wrong(format!(
                "--max-seq-len {max_seq_len} exceeds the model's max_position_embeddings {}",
                config.max_positions
            ));
        }
        if max_num_tokens < max_batch_size {
            return wrong(format!(
                "--max-num-tokens {max_num_tokens} is below --max-batch-size {max_batch_size}"
            ));
        }
        if !decoder && max_num_tokens < max_input_len {
            return wrong(format!(
                "--max-num-tokens {max_num_tokens} is below --max-input-len {max_input_len}"
            ));
        }
        Ok(limits)
    }
}

/// A model folder, opened and read as far as compiling needs it.
pub struct SourceFolder {
    /// The folder.
    pub path: PathBuf,
    /// Parsed `config.json`.
    pub config: ModelConfig,
    /// Bytes of `config.json`.
    pub config_bytes: Vec<u8>,
    /// Bytes of `generation_config.json`.
    pub generation_config: Option<Vec<u8>>,
    /// Bytes of `tokenizer.json`.
    pub tokenizer: Option<Vec<u8>>,
    /// Bytes of `tokenizer_config.json`.
    pub tokenizer_config: Option<Vec<u8>>,
    /// Text of `chat_template.jinja`.
    pub chat_template: Option<Vec<u8>>,
    /// Weights; none when they are random.
    pub checkpoint: Option<Checkpoint>,
    /// Longest input the sentence encoder was set up for.
    pub max_length: Option<u64>,
    /// Whether embeddings are normalised.
    pub normalize: bool,
}

fn small_file(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = folder.join(name);
    let read = || -> std::io::Result<Option<Vec<u8>>> {
        use std::io::Read;
        let file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let mut bytes = Vec::new();
        file.take(SMALL_FILE + 1).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    };
    let bytes = read().map_err(|e| Error::io("read", &path, &e))?;
    match bytes {
        Some(b) if b.len() as u64 > SMALL_FILE => {
            let message = format!("is larger than {SMALL_FILE} bytes");
            Err(Error::new(Kind::BadInput, "import/file-too-large", message).at(path.display()))
        }
        other => Ok(other),
    }
}

fn json(folder: &Path, name: &str, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|e| {
        Error::new(Kind::BadInput, "import/bad-json", format!("is no valid JSON: {e}"))
            .at(folder.join(name).display())
    })
}

impl SourceFolder {
    /// Opens a model folder.
    ///
    /// # Errors
    /// Missing or malformed files, unsupported models, unsafe or broken weight files.
    pub fn open(path: &Path, options: &Options) -> Result<Self> {
        let config_bytes = small_file(path, "config.json")?.ok_or_else(|| {
            Error::new(Kind::BadInput, "import/no-config", "there is no config.json")
                .at(path.display())
                .hint("name a Hugging Face model folder, or an .ir file")
        })?;
        let mut config = ModelConfig::from_json(&json(path, "config.json", &config_bytes)?)
            .map_err(|e| e.at(path.display()))?;
        let generation_config = small_file(path, "generation_config.json")?;
        if let Some(bytes) = &generation_config {
            let value = json(path, "generation_config.json", bytes)?;
            let eos = token_ids(value.get("eos_token_id"));
            if !eos.is_empty() {
                config.eos = eos;
            }
            config.bos = token_ids(value.get("bos_token_id")).first().copied().or(config.bos);
        }
        let checkpoint = if options.dummy_weights {
            None
        } else {
            let follow = CheckpointOptions { follow_links: options.follow_links };
            Some(Checkpoint::open_with(path, &follow)?)
        };
        let (mut max_length, mut normalize) = (None, true);
        if config.family == Family::Bert {
            if let Some(bytes) = small_file(path, "sentence_bert_config.json")? {
                max_length = json(path, "sentence_bert_config.json", &bytes)?
                    .get("max_seq_length")
                    .and_then(Value::as_u64);
            }
            if let Some(bytes) = small_file(path, "modules.json")? {
                let modules = json(path, "modules.json", &bytes)?;
                normalize = modules.as_array().is_some_and(|list| {
                    list.iter().any(|m| m["type"].as_str().is_some_and(|t| t.ends_with("Normalize")))
                });
            }
            if let Some(bytes) = small_file(path, "1_Pooling/config.json")? {
                let pooling = json(path, "1_Pooling/config.json", &bytes)?;
                let on = |key: &str| pooling[key].as_bool().unwrap_or(false);
                let others = [
                    "pooling_mode_cls_token",
                    "pooling_mode_max_tokens",
                    "pooling_mode_mean_sqrt_len_tokens",
                ];
                if others.into_iter().any(on)
                    || !pooling["pooling_mode_mean_tokens"].as_bool().unwrap_or(true)
                {
                    let message = "only mean pooling is supported";
                    return Err(Error::new(Kind::Unsupported, "import/unsupported-option", message)
                        .at(path.join("1_Pooling/config.json").display()));
                }
            }
        }
        Ok(SourceFolder {
            config,
            config_bytes,
            generation_config,
            tokenizer: small_file(path, "tokenizer.json")?,
            tokenizer_config: small_file(path, "tokenizer_config.json")?,
            chat_template: small_file(path, "chat_template.jinja")?,
            checkpoint,
            max_length,
            normalize,
            path: path.to_path_buf(),
        })
    }

    /// The element type `precision` stands for.
    pub fn dtype(&self, precision: Precision) -> DType {
        match precision {
            Precision::Fixed(dtype) => dtype,
            Precision::Auto => self.config.dtype,
        }
    }
}

/// Builds the imported module of a folder and the limits it was built for.
///
/// # Errors
/// `import/tensors` with every missing, mis-shaped and unused tensor; `compile/bad-limit`.
pub fn import(folder: &SourceFolder, options: &Options) -> Result<(Module, Limits)> {
    let limits = Limits::resolve(&folder.config, options, folder.max_length)?;
    let dtype = folder.dtype(options.precision);
    if !matches!(dtype, DType::F32 | DType::BF16 | DType::F16) {
        let message = format!("models compute in float32, float16 or bfloat16, not {dtype}");
        return Err(Error::new(Kind::Unsupported, "import/unsupported-option", message));
    }
    let names = folder.checkpoint.iter().flat_map(|c| c.tensors()).map(|t| t.name.clone()).collect();
    let source = folder.checkpoint.as_ref().map(|c| c as &dyn TensorSource);
    let module = match folder.config.family {
        Family::Bert => {
            bert::build("encoder", &folder.config, &limits, dtype, folder.normalize, source, names)
        }
        _ => decoder::build("decoder", &folder.config, &limits, dtype, source, names),
    };
    module.map(|m| (m, limits)).map_err(|e| e.at(folder.path.display()))
}
