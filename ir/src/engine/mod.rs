//! The engine file: container of everything a run needs.
//!
//! An engine is one file of *sections* (manifest, IR, kernels, weights, tokenizer, ...) behind a header page and a table.
//! The byte layout is in `docs/engine-format.md`. [`EngineWriter`] writes it crash-safe and streaming, [`EngineFile`]
//! reads it without trusting it.
//!
//! Invariants of an open [`EngineFile`]:
//! 1. header, table and every held section have their hashes; padding is zero; nothing overlaps or is unaccounted for;
//! 2. every weight record lies inside the weights section and has at least the bytes its type and shape need;
//! 3. the hashes of the weights themselves are compared as [`Verify`] says.
//!
//! A hash shows that bytes are those that were written. It does not show who wrote them.
//!
//! This module must not know what the sections mean: it parses neither manifest nor IR.

mod atomic;
mod hashing;
mod layout;
mod reader;
mod weights;
mod writer;

#[cfg(test)]
mod mutation_tests;
#[cfg(test)]
mod tests;

pub use layout::{
    ALIGN, FORMAT_VERSION, HEADER_LEN, MAGIC, MAX_SECTIONS, PRODUCER_LEN, SECTION_NAME_LEN, Section,
    SectionKind, WEIGHTS_ALIGN,
};
pub use reader::{AUTO_VERIFY_LIMIT, EngineFile, Verify};
pub use weights::{WeightMeta, WeightRecord};
pub use writer::{EngineWriter, WeightsWriter, WriterOptions, WrittenEngine};
