//! What a `tokenizer_config.json` says besides the tokenizer itself: special tokens and chat templates.
//!
//! Terms: a special token is written as a string or as an object with its `content`; `chat_template` is one
//! template or a list of named ones, of which `default` is the one for plain chats.

use millrace_ir::{Error, Kind, Result};
use serde_json::Value;

/// The parts of a `tokenizer_config.json` that generation needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// Text of the token that begins a sequence.
    pub bos_token: Option<String>,
    /// Text of the token that ends a sequence.
    pub eos_token: Option<String>,
    /// Text of the token for what the vocabulary does not know.
    pub unk_token: Option<String>,
    /// Text of the token that fills up a padded batch.
    pub pad_token: Option<String>,
    /// Chat templates as (name, source), in file order.
    pub chat_templates: Vec<(String, String)>,
}

impl TokenizerConfig {
    /// Reads the content of a `tokenizer_config.json`; `tokenizer/config` if it is malformed.
    pub fn from_bytes(json: &[u8]) -> Result<Self> {
        let root: Value = serde_json::from_slice(json).map_err(|e| malformed(format!("not JSON: {e}")))?;
        let Value::Object(root) = root else { return Err(malformed("the root is not an object")) };
        let token = |key: &str| special_token(key, root.get(key));
        Ok(TokenizerConfig {
            bos_token: token("bos_token")?,
            eos_token: token("eos_token")?,
            unk_token: token("unk_token")?,
            pad_token: token("pad_token")?,
            chat_templates: chat_templates(root.get("chat_template"))?,
        })
    }

    /// Source of the template called `name`.
    pub fn chat_template(&self, name: &str) -> Option<&str> {
        self.chat_templates.iter().find(|(n, _)| n == name).map(|(_, source)| source.as_str())
    }

    /// Source of the template for plain chats: `default`, or the only one.
    pub fn default_chat_template(&self) -> Option<&str> {
        self.chat_template("default").or_else(|| match self.chat_templates.as_slice() {
            [(_, only)] => Some(only),
            _ => None,
        })
    }
}

fn special_token(key: &str, value: Option<&Value>) -> Result<Option<String>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(Value::Object(token)) => match token.get("content") {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            _ => Err(malformed(format!("`{key}` has no text in `content`"))),
        },
        Some(_) => Err(malformed(format!("`{key}` is neither a string nor an object"))),
    }
}

fn chat_templates(value: Option<&Value>) -> Result<Vec<(String, String)>> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::String(source)) => Ok(vec![("default".to_owned(), source.clone())]),
        Some(Value::Array(list)) => list.iter().map(named_template).collect(),
        Some(_) => Err(malformed("`chat_template` is neither a string nor a list")),
    }
}

fn named_template(entry: &Value) -> Result<(String, String)> {
    match (entry.get("name"), entry.get("template")) {
        (Some(Value::String(name)), Some(Value::String(source))) => Ok((name.clone(), source.clone())),
        _ => Err(malformed("an entry of `chat_template` lacks `name` or `template`")),
    }
}

fn malformed(message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, "tokenizer/config", message)
        .at("tokenizer_config.json")
        .hint("use the tokenizer_config.json that belongs to the model")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_tokens_as_strings_or_objects_and_named_templates() {
        let json =
            br#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null,
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}"#;
        let config = TokenizerConfig::from_bytes(json).unwrap();
        assert_eq!(config.bos_token.as_deref(), Some("<s>"));
        assert_eq!(config.eos_token.as_deref(), Some("</s>"));
        assert_eq!((config.pad_token.clone(), config.unk_token.clone()), (None, None));
        assert_eq!(config.default_chat_template(), Some("D"));
        assert_eq!(config.chat_template("tool_use"), Some("T"));
        let single = TokenizerConfig::from_bytes(br#"{"chat_template": "S"}"#).unwrap();
        assert_eq!(single.default_chat_template(), Some("S"));
    }

    #[test]
    fn malformed_parts_are_named() {
        for json in ["", "[]", r#"{"bos_token": 3}"#, r#"{"eos_token": {}}"#, r#"{"chat_template": 1}"#] {
            let error = TokenizerConfig::from_bytes(json.as_bytes()).unwrap_err();
            assert_eq!(error.code(), "tokenizer/config", "{json}");
        }
        let error = TokenizerConfig::from_bytes(br#"{"chat_template": [{"name": "x"}]}"#).unwrap_err();
        assert!(error.message().contains("template"));
    }
}
