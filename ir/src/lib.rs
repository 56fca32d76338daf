//! Millrace graph IR.
#![forbid(unsafe_code)]

pub mod arena;
pub mod attr;
pub mod bind;
pub mod builder;
pub mod checkpoint;
pub mod dag;
pub mod dim;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod eval;
pub mod graph;
pub mod module;
pub mod nearest;
pub mod ops;
pub mod plan;
mod positioned;
pub mod tensor;
pub mod text;
pub mod types;
pub mod verify;
pub mod weights;

pub use arena::{Arena, Id};
pub use builder::Builder;
pub use dim::{Bindings, Dim, Sym, SymDecl};
pub use dtype::DType;
pub use error::{Error, Kind, Result};
pub use graph::*;
pub use ops::Op;
pub use types::TensorType;
