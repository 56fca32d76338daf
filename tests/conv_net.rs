//! A small image network with the ops around it, through compiler, engine and session, against the reference evaluator.

use millrace::ir::tensor::Tensor;
use millrace::ir::weights::WeightReader;
use millrace::ir::{DType, eval, text};
use millrace::{Allocation, CompileOptions, Engine, SessionOptions, TensorRef, compile};

const NET: &str = r#"module @net phase imported {
  dim $n in 1..=3 hint 2
  dim $h in 9..=20 hint 12
  weight @stem : f32[16, 3, 3, 3] = random(seed = 1, std = 0.2)
  weight @stem.bias : f32[16] = random(seed = 2, std = 0.2)
  weight @depth : f32[16, 1, 3, 3] = random(seed = 3, std = 0.3)
  weight @groups : f32[24, 8, 1, 1] = random(seed = 4, std = 0.3)
  weight @head : f32[10, 40] = random(seed = 5, std = 0.3)
  graph @main(%0 "image": f32[$n, 3, $h, 14], %1 "pick": i64[$n]) -> ("probabilities": f32[10, $n], "kept": f32[$n, 40], "top": i32[$n], "even": bool[$n]) {
    %2 = conv2d %0, @stem, @stem.bias {stride = [1, 1], pad = [1, 1, 1, 1]} : f32[$n, 16, $h, 14]
    %3 = relu %2 : f32[$n, 16, $h, 14]
    %4 = conv2d %3, @depth {pad = [2, 2, 2, 2], dilation = [2, 2], groups = 16} : f32[$n, 16, $h, 14]
    %5 = conv2d %4, @groups {groups = 2} : f32[$n, 24, $h, 14]
    %6 = concat %3, %5 {axis = 1} : f32[$n, 40, $h, 14]
    %7 = slice %6 {axis = 3, start = 1, end = 14} : f32[$n, 40, $h, 13]
    %8 = max_pool2d %7 {kernel = [3, 3], stride = [1, 2], pad = [1, 1, 1, 1]} : f32[$n, 40, $h, 7]
    %9 = reduce_mean %8 {axes = [2, 3]} : f32[$n, 40]
    %10 = gather %9, %1 {axis = 0} : f32[$n, 40]
    %11 = matmul %10, @head {transpose_b = true} : f32[$n, 10]
    %12 = transpose %11 {perm = [1, 0]} : f32[10, $n]
    %13 = softmax %12 {axis = 0} : f32[10, $n]
    %14 = iota {shape = [$n], axis = 0, dtype = i64} : i64[$n]
    %15 = eq %1, %14 : bool[$n]
    %16 = reshape %15 {shape = [$n, 1]} : bool[$n, 1]
    %17 = broadcast %16 {shape = [$n, 40]} : bool[$n, 40]
    %18 = select %17, %9, %10 : f32[$n, 40]
    %19 = add %1, %14 : i64[$n]
    %20 = cast %19 {to = i32} : i32[$n]
    %21 = scatter %18, %1, %9 {axis = 0} : f32[$n, 40]
    return %13, %21, %20, %15
  }
}
"#;

#[test]
fn an_image_network_runs_without_the_reference_evaluator() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("net.ir");
    std::fs::write(&source, NET).unwrap();
    let module = text::parse(NET).unwrap();
    for level in 0..3 {
        let options = CompileOptions {
            pipeline: millrace::compiler::pipeline::Pipeline::level(level),
            ..CompileOptions::default()
        };
        let compiled = compile(&source, &options, None).unwrap();
        let kernels: Vec<String> = compiled.module.kernels.iter().map(|(_, k)| k.name.clone()).collect();
        assert!(kernels.iter().all(|k| k != "cpu.reference"), "{kernels:?}");
        assert!(kernels.iter().any(|k| k == "cpu.conv2d"), "{kernels:?}");
        let file = folder.path().join("net.engine");
        compiled.write(&file, &mut |_, _| {}).unwrap();
        let engine = Engine::open(&file).unwrap();
        for (allocation, threads) in [(Allocation::Static, 1), (Allocation::Dynamic, 2)] {
            let options = SessionOptions { allocation, threads: Some(threads), ..SessionOptions::default() };
            let mut session = engine.session(options).unwrap();
            for (n, h) in [(2, 12), (3, 20), (1, 9)] {
                let image: Vec<f64> =
                    (0..n * 3 * h * 14).map(|i| ((i * 37 % 41) as f64 - 20.0) / 16.0).collect();
                let pick: Vec<f64> = (0..n).map(|i| ((i + 1) % n) as f64).collect();
                let inputs = [
                    Tensor::from_values(DType::F32, &[n, 3, h, 14], image).unwrap(),
                    Tensor::from_values(DType::I64, &[n], pick).unwrap(),
                ];
                let expected =
                    eval::evaluate(&module, &mut WeightReader::new(&module), &inputs, &mut []).unwrap();
                let shapes: Vec<Vec<u64>> =
                    inputs.iter().map(|t| t.shape.iter().map(|d| *d as u64).collect()).collect();
                let bytes: Vec<Vec<u8>> = inputs.iter().map(Tensor::to_bytes).collect();
                let refs: Vec<TensorRef<'_>> = (0..2)
                    .map(|i| TensorRef { dtype: inputs[i].dtype, shape: &shapes[i], bytes: &bytes[i] })
                    .collect();
                session.run(&refs).unwrap();
                for (index, expected) in expected.iter().enumerate() {
                    let output = session.output(index).unwrap();
                    let found = Tensor::from_bytes(output.dtype, &expected.shape, output.bytes).unwrap();
                    for (f, e) in found.data.iter().zip(&expected.data) {
                        assert!((f - e).abs() < 1e-4, "output {index} at -O{level}: {f} instead of {e}");
                    }
                }
            }
        }
    }
}
