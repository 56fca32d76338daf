//! Weights on their way: into device memory through pinned memory, or into host memory, by several threads.
//!
//! What is to be filled is a list of [`Load`]s, ranges of memory with the pieces of weights that lie in each. They are cut into
//! chunks of equal size. Each thread takes the next chunk, fills one of its two staging buffers with whatever lies in it
//! (read from the file, bound from a model folder, or computed), and enqueues the copy; so reading, computing and copying
//! overlap whatever the sizes of the weights.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use millrace_ir::checkpoint::TensorSource;
use millrace_ir::weights::WeightReader;
use millrace_ir::{Error, Kind, Result, WeightId};

use super::driver::{Context, Stream};
use super::range::Range;
use super::resolve::pack;
use super::transfer::Staging;
use crate::engine::Engine;
use crate::places::Piece as _;
use crate::weights::{Origin, Supply};

/// Bytes that are copied at once: large enough for nearly the link's rate, small enough that pinning the buffers takes
/// little time. Of 1, 2 and 4 MiB this was the fastest for 4 GiB on an H200.
const CHUNK: u64 = 2 << 20;

/// Most threads that read weights: more pin more memory and are not faster than the link.
const READERS: usize = 8;

/// Most threads where weights are computed, which takes longer than copying them.
const COMPUTERS: usize = 64;

/// A part of a weight, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Piece {
    /// Index of the weight in its [`Sources`].
    pub index: usize,
    /// First byte in the weight.
    pub from: u64,
    /// Bytes.
    pub len: u64,
    /// First byte in the load.
    pub to: u64,
}

/// Memory that pieces fill; what lies between them becomes zero.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Load {
    /// Pieces in increasing order of place.
    pub pieces: Vec<Piece>,
    /// Bytes.
    pub bytes: u64,
}

impl Load {
    /// Whole weights side by side, each aligned.
    pub fn packed(weights: impl IntoIterator<Item = (usize, u64)>) -> Result<Load> {
        let (indices, sizes): (Vec<usize>, Vec<u64>) = weights.into_iter().unzip();
        let too_large = || Error::new(Kind::OutOfMemory, "run/out-of-memory", "the weights exceed 64 bits");
        let (offsets, bytes) = pack(&sizes).ok_or_else(too_large)?;
        let piece = |((index, len), to)| Piece { index, from: 0, len, to };
        Ok(Load { pieces: indices.into_iter().zip(sizes).zip(offsets).map(piece).collect(), bytes })
    }

    /// The first `len` bytes of one weight.
    pub fn prefix(index: usize, len: u64) -> Result<Load> {
        Self::packed([(index, len)])
    }
}

/// The weights of an engine, by index, and where their bytes come from.
pub(super) struct Sources<'a> {
    engine: &'a Engine,
    source: Option<&'a dyn TensorSource>,
    ids: Vec<WeightId>,
    /// Whether all bytes are in the engine file.
    stored: bool,
}

impl<'a> Sources<'a> {
    /// The weights that nodes of `engine` read, in the order of their first use.
    pub fn of(engine: &'a Engine, source: Option<&'a dyn TensorSource>) -> Result<Sources<'a>> {
        let (supply, reader) = (Supply::new(engine, source), WeightReader::new(engine.module()));
        let ids = engine.module().used_weights();
        let mut stored = true;
        for id in &ids {
            stored &= matches!(supply.origin(*id, reader.len(*id)?)?, Origin::Stored(_));
        }
        Ok(Sources { engine, source, ids, stored })
    }

    fn supply(&self) -> Supply<'a> {
        Supply::new(self.engine, self.source)
    }

    fn filler(&self) -> Filler<'_> {
        Filler { sources: self, supply: self.supply() }
    }

    /// Threads that fill, of `threads`.
    fn threads(&self, threads: usize) -> usize {
        threads.clamp(1, if self.stored { READERS } else { COMPUTERS })
    }

    /// Compares every bound weight with its hash.
    pub fn check_bound(&self, threads: usize) -> Result<()> {
        if self.stored {
            return Ok(());
        }
        let check = |(supply, buffer): &mut (Supply<'_>, Vec<u8>), index: usize| {
            supply.check(self.ids[index], buffer)
        };
        share(self.ids.len(), self.threads(threads), || Ok((self.supply(), Vec::new())), check, |_| Ok(()))
    }

    /// Fills host memory.
    pub fn read(&self, jobs: Vec<(&Load, &mut [u8])>, threads: usize) -> Result<()> {
        type Chunk<'c> = (&'c Load, u64, Mutex<&'c mut [u8]>);
        let mut chunks: Vec<Chunk<'_>> = Vec::new();
        for (load, out) in jobs {
            let pieces = out.chunks_mut(CHUNK as usize).enumerate();
            chunks.extend(pieces.map(|(i, piece)| (load, i as u64 * CHUNK, Mutex::new(piece))));
        }
        let work = |filler: &mut Filler<'_>, index: usize| {
            let (load, start, out) = &chunks[index];
            let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
            filler.fill(load, *start, &mut out)
        };
        share(chunks.len(), self.threads(threads), || Ok(self.filler()), work, |_| Ok(()))
    }
}

/// Fills chunks; each thread has its own.
struct Filler<'a> {
    sources: &'a Sources<'a>,
    supply: Supply<'a>,
}

impl Filler<'_> {
    /// Fills `out` with the bytes of a load from `start` on; zeros between pieces.
    fn fill(&mut self, load: &Load, start: u64, out: &mut [u8]) -> Result<()> {
        let end = start + out.len() as u64;
        let mut filled = start;
        // Places ascend; the piece before the first that begins inside may reach in.
        let first = load.pieces.partition_point(|p| p.to < start).saturating_sub(1);
        for piece in load.pieces[first.min(load.pieces.len())..].iter().take_while(|p| p.to < end) {
            let (low, high) = (piece.to.max(start), (piece.to + piece.len).min(end));
            if low >= high {
                continue;
            }
            out[(filled - start) as usize..(low - start) as usize].fill(0);
            let room = &mut out[(low - start) as usize..(high - start) as usize];
            let at = piece.from + (low - piece.to);
            self.supply.read(self.sources.ids[piece.index], at, room)?;
            filled = high;
        }
        out[(filled - start) as usize..].fill(0);
        Ok(())
    }
}

/// Runs `work` for every number below `count` on `threads` threads, each with a state of its own.
pub(super) fn share<S>(
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

/// What a loading thread has.
struct Loader<'a> {
    filler: Filler<'a>,
    stream: Arc<Stream>,
    staging: [Staging; 2],
    turn: usize,
}

/// Fills device memory; returns when all bytes have arrived.
pub(super) fn upload(
    context: &Arc<Context>,
    sources: &Sources<'_>,
    loads: &[(Range, Load)],
    threads: usize,
) -> Result<()> {
    let chunks: Vec<(usize, u64)> = loads
        .iter()
        .enumerate()
        .flat_map(|(job, (_, load))| (0..load.bytes.div_ceil(CHUNK)).map(move |i| (job, i * CHUNK)))
        .collect();
    let most = loads.iter().map(|(_, load)| load.bytes).max().unwrap_or(0);
    let size = CHUNK.min(most) as usize;
    let state = || {
        context.enter()?;
        Ok(Loader {
            filler: sources.filler(),
            stream: Stream::new(context)?,
            staging: [Staging::new(context, size)?, Staging::new(context, size)?],
            turn: 0,
        })
    };
    let work = |loader: &mut Loader<'_>, index: usize| {
        let (job, start) = chunks[index];
        let (range, load) = &loads[job];
        let len = CHUNK.min(load.bytes - start);
        let outside = || Error::new(Kind::Internal, "cuda/load-thread", "a chunk lies outside of its memory");
        let to = range.part(start, len).ok_or_else(outside)?;
        let staging = &mut loader.staging[loader.turn % 2];
        loader.turn += 1;
        loader.filler.fill(load, start, &mut staging.fill()?[..len as usize])?;
        staging.send(&loader.stream, to)?;
        staging.sent(&loader.stream)
    };
    if chunks.is_empty() {
        return Ok(());
    }
    share(chunks.len(), sources.threads(threads), state, work, |loader| loader.stream.synchronize())
}

#[cfg(test)]
#[path = "upload_tests.rs"]
mod tests;
