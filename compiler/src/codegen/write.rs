//! Writing the engine: small sections, then weights streamed through one buffer.

use std::path::Path;

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::engine::{EngineWriter, SectionKind, WeightMeta, WriterOptions, WrittenEngine};
use millrace_ir::manifest::Manifest;
use millrace_ir::verify::Verified;
use millrace_ir::weights::{WeightReader, needs_source};
use millrace_ir::{Error, Id, Kind, Module, Result, WeightExpr, WeightId, text};

/// Bytes of the weight buffer.
const CHUNK: u64 = 4 << 20;

/// Whether the engine carries its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WeightMode {
    /// Yes.
    #[default]
    Stored,
    /// Only their names and hashes; loading binds them to a model folder.
    Stripped,
}

/// Everything that goes into an engine beside weights.
pub struct EngineParts<'a> {
    /// The manifest.
    pub manifest: &'a Manifest,
    /// The lowered module, verified.
    pub module: Verified<'a>,
    /// Copies of the model's small files.
    pub files: Vec<(SectionKind, &'a [u8])>,
    /// Where it all came from, JSON.
    pub provenance: Vec<u8>,
    /// Whether weights are stored.
    pub weights: WeightMode,
}

/// Checkpoint tensors a weight is made of, each once, sorted.
fn source_keys(module: &Module, id: WeightId) -> Vec<String> {
    let mut keys = Vec::new();
    let mut seen = vec![false; module.weights.bound()];
    let mut work = vec![id];
    while let Some(id) = work.pop() {
        if std::mem::replace(&mut seen[id.index()], true) {
            continue;
        }
        let expr = &module.weights[id].expr;
        if let WeightExpr::File { key, .. } = expr {
            keys.push(key.clone());
        }
        work.extend(expr.parts());
    }
    keys.sort();
    keys.dedup();
    keys
}

/// Writes an engine to `path`, or nowhere on failure. `progress` gets the bytes of weights written so far and in all.
///
/// Weights whose expressions need no checkpoint (splat, random, literals) are not stored: loading computes them.
///
/// # Errors
/// I/O failures, missing or mis-shaped tensors. The file at `path` is then unchanged.
pub fn write_engine(
    path: &Path,
    parts: &EngineParts<'_>,
    source: Option<&dyn TensorSource>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<WrittenEngine> {
    let module = parts.module.module();
    let producer = format!("millrace {}", env!("CARGO_PKG_VERSION"));
    let mut writer = EngineWriter::create(path, &WriterOptions { producer })?;
    writer.section(SectionKind::Manifest, "", &parts.manifest.to_json())?;
    writer.section(SectionKind::Ir, "", text::print(module).as_bytes())?;
    for (kind, bytes) in &parts.files {
        writer.section(*kind, "", bytes)?;
    }
    writer.section(SectionKind::Provenance, "", &parts.provenance)?;
    let mut reader = WeightReader::new(module);
    if let Some(source) = source {
        reader = reader.with_source("model", source);
    }
    let stored: Vec<WeightId> =
        module.used_weights().into_iter().filter(|id| needs_source(module, *id)).collect();
    let total = stored.iter().map(|id| reader.len(*id)).sum::<Result<u64>>()?;
    let mut out = match parts.weights {
        WeightMode::Stored => writer.begin_weights()?,
        WeightMode::Stripped => writer.begin_stripped_weights()?,
    };
    let mut done = 0;
    let mut buffer = Vec::new();
    for id in stored {
        let weight = &module.weights[id];
        let shape = weight.ty.const_shape().ok_or_else(|| {
            Error::new(Kind::Internal, "compile/symbolic-weight", "a weight has a symbolic shape")
                .at(&weight.name)
        })?;
        out.begin(WeightMeta {
            name: weight.name.clone(),
            dtype: weight.ty.dtype,
            shape,
            sources: source_keys(module, id),
        })?;
        let len = reader.len(id)?;
        let mut at = 0;
        while at < len {
            let take = CHUNK.min(len - at);
            buffer.resize(take as usize, 0);
            reader.read(id, at, &mut buffer)?;
            out.write(&buffer)?;
            at += take;
            done += take;
            progress(done, total);
        }
    }
    out.finish()?;
    writer.finish()
}
