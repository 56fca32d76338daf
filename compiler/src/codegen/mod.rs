//! Code generation: from a planned module to an engine file.
//!
//! [`lower`] gives every node its kernel; [`write_engine`] streams the engine out, weights in the order of first use.
//! Output is a function of input: no time, path or device enters it.

mod cpu;
pub mod cuda;
mod write;

pub use cpu::lower;
pub use write::{EngineParts, WeightMode, write_engine};
