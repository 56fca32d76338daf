//! Movement and reductions against a copy of the same bytes, convolution against the packed matmul:
//! `cargo bench -p millrace-kernels --bench movement`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use millrace_ir::ops::reduce::ReduceFn;
use millrace_kernels::cpu::conv::Conv2d;
use millrace_kernels::cpu::matmul::{Matmul, pack_matrix};
use millrace_kernels::cpu::parallel::for_chunks;
use millrace_kernels::cpu::reduce::reduce;
use millrace_kernels::cpu::{Pool, movement};

/// Median seconds of `runs`.
fn time(runs: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[runs / 2]
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 100.0).collect()
}

fn report(name: &str, bytes: usize, seconds: f64, copy: f64) {
    let rate = bytes as f64 / seconds / 1e9;
    println!("  {name:<44} {rate:>6.1} GB/s ({:>3.0} % of a copy)", copy / seconds * 100.0);
}

fn moves(pool: &Pool, size: usize) {
    let x = vec![1u8; size];
    let mut out = vec![0u8; size];
    let copy = time(15, || {
        for_chunks(pool, &mut out, 128 << 10, size, |i, out| {
            out.copy_from_slice(&x[i * (128 << 10)..][..out.len()]);
        });
    });
    let bytes = 2 * size;
    println!("{} MiB, {} thread(s); bytes read and written", size >> 20, pool.threads());
    report("memcpy", bytes, copy, copy);
    // No power of two: neighbouring rows would share cache sets.
    let side = (size / 4).isqrt() - 20;
    let mut transpose = |name: &str, element: usize, shape: &[usize], perm: &[usize]| {
        let n = shape.iter().product::<usize>() * element;
        let seconds = time(15, || {
            movement::transpose(pool, element, &x[..n], shape, perm, &mut out[..n]).unwrap();
        });
        report(name, bytes * n / size, seconds, copy * n as f64 / size as f64);
    };
    transpose("transpose f32 [n, n]", 4, &[side, side], &[1, 0]);
    transpose("transpose bf16 [n, 2n]", 2, &[side, 2 * side], &[1, 0]);
    transpose("transpose heads f32 [t, 16, 64] to [16, t, 64]", 4, &[size / 4096, 16, 64], &[1, 0, 2]);
    transpose("transpose NCHW to NHWC f32 [4, 64, n]", 4, &[4, 64, size / 1024], &[0, 2, 1]);
    let half = size / 2;
    let rows = half / 4096;
    let seconds = time(15, || {
        movement::concat(pool, rows, &[(&x[..half], 4096), (&x[half..], 4096)], &mut out).unwrap();
    });
    report("concat of two [n, 1024] f32 along the last axis", bytes, seconds, copy);
    for (name, shape, axes) in [
        ("reduce f32 [n, 1024] along the last axis", vec![size / 4096, 1024], vec![1]),
        ("reduce f32 [n, 1024] along the first axis", vec![size / 4096, 1024], vec![0]),
        ("reduce f32 [n, 32, 32] along the middle", vec![size / 4096, 32, 32], vec![1]),
    ] {
        let x = values(size / 4);
        let kept: usize = (0..shape.len()).filter(|a| !axes.contains(a)).map(|a| shape[a]).product();
        let mut out = vec![0f32; kept];
        let seconds = time(15, || {
            reduce(pool, ReduceFn::Sum, &x, &shape, &axes, &mut out).unwrap();
        });
        report(name, size, seconds, copy);
    }
}

fn convolution(pool: &Pool, name: &str, conv: Conv2d) {
    let [n, c, h, w] = conv.x;
    let [o, own, kh, kw] = conv.weight;
    let [oh, ow] = conv.out;
    let (x, weight) = (values(n * c * h * w), values(o * own * kh * kw));
    let mut out = vec![0f32; n * o * oh * ow];
    let seconds = time(9, || conv.run(pool, &x, &weight, None, &mut out).unwrap());
    let k = own * kh * kw;
    let flops = 2.0 * (n * oh * ow * o * k) as f64;
    // The same arithmetic as one product of a dense operand and a packed one.
    let (m, columns) = (n * oh * ow, o / conv.groups);
    let (a, b) = (values(m * k), pack_matrix(&values(columns * k), &[columns], k));
    let mut product = vec![0f32; m * columns];
    let matmul = time(9, || {
        Matmul { m, k, a: &a, b: &b, segments: &[columns], epilogue: &[] }.run(pool, &mut [&mut product]);
    }) * conv.groups as f64;
    println!(
        "  conv2d {name:<34} {:>7.1} GFLOP/s ({:>3.0} % of the packed matmul, {:.1})",
        flops / seconds / 1e9,
        matmul / seconds * 100.0,
        flops / matmul / 1e9
    );
}

fn main() {
    for threads in [1, std::thread::available_parallelism().map_or(1, usize::from)] {
        let pool = Pool::new(threads);
        moves(&pool, 1 << 20);
        moves(&pool, 64 << 20);
        let plain = Conv2d {
            x: [1, 64, 56, 56],
            weight: [64, 64, 3, 3],
            out: [56, 56],
            stride: [1, 1],
            pad: [1, 1],
            dilation: [1, 1],
            groups: 1,
        };
        convolution(&pool, "3x3, 64 to 64, 56 x 56", plain);
        let deep = Conv2d { x: [1, 256, 14, 14], weight: [256, 256, 3, 3], out: [14, 14], ..plain };
        convolution(&pool, "3x3, 256 to 256, 14 x 14", deep);
        let point = Conv2d { weight: [256, 64, 1, 1], pad: [0, 0], ..plain };
        convolution(&pool, "1x1, 64 to 256, 56 x 56", point);
        let stem = Conv2d {
            x: [1, 3, 224, 224],
            weight: [64, 3, 7, 7],
            out: [112, 112],
            stride: [2, 2],
            pad: [3, 3],
            ..plain
        };
        convolution(&pool, "7x7 stride 2, 3 to 64, 112 x 112", stem);
        let depth = Conv2d { weight: [64, 1, 3, 3], groups: 64, ..plain };
        convolution(&pool, "3x3 depthwise, 64, 56 x 56", depth);
    }
}
