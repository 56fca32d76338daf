//! Millrace graph IR.
#![forbid(unsafe_code)]

pub mod dtype;
pub mod error;

pub use dtype::DType;
pub use error::{Error, Kind, Result};
