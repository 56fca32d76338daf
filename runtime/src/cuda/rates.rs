//! What a device can do at most, measured: reading its memory, and copying to and from pinned memory of the host.
//!
//! The reading kernel is text that the driver compiles, so nothing but a driver is needed.

use std::sync::Arc;

use millrace_ir::Result;

use super::driver::{Block, Context, Event, Function, Image, Stream};
use super::launch::ReadyLaunch;
use super::resolve::{Params, Resolution};
use super::transfer::{Landing, Staging};
use crate::places::Piece;

/// Rates in billions of bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Reading memory of the device.
    pub read_gbs: f64,
    /// Copying from pinned memory to the device.
    pub up_gbs: f64,
    /// Copying from the device to pinned memory.
    pub down_gbs: f64,
}

/// Bytes that are read: many times the cache of any device.
const READ: u64 = 2 << 30;
/// Bytes that are copied.
const COPIED: usize = 64 << 20;
/// Runs, of which the fastest counts.
const RUNS: usize = 6;
/// Threads of a block that reads.
const THREADS: u32 = 512;
/// Packs of 16 bytes that a thread asks for at once.
const DEPTH: u64 = 8;

/// Reads `count` packs of 16 bytes, a multiple of the threads times [`DEPTH`]. What is read is folded into a number that
/// is stored only if it is one that never occurs often, so that no load can be left out.
fn ptx() -> String {
    let body: String = (0..DEPTH)
        .map(|i| {
            let r = 8 + 4 * i;
            format!(
                " ld.global.nc.v4.u32 {{%r{r}, %r{}, %r{}, %r{}}}, [%d4];\n add.u64 %d4, %d4, %d6;\n",
                r + 1,
                r + 2,
                r + 3
            )
        })
        .collect();
    let folds: String = (8..8 + 4 * DEPTH).map(|r| format!(" xor.b32 %r7, %r7, %r{r};\n")).collect();
    format!(
        ".version 7.0
.target sm_80
.address_size 64
.visible .entry read_all(.param .u64 from, .param .u64 count, .param .u64 out) {{
 .reg .pred %p<2>;
 .reg .u32 %r<{registers}>;
 .reg .u64 %d<10>;
 ld.param.u64 %d4, [from];
 ld.param.u64 %d2, [count];
 ld.param.u64 %d3, [out];
 mov.u32 %r0, %ctaid.x;
 mov.u32 %r1, %ntid.x;
 mov.u32 %r2, %tid.x;
 mov.u32 %r3, %nctaid.x;
 mul.wide.u32 %d0, %r0, %r1;
 cvt.u64.u32 %d1, %r2;
 add.u64 %d0, %d0, %d1;
 mul.wide.u32 %d5, %r3, %r1;
 shl.b64 %d6, %d5, 4;
 shl.b64 %d7, %d0, 4;
 add.u64 %d4, %d4, %d7;
 mul.lo.u64 %d8, %d5, {DEPTH};
 mov.u32 %r7, 0;
again:
 setp.ge.u64 %p0, %d0, %d2;
 @%p0 bra done;
{body}{folds} add.u64 %d0, %d0, %d8;
 bra again;
done:
 setp.eq.u32 %p1, %r7, 0x9e3779b9;
 @%p1 st.global.u32 [%d3], %r7;
 ret;
}}
",
        registers = 8 + 4 * DEPTH
    )
}

/// Seconds of the fastest of some runs of `work`, after one that is not counted.
fn fastest(
    context: &Arc<Context>,
    stream: &Stream,
    mut work: impl FnMut(&Stream) -> Result<()>,
) -> Result<f64> {
    let (start, end) = (Event::new(context, true)?, Event::new(context, true)?);
    let mut best = f64::INFINITY;
    for run in 0..=RUNS {
        start.record(stream)?;
        work(stream)?;
        end.record(stream)?;
        end.synchronize()?;
        if run > 0 {
            best = best.min(end.seconds_since(&start)?);
        }
    }
    Ok(best)
}

/// Fills `bytes` with numbers of a linear congruential generator (Knuth's MMIX).
fn noise(bytes: &mut [u8]) {
    let mut state = 1u64;
    for chunk in bytes.chunks_mut(4) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        chunk.copy_from_slice(&state.to_be_bytes()[..chunk.len()]);
    }
}

/// Measures device `index`; takes up to 2 GiB of its memory for a moment.
///
/// # Errors
/// `cuda/no-driver`, `cuda/no-device`, `cuda/no-such-device`, `run/out-of-memory` and failures of the driver.
pub fn rates(index: u32) -> Result<Rates> {
    let context = Context::retain(index)?;
    let stream = Stream::new(&context)?;
    let blocks = context.info.multiprocessors.max(1) * 4;
    let round = u64::from(blocks * THREADS) * DEPTH * 16;
    let (free, _) = context.memory()?;
    let len = ((free / 2).min(READ) / round).max(1) * round;
    let block = Block::new(&context, len + 256, "measuring")?;
    let copied = COPIED.min(len as usize);
    let mut staging = Staging::new(&context, copied)?;
    noise(staging.fill()?);
    // Zeros would be read at less power, and so at a higher clock, than anything that a model has.
    for from in (0..len).step_by(copied) {
        let part = block.range().part(from, (len - from).min(copied as u64));
        staging.send(&stream, part.unwrap_or(block.range()))?;
    }
    staging.sent(&stream)?;
    let image = Image::load(&context, ptx().as_bytes())?;
    let function = Arc::new(Function::find(&image, "read_all", 0)?);
    let mut params = Params::default();
    for value in [block.range().base, len / 16, block.range().base + len] {
        params.push(&value.to_ne_bytes());
    }
    let launch = Resolution {
        kernel: 0,
        grid: [blocks, 1, 1],
        block: [THREADS, 1, 1],
        cluster: 1,
        shared: 0,
        dependent: false,
        params,
    };
    let launch = ReadyLaunch::new(&launch, &function, "read_all")?;
    let read = fastest(&context, &stream, |stream| launch.enqueue(stream, false))?;
    let mut landing = Landing::new(&stream, copied)?;
    let there = block.range().part(0, copied as u64).unwrap_or(block.range());
    let up = fastest(&context, &stream, |stream| {
        staging.send(stream, there)?;
        staging.sent(stream)
    })?;
    let down = fastest(&context, &stream, |stream| {
        landing.receive(stream, there)?;
        landing.expect()
    })?;
    stream.synchronize()?;
    let gbs = |bytes: u64, seconds: f64| if seconds > 0.0 { bytes as f64 / seconds / 1e9 } else { 0.0 };
    Ok(Rates { read_gbs: gbs(len, read), up_gbs: gbs(there.len, up), down_gbs: gbs(there.len, down) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::survey;

    #[test]
    fn a_device_has_rates_and_no_device_an_answer() {
        let measured = rates(0);
        match survey().problem {
            None => {
                let rates = measured.unwrap();
                assert!(
                    rates.read_gbs > rates.up_gbs && rates.up_gbs > 0.1 && rates.down_gbs > 0.1,
                    "{rates:?}"
                );
            }
            Some(problem) => assert_eq!(measured.unwrap_err().code(), problem.code()),
        }
    }
}
