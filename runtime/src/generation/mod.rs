//! Generation: everything of a language model that stands above "execute one step".
//!
//! Terms: a *step* is one execution of the model over a packed batch of tokens; *prefill* feeds prompt
//! tokens, *decode* feeds the one token drawn last; a *page* (or block) is the unit of the paged KV cache;
//! a *row* is one packed token.
//!
//! Text goes in and out by [`Tokenizer`], [`TextStream`] and [`ChatTemplate`]. [`Generator`] turns requests
//! into [`StepInputs`] for any [`StepModel`], keeps the block tables in a [`BlockPool`] and draws tokens with
//! a [`Sampler`]. [`perplexity()`] and [`embed_texts`] are the two other uses of a model.
//!
//! Invariants: the same requests give the same steps, pages and tokens in every run; a request's tokens do
//! not depend on its neighbours as long as the model's rows do not.
//!
//! Nothing here knows devices, engines, weights or the graph IR.

mod embed;
mod generate;
mod kv_arithmetic;
mod kv_blocks;
mod perplexity;
mod sampling;
mod step;
mod template;
mod template_json;
mod template_time;
#[cfg(test)]
mod testing;
mod text_stream;
mod tokenizer;
mod tokenizer_config;

pub use embed::{EmbedLimits, EmbedModel, embed_texts};
pub use generate::{Completion, FinishReason, GenerationStats, Generator, Request};
pub use kv_arithmetic::{KvCapacity, blocks_per_sequence, bytes_per_token, host_blocks, kv_capacity};
pub use kv_blocks::BlockPool;
pub use perplexity::{Perplexity, PerplexityOptions, perplexity};
pub use sampling::{Sampler, SamplingParams};
pub(crate) use step::argmax_rows;
pub use step::{ModelLimits, StepInputs, StepModel};
pub use template::{ChatTemplate, Message};
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
pub use tokenizer_config::TokenizerConfig;
