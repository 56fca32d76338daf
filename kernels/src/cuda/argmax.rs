//! Helpers that draw tokens need: the largest logit of each row, and the k largest.
//!
//! Answers are those of the host's sampler: the lowest index among equal logits (-0 equals 0). Where the host reports an
//! error the index is negative, see [`NOT_A_NUMBER`], [`INFINITE`] and [`NOTHING`].

use std::sync::Arc;

use super::source::{Promise, Source, SourceWriter};

const COMMON: &str = include_str!("argmax.cu");

/// Threads of a block of [`topk`].
pub const THREADS: u32 = 1024;
/// Threads of a block of [`argmax_split`].
pub const SPLIT_THREADS: u32 = 512;
/// Index of a row that has a NaN.
pub const NOT_A_NUMBER: i32 = -1;
/// Index of a row whose largest element is infinite.
pub const INFINITE: i32 = -2;
/// Index of a row of no elements.
pub const NOTHING: i32 = -3;
/// Most elements that [`topk`] finds.
pub const MOST: usize = 1024;

fn source(family: &'static str, threads: u32, body: &str) -> Arc<Source> {
    SourceWriter::new(family)
        .int("THREADS", threads)
        .body(COMMON)
        .body(body)
        .promise(Promise { registers: 64, no_local: true })
        .finish()
}

/// `(const float *rows, int *out, int width, u64 *best, u32 *arrived)` on a grid of (parts, rows): the index of the largest
/// element of each row, found by several blocks a row. `best` has `parts * rows` elements; `arrived` has `rows`, zero
/// before and after.
pub fn argmax_split() -> Arc<Source> {
    source("cuda.argmax.split", SPLIT_THREADS, include_str!("argmax_split.cu"))
}

/// Blocks a row that fill `multiprocessors` with `rows` rows of `width` elements, for [`argmax_split`].
pub fn parts(rows: u64, width: u64, multiprocessors: u32) -> u32 {
    let fill = (2 * u64::from(multiprocessors)).div_ceil(rows.max(1));
    // A part has 4 elements a thread to read at least.
    fill.clamp(1, (width / (u64::from(SPLIT_THREADS) * 4)).clamp(1, 64)) as u32
}

/// `(const float *rows, float *values, int *indices, int width, int k)`, one block a row, `k` up to [`MOST`]: the `k`
/// largest elements and their indices, largest first, lower indices first among equals. Rows shorter than `k` end with
/// minus infinity at index -1; a row with a NaN has index -1 everywhere.
pub fn topk() -> Arc<Source> {
    source("cuda.topk", THREADS, include_str!("topk.cu"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fill_the_device_with_blocks_that_have_work() {
        assert_eq!(parts(32, 128_256, 132), 9);
        assert_eq!(parts(1, 128_256, 132), 62);
        assert_eq!(parts(1000, 128_256, 132), 1);
        assert_eq!(parts(1, 100, 132), 1);
        assert_eq!(parts(0, 0, 132), 1);
    }

    #[test]
    fn sources_have_one_entry_point() {
        for source in [argmax_split(), topk()] {
            assert_eq!(source.text.matches("KERNEL(").count(), 1, "{}", source.family);
        }
    }
}
