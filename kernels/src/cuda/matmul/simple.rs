//! Matmuls of every type, layout and extent by 64 x 64 tiles with f32 arithmetic: the path of f32 graphs, the fallback of
//! the others, and the twin that tests compare with.

use millrace_ir::ops::matmul::Matmul;
use millrace_ir::{Dim, Op, TensorType};

use super::epilogue::{arguments, computes, declare, locate_columns};
use super::norm;
use super::problem::{Layout, Problem};
use crate::cuda::plan::{Argument, Planned, Site, SiteLaunch};
use crate::cuda::source::{Promise, SourceWriter, type_name};

/// Edge of a tile of results.
const EDGE: i64 = 64;

/// The launches of a problem for any number of rows: the norm if there is one, then the matmul.
pub fn launches(problem: &Problem<'_>) -> Option<Vec<SiteLaunch>> {
    if !computes(problem.dtype) || !computes(problem.out) {
        return None;
    }
    let features = problem.features();
    let writer = SourceWriter::new("cuda.matmul.simple")
        .int("K", problem.k)
        .int("FEATURES", features)
        .int("GATED", i32::from(problem.gated()));
    let tiles = problem.tiles();
    let writer = locate_columns(declare(writer, problem)?, problem)
        .body_for(include_str!("simple.cu"), tiles.is_some());
    let source = writer.promise(Promise { registers: 0, no_local: true }).finish();
    // Columns that a slice of the weight makes at most.
    let columns = match problem.layout {
        Layout::Rows => 1u64,
        Layout::Cores if problem.gated() => 4,
        Layout::Cores => 8,
    };
    let columns = match tiles {
        Some(_) => problem.tile_slices().mul(&Dim::from(columns)),
        None => Dim::from(features),
    };
    let grid = [columns.ceil_div(EDGE), problem.m.ceil_div(EDGE), Dim::from(1u64)];
    let mut launch = SiteLaunch::new(source, grid, 256)
        .args([Argument::Address(problem.x), Argument::Address(problem.weight)])
        .args(arguments(problem))
        .args([Argument::I32(problem.m.clone())]);
    launch.dependent = problem.site.arch.has_tma();
    launch.tiles = tiles;
    Some(norm::launch(problem).into_iter().chain([launch]).collect())
}

/// `matmul` of two activations.
pub fn activations(site: Site<'_>) -> Option<Planned> {
    let node = site.only()?;
    let Op::Matmul(Matmul { transpose_b, .. }) = &*node.op else { return None };
    let (a, b, c) = (site.operand_ty(node, 0), site.operand_ty(node, 1), site.result_ty(node, 0));
    if !computes(a.dtype) || !computes(c.dtype) {
        return None;
    }
    let lead = &c.shape[..c.rank() - 2];
    let [m, n] = [&c.shape[c.rank() - 2], &c.shape[c.rank() - 1]];
    let names: Vec<String> = (0..lead.len()).map(|axis| format!("d{axis}")).collect();
    let declared: String = names.iter().map(|d| format!(", int {d}")).collect();
    let passed: String = names.iter().map(|d| format!(", {d}")).collect();
    let source = SourceWriter::new("cuda.matmul.batched")
        .line(&format!("typedef {} T;\ntypedef {} OUT;", type_name(a.dtype), type_name(c.dtype)))
        .int("TRANSPOSED", i32::from(*transpose_b))
        .line(&format!("#define EXTENTS {declared}"))
        .line(&format!("#define EXTENT_NAMES {passed}"))
        .line(&offsets(lead, a, b, &names))
        .body(include_str!("batched.cu"))
        .promise(Promise { registers: 0, no_local: true })
        .finish();
    let batch = lead.iter().fold(Dim::from(1u64), |all, d| all.mul(d));
    let grid = [n.ceil_div(EDGE).mul(&batch), m.ceil_div(EDGE), Dim::from(1u64)];
    let result = millrace_ir::Operand::Value(node.results[0]);
    let mut launch = SiteLaunch::new(source, grid, 256)
        .args([node.operands[0], node.operands[1], result].map(Argument::Address))
        .args([m, n, &a.last()].map(|d| Argument::I32(d.clone())))
        .args(lead.iter().map(|d| Argument::I32(d.clone())));
    launch.dependent = site.arch.has_tma();
    Some(Planned::one(launch))
}

/// `offsets(batch, a, b, d0, ..)`: which matrices of the operands a matrix of the result comes from.
fn offsets(lead: &[Dim], a: &TensorType, b: &TensorType, names: &[String]) -> String {
    let declared: String = names.iter().map(|d| format!(", int {d}")).collect();
    let mut text = format!("DEVICE void offsets(int batch, u64 &a, u64 &b{declared}) {{\n    a = b = 0;\n");
    let mut strides = [String::from("1"), String::from("1")];
    for axis in (0..lead.len()).rev() {
        text.push_str(&format!("    int i{axis} = batch % d{axis};\n    batch /= d{axis};\n"));
        for ((name, ty), stride) in [("a", a), ("b", b)].into_iter().zip(&mut strides) {
            let own = axis as i64 - (lead.len() as i64 - (ty.rank() as i64 - 2));
            let extent = usize::try_from(own).ok().map(|own| &ty.shape[own]);
            // An extent that differs from the result's is 1.
            if extent.is_some_and(|e| *e == lead[axis]) {
                text.push_str(&format!("    {name} += (u64)i{axis} * ({stride});\n"));
                stride.push_str(&format!(" * d{axis}"));
            }
        }
    }
    text.push('}');
    text
}
