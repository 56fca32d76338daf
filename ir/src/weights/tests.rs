use super::*;
use crate::checkpoint::MemorySource;
use crate::dim::{Bindings, Dim};
use crate::ops::{self, EvalCtx, Op};
use crate::types::TensorType;

fn module(weights: &[(&str, DType, &[usize], WeightExpr)]) -> Module {
    let mut module = Module::new("w");
    for (name, dtype, shape, expr) in weights {
        let ty = TensorType::new(*dtype, shape.iter().copied());
        module.weights.push(Weight { name: name.to_string(), ty, expr: expr.clone(), stream: None });
    }
    module
}

fn id(index: usize) -> WeightId {
    WeightId::from_index(index)
}

fn file(key: &str) -> WeightExpr {
    WeightExpr::File { file: "model".into(), key: key.into() }
}

fn slice(axis: usize, start: usize, len: usize, of: usize) -> WeightExpr {
    WeightExpr::Slice { axis, start, len, of: id(of) }
}

fn source() -> MemorySource {
    let mut source = MemorySource::new();
    source
        .insert("a", DType::F32, &[3, 5], encode(DType::F32, &(0..15).map(f64::from).collect::<Vec<_>>()))
        .unwrap();
    source
        .insert("b", DType::F32, &[2, 5], encode(DType::F32, &(100..110).map(f64::from).collect::<Vec<_>>()))
        .unwrap();
    source
}

/// Every expression read whole equals the same expression read in pieces of every small size.
#[test]
fn pieces_equal_the_whole() {
    let module = module(&[
        ("a", DType::F32, &[3, 5], file("a")),
        ("b", DType::F32, &[2, 5], file("b")),
        ("ab", DType::F32, &[5, 5], WeightExpr::Concat { axis: 0, parts: vec![id(0), id(1)].into() }),
        ("aa", DType::F32, &[3, 10], WeightExpr::Concat { axis: 1, parts: vec![id(0), id(0)].into() }),
        ("t", DType::F32, &[5, 3], WeightExpr::Transpose { perm: vec![1, 0], of: id(0) }),
        ("c", DType::BF16, &[5, 5], WeightExpr::Cast { of: id(2) }),
        ("p", DType::BF16, &[3, 5, 2], WeightExpr::Pack { panel: 2, segments: vec![3, 2].into(), of: id(5) }),
        ("r", DType::F32, &[25], WeightExpr::Reshape { of: id(2) }),
        ("s", DType::F16, &[7], WeightExpr::Splat(1.5)),
        ("n", DType::F32, &[9], WeightExpr::Random { seed: 3, std: 0.5 }),
        ("d", DType::I32, &[3], WeightExpr::Dense(vec![1.0, -2.0, 3.0])),
        ("rows", DType::F32, &[3, 5], slice(0, 1, 3, 2)),
        ("columns", DType::BF16, &[5, 2], slice(1, 2, 2, 5)),
        ("middle", DType::BF16, &[3, 2, 2], slice(1, 3, 2, 6)),
        ("part of a part", DType::F32, &[3, 1], slice(1, 4, 1, 11)),
        (
            "packed part",
            DType::BF16,
            &[3, 2, 2],
            WeightExpr::Pack { panel: 2, segments: vec![3, 2].into(), of: id(12) },
        ),
    ]);
    let source = source();
    let mut reader = WeightReader::new(&module).with_source("model", &source);
    for weight in module.weights.ids() {
        let len = reader.len(weight).unwrap() as usize;
        let mut whole = vec![0; len];
        reader.read(weight, 0, &mut whole).unwrap();
        for step in [1, 3, 7, 16] {
            for start in (0..len).step_by(step) {
                let mut piece = vec![0; step.min(len - start)];
                reader.read(weight, start as u64, &mut piece).unwrap();
                assert_eq!(
                    piece,
                    whole[start..start + piece.len()],
                    "@{} at {start}",
                    module.weights[weight].name
                );
            }
        }
        assert!(reader.read(weight, 1, &mut whole).is_err(), "reads past the end are refused");
    }
    assert_eq!(reader.tensor(id(4)).unwrap().data[..6], [0.0, 5.0, 10.0, 1.0, 6.0, 11.0]);
    assert_eq!(reader.tensor(id(3)).unwrap().data[..10], [0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
    // Segments of 3 and 2 rows in panels of 2: rows (0,1), (2,-), (3,4).
    let packed = reader.tensor(id(6)).unwrap().data;
    assert_eq!(packed[..4], [0.0, 5.0, 1.0, 6.0]);
    assert_eq!(packed[10..14], [10.0, 0.0, 11.0, 0.0]);
    assert_eq!(packed[20..22], [100.0, 105.0]);
    assert_eq!(reader.tensor(id(14)).unwrap().data, [9.0, 14.0, 104.0]);
}

/// Every slice of a weight of rank 3 equals the evaluator's `slice` of the whole, and is read right in pieces.
#[test]
fn slices_equal_the_evaluator() {
    let shape = [3usize, 4, 5];
    let whole = Tensor { dtype: DType::F32, shape: shape.to_vec(), data: (0..60).map(f64::from).collect() };
    for (axis, extent) in shape.into_iter().enumerate() {
        for start in 0..=extent {
            for len in 0..=extent - start {
                let mut cut = shape;
                cut[axis] = len;
                let module = module(&[
                    ("a", DType::F32, &shape, WeightExpr::Dense(whole.data.clone())),
                    ("s", DType::F32, &cut, slice(axis, start, len, 0)),
                ]);
                let (from, to) = (Dim::from(start), Dim::from(start + len));
                let op = Op::from(ops::movement::Slice { axis, start: from, end: to, step: 1 });
                let types = op.infer(&[module.weights[id(0)].ty.clone()]).unwrap();
                assert_eq!(types[0], module.weights[id(1)].ty);
                let context = EvalCtx { operands: &[&whole], results: &types, bindings: &Bindings::new() };
                let expected = op.eval(&context).unwrap().remove(0);
                assert_eq!(
                    WeightReader::new(&module).tensor(id(1)).unwrap(),
                    expected,
                    "{axis} {start} {len}"
                );
            }
        }
    }
}

/// Modules that were not verified: an error, never a panic or bytes of a neighbour.
#[test]
fn slices_outside_of_their_source_are_refused() {
    for (axis, start, len, ty) in [
        (0, 2, 2, [2, 5]),
        (2, 0, 1, [3, 5]),
        (0, usize::MAX, 2, [2, 5]),
        (1, 0, usize::MAX, [3, 5]),
        (1, 0, 0, [3, 5]),
    ] {
        let module = module(&[
            ("a", DType::F32, &[3, 5], WeightExpr::Splat(1.0)),
            ("s", DType::F32, &ty, slice(axis, start, len, 0)),
        ]);
        let error = WeightReader::new(&module).tensor(id(1)).unwrap_err();
        assert_eq!(error.code(), "weights/bad-expression", "{axis} {start} {len}");
    }
}

#[test]
fn a_slice_needs_the_source_its_part_needs() {
    let module = module(&[
        ("a", DType::F32, &[3, 5], file("a")),
        ("b", DType::F32, &[3, 5], WeightExpr::Splat(1.0)),
        ("of a file", DType::F32, &[1, 5], slice(0, 1, 1, 0)),
        ("of a splat", DType::F32, &[1, 5], slice(0, 1, 1, 1)),
    ]);
    assert!(needs_source(&module, id(2)) && !needs_source(&module, id(3)));
}

#[test]
fn a_mis_shaped_tensor_is_refused() {
    let module = module(&[("a", DType::F32, &[5, 3], file("a"))]);
    let source = source();
    let mut reader = WeightReader::new(&module).with_source("model", &source);
    assert_eq!(reader.tensor(id(0)).unwrap_err().code(), "weights/mis-shaped");
    let mut reader = WeightReader::new(&module);
    assert_eq!(reader.tensor(id(0)).unwrap_err().code(), "weights/no-source");
}

#[test]
fn random_weights_have_the_asked_moments() {
    let values: Vec<f64> = (0..100_000).map(|i| normal(7, i)).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let variance = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
    assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
}
