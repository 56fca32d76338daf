//! Millrace compiler.
#![forbid(unsafe_code)]

pub mod codegen;
pub mod compile;
pub mod import;
pub mod pass;
pub mod passes;
pub mod pattern;
pub mod pipeline;
pub mod rewrite;
pub mod target;

pub use compile::{CompileOptions, Compiled, compile};
