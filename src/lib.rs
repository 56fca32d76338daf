//! Millrace: compile a model ahead of time into one engine file, run it inside the memory you give it.
//!
//! ```no_run
//! use millrace::{Allocation, CompileOptions, Decoder, Engine, SessionOptions, compile};
//! use millrace::generation::{Generator, Request};
//!
//! # fn main() -> millrace::Result<()> {
//! let compiled = compile("model-folder".as_ref(), &CompileOptions::default(), None)?;
//! compiled.write("model.engine".as_ref(), &mut |_, _| {})?;
//!
//! let engine = Engine::open("model.engine")?;
//! let mut session = engine.session(SessionOptions { allocation: Allocation::Dynamic, ..Default::default() })?;
//! let prompt = engine.tokenizer()?.encode("Once upon a time", true)?;
//! let mut model = Decoder::new(&mut session)?;
//! let completions = Generator::new(&mut model)?.generate(&[Request::greedy(prompt, 32)], |_, _| {})?;
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

/// The programs of `docs/streaming.md` and `docs/memory.md` compile.
#[cfg(doctest)]
#[doc = include_str!("../docs/streaming.md")]
#[doc = include_str!("../docs/memory.md")]
pub struct Documentation;

pub mod diff;
pub mod filetest;
pub mod fit;
pub mod page;
pub mod tune;

pub use millrace_compiler as compiler;
pub use millrace_ir as ir;
pub use millrace_kernels as kernels;
pub use millrace_runtime as runtime;

pub use millrace_compiler::{CompileOptions, Compiled, compile};
pub use millrace_ir::{Error, Kind, Result};
pub use millrace_runtime::{
    Allocation, AllocationGuard, Arena, Class, Decoder, Device, Encoder, Engine, Ledger, Lent, OnOutOfMemory,
    Profile, ProfileChoice, Session, SessionOptions, Shrink, TensorRef, WeightBudget, WeightBudgetGuard,
    generation,
};
