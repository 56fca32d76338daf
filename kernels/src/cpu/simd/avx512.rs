//! The matmul tile with 512-bit vectors, up to 14 rows of 32 columns in 28 accumulators, and the packing of its rows.

use std::arch::x86_64::*;

use super::{PANEL, TILE_ROWS};
use crate::cpu::element::{Element, Widen};

/// Bytes between a panel row and the one that is prefetched with it.
const AHEAD: usize = 4096;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Loads 16 elements as f32.
///
/// # Safety
/// AVX-512 F is there and 16 elements are readable at `at`.
#[inline(always)]
unsafe fn load<T: Element>(at: *const T) -> __m512 {
    // SAFETY: the caller vouches for the pointer and the instruction set; loads are unaligned.
    unsafe {
        match T::WIDEN {
            Widen::F32 => _mm512_loadu_ps(at.cast()),
            Widen::Bf16 => {
                let half = _mm256_loadu_si256(at.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            }
            Widen::F16 => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
        }
    }
}

/// One step of a tile: row `i` of the panel times row `i` of `a`.
///
/// # Safety
/// As [`rows`], with `x` at row `i` of `a` and `panel` at row `i` of the panel.
#[inline(always)]
unsafe fn step<T: Element, const R: usize>(sums: &mut [[__m512; 2]; R], x: *const f32, panel: *const T) {
    // SAFETY: as the caller vouches.
    unsafe {
        let b = [load(panel), load(panel.add(16))];
        for (r, sum) in sums.iter_mut().enumerate() {
            let x = _mm512_set1_ps(*x.add(r));
            sum[0] = _mm512_fmadd_ps(x, b[0], sum[0]);
            sum[1] = _mm512_fmadd_ps(x, b[1], sum[1]);
        }
    }
}

/// # Safety
/// AVX-512 F is there; sizes as [`super::tile`] checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn rows<T: Element, const R: usize>(
    a: *const f32,
    stride: usize,
    k: usize,
    panel: *const T,
    ahead: &[T],
    acc: *mut f32,
) {
    // SAFETY: the caller checked that `a` holds k times R numbers at `stride`, `panel` k rows and `acc` R rows of 32.
    // Prefetches never fault.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for (r, sum) in sums.iter_mut().enumerate() {
            *sum = [_mm512_loadu_ps(acc.add(r * PANEL)), _mm512_loadu_ps(acc.add(r * PANEL + 16))];
        }
        let mut i = 0;
        // Requests are spread evenly over the steps, so that they wait for memory beside the multiply-adds.
        let lines = size_of_val(ahead).div_ceil(LINE);
        if lines > 0 && k > 0 {
            let (steps, at_once) = if lines < k { (k / lines, 1) } else { (1, lines.div_ceil(k)) };
            let mut next = ahead.as_ptr().cast::<i8>();
            for _ in 0..lines.div_ceil(at_once) {
                for _ in 0..at_once {
                    _mm_prefetch::<_MM_HINT_T1>(next);
                    next = next.wrapping_add(LINE);
                }
                for _ in 0..steps {
                    step::<T, R>(&mut sums, a.add(i * stride), panel.add(i * PANEL));
                    i += 1;
                }
            }
        }
        while i < k {
            if R <= 8 {
                // Few rows wait for memory: the rows of the panel that follow are asked for early.
                let near = panel.wrapping_add(i * PANEL).cast::<i8>().wrapping_add(AHEAD);
                _mm_prefetch::<_MM_HINT_T0>(near);
                if size_of::<T>() == 4 {
                    _mm_prefetch::<_MM_HINT_T0>(near.wrapping_add(LINE));
                }
            }
            step::<T, R>(&mut sums, a.add(i * stride), panel.add(i * PANEL));
            i += 1;
        }
        for (r, sum) in sums.iter().enumerate() {
            _mm512_storeu_ps(acc.add(r * PANEL), sum[0]);
            _mm512_storeu_ps(acc.add(r * PANEL + 16), sum[1]);
        }
    }
}

/// # Safety
/// AVX-512 is there; sizes as [`super::tile`] checks them.
pub(super) unsafe fn tile<T: Element>(
    a: &[f32],
    stride: usize,
    count: usize,
    k: usize,
    panel: &[T],
    ahead: &[T],
    acc: &mut [f32],
) {
    let (a, panel, acc) = (a.as_ptr(), panel.as_ptr(), acc.as_mut_ptr());
    const { assert!(TILE_ROWS == 14) };
    // SAFETY: as the caller vouches.
    unsafe {
        match count {
            1 => rows::<T, 1>(a, stride, k, panel, ahead, acc),
            2 => rows::<T, 2>(a, stride, k, panel, ahead, acc),
            3 => rows::<T, 3>(a, stride, k, panel, ahead, acc),
            4 => rows::<T, 4>(a, stride, k, panel, ahead, acc),
            5 => rows::<T, 5>(a, stride, k, panel, ahead, acc),
            6 => rows::<T, 6>(a, stride, k, panel, ahead, acc),
            7 => rows::<T, 7>(a, stride, k, panel, ahead, acc),
            8 => rows::<T, 8>(a, stride, k, panel, ahead, acc),
            9 => rows::<T, 9>(a, stride, k, panel, ahead, acc),
            10 => rows::<T, 10>(a, stride, k, panel, ahead, acc),
            11 => rows::<T, 11>(a, stride, k, panel, ahead, acc),
            12 => rows::<T, 12>(a, stride, k, panel, ahead, acc),
            13 => rows::<T, 13>(a, stride, k, panel, ahead, acc),
            14 => rows::<T, 14>(a, stride, k, panel, ahead, acc),
            _ => {}
        }
    }
}

/// Transposes `whole` blocks of 16 columns of `count` rows: `out[i * count + r] = a[r * stride + i]`. Each store writes
/// 16 numbers, so up to `16 - count` beyond the result.
///
/// # Safety
/// AVX-512 is there; `1 <= count <= 16`; `a` holds the rows and `out` the result and the overrun.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn interleave<T: Element>(
    a: *const T,
    stride: usize,
    count: usize,
    whole: usize,
    out: *mut f32,
) {
    // SAFETY: as the caller vouches.
    unsafe {
        for block in 0..whole {
            let mut v = [_mm512_setzero_ps(); 16];
            for (r, v) in v.iter_mut().take(count).enumerate() {
                *v = load(a.add(r * stride + block * 16));
            }
            let mut t = v;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
            }
            // Pairs of rows to groups of four.
            for i in 0..4 {
                let [a, b, c, d] =
                    [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]].map(|x| _mm512_castps_pd(x));
                v[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                v[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                v[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                v[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            // Lane l of v[4 g + j] holds column 4 l + j of rows 4 g .. 4 g + 4.
            for j in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x88>(v[j], v[4 + j]);
                let high = _mm512_shuffle_f32x4::<0xdd>(v[j], v[4 + j]);
                let low2 = _mm512_shuffle_f32x4::<0x88>(v[8 + j], v[12 + j]);
                let high2 = _mm512_shuffle_f32x4::<0xdd>(v[8 + j], v[12 + j]);
                t[j] = _mm512_shuffle_f32x4::<0x88>(low, low2);
                t[8 + j] = _mm512_shuffle_f32x4::<0xdd>(low, low2);
                t[4 + j] = _mm512_shuffle_f32x4::<0x88>(high, high2);
                t[12 + j] = _mm512_shuffle_f32x4::<0xdd>(high, high2);
            }
            for (i, t) in t.iter().enumerate() {
                _mm512_storeu_ps(out.add((block * 16 + i) * count), *t);
            }
        }
    }
}
