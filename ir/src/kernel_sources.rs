//! Texts of device kernels, as an engine keeps them for whoever wants to read what runs.
//!
//! A *part* is a run of lines up to and with a blank line. Kernels of one family differ in few parts, and all begin with
//! the same ones, so each part is stored once and a text is a list of parts. Nothing a run needs is here: a runtime
//! never reads it.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// Longest text of one kernel in bytes.
const LONGEST: usize = 16 << 20;

/// The texts of an engine's kernels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelSources {
    parts: Vec<String>,
    kernels: Vec<Entry>,
}

/// One kernel: hash of text and options, and the parts of its text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    source: String,
    parts: Vec<usize>,
}

fn bad(message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, "engine/kernel-sources", message)
        .hint("the engine was altered or is of another version: build it again")
}

impl KernelSources {
    /// From pairs of hash and text, in order.
    pub fn of<'a>(texts: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let mut sources = KernelSources::default();
        let mut known: HashMap<&str, usize> = HashMap::new();
        for (source, text) in texts {
            let mut parts = Vec::new();
            let mut rest = text;
            while !rest.is_empty() {
                let end = rest.find("\n\n").map_or(rest.len(), |at| at + 2);
                let (part, after) = rest.split_at(end);
                let fresh = known.len();
                let index = *known.entry(part).or_insert(fresh);
                if index == fresh {
                    sources.parts.push(part.to_string());
                }
                parts.push(index);
                rest = after;
            }
            sources.kernels.push(Entry { source: source.to_string(), parts });
        }
        sources
    }

    /// The text of the kernel with the hash `source`; `None` if it is not here.
    pub fn text(&self, source: &str) -> Option<String> {
        let kernel = self.kernels.iter().find(|k| k.source == source)?;
        Some(kernel.parts.iter().filter_map(|p| self.parts.get(*p)).map(String::as_str).collect())
    }

    /// Number of kernels.
    pub fn len(&self) -> usize {
        self.kernels.len()
    }

    /// Whether there is no kernel.
    pub fn is_empty(&self) -> bool {
        self.kernels.is_empty()
    }

    /// JSON: `{"parts": [text, ..], "kernels": [{"source": hash, "parts": [index, ..]}, ..]}`.
    pub fn encode(&self) -> Vec<u8> {
        // A struct of strings and numbers has no reason to fail.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads what [`KernelSources::encode`] wrote.
    ///
    /// # Errors
    /// `engine/kernel-sources`.
    pub fn decode(bytes: &[u8]) -> Result<KernelSources> {
        let sources: KernelSources =
            serde_json::from_slice(bytes).map_err(|e| bad(format!("the texts are malformed: {e}")))?;
        for kernel in &sources.kernels {
            let mut len = 0usize;
            for part in &kernel.parts {
                let part =
                    sources.parts.get(*part).ok_or_else(|| bad("a text has a part that is not there"))?;
                len = len.saturating_add(part.len());
            }
            if len > LONGEST {
                return Err(bad(format!("a text of {len} bytes is too long")));
            }
        }
        Ok(sources)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back_and_equal_parts_are_stored_once() {
        let texts = [
            ("a", "x\n\ny\n\nz"),
            ("b", "x\n\ny2\n\nz"),
            ("c", ""),
            ("d", "\n\n\n\n\n"),
            ("e", "x\n\nx\n\n"),
        ];
        let sources = KernelSources::of(texts);
        assert_eq!(sources.parts, ["x\n\n", "y\n\n", "z", "y2\n\n", "\n\n", "\n"]);
        let sources = KernelSources::decode(&sources.encode()).unwrap();
        assert_eq!((sources.len(), sources.is_empty()), (5, false));
        for (hash, text) in texts {
            assert_eq!(sources.text(hash).as_deref(), Some(text));
        }
        assert_eq!(sources.text("f"), None);
    }

    #[test]
    fn forged_texts_are_errors() {
        let code = |text: &str| KernelSources::decode(text.as_bytes()).unwrap_err().code();
        let long = format!(
            r#"{{"parts":["{}"],"kernels":[{{"source":"a","parts":[{}0]}}]}}"#,
            "x".repeat(1 << 16),
            "0,".repeat(1 << 9)
        );
        for text in ["", "{}", r#"{"parts":[],"kernels":[{"source":"a","parts":[0]}]}"#, &long] {
            assert_eq!(code(text), "engine/kernel-sources", "{}", text.len());
        }
    }
}
