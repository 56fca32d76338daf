//! Writing the engine: small sections, then weights streamed through one buffer.

use std::path::Path;
use std::sync::mpsc;

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::engine::{EngineWriter, SectionKind, WeightMeta, WriterOptions, WrittenEngine};
use millrace_ir::kernel_sources::KernelSources;
use millrace_ir::launch::Bundle;
use millrace_ir::manifest::Manifest;
use millrace_ir::verify::Verified;
use millrace_ir::weights::{WeightReader, needs_source};
use millrace_ir::{Error, Id, Kind, Module, Result, WeightExpr, WeightId, text};

use crate::memory::Buffers;

fn symbolic() -> Error {
    Error::new(Kind::Internal, "compile/symbolic-weight", "a weight has a symbolic shape")
}

/// Whether the engine carries its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WeightMode {
    /// Those that are made of checkpoint tensors; loading computes the others.
    #[default]
    Stored,
    /// All: also those that loading could compute, which are then read from the file like the others.
    Complete,
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
    /// Device code, one section for each architecture.
    pub bundles: &'a [Bundle],
    /// Texts of the kernels.
    pub sources: &'a KernelSources,
    /// Where it all came from, JSON.
    pub provenance: Vec<u8>,
    /// Whether weights are stored.
    pub weights: WeightMode,
    /// What weights pass through; no byte of the engine depends on it.
    pub buffers: Buffers,
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
/// Weights whose expressions need no checkpoint (splat, random, literals) are stored by [`WeightMode::Complete`] only: loading computes
/// them.
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
    for bundle in parts.bundles {
        writer.section(SectionKind::Kernels, &bundle.table.arch, &bundle.encode())?;
    }
    if !parts.sources.is_empty() {
        writer.section(SectionKind::KernelSources, "", &parts.sources.encode())?;
    }
    writer.section(SectionKind::Provenance, "", &parts.provenance)?;
    let mut reader = WeightReader::new(module);
    if let Some(source) = source {
        reader = reader.with_source("model", source);
    }
    let complete = parts.weights == WeightMode::Complete;
    let mut stored = module.used_weights();
    stored.retain(|id| complete || needs_source(module, *id));
    let total = stored.iter().map(|id| reader.len(*id)).sum::<Result<u64>>()?;
    let mut out = match parts.weights {
        WeightMode::Stored | WeightMode::Complete => writer.begin_weights()?,
        WeightMode::Stripped => writer.begin_stripped_weights()?,
    };
    let mut done = 0;
    let Buffers { chunk, in_flight } = parts.buffers;
    let pieces: Vec<(WeightId, u64, u64)> = stored
        .iter()
        .map(|id| reader.len(*id).map(|len| (*id, len)))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .flat_map(|(id, len)| {
            (0..len.div_ceil(chunk)).map(move |i| (id, i * chunk, chunk.min(len - i * chunk)))
        })
        .collect();
    // One thread reads and packs while this one hashes and writes; the channel bounds what is in flight.
    std::thread::scope(|scope| -> Result<()> {
        let (full, filled) = mpsc::sync_channel::<Result<Vec<u8>>>(in_flight);
        let (empty, recycled) = mpsc::channel::<Vec<u8>>();
        let plan = pieces.clone();
        scope.spawn(move || {
            for (id, at, take) in plan {
                let mut buffer = recycled.try_recv().unwrap_or_default();
                buffer.resize(take as usize, 0);
                let piece = reader.read(id, at, &mut buffer).map(|()| buffer);
                let failed = piece.is_err();
                // A closed channel means the writer gave up and holds the error.
                if full.send(piece).is_err() || failed {
                    return;
                }
            }
        });
        for (id, at, _) in pieces {
            if at == 0 {
                let weight = &module.weights[id];
                out.begin(WeightMeta {
                    name: weight.name.clone(),
                    dtype: weight.ty.dtype,
                    shape: weight.ty.const_shape().ok_or_else(symbolic)?,
                    sources: source_keys(module, id),
                })?;
            }
            let piece = filled.recv().map_err(|_| {
                Error::new(Kind::Internal, "compile/reader-stopped", "the weight reader stopped early")
            })??;
            out.write(&piece)?;
            done += piece.len() as u64;
            progress(done, total);
            // The reader may have ended already.
            let _ = empty.send(piece);
        }
        Ok(())
    })?;
    out.finish()?;
    writer.finish()
}
