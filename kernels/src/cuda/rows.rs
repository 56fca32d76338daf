//! Rows: rms_norm, layer_norm, both with a residual addition before, l2_normalize, softmax along any axis.
//!
//! A row is held in registers by as few threads as have 32 to 64 bytes each to load, from 4 threads to a block of 1024;
//! rows of unknown or very large extent are read once a pass. Sums are in f32, in a fixed order that does not depend on
//! other rows. Results may have the memory of the first operand.

use millrace_ir::ops::add_norm::NormKind;
use millrace_ir::{Dim, Node, Op, Operand};

use super::copy::in_order;
use super::plan::{Argument, Planned, Site, SiteLaunch, rows};
use super::pointwise::ELEMENTS;
use super::source::{Promise, SourceWriter};
use super::space::{Extents, common_unit, element};

const BODY: &str = include_str!("rows.cu");

/// What a row becomes.
#[derive(Clone, Copy, PartialEq)]
enum Function {
    Rms,
    Layer,
    L2,
    Softmax,
}

/// Operands and results by role.
struct Roles {
    function: Function,
    eps: f64,
    added: Option<Operand>,
    weight: Option<Operand>,
    bias: Option<Operand>,
    sum: bool,
}

/// Plans the ops of this family for float element types of at least a byte.
pub fn plan(site: Site<'_>, node: &Node) -> Option<Planned> {
    let operand = |index: usize| node.operands.get(index).copied();
    let plain = |function, eps| Roles { function, eps, added: None, weight: None, bias: None, sum: false };
    let roles = match &*node.op {
        Op::RmsNorm(op) => Roles { weight: operand(1), ..plain(Function::Rms, op.eps) },
        Op::LayerNorm(op) => Roles { weight: operand(1), bias: operand(2), ..plain(Function::Layer, op.eps) },
        Op::AddNorm(op) => {
            let function = if op.kind == NormKind::Rms { Function::Rms } else { Function::Layer };
            let added = operand(1);
            Roles { added, weight: operand(2), bias: operand(3), sum: op.sum, ..plain(function, op.eps) }
        }
        Op::L2Normalize(op) => plain(Function::L2, op.eps),
        Op::Softmax(op) if op.axis + 1 == site.result_ty(node, 0).rank() => plain(Function::Softmax, 0.0),
        Op::Softmax(op) => return columns(site, node, op.axis),
        _ => return None,
    };
    roles.plan(site, node, None)
}

/// Plans an rms_norm with a given division.
#[cfg(test)]
pub(super) fn plan_divided(site: Site<'_>, node: &Node, division: Division) -> Option<Planned> {
    let Op::RmsNorm(op) = &*node.op else { return None };
    let (added, bias) = (None, None);
    let weight = node.operands.get(1).copied();
    let roles = Roles { function: Function::Rms, eps: op.eps, added, weight, bias, sum: false };
    roles.plan(site, node, Some(division))
}

/// How a row is divided among threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Division {
    /// Threads of a block.
    pub threads: u32,
    /// Threads of a row.
    pub lanes: u32,
    /// Packs a thread holds, 0 to loop.
    pub packs: u32,
}

/// The division of a row of `width` elements, `None` if unknown, in packs of `pack` elements of `size` bytes.
pub(super) fn divide(width: Option<u64>, pack: u64, size: u64) -> Division {
    let looped = Division { threads: 256, lanes: 256, packs: 0 };
    let Some(width) = width else { return looped };
    let units = width.div_ceil(pack);
    // Packs that make 64 bytes, and at most 32 numbers in registers.
    let most = (64 / (pack * size)).clamp(1, 32 / pack);
    for lanes in [4u32, 8, 16, 32] {
        let packs = units.div_ceil(u64::from(lanes)) as u32;
        if u64::from(packs) <= if lanes == 32 { most } else { most.min(2) } {
            return Division { threads: 128, lanes, packs };
        }
    }
    for threads in [128u32, 256, 512, 1024] {
        let packs = units.div_ceil(u64::from(threads));
        if packs <= most.min(2) || (threads == 1024 && packs * pack <= 32) {
            return Division { threads, lanes: threads, packs: packs as u32 };
        }
    }
    Division { threads: 1024, lanes: 1024, packs: 0 }
}

impl Roles {
    fn plan(&self, site: Site<'_>, node: &Node, division: Option<Division>) -> Option<Planned> {
        let ty = site.operand_ty(node, 0);
        if !ty.dtype.is_float() {
            return None;
        }
        let size = ty.dtype.size_bytes()? as u64;
        let width = ty.last();
        let pack = common_unit(16 / size.max(2), [&width]);
        let constant = width.as_const().and_then(|w| u64::try_from(w).ok());
        let division = division.unwrap_or_else(|| divide(constant, pack, size));
        self.launch(site, node, division, pack)
    }

    fn launch(&self, site: Site<'_>, node: &Node, division: Division, pack: u64) -> Option<Planned> {
        let ty = site.operand_ty(node, 0);
        let width = ty.last();
        let rows = rows(ty);
        let extents = Extents::new(site.module);
        if !extents.argument_fits(&rows) || !extents.argument_fits(&width) {
            return None;
        }
        let Division { threads, lanes, packs } = division;
        let source = SourceWriter::new("cuda.rows")
            .body(ELEMENTS)
            .line(&format!("typedef {} T;", element(ty.dtype)))
            .int("OP", self.function as u8)
            .int("WIDTH", width.as_const().unwrap_or(0))
            .int("V", pack)
            .int("THREADS", threads)
            .int("LANES", lanes)
            .int("PACKS", packs)
            .line(&format!(
                "constexpr bool ADD = {}, SUM = {}, BIAS = {};",
                self.added.is_some(),
                self.sum,
                self.bias.is_some()
            ))
            .float("EPS", self.eps as f32)
            .body(BODY)
            .promise(Promise { registers: 0, no_local: true })
            .finish();
        // Kernels that have no use for an address get one that exists.
        let x = node.operands[0];
        let result = |index: usize| Operand::Value(node.results[index]);
        let (sum, normed) = if self.sum { (result(0), result(1)) } else { (result(0), result(0)) };
        let or = |operand: Option<Operand>| operand.unwrap_or(x);
        let addresses = [x, or(self.added), or(self.weight), or(self.bias), sum, normed];
        let blocks = rows.ceil_div(i64::from(threads / lanes));
        let mut launch = SiteLaunch::new(source, [blocks, Dim::from(1u64), Dim::from(1u64)], threads);
        launch.dependent = true;
        let numbers = [Argument::I32(rows), Argument::I32(width)];
        Some(Planned::one(launch.args(addresses.map(Argument::Address)).args(numbers)))
    }
}

/// Softmax along an axis that is not the last: blocks of 32 neighbouring columns, which 8 lines of threads share.
fn columns(site: Site<'_>, node: &Node, axis: usize) -> Option<Planned> {
    let ty = site.operand_ty(node, 0);
    if !ty.dtype.is_float() {
        return None;
    }
    let product = |shape: &[Dim]| shape.iter().fold(Dim::from(1u64), |n, d| n.mul(d));
    let (outer, inner) = (product(&ty.shape[..axis]), product(&ty.shape[axis + 1..]));
    let mut extents = Extents::new(site.module);
    extents.covers(ty);
    let [outer_text, extent, inner_text] = [&outer, &ty.shape[axis], &inner].map(|d| extents.text(d));
    let text = format!(
        "typedef {ty} T;
extern \"C\" __global__ void __launch_bounds__(256) KERNEL(const T *x, T *y{parameters}) {{
    __shared__ float tops[8][32], sums[8][32];
    wait_for_predecessor();
    release_successor();
    const Index inner = {inner_text}, extent = {extent};
    const int lane = threadIdx.x % 32, line = threadIdx.x / 32;
    const Index at = (Index)blockIdx.x * 32 + lane;
    const bool live = at < {outer_text} * inner;
    const Index start = live ? at / inner * extent * inner + at % inner : 0;
    const Index end = live ? extent : 0;
    x += start;
    y += start;
    float top = __uint_as_float(0xff800000u), sum = 0.0f;
#pragma unroll 4
    for (Index i = line; i < end; i += 8) top = fmaxf(top, to_f32(x[i * inner]));
    tops[line][lane] = top;
    __syncthreads();
    for (int l = 0; l < 8; ++l) top = fmaxf(top, tops[l][lane]);
#pragma unroll 4
    for (Index i = line; i < end; i += 8) sum += expf(to_f32(x[i * inner]) - top);
    sums[line][lane] = sum;
    __syncthreads();
    sum = sums[0][lane];
    for (int l = 1; l < 8; ++l) sum += sums[l][lane];
    const float factor = 1.0f / sum;
#pragma unroll 4
    for (Index i = line; i < end; i += 8) y[i * inner] = from_f32<T>(expf(to_f32(x[i * inner]) - top) * factor);
}}",
        ty = element(ty.dtype),
        parameters = extents.parameters(),
    );
    let source =
        SourceWriter::new("cuda.softmax.axis").body(ELEMENTS).line(extents.index_type()).body(&text).finish();
    let addresses = [node.operands[0], Operand::Value(node.results[0])].map(Argument::Address);
    let blocks = outer.mul(&inner).ceil_div(32);
    Some(Planned::one(in_order(source, blocks).args(addresses).args(extents.arguments()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_covered_by_what_threads_hold() {
        for width in (1..3000).chain([4096, 8192, 16384, 50257, 32768, 128256]) {
            for (pack, size) in [(8u64, 2u64), (4, 4), (1, 2), (1, 4), (8, 1)] {
                let d = divide(Some(width), pack, size);
                assert!(d.threads.is_multiple_of(d.lanes) && d.threads.is_multiple_of(32), "{width} {d:?}");
                let held = u64::from(d.lanes * d.packs) * pack;
                assert!(d.packs == 0 || held >= width, "{width} {d:?}");
                assert!(u64::from(d.packs) * pack <= 32, "{width} {d:?}");
            }
        }
        assert_eq!(divide(Some(4096), 8, 2), Division { threads: 256, lanes: 256, packs: 2 });
        assert_eq!(divide(Some(128), 8, 2), Division { threads: 128, lanes: 8, packs: 2 });
        assert_eq!(divide(None, 8, 2).packs, 0);
    }
}
