//! Largest or mean element of windows of images, NCHW.

use millrace_ir::Result;

use super::conv::inside;
use super::element::Element;
use super::parallel::{Pool, for_chunks};
use super::view::{elements, misfit};

/// Sizes of one pooling.
#[derive(Clone, Copy, Debug)]
pub struct Pool2d {
    /// Planes, height and width of the operand.
    pub x: [usize; 3],
    /// Height and width of the result.
    pub out: [usize; 2],
    /// Window height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal step.
    pub stride: [usize; 2],
    /// Padding at the top, left, bottom and right.
    pub pad: [usize; 4],
    /// Mean instead of maximum.
    pub average: bool,
    /// Padding counts as zeros in means.
    pub count_include_pad: bool,
}

impl Pool2d {
    /// Elements that the mean of output place `at` along `axis` is taken over.
    fn count(&self, at: usize, axis: usize) -> usize {
        let start = at * self.stride[axis];
        let (extent, pad) = (self.x[axis + 1], self.pad[axis]);
        if self.count_include_pad {
            return (start + self.kernel[axis]).min(extent + pad + self.pad[axis + 2]).saturating_sub(start);
        }
        let end = (start + self.kernel[axis]).saturating_sub(pad).min(extent);
        end.saturating_sub(start.saturating_sub(pad))
    }

    /// `out [planes, oh, ow]` from `x [planes, h, w]`; sums run over rows, then columns, in rising order.
    ///
    /// # Errors
    /// `run/no-kernel` for sizes that do not fit.
    pub fn run<T: Element>(&self, pool: &Pool, x: &[T], out: &mut [T]) -> Result<()> {
        let [planes, h, w] = self.x;
        let [oh, ow] = self.out;
        let fits = self.stride.iter().all(|s| *s > 0)
            && elements(&self.x)? == x.len()
            && elements(&[planes, oh, ow])? == out.len();
        if !fits {
            return Err(misfit("an operand or result"));
        }
        if out.is_empty() {
            return Ok(());
        }
        let [kh, kw] = self.kernel;
        let start = if self.average { 0.0 } else { f32::NEG_INFINITY };
        let columns: Vec<_> = (0..kw).map(|kx| inside(ow, self.stride[1], kx, self.pad[1], w)).collect();
        let counts: Vec<usize> = (0..ow).map(|z| self.count(z, 1)).collect();
        let work = out.len().saturating_mul(kh * kw);
        for_chunks(pool, out, oh * ow, work, |plane, out| {
            let mut values = vec![start; ow];
            let mut source = vec![0f32; w];
            for (y, out) in out.chunks_exact_mut(ow).enumerate() {
                values.fill(start);
                for ky in (0..kh).filter(|ky| inside(oh, self.stride[0], *ky, self.pad[0], h).contains(&y)) {
                    let at = (plane * h + y * self.stride[0] + ky - self.pad[0]) * w;
                    T::widen(&x[at..at + w], &mut source);
                    for (kx, zs) in columns.iter().enumerate().filter(|(_, zs)| !zs.is_empty()) {
                        let from = zs.start * self.stride[1] + kx - self.pad[1];
                        let row = source[from..].iter().step_by(self.stride[1]);
                        let values = values[zs.clone()].iter_mut().zip(row);
                        if self.average {
                            values.for_each(|(value, v)| *value += v);
                        } else {
                            values.for_each(|(value, v)| *value = value.max(*v));
                        }
                    }
                }
                if self.average {
                    let rows = self.count(y, 0);
                    let counted = values.iter_mut().zip(&counts);
                    counted.for_each(|(v, columns)| *v /= (rows * columns) as f32);
                }
                T::narrow(&values, out);
            }
        });
        Ok(())
    }
}
