//! Millrace graph IR: one step of a model as a graph, from import to the engine.
//!
//! # What the parts mean
//!
//! A **module** describes one *step*: a pure function from its inputs, its weights and the states as they are when
//! the step begins, to its outputs and the states as they are when it ends. The caller runs it again and again.
//!
//! A **value** (`%7`) is a tensor during one step. It is defined once, by the graph's inputs or by one node, and
//! never changes. What it holds is the mathematical result of its op, computed by [`ops::OpDef::eval`] in `f64` and
//! rounded once to its element type; any kernel is right that stays within the op's [`ops::Numerics`] class of that.
//! A value has no address until a plan gives it a [`Place`]; two values may share one as long as no step can tell.
//!
//! A **weight** (`@w`) is a constant tensor, the same in every step. It is an expression: bytes of a checkpoint, or
//! other weights joined, cast or packed. Nothing reads the bytes before the engine is written, so a module of
//! hundreds of gigabytes is a small text. Its shape is free of symbols.
//!
//! A **dim** (`$t + 1`) is an integer that is known when a step is called: a polynomial over symbols with `ceildiv`,
//! `max` and `min`. A symbol is bound per call, within its declared range; every type, buffer size and offset holds
//! for all bindings at once. Equal sums of products are equal dims, which is what type inference relies on. A size
//! never shrinks when a symbol grows, so the upper bounds tell the most memory a step can take.
//!
//! A **state** (`@kv0.k`) is a tensor that outlives the step, such as a key or value cache. It has *versions*: the
//! state itself is the version when the step begins, and each op that writes it takes a version and returns the
//! next. Versions form one line and all live in the same memory, so after a write nobody may read the version before
//! it. Written this way a state is a value like any other, and no op has hidden effects.
//!
//! A **phase** says how far compilation has come: imported, canonical, fused, scheduled, planned, lowered. A phase
//! changes what may stand in a module (fused ops, places, kernels) and what is final (the order, the plan), never what
//! the module computes. Phases only move forward.
//!
//! # Invariants
//!
//! [`mod@verify`] numbers them, V1 and up; only [`verify::Verified`] modules reach code generation. [`mod@text`]
//! prints and parses modules of every phase, and `docs/ir.md` is the language's page. This crate knows no target, no
//! kernel and no device.
#![forbid(unsafe_code)]

pub mod arena;
pub mod attr;
pub mod bind;
pub mod builder;
pub mod checkpoint;
pub mod cost;
pub mod dag;
pub mod dim;
pub mod distinct;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod eval;
pub mod fold;
pub mod graph;
pub mod kernel_sources;
pub mod launch;
pub mod list;
pub mod manifest;
pub mod module;
pub mod names;
pub mod nearest;
pub mod ops;
pub mod plan;
mod positioned;
pub mod sampling;
pub mod shape_profile;
pub mod step_cost;
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
pub use list::List;
pub use ops::{Op, SharedOp};
pub use shape_profile::ShapeProfile;
pub use types::TensorType;
