//! Row normalisations, in place: the caller copies the operand to the result first where they differ.

use super::element::Element;
use super::math::exp;
use super::parallel::{Grid, Pool, for_chunks, for_chunks2, for_rectangles};
use super::simd::dispatch;

/// Which normalisation, and what is added to the mean square or variance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// Root mean square.
    Rms(f32),
    /// Mean and variance.
    Layer(f32),
}

/// Sums in 16 interleaved chains, folded in a fixed order: independent of the instruction set's width.
#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = values.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for j in 0..16 {
            lanes[j] += f(chunk[j]);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane += f(*v);
    }
    let mut width = 8;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    lanes[0]
}

dispatch! {
    /// Normalises one f32 row in place.
    pub fn normalize_row(kind: Norm, row: &mut [f32], weight: &[f32], bias: Option<&[f32]>) {
        let n = row.len() as f32;
        let (mean, scale) = match kind {
            Norm::Rms(eps) => (0.0, 1.0 / (sum(row, |v| v * v) / n + eps).sqrt()),
            Norm::Layer(eps) => {
                // Summed as distances from one element: the rounding of a plain sum would turn a row of equal values,
                // whose variance is 0, into noise as large as `1 / sqrt(eps)` times itself.
                let origin = row.first().copied().unwrap_or_default();
                let mean = origin + sum(row, |v| v - origin) / n;
                (mean, 1.0 / (sum(row, |v| (v - mean) * (v - mean)) / n + eps).sqrt())
            }
        };
        match bias {
            None => {
                for (v, w) in row.iter_mut().zip(weight) {
                    *v = (*v - mean) * scale * w;
                }
            }
            Some(bias) => {
                for ((v, w), b) in row.iter_mut().zip(weight).zip(bias) {
                    *v = (*v - mean) * scale * w + b;
                }
            }
        }
    }
}

fn wide<T: Element>(x: &[T]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    T::widen(x, &mut out);
    out
}

/// Normalises every row of `x [rows, n]` in place; `weight`, `bias [n]`.
pub fn norm<T: Element>(pool: &Pool, kind: Norm, x: &mut [T], weight: &[T], bias: Option<&[T]>) {
    let n = weight.len().max(1);
    let (weight, bias) = (wide(weight), bias.map(wide));
    let work = x.len() * 8;
    for_chunks(pool, x, n * 8, work, |_, rows| {
        let mut buffer = vec![0f32; n];
        for row in rows.chunks_exact_mut(n) {
            T::widen(row, &mut buffer);
            normalize_row(pool.isa, kind, &mut buffer, &weight, bias.as_deref());
            T::narrow(&buffer, row);
        }
    });
}

/// `sum += r`, rounded to the element type, and `normed = norm(sum)`; all `[rows, n]`.
pub fn add_norm<T: Element>(
    pool: &Pool,
    kind: Norm,
    sum: &mut [T],
    r: &[T],
    (weight, bias): (&[T], Option<&[T]>),
    normed: &mut [T],
) {
    let n = weight.len().max(1);
    let (weight, bias) = (wide(weight), bias.map(wide));
    let work = sum.len() * 10;
    for_chunks2(pool, (sum, n * 8), (normed, n * 8), work, |index, sums, normed| {
        let mut buffer = vec![0f32; n];
        let rows =
            sums.chunks_exact_mut(n).zip(normed.chunks_exact_mut(n)).zip(r[index * n * 8..].chunks_exact(n));
        for ((sum, normed), r) in rows {
            for ((s, r), b) in sum.iter_mut().zip(r).zip(buffer.iter_mut()) {
                *s = T::from_f32(s.to_f32() + r.to_f32());
                *b = s.to_f32();
            }
            normalize_row(pool.isa, kind, &mut buffer, &weight, bias.as_deref());
            T::narrow(&buffer, normed);
        }
    });
}

/// [`add_norm`] that keeps only the normalised rows, in place of the first addend.
pub fn add_norm_only<T: Element>(
    pool: &Pool,
    kind: Norm,
    x: &mut [T],
    r: &[T],
    (weight, bias): (&[T], Option<&[T]>),
) {
    let n = weight.len().max(1);
    let (weight, bias) = (wide(weight), bias.map(wide));
    let work = x.len() * 10;
    for_chunks(pool, x, n * 8, work, |index, rows| {
        let mut buffer = vec![0f32; n];
        for (row, r) in rows.chunks_exact_mut(n).zip(r[index * n * 8..].chunks_exact(n)) {
            for ((x, r), b) in row.iter().zip(r).zip(buffer.iter_mut()) {
                *b = T::from_f32(x.to_f32() + r.to_f32()).to_f32();
            }
            normalize_row(pool.isa, kind, &mut buffer, &weight, bias.as_deref());
            T::narrow(&buffer, row);
        }
    });
}

/// Softmax of every row of `x [rows, n]` in place.
pub fn softmax<T: Element>(pool: &Pool, x: &mut [T], n: usize) {
    let work = x.len() * 16;
    for_chunks(pool, x, n.max(1), work, |_, row| {
        let mut buffer = wide(row);
        let top = buffer.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        buffer.iter_mut().for_each(|v| *v = exp(*v - top));
        let total = sum(&buffer, |v| v);
        buffer.iter_mut().for_each(|v| *v /= total);
        T::narrow(&buffer, row);
    });
}

dispatch! {
    /// Softmax of every column of `x [n, width]` in place; each sum is one chain in rising order.
    pub fn softmax_columns(x: &mut [f32], width: usize, top: &mut [f32], total: &mut [f32]) {
        top.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        for row in x.chunks_exact(width) {
            for (t, v) in top.iter_mut().zip(row) {
                *t = t.max(*v);
            }
        }
        for row in x.chunks_exact_mut(width) {
            for ((v, t), sum) in row.iter_mut().zip(top.iter()).zip(total.iter_mut()) {
                *v = exp(*v - t);
                *sum += *v;
            }
        }
        for row in x.chunks_exact_mut(width) {
            for (v, sum) in row.iter_mut().zip(total.iter()) {
                *v /= sum;
            }
        }
    }
}

/// Softmax along the middle axis of `x [outer, n, inner]` in place.
pub fn softmax_axis<T: Element>(pool: &Pool, x: &mut [T], n: usize, inner: usize) {
    if x.is_empty() || n == 0 || inner == 0 {
        return;
    }
    // Columns of one task, whose f32 copy stays in cache unless lines are very long.
    let width = (65536 / n).clamp(1, 64).min(inner);
    let work = x.len() * 16;
    let grid = Grid { outer: x.len() / (n * inner), rows: n, width: inner, tall: n, wide: width };
    for_rectangles(pool, x, grid, work, |mut rectangle| {
        let count = rectangle.columns.len();
        let mut columns = vec![0f32; n * count];
        let (mut top, mut total) = (vec![0f32; count], vec![0f32; count]);
        for (j, row) in columns.chunks_exact_mut(count).enumerate() {
            T::widen(rectangle.row(j), row);
        }
        softmax_columns(pool.isa, &mut columns, count, &mut top, &mut total);
        for (j, row) in columns.chunks_exact(count).enumerate() {
            T::narrow(row, rectangle.row(j));
        }
    });
}

/// `x / max(|x|, eps)` for every row of `x [rows, n]` in place.
pub fn l2_normalize<T: Element>(pool: &Pool, x: &mut [T], n: usize, eps: f32) {
    let work = x.len() * 4;
    for_chunks(pool, x, n.max(1), work, |_, row| {
        let mut buffer = wide(row);
        let norm = sum(&buffer, |v| v * v).sqrt().max(eps);
        buffer.iter_mut().for_each(|v| *v /= norm);
        T::narrow(&buffer, row);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;

    fn ramp(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin() * 3.0).collect()
    }

    fn naive(row: &[f32], kind: Norm, weight: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
        let n = row.len() as f64;
        let mean = if matches!(kind, Norm::Layer(_)) {
            row.iter().map(|v| f64::from(*v)).sum::<f64>() / n
        } else {
            0.0
        };
        let (Norm::Rms(eps) | Norm::Layer(eps)) = kind;
        let variance = row.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / n;
        (0..row.len())
            .map(|i| {
                (f64::from(row[i]) - mean) / (variance + f64::from(eps)).sqrt() * f64::from(weight[i])
                    + bias.map_or(0.0, |b| f64::from(b[i]))
            })
            .collect()
    }

    #[test]
    fn norms_meet_the_definition() {
        for isa in Isa::available() {
            let pool = Pool::with_isa(2, isa);
            for (rows, n) in [(1, 1), (3, 17), (21, 64), (9, 100)] {
                let (x, r, w, b) = (ramp(rows * n, 0.7), ramp(rows * n, 1.3), ramp(n, 0.2), ramp(n, 0.5));
                for kind in [Norm::Rms(1e-5), Norm::Layer(1e-5)] {
                    let bias = matches!(kind, Norm::Layer(_)).then_some(&b[..]);
                    let mut found = x.clone();
                    norm(&pool, kind, &mut found, &w, bias);
                    let (mut sums, mut normed) = (x.clone(), vec![0f32; rows * n]);
                    add_norm(&pool, kind, &mut sums, &r, (&w, bias), &mut normed);
                    let mut only = x.clone();
                    add_norm_only(&pool, kind, &mut only, &r, (&w, bias));
                    assert_eq!(only, normed);
                    for i in 0..rows {
                        let row = i * n..(i + 1) * n;
                        for (f, e) in found[row.clone()].iter().zip(naive(&x[row.clone()], kind, &w, bias)) {
                            assert!((f64::from(*f) - e).abs() < 1e-4 * (1.0 + e.abs()), "{kind:?} {f} {e}");
                        }
                        let added: Vec<f32> = row.clone().map(|i| x[i] + r[i]).collect();
                        assert_eq!(added, sums[row.clone()]);
                        for (f, e) in normed[row].iter().zip(naive(&added, kind, &w, bias)) {
                            assert!((f64::from(*f) - e).abs() < 1e-4 * (1.0 + e.abs()), "{kind:?} {f} {e}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn equal_values_are_their_own_mean() {
        for isa in Isa::available() {
            let pool = Pool::with_isa(1, isa);
            for (n, value) in
                [3, 17, 100].into_iter().flat_map(|n| ramp(20, 0.7).into_iter().map(move |v| (n, v)))
            {
                let (mut row, weight, bias) = (vec![value; n], vec![7f32; n], ramp(n, 0.5));
                norm(&pool, Norm::Layer(1e-12), &mut row, &weight, Some(&bias));
                assert_eq!(row, bias, "{value}");
            }
        }
    }

    #[test]
    fn softmax_and_l2_rows() {
        let pool = Pool::new(1);
        let mut x = [1f32, 2.0, 5.0, 3.0, 3.0, 2.0].map(f32::ln);
        softmax(&pool, &mut x, 3);
        let expected = [0.125f32, 0.25, 0.625, 0.375, 0.375, 0.25];
        assert!(x.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{x:?}");
        let mut y = [3f32, 4.0, 0.0, 0.0];
        l2_normalize(&pool, &mut y, 2, 1e-12);
        assert_eq!(y, [0.6, 0.8, 0.0, 0.0]);
    }
}
