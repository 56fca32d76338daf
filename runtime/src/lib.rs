//! Millrace runtime: opens engines and runs them inside the memory they are given.
//!
//! An [`Engine`] is a checked file; a [`Session`] holds memory and runs steps. [`generation`] stands above sessions and
//! knows nothing of them. `unsafe` is confined to `memory` (aligned buffers and typed views), `mapping` (the mapped
//! weights of an engine file), `cpu::execute` (typed views of one node), `cpu::readers` and `cpu::residence` (memory that threads
//! fill) and, under [`cuda`], `driver` (handles and device memory), `transfer` (pinned memory), `launch` (launches and
//! graphs), `library` (cuBLASLt) and `management` (what the management library tells).
#![deny(unsafe_code)]

pub mod budget;
mod cpu;
pub mod cuda;
mod direct;
pub mod engine;
pub mod generation;
pub mod joint;
pub mod ledger;
pub mod lent;
#[allow(unsafe_code)]
mod mapping;
#[allow(unsafe_code)]
mod memory;
pub mod models;
pub mod needs;
pub mod options;
mod places;
pub mod profile;
pub mod session;
mod sizes;
mod weights;

pub use budget::WeightBudget;
pub use engine::Engine;
pub use ledger::{Class, Ledger, Reconciliation};
pub use lent::{Arena, Lent};
pub use models::{Decoder, Encoder};
pub use options::{Allocation, Device, OnOutOfMemory, ProfileChoice, SessionOptions};
pub use profile::Profile;
pub use session::{AllocationGuard, Session, Shrink, TensorRef, WeightBudgetGuard};
