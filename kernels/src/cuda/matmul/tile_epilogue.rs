//! Text between the accumulators of a tile and memory, for `epilogue.cu`: where panels of the result are, and the steps
//! before the store.
//!
//! Kernels of many rows hold tiles in the layout of tensor cores; this module knows nothing of how they were computed.

use std::fmt::Write;

use millrace_ir::Dim;
use millrace_ir::launch::tile_first;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::ops::unary::UnaryFn;

use super::problem::Problem;
use crate::cuda::plan::Argument;

/// `POINTER_PARAMETERS` in order: addresses of operands of the epilogue, of results, then the bounds of the tile for
/// launches that have one.
pub fn arguments(problem: &Problem<'_>) -> Vec<Argument> {
    let operands = problem.epilogue.iter().filter_map(|t| t.operand);
    let addresses = operands.chain(problem.results.iter().copied()).map(Argument::Address);
    let mut arguments: Vec<Argument> = addresses.chain(problem.tile_arguments()).collect();
    if problem.tiles().is_some() {
        // End of the panels of results. A parameter is an operand of the comparisons with it and takes no register.
        let end = Dim::from(tile_first()).add(&problem.tile_slices());
        arguments.push(Argument::I32(if problem.gated() { end.ceil_div(2) } else { end }));
    }
    arguments
}

/// What `epilogue.cu` asks for: constants, `Pointers`, `place_of`, `operand_of`, `bias_pointer` and `finish`. `None` for steps
/// that it does not know.
pub fn declare(problem: &Problem<'_>) -> Option<String> {
    let gated = problem.gated();
    let widths = if gated { &problem.segments[..1] } else { &problem.segments[..] };
    if widths.len() != problem.results.len() {
        return None;
    }
    let mut parameters = Vec::new();
    let (mut bias, mut matrices) = (None, Vec::new());
    for (index, term) in problem.epilogue.iter().enumerate().filter(|(_, t)| t.operand.is_some()) {
        let name = format!("operand{index}");
        parameters.push((format!("const ELEMENT *{name}"), name.clone()));
        match term.step {
            Epilogue::Bias if bias.is_some() => return None,
            Epilogue::Bias => bias = Some(name),
            _ => matrices.push(name),
        }
    }
    for index in 0..widths.len() {
        parameters.push((format!("OUT *result{index}"), format!("result{index}")));
    }
    // Divisions within two units in the last place; the exact ones take more than a percent of a gated matmul.
    let mut text = String::from(
        "DEVICE float fast_sigmoid(float v) { return __fdividef(1.0f, 1.0f + __expf(-v)); }\n\
         DEVICE float fast_silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }\n",
    );
    let mut line = |args: std::fmt::Arguments<'_>| {
        // Writing to a string has no reason to fail.
        let _ = text.write_fmt(args);
        text.push('\n');
    };
    line(format_args!("constexpr int GATED = {};", i32::from(gated)));
    line(format_args!("constexpr int BIAS = {};", i32::from(bias.is_some())));
    line(format_args!("constexpr int OPERANDS = {};", matrices.len()));
    let light = problem.epilogue.len() == 1 && matrices.len() == 1;
    line(format_args!("constexpr int LIGHT = {};", i32::from(light)));
    line(format_args!("constexpr int ALIGNED = {};", i32::from(problem.segments.iter().all(|s| s % 8 == 0))));
    let tiled = problem.tiles().is_some();
    if tiled {
        line(format_args!(
            "// The results end where the panels of the launch do; whoever asks has its `Pointers` as `p`."
        ));
        line(format_args!("#define OUT_PANELS p.end"));
    } else {
        let panels: usize = widths.iter().map(|w| w.div_ceil(8)).sum();
        line(format_args!("constexpr int OUT_PANELS = {panels};"));
    }
    line(format_args!("constexpr int SECOND = {};", problem.segments[0]));
    let join = |parts: Vec<&str>, by: &str| parts.join(by);
    let mut declared: Vec<&str> = parameters.iter().map(|p| p.0.as_str()).collect();
    let mut names: Vec<&str> = parameters.iter().map(|p| p.1.as_str()).collect();
    let mut members = declared.clone();
    if tiled {
        members.push("int end");
        declared.extend(["int tile_first", "int tile_count", "int out_end"]);
        names.push("out_end");
    }
    line(format_args!("struct Pointers {{ {}; }};", join(members, "; ")));
    line(format_args!("#define POINTER_PARAMETERS {}", join(declared, ", ")));
    line(format_args!("#define POINTERS Pointers{{{}}}", join(names, ", ")));
    let at = bias.as_ref().map_or("(const ELEMENT *)0".to_string(), |b| format!("p.{b}"));
    line(format_args!("DEVICE const ELEMENT *bias_pointer(const Pointers &p) {{ return {at}; }}"));
    line(format_args!("// Operand `q` of the shape of the result."));
    let chosen =
        matrices.iter().enumerate().rev().fold("(const ELEMENT *)0".to_string(), |rest, (q, name)| {
            format!("q == {q} ? p.{name} : {rest}")
        });
    line(format_args!("DEVICE const ELEMENT *operand_of(const Pointers &p, int q) {{ return {chosen}; }}"));
    line(format_args!(
        "// Where panel `panel` of the results is: result, its width, first column, position of the segment"
    ));
    line(format_args!("// in the bias."));
    line(format_args!("struct Place {{ OUT *result; int width, column, first; }};"));
    line(format_args!("DEVICE Place place_of(const Pointers &p, int panel) {{"));
    let (mut panel, mut first) = (0, 0);
    for (index, width) in widths.iter().enumerate() {
        let end = panel + width.div_ceil(8);
        let guard = if index + 1 < widths.len() { format!("if (panel < {end}) ") } else { String::new() };
        line(format_args!(
            "    {guard}return Place{{p.result{index}, {width}, (panel - {panel}) * 8, {first}}};"
        ));
        (panel, first) = (end, first + width);
    }
    line(format_args!("}}"));
    line(format_args!(
        "// The steps: accumulators of the column and, if gated, of the second segment's; biases; operands."
    ));
    line(format_args!("DEVICE float finish(float v, float u, float bias, float second, const float *o) {{"));
    let mut operand = 0;
    for term in &problem.epilogue {
        match term.step {
            Epilogue::Bias if gated => line(format_args!("    v += bias, u += second;")),
            Epilogue::Bias => line(format_args!("    v += bias;")),
            Epilogue::Activation(f) => line(format_args!("    v = {}(v);", activation(f)?)),
            Epilogue::Glu(f) => line(format_args!("    v = {}(v) * u;", activation(f)?)),
            Epilogue::Residual | Epilogue::Mul => {
                let sign = if term.step == Epilogue::Mul { '*' } else { '+' };
                line(format_args!("    v {sign}= o[{operand}];"));
                operand += 1;
            }
        }
    }
    line(format_args!("    return v;\n}}"));
    Some(text)
}

/// The function that computes an activation.
fn activation(f: UnaryFn) -> Option<&'static str> {
    Some(match f {
        UnaryFn::Silu => "fast_silu",
        UnaryFn::Gelu => "gelu",
        UnaryFn::GeluTanh => "gelu_tanh",
        UnaryFn::Relu => "relu",
        UnaryFn::Tanh => "tanhf",
        UnaryFn::Sigmoid => "fast_sigmoid",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::large::tests::{module, with};
    use super::*;
    use crate::cuda::Arch;

    #[test]
    fn segments_are_places_and_positions_in_the_bias() {
        let module = module("bf16", 64, &[64, 16, 16], "bias, relu");
        let text = with(Arch::Sm80, &module, |problem| declare(&problem)).unwrap();
        assert!(text.contains("if (panel < 8) return Place{p.result0, 64, (panel - 0) * 8, 0};"));
        assert!(text.contains("if (panel < 10) return Place{p.result1, 16, (panel - 8) * 8, 64};"));
        assert!(text.contains("    return Place{p.result2, 16, (panel - 10) * 8, 80};"));
        assert!(text.contains("    v += bias;\n    v = relu(v);\n    return v;"));
        assert!(text.contains("constexpr int OUT_PANELS = 12;"));
    }

    #[test]
    fn a_gated_epilogue_takes_the_second_segment() {
        let module = module("bf16", 64, &[40, 40], "bias, glu(gelu), residual");
        let text = with(Arch::Sm90a, &module, |problem| declare(&problem)).unwrap();
        assert!(text.contains("constexpr int SECOND = 40;"));
        assert!(text.contains("constexpr int OUT_PANELS = 5;"));
        assert!(
            text.contains("    v += bias, u += second;\n    v = gelu(v) * u;\n    v += o[0];\n    return v;")
        );
        assert!(text.contains("{ return q == 0 ? p.operand2 : (const ELEMENT *)0; }"));
    }

    #[test]
    fn widths_that_are_no_whole_panels() {
        let module = module("f16", 64, &[12, 7], "");
        let text = with(Arch::Sm80, &module, |problem| declare(&problem)).unwrap();
        assert!(text.contains("constexpr int ALIGNED = 0;"));
        assert!(text.contains("if (panel < 2) return Place{p.result0, 12, (panel - 0) * 8, 0};"));
        assert!(text.contains("    return Place{p.result1, 7, (panel - 2) * 8, 12};"));
    }
}
