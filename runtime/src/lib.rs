//! Millrace runtime.

pub mod generation;
