//! Whether two modules compute the same: both run by the reference evaluator on the same random inputs.
//!
//! Fusion leaves roundings out, so results are compared up to a tolerance: 1e-5 relative to 1 + |x|, and 0.05 where a
//! module computes in 16 bits.

use millrace_ir::eval::evaluate;
use millrace_ir::tensor::Tensor;
use millrace_ir::weights::{WeightReader, normal};
use millrace_ir::{Bindings, DType, Error, Id, Kind, Module, Result, Sym, TensorType, WeightExpr};

/// Largest value of a symbol in [`small_bindings`], where its minimum allows.
const SMALL: u64 = 8;

/// The hints of a module's symbols, cut down so that evaluating takes little time.
pub fn small_bindings(module: &Module) -> Bindings {
    let mut bindings = Bindings::new();
    for decl in &module.dims {
        let wanted = decl.hint.unwrap_or(decl.max).min(decl.min.max(SMALL));
        let value = wanted.next_multiple_of(decl.multiple.max(1));
        bindings.set(decl.sym, value.min(decl.max));
    }
    bindings
}

fn tensor(ty: &TensorType, bindings: &Bindings, seed: u64) -> Result<Tensor> {
    let shape = ty.shape_at(bindings);
    let shape: Option<Vec<usize>> = shape.map(|s| s.into_iter().map(|d| d as usize).collect());
    let mut tensor = shape.and_then(|s| Tensor::zeros(ty.dtype, &s)).ok_or_else(|| {
        Error::new(Kind::BadInput, "compare/shape", format!("an input of type {ty} is too large"))
    })?;
    for (i, v) in tensor.data.iter_mut().enumerate() {
        let noise = normal(seed, i as u64);
        *v = if ty.dtype.is_float() { noise } else { noise.abs().floor() };
    }
    tensor.round();
    Ok(tensor)
}

/// Random inputs. Index inputs of packed graphs need values that fit together; they are told by their names.
///
/// # Errors
/// `compare/shape` for an input that is too large.
pub fn inputs(module: &Module, bindings: &Bindings) -> Result<Vec<Tensor>> {
    let rows = Sym::new("t").and_then(|s| bindings.get(s)).unwrap_or(0) as usize;
    let input = |(index, (name, ty)): (usize, (&str, &TensorType))| {
        let mut t = tensor(ty, bindings, 11 + index as u64)?;
        let n = t.data.len();
        for (i, v) in t.data.iter_mut().enumerate() {
            match name {
                "seq_starts" => *v = (i * rows / (n - 1).max(1)) as f64,
                "kv_lens" => *v = ((i + 1) * rows / n - i * rows / n) as f64,
                "positions" | "block_table" => *v = i as f64,
                _ => {}
            }
        }
        Ok(t)
    };
    module.input_types().into_iter().enumerate().map(input).collect()
}

/// Random contents of the states.
///
/// # Errors
/// As [`inputs`].
pub fn states(module: &Module, bindings: &Bindings) -> Result<Vec<Tensor>> {
    module.states.iter().map(|(_, s)| tensor(&s.ty, bindings, 5)).collect()
}

/// The module's outputs at `bindings`, on random inputs.
///
/// # Errors
/// As the evaluator.
pub fn outputs(module: &Module, bindings: &Bindings) -> Result<Vec<Tensor>> {
    let mut states = states(module, bindings)?;
    evaluate(module, &mut WeightReader::new(module), &inputs(module, bindings)?, &mut states)
}

/// Compares results with those of `before`.
///
/// # Errors
/// `compare/mismatch` with the first value that differs.
pub fn same(before: &Module, expected: &[Tensor], found: &[Tensor]) -> Result<()> {
    let narrow = before.graph.values.iter().any(|(_, v)| matches!(v.ty.dtype, DType::BF16 | DType::F16));
    let tolerance = if narrow { 0.05 } else { 1e-5 };
    let differs = |message: String| Error::new(Kind::Mismatch, "compare/mismatch", message);
    if expected.len() != found.len() {
        return Err(differs(format!("{} outputs became {}", expected.len(), found.len())));
    }
    for ((e, f), output) in expected.iter().zip(found).zip(&before.graph.outputs) {
        if (e.dtype, &e.shape) != (f.dtype, &f.shape) {
            return Err(differs(format!("{} {:?} became {} {:?}", e.dtype, e.shape, f.dtype, f.shape))
                .at(format!("output \"{}\"", output.name)));
        }
        for (at, (x, y)) in e.data.iter().zip(&f.data).enumerate() {
            let same = x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= tolerance * (1.0 + x.abs());
            if !same {
                let message = format!("element {at} is {y}, and was {x} before");
                return Err(differs(message).at(format!("output \"{}\"", output.name)));
            }
        }
    }
    Ok(())
}

/// Runs both modules at `bindings` and compares their outputs.
///
/// # Errors
/// `compare/mismatch`, or the error of an evaluation that fails on one side.
pub fn same_outputs(before: &Module, after: &Module, bindings: &Bindings) -> Result<()> {
    same(before, &outputs(before, bindings)?, &outputs(after, bindings)?)
}

/// Replaces weights that stand in files by random ones, so that a module evaluates without its checkpoint. Integers
/// become zero, which is a legal index.
pub fn detach_files(module: &mut Module) -> usize {
    let mut count = 0;
    for (id, weight) in module.weights.iter_mut() {
        if matches!(weight.expr, WeightExpr::File { .. }) {
            count += 1;
            weight.expr = match weight.ty.dtype.is_float() {
                true => WeightExpr::Random { seed: id.index() as u64, std: 0.1 },
                false => WeightExpr::Splat(0.0),
            };
        }
    }
    count
}
