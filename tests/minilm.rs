//! all-MiniLM-L6-v2 against float64 references. The weights come from `scripts/fetch_minilm.sh`; without them the test
//! says that it skipped, and with MILLRACE_REQUIRE_MINILM=1 it fails.

#![allow(clippy::print_stderr)]

#[path = "common/models.rs"]
mod common;

use common::{engine, floats, json, root};
use millrace::generation::embed_texts;
use millrace::ir::DType;
use millrace::{Allocation, Encoder, SessionOptions};

fn cosine(a: &[f32], b: &[f64]) -> f64 {
    let dot: f64 = a.iter().zip(b).map(|(x, y)| f64::from(*x) * y).sum();
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    dot / norm(&mut a.iter().map(|x| f64::from(*x))) / norm(&mut b.iter().copied())
}

#[test]
fn sentences_meet_their_references() {
    let folder = "target/models/minilm";
    if !root(folder).join("model.safetensors").exists() {
        let required = std::env::var("MILLRACE_REQUIRE_MINILM").is_ok_and(|v| v == "1");
        assert!(!required, "{folder} is missing: run scripts/fetch_minilm.sh");
        eprintln!("SKIPPED: {folder} is missing; run scripts/fetch_minilm.sh to include this test");
        return;
    }
    let reference = json("tests/data/minilm/reference.json");
    let sentences = reference["sentences"].as_array().unwrap();
    assert_eq!(sentences.len(), 8);
    let texts: Vec<&str> = sentences.iter().map(|s| s["text"].as_str().unwrap()).collect();
    for (dtype, least) in [(DType::F32, 0.99999), (DType::BF16, 0.999)] {
        let engine = engine(folder, dtype, |_| {});
        let tokenizer = engine.tokenizer().unwrap();
        for allocation in [Allocation::Static, Allocation::Dynamic] {
            let options = SessionOptions { allocation, ..SessionOptions::default() };
            let mut session = engine.session(options).unwrap();
            let mut model = Encoder::new(&mut session).unwrap();
            let together = embed_texts(&mut model, &tokenizer, &texts).unwrap();
            for (sentence, found) in sentences.iter().zip(&together) {
                let expected = floats(&sentence["embedding"]);
                let value = cosine(found, &expected);
                assert!(value >= least, "{dtype} {:?}: cosine {value}", sentence["text"]);
            }
            let alone = embed_texts(&mut model, &tokenizer, &texts[..1]).unwrap();
            assert_eq!(alone[0], together[0], "a sentence does not depend on its batch");
        }
    }
}
