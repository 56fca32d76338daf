//! Elementwise ops: functions, casts, selections and whole regions, with broadcasting.
//!
//! The result's axes are merged wherever every operand runs through them alike; on what remains, a thread computes a
//! pack of neighbouring elements along the innermost axis, loaded and stored 16 bytes at a time. A thread reads all its
//! elements of all operands before it writes, so a result may have the memory of an operand of its shape.
//!
//! Addresses of operands and results are multiples of 16 bytes.

use std::fmt::Write;

use millrace_ir::ops::pointwise::{Source, Step};
use millrace_ir::{DType, Dim, Node, Op};

use super::body;
use super::plan::{Argument, Planned, Site, SiteLaunch, elements};
use super::regions;
use super::source::SourceWriter;
use super::space::{Extents, common_unit, divisible, element, product_text, split_text};

const THREADS: u32 = 256;

/// Conversions of element types.
pub(super) const ELEMENTS: &str = include_str!("elements.cu");
pub(super) const FUNCTIONS: &str = include_str!("functions.cu");

/// Plans unary and binary functions, casts, selections and regions. `None` for element types smaller than a byte and
/// extents beyond 32 bits.
pub fn plan(site: Site<'_>, node: &Node) -> Option<Planned> {
    let operands: Vec<DType> = (0..node.operands.len()).map(|i| site.operand_ty(node, i).dtype).collect();
    let results: Vec<DType> = (0..node.results.len()).map(|i| site.result_ty(node, i).dtype).collect();
    let steps = |body: &[Step], out: &[Source]| body::write(body, out, &operands, &results);
    let (family, text) = match &*node.op {
        Op::Unary(u) => {
            ("cuda.pointwise", steps(&[Step::Unary(u.function, Source::Input(0))], &[Source::Step(0)])?)
        }
        Op::Binary(b) => {
            let step = Step::Binary(b.function, Source::Input(0), Source::Input(1));
            ("cuda.pointwise", steps(&[step], &[Source::Step(0)])?)
        }
        Op::Cast(_) => ("cuda.cast", steps(&[], &[Source::Input(0)])?),
        // Elements are moved, not converted.
        Op::Select(_) if operands.iter().all(|d| d.size_bytes().is_some()) => {
            ("cuda.select", "    y0 = x0.bits != 0 ? x1 : x2;\n".to_string())
        }
        Op::Pointwise(p) if p.has_rows() => return regions::plan(site, node, p),
        Op::Pointwise(p) => {
            let out: Vec<Source> = p.out.iter().map(|o| o.source).collect();
            ("cuda.pointwise", steps(&p.body, &out)?)
        }
        _ => return None,
    };
    let map = Map { family, text: &text, operands: &operands, results: &results };
    map.plan(site, node)
}

/// An elementwise function over broadcast operands.
struct Map<'a> {
    family: &'static str,
    /// Statements over `x0`, .. and `y0`, ...
    text: &'a str,
    operands: &'a [DType],
    results: &'a [DType],
}

/// An axis of the merged space: its extent, and which operands run along it.
struct Axis {
    extent: Dim,
    runs: Vec<bool>,
}

/// Merges axes along which the same operands run. At least one axis results.
fn merge(shape: &[Dim], operands: &[&[Dim]], fits: impl Fn(&Dim) -> bool) -> Vec<Axis> {
    let one = Dim::from(1u64);
    let mut axes: Vec<Axis> = Vec::new();
    for (axis, extent) in shape.iter().enumerate().filter(|(_, d)| **d != one) {
        let runs: Vec<bool> = operands
            .iter()
            .map(|s| (axis + s.len()).checked_sub(shape.len()).is_some_and(|i| s[i] != one))
            .collect();
        match axes.last_mut() {
            Some(last) if last.runs == runs && fits(&last.extent.mul(extent)) => {
                last.extent = last.extent.mul(extent);
            }
            _ => axes.push(Axis { extent: extent.clone(), runs }),
        }
    }
    if axes.is_empty() {
        axes.push(Axis { extent: one, runs: vec![true; operands.len()] });
    }
    axes
}

impl Map<'_> {
    fn plan(&self, site: Site<'_>, node: &Node) -> Option<Planned> {
        let result = site.result_ty(node, 0);
        let shapes: Vec<&[Dim]> =
            (0..node.operands.len()).map(|i| site.operand_ty(node, i).shape.as_slice()).collect();
        let mut extents = Extents::new(site.module);
        extents.covers(result);
        let axes = merge(&result.shape, &shapes, |d| d.as_const().is_some() || extents.argument_fits(d));
        let bytes = |d: &DType| d.bits() / 8;
        let narrowest = self.operands.iter().chain(self.results).map(bytes).min().unwrap_or(4);
        let widest = self.results.iter().map(bytes).max().unwrap_or(4);
        // Results that are wider than the rest are stored 16 bytes at a time.
        let unit = if self.operands.iter().all(|d| bytes(d) < widest) { widest } else { narrowest };
        let most = (16 / unit.max(1)).clamp(1, 8) as u64;
        let inner = &axes[axes.len() - 1].extent;
        let ragged = axes.len() == 1 && !divisible(inner, most);
        let pack = if axes.len() == 1 { most } else { common_unit(most, [inner]) };
        let text = self.kernel(&axes, pack, ragged, &mut extents);
        let function = self.function();
        let source = SourceWriter::new(self.family)
            .body(ELEMENTS)
            .line(&format!("#define FAST {}", u8::from(body::approximate(self.results))))
            .body(FUNCTIONS)
            .line(extents.index_type())
            .body(&function)
            .body(&text)
            .finish();
        let addresses = node.operands.iter().copied().map(Argument::Address);
        let results = node.results.iter().map(|r| Argument::Address(millrace_ir::Operand::Value(*r)));
        let blocks = elements(result).ceil_div(pack as i64 * i64::from(THREADS));
        let one = || Dim::from(1u64);
        let mut launch = SiteLaunch::new(source, [blocks, one(), one()], THREADS);
        launch.dependent = true;
        Some(Planned::one(launch.args(addresses).args(results).args(extents.arguments()?)))
    }

    /// `compute(x0, .., y0, ..)`.
    fn function(&self) -> String {
        let operands = self.operands.iter().enumerate().map(|(i, d)| format!("const {} x{i}", element(*d)));
        let results = self.results.iter().enumerate().map(|(i, d)| format!("{} &y{i}", element(*d)));
        let parameters: Vec<String> = operands.chain(results).collect();
        format!("DEVICE void compute({}) {{\n{}}}", parameters.join(", "), self.text)
    }

    fn call(&self, operand: impl Fn(usize) -> String, result: impl Fn(usize) -> String) -> String {
        let operands = (0..self.operands.len()).map(operand);
        let args: Vec<String> = operands.chain((0..self.results.len()).map(result)).collect();
        format!("compute({});", args.join(", "))
    }

    fn kernel(&self, axes: &[Axis], pack: u64, ragged: bool, extents: &mut Extents<'_>) -> String {
        let last = axes.len() - 1;
        let sizes = extents.texts(axes.iter().map(|a| &a.extent));
        let operands = self.operands.iter().enumerate().map(|(i, d)| format!("const {} *a{i}", element(*d)));
        let results = self.results.iter().enumerate().map(|(i, d)| format!("{} *r{i}", element(*d)));
        let parameters: Vec<String> = operands.chain(results).collect();
        let mut text = format!(
            "extern \"C\" __global__ void __launch_bounds__({THREADS}) KERNEL({}{}) {{\n    wait_for_predecessor();\n    \
             release_successor();\n    const Index total = {};\n    const Index at = ((Index)blockIdx.x * {THREADS} + \
             threadIdx.x) * {pack};\n    if (at >= total) return;\n",
            parameters.join(", "),
            extents.parameters(),
            product_text(&sizes),
        );
        if last > 0 {
            text += &split_text("at", "c", &sizes);
        }
        for i in 0..self.operands.len() {
            let mut terms = Vec::new();
            for axis in (0..axes.len()).filter(|axis| axes[*axis].runs[i]) {
                let mut factors = vec![if last == 0 { "at".to_string() } else { format!("c{axis}") }];
                factors.extend((axis + 1..=last).filter(|a| axes[*a].runs[i]).map(|a| sizes[a].clone()));
                terms.push(factors.join(" * "));
            }
            let offset = if terms.is_empty() { "0".to_string() } else { terms.join(" + ") };
            let _ = writeln!(text, "    a{i} += {offset};");
        }
        for i in 0..self.results.len() {
            let _ = writeln!(text, "    r{i} += at;");
        }
        let runs = |i: usize| axes[last].runs[i];
        if ragged {
            let scalar = self
                .call(|i| if runs(i) { format!("a{i}[i]") } else { format!("*a{i}") }, |i| format!("y{i}"));
            let _ = writeln!(
                text,
                "    if (at + {pack} > total) {{\n        for (int i = 0; i < (int)(total - at); ++i) {{"
            );
            for (i, dtype) in self.results.iter().enumerate() {
                let _ = writeln!(text, "            {} y{i};", element(*dtype));
            }
            let _ = writeln!(text, "            {scalar}");
            (0..self.results.len()).for_each(|i| {
                let _ = writeln!(text, "            r{i}[i] = y{i};");
            });
            text += "        }\n        return;\n    }\n";
        }
        for (i, dtype) in self.operands.iter().enumerate() {
            let ty = element(*dtype);
            let load = if runs(i) {
                format!("load_pack<{ty}, {pack}>(a{i})")
            } else {
                format!("splat<{ty}, {pack}>(*a{i})")
            };
            let _ = writeln!(text, "    const Pack<{ty}, {pack}> v{i} = {load};");
        }
        for (i, dtype) in self.results.iter().enumerate() {
            let _ = writeln!(text, "    Pack<{}, {pack}> w{i};", element(*dtype));
        }
        let call = self.call(|i| format!("v{i}.at[i]"), |i| format!("w{i}.at[i]"));
        let _ = writeln!(text, "#pragma unroll\n    for (int i = 0; i < {pack}; ++i) {call}");
        for (i, dtype) in self.results.iter().enumerate() {
            let _ = writeln!(text, "    store_pack<{}, {pack}>(r{i}, w{i});", element(*dtype));
        }
        text + "}"
    }
}
