//! Runs a node of given shapes and types on the CPU every way it can run, and compares with the op's definition; and what
//! types and shapes are drawn from.

use std::sync::LazyLock;

use millrace_ir::builder::Builder;
use millrace_ir::ops::{EvalCtx, Numerics};
use millrace_ir::tensor::Tensor;
use millrace_ir::{Bindings, DType, Dim, Id, Kernel, KernelId, Module, Op, Operand, Place, TensorType};
use millrace_kernels::cpu::Pool;
use millrace_kernels::cpu::select::{REFERENCE, select};
use proptest::prelude::*;

use crate::cpu::{Program, Regions};
use crate::memory::{Buffer, Region};

pub(super) static POOLS: LazyLock<[Pool; 2]> = LazyLock::new(|| [Pool::new(1), Pool::new(2).eager()]);

/// What an operand holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Fill {
    /// Any numbers of the type, now and then not finite.
    Any,
    /// Eighths between -2 and 2.
    Tame,
    /// Indices below.
    Below(usize),
    /// From 0 to this in equal steps.
    Rising(usize),
}

/// An operand: element type, shape, values.
pub(super) type Spec = (DType, Vec<usize>, Fill);

pub(super) fn noise(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

pub(super) fn tensor((dtype, shape, fill): &Spec, seed: u64) -> Tensor {
    let mut state = seed;
    let n: usize = shape.iter().product();
    let value = |at: usize, state: &mut u64| {
        let r = noise(state);
        match fill {
            Fill::Rising(end) => (at * end / (n - 1)) as f64,
            Fill::Below(extent) => (r % *extent as u64) as f64,
            Fill::Tame => (r % 33) as f64 / 8.0 - 2.0,
            Fill::Any if dtype.is_float() => match r % 97 {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                3 => 3e9,
                4 => -0.0,
                _ => (noise(state) % 2001) as f64 / 250.0 - 4.0,
            },
            Fill::Any if r.is_multiple_of(8) => (noise(state) % 5) as f64 - 2.0,
            Fill::Any => (noise(state) as f64) * 4.0 - (1u64 << 32) as f64,
        }
    };
    let values =
        Tensor::from_values(*dtype, shape, (0..n).map(|at| value(at, &mut state)).collect()).unwrap();
    Tensor::from_bytes(*dtype, shape, &values.to_bytes()).unwrap()
}

pub(super) fn module(op: &Op, operands: &[Spec]) -> Module {
    let mut builder = Builder::new("one");
    let inputs: Vec<Operand> = operands
        .iter()
        .enumerate()
        .map(|(i, (dtype, shape, _))| {
            builder.input(&format!("x{i}"), TensorType::new(*dtype, shape.iter().copied()))
        })
        .collect();
    let results = builder.node(op.clone(), &inputs, "").unwrap_or_else(|e| panic!("{op:?}: {e:?}"));
    for (i, result) in results.iter().enumerate() {
        builder.output(&format!("y{i}"), *result).unwrap();
    }
    let mut module = builder.finish();
    let id = module.graph.order[0];
    let kernel = select(&module, &module.graph.nodes[id]);
    module.kernels.push(Kernel { name: kernel.to_string(), dtypes: Vec::new() });
    module.graph.nodes[id].kernel = Some(KernelId::from_index(0));
    for (i, result) in module.graph.nodes[id].results.clone().into_iter().enumerate() {
        module.graph.values[result].place = Some(Place::Output(i));
    }
    module
}

pub(super) fn kernel(op: impl Into<Op>, operands: &[Spec]) -> String {
    module(&op.into(), operands).kernels[KernelId::from_index(0)].name.clone()
}

/// Bytes of every result; with `in_place` result 0 replaces that operand.
pub(super) fn execute(
    module: &Module,
    tensors: &[Tensor],
    pool: &Pool,
    in_place: Option<usize>,
) -> Vec<Vec<u8>> {
    let mut inputs: Vec<Vec<u8>> = tensors.iter().map(Tensor::to_bytes).collect();
    let aligned = |bytes: &[u8]| {
        let mut buffer = Buffer::zeroed(bytes.len() as u64, "a test").unwrap();
        buffer.bytes_mut().copy_from_slice(bytes);
        buffer
    };
    let node = &module.graph.nodes[module.graph.order[0]];
    let mut outputs: Vec<Buffer> = node
        .results
        .iter()
        .enumerate()
        .map(|(i, r)| {
            let bytes = module.graph.values[*r].ty.bytes().extent(&Bindings::new()).unwrap() as usize;
            let replaced = in_place.filter(|_| i == 0).map(|operand| inputs[operand].clone());
            let before = replaced.unwrap_or_else(|| vec![0xA5; bytes]);
            aligned(&before)
        })
        .collect();
    let mut held: Vec<Buffer> = inputs.drain(..).map(|b| aligned(&b)).collect();
    let outputs_at: Vec<Region> = outputs.iter_mut().map(Buffer::region).collect();
    let mut inputs_at: Vec<Region> = held.iter_mut().map(Buffer::region).collect();
    if let Some(operand) = in_place {
        inputs_at[operand] = outputs_at[0];
    }
    let mut regions = Regions {
        inputs: inputs_at,
        outputs: outputs_at,
        arenas: Vec::new(),
        states: Vec::new(),
        weights: Vec::new(),
    };
    Program::new(module).unwrap().run(module, pool, &mut regions, &Bindings::new(), None, None).unwrap();
    drop(regions);
    outputs.iter().map(|b| b.bytes().to_vec()).collect()
}

pub(super) fn close(found: &Tensor, expected: &Tensor, exact: bool, what: &str) {
    // Rounding of the type, and of sums in f32.
    let (relative, absolute) = match found.dtype {
        DType::F32 => (1e-5, 1e-5),
        DType::F16 => (1.1 / 1024.0, 1e-5),
        DType::BF16 => (1.1 / 128.0, 1e-5),
        _ => (0.0, 0.0),
    };
    for (i, (f, e)) in found.data.iter().zip(&expected.data).enumerate() {
        let same = f == e || (f.is_nan() && e.is_nan());
        let near = !exact && (f - e).abs() <= absolute + relative * e.abs();
        assert!(same || near, "{what}: element {i} is {f} instead of {e}");
    }
}

/// Runs the node every way and compares with its definition.
#[track_caller]
pub(super) fn check(op: impl Into<Op>, operands: &[Spec], seed: u64) {
    let op = op.into();
    let module = module(&op, operands);
    let what = format!("{op:?} {operands:?} seed {seed}");
    let name = &module.kernels[KernelId::from_index(0)].name;
    assert_ne!(name, REFERENCE, "{what}");
    let tensors: Vec<Tensor> =
        operands.iter().enumerate().map(|(i, s)| tensor(s, seed.wrapping_add(i as u64 * 77))).collect();
    let refs: Vec<&Tensor> = tensors.iter().collect();
    let node = &module.graph.nodes[module.graph.order[0]];
    let types: Vec<TensorType> = node.results.iter().map(|r| module.graph.values[*r].ty.clone()).collect();
    let bindings = Bindings::new();
    let mut expected = op.eval(&EvalCtx { operands: &refs, results: &types, bindings: &bindings }).unwrap();
    for tensor in &mut expected {
        *tensor = Tensor::from_bytes(tensor.dtype, &tensor.shape, &tensor.to_bytes()).unwrap();
    }
    let found = execute(&module, &tensors, &POOLS[0], None);
    let exact = op.traits().numerics == Numerics::Exact;
    for (bytes, expected) in found.iter().zip(&expected) {
        let tensor = Tensor::from_bytes(expected.dtype, &expected.shape, bytes).unwrap();
        close(&tensor, expected, exact, &what);
    }
    assert_eq!(found, execute(&module, &tensors, &POOLS[1], None), "threads: {what}");
    let same =
        |i: usize| operands.get(i).is_some_and(|o| types[0] == TensorType::new(o.0, o.1.iter().copied()));
    if let Some(operand) = op.traits().in_place.filter(|i| same(*i)) {
        assert_eq!(found, execute(&module, &tensors, &POOLS[1], Some(operand)), "in place: {what}");
    }
}

pub(super) const FLOATS: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

pub(super) fn floats() -> impl Strategy<Value = DType> {
    proptest::sample::select(FLOATS.to_vec())
}

/// Types whose elements fill bytes.
pub(super) fn bytes() -> impl Strategy<Value = DType> {
    proptest::sample::select(DType::ALL.iter().copied().filter(|d| *d != DType::I4).collect::<Vec<_>>())
}

pub(super) fn numbers() -> impl Strategy<Value = DType> {
    bytes().prop_filter("numbers", |d| *d != DType::Bool)
}

pub(super) fn ids() -> impl Strategy<Value = DType> {
    proptest::sample::select(vec![DType::I32, DType::I64])
}

pub(super) fn shape(
    extents: std::ops::Range<usize>,
    rank: std::ops::Range<usize>,
) -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(extents, rank)
}

/// A shape and another that broadcasts to it.
pub(super) fn repeated(shape: &[usize], mask: u64) -> Vec<usize> {
    let kept = shape.len() - (mask as usize >> 8) % (shape.len() + 1);
    let tail = &shape[shape.len() - kept..];
    tail.iter().enumerate().map(|(i, d)| if mask >> i & 1 == 1 { 1 } else { *d }).collect()
}

pub(super) fn dims(shape: &[usize]) -> Vec<Dim> {
    shape.iter().copied().map(Dim::from).collect()
}
