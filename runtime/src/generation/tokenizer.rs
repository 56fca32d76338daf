//! Text to token ids and back, by the rules of a `tokenizer.json`.
//!
//! Invariant: padding and truncation that the file asks for are switched off, as a generation prompt must
//! neither be cut nor padded in silence. [`Tokenizer::encode_truncated`] cuts where that is wanted.
//!
//! The `tokenizers` library panics on some files that parse but contradict themselves. Such a panic is caught
//! here and becomes a typed error, as the file is input like any other; the panic hook still sees it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use millrace_ir::{Error, Kind, Result};
use tokenizers::{PostProcessor, TruncationDirection};

use super::TextStream;

/// A tokenizer read from a `tokenizer.json`.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    special_per_text: usize,
}

impl Tokenizer {
    /// Reads the content of a `tokenizer.json`; `tokenizer/malformed` if it is none, or one that cannot place
    /// its own special tokens around a text.
    pub fn from_bytes(json: &[u8]) -> Result<Self> {
        let read = || {
            let mut inner = tokenizers::Tokenizer::from_bytes(json)?;
            inner.with_padding(None);
            inner.with_truncation(None)?;
            let largest = inner.get_vocab(true).into_values().max();
            let special_per_text = inner.get_post_processor().map_or(0, |p| p.added_tokens(false));
            inner.post_process(tokenizers::Encoding::default(), None, true)?;
            Ok(Tokenizer { inner, vocab_size: largest.map_or(0, |id| id as usize + 1), special_per_text })
        };
        guarded("tokenizer/malformed", read)
            .map_err(|e| e.hint("use the tokenizer.json that belongs to the model"))
    }

    /// Token ids of `text`; with `add_special`, those the model expects around it (bos, `[CLS]`, `[SEP]`) as well.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        guarded("tokenizer/encode", || Ok(self.inner.encode_fast(text, add_special)?.get_ids().to_vec()))
    }

    /// Token ids of `text` with special tokens, the text cut at its end so that at most `max_length` ids
    /// result: the special tokens, the closing one included, are always kept.
    ///
    /// Error `tokenizer/max-length` if `max_length` does not even hold the special tokens.
    pub fn encode_truncated(&self, text: &str, max_length: usize) -> Result<Vec<u32>> {
        let room = max_length.checked_sub(self.special_per_text).ok_or_else(|| {
            let message = format!(
                "{max_length} tokens cannot hold the {} special tokens around a text",
                self.special_per_text
            );
            Error::new(Kind::BadInput, "tokenizer/max-length", message).hint("raise --max-input-len")
        })?;
        guarded("tokenizer/encode", || {
            let mut encoding = self.inner.encode_fast(text, false)?;
            if encoding.len() > room {
                encoding.truncate(room, 0, TruncationDirection::Right);
                // The part that was cut off would otherwise be given special tokens as well.
                encoding.take_overflowing();
            }
            Ok(self.inner.post_process(encoding, None, true)?.get_ids().to_vec())
        })
    }

    /// The text of `ids`; ids outside of the vocabulary have none. `skip_special` leaves out special tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded("tokenizer/decode", || self.inner.decode(ids, skip_special))
    }

    /// A stream that turns one token at a time into text.
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream::new(self, skip_special)
    }

    /// Largest token id plus one, added tokens included. A model's table may have more rows than this.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id spelled exactly `token` in the vocabulary, for example `<|end_of_text|>`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The vocabulary's spelling of `id`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether `token` is marked as special, so that `skip_special` leaves it out.
    pub fn is_special(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().is_special_token(token)
    }
}

/// What `call` into the library gives; its failure or panic as an error of `code`.
///
/// Unwind safety: `call` either owns what it builds or reads a tokenizer whose only mutable state is a cache of
/// finished results.
fn guarded<T>(code: &'static str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let message = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error.to_string(),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown cause");
            format!("the tokenizer contradicts itself: {text}")
        }
    };
    Err(Error::new(Kind::BadInput, code, message))
}

#[cfg(test)]
pub(super) mod fixtures;

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
