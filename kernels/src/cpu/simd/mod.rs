//! Instruction sets and the matmul tile.
//!
//! The tile has one definition per instruction set; everything else is plain loops compiled several times by
//! the `dispatch` macro.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::element::Element;

/// Columns of a packed panel.
pub const PANEL: usize = 32;

/// Most rows of one tile.
pub const TILE_ROWS: usize = 14;

/// Instruction sets, worse ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the compiler's baseline has.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
}

impl Isa {
    /// The best this machine has.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq");
            if avx2 && avx512 {
                return Isa::Avx512;
            }
            if avx2 {
                return Isa::Avx2;
            }
        }
        Isa::Portable
    }

    /// All sets up to the best of this machine.
    pub fn available() -> Vec<Isa> {
        [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|i| *i <= Isa::detect()).collect()
    }
}

/// Adds the transpose of `a [k, rows]` (stride `stride`) times `panel [k, 32]` to `acc [rows, 32]`, each element one
/// chain over `k`; `rows` is at most [`TILE_ROWS`].
pub fn tile<T: Element>(
    isa: Isa,
    a: &[f32],
    stride: usize,
    rows: usize,
    k: usize,
    panel: &[T],
    acc: &mut [f32],
) {
    tile_ahead(isa, a, stride, rows, k, panel, &[], acc);
}

/// [`tile`], which brings `ahead`, what a later tile reads, into the second-level cache on the way where the
/// instruction set has the means.
#[allow(clippy::too_many_arguments)]
pub fn tile_ahead<T: Element>(
    isa: Isa,
    a: &[f32],
    stride: usize,
    rows: usize,
    k: usize,
    panel: &[T],
    ahead: &[T],
    acc: &mut [f32],
) {
    assert!(rows <= TILE_ROWS && acc.len() >= rows * PANEL && panel.len() >= k * PANEL);
    assert!(k == 0 || a.len() >= (k - 1) * stride + rows);
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the set was detected, and the sizes were just checked.
        Isa::Avx512 => unsafe { avx512::tile(a, stride, rows, k, panel, ahead, acc) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the set was detected.
        Isa::Avx2 => unsafe { portable::tile_avx2(a, stride, rows, k, panel, acc) },
        _ => portable::tile(a, stride, rows, k, panel, acc),
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ahead;
}

/// The `i`-th of `count` nearly equal parts of `0..n`.
pub fn part(n: usize, count: usize, i: usize) -> std::ops::Range<usize> {
    i * n / count..(i + 1) * n / count
}

/// Numbers of a buffer for [`pack_rows`]: the result and what a vector store may write beyond it.
pub const fn packed_rows_len(rows: usize, k: usize) -> usize {
    rows * k + 16
}

/// Packs `a [rows, k]` (row stride `stride`) for [`tile`]: the rows in as few and as equal tiles as possible, each
/// `[k, rows of the tile]`. `out` has [`packed_rows_len`] numbers.
pub fn pack_rows<T: Element>(isa: Isa, a: &[T], stride: usize, rows: usize, k: usize, out: &mut [f32]) {
    assert!(out.len() >= packed_rows_len(rows, k) && (rows == 0 || a.len() >= (rows - 1) * stride + k));
    let tiles = rows.div_ceil(TILE_ROWS);
    for index in 0..tiles {
        let tile = part(rows, tiles, index);
        let (a, out) = (&a[tile.start * stride..], &mut out[tile.start * k..]);
        let count = tile.len();
        #[allow(unused_mut)]
        let mut done = 0;
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Avx512 {
            // SAFETY: the set was detected; the rows are inside `a` by the assertion, and `out` has room for the
            // tile and the overrun, which is either packed later or beyond the last row.
            unsafe { avx512::interleave(a.as_ptr(), stride, count, k / 16, out.as_mut_ptr()) };
            done = k / 16 * 16;
        }
        let _ = isa;
        for r in 0..count {
            for i in done..k {
                out[i * count + r] = a[r * stride + i].to_f32();
            }
        }
    }
}

/// Defines `pub fn name(isa, args)` whose plain-loop body is compiled for each instruction set.
macro_rules! dispatch {
    ($(#[$doc:meta])* pub fn $name:ident $(<$($t:ident : $bound:path),*>)? ($($arg:ident : $ty:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub fn $name $(<$($t: $bound),*>)? (isa: $crate::cpu::simd::Isa, $($arg: $ty),*) {
            #[inline(always)]
            fn body $(<$($t: $bound),*>)? ($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
                fn avx512 $(<$($t: $bound),*>)? ($($arg: $ty),*) { body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2 $(<$($t: $bound),*>)? ($($arg: $ty),*) { body($($arg),*) }
                match isa {
                    // SAFETY: a pool only holds instruction sets that this machine was found to have.
                    #[allow(unsafe_code)]
                    $crate::cpu::simd::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    $crate::cpu::simd::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::simd::Isa::Portable => {}
                }
            }
            let _ = isa;
            body($($arg),*)
        }
    };
}
pub(crate) use dispatch;
