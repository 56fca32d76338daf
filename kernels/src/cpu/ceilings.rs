//! What this machine can do at most, measured: the floor and ceiling of benchmark reports.

use std::hint::black_box;
use std::time::Instant;

use super::parallel::Pool;
use super::simd::{PANEL, TILE_ROWS, tile};

/// Multiply-add rate of one thread in GFLOP/s: the matmul tile on operands in the first-level cache.
pub fn fma_gflops(pool: &Pool) -> f64 {
    let k = 96;
    let (a, panel) = (vec![0.5f32; TILE_ROWS * k], vec![0.25f32; k * PANEL]);
    let mut acc = vec![0f32; TILE_ROWS * PANEL];
    let rounds = 20_000;
    let mut best = 0f64;
    for _ in 0..5 {
        let start = Instant::now();
        for _ in 0..rounds {
            tile(pool.isa, black_box(&a), TILE_ROWS, TILE_ROWS, k, black_box(&panel), &mut acc);
        }
        let seconds = start.elapsed().as_secs_f64();
        black_box(&acc);
        best = best.max((2 * TILE_ROWS * PANEL * k * rounds) as f64 / seconds / 1e9);
    }
    best
}

/// Memory read rate of all threads in GB/s, over a buffer far larger than any cache.
pub fn read_gbs(pool: &Pool) -> f64 {
    let words = 32 << 20;
    let buffer: Vec<u64> = (0..words as u64).collect();
    let chunk = 1 << 18;
    let mut best = 0f64;
    for _ in 0..5 {
        let start = Instant::now();
        pool.run(words / chunk, usize::MAX, |i| {
            let mut sums = [0u64; 8];
            for eight in buffer[i * chunk..(i + 1) * chunk].chunks_exact(8) {
                sums.iter_mut().zip(eight).for_each(|(s, v)| *s = s.wrapping_add(*v));
            }
            black_box(sums);
        });
        best = best.max((words * 8) as f64 / start.elapsed().as_secs_f64() / 1e9);
    }
    best
}
