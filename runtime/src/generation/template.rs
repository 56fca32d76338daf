//! Chat templates: a list of messages becomes the prompt text that a model was trained on.
//!
//! The templates are Jinja as Hugging Face models ship it: blocks are trimmed (`trim_blocks`,
//! `lstrip_blocks`), Python's string and dict methods work, loops know `break` and `continue`, and
//! `raise_exception`, `strftime_now` and `tojson` exist. `{% generation %}` blocks, which mark training
//! targets, are plain content. `strftime_now` is in UTC.
//!
//! A template is data of the model: it cannot read files or the environment.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use millrace_ir::{Error, Kind, Result};
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use super::{template_json, template_time};

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role` saying `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// A parsed chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Parses `source`. The templates see the texts `bos_token` and `eos_token`; an absent one is undefined.
    ///
    /// Error `template/syntax`, placed at the line.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self> {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self::with_clock(source, bos_token, eos_token, now)
    }

    /// As [`new`](Self::new), with `now` (seconds since 1970 UTC) as the clock of `strftime_now`, so that a
    /// template that prints the date can give the same prompt twice.
    pub fn with_clock(
        source: &str,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
        now: impl Fn() -> u64 + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", template_json::tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: &str| strftime_now(format, now()));
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(|source| {
            at_line(Error::new(Kind::BadInput, "template/syntax", explain(&source)), &source)
                .hint("check the chat template of the model, or give the prompt without a chat template")
        })?;
        Ok(ChatTemplate {
            environment,
            bos_token: bos_token.map(str::to_owned),
            eos_token: eos_token.map(str::to_owned),
        })
    }

    /// The prompt text of `messages`. `add_generation_prompt` ends it with the opening of the assistant's
    /// answer; `extra` are further variables (`tools`, `enable_thinking`, ...), which win over the usual ones.
    ///
    /// Errors: `template/refused` with the template's own words if it rejects the messages (say, roles that
    /// do not alternate), `template/render` for everything else that fails.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String> {
        let messages: Value = messages
            .iter()
            .map(|message| {
                template_json::ordered_map(vec![
                    ("role".to_owned(), Value::from(message.role.as_str())),
                    ("content".to_owned(), Value::from(message.content.as_str())),
                ])
            })
            .collect();
        let mut variables = vec![
            ("messages".to_owned(), messages),
            ("add_generation_prompt".to_owned(), Value::from(add_generation_prompt)),
        ];
        for (name, token) in [("bos_token", &self.bos_token), ("eos_token", &self.eos_token)] {
            if let Some(token) = token {
                variables.push((name.to_owned(), Value::from(token.as_str())));
            }
        }
        variables.retain(|(name, _)| !extra.contains_key(name));
        variables.extend(extra.iter().map(|(name, value)| (name.clone(), template_json::from_json(value))));
        let template = self.environment.get_template(NAME).map_err(|e| render_error(&e))?;
        template.render(template_json::ordered_map(variables)).map_err(|e| render_error(&e))
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("bos_token", &self.bos_token)
            .field("eos_token", &self.eos_token)
            .finish_non_exhaustive()
    }
}

/// What a template said by `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "the template raised an exception")
        .with_source(Refused(message)))
}

fn strftime_now(format: &str, now: u64) -> Result<String, minijinja::Error> {
    template_time::strftime(format, now)
        .map_err(|message| minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

fn render_error(error: &minijinja::Error) -> Error {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(Refused(message)) = inner.downcast_ref::<Refused>() {
            return Error::new(
                Kind::BadInput,
                "template/refused",
                format!("the chat template refuses: {message}"),
            )
            .hint("change the roles or the number of messages as the template asks");
        }
        source = inner.source();
    }
    at_line(Error::new(Kind::BadInput, "template/render", explain(error)), error)
}

fn explain(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

fn at_line(error: Error, source: &minijinja::Error) -> Error {
    match source.line() {
        Some(line) => error.at(format!("chat template line {line}")),
        None => error.at("chat template"),
    }
}

/// Replaces `{% generation %}` and `{% endgeneration %}` by a condition that always holds; whitespace
/// control signs stay.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let body = &rest[start + 2..start + length];
        let name = body.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        out.push_str(&rest[..start + 2]);
        match replacement {
            Some(tag) => out.push_str(&body.replace(name, &format!(" {tag} "))),
            None => {
                // Only the opening was read: a `%}` inside a string must not hide a later tag.
                rest = &rest[start + 2..];
                continue;
            }
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

/// Templates are shared between threads behind an [`Arc`].
const _: fn() = || {
    fn shareable<T: Send + Sync>() {}
    shareable::<Arc<ChatTemplate>>();
};

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
