//! Test helpers: one op on constant shapes, with its inferred types checked against what it computes.

use super::Op;
use super::def::EvalCtx;
use crate::attr::Attrs;
use crate::dim::Bindings;
use crate::dtype::DType;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// An f32 tensor.
pub fn f32s(shape: &[usize], values: &[f64]) -> Tensor {
    Tensor::from_values(DType::F32, shape, values.to_vec()).unwrap()
}

/// An i32 tensor.
pub fn i32s(shape: &[usize], values: &[f64]) -> Tensor {
    Tensor::from_values(DType::I32, shape, values.to_vec()).unwrap()
}

/// Values 0.1, 0.2, .. with changing sign, so that no two elements agree.
pub fn ramp(shape: &[usize]) -> Tensor {
    let n = shape.iter().product::<usize>();
    let values: Vec<f64> =
        (0..n).map(|i| (i as f64 + 1.0) / 10.0 * if i % 3 == 1 { -1.0 } else { 1.0 }).collect();
    f32s(shape, &values)
}

fn types(operands: &[Tensor]) -> Vec<TensorType> {
    operands.iter().map(|t| TensorType::new(t.dtype, t.shape.iter().copied())).collect()
}

/// Infers, evaluates, checks shapes and element types, and that attributes read back.
pub fn run(op: impl Into<Op>, operands: &[Tensor]) -> Vec<Tensor> {
    let op = op.into();
    let Attrs(attrs) = op.attrs();
    assert_eq!(Op::from_text(op.name(), &Attrs(attrs)), Some(Ok(op.clone())), "attributes read back");
    let results = op.infer(&types(operands)).unwrap();
    let refs: Vec<&Tensor> = operands.iter().collect();
    let ctx = EvalCtx { operands: &refs, results: &results, bindings: &Bindings::new() };
    let out = op.eval(&ctx).unwrap();
    assert_eq!(types(&out), results, "results have the inferred types");
    assert!(out.iter().all(|t| t.data.len() == t.shape.iter().product::<usize>()));
    out
}

/// The message with which inference refuses the operands.
pub fn fails(op: impl Into<Op>, operands: &[Tensor]) -> String {
    op.into().infer(&types(operands)).unwrap_err()
}

/// The message with which evaluation refuses the values.
pub fn fails_eval(op: impl Into<Op>, operands: &[Tensor]) -> String {
    let op = op.into();
    let results = op.infer(&types(operands)).unwrap();
    let refs: Vec<&Tensor> = operands.iter().collect();
    op.eval(&EvalCtx { operands: &refs, results: &results, bindings: &Bindings::new() }).unwrap_err()
}

/// Asserts equality up to a relative error of 1e-9.
pub fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= 1e-9 * (1.0 + b.abs()), "element {i}: {a} instead of {b}");
    }
}
