//! Convolution of images, NCHW, as a matrix product: weight rows times patches.
//!
//! Patches of 32 neighbouring output pixels form a panel of the matmul tile, built piece by piece in cache, so that
//! weights need no packing. Groups with few output channels are summed directly, row by row. Either way each output is
//! one chain over (channel, kernel row, kernel column) in rising order that begins with the bias.

use std::ops::Range;

use millrace_ir::Result;

use super::element::Element;
use super::parallel::{Grid, Pool, for_chunks, for_rectangles};
use super::simd::{PANEL, TILE_ROWS, dispatch, tile};
use super::view::{elements, misfit};

/// Rows of patches that are built at a time: a panel block of f32 is 64 KiB.
const INNER: usize = 512;

/// Most weight rows of one task.
const ROWS: usize = 384;

/// Most panels of one task.
const PANELS: usize = 4;

/// Fewest output channels of a group for which patches are built.
const FEW: usize = 4;

/// Sizes of one convolution.
#[derive(Clone, Copy, Debug)]
pub struct Conv2d {
    /// Images, channels, height and width of the operand.
    pub x: [usize; 4],
    /// Output channels, channels of a group, kernel height and width.
    pub weight: [usize; 4],
    /// Height and width of the result.
    pub out: [usize; 2],
    /// Vertical and horizontal step.
    pub stride: [usize; 2],
    /// Zeros above and to the left.
    pub pad: [usize; 2],
    /// Distance of kernel elements.
    pub dilation: [usize; 2],
    /// Channel groups.
    pub groups: usize,
}

/// Output places `o` of `0..count` whose source `o * stride + offset - pad` lies in `0..extent`.
pub(crate) fn inside(count: usize, stride: usize, offset: usize, pad: usize, extent: usize) -> Range<usize> {
    let first = pad.saturating_sub(offset).div_ceil(stride);
    let end = (extent + pad).saturating_sub(offset).div_ceil(stride).min(count);
    first.min(end)..end
}

impl Conv2d {
    /// `out [n, o, oh, ow]` from `x [n, c, h, w]`, `weight [o, c / groups, kh, kw]` and `bias [o]`.
    ///
    /// # Errors
    /// `run/no-kernel` for sizes that do not fit.
    pub fn run<T: Element>(
        &self,
        pool: &Pool,
        x: &[T],
        weight: &[T],
        bias: Option<&[T]>,
        out: &mut [T],
    ) -> Result<()> {
        let [n, channels, ..] = self.x;
        let [o, c, kh, kw] = self.weight;
        let [oh, ow] = self.out;
        let fits = self.groups > 0
            && o.is_multiple_of(self.groups)
            && c.checked_mul(self.groups) == Some(channels)
            && self.stride.iter().all(|s| *s > 0)
            && elements(&self.x)? == x.len()
            && elements(&self.weight)? == weight.len()
            && elements(&[n, o, oh, ow])? == out.len()
            && bias.is_none_or(|b| b.len() == o);
        if !fits {
            return Err(misfit("an operand or result"));
        }
        if out.is_empty() {
            return Ok(());
        }
        let mut first = vec![0f32; o];
        if let Some(bias) = bias {
            T::widen(bias, &mut first);
        }
        let widened;
        let weight = match T::as_f32(weight) {
            Some(weight) => weight,
            None => {
                let mut copy = vec![0f32; weight.len()];
                T::widen(weight, &mut copy);
                widened = copy;
                &widened
            }
        };
        let meet = |axis: usize| -> Vec<Range<usize>> {
            let (count, extent) = (self.out[axis], self.x[axis + 2]);
            let offsets = (0..self.weight[axis + 2]).map(|k| k * self.dilation[axis]);
            offsets.map(|at| inside(count, self.stride[axis], at, self.pad[axis], extent)).collect()
        };
        let (rows, columns) = (meet(0), meet(1));
        let (k, pixels) = (c * kh * kw, oh * ow);
        let job = Job { conv: *self, k, pixels, x, weight, bias: &first, rows, columns };
        if o / self.groups < FEW {
            job.direct(pool, out)
        } else {
            job.patches(pool, out)
        }
        Ok(())
    }
}

struct Job<'a, T> {
    conv: Conv2d,
    /// Inner extent of the product.
    k: usize,
    /// Elements of an output plane.
    pixels: usize,
    x: &'a [T],
    weight: &'a [f32],
    bias: &'a [f32],
    /// Output rows that a kernel row meets inside the image.
    rows: Vec<Range<usize>>,
    /// Output columns that a kernel column meets inside the image.
    columns: Vec<Range<usize>>,
}

/// Every `stride`-th element of `x`.
#[inline(always)]
fn gather<T: Element>(x: &[T], stride: usize, out: &mut [f32]) {
    match (stride, <&mut [f32; PANEL]>::try_from(&mut *out)) {
        // Constant lengths spare the call of a general copy.
        (1, Ok(whole)) => whole.iter_mut().zip(&x[..PANEL]).for_each(|(o, v)| *o = v.to_f32()),
        (1, Err(_)) => out.iter_mut().zip(x).for_each(|(o, v)| *o = v.to_f32()),
        (2, Ok(whole)) => {
            let x = &x[..2 * PANEL - 1];
            (0..PANEL).for_each(|i| whole[i] = x[2 * i].to_f32());
        }
        _ => out.iter_mut().zip(x.iter().step_by(stride)).for_each(|(o, v)| *o = v.to_f32()),
    }
}

/// Part of a panel: columns that lie in one output row.
struct Segment {
    /// First column of the panel.
    at: usize,
    /// Output row.
    y: usize,
    /// Output columns.
    z: Range<usize>,
}

dispatch! {
    /// Adds `weight * x[i * stride]` to each `out[i]`.
    pub fn add_scaled(out: &mut [f32], x: &[f32], stride: usize, weight: f32) {
        if stride == 1 {
            out.iter_mut().zip(x).for_each(|(o, v)| *o += weight * v);
        } else {
            out.iter_mut().zip(x.iter().step_by(stride)).for_each(|(o, v)| *o += weight * v);
        }
    }
}

impl<T: Element> Job<'_, T> {
    fn work(&self, outputs: usize) -> usize {
        outputs.saturating_mul(self.k)
    }

    fn patches(&self, pool: &Pool, out: &mut [T]) {
        let Conv2d { x: [_, channels, h, w], weight: [o, c, ..], groups, .. } = self.conv;
        let rows_of_group = o / groups;
        let images = out.len() / (o * self.pixels);
        // Smaller tasks repeat more of the work on patches or weights; they are taken where threads would idle.
        let (mut rows, mut panels) = (ROWS.min(rows_of_group), PANELS);
        let grid = |tall: usize, panels: usize| {
            let (outer, width) = (images * groups, self.pixels);
            Grid { outer, rows: rows_of_group, width, tall, wide: panels * PANEL }
        };
        while grid(rows, panels).tasks() < 4 * pool.threads() && pool.threads() > 1 {
            if panels > 1 {
                panels /= 2;
            } else if rows > 8 * TILE_ROWS {
                rows = (rows / 2).next_multiple_of(TILE_ROWS);
            } else {
                break;
            }
        }
        let work = self.work(out.len());
        for_rectangles(pool, out, grid(rows, panels), work, |mut rectangle| {
            let (image, group) = (rectangle.outer / groups, rectangle.outer % groups);
            let first_row = group * rows_of_group + rectangle.rows.start;
            let own_rows = rectangle.rows.len();
            let pixels = rectangle.columns.clone();
            let planes = &self.x[(image * channels + group * c) * h * w..][..c * h * w];
            let segments: Vec<Vec<Segment>> =
                pixels.clone().step_by(PANEL).map(|p| self.segments(p)).collect();
            let panel_size = own_rows * PANEL;
            let mut acc = vec![0f32; segments.len() * panel_size];
            for acc in acc.chunks_exact_mut(panel_size) {
                for (row, bias) in acc.chunks_exact_mut(PANEL).zip(&self.bias[first_row..]) {
                    row.fill(*bias);
                }
            }
            let block = INNER.min(self.k) * PANEL;
            let mut patches = vec![0f32; segments.len() * block];
            for start in (0..self.k).step_by(INNER) {
                let inner = INNER.min(self.k - start);
                for (segments, patches) in segments.iter().zip(patches.chunks_exact_mut(block)) {
                    self.fill(planes, segments, start, &mut patches[..inner * PANEL]);
                }
                for top in (0..own_rows).step_by(TILE_ROWS) {
                    let count = TILE_ROWS.min(own_rows - top);
                    let a = &self.weight[(first_row + top) * self.k + start..];
                    for (acc, patches) in acc.chunks_exact_mut(panel_size).zip(patches.chunks_exact(block)) {
                        let acc = &mut acc[top * PANEL..(top + count) * PANEL];
                        tile(pool.isa, a, self.k, count, inner, patches, acc);
                    }
                }
            }
            for (panel, acc) in acc.chunks_exact(panel_size).enumerate() {
                let columns = panel * PANEL..pixels.len().min((panel + 1) * PANEL);
                for (r, row) in acc.chunks_exact(PANEL).enumerate() {
                    T::narrow(&row[..columns.len()], &mut rectangle.row(r)[columns.clone()]);
                }
            }
        });
    }

    /// The output rows of the panel that begins at pixel `first`.
    fn segments(&self, first: usize) -> Vec<Segment> {
        let ow = self.conv.out[1];
        let end = self.pixels.min(first + PANEL);
        let mut segments = Vec::new();
        let mut pixel = first;
        while pixel < end {
            let (y, z) = (pixel / ow, pixel % ow);
            let width = (ow - z).min(end - pixel);
            segments.push(Segment { at: pixel - first, y, z: z..z + width });
            pixel += width;
        }
        segments
    }

    /// Rows `start..` of the patches of one panel, 32 columns each; columns beyond the segments stay as they are.
    fn fill(&self, planes: &[T], segments: &[Segment], start: usize, patches: &mut [f32]) {
        let Conv2d { x: [_, _, h, w], weight: [_, _, kh, kw], stride, pad, dilation, .. } = self.conv;
        let (mut channel, mut ky, mut kx) = (start / (kh * kw), start / kw % kh, start % kw);
        for row in patches.chunks_exact_mut(PANEL) {
            let (ys, zs) = (&self.rows[ky], &self.columns[kx]);
            for segment in segments {
                let part = &mut row[segment.at..segment.at + segment.z.len()];
                let (first, end) = (zs.start.max(segment.z.start), zs.end.min(segment.z.end));
                if !ys.contains(&segment.y) || first >= end {
                    part.fill(0.0);
                    continue;
                }
                let source = segment.y * stride[0] + ky * dilation[0] - pad[0];
                let from = (channel * h + source) * w + first * stride[1] + kx * dilation[1] - pad[1];
                let (before, count) = (first - segment.z.start, end - first);
                part[..before].fill(0.0);
                part[before + count..].fill(0.0);
                gather(&planes[from..], stride[1], &mut part[before..before + count]);
            }
            kx += 1;
            if kx == kw {
                (kx, ky) = (0, ky + 1);
            }
            if ky == kh {
                (ky, channel) = (0, channel + 1);
            }
        }
    }

    /// One output row at a time, for groups with few output channels.
    fn direct(&self, pool: &Pool, out: &mut [T]) {
        let Conv2d { x: [_, channels, h, w], weight: [o, c, kh, kw], out: [_, ow], .. } = self.conv;
        let Conv2d { stride, pad, dilation, groups, .. } = self.conv;
        let work = self.work(out.len());
        for_chunks(pool, out, self.pixels, work, |plane, out| {
            let (image, channel) = (plane / o, plane % o);
            let group = channel / (o / groups);
            let planes = &self.x[(image * channels + group * c) * h * w..][..c * h * w];
            let weight = &self.weight[channel * self.k..(channel + 1) * self.k];
            let mut sums = vec![0f32; ow];
            let mut source = vec![0f32; w];
            for (y, out) in out.chunks_exact_mut(ow).enumerate() {
                sums.fill(self.bias[channel]);
                for (ic, ky) in (0..c).flat_map(|ic| (0..kh).map(move |ky| (ic, ky))) {
                    if !self.rows[ky].contains(&y) {
                        continue;
                    }
                    let row = (ic * h + y * stride[0] + ky * dilation[0] - pad[0]) * w;
                    let row = &planes[row..row + w];
                    let row = match T::as_f32(row) {
                        Some(row) => row,
                        None => {
                            T::widen(row, &mut source);
                            &source
                        }
                    };
                    for (kx, zs) in self.columns.iter().enumerate() {
                        if !zs.is_empty() {
                            let from = zs.start * stride[1] + kx * dilation[1] - pad[1];
                            let weight = weight[(ic * kh + ky) * kw + kx];
                            add_scaled(pool.isa, &mut sums[zs.clone()], &row[from..], stride[1], weight);
                        }
                    }
                }
                T::narrow(&sums, out);
            }
        });
    }
}
