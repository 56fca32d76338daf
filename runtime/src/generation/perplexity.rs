//! Perplexity of a token sequence under a model.
//!
//! The sequence is cut into consecutive windows of K tokens that do not overlap. Each window is read by a
//! fresh sequence: the bos token, then the K tokens, and every one of the K is scored given all before it in
//! the window. An incomplete last window is left out.
//!
//! ```text
//! perplexity = exp(-(1 / N) x sum over the N scored tokens of ln p(token | bos and the window before it))
//! ```
//! Log-softmax and sums are in f64, added in the order of the tokens within a window and of the windows.

use millrace_ir::{Error, Kind, Result};

use super::step::{StepBuilder, check_logits};
use super::{BlockPool, ModelLimits, StepModel};

/// How a sequence is cut into windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerplexityOptions {
    /// The token before each window, usually [`ModelLimits::bos`].
    pub bos: u32,
    /// Scored tokens per window (K); with the bos token they must fit the context the model was trained for.
    pub window_tokens: usize,
    /// Scores the first so many windows only.
    pub max_windows: Option<usize>,
}

/// A measured perplexity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Perplexity {
    /// Exponential of the mean negative log-likelihood in nats; infinite if a token had probability 0.
    pub perplexity: f64,
    /// Scored tokens, N.
    pub tokens: u64,
}

/// A window that is being read.
struct Open {
    window: usize,
    stored: usize,
    packed: usize,
}

/// Perplexity of `tokens`. Runs several windows at once and each in chunks, within the limits of `model`.
///
/// Errors: `generation/too-few-tokens` without one whole window, `generation/window-too-long` if
/// `window_tokens` exceeds max_seq_len, `generation/token-out-of-range`, `generation/kv-cache-too-small`,
/// `generation/nan-logits`, `generation/infinite-logits` if the largest of a row is not finite, and those of the
/// model.
pub fn perplexity<M: StepModel + ?Sized>(
    model: &mut M,
    tokens: &[u32],
    options: &PerplexityOptions,
) -> Result<Perplexity> {
    let limits = model.limits();
    limits.check()?;
    let windows = check(tokens, options, &limits)?;
    let k = options.window_tokens;
    // The last token of a window is scored but never fed.
    let fed: Vec<Vec<u32>> = windows
        .iter()
        .map(|w| std::iter::once(options.bos).chain(w[..k - 1].iter().copied()).collect())
        .collect();

    let mut pool = BlockPool::new(limits.pages, limits.tokens_per_block)?;
    let mut losses = vec![0.0f64; windows.len()];
    let mut builder = StepBuilder::default();
    let mut logits = Vec::new();
    let mut open: Vec<Open> = Vec::new();
    let mut next = 0;
    loop {
        let mut room = limits.max_num_tokens.min(limits.max_logit_rows);
        builder.begin();
        let mut index = 0;
        while room > 0 {
            if index == open.len() {
                let can_open = next < windows.len()
                    && open.len() < limits.max_batch_size
                    && pool.pages_for(k) <= pool.free_pages();
                if !can_open {
                    break;
                }
                pool.reserve(next, k)?;
                open.push(Open { window: next, stored: 0, packed: 0 });
                next += 1;
            }
            let Open { window, stored, packed } = &mut open[index];
            *packed = (k - *stored).min(room);
            room -= *packed;
            let chunk = &fed[*window][*stored..*stored + *packed];
            let row = builder.push(chunk, *stored, pool.table(*window), limits.tokens_per_block);
            (row..row + *packed as i32).for_each(|row| builder.want_logits(row));
            index += 1;
        }
        if open.is_empty() {
            break;
        }
        let inputs = builder.finish();
        model.step(inputs, &mut logits)?;
        check_logits(&logits, inputs, &limits)?;
        let mut rows = logits.chunks_exact(limits.vocab_size);
        for window in &mut open {
            let scored = &windows[window.window][window.stored..window.stored + window.packed];
            for (token, row) in scored.iter().zip(rows.by_ref()) {
                losses[window.window] += negative_log_likelihood(row, *token as usize)?;
            }
            window.stored += std::mem::take(&mut window.packed);
        }
        for done in open.extract_if(.., |window| window.stored == k) {
            pool.release(done.window);
        }
    }
    let scored = windows.len() * k;
    let mean = losses.iter().sum::<f64>() / scored as f64;
    Ok(Perplexity { perplexity: mean.exp(), tokens: scored as u64 })
}

/// The windows to score, at least one.
fn check<'t>(tokens: &'t [u32], options: &PerplexityOptions, limits: &ModelLimits) -> Result<Vec<&'t [u32]>> {
    let k = options.window_tokens;
    if k == 0 || k > limits.max_seq_len {
        let message = format!("windows of {k} tokens are not in 1..={} (max_seq_len)", limits.max_seq_len);
        return Err(Error::new(Kind::Usage, "generation/window-too-long", message)
            .hint("use shorter windows or rebuild the engine with a larger --max-seq-len"));
    }
    let windows: Vec<&[u32]> =
        tokens.chunks_exact(k).take(options.max_windows.unwrap_or(usize::MAX)).collect();
    if windows.is_empty() {
        let message = format!("{} tokens do not fill one window of {k}", tokens.len());
        return Err(Error::new(Kind::BadInput, "generation/too-few-tokens", message)
            .hint("give a longer text or use shorter windows"));
    }
    let scored = windows.iter().copied().flatten().chain([&options.bos]);
    if let Some(bad) = scored.copied().find(|id| *id as usize >= limits.vocab_size) {
        let message = format!("token {bad} is not below the vocabulary size {}", limits.vocab_size);
        return Err(Error::new(Kind::BadInput, "generation/token-out-of-range", message)
            .hint("the tokenizer has more tokens than the model's vocabulary: use the one that belongs to the model"));
    }
    let pages = k.div_ceil(limits.tokens_per_block);
    if pages > limits.pages {
        let message =
            format!("a window of {k} tokens needs {pages} pages, the KV cache has {}", limits.pages);
        return Err(Error::new(Kind::OutOfMemory, "generation/kv-cache-too-small", message)
            .hint("use shorter windows or give the KV cache more memory"));
    }
    Ok(windows)
}

/// ln(sum of exp(logits)) - logits[token].
fn negative_log_likelihood(logits: &[f32], token: usize) -> Result<f64> {
    let fault = |code, message| {
        Err(Error::new(Kind::Internal, code, message)
            .hint("the model overflowed or its weights are damaged: verify the engine, try f32 or bf16"))
    };
    let mut largest = f64::NEG_INFINITY;
    for (i, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return fault("generation/nan-logits", format!("logit {i} is not a number"));
        }
        largest = largest.max(f64::from(logit));
    }
    if !largest.is_finite() {
        return fault("generation/infinite-logits", format!("the largest logit is {largest}"));
    }
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    Ok(largest + sum.ln() - f64::from(logits[token]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::generation::testing::{HashModel, hash_logits, limits};

    const BOS: u32 = 1;

    /// By the definition, one token at a time.
    fn expected(tokens: &[u32], k: usize, max_windows: usize, vocab: usize) -> Perplexity {
        let (mut loss, mut count) = (0.0f64, 0);
        for window in tokens.chunks_exact(k).take(max_windows) {
            let mut history = vec![BOS];
            for &token in window {
                let row: Vec<f64> =
                    hash_logits(&history, vocab).iter().map(|x| f64::from(*x).exp()).collect();
                loss -= (row[token as usize] / row.iter().sum::<f64>()).ln();
                history.push(token);
                count += 1;
            }
        }
        Perplexity { perplexity: (loss / count as f64).exp(), tokens: count }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn agrees_with_the_definition_under_any_limits(
            tokens in prop::collection::vec(0u32..23, 12..80),
            k in 1usize..12,
            max_windows in prop::option::of(1usize..6),
            max_batch_size in 1usize..5,
            max_num_tokens in 1usize..30,
            max_logit_rows in 1usize..30,
            tokens_per_block in 1usize..6,
            spare_pages in 0usize..20,
        ) {
            let limits = ModelLimits {
                vocab_size: 23, max_batch_size, max_num_tokens, max_logit_rows, tokens_per_block,
                max_seq_len: k, pages: k.div_ceil(tokens_per_block) + spare_pages, ..limits()
            };
            let mut model = HashModel::new(limits);
            let options = PerplexityOptions { bos: BOS, window_tokens: k, max_windows };
            let measured = perplexity(&mut model, &tokens, &options).unwrap();
            let expected = expected(&tokens, k, max_windows.unwrap_or(usize::MAX), 23);
            prop_assert_eq!(measured.tokens, expected.tokens);
            prop_assert!((measured.perplexity / expected.perplexity - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn uniform_logits_give_the_vocabulary_size() {
        assert!((negative_log_likelihood(&[7.0; 50], 3).unwrap().exp() - 50.0).abs() < 1e-9);
        let huge = negative_log_likelihood(&[3e38, 0.0], 0).unwrap();
        assert_eq!(huge, 0.0);
        assert_eq!(negative_log_likelihood(&[0.0, f32::NEG_INFINITY], 1).unwrap(), f64::INFINITY);
    }

    #[test]
    fn errors_are_typed() {
        let run = |tokens: &[u32], k, limits| {
            let options = PerplexityOptions { bos: BOS, window_tokens: k, max_windows: None };
            perplexity(&mut HashModel::new(limits), tokens, &options).unwrap_err().code()
        };
        assert_eq!(run(&[1, 2], 3, limits()), "generation/too-few-tokens");
        assert_eq!(run(&[1, 2], 0, limits()), "generation/window-too-long");
        assert_eq!(run(&[1; 2000], 1000, limits()), "generation/window-too-long");
        assert_eq!(run(&[1, 999], 2, limits()), "generation/token-out-of-range");
        let small = ModelLimits { pages: 1, tokens_per_block: 2, ..limits() };
        assert_eq!(run(&[1; 9], 3, small), "generation/kv-cache-too-small");
        let row_code = |row: &[f32]| negative_log_likelihood(row, 0).unwrap_err().code();
        assert_eq!(row_code(&[0.0, f32::NAN]), "generation/nan-logits");
        assert_eq!(row_code(&[0.0, f32::INFINITY]), "generation/infinite-logits");
        assert_eq!(row_code(&[f32::NEG_INFINITY; 2]), "generation/infinite-logits");
    }
}
