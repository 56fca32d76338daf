//! Times of launch tables on a device, apart from any engine: a table of one step, buffers for the operands that its
//! launches name, random numbers in them.
//!
//! Weights lie there several times over, together more than the device's caches hold, and launches take one copy after
//! the other, as layers do. Launches are recorded as one graph, so that the host does not enter the time, and kernels
//! overlap their predecessors as in a step. Nothing here knows what kernels compute.

use std::sync::Arc;

use half::{bf16, f16};
use millrace_ir::launch::{Bundle, LaunchTable};
use millrace_ir::{Bindings, DType, Error, Id, Kind, Operand, Result};

use super::driver::{Block, Context, DeviceInfo, Event, Stream};
use super::launch::{Graph, Ready};
use super::library::{Library, Places, Plan, Product, Question, WORKSPACE, present, suggestions};
use super::products::Supply;
use super::program::Program;
use super::range::Range;
use super::resolve::{Addresses, Limits, Ring, pack, parts, resolve_step};
use super::transfer::{Landing, Staging};
use crate::places::{Piece, Regions};

/// Bytes of weights that launches walk through before they come to the same again: over three times the second-level
/// cache of the devices with most of it.
const ROTATION: u64 = 384 << 20;

/// Most copies of weights.
const MOST_COPIES: u64 = 64;

/// Least time of a recorded list of launches, in seconds.
const LEAST: f64 = 400e-6;

/// Most launches of a recorded list.
const MOST_LAUNCHES: usize = 1024;

/// Bytes of random numbers; longer buffers repeat them.
const NOISE: usize = 4 << 20;

/// Bytes of a result that are looked at in three places each.
const SAMPLE: u64 = 256 << 10;

/// A buffer that launches name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimedBuffer {
    /// What the launches call it.
    pub operand: Operand,
    /// Element type.
    pub dtype: DType,
    /// Size.
    pub bytes: u64,
    /// Random numbers between minus and plus this much; none for what launches write.
    pub random: Option<f32>,
}

/// A device to measure on.
pub struct Timer {
    library: Option<Option<Arc<Library>>>,
    noise: Vec<(DType, u32, Block)>,
    staging: Staging,
    start: Event,
    end: Event,
    stream: Arc<Stream>,
    recording: Arc<Stream>,
    context: Arc<Context>,
}

/// Buffers of one step.
pub struct Bench<'a> {
    timer: &'a mut Timer,
    buffers: Vec<TimedBuffer>,
    /// Where each buffer is; weights once for each copy.
    ranges: Vec<Vec<Range>>,
    copies: usize,
    bindings: Bindings,
    _memory: Block,
}

/// Work that is ready to be timed.
pub struct Timed {
    work: Work,
    graph: Graph,
    rounds: usize,
    /// What the work writes: results of the step, or a buffer of its own.
    results: Vec<(DType, Range)>,
    /// Holds the device code.
    _program: Option<Program>,
    /// Holds memory of its own.
    _memory: Option<Block>,
}

/// What is done for each copy of the weights.
enum Work {
    /// Launches and products of a library by copy.
    Launches(Vec<Vec<Ready>>),
    /// A product by copy of `w`, with scratch memory.
    Product { plan: Plan, places: Vec<Places>, scratch: Range },
}

impl Work {
    /// Enqueues the work for one copy; `overlap` tells whether a launch may begin before its predecessor has ended.
    fn enqueue(&self, copy: usize, overlap: bool, stream: &Stream) -> Result<()> {
        match self {
            // The first follows whatever there was, the same work for another copy; the others their neighbour.
            Work::Launches(all) => {
                let list = &all[copy % all.len()];
                let mut overlap = overlap && list.last().is_some_and(Ready::is_launch);
                list.iter().try_for_each(|ready| {
                    ready.enqueue_alone(stream, overlap)?;
                    overlap = ready.is_launch();
                    Ok(())
                })
            }
            Work::Product { plan, places, scratch } => {
                plan.enqueue(stream, &places[copy % places.len()], *scratch)
            }
        }
    }
}

/// Elements of a type as bytes; uniform between minus and plus `most`.
fn noise(dtype: DType, most: f32, room: &mut [u8]) -> Result<()> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        // Xorshift: what matters is that bits differ, as power and so the clock depend on them.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * most
    };
    match dtype {
        DType::F32 => room.as_chunks_mut::<4>().0.iter_mut().for_each(|c| *c = next().to_ne_bytes()),
        DType::BF16 => {
            let bits = |v: f32| bf16::from_f32(v).to_ne_bytes();
            room.as_chunks_mut::<2>().0.iter_mut().for_each(|c| *c = bits(next()));
        }
        DType::F16 => {
            let bits = |v: f32| f16::from_f32(v).to_ne_bytes();
            room.as_chunks_mut::<2>().0.iter_mut().for_each(|c| *c = bits(next()));
        }
        other => {
            let message = format!("there are no random numbers of {other}");
            return Err(Error::new(Kind::Unsupported, "cuda/noise", message));
        }
    }
    Ok(())
}

/// The numbers that `bytes` are.
fn numbers(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => bytes.as_chunks::<4>().0.iter().map(|c| f32::from_ne_bytes(*c)).collect(),
        DType::BF16 => bytes.as_chunks::<2>().0.iter().map(|c| bf16::from_ne_bytes(*c).to_f32()).collect(),
        DType::F16 => bytes.as_chunks::<2>().0.iter().map(|c| f16::from_ne_bytes(*c).to_f32()).collect(),
        _ => Vec::new(),
    }
}

/// How far `found` is from `expected`: the norm of the difference by the norm of what is expected; infinite if they
/// cannot be compared.
pub fn distance(expected: &[f32], found: &[f32]) -> f64 {
    if expected.len() != found.len() {
        return f64::INFINITY;
    }
    let (mut difference, mut size) = (0.0f64, 0.0f64);
    for (e, f) in expected.iter().zip(found) {
        difference += (f64::from(*e) - f64::from(*f)).powi(2);
        size += f64::from(*e).powi(2);
    }
    match (difference, size) {
        (d, s) if !d.is_finite() || !s.is_finite() => f64::INFINITY,
        (0.0, _) => 0.0,
        (d, s) => (d / s).sqrt(),
    }
}

impl Timer {
    /// Opens device `index`.
    ///
    /// # Errors
    /// `cuda/no-driver`, `cuda/no-device` and what else keeps a device from being opened.
    pub fn open(index: u32) -> Result<Timer> {
        let context = Context::retain(index)?;
        Ok(Timer {
            noise: Vec::new(),
            library: None,
            staging: Staging::new(&context, NOISE)?,
            start: Event::new(&context, true)?,
            end: Event::new(&context, true)?,
            stream: Stream::new(&context)?,
            recording: Stream::new(&context)?,
            context,
        })
    }

    /// The library of matrix products, opened when first asked for; `None` where it is not there.
    fn library(&mut self) -> Result<Option<Arc<Library>>> {
        if self.library.is_none() {
            self.library = Some(Library::open(&self.context)?);
        }
        Ok(self.library.clone().flatten())
    }

    /// The library as `table` needs it.
    fn supply(&mut self, table: &LaunchTable) -> Result<Supply> {
        if table.by_library().next().is_none() {
            return Ok(Supply::without(table, ""));
        }
        Ok(match self.library()? {
            Some(library) => Supply::with(&library, table),
            None => Supply::without(table, "it is not installed"),
        })
    }

    /// What the device is.
    pub fn device(&self) -> &DeviceInfo {
        &self.context.info
    }

    /// Version of CUDA the driver is for: 13000 is 13.0.
    pub fn driver(&self) -> u32 {
        self.context.driver
    }

    /// Buffers for launches at `bindings`.
    ///
    /// # Errors
    /// `run/out-of-memory`, and `cuda/noise` for element types that have no random numbers.
    pub fn bench(&mut self, buffers: &[TimedBuffer], bindings: &Bindings) -> Result<Bench<'_>> {
        self.context.enter()?;
        let is_weight = |b: &TimedBuffer| matches!(b.operand, Operand::Weight(_));
        let no_size = || Error::new(Kind::OutOfMemory, "run/out-of-memory", "the buffers exceed the device");
        let weights: u64 = buffers.iter().filter(|b| is_weight(b)).map(|b| b.bytes).sum();
        let copies = ROTATION.div_ceil(weights.max(1)).clamp(2, MOST_COPIES);
        let mut sizes = Vec::new();
        for buffer in buffers {
            let times = if is_weight(buffer) { copies } else { 1 };
            sizes.extend((0..times).map(|_| buffer.bytes));
        }
        let (offsets, total) = pack(&sizes).ok_or_else(no_size)?;
        let memory = Block::new(&self.context, total, "a measurement")?;
        let mut pieces = parts(memory.range(), &offsets, &sizes).ok_or_else(no_size)?.into_iter();
        let mut ranges = Vec::new();
        for buffer in buffers {
            let times = if is_weight(buffer) { copies as usize } else { 1 };
            let own: Vec<Range> = pieces.by_ref().take(times).collect();
            for range in &own {
                match buffer.random {
                    Some(most) => self.fill(*range, buffer.dtype, most)?,
                    None => self.stream.zero(*range)?,
                }
            }
            ranges.push(own);
        }
        self.stream.synchronize()?;
        Ok(Bench {
            timer: self,
            buffers: buffers.to_vec(),
            ranges,
            copies: copies as usize,
            bindings: bindings.clone(),
            _memory: memory,
        })
    }

    /// Fills a buffer with random numbers, the same for every buffer of the same kind.
    fn fill(&mut self, range: Range, dtype: DType, most: f32) -> Result<()> {
        let known = |n: &(DType, u32, Block)| (n.0, n.1) == (dtype, most.to_bits());
        if !self.noise.iter().any(known) {
            let block = Block::new(&self.context, NOISE as u64, "random numbers")?;
            noise(dtype, most, self.staging.fill()?)?;
            self.staging.send(&self.stream, block.range())?;
            self.staging.sent(&self.stream)?;
            self.noise.push((dtype, most.to_bits(), block));
        }
        let Some((_, _, block)) = self.noise.iter().find(|n| known(n)) else { return Ok(()) };
        let mut at = 0;
        while at < range.len {
            let len = (range.len - at).min(NOISE as u64);
            if let (Some(from), Some(to)) = (block.range().part(0, len), range.part(at, len)) {
                self.stream.copy(from, to)?;
            }
            at += len;
        }
        Ok(())
    }
}

impl Bench<'_> {
    /// Whether the library of matrix products is installed.
    pub fn has_library(&self) -> bool {
        present()
    }

    /// Addresses with the weights of one copy.
    fn addresses(&self, copy: usize) -> (Addresses, Vec<Option<Range>>) {
        let mut regions = Regions {
            inputs: Vec::new(),
            outputs: Vec::new(),
            arenas: Vec::new(),
            states: Vec::new(),
            weights: Vec::new(),
        };
        let mut values = Vec::new();
        let put = |list: &mut Vec<Option<Range>>, index: usize, range: Range| {
            list.resize(list.len().max(index + 1), None);
            list[index] = Some(range);
        };
        for (buffer, ranges) in self.buffers.iter().zip(&self.ranges) {
            let range = ranges[copy % ranges.len()];
            match buffer.operand {
                Operand::Value(id) => put(&mut values, id.index(), range),
                Operand::Weight(id) => put(&mut regions.weights, id.index(), range),
                Operand::State(id) => put(&mut regions.states, id.index(), range),
            }
        }
        let (workspace, counters) = (Range::EMPTY, Range::EMPTY);
        (Addresses { regions, workspace, counters, ring: Ring::default() }, values)
    }

    fn seconds(&self, work: impl FnOnce(&Stream) -> Result<()>) -> Result<f64> {
        let Timer { start, end, stream, .. } = &*self.timer;
        start.record(stream)?;
        work(stream)?;
        end.record(stream)?;
        end.synchronize()?;
        end.seconds_since(start)
    }

    /// Loads a table of one step and records its launches.
    ///
    /// # Errors
    /// Whatever keeps its kernels from being loaded or launched.
    pub fn prepare(&mut self, bundle: Bundle) -> Result<Timed> {
        self.timer.context.enter()?;
        let context = self.timer.context.clone();
        let program = Program::load(&context, bundle)?;
        let limits = Limits::of(&context.info);
        let supply = self.timer.supply(&program.table)?;
        let memory = match supply.workspace() {
            0 => None,
            bytes => Some(Block::new(&context, bytes, "scratch memory of a library")?),
        };
        let library = memory.as_ref().map(|block| (&supply, block.range()));
        let mut all = Vec::new();
        for copy in 0..self.copies {
            let (addresses, values) = self.addresses(copy);
            let actions = resolve_step(&program.table, &addresses, &values, &self.bindings, limits, &supply)
                .map_err(|e| supply.report().map_or(e.clone(), |report| e.at(report)))?;
            all.push(program.ready(&actions, library)?);
        }
        let results = self.buffers.iter().zip(&self.ranges);
        let results = results.filter(|(b, _)| b.random.is_none()).map(|(b, r)| (b.dtype, r[0])).collect();
        self.record(Work::Launches(all), results, Some(program), memory)
    }

    /// Prepares the product `x w^T` by cuBLASLt's ways, at most `most` of them; none where the library is not there. It
    /// takes the buffers of `x` and `w` as rows of numbers, whatever they are to the launches, and writes to memory of
    /// its own.
    ///
    /// # Errors
    /// `run/out-of-memory`, and what the library gives.
    pub fn products(&mut self, product: Product, x: Operand, w: Operand, most: usize) -> Result<Vec<Timed>> {
        let context = self.timer.context.clone();
        context.enter()?;
        let Some(library) = self.timer.library()? else { return Ok(Vec::new()) };
        let question = Question::from(product);
        let found = |operand: Operand| {
            let at = self.buffers.iter().position(|b| b.operand == operand);
            at.map(|at| self.ranges[at].clone())
        };
        let (Some(x), Some(w)) = (found(x).and_then(|r| r.first().copied()), found(w)) else {
            return Ok(Vec::new());
        };
        let bytes = product.m * product.n * product.out.size_bytes().unwrap_or(0) as u64;
        let mut all = Vec::new();
        for algorithm in suggestions(&library, &question, most)? {
            let Some(plan) = Plan::new(&library, question, algorithm, None)? else { continue };
            let (offsets, total) = pack(&[bytes, WORKSPACE]).unwrap_or_default();
            let memory = Block::new(&context, total, "a product")?;
            let [y, scratch] = parts(memory.range(), &offsets, &[bytes, WORKSPACE]).unwrap_or_default()[..]
            else {
                return Ok(all);
            };
            let at = |w: &Range| Places { w: *w, x, y, bias: None, residual: None };
            let work = Work::Product { plan, places: w.iter().map(at).collect(), scratch };
            all.push(self.record(work, vec![(product.out, y)], None, Some(memory))?);
        }
        Ok(all)
    }

    /// Records rounds through all copies of the weights.
    fn record(
        &mut self,
        work: Work,
        results: Vec<(DType, Range)>,
        program: Option<Program>,
        memory: Option<Block>,
    ) -> Result<Timed> {
        // The first run loads what the driver loads late; the second tells how many make up a list.
        self.seconds(|stream| work.enqueue(0, false, stream))?;
        let each = self.seconds(|stream| work.enqueue(0, false, stream))?.max(1e-6);
        let rounds = ((LEAST / each / self.copies as f64).ceil() as usize)
            .clamp(1, (MOST_LAUNCHES / self.copies).max(1));
        let runs = rounds * self.copies;
        let list = |stream: &Stream| (0..runs).try_for_each(|at| work.enqueue(at, at > 0, stream));
        let graph = Graph::record(&self.timer.recording, list)?;
        let timed = Timed { work, graph, rounds: runs, results, _program: program, _memory: memory };
        self.time(&timed)?;
        Ok(timed)
    }

    /// Seconds of one pass through the step.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn time(&mut self, timed: &Timed) -> Result<f64> {
        Ok(self.seconds(|stream| timed.graph.launch(stream))? / timed.rounds as f64)
    }

    /// Runs the step once from zeros, and gives what it writes: beginning, middle and end of each result.
    ///
    /// # Errors
    /// A failure of the device.
    pub fn results(&mut self, timed: &Timed) -> Result<Vec<Vec<f32>>> {
        let stream = &self.timer.stream;
        for (_, range) in &timed.results {
            stream.zero(*range)?;
        }
        timed.work.enqueue(0, false, stream)?;
        let mut landing = Landing::new(stream, SAMPLE as usize)?;
        let mut all = Vec::new();
        for &(dtype, range) in &timed.results {
            let len = range.len.min(SAMPLE);
            let last = range.len - len;
            for at in [0, last / 2 / 4 * 4, last] {
                let part = range.part(at, len).unwrap_or(Range::EMPTY);
                landing.receive(stream, part)?;
                landing.wait()?;
                all.push(numbers(dtype, landing.bytes().get(..part.len as usize).unwrap_or(&[])));
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::super::survey;
    use super::*;

    #[test]
    fn noise_is_even_and_bounded() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let mut room = vec![0u8; 1 << 16];
            noise(dtype, 0.5, &mut room).unwrap();
            let values = numbers(dtype, &room);
            assert!(values.iter().all(|v| v.abs() <= 0.5) && values.len() >= 1 << 14);
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
            // Uniform in [-a, a]: mean 0, mean square a^2 / 3.
            assert!(mean.abs() < 0.01 && (square - 0.25 / 3.0).abs() < 0.003, "{dtype}: {mean} {square}");
        }
        assert_eq!(noise(DType::I32, 1.0, &mut [0; 4]).unwrap_err().code(), "cuda/noise");
    }

    #[test]
    fn distances() {
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 4.0]), 0.0);
        assert_eq!(distance(&[3.0, 4.0], &[3.0, 9.0]), 1.0);
        assert_eq!(distance(&[1.0], &[f32::NAN]), f64::INFINITY);
        assert_eq!(distance(&[1.0], &[]), f64::INFINITY);
        assert_eq!(distance(&[0.0], &[1.0]), f64::INFINITY);
    }

    #[test]
    fn without_a_device_opening_says_why() {
        if let Some(problem) = survey().problem {
            assert_eq!(Timer::open(0).err().map(|e| e.code()), Some(problem.code()));
        }
    }
}
