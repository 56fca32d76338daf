//! Pointwise regions with rows: elementwise steps and reductions of rows in one kernel.
//!
//! A row belongs to a warp, a long one to a block. It is visited once for each phase of the region, and elements of steps are
//! computed again from the operands, so that nothing is kept between phases but what there is one of in a row. Reductions are in
//! `float`, or in `double` where integers take part, in an order that does not depend on other rows.
//!
//! Result 0 may have the memory of operand 0: a thread reads an element before it writes it, and no other thread does.

use millrace_ir::ops::pointwise::Pointwise;
use millrace_ir::{DType, Dim, Node, Operand, TensorType};

use super::body;
use super::plan::{Argument, Planned, Site, SiteLaunch};
use super::pointwise::{ELEMENTS, FUNCTIONS};
use super::source::SourceWriter;
use super::space::{Extents, element, product_text, split_text};

const THREADS: u32 = 256;

/// Columns up to which a warp has a row.
const WARP_COLUMNS: i64 = 2048;

/// Start and fold of a reduction by its number in `ReduceFn`: sum, mean, max, min.
const REDUCTIONS: &str = "
template <int F> DEVICE float start() {
    return F == 2 ? __uint_as_float(0xff800000u) : F == 3 ? __uint_as_float(0x7f800000u) : 0.0f;
}
template <int F> DEVICE float fold(float a, float b) { return F == 2 ? fmaxf(a, b) : F == 3 ? fminf(a, b) : a + b; }
template <int F> DEVICE double fold(double a, double b) { return F == 2 ? fmax(a, b) : F == 3 ? fmin(a, b) : a + b; }
// Over the threads of a row; all of them get the result.
template <int F, typename N> DEVICE N over_row(N v, double *scratch) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) v = fold<F>(v, __shfl_xor_sync(0xffffffffu, v, lane));
    if (LANES == 32) return v;
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    v = (N)scratch[0];
    for (int w = 1; w < LANES / 32; ++w) v = fold<F>(v, (N)scratch[w]);
    return v;
}
";

/// Plans a region with rows. `None` for element types smaller than a byte and extents beyond 32 bits.
pub(super) fn plan(site: Site<'_>, node: &Node, region: &Pointwise) -> Option<Planned> {
    let types: Vec<TensorType> = (0..node.operands.len()).map(|i| site.operand_ty(node, i).clone()).collect();
    let dtypes: Vec<DType> = types.iter().map(|ty| ty.dtype).collect();
    let shape = Pointwise::shape(&types).ok()?;
    let (columns, leading) = shape.split_last()?;
    let once: Vec<bool> = types.iter().map(|ty| Pointwise::is_per_row(&ty.shape)).collect();
    let steps = body::write_rows(region, &region.phases(&once), &dtypes)?;
    let mut extents = Extents::new(site.module);
    extents.covers(&TensorType { dtype: DType::F32, shape: shape.clone() });
    let lanes = if extents.most(columns) <= WARP_COLUMNS { 32 } else { THREADS };
    let sizes = extents.texts(leading);
    let width = extents.text(columns);
    let operands = dtypes.iter().enumerate().map(|(i, d)| format!("const {} *a{i}", element(*d)));
    let results = region.dtypes.iter().enumerate().map(|(i, d)| format!("{} *r{i}", element(*d)));
    let parameters: Vec<String> = operands.chain(results).collect();
    let mut places = String::new();
    if !sizes.is_empty() {
        places += &split_text("row", "c", &sizes);
    }
    for (i, ty) in types.iter().enumerate() {
        places += &format!("    a{i} += {};\n", offset(ty, &shape, &sizes, &width));
    }
    for (i, out) in region.out.iter().enumerate() {
        places += &if out.per_row {
            format!("    r{i} += row;\n")
        } else {
            format!("    r{i} += row * columns;\n")
        };
    }
    let text = format!(
        "extern \"C\" __global__ void __launch_bounds__({THREADS}) KERNEL({parameters}{more}) {{
    __shared__ double scratch[LANES / 32];
    wait_for_predecessor();
    release_successor();
    const Index row = (Index)blockIdx.x * {groups} + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const Index columns = {width};
    if (row >= {rows}) return;
{places}{steps}}}",
        parameters = parameters.join(", "),
        more = extents.parameters(),
        groups = THREADS / lanes,
        rows = product_text(&sizes),
    );
    let source = SourceWriter::new("cuda.pointwise.rows")
        .body(ELEMENTS)
        .line(&format!("#define FAST {}", u8::from(body::approximate(&region.dtypes))))
        .body(FUNCTIONS)
        .line(extents.index_type())
        .int("LANES", lanes)
        .line(if lanes == 32 {
            "#define SYNCHRONIZE __syncwarp()"
        } else {
            "#define SYNCHRONIZE __syncthreads()"
        })
        .body(REDUCTIONS)
        .body(&text)
        .finish();
    let addresses = node.operands.iter().copied().map(Argument::Address);
    let results = node.results.iter().map(|r| Argument::Address(Operand::Value(*r)));
    let rows = leading.iter().fold(Dim::from(1u64), |n, d| n.mul(d));
    let one = || Dim::from(1u64);
    let mut launch =
        SiteLaunch::new(source, [rows.ceil_div(i64::from(THREADS / lanes)), one(), one()], THREADS);
    launch.dependent = true;
    Some(Planned::one(launch.args(addresses).args(results).args(extents.arguments()?)))
}

/// Where the row of coordinates `c0`, `c1`, .. begins in an operand.
fn offset(ty: &TensorType, shape: &[Dim], sizes: &[String], width: &str) -> String {
    let one = Dim::from(1u64);
    let (rank, missing) = (ty.shape.len(), shape.len() - ty.shape.len());
    let extent = |axis: usize| if axis + 1 == rank { width } else { sizes[missing + axis].as_str() };
    let runs = |axis: &usize| ty.shape[*axis] != one;
    let terms: Vec<String> = (0..rank.saturating_sub(1))
        .filter(runs)
        .map(|axis| {
            let factors = (axis + 1..rank).filter(runs).map(|a| format!(" * {}", extent(a)));
            format!("c{}{}", missing + axis, factors.collect::<String>())
        })
        .collect();
    if terms.is_empty() { "0".to_string() } else { terms.join(" + ") }
}

#[cfg(test)]
mod tests {
    use millrace_ir::text::parse;

    use super::*;
    use crate::cuda::{Arch, plan_site};

    fn planned(columns: &str) -> Planned {
        let text = format!(
            "module @m phase fused {{\n  dim $t in 1..=100 hint 3\n  graph @main(%0 \"x\": bf16[$t, 3, {columns}], %1 \"s\": \
             i32[3, 1]) -> (\"y\": bf16[$t, 3, {columns}], \"n\": f32[$t, 3, 1]) {{\n    %2, %3 = pointwise %0, %1 {{body = \
             [reduce_max(i0), sub(i0, t0), exp(t1), reduce_sum(t2), div(t2, t3), mul(t4, i1)], out = [t5, row(t3)], dtypes = \
             [bf16, f32]}} : bf16[$t, 3, {columns}], f32[$t, 3, 1]\n    return %2, %3\n  }}\n}}\n"
        );
        let module = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        plan_site(Site { module: &module, nodes: &[module.graph.order[0]], arch: Arch::Sm90a }).unwrap()
    }

    #[test]
    fn a_row_is_visited_once_for_each_phase() {
        let planned = planned("40");
        let launch = &planned.variants[0].launches[0];
        let text = &launch.source.text;
        assert_eq!(text.matches("c < columns; c += LANES").count(), 3, "{text}");
        assert!(text.contains("const float t3 = over_row<0>(s3, scratch);"), "{text}");
        // The operand of integers is read once a row, and what it is multiplied with becomes a double.
        assert_eq!(text.matches("number(a1[0])").count(), 1);
        assert!(text.contains("const double t5 = (double)t4 * n1;"), "{text}");
        assert!(
            text.contains("    a0 += c0 * (Index)3 * (Index)40 + c1 * (Index)40;\n    a1 += c1;\n"),
            "{text}"
        );
        assert!(text.contains("if (lane == 0) r1[0] = Narrow<float>::of(t3);"), "{text}");
        assert!(text.contains("LANES = 32;") && launch.dependent);
    }

    #[test]
    fn long_rows_belong_to_blocks() {
        assert!(planned("5000").variants[0].launches[0].source.text.contains("LANES = 256;"));
    }
}
