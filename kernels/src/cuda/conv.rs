//! Convolutions and poolings of images, NCHW: one thread a result, neighbouring threads on neighbouring columns.

use millrace_ir::ops::conv::{Conv2d, Pool2d};
use millrace_ir::{Dim, Node, Op, Operand, TensorType};

use super::copy::in_order;
use super::plan::{Argument, Planned, Site};
use super::pointwise::ELEMENTS;
use super::source::SourceWriter;
use super::space::{Extents, element};

/// Plans conv2d, max_pool2d and avg_pool2d of floats.
pub fn plan(site: Site<'_>, node: &Node) -> Option<Planned> {
    let (x, y) = (site.operand_ty(node, 0), site.result_ty(node, 0));
    if !x.dtype.is_float() {
        return None;
    }
    let mut extents = Extents::new(site.module);
    extents.covers(x);
    extents.covers(y);
    let (family, text, channels) = match &*node.op {
        Op::Conv2d(op) => {
            let w = site.operand_ty(node, 1);
            let (text, channels) = convolve(op, x, w, y, node.operands.len() == 3, &mut extents)?;
            ("cuda.conv2d", text, channels)
        }
        Op::Pool2d(op) => ("cuda.pool2d", pool(op, x, y, &mut extents), 1),
        _ => return None,
    };
    let source = SourceWriter::new(family)
        .body(ELEMENTS)
        .line(&format!("typedef {} T;", element(x.dtype)))
        .line(extents.index_type())
        .body(&text)
        .finish();
    let threads = y.shape.iter().fold(Dim::from(1u64), |n, d| n.mul(d)).ceil_div(channels);
    let addresses =
        node.operands.iter().copied().chain([Operand::Value(node.results[0])]).map(Argument::Address);
    let blocks = threads.ceil_div(256);
    Some(Planned::one(in_order(source, blocks).args(addresses).args(extents.arguments()?)))
}

/// A thread computes `channels` neighbouring output channels of one group, which share the image they read.
fn convolve(
    op: &Conv2d,
    x: &TensorType,
    w: &TensorType,
    y: &TensorType,
    bias: bool,
    extents: &mut Extents<'_>,
) -> Option<(String, i64)> {
    let weight = w.const_shape()?;
    let [outputs, inputs, kh, kw] = weight[..] else { return None };
    let per_group = outputs / (op.groups as u64).max(1);
    let channels = [4u64, 2].into_iter().find(|c| per_group.is_multiple_of(*c)).unwrap_or(1);
    let [images, h, wide] = [&x.shape[0], &x.shape[2], &x.shape[3]].map(|d| extents.text(d));
    let [oh, ow] = [&y.shape[2], &y.shape[3]].map(|d| extents.text(d));
    let Conv2d { stride, pad, dilation, groups } = op;
    let (bias_parameter, first) =
        if bias { ("const T *b, ", "to_f32(b[channel + c])") } else { ("", "0.0f") };
    let text = format!(
        "constexpr int C = {channels};
extern \"C\" __global__ void __launch_bounds__(256)
    KERNEL(const T *x, const T *w, {bias_parameter}T *y{parameters}) {{
    wait_for_predecessor();
    release_successor();
    const Index height = {h}, width = {wide}, rows = {oh}, columns = {ow};
    Index at = (Index)blockIdx.x * 256 + threadIdx.x;
    if (at >= {images} * {blocks} * rows * columns) return;
    const Index column = at % columns;
    at /= columns;
    const Index row = at % rows;
    at /= rows;
    const Index channel = at % {blocks} * C, image = at / {blocks};
    x += (image * {channels_in} + channel / {per_group} * {inputs}) * height * width;
    w += channel * {size};
    float sum[C];
#pragma unroll
    for (int c = 0; c < C; ++c) sum[c] = {first};
    for (int input = 0; input < {inputs}; ++input) {{
        for (int ky = 0; ky < {kh}; ++ky) {{
            const i64 from = (i64)row * {sy} + ky * {dy} - {top};
            if (from < 0 || from >= (i64)height) continue;
            for (int kx = 0; kx < {kw}; ++kx) {{
                const i64 place = (i64)column * {sx} + kx * {dx} - {left};
                if (place < 0 || place >= (i64)width) continue;
                const float v = to_f32(x[((Index)input * height + (Index)from) * width + (Index)place]);
#pragma unroll
                for (int c = 0; c < C; ++c) sum[c] += v * to_f32(w[(Index)c * {size} + (input * {kh} + ky) * {kw} + kx]);
            }}
        }}
    }}
#pragma unroll
    for (int c = 0; c < C; ++c) y[((image * {outputs} + channel + c) * rows + row) * columns + column] = from_f32<T>(sum[c]);
}}",
        parameters = extents.parameters(),
        blocks = outputs / channels,
        channels_in = inputs * *groups as u64,
        size = inputs * kh * kw,
        sy = stride[0],
        sx = stride[1],
        dy = dilation[0],
        dx = dilation[1],
        top = pad[0],
        left = pad[1],
    );
    Some((text, channels as i64))
}

fn pool(op: &Pool2d, x: &TensorType, y: &TensorType, extents: &mut Extents<'_>) -> String {
    let Pool2d { average, kernel, stride, pad, count_include_pad } = op;
    let [images, planes, h, wide] =
        [&x.shape[0], &x.shape[1], &x.shape[2], &x.shape[3]].map(|d| extents.text(d));
    let [oh, ow] = [&y.shape[2], &y.shape[3]].map(|d| extents.text(d));
    let (start, fold) =
        if *average { ("0.0f", "v + e") } else { ("__uint_as_float(0xff800000u)", "fmaxf(v, e)") };
    let end = if *average { "v / (float)count" } else { "v" };
    let count = if *count_include_pad {
        format!(
            "(min(y0 + {}, height + {}) - y0) * (min(x0 + {}, width + {}) - x0)",
            kernel[0],
            pad[0] + pad[2],
            kernel[1],
            pad[1] + pad[3]
        )
    } else {
        "max(bottom - top, (i64)0) * max(right - left, (i64)0)".to_string()
    };
    format!(
        "extern \"C\" __global__ void __launch_bounds__(256) KERNEL(const T *x, T *y{parameters}) {{
    wait_for_predecessor();
    release_successor();
    const i64 height = {h}, width = {wide};
    const Index rows = {oh}, columns = {ow};
    const Index at = (Index)blockIdx.x * 256 + threadIdx.x;
    if (at >= {images} * {planes} * rows * columns) return;
    const Index plane = at / (rows * columns);
    const i64 y0 = (i64)(at / columns % rows) * {sy}, x0 = (i64)(at % columns) * {sx};
    const i64 top = max(y0 - {pt}, (i64)0), bottom = min(y0 + {kh} - {pt}, height);
    const i64 left = max(x0 - {pl}, (i64)0), right = min(x0 + {kw} - {pl}, width);
    const i64 count = {count};
    x += plane * (Index)(height * width);
    float v = {start};
    for (i64 row = top; row < bottom; ++row) {{
        for (i64 column = left; column < right; ++column) {{
            const float e = to_f32(x[row * width + column]);
            v = {fold};
        }}
    }}
    y[at] = from_f32<T>({end});
}}",
        parameters = extents.parameters(),
        sy = stride[0],
        sx = stride[1],
        pt = pad[0],
        pl = pad[1],
        kh = kernel[0],
        kw = kernel[1],
    )
}
