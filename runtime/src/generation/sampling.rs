//! Drawing the next token from a row of logits.
//!
//! Order of the filters: temperature, then top-k, then top-p (nucleus). Probabilities are computed in f64.
//! Equal logits rank by token id, the lower one first, so that every filter is a function of the row alone.
//!
//! The random numbers are counter based: the number of a draw is SplitMix64 (Steele, Lea and Flood, 2014) of
//! (seed, sequence, step), with no state carried from draw to draw. A sequence therefore draws the same
//! numbers in every batch and after every restart.

use std::cmp::Ordering;

use millrace_ir::{Error, Kind, Result};

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token always (greedy) and ignores the other fields.
    pub temperature: f32,
    /// Keeps the `top_k` most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of most likely tokens whose probabilities add up to at least this; 1 keeps all.
    pub top_p: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl SamplingParams {
    /// The most likely token always.
    pub const GREEDY: SamplingParams = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };

    /// Checks the ranges: temperature finite and >= 0, top_p in (0, 1].
    ///
    /// Errors `generation/bad-temperature` and `generation/bad-top-p`.
    pub fn check(&self) -> Result<()> {
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            let message = format!("temperature {} is not a finite number >= 0", self.temperature);
            return Err(Error::new(Kind::Usage, "generation/bad-temperature", message)
                .hint("use 0 for greedy decoding, or for example 0.8"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let message = format!("top_p {} is not in (0, 1]", self.top_p);
            return Err(Error::new(Kind::Usage, "generation/bad-top-p", message)
                .hint("use 1 to keep all tokens, or for example 0.95"));
        }
        Ok(())
    }
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self::GREEDY
    }
}

/// Draws the tokens of one sequence.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    key: u64,
    step: u64,
    candidates: Vec<(f32, u32)>,
}

/// How many of the most likely tokens are ranked at first when looking for a nucleus.
const FIRST_RANKED: usize = 128;

impl Sampler {
    /// A sampler for the sequence numbered `sequence`: sequences of equal seed and number draw the same random
    /// numbers, others draw independent ones. Errors as [`SamplingParams::check`].
    pub fn new(params: SamplingParams, sequence: u64) -> Result<Self> {
        params.check()?;
        let key = mix(mix(params.seed.wrapping_add(GOLDEN)) ^ sequence.wrapping_mul(GOLDEN));
        Ok(Sampler { params, key, step: 0, candidates: Vec::new() })
    }

    /// Whether the most likely token is taken always.
    pub(super) fn is_greedy(&self) -> bool {
        self.params.temperature == 0.0
    }

    /// The token drawn from `logits` (one per token of the vocabulary).
    ///
    /// Errors: `generation/nan-logits` for a NaN, `generation/infinite-logits` if the largest one is not
    /// finite, `generation/no-logits` for an empty row. A logit of minus infinity is never drawn.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let step = self.step;
        self.step += 1;
        let best = argmax(logits)?;
        if self.params.temperature == 0.0 {
            return Ok(best);
        }
        let largest = f64::from(logits[best as usize]);
        let temperature = f64::from(self.params.temperature);
        let weight = move |logit: f32| ((f64::from(logit) - largest) / temperature).exp();

        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0u32..).map(|(&logit, id)| (logit, id)));
        let candidates = &mut self.candidates;
        if self.params.top_k > 0 {
            rank(candidates, self.params.top_k);
            candidates.truncate(self.params.top_k);
        }
        let mut total: f64 = candidates.iter().map(|c| weight(c.0)).sum();
        if self.params.top_p < 1.0 {
            total = keep_nucleus(candidates, f64::from(self.params.top_p) * total, weight);
        }
        let mut left = uniform(self.key, step) * total;
        for &(logit, id) in candidates.iter() {
            left -= weight(logit);
            if left < 0.0 {
                return Ok(id);
            }
        }
        // Rounding left a remainder: the draw belongs to the last token that can be drawn.
        let last = candidates.iter().rev().find(|c| weight(c.0) > 0.0);
        Ok(last.map_or(best, |c| c.1))
    }
}

/// Index of the largest logit, the lowest index among equals. Errors as [`Sampler::sample`].
pub(crate) fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return Err(nan_logits(format!("logit {i} is not a number")));
        }
        if logit > logits[best] {
            best = i;
        }
    }
    match logits.get(best) {
        None => Err(Error::new(Kind::Internal, "generation/no-logits", "the row of logits is empty")),
        Some(value) if !value.is_finite() => {
            Err(infinite_logits(format!("the largest logit, {best}, is {value}")))
        }
        Some(_) => u32::try_from(best).map_err(|_| {
            Error::new(Kind::Unsupported, "generation/no-logits", "the row of logits is too long")
        }),
    }
}

const BROKEN: &str = "the model overflowed or its weights are damaged: verify the engine, try f32 or bf16";

/// There is a NaN among the logits.
pub(super) fn nan_logits(message: impl Into<String>) -> Error {
    Error::new(Kind::Internal, "generation/nan-logits", message).hint(BROKEN)
}

/// The largest logit is not finite.
pub(super) fn infinite_logits(message: impl Into<String>) -> Error {
    Error::new(Kind::Internal, "generation/infinite-logits", message).hint(BROKEN)
}

/// Larger logits first, then lower ids.
fn by_rank(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

/// Brings the `count` highest ranks to the front, sorted.
fn rank(candidates: &mut [(f32, u32)], count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, by_rank);
        candidates[..count].sort_unstable_by(by_rank);
    } else {
        candidates.sort_unstable_by(by_rank);
    }
}

/// Truncates `candidates` to the fewest highest ranks whose weights reach `wanted`; returns their sum.
/// Ranks only as many as needed: a nucleus is small in most rows.
fn keep_nucleus(candidates: &mut Vec<(f32, u32)>, wanted: f64, weight: impl Fn(f32) -> f64) -> f64 {
    let mut ranked = FIRST_RANKED;
    loop {
        rank(candidates, ranked);
        let mut sum = 0.0;
        for i in 0..ranked.min(candidates.len()) {
            sum += weight(candidates[i].0);
            if sum >= wanted {
                candidates.truncate(i + 1);
                return sum;
            }
        }
        if ranked >= candidates.len() {
            return sum;
        }
        ranked = ranked.saturating_mul(8);
    }
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The output function of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The number in [0, 1) of draw `step`: element `step` of the SplitMix64 sequence that starts at `key`.
fn uniform(key: u64, step: u64) -> f64 {
    let bits = mix(key.wrapping_add(step.wrapping_add(1).wrapping_mul(GOLDEN)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
#[path = "sampling_tests.rs"]
mod tests;
