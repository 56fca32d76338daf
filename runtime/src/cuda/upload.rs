//! Weights on the device: one block, filled by several threads through pinned memory.
//!
//! The block is cut into chunks of equal size. Each thread takes the next chunk, fills one of its two staging buffers
//! with whatever weights lie in it (read from the file, bound from a model folder, or computed), and enqueues the copy;
//! so reading, computing and copying overlap whatever the sizes of the weights.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::weights::WeightReader;
use millrace_ir::{Error, Kind, Result, WeightId};

use super::driver::{Block, Context, Stream};
use super::range::Range;
use super::resolve::{by_id, pack, parts};
use super::transfer::Staging;
use crate::engine::Engine;
use crate::places::Piece;
use crate::weights::{Origin, check_hash};

/// Bytes that are copied at once: large enough for nearly the link's rate, small enough that pinning the buffers takes
/// little time. Of 1, 2 and 4 MiB this was the fastest for 4 GiB on an H200.
const CHUNK: u64 = 2 << 20;

/// Most threads that read weights: more pin more memory and are not faster than the link.
const READERS: usize = 8;

/// Most threads where weights are computed, which takes longer than copying them.
const COMPUTERS: usize = 64;

/// Where weights lie in their block.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Layout {
    ids: Vec<WeightId>,
    offsets: Vec<u64>,
    sizes: Vec<u64>,
    /// Bytes of the block.
    pub bytes: u64,
    /// Bytes of the weights alone.
    pub weights: u64,
}

impl Layout {
    /// The layout of the weights that nodes of `engine` read.
    pub fn of(engine: &Engine) -> Result<Layout> {
        let module = engine.module();
        let reader = WeightReader::new(module);
        let ids: Vec<WeightId> = module.used_weights().into_iter().collect();
        let sizes = ids.iter().map(|id| reader.len(*id)).collect::<Result<Vec<u64>>>()?;
        let too_large = || Error::new(Kind::OutOfMemory, "run/out-of-memory", "the weights exceed 64 bits");
        let (offsets, bytes) = pack(&sizes).ok_or_else(too_large)?;
        let weights = sizes.iter().sum();
        Ok(Layout { ids, offsets, sizes, bytes, weights })
    }

    /// By weight: its range of `block`.
    pub fn ranges(&self, bound: usize, block: Range) -> Vec<Option<Range>> {
        let ranges = parts(block, &self.offsets, &self.sizes).unwrap_or_default();
        by_id(bound, &self.ids, ranges)
    }
}

/// Fills chunks of the block; each thread has its own.
struct Filler<'a> {
    engine: &'a Engine,
    layout: &'a Layout,
    origins: &'a [Origin<'a>],
    reader: WeightReader<'a>,
}

fn reader<'a>(engine: &'a Engine, source: Option<&'a dyn TensorSource>) -> WeightReader<'a> {
    let reader = WeightReader::new(engine.module());
    match source {
        Some(source) => reader.with_source("model", source),
        None => reader,
    }
}

fn origins<'a>(engine: &'a Engine, layout: &Layout, bound: bool) -> Result<Vec<Origin<'a>>> {
    layout.ids.iter().zip(&layout.sizes).map(|(id, len)| Origin::of(engine, *id, *len, bound)).collect()
}

impl Filler<'_> {
    /// Fills `out` with the block's bytes from `start` on; zeros between weights.
    fn fill(&mut self, start: u64, out: &mut [u8]) -> Result<()> {
        let Layout { ids, offsets, sizes, .. } = self.layout;
        let end = start + out.len() as u64;
        let mut filled = start;
        // Offsets ascend; the weight before the first that begins inside may reach in.
        let first = offsets.partition_point(|at| *at < start).saturating_sub(1);
        for index in first..ids.len() {
            let (low, high) = (offsets[index].max(start), (offsets[index] + sizes[index]).min(end));
            if offsets[index] >= end {
                break;
            }
            if low >= high {
                continue;
            }
            out[(filled - start) as usize..(low - start) as usize].fill(0);
            let piece = &mut out[(low - start) as usize..(high - start) as usize];
            let at = low - offsets[index];
            match self.origins[index] {
                Origin::Stored(record) => self.engine.file().read_weight_at(record, at, piece)?,
                Origin::Bound(_) | Origin::Computed => self.reader.read(ids[index], at, piece)?,
            }
            filled = high;
        }
        out[(filled - start) as usize..].fill(0);
        Ok(())
    }
}

/// Runs `work` for every number below `count` on `threads` threads, each with a state of its own.
fn share<S>(
    count: usize,
    threads: usize,
    state: impl Fn() -> Result<S> + Sync,
    work: impl Fn(&mut S, usize) -> Result<()> + Sync,
    finish: impl Fn(S) -> Result<()> + Sync,
) -> Result<()> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = || -> Result<()> {
        let mut state = state()?;
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            if let Err(error) = work(&mut state, index) {
                failed.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        finish(state)
    };
    std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads.min(count))
            .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, run).ok())
            .collect();
        let mut result = run();
        for helper in helpers {
            let ended = helper.join().unwrap_or_else(|_| {
                Err(Error::new(Kind::Internal, "cuda/load-thread", "a loading thread ended early"))
            });
            result = result.and(ended);
        }
        result
    })
}

/// Compares every bound weight with its hash before anything is allocated.
fn check_bound(
    engine: &Engine,
    layout: &Layout,
    origins: &[Origin<'_>],
    source: Option<&dyn TensorSource>,
    threads: usize,
) -> Result<()> {
    if !origins.iter().any(|o| matches!(o, Origin::Bound(_))) {
        return Ok(());
    }
    let check = |(reader, buffer): &mut (WeightReader<'_>, Vec<u8>), index: usize| -> Result<()> {
        let Origin::Bound(record) = origins[index] else { return Ok(()) };
        let (mut hasher, mut at, len) = (blake3::Hasher::new(), 0, layout.sizes[index]);
        while at < len {
            buffer.resize(CHUNK.min(len - at) as usize, 0);
            reader.read(layout.ids[index], at, buffer)?;
            hasher.update(buffer);
            at += buffer.len() as u64;
        }
        check_hash(record, hasher.finalize())
    };
    share(layout.ids.len(), threads, || Ok((reader(engine, source), Vec::new())), check, |_| Ok(()))
}

/// What a loading thread has.
struct Loader<'a> {
    filler: Filler<'a>,
    stream: Arc<Stream>,
    staging: [Staging; 2],
    turn: usize,
}

/// Allocates the block and fills it; returns when all bytes have arrived.
pub(super) fn upload(
    context: &Arc<Context>,
    engine: &Engine,
    source: Option<&dyn TensorSource>,
    layout: &Layout,
    threads: usize,
) -> Result<Block> {
    let origins = origins(engine, layout, source.is_some())?;
    let stored = |o: &Origin<'_>| matches!(o, Origin::Stored(_));
    let most = if origins.iter().all(stored) { READERS } else { COMPUTERS };
    let threads = threads.clamp(1, most);
    check_bound(engine, layout, &origins, source, threads)?;
    let block = Block::new(context, layout.bytes, "weights")?;
    let range = block.range();
    let chunks = layout.bytes.div_ceil(CHUNK) as usize;
    let size = CHUNK.min(layout.bytes) as usize;
    let state = || {
        context.enter()?;
        Ok(Loader {
            filler: Filler { engine, layout, origins: &origins, reader: reader(engine, source) },
            stream: Stream::new(context)?,
            staging: [Staging::new(context, size)?, Staging::new(context, size)?],
            turn: 0,
        })
    };
    let work = |loader: &mut Loader<'_>, index: usize| {
        let start = index as u64 * CHUNK;
        let len = CHUNK.min(layout.bytes - start);
        let outside = || Error::new(Kind::Internal, "cuda/load-thread", "a chunk lies outside of its block");
        let to = range.part(start, len).ok_or_else(outside)?;
        let staging = &mut loader.staging[loader.turn % 2];
        loader.turn += 1;
        loader.filler.fill(start, &mut staging.fill()?[..len as usize])?;
        staging.send(&loader.stream, to)?;
        staging.sent(&loader.stream)
    };
    if chunks > 0 {
        share(chunks, threads, state, work, |loader| loader.stream.synchronize())?;
    }
    Ok(block)
}

/// By id, without a device: what [`upload`] would put at each weight's place.
#[cfg(test)]
fn image(engine: &Engine, chunk: usize) -> Result<(Layout, Vec<u8>)> {
    let layout = Layout::of(engine)?;
    let origins = origins(engine, &layout, false)?;
    let mut filler = Filler { engine, layout: &layout, origins: &origins, reader: reader(engine, None) };
    let mut bytes = vec![0xaa; layout.bytes as usize];
    for (index, out) in bytes.chunks_mut(chunk).enumerate() {
        filler.fill((index * chunk) as u64, out)?;
    }
    Ok((layout.clone(), bytes))
}

#[cfg(test)]
#[path = "upload_tests.rs"]
mod tests;
