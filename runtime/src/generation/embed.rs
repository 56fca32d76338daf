//! Texts to embedding vectors.

use millrace_ir::{Error, Kind, Result};

use super::Tokenizer;

/// What an embedding model can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbedLimits {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Most texts per call.
    pub max_batch_size: usize,
    /// Most tokens per text; longer texts are cut.
    pub max_input_len: usize,
    /// Most tokens per call, all texts together.
    pub max_num_tokens: usize,
}

/// A model that turns token sequences into vectors.
pub trait EmbedModel {
    /// What the model can take; the same at every call.
    fn limits(&self) -> EmbedLimits;

    /// One vector per sequence of `ids`, in their order, all of one length. The sequences are within
    /// [`limits`](Self::limits) and not empty.
    fn embed(&mut self, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>>;
}

/// The embeddings of `texts`, in their order. Special tokens are added; a text longer than `max_input_len`
/// loses its end, not its closing special token. Texts are batched in order, as many as the limits allow.
///
/// Errors: those of [`Tokenizer::encode_truncated`]; `generation/empty-prompt` for a text without tokens,
/// `generation/token-out-of-range` (both placed at the text), `generation/bad-limits`, and those of the model.
pub fn embed_texts<M: EmbedModel + ?Sized>(
    model: &mut M,
    tokenizer: &Tokenizer,
    texts: &[&str],
) -> Result<Vec<Vec<f32>>> {
    let limits = model.limits();
    let max_length = limits.max_input_len.min(limits.max_num_tokens);
    if limits.max_batch_size == 0 || max_length == 0 {
        let message = "the model takes no texts or no tokens at once";
        return Err(Error::new(Kind::Incompatible, "generation/bad-limits", message));
    }
    let mut vectors = Vec::with_capacity(texts.len());
    let mut batch: Vec<Vec<u32>> = Vec::new();
    let mut batch_tokens = 0;
    for (index, text) in texts.iter().enumerate() {
        let ids = token_ids(tokenizer, text, max_length, limits.vocab_size)
            .map_err(|e| e.at(format!("text {index}")))?;
        if batch.len() == limits.max_batch_size || batch_tokens + ids.len() > limits.max_num_tokens {
            flush(model, &mut batch, &mut vectors)?;
            batch_tokens = 0;
        }
        batch_tokens += ids.len();
        batch.push(ids);
    }
    flush(model, &mut batch, &mut vectors)?;
    Ok(vectors)
}

fn token_ids(tokenizer: &Tokenizer, text: &str, max_length: usize, vocab_size: usize) -> Result<Vec<u32>> {
    let ids = tokenizer.encode_truncated(text, max_length)?;
    if ids.is_empty() {
        return Err(Error::new(Kind::BadInput, "generation/empty-prompt", "the text has no tokens"));
    }
    if let Some(bad) = ids.iter().find(|id| **id as usize >= vocab_size) {
        let message = format!("token {bad} is not below the vocabulary size {vocab_size}");
        return Err(Error::new(Kind::BadInput, "generation/token-out-of-range", message)
            .hint("the tokenizer has more tokens than the model's vocabulary: use the one that belongs to the model"));
    }
    Ok(ids)
}

/// Runs the batch, if any, and empties it.
fn flush<M: EmbedModel + ?Sized>(
    model: &mut M,
    batch: &mut Vec<Vec<u32>>,
    vectors: &mut Vec<Vec<f32>>,
) -> Result<()> {
    if batch.is_empty() {
        return Ok(());
    }
    let result = model.embed(batch)?;
    if result.len() != batch.len() {
        let message = format!("the model gave {} vectors for {} texts", result.len(), batch.len());
        return Err(Error::new(Kind::Internal, "generation/bad-embeddings", message));
    }
    vectors.extend(result);
    batch.clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generation::tokenizer::fixtures::word_piece;

    /// Remembers the batches; a text's vector holds its ids.
    struct Echo(EmbedLimits, Vec<Vec<usize>>);

    impl EmbedModel for Echo {
        fn limits(&self) -> EmbedLimits {
            self.0
        }

        fn embed(&mut self, ids: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
            self.1.push(ids.iter().map(Vec::len).collect());
            Ok(ids.iter().map(|list| list.iter().map(|id| *id as f32).collect()).collect())
        }
    }

    const LIMITS: EmbedLimits =
        EmbedLimits { vocab_size: 100, max_batch_size: 3, max_input_len: 5, max_num_tokens: 9 };

    #[test]
    fn batches_within_limits_and_keeps_the_closing_token() {
        let mut model = Echo(LIMITS, Vec::new());
        let texts = ["hello", "hello world hello world", "", "", "", "world"];
        let vectors = embed_texts(&mut model, &word_piece(), &texts).unwrap();
        // [CLS] = 1, [SEP] = 2, hello = 3, world = 4.
        assert_eq!(vectors[0], [1.0, 3.0, 2.0]);
        assert_eq!(vectors[1], [1.0, 3.0, 4.0, 3.0, 2.0]);
        assert_eq!((&vectors[2], &vectors[5]), (&vec![1.0, 2.0], &vec![1.0, 4.0, 2.0]));
        assert_eq!(model.1, [vec![3, 5], vec![2, 2, 2], vec![3]]);
    }

    #[test]
    fn errors_are_typed_and_placed() {
        let run = |limits, texts: &[&str]| {
            let error = embed_texts(&mut Echo(limits, Vec::new()), &word_piece(), texts).unwrap_err();
            (error.code(), error.place().map(str::to_owned))
        };
        let at = |place: &str| Some(place.to_owned());
        let tiny = EmbedLimits { max_input_len: 1, ..LIMITS };
        assert_eq!(run(tiny, &["hello"]), ("tokenizer/max-length", at("text 0")));
        let few = EmbedLimits { vocab_size: 4, ..LIMITS };
        assert_eq!(run(few, &["hello", "world"]), ("generation/token-out-of-range", at("text 1")));
        assert_eq!(run(EmbedLimits { max_batch_size: 0, ..LIMITS }, &[]), ("generation/bad-limits", None));
    }
}
