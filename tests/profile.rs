//! Profiles of sessions, and `millrace bench --profile --trace`.

#[path = "common/models.rs"]
mod common;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use common::{engine, json, root};
use millrace::generation::{EmbedModel, Generator, Request};
use millrace::ir::DType;
use millrace::ir::step_cost::{Lengths, step_cost};
use millrace::{Decoder, Encoder, Engine, Profile, SessionOptions};
use serde_json::Value;

/// A folder with the configuration of MiniLM, cut to two layers and a small vocabulary.
fn encoder_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = json("tests/data/configs/minilm/config.json");
    config["num_hidden_layers"] = 2.into();
    config["vocab_size"] = 100.into();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn encoder() -> Engine {
    engine(encoder_folder().path().to_str().unwrap(), DType::F32, |o| {
        o.import.dummy_weights = true;
        o.import.max_input_len = Some(64);
        o.import.max_num_tokens = Some(128);
    })
}

#[test]
fn spans_are_the_nodes_in_order_and_sum_to_the_step() {
    let engine = encoder();
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let ids = vec![vec![7u32; 40], vec![9; 24]];
    Encoder::new(&mut session).unwrap().embed(&ids).unwrap();
    session.attach_profile(Profile::new());
    for _ in 0..5 {
        Encoder::new(&mut session).unwrap().embed(&ids).unwrap();
    }
    let profile = session.detach_profile().unwrap();
    assert!(session.detach_profile().is_none());
    assert_eq!(profile.steps.len(), 5);
    let mut shares = Vec::new();
    for step in &profile.steps {
        assert!(step.spans.iter().map(|s| s.node).eq(engine.module().graph.order.iter().copied()));
        assert_eq!(step.sequences, [40, 24].map(|n| Lengths { queries: n, keys: n }));
        let mut at = step.start;
        for span in &step.spans {
            assert!(span.start >= at, "spans do not overlap");
            at = span.start + span.duration;
        }
        assert!(at <= step.start + step.duration, "the step contains its spans");
        let inside: Duration = step.spans.iter().map(|s| s.duration).sum();
        shares.push(inside.as_secs_f64() / step.duration.as_secs_f64());
    }
    // A neighbour on the machine can stretch the time between any two nodes, but hardly in every step.
    let best = shares.iter().copied().fold(0.0, f64::max);
    assert!(best > 0.8, "nodes are {shares:?} of their steps");
}

#[test]
fn a_step_costs_what_its_layers_cost() {
    let engine = encoder();
    let mut session = engine.session(SessionOptions::default()).unwrap();
    session.attach_profile(Profile::new());
    Encoder::new(&mut session).unwrap().embed(&[vec![7u32; 40], vec![9; 24]]).unwrap();
    let profile = session.detach_profile().unwrap();
    let mut flops: BTreeMap<&str, u64> = BTreeMap::new();
    for span in &profile.steps[0].spans {
        let step = &profile.steps[0];
        let cost = step_cost(engine.module(), span.node, &step.bindings, &step.sequences).unwrap();
        *flops.entry(engine.module().graph.nodes[span.node].op.name()).or_default() += cost.flops;
    }
    // Two layers; 64 tokens; q, k, v and output are 384 x 384, the inner layer 1536 wide.
    let products = 2 * 2 * 64 * (4 * 384 * 384 + 2 * 384 * 1536);
    // Biases of all, one activation, residual additions where they are fused.
    let epilogues = 2 * 64 * (4 * 384 + 1536 + 1536 + 384 + 2 * 384);
    let matmuls = flops["matmul.fused"];
    assert!((products..=products + epilogues).contains(&matmuls), "{matmuls} is not near {products}");
    // Two sequences of 40 and 24: all pairs, 12 heads of 32.
    assert_eq!(flops["attention"], 2 * 4 * (40 * 40 + 24 * 24) * 12 * 32);
}

#[test]
fn decoder_steps_know_their_lengths() {
    let engine = engine("tests/data/tiny-random/qwen2", DType::F32, |_| {});
    let mut session = engine.session(SessionOptions::default()).unwrap();
    session.attach_profile(Profile::new());
    let mut model = Decoder::new(&mut session).unwrap();
    let request = Request { stop_at_eos: false, ..Request::greedy(vec![1, 2, 3], 4) };
    Generator::new(&mut model).unwrap().generate(&[request], |_, _| {}).unwrap();
    let steps = session.detach_profile().unwrap().steps;
    let lengths: Vec<_> = steps.iter().map(|s| (s.sequences[0].queries, s.sequences[0].keys)).collect();
    assert_eq!(lengths, [(3, 3), (1, 4), (1, 5), (1, 6)]);
    let nodes = vec![engine.module().graph.order.clone()];
    assert_eq!(session.time_nodes(&nodes).unwrap(), [None], "only launches of a device are replayed");
}

/// Output of `millrace bench`, and the trace it wrote.
fn bench(folder: &str, arguments: &[&str]) -> (Value, Value) {
    let file = tempfile::Builder::new().suffix(".json").tempfile().unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_millrace"))
        .arg("bench")
        .arg(root(folder))
        .args(["--runs", "1", "--profile", "-o", "json", "--trace"])
        .arg(file.path())
        .args(arguments)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let trace = serde_json::from_slice(&std::fs::read(file.path()).unwrap()).unwrap();
    (serde_json::from_slice(&run.stdout).unwrap(), trace)
}

fn complete_events(trace: &Value) -> Vec<&Value> {
    trace["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X").collect()
}

#[test]
fn an_encoder_is_swept_and_traced() {
    let arguments =
        ["--dummy-weights", "--max-input-len", "32", "--max-num-tokens", "64", "--batch-size", "1;2"];
    let lengths = ["--input-output-len", "8;16,1"];
    let (rows, trace) =
        bench(encoder_folder().path().to_str().unwrap(), &[&arguments[..], &lengths].concat());
    let rows = rows.as_array().unwrap();
    let works: Vec<_> = rows.iter().map(|r| (r["batch_size"].as_u64(), r["input_len"].as_u64())).collect();
    assert_eq!(works, [(1, 8), (1, 16), (2, 8), (2, 16)].map(|(b, l)| (Some(b), Some(l))));
    let nodes = encoder().module().graph.order.len();
    let events = complete_events(&trace);
    assert_eq!(events.len(), nodes * rows.len());
    for pid in 1..=rows.len() {
        let mut own: Vec<&str> =
            events.iter().filter(|e| e["pid"] == pid).map(|e| e["args"]["node"].as_str().unwrap()).collect();
        own.sort_unstable();
        own.dedup();
        assert_eq!(own.len(), nodes, "one event for each node");
    }
    let product = events.iter().find(|e| e["cat"] == "matmul.fused").unwrap();
    assert_eq!(product["args"]["kernel"], "cpu.matmul.packed");
    let layer = product["args"]["layers"][0].as_str().unwrap();
    assert!(layer.starts_with("encoder.layer.0."), "{layer}");
    for row in rows {
        assert!(row["step_ms"].as_f64().unwrap() > 0.0);
        let phases = row["profile"]["phases"].as_array().unwrap();
        assert_eq!(phases.len(), 1);
        let phase = &phases[0];
        assert_eq!((&phase["phase"], &phase["steps"]), (&"step".into(), &1.into()));
        let times: Vec<f64> =
            phase["kernels"].as_array().unwrap().iter().map(|k| k["ms"].as_f64().unwrap()).collect();
        assert!(times.is_sorted_by(|a, b| a >= b), "{times:?}");
        let sum = times.iter().sum::<f64>() + phase["between_kernels_ms"].as_f64().unwrap();
        let total = phase["total"]["ms"].as_f64().unwrap();
        assert!((sum - total).abs() <= 1e-3 * total, "{sum} is not {total}");
    }
}

#[test]
fn a_decoder_has_prefill_and_decode() {
    let (rows, trace) = bench("tests/data/tiny-random/qwen2", &["--input-output-len", "6,4"]);
    let phases = rows[0]["profile"]["phases"].as_array().unwrap();
    let steps: Vec<_> =
        phases.iter().map(|p| (p["phase"].as_str().unwrap(), p["steps"].as_u64().unwrap())).collect();
    assert_eq!(steps, [("prefill", 1), ("decode", 3)]);
    assert_eq!(rows[0]["profile"]["replayed"], Value::Null);
    let events = complete_events(&trace);
    assert_eq!(events.iter().filter(|e| e["args"]["phase"] == "decode").count() * 4, events.len() * 3);
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = encoder_folder();
    let refused = |arguments: &[&str]| {
        let run = Command::new(env!("CARGO_BIN_EXE_millrace"))
            .arg("bench")
            .arg(folder.path())
            .args(["--dummy-weights", "--max-input-len", "64", "--max-num-tokens", "64"])
            .args(arguments)
            .output()
            .unwrap();
        (run.status.code(), String::from_utf8_lossy(&run.stderr).into_owned())
    };
    let (code, text) = refused(&["--input-output-len", "65"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("64 in all"), "{text}");
    let (code, text) = refused(&["--profile", "-o", "csv"]);
    assert_eq!(code, Some(1));
    assert!(text.contains("csv"), "{text}");
}
