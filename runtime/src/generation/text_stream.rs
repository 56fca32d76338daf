//! Text of a token sequence that grows by one token at a time.
//!
//! A token's text depends on what stands before it (a leading space falls away at the start) and may end
//! within a character. So the stream keeps a short window of tokens: those whose text is out already, as
//! context, and those whose text is not complete. Each token costs a decode of that window only.
//!
//! Invariant: all pieces and the rest from [`TextStream::finish`], joined, are the decode of all tokens at
//! once, provided that the decoder's text for a token does not change when later tokens arrive. Runs of byte
//! tokens (`<0xE2>`), which decoders judge as a whole, are held back until the run ends.

use millrace_ir::Result;

use super::Tokenizer;

/// What decoders write for bytes that are no character (yet).
const REPLACEMENT: char = '\u{FFFD}';
/// From this many tokens on, the window is cut even though its text ends in a replacement character.
const LONG_WINDOW: usize = 16;
/// A cut leaves at least this many tokens, hence bytes, behind it: a character has at most four.
const KEPT: usize = 4;

/// Turns tokens into text piece by piece; see [`Tokenizer::stream`].
#[derive(Clone, Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    /// The first `context` tokens are text that is out; the others follow them in the sequence.
    window: Vec<u32>,
    context: usize,
    /// How many bytes of the window's text are out.
    emitted: usize,
}

impl<'t> TextStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, skip_special: bool) -> Self {
        TextStream { tokenizer, skip_special, window: Vec::new(), context: 0, emitted: 0 }
    }

    /// Takes the next token; the text that is complete because of it, never empty, never half a character.
    pub fn push(&mut self, token: u32) -> Result<Option<String>> {
        // A token that decodes to nothing wherever it stands must not fill the window.
        let Some(spelling) = self.tokenizer.id_to_token(token) else { return Ok(None) };
        if self.skip_special && self.tokenizer.is_special(&spelling) {
            return Ok(None);
        }
        self.window.push(token);
        if is_byte_token(&spelling) {
            return Ok(None);
        }
        let text = self.decode(&self.window)?;
        let complete = !text.ends_with(REPLACEMENT);
        let stable = if complete { text.len() } else { text.len() - REPLACEMENT.len_utf8() };
        let piece = text.get(self.emitted..stable).filter(|piece| !piece.is_empty()).map(str::to_owned);
        if piece.is_some() {
            self.emitted = stable;
        }
        if complete && piece.is_some() {
            self.window.drain(..self.context);
            self.context = self.window.len();
            self.emitted = self.decode(&self.window)?.len();
        } else if self.window.len() >= LONG_WINDOW {
            self.cut(&text)?;
        }
        Ok(piece)
    }

    /// The text still held back: an unfinished character as a replacement character, or a run of byte tokens.
    /// The stream is then empty and may be used for another sequence.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.decode(&self.window)?;
        let rest = text.get(self.emitted..).unwrap_or_default().to_owned();
        *self = TextStream::new(self.tokenizer, self.skip_special);
        Ok(rest)
    }

    #[cfg(test)]
    pub(super) fn window_len(&self) -> usize {
        self.window.len()
    }

    fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, self.skip_special)
    }

    /// Drops leading tokens of a window that never completes, where its text falls apart there.
    fn cut(&mut self, text: &str) -> Result<()> {
        let at = self.window.len() - KEPT;
        let head = self.decode(&self.window[..at])?;
        let tail = self.decode(&self.window[at..])?;
        let splits =
            text.len() == head.len() + tail.len() && text.starts_with(&head) && text.ends_with(&tail);
        if splits && !tail.is_empty() && head.len() <= self.emitted {
            self.window.drain(..at);
            self.context = 0;
            self.emitted -= head.len();
        }
        Ok(())
    }
}

/// Whether a vocabulary spells a raw byte this way: `<0x0A>`.
fn is_byte_token(spelling: &str) -> bool {
    let Some(digits) = spelling.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>')) else {
        return false;
    };
    digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit())
}
