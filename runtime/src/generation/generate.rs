//! Many requests through one model: admission, packing of steps, drawing, stopping.
//!
//! A request waits until a place in the batch and all pages it can come to need are free, so that a running
//! sequence never has to give way. Requests are admitted strictly in order. Every step packs first one token
//! of each sequence that decodes, then prompt chunks of the others, up to the model's limits; a request takes
//! the place of a finished one in the very next step.
//!
//! A step that only decodes greedily, for the same sequences as the step before it, is begun *ahead* of that step's
//! tokens, with which the model feeds it by itself. If one of them ends a sequence, its row of the step ahead is for
//! nothing, and its place is taken one step later.
//!
//! Invariants: the schedule depends on nothing but the requests, the limits and the tokens drawn; no page
//! outlives the call.

use std::collections::VecDeque;
use std::fmt;

use millrace_ir::{Error, Kind, Result};

use super::step::{StepBuilder, check_logits, check_rows, check_tokens, token_of};
use super::{BlockPool, ModelLimits, Sampler, SamplingParams, StepModel};

/// One prompt to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The prompt, special tokens included.
    pub prompt_ids: Vec<u32>,
    /// Most tokens to draw.
    pub max_new_tokens: usize,
    /// How to draw them.
    pub sampling: SamplingParams,
    /// Which stream of the seed's random numbers to use (see [`Sampler::new`]): number equal prompts
    /// differently to get different answers.
    pub sequence: u64,
    /// Whether a token of [`ModelLimits::eos`] ends the sequence.
    pub stop_at_eos: bool,
}

impl Request {
    /// A greedy request that stops at the end of the sequence.
    pub fn greedy(prompt_ids: Vec<u32>, max_new_tokens: usize) -> Self {
        let sampling = SamplingParams::GREEDY;
        Request { prompt_ids, max_new_tokens, sampling, sequence: 0, stop_at_eos: true }
    }
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A token that ends sequences was drawn; it is the last of the token ids and no part of the text.
    Eos,
    /// The request's `max_new_tokens` were drawn.
    MaxNewTokens,
    /// Prompt and answer together reached the model's `max_seq_len` before `max_new_tokens` were drawn.
    MaxSeqLen,
}

impl FinishReason {
    /// The spelling in reports: `eos`, `max_new_tokens` or `max_seq_len`.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Eos => "eos",
            FinishReason::MaxNewTokens => "max_new_tokens",
            FinishReason::MaxSeqLen => "max_seq_len",
        }
    }
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The answer to one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The tokens drawn, without the prompt; an eos token that ended them is included.
    pub token_ids: Vec<u32>,
    /// Why there are no more.
    pub finish: FinishReason,
}

impl Completion {
    /// The tokens that make up the text: all but an eos token that ended them.
    pub fn text_ids(&self) -> &[u32] {
        match (self.finish, self.token_ids.as_slice()) {
            (FinishReason::Eos, [text @ .., _eos]) => text,
            (_, all) => all,
        }
    }
}

/// What a [`Generator`] has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GenerationStats {
    /// Steps executed.
    pub steps: u64,
    /// Prompt tokens fed.
    pub prefill_tokens: u64,
    /// Drawn tokens fed back.
    pub decode_tokens: u64,
    /// Most pages reserved at once.
    pub peak_pages: usize,
}

/// Runs requests through a model.
#[derive(Debug)]
pub struct Generator<'m, M: StepModel + ?Sized> {
    model: &'m mut M,
    limits: ModelLimits,
    stats: GenerationStats,
}

impl<'m, M: StepModel + ?Sized> Generator<'m, M> {
    /// A generator over `model`. Errors as [`ModelLimits::check`].
    pub fn new(model: &'m mut M) -> Result<Self> {
        let limits = model.limits();
        limits.check()?;
        Ok(Generator { model, limits, stats: GenerationStats::default() })
    }

    /// What has been done so far.
    pub fn stats(&self) -> GenerationStats {
        self.stats
    }

    /// Completes `requests`; the answers stand in their order. `on_token(request index, token)` is called for
    /// every token as it is drawn, an eos token included.
    ///
    /// Errors before any step, placed at the request: `generation/empty-prompt`,
    /// `generation/prompt-too-long`, `generation/token-out-of-range`, `generation/no-room`,
    /// `generation/kv-cache-too-small` and those of [`SamplingParams::check`]. Later: those of the model and of
    /// [`Sampler::sample`].
    pub fn generate(
        &mut self,
        requests: &[Request],
        mut on_token: impl FnMut(usize, u32),
    ) -> Result<Vec<Completion>> {
        for (index, request) in requests.iter().enumerate() {
            self.check_request(request).map_err(|e| e.at(format!("request {index}")))?;
        }
        let mut schedule = Schedule::new(requests, &self.limits)?;
        let mut builder = StepBuilder::default();
        let (mut logits, mut tokens) = (Vec::new(), Vec::new());
        while schedule.pack(&mut builder)? {
            let inputs = builder.finish();
            let greedy = schedule.draws_greedily();
            if greedy && self.model.start_argmax(inputs, false)? {
                let rows = inputs.logit_rows.len();
                run_ahead(self.model, &mut schedule, &mut builder, rows, &mut self.stats, &mut on_token)?;
                continue;
            }
            if greedy {
                self.model.step_argmax(inputs, &mut tokens)?;
                check_tokens(&tokens, inputs, &self.limits)?;
            } else {
                self.model.step(inputs, &mut logits)?;
                check_logits(&logits, inputs, &self.limits)?;
            }
            schedule.count(&mut self.stats);
            let rows = if greedy { Rows::Tokens(&tokens) } else { Rows::Logits(&logits) };
            schedule.advance(rows, &mut on_token)?;
        }
        schedule.into_completions()
    }

    fn check_request(&self, request: &Request) -> Result<()> {
        let limits = &self.limits;
        let length = request.prompt_ids.len();
        if length == 0 {
            return Err(Error::new(Kind::BadInput, "generation/empty-prompt", "the prompt has no tokens")
                .hint("give at least one token, for example the bos token"));
        }
        if length > limits.max_input_len {
            let message =
                format!("the prompt has {length} tokens, max_input_len is {}", limits.max_input_len);
            let hint = format!(
                "shorten the prompt to {} tokens or rebuild the engine with --max-input-len {length}",
                limits.max_input_len
            );
            return Err(Error::new(Kind::BadInput, "generation/prompt-too-long", message).hint(hint));
        }
        if let Some(bad) = request.prompt_ids.iter().find(|id| **id as usize >= limits.vocab_size) {
            let message = format!("token {bad} is not below the vocabulary size {}", limits.vocab_size);
            return Err(Error::new(Kind::BadInput, "generation/token-out-of-range", message)
                .hint("the tokenizer has more tokens than the model's vocabulary: use the one that belongs to the model"));
        }
        if length >= limits.max_seq_len {
            let message = format!(
                "the prompt of {length} tokens leaves no room for an answer, max_seq_len is {}",
                limits.max_seq_len
            );
            return Err(Error::new(Kind::BadInput, "generation/no-room", message)
                .hint("shorten the prompt or rebuild the engine with a larger --max-seq-len"));
        }
        let stored = stored_tokens(request, limits);
        let pages = stored.div_ceil(limits.tokens_per_block);
        if pages > limits.pages {
            let message = format!(
                "the request may store {stored} tokens in {pages} pages, the KV cache has {} pages",
                limits.pages
            );
            return Err(Error::new(Kind::OutOfMemory, "generation/kv-cache-too-small", message)
                .hint("lower max_new_tokens, shorten the prompt or give the KV cache more memory"));
        }
        request.sampling.check()
    }
}

/// Takes the tokens of the step that was begun, with `rows` rows of logits, and of all that can be begun ahead from there.
fn run_ahead<M: StepModel + ?Sized>(
    model: &mut M,
    schedule: &mut Schedule<'_>,
    builder: &mut StepBuilder,
    mut rows: usize,
    stats: &mut GenerationStats,
    on_token: &mut impl FnMut(usize, u32),
) -> Result<()> {
    loop {
        let ahead = schedule.pack_ahead(builder);
        let next = if ahead { schedule.live.len() } else { 0 };
        if ahead && !model.start_argmax(builder.finish(), true)? {
            let message = "a model that begins steps has refused one";
            return Err(Error::new(Kind::Internal, "generation/not-begun", message));
        }
        let indices = model.take_argmax()?;
        check_rows(indices.len(), rows)?;
        schedule.count(stats);
        schedule.advance(Rows::Indices(&indices), on_token)?;
        if !ahead || !schedule.turn_ahead() {
            return Ok(());
        }
        rows = next;
    }
}

/// Most tokens that `request` may draw.
fn new_tokens(request: &Request, limits: &ModelLimits) -> usize {
    request.max_new_tokens.min(limits.max_seq_len.saturating_sub(request.prompt_ids.len()))
}

/// Most tokens of `request` in the KV cache: the last token drawn is never fed back.
fn stored_tokens(request: &Request, limits: &ModelLimits) -> usize {
    request.prompt_ids.len() + new_tokens(request, limits).saturating_sub(1)
}

/// A request that holds a place in the batch.
struct Live {
    request: usize,
    sampler: Sampler,
    /// Prompt and drawn tokens.
    tokens: Vec<u32>,
    /// How many of them are in the KV cache.
    stored: usize,
    /// How many of them the step being packed stores.
    packed: usize,
    finished: Option<FinishReason>,
}

impl Live {
    fn missing(&self) -> usize {
        self.tokens.len() - self.stored
    }
}

/// The state of one call of [`Generator::generate`].
struct Schedule<'r> {
    requests: &'r [Request],
    limits: &'r ModelLimits,
    pool: BlockPool,
    waiting: VecDeque<usize>,
    /// In order of admission.
    live: Vec<Live>,
    /// For each row of logits the index into `live` of the sequence that draws from it; none if it has ended.
    draws: Vec<Option<usize>>,
    /// Indices into `live` after the last step by those before it; none for sequences that have ended.
    places: Vec<Option<usize>>,
    completions: Vec<Option<Completion>>,
    prefill_tokens: u64,
    decode_tokens: u64,
}

/// What a step answers, one row a draw: a step without draws has one row that nobody reads.
#[derive(Clone, Copy)]
enum Rows<'a> {
    Logits(&'a [f32]),
    /// The most likely tokens.
    Tokens(&'a [u32]),
    /// The same as [`StepModel::take_argmax`] tells them.
    Indices(&'a [i32]),
}

/// What a step may still take.
struct Room {
    tokens: usize,
    sequences: usize,
    logit_rows: usize,
}

impl<'r> Schedule<'r> {
    fn new(requests: &'r [Request], limits: &'r ModelLimits) -> Result<Self> {
        let mut completions = vec![None; requests.len()];
        let mut waiting = VecDeque::new();
        for (index, request) in requests.iter().enumerate() {
            if request.max_new_tokens == 0 {
                completions[index] =
                    Some(Completion { token_ids: vec![], finish: FinishReason::MaxNewTokens });
            } else {
                waiting.push_back(index);
            }
        }
        let pool = BlockPool::new(limits.pages, limits.tokens_per_block)?;
        let (live, draws, places) = (Vec::new(), Vec::new(), Vec::new());
        let (prefill_tokens, decode_tokens) = (0, 0);
        Ok(Schedule {
            requests,
            limits,
            pool,
            waiting,
            live,
            draws,
            places,
            completions,
            prefill_tokens,
            decode_tokens,
        })
    }

    /// Packs the next step into `builder`; false when there is nothing left to do.
    fn pack(&mut self, builder: &mut StepBuilder) -> Result<bool> {
        builder.begin();
        self.draws.clear();
        (self.prefill_tokens, self.decode_tokens) = (0, 0);
        let mut room = Room {
            tokens: self.limits.max_num_tokens,
            sequences: self.limits.max_batch_size,
            logit_rows: self.limits.max_logit_rows,
        };
        let decodes = |live: &Live| live.missing() == 1 && live.stored > 0;
        for phase_decodes in [true, false] {
            for index in 0..self.live.len() {
                if decodes(&self.live[index]) == phase_decodes {
                    self.pack_sequence(index, &mut room, builder);
                }
            }
        }
        while room.tokens > 0 && room.sequences > 0 && self.admit()? {
            self.pack_sequence(self.live.len() - 1, &mut room, builder);
        }
        Ok(!self.live.is_empty())
    }

    /// Packs as much of a live sequence as there is room for.
    fn pack_sequence(&mut self, index: usize, room: &mut Room, builder: &mut StepBuilder) {
        let live = &mut self.live[index];
        let mut count = live.missing().min(room.tokens);
        if count == live.missing() && room.logit_rows == 0 {
            // Its last token would need logits: that one waits.
            count -= 1;
        }
        live.packed = count;
        if count == 0 {
            return;
        }
        let tokens = &live.tokens[live.stored..live.stored + count];
        let table = self.pool.table(live.request);
        let row = builder.push(tokens, live.stored, table, self.limits.tokens_per_block);
        room.tokens -= count;
        room.sequences -= 1;
        if count == live.missing() {
            room.logit_rows -= 1;
            builder.want_logits(row + count as i32 - 1);
            self.draws.push(Some(index));
        }
        let prompt = self.requests[live.request].prompt_ids.len();
        let of_prompt = prompt.saturating_sub(live.stored).min(count);
        self.prefill_tokens += of_prompt as u64;
        self.decode_tokens += (count - of_prompt) as u64;
    }

    /// The first waiting request, if there is a place in the batch for it and the pool can serve it.
    fn admissible(&self) -> Option<usize> {
        let index = *self.waiting.front()?;
        let stored = stored_tokens(&self.requests[index], self.limits);
        let full = self.live.len() >= self.limits.max_batch_size;
        (!full && self.pool.pages_for(stored) <= self.pool.free_pages()).then_some(index)
    }

    /// Packs the step after the one that was packed, if it is known before that one's tokens: every sequence takes one
    /// token of that step, all of them the most likely one, none ends for its length, and none can join them.
    fn pack_ahead(&self, builder: &mut StepBuilder) -> bool {
        let in_order = self.draws.len() == self.live.len()
            && self.draws.iter().enumerate().all(|(row, index)| *index == Some(row));
        let goes_on = |live: &Live| {
            let drawn = live.tokens.len() + 1 - self.requests[live.request].prompt_ids.len();
            live.sampler.is_greedy() && drawn < new_tokens(&self.requests[live.request], self.limits)
        };
        if !in_order || !self.live.iter().all(goes_on) || self.admissible().is_some() {
            return false;
        }
        builder.begin();
        for live in &self.live {
            let table = self.pool.table(live.request);
            // Whatever the token is: the model feeds it.
            let row = builder.push(&[0], live.stored + live.packed, table, self.limits.tokens_per_block);
            builder.want_logits(row);
        }
        true
    }

    /// Makes the step packed ahead the one that was packed; false if none of its rows is drawn from.
    fn turn_ahead(&mut self) -> bool {
        std::mem::swap(&mut self.draws, &mut self.places);
        self.live.iter_mut().for_each(|live| live.packed = 1);
        (self.prefill_tokens, self.decode_tokens) = (0, self.live.len() as u64);
        !self.live.is_empty()
    }

    /// Gives the first waiting request a place in the batch, if there is one and the pool can serve it.
    fn admit(&mut self) -> Result<bool> {
        let Some(index) = self.admissible() else { return Ok(false) };
        let request = &self.requests[index];
        self.pool.reserve(index, stored_tokens(request, self.limits))?;
        self.waiting.pop_front();
        let sampler = Sampler::new(request.sampling, request.sequence)?;
        let tokens = request.prompt_ids.clone();
        self.live.push(Live { request: index, sampler, tokens, stored: 0, packed: 0, finished: None });
        Ok(true)
    }

    /// Whether the step that was packed has draws and every one takes the most likely token. A row that nobody draws
    /// from is not judged.
    fn draws_greedily(&self) -> bool {
        !self.draws.is_empty()
            && self.draws.iter().flatten().all(|index| self.live[*index].sampler.is_greedy())
    }

    /// Counts the step that was packed.
    fn count(&self, stats: &mut GenerationStats) {
        stats.steps += 1;
        stats.prefill_tokens += self.prefill_tokens;
        stats.decode_tokens += self.decode_tokens;
        stats.peak_pages = stats.peak_pages.max(self.pool.pages() - self.pool.free_pages());
    }

    /// Takes the rows of the step that was packed: draws, reports, and retires finished sequences.
    fn advance(&mut self, rows: Rows<'_>, on_token: &mut impl FnMut(usize, u32)) -> Result<()> {
        for live in &mut self.live {
            live.stored += std::mem::take(&mut live.packed);
        }
        for (row, &index) in self.draws.iter().enumerate() {
            let Some(index) = index else { continue };
            let live = &mut self.live[index];
            let token = match rows {
                Rows::Tokens(tokens) => tokens[row],
                Rows::Indices(indices) => token_of(indices[row], self.limits)
                    .map_err(|e| e.at(format!("request {}", live.request)))?,
                Rows::Logits(logits) => {
                    let width = self.limits.vocab_size;
                    let logits = &logits[row * width..(row + 1) * width];
                    live.sampler.sample(logits).map_err(|e| e.at(format!("request {}", live.request)))?
                }
            };
            live.tokens.push(token);
            on_token(live.request, token);
            let request = &self.requests[live.request];
            if request.stop_at_eos && self.limits.eos.contains(&token) {
                live.finished = Some(FinishReason::Eos);
            } else if live.tokens.len() - request.prompt_ids.len() >= request.max_new_tokens {
                live.finished = Some(FinishReason::MaxNewTokens);
            } else if live.tokens.len() >= self.limits.max_seq_len {
                live.finished = Some(FinishReason::MaxSeqLen);
            }
        }
        let mut kept = 0..;
        let place = |live: &Live| if live.finished.is_none() { kept.next() } else { None };
        self.places.clear();
        self.places.extend(self.live.iter().map(place));
        for live in self.live.extract_if(.., |live| live.finished.is_some()) {
            let Live { request, tokens, finished, .. } = live;
            self.pool.release(request);
            let token_ids = tokens[self.requests[request].prompt_ids.len()..].to_vec();
            self.completions[request] = finished.map(|finish| Completion { token_ids, finish });
        }
        Ok(())
    }

    fn into_completions(self) -> Result<Vec<Completion>> {
        if self.pool.free_pages() != self.pool.pages() {
            let message = format!("{} pages were not returned", self.pool.pages() - self.pool.free_pages());
            return Err(Error::new(Kind::Internal, "generation/page-leak", message));
        }
        let all: Option<Vec<Completion>> = self.completions.into_iter().collect();
        all.ok_or_else(|| {
            Error::new(Kind::Internal, "generation/lost-request", "a request was never completed")
        })
    }
}

#[cfg(test)]
#[path = "generate_tests.rs"]
mod tests;
