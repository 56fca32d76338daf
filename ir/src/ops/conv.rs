//! Images, NCHW: conv2d, max_pool2d, avg_pool2d.

use super::def::{
    EvalCtx, InferCtx, Numerics, OpDef, OpTraits, need_dim, need_float, need_rank, need_same_dtype,
};
use crate::attr::{AttrReader, Attrs};
use crate::dim::Dim;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// Largest stride, padding, dilation or kernel extent.
const LIMIT: usize = 1 << 16;

fn two(attrs: &mut AttrReader<'_>, key: &str, default: [usize; 2]) -> Result<[usize; 2], String> {
    let list = attrs.usizes_or(key, &default)?;
    list.as_slice().try_into().map_err(|_| format!("{key} takes two numbers, not {}", list.len()))
}

fn four(attrs: &mut AttrReader<'_>, key: &str) -> Result<[usize; 4], String> {
    let list = attrs.usizes_or(key, &[0; 4])?;
    list.as_slice()
        .try_into()
        .map_err(|_| format!("{key} takes top, left, bottom and right, not {} numbers", list.len()))
}

/// `floor((extent + padding - dilation (kernel - 1) - 1) / stride) + 1`.
fn window(
    extent: &Dim,
    padding: usize,
    kernel: usize,
    dilation: usize,
    stride: usize,
) -> Result<Dim, String> {
    if [kernel, dilation, stride].iter().any(|v| *v == 0 || *v > LIMIT) || padding > 2 * LIMIT {
        return Err(format!("kernel, dilation and stride must be in 1..={LIMIT}, padding at most that"));
    }
    let span = dilation * (kernel - 1) + 1;
    let room = extent.add(&Dim::from(padding)).sub(&Dim::from(span));
    if room.as_const().is_some_and(|c| c < 0) {
        return Err(format!("a window of {span} does not fit into {extent} with padding {padding}"));
    }
    Ok(room.add(&Dim::from(1i64)).ceil_div(stride as i64))
}

/// Convolution (cross-correlation): `x [n, c, h, w]`, weight `[o, c / groups, kh, kw]`, optional bias `[o]`;
/// `%2 = conv2d %0, @w, @b {stride = [2, 2], pad = [1, 1, 1, 1]}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2d {
    /// Vertical and horizontal step.
    pub stride: [usize; 2],
    /// Zeros at the top, left, bottom and right.
    pub pad: [usize; 4],
    /// Distance of kernel elements.
    pub dilation: [usize; 2],
    /// Channel groups that do not mix.
    pub groups: usize,
}

impl OpDef for Conv2d {
    const NAMES: &'static [&'static str] = &["conv2d"];
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set_unless("stride", self.stride.to_vec(), vec![1, 1]);
        attrs.set_unless("pad", self.pad.to_vec(), vec![0; 4]);
        attrs.set_unless("dilation", self.dilation.to_vec(), vec![1, 1]);
        attrs.set_unless("groups", self.groups, 1);
        attrs
    }
    fn from_attrs(_: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Conv2d {
            stride: two(attrs, "stride", [1, 1])?,
            pad: four(attrs, "pad")?,
            dilation: two(attrs, "dilation", [1, 1])?,
            groups: attrs.usize_or("groups", 1)?,
        })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        ctx.at_least(2)?;
        let (x, w) = (&ctx.operands[0], &ctx.operands[1]);
        need_float("operand 0", x)?;
        need_rank("operand 0", x, 4)?;
        need_rank("the weight", w, 4)?;
        need_same_dtype(x, w)?;
        let constant = |d: &Dim| d.as_const().and_then(|c| usize::try_from(c).ok()).filter(|c| *c <= LIMIT);
        let (Some(o), Some(c), Some(kh), Some(kw)) =
            (constant(&w.shape[0]), constant(&w.shape[1]), constant(&w.shape[2]), constant(&w.shape[3]))
        else {
            return Err(format!("the weight {w} must have constant extents up to {LIMIT}"));
        };
        if self.groups == 0 || self.groups > LIMIT || o % self.groups != 0 {
            return Err(format!("{o} output channels do not fall into {} groups", self.groups));
        }
        need_dim("the number of channels", &x.shape[1], &Dim::from(c * self.groups))?;
        if self.pad.iter().any(|p| *p > LIMIT) {
            return Err(format!("padding is at most {LIMIT}"));
        }
        if let Some(bias) = ctx.operands.get(2) {
            need_same_dtype(x, bias)?;
            need_rank("the bias", bias, 1)?;
            need_dim("the bias", &bias.shape[0], &w.shape[0])?;
        }
        if ctx.operands.len() > 3 {
            return Err(format!("takes 2 or 3 operands, got {}", ctx.operands.len()));
        }
        let h = window(&x.shape[2], self.pad[0] + self.pad[2], kh, self.dilation[0], self.stride[0])?;
        let wide = window(&x.shape[3], self.pad[1] + self.pad[3], kw, self.dilation[1], self.stride[1])?;
        Ok(vec![TensorType {
            dtype: x.dtype,
            shape: vec![x.shape[0].clone(), w.shape[0].clone(), h, wide].into(),
        }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let (x, w) = (ctx.operand(0)?, ctx.operand(1)?);
        let mut out = ctx.empty(0)?;
        if out.data.is_empty() {
            return Ok(vec![out]);
        }
        let [n, o, oh, ow] = out.shape[..] else { return Err("the result has rank 4".into()) };
        let [c, kh, kw] = w.shape[1..] else { return Err("the weight has rank 4".into()) };
        let (channels, h, wide) = (x.shape[1], x.shape[2], x.shape[3]);
        let mut at = 0;
        for (image, oc) in (0..n).flat_map(|i| (0..o).map(move |c| (i, c))) {
            let group = oc / (o / self.groups);
            for (y, z) in (0..oh).flat_map(|y| (0..ow).map(move |z| (y, z))) {
                let mut sum = ctx.operands.get(2).map_or(0.0, |b| b.data[oc]);
                for (ic, ky, kx) in
                    (0..c).flat_map(|i| (0..kh).flat_map(move |a| (0..kw).map(move |b| (i, a, b))))
                {
                    let row = (y * self.stride[0] + ky * self.dilation[0]).checked_sub(self.pad[0]);
                    let column = (z * self.stride[1] + kx * self.dilation[1]).checked_sub(self.pad[1]);
                    if let (Some(row), Some(column)) = (row, column)
                        && row < h
                        && column < wide
                    {
                        let source = ((image * channels + group * c + ic) * h + row) * wide + column;
                        sum += x.data[source] * w.data[((oc * c + ic) * kh + ky) * kw + kx];
                    }
                }
                out.data[at] = sum;
                at += 1;
            }
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(Numerics::Accumulated)
    }
}

/// Largest or mean element of each window: `x [n, c, h, w]`; padding never wins and, unless `count_include_pad`,
/// does not count; `%1 = max_pool2d %0 {kernel = [2, 2], stride = [2, 2]}`.
#[derive(Clone, Debug, PartialEq)]
pub struct Pool2d {
    /// Mean instead of maximum.
    pub average: bool,
    /// Window height and width.
    pub kernel: [usize; 2],
    /// Vertical and horizontal step.
    pub stride: [usize; 2],
    /// Padding at the top, left, bottom and right, each smaller than the kernel.
    pub pad: [usize; 4],
    /// Padding counts as zeros in means.
    pub count_include_pad: bool,
}

impl OpDef for Pool2d {
    const NAMES: &'static [&'static str] = &["max_pool2d", "avg_pool2d"];
    fn name(&self) -> &'static str {
        Self::NAMES[usize::from(self.average)]
    }
    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::default();
        attrs.set("kernel", self.kernel.to_vec());
        attrs.set_unless("stride", self.stride.to_vec(), vec![1, 1]);
        attrs.set_unless("pad", self.pad.to_vec(), vec![0; 4]);
        attrs.set_unless("count_include_pad", self.count_include_pad, false);
        attrs
    }
    fn from_attrs(name: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(Pool2d {
            average: name == Self::NAMES[1],
            kernel: attrs.usizes("kernel")?.try_into().map_err(|_| "kernel takes two numbers")?,
            stride: two(attrs, "stride", [1, 1])?,
            pad: four(attrs, "pad")?,
            count_include_pad: attrs.flag("count_include_pad")?,
        })
    }
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String> {
        let [x] = ctx.exactly()?;
        need_float("the operand", x)?;
        need_rank("the operand", x, 4)?;
        if self.count_include_pad && !self.average {
            return Err("count_include_pad is for means".into());
        }
        if self.kernel.iter().any(|k| *k > LIMIT) {
            return Err(format!("kernel {:?} exceeds {LIMIT}", self.kernel));
        }
        if (0..4).any(|i| self.pad[i] >= self.kernel[i % 2].max(1)) {
            return Err(format!("padding {:?} must be smaller than the kernel {:?}", self.pad, self.kernel));
        }
        let h = window(&x.shape[2], self.pad[0] + self.pad[2], self.kernel[0], 1, self.stride[0])?;
        let w = window(&x.shape[3], self.pad[1] + self.pad[3], self.kernel[1], 1, self.stride[1])?;
        Ok(vec![TensorType {
            dtype: x.dtype,
            shape: vec![x.shape[0].clone(), x.shape[1].clone(), h, w].into(),
        }])
    }
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String> {
        let x = ctx.operand(0)?;
        let mut out = ctx.empty(0)?;
        let (h, w) = (x.shape[2], x.shape[3]);
        let (oh, ow) = (out.shape[2], out.shape[3]);
        for (at, v) in out.data.iter_mut().enumerate() {
            let (plane, y, z) = (at / (oh * ow), at / ow % oh, at % ow);
            let range = |o: usize, axis: usize, extent: usize| {
                let start = o * self.stride[axis];
                let first = start.saturating_sub(self.pad[axis]);
                first..(start + self.kernel[axis]).saturating_sub(self.pad[axis]).min(extent)
            };
            let (rows, columns) = (range(y, 0, h), range(z, 1, w));
            let count = if self.count_include_pad {
                let reach = |o: usize, axis: usize, extent: usize| {
                    let start = o * self.stride[axis];
                    (start + self.kernel[axis]).min(extent + self.pad[axis] + self.pad[axis + 2]) - start
                };
                reach(y, 0, h) * reach(z, 1, w)
            } else {
                rows.len() * columns.len()
            };
            let elements = rows.flat_map(|r| columns.clone().map(move |c| x.data[(plane * h + r) * w + c]));
            *v = if self.average {
                elements.sum::<f64>() / count as f64
            } else {
                elements.fold(f64::NEG_INFINITY, f64::max)
            };
        }
        Ok(vec![out])
    }
    fn traits(&self) -> OpTraits {
        OpTraits::plain(if self.average { Numerics::Accumulated } else { Numerics::Exact })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Op;
    use super::super::testing::{close, f32s, fails, ramp, run};
    use super::*;
    use crate::dim::{Bindings, Sym};
    use crate::dtype::DType;

    fn plain() -> Conv2d {
        Conv2d { stride: [1, 1], pad: [0; 4], dilation: [1, 1], groups: 1 }
    }

    #[test]
    fn three_by_three_by_hand() {
        let x = f32s(&[1, 1, 3, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        let w = f32s(&[1, 1, 2, 2], &[1.0, 0.0, 0.0, -1.0]);
        assert_eq!(run(plain(), &[x.clone(), w.clone()])[0].data, [-4.0; 4]);
        let bias = f32s(&[1], &[10.0]);
        let padded = Conv2d { stride: [2, 2], pad: [1, 1, 0, 0], ..plain() };
        assert_eq!(run(padded, &[x.clone(), w.clone(), bias])[0].data, [9.0, 7.0, 3.0, 6.0]);
        let wide = Conv2d { dilation: [2, 2], ..plain() };
        assert_eq!(run(wide, &[x.clone(), w.clone()])[0].data, [-8.0]);
        assert!(fails(Conv2d { groups: 2, ..plain() }, &[x.clone(), w.clone()]).contains("groups"));
        assert!(fails(Conv2d { stride: [0, 1], ..plain() }, &[x, w]).contains("stride"));
    }

    /// A depthwise convolution is one convolution per channel.
    #[test]
    fn groups_split_channels() {
        let (x, w) = (ramp(&[1, 2, 4, 3]), ramp(&[2, 1, 3, 2]));
        let all = run(Conv2d { groups: 2, ..plain() }, &[x.clone(), w.clone()]).remove(0);
        for c in 0..2 {
            let one = run(
                plain(),
                &[f32s(&[1, 1, 4, 3], &x.data[c * 12..][..12]), f32s(&[1, 1, 3, 2], &w.data[c * 6..][..6])],
            );
            close(&all.data[c * 4..][..4], &one[0].data);
        }
    }

    #[test]
    fn pools_by_hand() {
        let x = f32s(&[1, 1, 2, 4], &[1.0, 5.0, 2.0, 0.0, -3.0, 4.0, 8.0, 6.0]);
        let pool =
            Pool2d { average: false, kernel: [2, 2], stride: [2, 2], pad: [0; 4], count_include_pad: false };
        assert_eq!(run(pool.clone(), std::slice::from_ref(&x))[0].data, [5.0, 8.0]);
        assert_eq!(
            run(Pool2d { average: true, ..pool.clone() }, std::slice::from_ref(&x))[0].data,
            [1.75, 4.0]
        );
        let padded = Pool2d { average: true, pad: [1, 1, 0, 0], ..pool.clone() };
        assert_eq!(run(padded.clone(), std::slice::from_ref(&x))[0].data, [1.0, 3.5]);
        let counted = Pool2d { count_include_pad: true, ..padded };
        assert_eq!(run(counted, std::slice::from_ref(&x))[0].data, [0.25, 1.75]);
        assert!(fails(Pool2d { pad: [2, 0, 0, 0], ..pool }, &[x]).contains("padding"));
    }

    /// One matrix product over gathered patches instead of a sum per output.
    #[test]
    fn patches_times_weights_are_a_convolution() {
        let conv = Conv2d { stride: [2, 1], pad: [1, 0, 2, 3], dilation: [1, 2], groups: 1 };
        let (x, w, bias) = (ramp(&[2, 3, 5, 4]), ramp(&[4, 3, 2, 3]), ramp(&[4]));
        let out = run(conv, &[x.clone(), w.clone(), bias.clone()]).remove(0);
        assert_eq!(out.shape, [2, 4, 4, 3]); // (5 + 3 - 2) / 2 + 1, (4 + 3 - 5) / 1 + 1
        // The image with its padding, 8 x 7.
        let mut framed = vec![0.0; 2 * 3 * 8 * 7];
        for (plane, y, z) in (0..6).flat_map(|p| (0..5).flat_map(move |y| (0..4).map(move |z| (p, y, z)))) {
            framed[(plane * 8 + y + 1) * 7 + z] = x.data[(plane * 5 + y) * 4 + z];
        }
        for (n, y, z) in (0..2).flat_map(|n| (0..4).flat_map(move |y| (0..3).map(move |z| (n, y, z)))) {
            let patch: Vec<f64> = (0..18)
                .map(|i| (i / 6, i / 3 % 2, i % 3))
                .map(|(c, ky, kx)| framed[((n * 3 + c) * 8 + 2 * y + ky) * 7 + z + 2 * kx])
                .collect();
            for o in 0..4 {
                let sum: f64 = patch.iter().zip(&w.data[o * 18..]).map(|(a, b)| a * b).sum();
                close(&[out.data[((n * 4 + o) * 4 + y) * 3 + z]], &[sum + bias.data[o]]);
            }
        }
    }

    #[test]
    fn windows_of_symbolic_images_are_floors() {
        let s = Sym::new("s").unwrap();
        let ty = |h: Dim| TensorType::new(DType::F32, [Dim::from(1i64), Dim::from(1i64), h, Dim::from(9i64)]);
        let pool = Pool2d {
            average: false,
            kernel: [3, 3],
            stride: [2, 2],
            pad: [1, 1, 1, 1],
            count_include_pad: false,
        };
        let result = Op::from(pool).infer(&[ty(Dim::from(s))]).unwrap().remove(0);
        for h in 1..40 {
            let mut bindings = Bindings::new();
            bindings.set(s, h);
            assert_eq!(result.shape_at(&bindings), Some(vec![1, 1, (h + 2 - 3) / 2 + 1, 5]));
        }
    }

    #[test]
    fn convolutions_refuse_what_does_not_fit() {
        let (x, w) = (ramp(&[1, 2, 3, 3]), ramp(&[2, 2, 2, 2]));
        let pair = [x.clone(), w.clone()];
        for (conv, part) in [
            (Conv2d { stride: [1, usize::MAX], ..plain() }, "stride"),
            (Conv2d { dilation: [0, 1], ..plain() }, "dilation"),
            (Conv2d { dilation: [1, usize::MAX], ..plain() }, "dilation"),
            (Conv2d { dilation: [3, 1], ..plain() }, "does not fit"),
            (Conv2d { pad: [0, usize::MAX, 0, usize::MAX], ..plain() }, "padding"),
            (Conv2d { groups: 0, ..plain() }, "groups"),
            (Conv2d { groups: usize::MAX, ..plain() }, "groups"),
            (Conv2d { groups: 2, ..plain() }, "channels"),
        ] {
            let message = fails(conv, &pair);
            assert!(message.contains(part), "{message} lacks {part}");
        }
        assert!(fails(plain(), &[x.clone(), w.clone(), ramp(&[3])]).contains("bias"));
        assert!(fails(plain(), &[x.clone(), w.clone(), ramp(&[2]), ramp(&[2])]).contains("2 or 3"));
        assert!(fails(plain(), std::slice::from_ref(&x)).contains("at least 2"));
        assert!(fails(plain(), &[x.clone(), ramp(&[2, 2, 4, 1])]).contains("does not fit"));
        assert!(fails(plain(), &[x, ramp(&[2, 2, 2])]).contains("rank 4"));
        let ints = Tensor::zeros(DType::I8, &[1, 1, 1, 1]).unwrap();
        assert!(fails(plain(), &[ints.clone(), ints]).contains("float"));
    }

    /// Windows over an image framed with what padding stands for.
    #[test]
    fn pools_of_a_framed_image() {
        let x = ramp(&[1, 2, 4, 5]);
        let pool = Pool2d {
            average: false,
            kernel: [3, 2],
            stride: [1, 2],
            pad: [2, 1, 1, 0],
            count_include_pad: false,
        };
        let frame = |fill: f64| {
            let inside = |r: usize, c: usize| (2..6).contains(&r) && c >= 1;
            let value = move |p: usize, r: usize, c: usize, x: &Tensor| {
                if inside(r, c) { x.data[(p * 4 + r - 2) * 5 + c - 1] } else { fill }
            };
            move |p: usize, y: usize, z: usize, x: &Tensor| -> Vec<f64> {
                (0..6).map(|i| value(p, y + i / 2, 2 * z + i % 2, x)).collect()
            }
        };
        let out = |op: Pool2d| run(op, std::slice::from_ref(&x)).remove(0);
        let mean = Pool2d { average: true, ..pool.clone() };
        let counted = Pool2d { count_include_pad: true, ..mean.clone() };
        let (top, mean, counted) = (out(pool), out(mean), out(counted));
        assert_eq!(top.shape, [1, 2, 5, 3]);
        for (p, y, z) in (0..2).flat_map(|p| (0..5).flat_map(move |y| (0..3).map(move |z| (p, y, z)))) {
            let at = (p * 5 + y) * 3 + z;
            let padded = frame(f64::NAN)(p, y, z, &x);
            let real: Vec<f64> = padded.into_iter().filter(|v| !v.is_nan()).collect();
            let sum: f64 = real.iter().sum();
            assert_eq!(top.data[at], real.iter().copied().fold(real[0], |a, b| if b > a { b } else { a }));
            close(&[mean.data[at], counted.data[at]], &[sum / real.len() as f64, sum / 6.0]);
        }
    }

    #[test]
    fn pools_refuse_absurd_parameters() {
        let pool =
            Pool2d { average: false, kernel: [2, 2], stride: [1, 1], pad: [0; 4], count_include_pad: false };
        for (op, part) in [
            (Pool2d { kernel: [0, 2], ..pool.clone() }, "kernel"),
            (Pool2d { kernel: [9, 2], ..pool.clone() }, "does not fit"),
            (Pool2d { kernel: [usize::MAX; 2], pad: [usize::MAX - 1; 4], ..pool.clone() }, "exceeds"),
            (Pool2d { stride: [0, 1], ..pool.clone() }, "stride"),
            (Pool2d { stride: [1, usize::MAX], ..pool.clone() }, "stride"),
            (Pool2d { count_include_pad: true, ..pool.clone() }, "means"),
        ] {
            let message = fails(op, &[ramp(&[1, 1, 3, 3])]);
            assert!(message.contains(part), "{message} lacks {part}");
        }
        assert!(fails(pool, &[ramp(&[3, 3])]).contains("rank 4"));
        let Some(Err(message)) = Op::from_text("avg_pool2d", &Attrs::default()) else {
            panic!("needs a kernel")
        };
        assert!(message.contains("`kernel` is missing"), "{message}");
    }
}
