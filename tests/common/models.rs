//! Helpers of model tests: compile a folder to a temporary engine, run steps, read references.
#![allow(dead_code)]

use std::path::PathBuf;

use millrace::compiler::Registry;
use millrace::compiler::import::Precision;
use millrace::compiler::pipeline::Pipeline;
use millrace::generation::{StepInputs, StepModel};
use millrace::ir::DType;
use millrace::{CompileOptions, Engine, compile};
use serde_json::Value;

/// A path below the repository's root.
pub fn root(path: &str) -> PathBuf {
    let root = std::env::var_os("MILLRACE_SUITE_ROOT");
    root.map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from).join(path)
}

/// JSON from a file below the repository's root.
pub fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root(path)).unwrap()).unwrap()
}

/// A list of numbers.
pub fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// A list of token ids.
pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// An engine of a model folder with arithmetic in `dtype`.
pub fn engine(folder: &str, dtype: DType, adjust: impl FnOnce(&mut CompileOptions)) -> Engine {
    let mut options = CompileOptions::default();
    options.import.precision = Precision::Fixed(dtype);
    adjust(&mut options);
    let file = tempfile::Builder::new().suffix(".engine").tempfile().unwrap();
    let compiled = compile(&root(folder), &options, None).unwrap();
    compiled.write(file.path(), &mut |_, _| {}).unwrap();
    Engine::open(file.path()).unwrap()
}

/// Level 2 with `pass` between fusion and packing.
pub fn with_pass(pass: &str) -> Pipeline {
    let mut pipeline = Pipeline::level(2);
    pipeline.insert(&format!("before:pack-weights={pass}"), &Registry::standard()).unwrap();
    pipeline
}

/// One prefill of `prompt` from an empty cache; the logits of `rows`.
pub fn prefill(model: &mut impl StepModel, prompt: &[u32], rows: &[i32]) -> Vec<Vec<f32>> {
    let limits = model.limits();
    let n = prompt.len();
    let pages = n.div_ceil(limits.tokens_per_block);
    let inputs = StepInputs {
        token_ids: prompt.iter().map(|t| *t as i32).collect(),
        positions: (0..n as i32).collect(),
        seq_starts: vec![0, n as i32],
        kv_lens: vec![n as i32],
        block_table: (0..pages as i32).collect(),
        pages_per_seq: pages,
        logit_rows: rows.to_vec(),
    };
    let mut logits = Vec::new();
    model.step(&inputs, &mut logits).unwrap();
    logits.chunks_exact(limits.vocab_size).map(<[f32]>::to_vec).collect()
}

/// Asserts that all pairs differ by at most `tolerance`.
pub fn assert_close(found: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(*f) - e).abs() <= tolerance, "{what} [{i}]: {f} instead of {e}");
    }
}
