//! `config.json`: the fields that shape a graph, with the defaults of the families.

use millrace_ir::ops::rope::RopeScaling;
use millrace_ir::ops::unary::UnaryFn;
use millrace_ir::{DType, Error, Kind, Result};
use serde_json::Value;

/// Largest extent a configuration may name; larger ones are slips or attacks.
const LARGEST: u64 = 1 << 24;

/// A model family the compiler knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 1 to 3 and everything built like them.
    Llama,
    /// Llama with an optional sliding window.
    Mistral,
    /// Biases on q, k and v.
    Qwen2,
    /// Normalised q and k heads, free head size.
    Qwen3,
    /// Encoders with mean pooling.
    Bert,
}

/// What a graph is built from.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub family: Family,
    /// Element type the checkpoint says it has.
    pub dtype: DType,
    /// Rows of the embedding.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Width of the feed-forward layer.
    pub intermediate_size: u64,
    /// Number of layers.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Head size.
    pub head_dim: u64,
    /// Longest sequence the model was made for.
    pub max_positions: u64,
    /// Added in norms.
    pub norm_eps: f64,
    /// Feed-forward activation.
    pub activation: UnaryFn,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Window of each layer, 0 for none.
    pub windows: Vec<u64>,
    /// Output head shares the embedding.
    pub tied: bool,
    /// Biases on q, k, v.
    pub qkv_bias: bool,
    /// Bias on the attention output.
    pub o_bias: bool,
    /// Biases in the feed-forward layer.
    pub mlp_bias: bool,
    /// Rows of the token type embedding, encoders only.
    pub type_vocab_size: u64,
    /// End of sequence tokens.
    pub eos: Vec<u32>,
    /// Begin of sequence token.
    pub bos: Option<u32>,
}

struct Reader<'a>(&'a Value);

fn bad(key: &str, message: impl std::fmt::Display) -> Error {
    Error::new(Kind::BadInput, "import/bad-config", format!("`{key}` {message}")).at("config.json")
}

impl Reader<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) if (1..=LARGEST).contains(&n) => Ok(Some(n)),
                _ => Err(bad(key, format!("must be an integer in 1..={LARGEST}, not {v}"))),
            },
        }
    }

    fn need(&self, key: &str) -> Result<u64> {
        self.size(key)?.ok_or_else(|| bad(key, "is missing"))
    }

    fn float(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v
                .as_f64()
                .filter(|f| f.is_finite())
                .ok_or_else(|| bad(key, format!("must be a number, not {v}"))),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| bad(key, format!("must be true or false, not {v}"))),
        }
    }

    fn word(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => v.as_str().map(Some).ok_or_else(|| bad(key, format!("must be a string, not {v}"))),
        }
    }
}

/// Token ids given as one number or a list.
pub(super) fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Some(Value::Array(items)) => items.iter().filter_map(one).collect(),
        Some(v) => one(v).into_iter().collect(),
        None => Vec::new(),
    }
}

impl ModelConfig {
    /// Reads `config.json`, already parsed.
    ///
    /// # Errors
    /// `import/unsupported-model` for an unknown `model_type`, `import/unsupported-option` for a setting that would
    /// change results, `import/bad-config` for missing or malformed fields.
    pub fn from_json(json: &Value) -> Result<Self> {
        let reader = Reader(json);
        if !json.is_object() {
            return Err(
                Error::new(Kind::BadInput, "import/bad-config", "is no JSON object").at("config.json")
            );
        }
        let family = match reader.word("model_type")? {
            Some("llama") => Family::Llama,
            Some("mistral") => Family::Mistral,
            Some("qwen2") => Family::Qwen2,
            Some("qwen3") => Family::Qwen3,
            Some("bert") => Family::Bert,
            other => {
                let name = other.unwrap_or("(none)");
                return Err(Error::new(
                    Kind::Unsupported,
                    "import/unsupported-model",
                    format!("model_type `{name}` is not supported"),
                )
                .at("config.json")
                .hint("supported are llama, mistral, qwen2, qwen3 and bert; other models can be written as IR text"));
            }
        };
        let hidden_size = reader.need("hidden_size")?;
        let heads = reader.need("num_attention_heads")?;
        let kv_heads =
            if family == Family::Bert { heads } else { reader.size("num_key_value_heads")?.unwrap_or(heads) };
        let default_head = if family == Family::Qwen3 { 128 } else { hidden_size / heads };
        let head_dim = reader.size("head_dim")?.unwrap_or(default_head);
        if !heads.is_multiple_of(kv_heads) {
            return Err(bad("num_key_value_heads", format!("of {kv_heads} does not divide {heads} heads")));
        }
        if family == Family::Bert && heads * head_dim != hidden_size {
            return Err(bad(
                "num_attention_heads",
                format!("of {heads} does not divide hidden_size {hidden_size}"),
            ));
        }
        if head_dim == 0 || (family != Family::Bert && !head_dim.is_multiple_of(2)) {
            return Err(bad("head_dim", format!("of {head_dim} must be even and positive")));
        }
        let layers = reader.need("num_hidden_layers")?;
        if layers > 4096 {
            return Err(bad("num_hidden_layers", format!("of {layers} exceeds 4096")));
        }
        let (rope_base, rope_scaling) = rope(&reader)?;
        let activation =
            reader.word("hidden_act")?.unwrap_or(if family == Family::Bert { "gelu" } else { "silu" });
        let activation = match activation {
            "silu" | "swish" => UnaryFn::Silu,
            "gelu" => UnaryFn::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => UnaryFn::GeluTanh,
            "relu" => UnaryFn::Relu,
            "tanh" => UnaryFn::Tanh,
            "sigmoid" => UnaryFn::Sigmoid,
            other => {
                let message = format!("hidden_act `{other}` is not supported");
                return Err(
                    Error::new(Kind::Unsupported, "import/unsupported-option", message).at("config.json")
                );
            }
        };
        if family == Family::Bert {
            let embedding = reader.word("position_embedding_type")?.unwrap_or("absolute");
            if embedding != "absolute" {
                let message = format!("position_embedding_type `{embedding}` is not supported");
                return Err(
                    Error::new(Kind::Unsupported, "import/unsupported-option", message).at("config.json")
                );
            }
        }
        let dtype = match reader.word("dtype")?.or(reader.word("torch_dtype")?).unwrap_or("float32") {
            "float32" => DType::F32,
            "float16" => DType::F16,
            "bfloat16" => DType::BF16,
            other => return Err(bad("dtype", format!("`{other}` is not float32, float16 or bfloat16"))),
        };
        let attention_bias = reader.flag("attention_bias", false)?;
        Ok(ModelConfig {
            family,
            dtype,
            vocab_size: reader.need("vocab_size")?,
            hidden_size,
            intermediate_size: reader.need("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions: reader.size("max_position_embeddings")?.unwrap_or(2048),
            norm_eps: match family {
                Family::Bert => reader.float("layer_norm_eps", 1e-12)?,
                _ => reader.float("rms_norm_eps", 1e-6)?,
            },
            activation,
            rope_base,
            rope_scaling,
            windows: windows(&reader, family, layers)?,
            tied: reader.flag("tie_word_embeddings", false)?,
            qkv_bias: family == Family::Qwen2 || (family != Family::Mistral && attention_bias),
            o_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            mlp_bias: family == Family::Llama && reader.flag("mlp_bias", false)?,
            type_vocab_size: reader.size("type_vocab_size")?.unwrap_or(2),
            eos: token_ids(reader.get("eos_token_id")),
            bos: token_ids(reader.get("bos_token_id")).first().copied(),
        })
    }
}

/// The sliding window of a mistral whose configuration does not mention it.
const MISTRAL_WINDOW: u64 = 4096;

/// The sliding window of each layer: `layer_types` decides where given, else the families' own switches.
fn windows(reader: &Reader<'_>, family: Family, layers: u64) -> Result<Vec<u64>> {
    let window = match family {
        // Without the key there is a window, and only `null` says that there is none.
        Family::Mistral if reader.0.get("sliding_window").is_none() => MISTRAL_WINDOW,
        Family::Mistral => reader.size("sliding_window")?.unwrap_or(0),
        Family::Qwen2 | Family::Qwen3 if reader.flag("use_sliding_window", false)? => {
            reader.size("sliding_window")?.unwrap_or(0)
        }
        _ => 0,
    };
    if let Some(Value::Array(types)) = reader.get("layer_types") {
        if types.len() as u64 != layers {
            return Err(bad("layer_types", format!("names {} layers of {layers}", types.len())));
        }
        let sliding = match family {
            Family::Mistral => Some(window).filter(|w| *w > 0),
            _ => reader.size("sliding_window")?,
        };
        return types
            .iter()
            .map(|t| match t.as_str() {
                Some("full_attention") => Ok(0),
                Some("sliding_attention") => sliding.ok_or_else(|| bad("sliding_window", "is missing")),
                _ => Err(Error::new(
                    Kind::Unsupported,
                    "import/unsupported-option",
                    format!("layer type {t} is not supported"),
                )
                .at("config.json")),
            })
            .collect();
    }
    let full_below = match family {
        Family::Qwen2 | Family::Qwen3 => {
            reader.0.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28)
        }
        _ => 0,
    };
    Ok((0..layers).map(|layer| if layer < full_below { 0 } else { window }).collect())
}

/// Base and scaling in either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`.
fn rope(reader: &Reader<'_>) -> Result<(f64, RopeScaling)> {
    let nested = reader.get("rope_parameters").or(reader.get("rope_scaling"));
    let inner = Reader(nested.unwrap_or(&Value::Null));
    let base = match inner.get("rope_theta") {
        Some(_) => inner.float("rope_theta", 10000.0)?,
        None => reader.float("rope_theta", 10000.0)?,
    };
    if base <= 0.0 {
        return Err(bad("rope_theta", "must be positive"));
    }
    let kind = inner.word("rope_type")?.or(inner.word("type")?).unwrap_or("default");
    let positive = |key: &str| -> Result<f64> {
        let value = inner.get(key).and_then(Value::as_f64).filter(|v| *v > 0.0 && v.is_finite());
        value.ok_or_else(|| bad(key, "of the rope settings must be a positive number"))
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: positive("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: positive("factor")?,
            low_freq_factor: positive("low_freq_factor")?,
            high_freq_factor: positive("high_freq_factor")?,
            original: positive("original_max_position_embeddings")?,
        },
        other => {
            let message = format!("rope type `{other}` is not supported");
            return Err(Error::new(Kind::Unsupported, "import/unsupported-option", message)
                .at("config.json")
                .hint("supported are default, linear and llama3"));
        }
    };
    let partial = reader.float("partial_rotary_factor", 1.0)?;
    if (inner.float("partial_rotary_factor", partial)? - 1.0).abs() > 1e-9 {
        let message = "a partial_rotary_factor other than 1 is not supported";
        return Err(Error::new(Kind::Unsupported, "import/unsupported-option", message).at("config.json"));
    }
    Ok((base, scaling))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mistral(more: &[(&str, Value)]) -> Result<Vec<u64>> {
        let mut config = json!({
            "model_type": "mistral", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2,
            "vocab_size": 16, "intermediate_size": 16,
        });
        more.iter().for_each(|(key, value)| config[*key] = value.clone());
        Ok(ModelConfig::from_json(&config)?.windows)
    }

    /// The default of the model's configuration class is a window; its absence is written as null.
    #[test]
    fn mistrals_have_a_window_unless_it_is_null() {
        let types = json!(["full_attention", "sliding_attention"]);
        assert_eq!(mistral(&[]).unwrap(), [4096, 4096]);
        assert_eq!(mistral(&[("sliding_window", json!(64))]).unwrap(), [64, 64]);
        assert_eq!(mistral(&[("sliding_window", Value::Null)]).unwrap(), [0, 0]);
        assert_eq!(mistral(&[("layer_types", types.clone())]).unwrap(), [0, 4096]);
        let missing = mistral(&[("sliding_window", Value::Null), ("layer_types", types)]).unwrap_err();
        assert_eq!(missing.code(), "import/bad-config");
    }
}
