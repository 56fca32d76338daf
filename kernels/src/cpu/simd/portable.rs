//! The matmul tile as plain loops, also compiled for AVX2 with FMA, where three rows share each load of the panel.

use super::PANEL;
use crate::cpu::element::Element;

#[inline(always)]
fn body<T: Element, const FMA: bool>(
    a: &[f32],
    stride: usize,
    rows: usize,
    k: usize,
    panel: &[T],
    acc: &mut [f32],
) {
    for r in 0..rows {
        let acc = &mut acc[r * PANEL..(r + 1) * PANEL];
        let mut sums = [0f32; PANEL];
        sums.copy_from_slice(acc);
        for (i, b) in panel.chunks_exact(PANEL).take(k).enumerate() {
            let x = a[i * stride + r];
            for j in 0..PANEL {
                let b = b[j].to_f32();
                sums[j] = if FMA { x.mul_add(b, sums[j]) } else { x * b + sums[j] };
            }
        }
        acc.copy_from_slice(&sums);
    }
}

pub(super) fn tile<T: Element>(
    a: &[f32],
    stride: usize,
    rows: usize,
    k: usize,
    panel: &[T],
    acc: &mut [f32],
) {
    body::<T, false>(a, stride, rows, k, panel, acc);
}

/// Six rows of one half panel at a time: twelve accumulators of eight lanes.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn half<T: Element, const R: usize>(
    a: &[f32],
    stride: usize,
    first: usize,
    column: usize,
    k: usize,
    panel: &[T],
    acc: &mut [f32],
) {
    let mut sums = [[0f32; 16]; R];
    for (r, sum) in sums.iter_mut().enumerate() {
        sum.copy_from_slice(&acc[(first + r) * PANEL + column..][..16]);
    }
    for (i, b) in panel.chunks_exact(PANEL).take(k).enumerate() {
        let mut wide = [0f32; 16];
        for (w, b) in wide.iter_mut().zip(&b[column..column + 16]) {
            *w = b.to_f32();
        }
        let x = &a[i * stride + first..i * stride + first + R];
        for (sum, x) in sums.iter_mut().zip(x) {
            for j in 0..16 {
                sum[j] = x.mul_add(wide[j], sum[j]);
            }
        }
    }
    for (r, sum) in sums.iter().enumerate() {
        acc[(first + r) * PANEL + column..][..16].copy_from_slice(sum);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tile_avx2<T: Element>(
    a: &[f32],
    stride: usize,
    rows: usize,
    k: usize,
    panel: &[T],
    acc: &mut [f32],
) {
    let mut first = 0;
    while rows - first >= 6 {
        half::<T, 6>(a, stride, first, 0, k, panel, acc);
        half::<T, 6>(a, stride, first, 16, k, panel, acc);
        first += 6;
    }
    while rows - first >= 2 {
        half::<T, 2>(a, stride, first, 0, k, panel, acc);
        half::<T, 2>(a, stride, first, 16, k, panel, acc);
        first += 2;
    }
    if first < rows {
        half::<T, 1>(a, stride, first, 0, k, panel, acc);
        half::<T, 1>(a, stride, first, 16, k, panel, acc);
    }
}
