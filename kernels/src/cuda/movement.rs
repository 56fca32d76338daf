//! Ops that move elements: reshape, transpose, broadcast, slice, concat, gather, embedding, scatter, iota.
//!
//! Indices are data. One outside its axis would be an error on the host; here reads go to the nearest element that
//! exists and writes do not happen, so that no kernel leaves its buffers.

use millrace_ir::ops::movement::{Broadcast, Concat, Iota, Slice, Transpose};
use millrace_ir::{DType, Dim, Node, Op, Operand};

use super::copy::{Copy, in_order, unit_type};
use super::plan::{Argument, Planned, Site, SiteLaunch, elements};
use super::pointwise::ELEMENTS;
use super::source::{SourceWriter, type_name};
use super::space::{Extents, common_unit, element, product_text, same_memory, split_text, strides};

const THREADS: u32 = 256;

/// Plans the ops of this family. `None` for element types smaller than a byte (except views) and extents beyond 32 bits.
pub fn plan(site: Site<'_>, node: &Node) -> Option<Planned> {
    match &*node.op {
        Op::Reshape(_) => reshape(site, node),
        Op::Transpose(op) => transpose(site, node, op),
        Op::Broadcast(op) => broadcast(site, node, op),
        Op::Slice(op) => slice(site, node, op),
        Op::Concat(op) => concat(site, node, op),
        Op::Gather(op) => gather(site, node, op.axis),
        Op::Embedding(_) => gather(site, node, 0),
        Op::Scatter(op) => scatter(site, node, op.axis),
        Op::Iota(op) => iota(site, node, op),
        _ => None,
    }
}

fn size(dtype: DType) -> Option<u64> {
    dtype.size_bytes().map(|s| s as u64)
}

fn zero() -> Dim {
    Dim::from(0u64)
}

/// A copy of `bytes` bytes.
fn whole(family: &'static str, site: Site<'_>, from: Operand, node: &Node) -> Option<SiteLaunch> {
    let bytes = site.ty(from).bytes();
    let one = Dim::from(1u64);
    let copy = Copy {
        extents: vec![bytes],
        from: vec![one.clone()],
        to: vec![one],
        from_base: zero(),
        to_base: zero(),
        size: 1,
    };
    copy.launch(family, site.module, from, node.results[0])
}

/// Nothing where the result has the operand's memory, otherwise a copy.
fn reshape(site: Site<'_>, node: &Node) -> Option<Planned> {
    if same_memory(site.module, node.operands[0], node.results[0]) {
        return Some(Planned::always(Vec::new()));
    }
    Some(Planned::one(whole("cuda.copy", site, node.operands[0], node)?))
}

fn transpose(site: Site<'_>, node: &Node, op: &Transpose) -> Option<Planned> {
    let (x, y) = (site.operand_ty(node, 0), site.result_ty(node, 0));
    let of = strides(&x.shape);
    let copy = Copy {
        extents: y.shape.clone().to_vec(),
        from: op.perm.iter().map(|p| of[*p].clone()).collect(),
        to: strides(&y.shape),
        from_base: zero(),
        to_base: zero(),
        size: size(x.dtype)?,
    };
    Some(Planned::one(copy.launch("cuda.transpose", site.module, node.operands[0], node.results[0])?))
}

fn broadcast(site: Site<'_>, node: &Node, _: &Broadcast) -> Option<Planned> {
    let (x, y) = (site.operand_ty(node, 0), site.result_ty(node, 0));
    let of = strides(&x.shape);
    let missing = y.rank() - x.rank();
    let one = Dim::from(1u64);
    let from = (0..y.rank())
        .map(|axis| match axis.checked_sub(missing) {
            Some(i) if x.shape[i] != one => of[i].clone(),
            _ => zero(),
        })
        .collect();
    let copy = Copy {
        extents: y.shape.clone().to_vec(),
        from,
        to: strides(&y.shape),
        from_base: zero(),
        to_base: zero(),
        size: size(x.dtype)?,
    };
    Some(Planned::one(copy.launch("cuda.broadcast", site.module, node.operands[0], node.results[0])?))
}

fn slice(site: Site<'_>, node: &Node, op: &Slice) -> Option<Planned> {
    let (x, y) = (site.operand_ty(node, 0), site.result_ty(node, 0));
    let mut from = strides(&x.shape);
    let from_base = op.start.mul(&from[op.axis]);
    from[op.axis] = from[op.axis].mul(&Dim::from(op.step));
    let copy = Copy {
        extents: y.shape.clone().to_vec(),
        from,
        to: strides(&y.shape),
        from_base,
        to_base: zero(),
        size: size(x.dtype)?,
    };
    Some(Planned::one(copy.launch("cuda.slice", site.module, node.operands[0], node.results[0])?))
}

/// One launch an operand.
fn concat(site: Site<'_>, node: &Node, op: &Concat) -> Option<Planned> {
    let y = site.result_ty(node, 0);
    let to = strides(&y.shape);
    let mut start = zero();
    let mut launches = Vec::new();
    for (index, operand) in node.operands.iter().enumerate() {
        let x = site.operand_ty(node, index);
        let copy = Copy {
            extents: x.shape.clone().to_vec(),
            from: strides(&x.shape),
            to: to.clone(),
            from_base: zero(),
            to_base: start.mul(&to[op.axis]),
            size: size(x.dtype)?,
        };
        launches.push(copy.launch("cuda.concat", site.module, *operand, node.results[0])?);
        start = start.add(&x.shape[op.axis]);
    }
    Some(Planned::always(launches))
}

fn product(shape: &[Dim]) -> Dim {
    shape.iter().fold(Dim::from(1u64), |n, d| n.mul(d))
}

/// Slices of a tensor along an axis as `[outer, extent, inner]` units.
struct Slices {
    outer: Dim,
    extent: Dim,
    /// In units.
    inner: Dim,
    /// Bytes of a unit.
    unit: u64,
}

impl Slices {
    fn new(shape: &[Dim], axis: usize, size: u64) -> Self {
        let inner = product(&shape[axis + 1..]);
        let unit = common_unit(16 / size, [&inner]);
        let outer = product(&shape[..axis]);
        Slices { outer, extent: shape[axis].clone(), inner: inner.ceil_div(unit as i64), unit: unit * size }
    }
}

fn gather(site: Site<'_>, node: &Node, axis: usize) -> Option<Planned> {
    let (x, ids) = (site.operand_ty(node, 0), site.operand_ty(node, 1));
    let slices = Slices::new(&x.shape, axis, size(x.dtype)?);
    let result = Operand::Value(node.results[0]);
    let mut extents = Extents::new(site.module);
    extents.covers(x);
    extents.covers_operand(result);
    let count = elements(ids);
    let sizes = extents.texts([&slices.outer, &count, &slices.inner]);
    let extent = extents.text(&slices.extent);
    let unit = unit_type(slices.unit);
    let text = format!(
        "typedef {unit} Unit;
extern \"C\" __global__ void __launch_bounds__({THREADS}) KERNEL(const Unit *x, const {ids} *ids, Unit *y{parameters}) {{
    wait_for_predecessor();
    release_successor();
    const Index total = {total};
    const Index at = (Index)blockIdx.x * {THREADS} + threadIdx.x;
    if (at >= total) return;
{split}    const i64 extent = (i64)({extent});
    i64 row = ids[c1];
    // An index outside the axis reads the nearest row.
    row = row < 0 ? 0 : row >= extent ? extent - 1 : row;
    if (extent > 0) y[at] = x[(c0 * (Index)extent + (Index)row) * ({inner}) + c2];
}}",
        ids = type_name(ids.dtype),
        parameters = extents.parameters(),
        total = product_text(&sizes),
        split = split_text("at", "c", &sizes),
        inner = sizes[2],
    );
    let source = SourceWriter::new("cuda.gather").line(extents.index_type()).body(&text).finish();
    let blocks = slices.outer.mul(&count).mul(&slices.inner).ceil_div(i64::from(THREADS));
    let addresses =
        [Argument::Address(node.operands[0]), Argument::Address(node.operands[1]), Argument::Address(result)];
    Some(Planned::one(in_order(source, blocks).args(addresses).args(extents.arguments()?)))
}

/// A copy unless the result has the operand's memory; then one block per index and 1024 units of its slice, which
/// leaves the work to a later block with the same index if there is one.
fn scatter(site: Site<'_>, node: &Node, axis: usize) -> Option<Planned> {
    let (x, ids) = (site.operand_ty(node, 0), site.operand_ty(node, 1));
    let slices = Slices::new(&x.shape, axis, size(x.dtype)?);
    let result = Operand::Value(node.results[0]);
    let mut launches = Vec::new();
    if !same_memory(site.module, node.operands[0], node.results[0]) {
        launches.push(whole("cuda.copy", site, node.operands[0], node)?);
    }
    let mut extents = Extents::new(site.module);
    extents.covers(x);
    extents.covers_operand(node.operands[2]);
    let count = elements(ids);
    // Slices of all outer places are one run of `outer * inner` units to divide among blocks.
    let run = slices.outer.mul(&slices.inner);
    let sizes = extents.texts([&count, &run, &slices.inner, &slices.extent]);
    let [count_text, run_text, inner, extent] = &sizes[..] else { return None };
    let text = format!(
        "typedef {unit} Unit;
extern \"C\" __global__ void __launch_bounds__({THREADS}) KERNEL(const {ids} *ids, const Unit *updates, Unit *y{parameters}) {{
    wait_for_predecessor();
    release_successor();
    const Index count = {count_text}, run = {run_text}, inner = {inner};
    const i64 extent = (i64)({extent});
    const Index chunks = (run + 1023) / 1024;
    const Index index = (Index)blockIdx.x / chunks, chunk = (Index)blockIdx.x % chunks;
    const i64 row = ids[index];
    // The last of equal indices wins.
    bool last = row >= 0 && row < extent;
    for (Index other = index + 1 + threadIdx.x; other < count; other += {THREADS}) last &= ids[other] != row;
    if (!__syncthreads_and(last)) return;
    const Index end = min(run, (chunk + 1) * 1024);
    for (Index at = chunk * 1024 + threadIdx.x; at < end; at += {THREADS}) {{
        const Index outer = at / inner, rest = at % inner;
        y[(outer * (Index)extent + (Index)row) * inner + rest] = updates[(outer * count + index) * inner + rest];
    }}
}}",
        unit = unit_type(slices.unit),
        ids = type_name(ids.dtype),
        parameters = extents.parameters(),
    );
    let source = SourceWriter::new("cuda.scatter").line(extents.index_type()).body(&text).finish();
    let blocks = count.mul(&run.ceil_div(1024));
    let addresses =
        [Argument::Address(node.operands[1]), Argument::Address(node.operands[2]), Argument::Address(result)];
    launches.push(in_order(source, blocks).args(addresses).args(extents.arguments()?));
    Some(Planned::always(launches))
}

fn iota(site: Site<'_>, node: &Node, op: &Iota) -> Option<Planned> {
    let y = site.result_ty(node, 0);
    size(y.dtype)?;
    let mut extents = Extents::new(site.module);
    extents.covers(y);
    let shape = [product(&y.shape[..op.axis]), y.shape[op.axis].clone(), product(&y.shape[op.axis + 1..])];
    let sizes = extents.texts(&shape);
    let text = format!(
        "extern \"C\" __global__ void __launch_bounds__({THREADS}) KERNEL({ty} *y{parameters}) {{
    wait_for_predecessor();
    release_successor();
    const Index total = {total};
    const Index at = (Index)blockIdx.x * {THREADS} + threadIdx.x;
    if (at < total) y[at] = Narrow<{ty}>::of((double)(at / ({inner}) % ({extent})));
}}",
        ty = element(y.dtype),
        parameters = extents.parameters(),
        total = product_text(&sizes),
        inner = sizes[2],
        extent = sizes[1],
    );
    let source =
        SourceWriter::new("cuda.iota").body(ELEMENTS).line(extents.index_type()).body(&text).finish();
    let blocks = elements(y).ceil_div(i64::from(THREADS));
    let result = Argument::Address(Operand::Value(node.results[0]));
    Some(Planned::one(in_order(source, blocks).args([result]).args(extents.arguments()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Arch;
    use millrace_ir::ops::{Reshape, Scatter};
    use millrace_ir::{Builder, Module, Place, TensorType};

    fn launches(module: &Module) -> usize {
        let site = Site { module, nodes: &module.graph.order, arch: Arch::Sm80 };
        plan(site, site.node(0)).unwrap().variants[0].launches.len()
    }

    fn place(module: &mut Module, operand: Operand, place: Place) {
        let Operand::Value(value) = operand else { return };
        module.graph.values[value].place = Some(place);
    }

    #[test]
    fn memory_that_is_shared_is_not_copied() {
        let mut b = Builder::new("m");
        let x = b.input("x", TensorType::new(DType::F32, [4u64, 6]));
        let y = b.one(Reshape { shape: vec![Dim::from(24u64)].into() }, &[x], "y").unwrap();
        let mut module = b.finish();
        assert_eq!(launches(&module), 1);
        place(&mut module, x, Place::Output(0));
        place(&mut module, y, Place::Output(0));
        assert_eq!(launches(&module), 0);
        place(&mut module, y, Place::Output(1));
        assert_eq!(launches(&module), 1);
    }

    #[test]
    fn a_scatter_in_place_writes_the_updates_only() {
        let mut b = Builder::new("m");
        let x = b.input("x", TensorType::new(DType::BF16, [4u64, 6]));
        let ids = b.input("ids", TensorType::new(DType::I64, [2u64]));
        let updates = b.input("updates", TensorType::new(DType::BF16, [2u64, 6]));
        let y = b.one(Scatter { axis: 0 }, &[x, ids, updates], "y").unwrap();
        let mut module = b.finish();
        assert_eq!(launches(&module), 2);
        place(&mut module, x, Place::Output(0));
        place(&mut module, y, Place::Output(0));
        assert_eq!(launches(&module), 1);
    }
}
