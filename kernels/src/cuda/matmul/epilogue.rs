//! Text between the sums of a matmul kernel and memory: where a column's result lies, and the steps before its store.
//!
//! Every family writes the same steps, so a graph's numbers differ between families in the order of sums alone.

use std::fmt::Write;

use millrace_ir::DType;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::ops::unary::UnaryFn;

use super::problem::{Layout, Problem};
use crate::cuda::plan::Argument;
use crate::cuda::source::{SourceWriter, type_name};

/// Whether kernels read and write the element type.
pub fn computes(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// The function of the prelude that computes an activation.
fn activation(function: UnaryFn) -> Option<&'static str> {
    Some(match function {
        UnaryFn::Silu => "silu",
        UnaryFn::Gelu => "gelu",
        UnaryFn::GeluTanh => "gelu_tanh",
        UnaryFn::Relu => "relu",
        UnaryFn::Tanh => "tanhf",
        UnaryFn::Sigmoid => "sigmoid",
        _ => return None,
    })
}

/// What [`declare`] calls `PARAMETERS`, in order: addresses of operands of steps, of results, then the bounds of the tile
/// for launches that have one.
pub fn arguments(problem: &Problem<'_>) -> Vec<Argument> {
    let operands = problem.epilogue.iter().filter_map(|term| term.operand);
    let addresses = operands.chain(problem.results.iter().copied()).map(Argument::Address);
    addresses.chain(problem.tile_arguments()).collect()
}

/// Declares the types `T` of operands and `OUT` of results, `PARAMETERS` and their names `ARGUMENTS`, and
/// `finish(PARAMETERS, row, segment, feature, v, u)`: the steps of the sum `v` (with a gated epilogue of the sums `v` and
/// `u` of both segments) and the store.
///
/// `None` for steps that kernels do not know.
pub fn declare(writer: SourceWriter, problem: &Problem<'_>) -> Option<SourceWriter> {
    let first: Vec<usize> = problem
        .segments
        .iter()
        .scan(0, |at, n| {
            *at += n;
            Some(*at - n)
        })
        .collect();
    let (mut types, mut names) = (Vec::new(), Vec::new());
    let mut body = String::new();
    for (index, term) in problem.epilogue.iter().enumerate() {
        if term.operand.is_some() {
            types.push(format!("const T *e{index}"));
            names.push(format!("e{index}"));
        }
        let at = format!("to_f32(e{index}[(u64)row * {} + feature])", problem.segments[0]);
        let line = match term.step {
            Epilogue::Bias if problem.gated() => {
                format!("v += to_f32(e{index}[feature]); u += to_f32(e{index}[{} + feature]);", first[1])
            }
            Epilogue::Bias => format!("v += to_f32(e{index}[{} + feature]);", choose(&first)),
            Epilogue::Residual => format!("v += {at};"),
            Epilogue::Mul => format!("v *= {at};"),
            Epilogue::Activation(function) => format!("v = {}(v);", activation(function)?),
            Epilogue::Glu(function) => format!("v = {}(v) * u;", activation(function)?),
        };
        let _ = writeln!(body, "    {line}");
    }
    for index in 0..problem.results.len() {
        types.push(format!("OUT *y{index}"));
        names.push(format!("y{index}"));
        let width = problem.segments[index];
        let _ = writeln!(
            body,
            "    if (segment == {index}) y{index}[(u64)row * {width} + feature] = from_f32<OUT>(v);"
        );
    }
    if problem.tiles().is_some() {
        for name in ["tile_first", "tile_count"] {
            types.push(format!("int {name}"));
            names.push(name.into());
        }
    }
    Some(
        writer
            .line(&format!("typedef {} T;", type_name(problem.dtype)))
            .line(&format!("typedef {} OUT;", type_name(problem.out)))
            .line(&format!("#define PARAMETERS {}", types.join(", ")))
            .line(&format!("#define ARGUMENTS {}", names.join(", ")))
            .line("DEVICE void finish(PARAMETERS, int row, int segment, int feature, float v, float u) {")
            .line(&format!("{body}}}")),
    )
}

/// `touch(PARAMETERS, row, segment, feature)`: loads of 16-bit elements that `finish` reads, their values unused, so that
/// they are in the nearest cache when it does. `TOUCH` says whether there are any.
pub fn touch(writer: SourceWriter, problem: &Problem<'_>) -> SourceWriter {
    let mut body = String::new();
    for (index, term) in problem.epilogue.iter().enumerate() {
        if matches!(term.step, Epilogue::Residual | Epilogue::Mul) {
            let _ = writeln!(
                body,
                "    asm volatile(\"{{.reg .b16 t; ld.global.b16 t, [%0];}}\" ::\"l\"(e{index} + (u64)row * {} + feature));",
                problem.segments[0]
            );
        }
    }
    writer
        .int("TOUCH", i32::from(!body.is_empty()))
        .line("DEVICE void touch(PARAMETERS, int row, int segment, int feature) {")
        .line(&format!("{body}}}"))
}

/// An expression that picks by `segment`.
fn choose(values: &[usize]) -> String {
    let (last, rest) = values.split_last().map_or((0, [].as_slice()), |(l, r)| (*l, r));
    let mut text = String::from("(");
    for (index, value) in rest.iter().enumerate() {
        let _ = write!(text, "segment == {index} ? {value} : ");
    }
    let _ = write!(text, "{last})");
    text
}

/// `locate(panel, j, segment, at)`: the result of row `j` of a panel of a weight in [`Layout::Cores`]; false for padding.
pub fn locate_panels(writer: SourceWriter, problem: &Problem<'_>) -> SourceWriter {
    let mut text = String::from("DEVICE bool locate(int panel, int j, int &segment, int &at) {\n");
    if problem.gated() {
        let n = problem.segments[0];
        let _ = write!(text, "    segment = 0, at = panel / 2 * 8 + j;\n    return at < {n};\n}}");
        return writer.line(&text);
    }
    let mut first = 0;
    for (index, n) in problem.segments.iter().enumerate() {
        let end = first + n.div_ceil(8);
        let _ = writeln!(
            text,
            "    if (panel < {end}) {{ segment = {index}, at = (panel - {first}) * 8 + j; return at < {n}; }}"
        );
        first = end;
    }
    text.push_str("    return false;\n}");
    writer.line(&text)
}

/// `place(column, segment, feature)`: the result of a column over all segments, or of the one gated result;
/// `weight_row(column)` and `weight_step(k)`: where a weight's element lies in its layout.
pub fn locate_columns(writer: SourceWriter, problem: &Problem<'_>) -> SourceWriter {
    let mut place = String::from("DEVICE void place(int column, int &segment, int &feature) {\n");
    let mut row = String::from("DEVICE u64 weight_row(int column) {\n");
    let (mut first, mut panel) = (0, 0);
    for (index, n) in problem.segments.iter().enumerate() {
        let end = first + n;
        let from_panel = match problem.gated() {
            true => format!("(column - {first}) / 8 * 2 + {index}"),
            false => format!("(column - {first}) / 8 + {panel}"),
        };
        let _ = writeln!(
            place,
            "    if (column < {end}) {{ segment = {index}, feature = column - {first}; return; }}"
        );
        let _ = writeln!(
            row,
            "    if (column < {end}) return ((u64)({from_panel}) * K + (column - {first}) % 8) * 8;"
        );
        (first, panel) = (end, panel + n.div_ceil(8));
    }
    place.push_str("    segment = -1, feature = 0;\n}");
    row.push_str("    return 0;\n}");
    // ((panel * K) + j) * 8 is panel * K * 8 + j * 8.
    let step = match problem.layout {
        Layout::Rows => {
            row = "DEVICE u64 weight_row(int column) { return (u64)column * K; }".into();
            "DEVICE int weight_step(int k) { return k; }"
        }
        Layout::Cores => "DEVICE int weight_step(int k) { return k / 8 * 64 + k % 8; }",
    };
    let writer = writer.line(&place).line(&row).line(step);
    match problem.tiles() {
        Some(_) => writer.line(&slice_columns(problem)),
        None => writer,
    }
}

/// `slice_column(slice)`, the first column over all segments, or of the one gated result, that a slice of the weight along
/// axis 0 makes, and for the end of the weight the end of the columns; `SLICE`, elements of a slice.
fn slice_columns(problem: &Problem<'_>) -> String {
    let (elements, mut text) = match problem.layout {
        Layout::Rows => ("K", String::from("    return slice;\n")),
        Layout::Cores => ("8 * K", String::new()),
    };
    if problem.layout == Layout::Cores && problem.gated() {
        let _ = writeln!(text, "    return min({}, slice / 2 * 8);", problem.segments[0]);
    } else if problem.layout == Layout::Cores {
        let (mut first, mut panel) = (0, 0);
        for n in &problem.segments {
            let end = panel + n.div_ceil(8);
            let _ = writeln!(text, "    if (slice < {end}) return {first} + (slice - {panel}) * 8;");
            (first, panel) = (first + n, end);
        }
        let _ = writeln!(text, "    return {first};");
    }
    format!("constexpr int SLICE = {elements};\nDEVICE int slice_column(int slice) {{\n{text}}}")
}
