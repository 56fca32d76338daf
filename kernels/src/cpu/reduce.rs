//! Reductions over any axes, in f32.
//!
//! A result element is combined from partial values of at most `UNIT` elements (or one longer row's worth), in rising
//! order. Where units begin depends on the reduced extents alone, so neither threads nor neighbours change a bit.

use millrace_ir::Result;
use millrace_ir::ops::reduce::ReduceFn;

use super::element::Element;
use super::parallel::{Grid, Pool, for_chunks, for_rectangles};
use super::simd::dispatch;
use super::view::{View, dense_strides, elements, misfit};

/// Elements of one partial value.
const UNIT: usize = 4096;

/// Rows of one partial row, where the last axis stays.
const UNIT_ROWS: usize = 256;

/// Columns of one task, where the last axis stays.
const TILE: usize = 4096;

/// Elements worth a task.
const TASK: usize = 1 << 15;

fn neutral(f: ReduceFn) -> f32 {
    match f {
        ReduceFn::Sum | ReduceFn::Mean => 0.0,
        ReduceFn::Max => f32::NEG_INFINITY,
        ReduceFn::Min => f32::INFINITY,
    }
}

fn combine(f: ReduceFn, a: f32, b: f32) -> f32 {
    match f {
        ReduceFn::Sum | ReduceFn::Mean => a + b,
        ReduceFn::Max => a.max(b),
        ReduceFn::Min => a.min(b),
    }
}

dispatch! {
    /// Combines a row into `into`, in 16 interleaved chains folded in a fixed order.
    pub fn fold_row(f: ReduceFn, row: &[f32], into: &mut f32) {
        macro_rules! fold { ($g:expr) => {{
            let mut lanes = [neutral(f); 16];
            let (chunks, rest) = row.as_chunks::<16>();
            for chunk in chunks {
                for (lane, v) in lanes.iter_mut().zip(chunk) {
                    *lane = $g(*lane, *v);
                }
            }
            for (lane, v) in lanes.iter_mut().zip(rest) { *lane = $g(*lane, *v); }
            let mut width = 8;
            while width > 0 {
                for j in 0..width {
                    lanes[j] = $g(lanes[j], lanes[j + width]);
                }
                width /= 2;
            }
            *into = $g(*into, lanes[0]);
        }} }
        match f {
            ReduceFn::Sum | ReduceFn::Mean => fold!(|a: f32, b: f32| a + b),
            ReduceFn::Max => fold!(f32::max),
            ReduceFn::Min => fold!(f32::min),
        }
    }
}

dispatch! {
    /// Combines each element of a row into its own column.
    pub fn fold_columns(f: ReduceFn, row: &[f32], into: &mut [f32]) {
        macro_rules! fold { ($g:expr) => { for (a, v) in into.iter_mut().zip(row) { *a = $g(*a, *v); } } }
        match f {
            ReduceFn::Sum | ReduceFn::Mean => fold!(|a: f32, b: f32| a + b),
            ReduceFn::Max => fold!(f32::max),
            ReduceFn::Min => fold!(f32::min),
        }
    }
}

/// The elements as f32, through `buffer` where they are narrower.
fn wide<'a, T: Element>(x: &'a [T], buffer: &'a mut [f32]) -> &'a [f32] {
    match T::as_f32(x) {
        Some(x) => x,
        None => {
            let buffer = &mut buffer[..x.len()];
            T::widen(x, buffer);
            buffer
        }
    }
}

/// Room for [`wide`].
fn buffer<T: Element>(n: usize) -> Vec<f32> {
    vec![0f32; if T::as_f32(&[]).is_some() { 0 } else { n }]
}

/// Combines `x [shape]` along `axes` (rising) into `out`, row-major over the other axes.
///
/// # Errors
/// `run/no-kernel` for sizes that do not fit.
pub fn reduce<T: Element>(
    pool: &Pool,
    f: ReduceFn,
    x: &[T],
    shape: &[usize],
    axes: &[usize],
    out: &mut [T],
) -> Result<()> {
    let axis_is = |reduced: bool| move |axis: &usize| axes.contains(axis) == reduced;
    let pick = |of: &[usize], reduced: bool| -> Vec<usize> {
        (0..shape.len()).filter(axis_is(reduced)).map(|axis| of[axis]).collect()
    };
    if elements(shape)? != x.len() || elements(&pick(shape, false))? != out.len() {
        return Err(misfit("an operand or result"));
    }
    let divisor = match f {
        ReduceFn::Mean => pick(shape, true).iter().map(|n| *n as f64).product::<f64>() as f32,
        _ => 1.0,
    };
    if out.is_empty() || x.is_empty() {
        out.fill(T::from_f32(neutral(f) / divisor));
        return Ok(());
    }
    let strides = dense_strides(shape);
    let kept = View::new(&pick(shape, false), &pick(&strides, false));
    let reduced = View::new(&pick(shape, true), &pick(&strides, true));
    let inner_stays = kept.strides.last() == Some(&1);
    let job = Job { f, divisor, x, kept, reduced };
    if inner_stays {
        job.columns(pool, out)
    } else {
        job.rows(pool, out)
    }
    Ok(())
}

struct Job<'a, T> {
    f: ReduceFn,
    divisor: f32,
    x: &'a [T],
    kept: View,
    reduced: View,
}

impl<T: Element> Job<'_, T> {
    /// Work of a pool's run.
    fn work(&self) -> usize {
        self.x.len()
    }

    /// The last axis, of stride 1, is combined.
    fn rows(&self, pool: &Pool, out: &mut [T]) {
        let n = self.reduced.extents.last().copied().unwrap_or(1);
        let rows = self.reduced.len() / n;
        // A unit is a piece of a long row, or several short rows.
        let (pieces, rows_per_unit) = (n.div_ceil(UNIT), (UNIT / n).max(1));
        let units = pieces * rows.div_ceil(rows_per_unit);
        let outer = View {
            extents: self.reduced.extents[..self.reduced.extents.len().saturating_sub(1)].to_vec(),
            strides: self.reduced.strides[..self.reduced.strides.len().saturating_sub(1)].to_vec(),
        };
        let mut partial = vec![neutral(self.f); out.len() * units];
        let per_task = (TASK / (self.reduced.len() / units).max(1)).max(1);
        for_chunks(pool, &mut partial, per_task, self.work(), |index, partial| {
            let mut buffer = buffer::<T>(UNIT);
            for (i, value) in partial.iter_mut().enumerate() {
                let at = index * per_task + i;
                let base = self.kept.cursor(at / units).offset();
                let (group, piece) = (at % units / pieces, at % units % pieces);
                let (from, to) = (piece * UNIT, n.min((piece + 1) * UNIT));
                let first = group * rows_per_unit;
                let mut cursor = outer.cursor(first);
                for row in first..rows.min(first + rows_per_unit) {
                    if row > first {
                        cursor.step(outer.extents.len() - 1, 1);
                    }
                    let start = base + cursor.offset();
                    fold_row(pool.isa, self.f, wide(&self.x[start + from..start + to], &mut buffer), value);
                }
            }
        });
        for_chunks(pool, out, TASK, partial.len(), |index, out| {
            for (value, partial) in out.iter_mut().zip(partial[index * TASK * units..].chunks_exact(units)) {
                let total = partial.iter().fold(neutral(self.f), |a, b| combine(self.f, a, *b));
                *value = T::from_f32(total / self.divisor);
            }
        });
    }

    /// The last axis, of stride 1, stays.
    fn columns(&self, pool: &Pool, out: &mut [T]) {
        let n = self.kept.extents.last().copied().unwrap_or(1);
        let rows = self.reduced.len();
        let units = rows.div_ceil(UNIT_ROWS);
        let mut partial = vec![neutral(self.f); out.len() * units];
        let grid = Grid { outer: out.len() / n, rows: units, width: n, tall: 1, wide: TILE };
        for_rectangles(pool, &mut partial, grid, self.work(), |mut rectangle| {
            let columns = rectangle.columns.clone();
            let base = self.kept.cursor(rectangle.outer * n).offset() + columns.start;
            let mut buffer = buffer::<T>(columns.len());
            let first = rectangle.rows.start * UNIT_ROWS;
            let into = rectangle.row(0);
            let mut cursor = self.reduced.cursor(first);
            for row in first..rows.min(first + UNIT_ROWS) {
                if row > first {
                    cursor.step(self.reduced.extents.len() - 1, 1);
                }
                let start = base + cursor.offset();
                let row = wide(&self.x[start..start + columns.len()], &mut buffer);
                fold_columns(pool.isa, self.f, row, into);
            }
        });
        for_chunks(pool, out, n, partial.len(), |index, out| {
            let partial = &mut partial[index * units * n..(index + 1) * units * n].to_vec();
            let (total, rest) = partial.split_at_mut(n);
            rest.chunks_exact(n).for_each(|row| fold_columns(pool.isa, self.f, row, total));
            total.iter_mut().for_each(|v| *v /= self.divisor);
            T::narrow(total, out);
        });
    }
}
