//! Weights of a session: mapped from the engine, bound from a model folder, or computed from their expressions.

use std::fs::File;
use std::path::Path;

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::engine::WeightRecord;
use millrace_ir::weights::{WeightReader, needs_source};
use millrace_ir::{Error, Id, Kind, Result, WeightId};

use crate::engine::Engine;
use crate::mapping::Mapping;
use crate::memory::{Buffer, Region};

/// Largest piece computed at once.
const CHUNK: u64 = 16 << 20;

enum Place {
    Mapped { start: u64, len: u64 },
    Owned(Buffer),
}

/// Bytes of every weight that nodes read.
pub(crate) struct Weights {
    mapping: Mapping,
    places: Vec<Option<Place>>,
}

impl Weights {
    /// Loads the weights of `engine`; stripped ones are computed from `source` and compared by hash.
    pub fn load(engine: &Engine, source: Option<&dyn TensorSource>) -> Result<Weights> {
        let (file, module) = (engine.file(), engine.module());
        let mut places: Vec<Option<Place>> = Vec::new();
        places.resize_with(module.weights.bound(), || None);
        let range = file.weights_range();
        let mapping = match (file.file(), range) {
            (Some(file), Some((offset, len))) => Mapping::new(file, offset, len)?,
            _ => Mapping::new_empty(),
        };
        let mut reader = WeightReader::new(module);
        if let Some(source) = source {
            reader = reader.with_source("model", source);
        }
        for id in module.used_weights() {
            let len = reader.len(id)?;
            let place = match Origin::of(engine, id, len, source.is_some())? {
                Origin::Stored(r) if file.file().is_some() => Place::Mapped { start: r.offset, len },
                Origin::Stored(r) => {
                    let mut buffer = Buffer::zeroed(len, "weights")?;
                    file.read_weight_at(r, 0, buffer.bytes_mut())?;
                    Place::Owned(buffer)
                }
                Origin::Bound(r) => {
                    let buffer = fill(&mut reader, id, len)?;
                    check_hash(r, blake3::hash(buffer.bytes()))?;
                    Place::Owned(buffer)
                }
                Origin::Computed => Place::Owned(fill(&mut reader, id, len)?),
            };
            places[id.index()] = Some(place);
        }
        Ok(Weights { mapping, places })
    }

    /// The bytes of a weight.
    pub fn region(&self, id: WeightId) -> Option<Region> {
        match self.places.get(id.index())?.as_ref()? {
            Place::Mapped { start, len } => Region::read_only(self.mapping.bytes()).part(*start, *len),
            Place::Owned(buffer) => Some(Region::read_only(buffer.bytes())),
        }
    }
}

/// The bytes of an engine's weights, any range of them at a time.
pub(crate) struct Supply<'a> {
    engine: &'a Engine,
    reader: WeightReader<'a>,
    bound: bool,
}

impl<'a> Supply<'a> {
    /// Over `engine`, whose weights `source` has if it is stripped.
    pub fn new(engine: &'a Engine, source: Option<&'a dyn TensorSource>) -> Supply<'a> {
        let reader = WeightReader::new(engine.module());
        let reader = match source {
            Some(source) => reader.with_source("model", source),
            None => reader,
        };
        Supply { engine, reader, bound: source.is_some() }
    }

    /// Where a weight of `len` bytes comes from.
    pub fn origin(&self, id: WeightId, len: u64) -> Result<Origin<'a>> {
        Origin::of(self.engine, id, len, self.bound)
    }

    /// The open engine file with its path, if there is one.
    pub fn file(&self) -> Option<(&'a File, &'a Path)> {
        self.engine.file().file().zip(self.engine.file().path())
    }

    /// The byte of the engine file at which a stored weight begins; `None` for an engine in memory.
    pub fn in_file(&self, record: &WeightRecord) -> Result<Option<u64>> {
        let file = self.engine.file();
        let Some((start, section)) = file.weights_range().filter(|_| file.file().is_some()) else {
            return Ok(None);
        };
        let inside = record.offset.checked_add(record.len).is_some_and(|end| end <= section);
        let outside = || {
            Error::new(Kind::BadInput, "engine/weight-mismatch", "the weight leaves its section")
                .at(format!("@{}", record.name))
        };
        start.checked_add(record.offset).filter(|_| inside).map(Some).ok_or_else(outside)
    }

    /// Fills `out` from byte `offset` of a weight.
    pub fn read(&mut self, id: WeightId, offset: u64, out: &mut [u8]) -> Result<()> {
        let len = self.reader.len(id)?;
        if let Origin::Stored(record) = self.origin(id, len)? {
            return self.engine.file().read_weight_at(record, offset, out);
        }
        let mut at = offset;
        for piece in out.chunks_mut(CHUNK as usize) {
            self.reader.read(id, at, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Compares every bound weight with its hash.
    pub fn check_bound(&mut self) -> Result<()> {
        let mut buffer = Vec::new();
        self.engine.module().used_weights().into_iter().try_for_each(|id| self.check(id, &mut buffer))
    }

    /// Compares a weight with its hash if it is bound; `buffer` is room that may be used again.
    pub fn check(&mut self, id: WeightId, buffer: &mut Vec<u8>) -> Result<()> {
        let len = self.reader.len(id)?;
        let Origin::Bound(record) = self.origin(id, len)? else { return Ok(()) };
        let (mut hasher, mut at) = (blake3::Hasher::new(), 0);
        while at < len {
            buffer.resize(CHUNK.min(len - at) as usize, 0);
            self.reader.read(id, at, buffer)?;
            hasher.update(buffer);
            at += buffer.len() as u64;
        }
        check_hash(record, hasher.finalize())
    }
}

fn fill(reader: &mut WeightReader<'_>, id: WeightId, len: u64) -> Result<Buffer> {
    let mut buffer = Buffer::zeroed(len, "weights")?;
    for (index, piece) in buffer.bytes_mut().chunks_mut(CHUNK as usize).enumerate() {
        reader.read(id, index as u64 * CHUNK, piece)?;
    }
    Ok(buffer)
}

/// Where the bytes of a weight come from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Origin<'a> {
    /// The engine file.
    Stored(&'a WeightRecord),
    /// A model folder; the engine has only their hash.
    Bound(&'a WeightRecord),
    /// Its expression.
    Computed,
}

impl<'a> Origin<'a> {
    /// Where the `len` bytes of weight `id` come from; `bound` tells whether there is a model folder.
    pub fn of(engine: &'a Engine, id: WeightId, len: u64, bound: bool) -> Result<Origin<'a>> {
        let (file, module) = (engine.file(), engine.module());
        let weight = &module.weights[id];
        let shape = weight.ty.const_shape();
        match file.weight(&weight.name) {
            Some(r) if r.dtype != weight.ty.dtype || Some(&r.shape) != shape.as_ref() || r.len != len => {
                Err(Error::new(Kind::BadInput, "engine/weight-mismatch", "graph and weight index disagree")
                    .at(format!("@{}", weight.name))
                    .hint("the file was altered: build it again"))
            }
            Some(r) if !file.is_stripped() => Ok(Origin::Stored(r)),
            Some(r) if bound => Ok(Origin::Bound(r)),
            Some(_) => {
                Err(Error::new(Kind::Incompatible, "engine/stripped", "the engine was built without weights")
                    .hint("name the model folder with --weights DIR"))
            }
            None if needs_source(module, id) => {
                Err(Error::new(Kind::BadInput, "engine/no-weight", "the engine lacks this weight")
                    .at(format!("@{}", weight.name)))
            }
            None => Ok(Origin::Computed),
        }
    }
}

/// Compares the hash of bound bytes with that of the engine.
pub(crate) fn check_hash(record: &WeightRecord, hash: blake3::Hash) -> Result<()> {
    if hash.as_bytes() == &record.hash {
        return Ok(());
    }
    Err(Error::new(
        Kind::Incompatible,
        "engine/weight-hash",
        "the folder has other weights than the engine was built from",
    )
    .at(format!("@{}", record.name))
    .hint("bind the model folder the engine was built from, or build the engine again"))
}
