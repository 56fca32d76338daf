//! Millrace runtime: opens engines and runs them inside the memory they are given.
//!
//! An [`Engine`] is a checked file; a [`Session`] holds memory and runs steps. [`generation`] stands above sessions and
//! knows nothing of them. `unsafe` is confined to `memory` (aligned buffers and typed views) and `mapping` (the mapped
//! weights of an engine file).
#![deny(unsafe_code)]

mod cpu;
pub mod engine;
pub mod generation;
pub mod ledger;
#[allow(unsafe_code)]
mod mapping;
#[allow(unsafe_code)]
mod memory;
pub mod models;
pub mod profile;
pub mod session;
mod weights;

pub use engine::Engine;
pub use ledger::{Class, Ledger};
pub use models::{Decoder, Encoder};
pub use profile::Profile;
pub use session::{Allocation, AllocationGuard, Session, SessionOptions, TensorRef};
