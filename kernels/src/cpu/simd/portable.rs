//! The matmul tile as plain loops, also compiled for AVX2 with FMA.

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
        let row = &a[r * stride..r * stride + k];
        let acc = &mut acc[r * PANEL..(r + 1) * PANEL];
        let mut sums = [0f32; PANEL];
        sums.copy_from_slice(acc);
        for (x, b) in row.iter().zip(panel.chunks_exact(PANEL)) {
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
    body::<T, true>(a, stride, rows, k, panel, acc);
}
