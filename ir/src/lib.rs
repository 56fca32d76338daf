//! Millrace graph IR.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod dtype;
pub mod engine;
pub mod error;
mod positioned;

pub use dtype::DType;
pub use error::{Error, Kind, Result};
