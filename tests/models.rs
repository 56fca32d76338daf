//! Trained and random models against the references of transformers, through compiler, engine file and runtime.

#[path = "common/models.rs"]
mod common;

use common::{assert_close, engine, floats, ids, json, prefill, root, with_pass};
use millrace::generation::{Generator, PerplexityOptions, Request, StepModel, perplexity};
use millrace::ir::{DType, WeightExpr};
use millrace::{Allocation, Class, Decoder, SessionOptions};

const BAKER: &str = "examples/models/baker-street-6m";

fn greedy(model: &mut Decoder<'_, '_>, prompts: &[Vec<u32>], n: usize) -> Vec<Vec<u32>> {
    let requests: Vec<Request> =
        prompts.iter().map(|p| Request { stop_at_eos: false, ..Request::greedy(p.clone(), n) }).collect();
    let done = Generator::new(model).unwrap().generate(&requests, |_, _| {}).unwrap();
    done.into_iter().map(|c| c.token_ids).collect()
}

#[test]
fn baker_street_meets_its_reference() {
    let reference = json(&format!("{BAKER}/reference.json"));
    let engine = engine(BAKER, DType::F32, |_| {});
    let tokenizer = engine.tokenizer().unwrap();
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let mut model = Decoder::new(&mut session).unwrap();
    for prompt in reference["prompts"].as_array().unwrap() {
        let text = prompt["prompt"].as_str().unwrap();
        let tokens = ids(&prompt["input_ids"]);
        assert_eq!(tokenizer.encode(text, true).unwrap(), tokens);
        let logits = prefill(&mut model, &tokens, &[tokens.len() as i32 - 1]).remove(0);
        assert_close(&logits[..32], &floats(&prompt["last_logits_first32"]), 2e-3, text);
        for pair in prompt["last_logits_top8"].as_array().unwrap() {
            let (id, value) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            assert_close(&logits[id..=id], &[value], 2e-3, text);
        }
        let new = greedy(&mut model, &[tokens], 64).remove(0);
        assert_eq!(new, ids(&prompt["greedy_ids"]), "{text}");
        assert_eq!(tokenizer.decode(&new, true).unwrap(), prompt["greedy_text"].as_str().unwrap());
    }
}

/// Layers in parts give the same tokens, and logits that differ by the rounding of partial sums: not at all where only
/// the order of queries, keys and values is another.
#[test]
fn chunked_layers_generate_the_same_tokens() {
    let reference = json(&format!("{BAKER}/reference.json"));
    let plain = engine(BAKER, DType::F32, |_| {});
    let mut plain = plain.session(SessionOptions::default()).unwrap();
    let mut plain = Decoder::new(&mut plain).unwrap();
    // The peak of this model is in attention, so feed-forward layers take some force.
    for (pass, least, tolerance) in [
        ("chunk-mlp{parts=4,force=true}", 12, 1e-5),
        ("chunk-attention{parts=2,force=true}", 12, 1e-5),
        ("chunk-attention{parts=1,force=true}", 0, 0.0),
        ("fixpoint{chunk-mlp,chunk-attention}", 12, 1e-5),
    ] {
        let chunked = engine(BAKER, DType::F32, |o| o.pipeline = with_pass(pass));
        let slices = chunked.module().weights.iter();
        let slices = slices.filter(|(_, w)| matches!(w.expr, WeightExpr::Slice { .. })).count();
        assert!(slices >= least, "{pass}: {slices} slices");
        let mut session = chunked.session(SessionOptions::default()).unwrap();
        let mut model = Decoder::new(&mut session).unwrap();
        for prompt in reference["prompts"].as_array().unwrap() {
            let tokens = ids(&prompt["input_ids"]);
            let row = [tokens.len() as i32 - 1];
            let expected = prefill(&mut plain, &tokens, &row).remove(0);
            let found = prefill(&mut model, &tokens, &row).remove(0);
            let largest = expected.iter().fold(1f32, |most, v| most.max(v.abs()));
            let expected: Vec<f64> = expected.iter().map(|v| f64::from(*v)).collect();
            assert_close(&found, &expected, f64::from(largest) * tolerance, pass);
            assert_eq!(greedy(&mut model, &[tokens], 64).remove(0), ids(&prompt["greedy_ids"]), "{pass}");
        }
    }
}

#[test]
fn tiny_random_models_meet_their_references() {
    for name in ["llama-rope-llama3", "mistral-sliding", "qwen2", "qwen3"] {
        let folder = format!("tests/data/tiny-random/{name}");
        let reference = json(&format!("{folder}/reference.json"));
        let engine = engine(&folder, DType::F32, |_| {});
        let mut session = engine.session(SessionOptions::default()).unwrap();
        let mut model = Decoder::new(&mut session).unwrap();
        let tokens = ids(&reference["input_ids"]);
        let rows = prefill(&mut model, &tokens, &[11, tokens.len() as i32 - 1]);
        assert_close(&rows[1], &floats(&reference["logits_last_row"]), 1e-3, name);
        for pair in reference["logits_row_11_top8"].as_array().unwrap() {
            let (id, value) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            assert_close(&rows[0][id..=id], &[value], 1e-3, name);
        }
        let expected = ids(&reference["greedy_16"]);
        assert_eq!(greedy(&mut model, &[tokens], expected.len()).remove(0), expected, "{name}");
    }
}

fn baker_perplexity(dtype: DType, windows: usize) -> f64 {
    let engine = engine(BAKER, dtype, |o| o.import.max_logit_rows = Some(512));
    let text = std::fs::read_to_string(root(BAKER).join("heldout.txt")).unwrap();
    let tokens = engine.tokenizer().unwrap().encode(&text, false).unwrap();
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let options = PerplexityOptions { bos: 0, window_tokens: 511, max_windows: Some(windows) };
    let result = perplexity(&mut Decoder::new(&mut session).unwrap(), &tokens, &options).unwrap();
    assert_eq!(result.tokens, windows as u64 * 511);
    result.perplexity
}

#[test]
fn perplexity_of_the_held_out_text() {
    let reference = json(&format!("{BAKER}/reference.json"));
    let expected = reference["perplexity"]["value"].as_f64().unwrap();
    let f32s = baker_perplexity(DType::F32, 64);
    assert!((f32s / expected - 1.0).abs() < 2e-3, "f32: {f32s} instead of {expected}");
    let bf16s = baker_perplexity(DType::BF16, 64);
    assert!((bf16s / expected - 1.0).abs() < 1e-2, "bf16: {bf16s} instead of {expected}");
    let f16s = baker_perplexity(DType::F16, 8);
    let same = baker_perplexity(DType::F32, 8);
    assert!((f16s / same - 1.0).abs() < 1e-2, "f16: {f16s} instead of {same}");
}

/// A prompt alone, in a batch of eight, in chunks, and with one thread gives the same tokens.
#[test]
fn neighbours_do_not_matter() {
    let reference = json(&format!("{BAKER}/reference.json"));
    let mut prompts: Vec<Vec<u32>> =
        reference["prompts"].as_array().unwrap().iter().map(|p| ids(&p["input_ids"])).collect();
    prompts.push((5..90).collect());
    prompts.push(vec![0]);
    prompts.push((100..140).rev().collect());
    assert_eq!(prompts.len(), 8);
    for dtype in [DType::F32, DType::BF16] {
        let engine = engine(BAKER, dtype, |o| o.import.max_num_tokens = Some(64));
        let mut session = engine.session(SessionOptions::default()).unwrap();
        let together = greedy(&mut Decoder::new(&mut session).unwrap(), &prompts, 24);
        let one_thread = SessionOptions { threads: Some(1), ..SessionOptions::default() };
        for (prompt, expected) in prompts.iter().zip(&together) {
            let mut session = engine.session(one_thread.clone()).unwrap();
            let alone = greedy(&mut Decoder::new(&mut session).unwrap(), std::slice::from_ref(prompt), 24);
            assert_eq!(&alone[0], expected, "{dtype}");
        }
    }
}

/// Dynamic allocation takes the size of the actual shape and gives it back; the guard works in both directions.
#[test]
fn allocation_follows_the_shape() {
    let engine = engine(BAKER, DType::F32, |_| {});
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let full = session.ledger().now(Class::Activations);
    assert!(full > 0);
    let logits = prefill(&mut Decoder::new(&mut session).unwrap(), &[0, 795, 317], &[2]);
    assert_eq!(session.ledger().now(Class::Activations), full, "static memory stays");
    {
        let mut guard = session.allocation(Allocation::Dynamic).unwrap();
        assert_eq!(guard.ledger().now(Class::Activations), 0);
        let again = prefill(&mut Decoder::new(&mut guard).unwrap(), &[0, 795, 317], &[2]);
        assert_eq!(again, logits);
        assert_eq!(guard.ledger().now(Class::Activations), 0, "given back after the step");
    }
    assert_eq!(session.current_allocation(), Allocation::Static);
    assert_eq!(session.ledger().now(Class::Activations), full);
    let mut dynamic = engine
        .session(SessionOptions { allocation: Allocation::Dynamic, ..SessionOptions::default() })
        .unwrap();
    let mut peaks = Vec::new();
    for n in [1u32, 8, 64] {
        prefill(&mut Decoder::new(&mut dynamic).unwrap(), &(0..n).collect::<Vec<_>>(), &[n as i32 - 1]);
        let module = engine.module();
        let mut bindings = millrace::ir::Bindings::maxima(&module.dims);
        for (name, value) in [("t", u64::from(n)), ("b", 1), ("r", 1)] {
            bindings.set(millrace::ir::Sym::new(name).unwrap(), value);
        }
        let planned: u64 = module.arenas.iter().map(|(_, a)| a.size.extent(&bindings).unwrap()).sum();
        peaks.push(dynamic.ledger().peak(Class::Activations));
        assert_eq!(peaks.last(), Some(&planned), "{n} tokens");
    }
    assert!(peaks[0] < peaks[1] && peaks[1] < peaks[2] && peaks[2] < full);
    {
        let guard = dynamic.allocation(Allocation::Static).unwrap();
        assert_eq!(guard.ledger().now(Class::Activations), full);
    }
    assert_eq!(dynamic.ledger().now(Class::Activations), 0);
}

/// A stripped engine takes its weights from the folder, and refuses other weights.
#[test]
fn stripped_engines_bind_by_name_and_hash() {
    let folder = "tests/data/tiny-random/qwen3";
    let reference = json(&format!("{folder}/reference.json"));
    let stripped =
        engine(folder, DType::F32, |o| o.weights = millrace::compiler::codegen::WeightMode::Stripped);
    assert_eq!(stripped.session(SessionOptions::default()).err().unwrap().code(), "engine/stripped");
    let from = |path| SessionOptions { weights: Some(root(path)), ..SessionOptions::default() };
    let mut session = stripped.session(from(folder)).unwrap();
    let tokens = ids(&reference["input_ids"]);
    let logits = prefill(&mut Decoder::new(&mut session).unwrap(), &tokens, &[tokens.len() as i32 - 1]);
    assert_close(&logits[0], &floats(&reference["logits_last_row"]), 1e-3, "stripped");
    let other = stripped.session(from("tests/data/tiny-random/qwen2")).err().unwrap();
    assert!(
        ["weights/mis-shaped", "weights/no-tensor", "engine/weight-hash"].contains(&other.code()),
        "{other}"
    );
}

#[test]
fn sampling_is_seeded_and_independent_of_the_batch() {
    let engine = engine(BAKER, DType::F32, |_| {});
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let mut model = Decoder::new(&mut session).unwrap();
    let request = |seed, sequence| Request {
        sampling: millrace::generation::SamplingParams { temperature: 0.9, top_k: 50, top_p: 0.95, seed },
        sequence,
        stop_at_eos: false,
        ..Request::greedy(vec![0, 795, 317], 20)
    };
    let mut run = |requests: &[Request]| -> Vec<Vec<u32>> {
        let done = Generator::new(&mut model).unwrap().generate(requests, |_, _| {}).unwrap();
        done.into_iter().map(|c| c.token_ids).collect()
    };
    let alone = run(&[request(7, 3)]);
    let batch = run(&[request(7, 0), request(7, 3), request(8, 3)]);
    assert_eq!(alone[0], batch[1]);
    assert_ne!(batch[1], batch[2], "another seed");
    assert_ne!(batch[0], batch[1], "another sequence");
    assert!(model.limits().vocab_size == 4096);
}
