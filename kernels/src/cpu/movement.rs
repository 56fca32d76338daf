//! Moving elements without looking at them, on bytes: strided copies (transpose, broadcast, slice), concat, gather,
//! scatter, select, iota. Elements have 1, 2, 4 or 8 bytes.

use std::ops::Range;

use millrace_ir::{DType, Error, Kind, Result};

use super::parallel::{Grid, Pool, for_chunks, for_rectangles};
use super::view::{View, dense_strides, elements, misfit};

/// Bytes of one task.
const TASK: usize = 128 << 10;

/// Runs `$call` with `$n` standing for an element size in bytes.
macro_rules! by_size {
    ($size:expr, $n:ident => $call:expr) => {
        by_size!(@ $size, $n => $call; 1, 2, 4, 8, 16)
    };
    (@ $size:expr, $n:ident => $call:expr; $($bytes:literal),*) => {
        match $size {
            $($bytes => {
                const $n: usize = $bytes;
                $call
            })*
            size => Err(Error::new(Kind::Internal, "run/no-kernel", format!("no element has {size} bytes"))),
        }
    };
}

/// Size in bytes of the elements that these kernels move.
///
/// # Errors
/// `run/no-kernel` for elements smaller than a byte.
pub fn element_size(dtype: DType) -> Result<usize> {
    dtype
        .size_bytes()
        .ok_or_else(|| Error::new(Kind::Internal, "run/no-kernel", format!("no kernel moves {dtype}")))
}

fn need(what: &str, found: usize, shape: &[usize], size: usize) -> Result<()> {
    if elements(shape)?.checked_mul(size) == Some(found) { Ok(()) } else { Err(misfit(what)) }
}

/// `out[i] = x[view(i)]` for elements of `size` bytes.
///
/// # Errors
/// `run/no-kernel` if the view reaches beyond `x`, or `out` has another size.
pub fn copy(pool: &Pool, size: usize, x: &[u8], view: &View, out: &mut [u8]) -> Result<()> {
    if view.len().checked_mul(size) != Some(out.len()) {
        return Err(misfit("the result"));
    }
    if out.is_empty() {
        return Ok(());
    }
    if view.reach() > x.len() / size {
        return Err(misfit("an operand"));
    }
    match whole_runs(view, size) {
        Some((view, size)) => by_size!(size, N => {
            copy_elements::<N>(pool, x.as_chunks().0, &view, out.as_chunks_mut().0);
            Ok(())
        }),
        None => by_size!(size, N => {
            copy_elements::<N>(pool, x.as_chunks().0, view, out.as_chunks_mut().0);
            Ok(())
        }),
    }
}

/// The same copy with every short contiguous run as one element.
fn whole_runs(view: &View, size: usize) -> Option<(View, usize)> {
    let (n, extents) = view.extents.split_last()?;
    let (stride, strides) = view.strides.split_last()?;
    let wide = n.checked_mul(size).filter(|w| matches!(w, 2 | 4 | 8 | 16))?;
    (*stride == 1 && !extents.is_empty() && strides.iter().all(|s| s.is_multiple_of(*n))).then(|| {
        let strides: Vec<usize> = strides.iter().map(|s| s / n).collect();
        (View::new(extents, &strides), wide)
    })
}

fn copy_elements<const N: usize>(pool: &Pool, x: &[[u8; N]], view: &View, out: &mut [[u8; N]]) {
    let last = view.extents.len().saturating_sub(1);
    let turned = (view.extents.len() > 1 && view.strides[last] > 1)
        .then(|| view.strides[..last].iter().position(|s| *s == 1))
        .flatten()
        .filter(|axis| view.extents[*axis] >= 4 && view.extents[last] >= 4);
    if let Some(axis) = turned {
        // One side of a block is a cache line of the operand, within reason.
        return match N {
            1 | 2 => turn::<N, 32>(pool, x, view, axis, out),
            4 => turn::<N, 16>(pool, x, view, axis, out),
            _ => turn::<N, 8>(pool, x, view, axis, out),
        };
    }
    let n = view.extents.last().copied().unwrap_or(1);
    let task = (TASK / N).next_multiple_of(n.min(TASK));
    let bytes = size_of_val(out);
    for_chunks(pool, out, task, bytes, |index, out| view.cursor(index * task).load(x, out));
}

/// A copy whose operand is contiguous along `unit`, not along the last axis: square blocks through a buffer, so that
/// both sides are read and written by whole cache lines.
fn turn<const N: usize, const SIDE: usize>(
    pool: &Pool,
    x: &[[u8; N]],
    view: &View,
    unit: usize,
    out: &mut [[u8; N]],
) {
    let last = view.extents.len() - 1;
    let (rows, columns, column_stride) = (view.extents[unit], view.extents[last], view.strides[last]);
    // The axes around the contiguous one; those behind it lie side by side in a row of the result.
    let around = |axes: Range<usize>| View {
        extents: view.extents[axes.clone()].to_vec(),
        strides: view.strides[axes].to_vec(),
    };
    let (before, behind) = (around(0..unit), around(unit + 1..last));
    let (outer, width) = (before.len(), behind.len() * columns);
    let bytes = size_of_val(out);
    let grid = Grid { outer, rows, width, tall: SIDE * 4, wide: columns };
    for_rectangles(pool, out, grid, bytes, |mut rectangle| {
        let source = before.cursor(rectangle.outer).offset()
            + behind.cursor(rectangle.columns.start / columns).offset()
            + rectangle.rows.start;
        let mut buffer = [[[0u8; N]; SIDE]; SIDE];
        for left in (0..columns).step_by(SIDE) {
            let width = SIDE.min(columns - left);
            for top in (0..rectangle.rows.len()).step_by(SIDE) {
                let tall = SIDE.min(rectangle.rows.len() - top);
                for (j, line) in buffer[..width].iter_mut().enumerate() {
                    let at = source + top + (left + j) * column_stride;
                    line[..tall].copy_from_slice(&x[at..at + tall]);
                }
                for i in 0..tall {
                    let row = &mut rectangle.row(top + i)[left..left + width];
                    row.iter_mut().zip(&buffer).for_each(|(o, line)| *o = line[i]);
                }
            }
        }
    });
}

/// Axis `i` of the result is axis `perm[i]` of `x [shape]`.
///
/// # Errors
/// `run/no-kernel` for sizes that do not fit.
pub fn transpose(
    pool: &Pool,
    size: usize,
    x: &[u8],
    shape: &[usize],
    perm: &[usize],
    out: &mut [u8],
) -> Result<()> {
    need("the operand", x.len(), shape, size)?;
    let strides = dense_strides(shape);
    let pick = |of: &[usize]| -> Option<Vec<usize>> { perm.iter().map(|p| of.get(*p).copied()).collect() };
    let (extents, strides) = pick(shape).zip(pick(&strides)).ok_or_else(|| misfit("the permutation"))?;
    copy(pool, size, x, &View::new(&extents, &strides), out)
}

/// Repeats `x [from]` to `out [shape]`.
///
/// # Errors
/// `run/no-kernel` for shapes or sizes that do not fit.
pub fn broadcast(
    pool: &Pool,
    size: usize,
    x: &[u8],
    from: &[usize],
    shape: &[usize],
    out: &mut [u8],
) -> Result<()> {
    need("the operand", x.len(), from, size)?;
    need("the result", out.len(), shape, size)?;
    let view = View::broadcast(shape, from).ok_or_else(|| misfit("the operand"))?;
    copy(pool, size, x, &view, out)
}

/// Elements `start, start + step, ..` before `end` along `axis` of `x [shape]`.
///
/// # Errors
/// `run/failed` for a range outside the axis, `run/no-kernel` for sizes that do not fit.
#[allow(clippy::too_many_arguments)]
pub fn slice(
    pool: &Pool,
    size: usize,
    x: &[u8],
    shape: &[usize],
    axis: usize,
    (start, end, step): (usize, usize, usize),
    out: &mut [u8],
) -> Result<()> {
    need("the operand", x.len(), shape, size)?;
    let extent = *shape.get(axis).ok_or_else(|| misfit("the operand"))?;
    if start > end || end > extent || step == 0 {
        let message = format!("{start}..{end} is no range of an axis of {extent}");
        return Err(Error::new(Kind::BadInput, "run/failed", message));
    }
    let mut extents = shape.to_vec();
    extents[axis] = (end - start).div_ceil(step);
    if extents.contains(&0) {
        return need("the result", out.len(), &extents, size);
    }
    let mut strides = dense_strides(shape);
    let skipped = start * strides[axis] * size;
    strides[axis] = strides[axis].saturating_mul(step);
    copy(pool, size, &x[skipped..], &View::new(&extents, &strides), out)
}

/// Joins parts, each with its bytes in one row: row `i` of the result is row `i` of every part.
///
/// # Errors
/// `run/no-kernel` for sizes that do not fit.
pub fn concat(pool: &Pool, rows: usize, parts: &[(&[u8], usize)], out: &mut [u8]) -> Result<()> {
    let mut starts = Vec::with_capacity(parts.len());
    let mut width = 0usize;
    for (part, bytes) in parts {
        if bytes.checked_mul(rows) != Some(part.len()) {
            return Err(misfit("an operand"));
        }
        starts.push(width);
        width = width.checked_add(*bytes).ok_or_else(|| misfit("the result"))?;
    }
    if width.checked_mul(rows) != Some(out.len()) {
        return Err(misfit("the result"));
    }
    let bytes = out.len();
    for_chunks(pool, out, TASK, bytes, |index, mut out| {
        let (mut row, within) = (index * TASK / width, index * TASK % width);
        // The part that holds the first byte; empty parts before it end where it starts.
        let mut p = starts.partition_point(|s| *s <= within) - 1;
        let mut skip = within - starts[p];
        while !out.is_empty() {
            let (part, bytes) = parts[p];
            let run = out.len().min(bytes - skip);
            let (now, rest) = out.split_at_mut(run);
            now.copy_from_slice(&part[row * bytes + skip..][..run]);
            out = rest;
            skip = 0;
            p += 1;
            if p == parts.len() {
                (p, row) = (0, row + 1);
            }
        }
    });
    Ok(())
}

/// Index operands as places on an axis of `extent`.
///
/// # Errors
/// `run/bad-index` for an index outside the axis.
pub fn places<I: Copy + TryInto<usize> + std::fmt::Display>(
    indices: &[I],
    extent: usize,
) -> Result<Vec<usize>> {
    let place = |index: &I| {
        (*index).try_into().ok().filter(|place| *place < extent).ok_or_else(|| {
            Error::new(Kind::BadInput, "run/bad-index", format!("index {index} is outside 0..{extent}"))
        })
    };
    indices.iter().map(place).collect()
}

/// Slices `places` of `x [outer, extent, inner]` along the middle axis; `inner` counts bytes.
///
/// # Errors
/// `run/no-kernel` for sizes that do not fit.
pub fn gather(
    pool: &Pool,
    x: &[u8],
    [outer, extent, inner]: [usize; 3],
    places: &[usize],
    out: &mut [u8],
) -> Result<()> {
    need("the operand", x.len(), &[outer, extent, inner], 1)?;
    need("the result", out.len(), &[outer, places.len(), inner], 1)?;
    if out.is_empty() {
        return Ok(());
    }
    match inner {
        1 | 2 | 4 | 8 | 16 => by_size!(inner, N => {
            take::<[u8; N]>(pool, x.as_chunks().0, extent, 1, places, out.as_chunks_mut().0);
            Ok(())
        }),
        _ => {
            take(pool, x, extent, inner, places, out);
            Ok(())
        }
    }
}

fn take<E: Copy + Send + Sync>(
    pool: &Pool,
    x: &[E],
    extent: usize,
    inner: usize,
    places: &[usize],
    out: &mut [E],
) {
    let rows = (TASK / (inner * size_of::<E>())).max(1);
    let bytes = size_of_val(out);
    for_chunks(pool, out, rows * inner, bytes, |index, out| {
        for (i, out) in out.chunks_exact_mut(inner).enumerate() {
            let row = index * rows + i;
            let from = (row / places.len() * extent + places[row % places.len()]) * inner;
            out.copy_from_slice(&x[from..from + inner]);
        }
    });
}

/// Puts slice `i` of `updates [outer, places, inner]` at `places[i]` of `x [outer, extent, inner]`, in rising order;
/// `inner` counts bytes.
///
/// # Errors
/// `run/no-kernel` for sizes that do not fit.
pub fn scatter(
    pool: &Pool,
    x: &mut [u8],
    [outer, extent, inner]: [usize; 3],
    places: &[usize],
    updates: &[u8],
) -> Result<()> {
    need("the operand", x.len(), &[outer, extent, inner], 1)?;
    need("the updates", updates.len(), &[outer, places.len(), inner], 1)?;
    if x.is_empty() || updates.is_empty() {
        return Ok(());
    }
    let width = places.len() * inner;
    for_chunks(pool, x, extent * inner, updates.len(), |index, x| {
        let updates = &updates[index * width..(index + 1) * width];
        for (place, update) in places.iter().zip(updates.chunks_exact(inner)) {
            x[place * inner..(place + 1) * inner].copy_from_slice(update);
        }
    });
    Ok(())
}

/// An operand that repeats to the result's shape.
pub type Repeated<'a> = (&'a [u8], &'a [usize]);

/// `a` where `condition` holds, else `b`, all broadcast to `shape`.
///
/// # Errors
/// `run/no-kernel` for shapes or sizes that do not fit.
pub fn select(
    pool: &Pool,
    size: usize,
    condition: Repeated<'_>,
    a: Repeated<'_>,
    b: Repeated<'_>,
    shape: &[usize],
    out: &mut [u8],
) -> Result<()> {
    need("the result", out.len(), shape, size)?;
    need("the condition", condition.0.len(), condition.1, 1)?;
    need("operand 1", a.0.len(), a.1, size)?;
    need("operand 2", b.0.len(), b.1, size)?;
    let view = |of: Repeated<'_>| View::broadcast(shape, of.1).ok_or_else(|| misfit("an operand"));
    let views = [view(condition)?, view(a)?, view(b)?];
    by_size!(size, N => {
        select_elements::<N>(pool, condition.0, a.0.as_chunks().0, b.0.as_chunks().0, &views, out.as_chunks_mut().0);
        Ok(())
    })
}

fn select_elements<const N: usize>(
    pool: &Pool,
    condition: &[u8],
    a: &[[u8; N]],
    b: &[[u8; N]],
    views: &[View; 3],
    out: &mut [[u8; N]],
) {
    const TILE: usize = 256;
    let task = TASK / N;
    let bytes = size_of_val(out);
    for_chunks(pool, out, task, bytes * 4, |index, out| {
        let [mut at_condition, mut at_a, mut at_b] = [0, 1, 2].map(|i| views[i].cursor(index * task));
        let (mut holds, mut other) = ([0u8; TILE], [[0u8; N]; TILE]);
        for out in out.chunks_mut(TILE) {
            let n = out.len();
            at_condition.load(condition, &mut holds[..n]);
            at_a.load(a, out);
            at_b.load(b, &mut other[..n]);
            for ((out, holds), other) in out.iter_mut().zip(&holds).zip(&other) {
                *out = if *holds != 0 { *out } else { *other };
            }
        }
    });
}

/// Coordinates along `axis` of `shape`.
///
/// # Errors
/// `run/no-kernel` for sizes that do not fit.
pub fn iota(pool: &Pool, dtype: DType, shape: &[usize], axis: usize, out: &mut [u8]) -> Result<()> {
    let size = element_size(dtype)?;
    need("the result", out.len(), shape, size)?;
    let extent = *shape.get(axis).ok_or_else(|| misfit("the result"))?;
    if out.is_empty() {
        return Ok(());
    }
    let line: Vec<f64> = (0..extent).map(|i| i as f64).collect();
    let mut strides = vec![0; shape.len()];
    strides[axis] = 1;
    copy(pool, size, &millrace_ir::tensor::encode(dtype, &line), &View::new(shape, &strides), out)
}
