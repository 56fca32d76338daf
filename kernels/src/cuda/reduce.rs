//! Reductions over any axes: sum, mean, largest, smallest.
//!
//! Kept and reduced axes are merged into runs. Where the innermost run is reduced, a warp or a block folds each result
//! with neighbouring lanes on neighbouring elements; where it is kept, neighbouring lanes have neighbouring results and
//! the lines of a block share the reduced elements. The order of sums is fixed. Sums are in f32.

use millrace_ir::ops::reduce::{Reduce, ReduceFn};
use millrace_ir::{Dim, Node, Op, Operand};

use super::copy::in_order;
use super::plan::{Argument, Planned, Site, elements};
use super::pointwise::ELEMENTS;
use super::source::SourceWriter;
use super::space::{Extents, common_unit, element, product_text, split_text, strides};

/// A run of axes.
struct Run {
    extent: Dim,
    stride: Dim,
    reduced: bool,
}

fn runs(shape: &[Dim], axes: &[usize], fits: impl Fn(&Dim) -> bool) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (axis, (extent, stride)) in shape.iter().zip(strides(shape)).enumerate() {
        let reduced = axes.contains(&axis);
        match runs.last_mut() {
            Some(run) if run.reduced == reduced && fits(&run.extent.mul(extent)) => {
                (run.extent, run.stride) = (run.extent.mul(extent), stride);
            }
            _ => runs.push(Run { extent: extent.clone(), stride, reduced }),
        }
    }
    runs
}

/// Plans a reduction of floats.
pub fn plan(site: Site<'_>, node: &Node) -> Option<Planned> {
    let Op::Reduce(op) = &*node.op else { return None };
    let (x, y) = (site.operand_ty(node, 0), site.result_ty(node, 0));
    if !x.dtype.is_float() {
        return None;
    }
    let mut extents = Extents::new(site.module);
    extents.covers(x);
    let runs = runs(&x.shape, &op.axes, |d| d.as_const().is_some() || extents.argument_fits(d));
    let rows = runs.last().is_none_or(|r| r.reduced);
    let reduced = runs.iter().filter(|r| r.reduced).fold(Dim::from(1u64), |n, r| n.mul(&r.extent));
    let (results, threads, text) = if rows {
        let (results, text) = by_rows(op, &runs, &reduced, x.dtype.bits() / 8, &mut extents);
        (results, 256, text)
    } else {
        let threads = if extents.most(&reduced) > 256 { 1024 } else { 256 };
        (32, threads, by_columns(op, &runs, threads, &mut extents))
    };
    let source = SourceWriter::new("cuda.reduce")
        .body(ELEMENTS)
        .line(&format!("typedef {} T;", element(x.dtype)))
        .line(extents.index_type())
        .body(&text)
        .finish();
    let addresses = [node.operands[0], Operand::Value(node.results[0])].map(Argument::Address);
    let mut launch = in_order(source, elements(y).ceil_div(results));
    launch.threads = threads;
    Some(Planned::one(launch.args(addresses).args(extents.arguments()?)))
}

/// Start value, fold of an element, fold of two parts, end of a result.
fn functions(op: &Reduce) -> String {
    let (start, fold) = match op.function {
        ReduceFn::Sum | ReduceFn::Mean => ("0.0f", "a + b"),
        ReduceFn::Max => ("__uint_as_float(0xff800000u)", "fmaxf(a, b)"),
        ReduceFn::Min => ("__uint_as_float(0x7f800000u)", "fminf(a, b)"),
    };
    let end = if op.function == ReduceFn::Mean { "v / n" } else { "v" };
    format!(
        "DEVICE float start() {{ return {start}; }}
DEVICE float fold(float a, float b) {{ return {fold}; }}
DEVICE float finish(float v, float n) {{ return {end}; }}
"
    )
}

/// Sizes and strides of the kept and of the reduced runs.
fn parts(runs: &[Run], reduced: bool, extents: &mut Extents<'_>) -> (Vec<String>, Vec<String>) {
    let part: Vec<&Run> = runs.iter().filter(|r| r.reduced == reduced).collect();
    (extents.texts(part.iter().map(|r| &r.extent)), extents.texts(part.iter().map(|r| &r.stride)))
}

fn offset(prefix: &str, strides: &[String]) -> String {
    let terms: Vec<String> = strides.iter().enumerate().map(|(i, s)| format!("{prefix}{i} * {s}")).collect();
    if terms.is_empty() { "0".to_string() } else { terms.join(" + ") }
}

/// Results a block, and the text.
fn by_rows(op: &Reduce, runs: &[Run], count: &Dim, size: usize, extents: &mut Extents<'_>) -> (i64, String) {
    let reduced: Vec<&Run> = runs.iter().filter(|r| r.reduced).collect();
    let lanes: i64 = if extents.most(count) <= 2048 { 32 } else { 256 };
    // Elements that follow each other in one run are loaded together.
    let pack = match reduced.as_slice() {
        [run] => common_unit(16 / size.max(2) as u64, [&run.extent]),
        _ => 1,
    };
    let (kept_sizes, kept_strides) = parts(runs, false, extents);
    let (sizes, strides) = parts(runs, true, extents);
    let groups = 256 / lanes;
    let text = format!(
        "{functions}constexpr int LANES = {lanes}, GROUPS = {groups}, V = {pack};
extern \"C\" __global__ void __launch_bounds__(256) KERNEL(const T *x, T *y{parameters}) {{
    __shared__ float scratch[8];
    wait_for_predecessor();
    release_successor();
    const Index results = {results}, count = {count};
    const Index at = (Index)blockIdx.x * GROUPS + threadIdx.x / LANES;
    float v = start();
    if (at < results) {{
{split_kept}    x += {kept};
    for (Index i = threadIdx.x % LANES * V; i < count; i += LANES * V) {{
{split}        const Pack<T, V> pack = load_pack<T, V>(x + {offset});
#pragma unroll
        for (int j = 0; j < V; ++j) v = fold(v, to_f32(pack.at[j]));
    }}
    }}
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) v = fold(v, __shfl_xor_sync(0xffffffffu, v, lane));
    if (LANES > 32) {{
        if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
        __syncthreads();
        v = scratch[0];
        for (int w = 1; w < 8; ++w) v = fold(v, scratch[w]);
    }}
    if (at < results && threadIdx.x % LANES == 0) y[at] = from_f32<T>(finish(v, (float)count));
}}",
        functions = functions(op),
        parameters = extents.parameters(),
        results = product_text(&kept_sizes),
        count = product_text(&sizes),
        split_kept = split_text("at", "k", &kept_sizes),
        kept = offset("k", &kept_strides),
        split = split_text("i", "r", &sizes),
        offset = offset("r", &strides),
    );
    (groups, text)
}

/// Text for blocks of `threads` threads with 32 results, which lines of threads share.
fn by_columns(op: &Reduce, runs: &[Run], threads: u32, extents: &mut Extents<'_>) -> String {
    let (kept_sizes, kept_strides) = parts(runs, false, extents);
    let (sizes, strides) = parts(runs, true, extents);
    // Neighbouring results stay neighbours in every reduced element if the innermost run says so.
    let pack = runs.last().map_or(1, |r| common_unit(4, [&r.extent]));
    format!(
        "{functions}constexpr int V = {pack}, LANES = 32 / V, LINES = {threads} / LANES;
extern \"C\" __global__ void __launch_bounds__({threads}) KERNEL(const T *x, T *y{parameters}) {{
    __shared__ float parts[LINES][32];
    wait_for_predecessor();
    release_successor();
    const Index results = {results}, count = {count};
    const int lane = threadIdx.x % LANES, line = threadIdx.x / LANES;
    const Index at = (Index)blockIdx.x * 32 + lane * V;
    float v[V];
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = start();
    if (at < results) {{
{split_kept}    x += {kept};
#pragma unroll 8
    for (Index i = line; i < count; i += LINES) {{
{split}        const Pack<T, V> pack = load_pack<T, V>(x + {offset});
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = fold(v[j], to_f32(pack.at[j]));
    }}
    }}
#pragma unroll
    for (int j = 0; j < V; ++j) parts[line][lane * V + j] = v[j];
    const int column = threadIdx.x % 32;
    for (int half = LINES / 2; half > 0; half /= 2) {{
        __syncthreads();
        for (int l = threadIdx.x / 32; l < half; l += {threads} / 32) {{
            parts[l][column] = fold(parts[l][column], parts[l + half][column]);
        }}
    }}
    __syncthreads();
    const Index result = (Index)blockIdx.x * 32 + column;
    if (threadIdx.x < 32 && result < results) y[result] = from_f32<T>(finish(parts[0][column], (float)count));
}}",
        functions = functions(op),
        parameters = extents.parameters(),
        results = product_text(&kept_sizes),
        count = product_text(&sizes),
        split_kept = split_text("at", "k", &kept_sizes),
        kept = offset("k", &kept_strides),
        split = split_text("i", "r", &sizes),
        offset = offset("r", &strides),
    )
}
