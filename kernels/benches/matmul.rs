//! Matmul rates against this machine's ceilings: `cargo bench -p millrace-kernels`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use half::bf16;
use millrace_kernels::cpu::element::Element;
use millrace_kernels::cpu::matmul::{Matmul, pack_matrix};
use millrace_kernels::cpu::{Pool, ceilings};

/// Seconds of the fastest and the median of `runs`.
fn time(runs: usize, mut work: impl FnMut()) -> (f64, f64) {
    work();
    let mut seconds: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    (seconds[0], seconds[runs / 2])
}

fn values<T: Element>(n: usize) -> Vec<T> {
    (0..n).map(|i| T::from_f32(((i * 37 % 101) as f32 - 50.0) / 100.0)).collect()
}

/// Times a product; `cold` weights were last read 256 MiB of other weights ago, as in a model's step.
fn measure<T: Element>(
    pool: &Pool,
    name: &str,
    (m, n, k): (usize, usize, usize),
    cold: bool,
    peak: f64,
    read: f64,
) {
    let a = values::<T>(m * k);
    let one = pack_matrix(&values::<T>(n * k), &[n], k);
    let copies = if cold { (256 << 20) / (one.len() * size_of::<T>()) + 1 } else { 1 };
    let weights = one.repeat(copies);
    let mut out = vec![T::default(); m * n];
    let runs = (2_000_000_000 / (2 * m * n * k).max(1)).clamp(5, 50).max(copies);
    let mut turns = weights.chunks_exact(one.len()).cycle();
    let (best, median) = time(runs, || {
        if let Some(b) = turns.next() {
            Matmul { m, k, a: &a, b, segments: &[n], epilogue: &[] }.run(pool, &mut [&mut out]);
        }
    });
    let flops = (2 * m * n * k) as f64;
    let bytes = (n * k * size_of::<T>()) as f64;
    let threads = pool.threads();
    println!(
        "{name:<5} {threads} thread(s) {m:>5} x {n:>5} x {k:>5}{}: {:>7.1} GFLOP/s best, {:>7.1} median ({:>3.0} % of peak), {:>6.1} GB/s of weights ({:>3.0} % of read rate)",
        if cold { " cold" } else { "     " },
        flops / best / 1e9,
        flops / median / 1e9,
        flops / median / 1e9 / (peak * threads as f64) * 100.0,
        bytes / median / 1e9,
        bytes / median / 1e9 / read * 100.0,
    );
}

fn main() {
    for threads in [1, std::thread::available_parallelism().map_or(1, usize::from)] {
        let pool = Pool::new(threads);
        let (peak, read) = (ceilings::fma_gflops(&Pool::new(1)), ceilings::read_gbs(&pool));
        println!("{:?}: {peak:.0} GFLOP/s a thread, {read:.1} GB/s read with {threads} thread(s)", pool.isa);
        for shape in [(1024, 1024, 1024), (128, 768, 768), (16, 384, 1536), (1, 8192, 8192), (8, 8192, 8192)]
        {
            measure::<f32>(&pool, "f32", shape, false, peak, read);
        }
        for shape in [(128, 768, 768), (128, 2304, 768), (128, 3072, 768), (128, 768, 3072), (16, 384, 1536)]
        {
            measure::<f32>(&pool, "f32", shape, true, peak, read);
        }
        for shape in [(128, 768, 768), (1, 8192, 8192), (8, 8192, 8192)] {
            measure::<bf16>(&pool, "bf16", shape, false, peak, read);
        }
    }
}
