//! Millrace compiler.
//!
//! `unsafe` is confined to `codegen::cuda::nvrtc`, the calls into NVRTC.
#![deny(unsafe_code)]

pub mod bisect;
pub mod codegen;
pub mod compile;
pub mod differential;
pub mod import;
pub mod manager;
pub mod memory;
mod numbers;
pub mod options;
pub mod pass;
pub mod passes;
pub mod pattern;
pub mod pipeline;
pub mod reduce;
pub mod registry;
pub mod rewrite;
mod rolled;
pub mod target;
pub mod tuning;

pub use compile::{CompileOptions, Compiled, compile};
pub use registry::Registry;
pub use tuning::Tuning;
