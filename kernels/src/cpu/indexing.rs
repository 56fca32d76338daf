//! Means over packed sequences.

use millrace_ir::Result;

use super::element::Element;
use super::paging::spans;

/// Mean of the rows of each packed sequence: `x [t, width]`, `out [b, width]`; zeros for an empty sequence.
///
/// # Errors
/// `run/bad-index` unless `seq_starts` rises from 0 to `t`.
pub fn mean_pool<T: Element>(x: &[T], width: usize, seq_starts: &[i32], out: &mut [T]) -> Result<()> {
    let rows = x.len().checked_div(width).unwrap_or(0);
    for ((start, end), out) in spans(seq_starts, rows)?.into_iter().zip(out.chunks_exact_mut(width.max(1))) {
        let mut sums = vec![0f32; width];
        for row in x[start * width..end * width].chunks_exact(width.max(1)) {
            sums.iter_mut().zip(row).for_each(|(s, v)| *s += v.to_f32());
        }
        let factor = if end > start { 1.0 / (end - start) as f32 } else { 0.0 };
        sums.iter_mut().for_each(|s| *s *= factor);
        T::narrow(&sums, out);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_by_hand() {
        let table = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        let mut means = [9f32; 6];
        mean_pool(&table, 2, &[0, 1, 1, 3], &mut means).unwrap();
        assert_eq!(means, [1.0, 2.0, 0.0, 0.0, 4.0, 5.0]);
        assert!(mean_pool(&table, 2, &[0, 4], &mut means).is_err());
    }
}
