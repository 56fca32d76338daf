//! Millrace compiler.
#![forbid(unsafe_code)]

pub mod import;
pub mod pass;
pub mod passes;
pub mod pipeline;
pub mod rewrite;
