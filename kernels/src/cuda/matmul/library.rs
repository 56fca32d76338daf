//! Products by a library of the device in place of kernels: what there is to ask it, for a measurement to choose.
//!
//! The library is cuBLASLt. It takes a weight that lies row by row, and computes a product with a bias, a residual
//! or both; each segment of the weight is a product of its own, since its results lie apart. Everything else, weights in
//! cores, gates, activations and weights that come in parts, stays with our kernels, which are also there for every site that
//! names the library. A *way* is one of the algorithms that the library itself suggests, by their order.

use millrace_ir::launch::Product;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::{Bindings, DType, Operand};

use super::choice::RowRange;
use super::norm;
use super::problem::{Layout, Problem};
use crate::cuda::plan::SiteLibrary;

/// Suggestions of the library that are measured.
pub const SUGGESTIONS: u32 = 4;

/// What names of ways begin with.
const NAME: &str = "cublaslt-";

/// Bytes to which the parts of a weight and of a bias are aligned, as its kernels want them.
const ALIGN: usize = 16;

/// The name of a way.
pub fn name(suggestion: u32) -> String {
    format!("{NAME}{suggestion}")
}

/// The way of a name.
pub fn suggestion(text: &str) -> Option<u32> {
    (0..SUGGESTIONS).find(|s| name(*s) == text)
}

/// Names of the ways of a problem; none where the library does not serve it.
pub fn names(problem: &Problem<'_>) -> Vec<String> {
    match operands(problem) {
        Some(_) => (0..SUGGESTIONS).map(name).collect(),
        None => Vec::new(),
    }
}

/// Bias and residual, if the library serves the problem.
fn operands(problem: &Problem<'_>) -> Option<(Option<Operand>, Option<Operand>)> {
    let float = |d: DType| matches!(d, DType::F32 | DType::F16 | DType::BF16);
    // 16-bit sums of f32 operands are not among what every version computes.
    let types = problem.out == problem.dtype || problem.out == DType::F32;
    let small = i32::try_from(problem.k).is_ok() && i32::try_from(problem.n()).is_ok();
    let held = matches!(problem.weight, Operand::Weight(_));
    if problem.layout != Layout::Rows || !float(problem.dtype) || !types || !small || !held || problem.k == 0
    {
        return None;
    }
    let of_result = |operand: Option<Operand>| operand.filter(|o| problem.site.ty(*o).dtype == problem.out);
    let (bias, residual) = match problem.epilogue.as_slice() {
        [] => (None, None),
        [one] => match one.step {
            Epilogue::Bias => (Some(of_result(one.operand)?), None),
            Epilogue::Residual => (None, Some(of_result(one.operand)?)),
            _ => return None,
        },
        [bias, residual] if (bias.step, residual.step) == (Epilogue::Bias, Epilogue::Residual) => {
            (Some(of_result(bias.operand)?), Some(of_result(residual.operand)?))
        }
        _ => return None,
    };
    if residual.is_some() && problem.segments.len() > 1 {
        return None;
    }
    let mut first = 0;
    for segment in &problem.segments {
        let weight = first * problem.k * problem.dtype.size_bytes()?;
        let starts = weight.is_multiple_of(ALIGN)
            && (bias.is_none() || (first * problem.out.size_bytes()?).is_multiple_of(ALIGN));
        if *segment == 0 || !starts {
            return None;
        }
        first += segment;
    }
    Some((bias, residual))
}

/// What runs the problem by suggestion number `suggestion` for the rows of a range: the norm in front, then a product for each
/// segment.
pub fn run(problem: &Problem<'_>, rows: RowRange, suggestion: u32) -> Option<SiteLibrary> {
    let (bias, residual) = operands(problem)?;
    if suggestion >= SUGGESTIONS || problem.results.len() != problem.segments.len() {
        return None;
    }
    let most = problem.m.extent(&Bindings::maxima(&problem.site.module.dims)).unwrap_or(u64::MAX);
    let mut first = 0;
    let mut products = Vec::new();
    for (segment, y) in problem.segments.iter().zip(&problem.results) {
        products.push(Product {
            x: problem.x,
            weight: problem.weight,
            first,
            y: *y,
            bias,
            residual,
            rows: problem.m.clone(),
            n: *segment as u64,
            k: problem.k as u64,
            dtype: problem.dtype,
            out: problem.out,
            suggestion,
            at: rows.at.min(most).max(1),
        });
        first += *segment as u64;
    }
    Some(SiteLibrary { before: norm::launch(problem).into_iter().collect(), products })
}

#[cfg(test)]
#[path = "library_tests.rs"]
mod tests;
