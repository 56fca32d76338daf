//! Importers: from a Hugging Face model folder to an imported module.
//!
//! A folder holds `config.json`, `model.safetensors` or its sharded index, and optionally tokenizer and generation
//! files. Nothing else is opened: pickles and python files are never touched. One file per model family builds the
//! graph through [`ir::Builder`](millrace_ir::Builder); tensor names stay public identity.

mod bert;
mod config;
mod decoder;
mod folder;
mod tensors;

pub use config::{Family, ModelConfig};
pub use folder::{Limits, Options, Precision, SourceFolder, import};
