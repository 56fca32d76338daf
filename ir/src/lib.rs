//! Millrace graph IR.
#![forbid(unsafe_code)]

pub mod error;

pub use error::{Error, Kind, Result};
