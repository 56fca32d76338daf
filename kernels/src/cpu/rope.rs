//! Rotary position embedding in place: one table of sines and cosines per token, shared by its heads.

use super::element::Element;
use super::parallel::{Pool, for_chunks};

/// Which elements of a head form a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// `(i, i + n)` with n frequencies.
    Half,
    /// `(2i, 2i + 1)`
    Interleaved,
}

/// Rotates `x [t, heads, d]` in place by `positions[t] * frequencies[i]` radians; elements beyond twice the number of
/// frequencies stay.
pub fn rope<T: Element>(
    pool: &Pool,
    x: &mut [T],
    positions: &[i32],
    (heads, d): (usize, usize),
    frequencies: &[f32],
    pairs: Pairs,
) {
    let n = frequencies.len();
    let work = x.len() * 4;
    for_chunks(pool, x, heads * d, work, |token, x| {
        let table: Vec<(f32, f32)> =
            frequencies.iter().map(|f| (positions[token] as f32 * f).sin_cos()).collect();
        for head in x.chunks_exact_mut(d) {
            for (i, (sin, cos)) in table.iter().enumerate() {
                let (a, b) = if pairs == Pairs::Half { (i, i + n) } else { (2 * i, 2 * i + 1) };
                let (p, q) = (head[a].to_f32(), head[b].to_f32());
                head[a] = T::from_f32(p * cos - q * sin);
                head[b] = T::from_f32(q * cos + p * sin);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_pairs_by_their_angle() {
        for pairs in [Pairs::Half, Pairs::Interleaved] {
            let x: Vec<f32> = (0..2 * 3 * 6).map(|i| i as f32 * 0.3 - 2.0).collect();
            let mut y = x.clone();
            rope(&Pool::new(1), &mut y, &[0, 5], (3, 6), &[0.5, 0.25], pairs);
            assert_eq!(y[..18], x[..18], "position 0 stays");
            for head in 0..3 {
                let at = 18 + head * 6;
                for (i, f) in [0.5f64, 0.25].into_iter().enumerate() {
                    let (a, b) = if pairs == Pairs::Half {
                        (at + i, at + i + 2)
                    } else {
                        (at + 2 * i, at + 2 * i + 1)
                    };
                    let (p, q) = (f64::from(x[a]), f64::from(x[b]));
                    let turned = (p.hypot(q), (q.atan2(p) + 5.0 * f));
                    assert!((f64::from(y[a]) - turned.0 * turned.1.cos()).abs() < 1e-5);
                    assert!((f64::from(y[b]) - turned.0 * turned.1.sin()).abs() < 1e-5);
                }
                assert_eq!(y[at + 4..at + 6], x[at + 4..at + 6]);
            }
        }
    }
}
