//! Plans of real shapes against their lower bounds, and compiling without weights.

#![allow(clippy::print_stdout)]

#[path = "common/models.rs"]
mod common;

use std::time::Instant;

use common::{root, with_pass};
use millrace::compiler::import::Precision;
use millrace::ir::{Bindings, DType, Sym, plan};
use millrace::{CompileOptions, Compiled, compile};

fn dummy(folder: &str, dtype: DType) -> Compiled {
    dummy_with(folder, dtype, CompileOptions::default())
}

fn dummy_with(folder: &str, dtype: DType, mut options: CompileOptions) -> Compiled {
    options.import.dummy_weights = true;
    options.import.precision = Precision::Fixed(dtype);
    compile(&root(folder), &options, None).unwrap()
}

#[test]
fn plans_are_at_most_two_percent_over_the_bound() {
    for (folder, dtype) in [
        ("tests/data/configs/llama-3.1-8b", DType::BF16),
        ("tests/data/configs/llama-3.1-8b", DType::F32),
        ("tests/data/configs/minilm", DType::F32),
        ("examples/models/baker-street-6m", DType::F32),
        ("examples/models/baker-street-6m", DType::BF16),
    ] {
        let compiled = dummy(folder, dtype);
        let found = compiled.plan().unwrap();
        let limit = found.lower_bound_bytes as f64 * 1.02;
        assert!(found.peak_bytes as f64 <= limit, "{folder} {dtype}: {found:?}");
        // The same plan holds at other shapes.
        let module = &compiled.module;
        for tokens in [1u64, 7, 100] {
            let mut bindings = Bindings::minima(&module.dims);
            bindings.set(Sym::new("t").unwrap(), tokens);
            plan::check(module, &bindings).unwrap_or_else(|o| panic!("{folder} at {tokens}: {}", o.message));
        }
    }
}

/// Layers in parts: the arena falls to what the rest needs.
#[test]
fn chunked_layers_need_a_smaller_arena() {
    const BOTH: &str = "fixpoint{chunk-mlp,chunk-attention}";
    for (folder, dtype, pass, most) in [
        ("tests/data/configs/llama-3.1-8b", DType::BF16, "chunk-mlp{parts=2}", 0.69),
        ("tests/data/configs/llama-3.1-8b", DType::BF16, "chunk-mlp", 0.64),
        ("tests/data/configs/llama-3.1-8b", DType::F32, "chunk-mlp", 0.64),
        ("tests/data/configs/llama-3.1-8b", DType::BF16, BOTH, 0.455),
        ("tests/zoo/llama-2-7b", DType::BF16, "chunk-attention", 0.94),
        ("tests/zoo/llama-2-7b", DType::BF16, BOTH, 0.60),
        ("tests/zoo/qwen2-0.5b", DType::BF16, BOTH, 0.37),
        ("tests/zoo/qwen3-0.6b", DType::BF16, "chunk-attention", 0.84),
        ("tests/data/configs/minilm", DType::F32, "chunk-mlp", 0.84),
        ("tests/data/configs/minilm", DType::F32, BOTH, 0.51),
    ] {
        let plain = dummy(folder, dtype).plan().unwrap().peak_bytes;
        let options = CompileOptions { pipeline: with_pass(pass), ..CompileOptions::default() };
        let chunked = dummy_with(folder, dtype, options);
        let found = chunked.plan().unwrap();
        let ratio = found.peak_bytes as f64 / plain as f64;
        println!("{folder} {dtype} {pass}: {plain} -> {} bytes, {ratio:.3}", found.peak_bytes);
        assert!(ratio <= most, "{folder} {dtype} {pass}: {ratio}");
        assert!(found.peak_bytes as f64 <= found.lower_bound_bytes as f64 * 1.02, "{found:?}");
        let stats = chunked.context.stats.iter().filter(|(name, _)| name.ends_with(".saved_bytes"));
        let saved: u64 = stats.filter(|(name, _)| name.starts_with("chunk-")).map(|(_, bytes)| bytes).sum();
        assert!(
            saved > 0 && saved.abs_diff(plain - found.peak_bytes) <= plain / 50,
            "{saved} bytes reported"
        );
        for tokens in [1u64, 7, 100] {
            let mut bindings = Bindings::minima(&chunked.module.dims);
            bindings.set(Sym::new("t").unwrap(), tokens);
            plan::check(&chunked.module, &bindings).unwrap_or_else(|o| panic!("{tokens}: {}", o.message));
        }
    }
}

/// Attention has the peak here, so nothing changes: the engine is the one without the pass.
#[test]
fn layers_stay_whole_where_parts_save_nothing() {
    let folder = "examples/models/baker-street-6m";
    let options = CompileOptions { pipeline: with_pass("chunk-mlp"), ..CompileOptions::default() };
    let found = dummy_with(folder, DType::F32, options);
    assert!(found.context.remarks.iter().any(|r| r.message.contains("does not fall")));
    assert_eq!(found.module.graph.order.len(), dummy(folder, DType::F32).module.graph.order.len());
}

#[test]
fn an_8b_shape_compiles_without_weights_to_a_small_engine() {
    let file = tempfile::Builder::new().suffix(".engine").tempfile().unwrap();
    let start = Instant::now();
    let compiled = dummy("tests/data/configs/llama-3.1-8b", DType::BF16);
    let written = compiled.write(file.path(), &mut |_, _| {}).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    assert!(written.len < 5_000_000, "{} bytes", written.len);
    // Release builds take a fraction of this; the bound leaves room for unoptimised test builds.
    assert!(seconds < 10.0, "{seconds} s");
}

#[test]
fn weights_are_marked_streamable_only_when_asked() {
    let count = |streaming: bool| {
        let mut options = CompileOptions { weight_streaming: streaming, ..CompileOptions::default() };
        options.import.dummy_weights = true;
        let module = compile(&root("examples/models/baker-street-6m"), &options, None).unwrap().module;
        module.used_weights().into_iter().filter(|w| module.weights[*w].stream.is_some()).count()
    };
    assert_eq!(count(false), 0);
    assert!(count(true) > 20);
}

#[test]
fn two_compilations_give_the_same_bytes() {
    let bytes = || {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.engine");
        let options = CompileOptions::default();
        let compiled = compile(&root("tests/data/tiny-random/qwen3"), &options, None).unwrap();
        compiled.write(&file, &mut |_, _| {}).unwrap();
        std::fs::read(&file).unwrap()
    };
    assert_eq!(bytes(), bytes());
}
