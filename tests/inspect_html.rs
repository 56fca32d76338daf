//! The HTML page of a module: complete, self-contained, deterministic, small, and safe against hostile names.

#[path = "common/models.rs"]
mod common;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use common::root;
use millrace::compiler::codegen::WeightMode;
use millrace::fit::{Question, Subject};
use millrace::ir::manifest::{Manifest, ModelKind};
use millrace::ir::{DType, Module, text};
use millrace::page::{Facts, History, Recorder, Streaming, page, page_with};
use millrace::{CompileOptions, Compiled, SessionOptions, WeightBudget, compile};
use serde_json::Value;

const OPEN: &str = "<script type=\"application/json\" id=\"data\">";

fn compiled(folder: &str, dummy: bool) -> (Compiled, History) {
    let mut options = CompileOptions { weight_streaming: true, ..CompileOptions::default() };
    options.import.dummy_weights = dummy;
    let mut recorder = Recorder::default();
    let mut observer = |pass: &'static str, module: &Module, changed: bool| {
        recorder.observe(pass, module, changed);
    };
    let compiled = compile(&root(folder), &options, Some(&mut observer)).unwrap();
    let history = recorder.finish(&compiled.context);
    (compiled, history)
}

fn page_of(folder: &str, dummy: bool) -> (Compiled, History, String) {
    let (compiled, history) = compiled(folder, dummy);
    let facts = Facts { manifest: &compiled.manifest, weights: WeightMode::Stored, file: None };
    let text = page(&compiled.module, &facts, Some(&history));
    (compiled, history, text)
}

/// The page without its data, and the data.
fn split(page: &str) -> (String, Value) {
    let (before, rest) = page.split_once(OPEN).expect("the page has a data block");
    let (data, after) = rest.split_once("</script>").unwrap();
    assert!(!data.contains('<'), "a tag could begin in the data");
    (format!("{before}{after}"), serde_json::from_str(data).expect("the data parses"))
}

/// A page of IR text.
fn page_of_text(source: &str) -> String {
    let module = text::parse(source).unwrap();
    let manifest = Manifest {
        kind: ModelKind::Graph,
        family: "graph".to_string(),
        target: "cpu".to_string(),
        dtype: DType::F32,
        pipeline: "dce".to_string(),
        weight_streaming: false,
        model: None,
        profiles: Vec::new(),
    };
    page(&module, &Facts { manifest: &manifest, weights: WeightMode::Stripped, file: None }, None)
}

#[test]
fn the_page_tells_what_the_engine_is() {
    let (compiled, _, text) = page_of("examples/models/baker-street-6m", false);
    let (_, data) = split(&text);
    let module = &compiled.module;
    let count = |pointer: &str| data.pointer(pointer).and_then(Value::as_array).unwrap().len();
    let nodes = module.graph.order.len();
    for column in ["id", "op", "attrs", "kernel", "layers", "in", "out", "cost/0", "cost/1"] {
        assert_eq!(count(&format!("/nodes/{column}")), nodes, "{column}");
    }
    assert_eq!(count("/kernels"), module.kernels.len());
    assert_eq!(count("/weights"), module.used_weights().len());
    assert_eq!(count("/symbols"), module.dims.len());
    let plan = compiled.plan().unwrap();
    assert_eq!(data["memory"]["peak"], plan.peak_bytes);
    assert_eq!(data["memory"]["lower_bound"], plan.lower_bound_bytes);
    assert_eq!(data["memory"]["streamable"], data["memory"]["weights"]);
    assert_eq!(count("/buffers"), plan.buffers);
    assert_eq!(data["manifest"]["family"], "llama");
    assert_eq!(data["manifest"]["pipeline"], compiled.manifest.pipeline);
    // Six layers fold into one group.
    assert_eq!(count("/groups"), 1);
    assert_eq!(data["groups"][0][0], "model.layers");
    assert_eq!(count("/groups/0/2"), 6);
    let dot = millrace::ir::dag::dot(module);
    assert_eq!(dot.matches("model.layers.0..5 × 6").count(), 1);
    assert_eq!(dot.matches("label=\"paged_attention\"").count(), 1);
    // No buffer reaches beyond the arena.
    for buffer in data["buffers"].as_array().unwrap() {
        let end = buffer[0].as_u64().unwrap() + buffer[1].as_u64().unwrap();
        assert!(end <= plan.peak_bytes, "{buffer}");
    }
}

#[test]
fn the_page_needs_nothing_else() {
    let (_, _, text) = page_of("examples/models/baker-street-6m", false);
    for reference in ["http://", "https://", "src=", "href=", "url(", "@import", "import(", "fetch("] {
        assert!(!text.contains(reference), "the page refers to elsewhere: {reference}");
    }
    assert_eq!(text.matches("</script>").count(), 2);
    assert!(!text.contains("{{") && text.starts_with("<!DOCTYPE html>"));
}

#[test]
fn the_page_of_an_8b_model_is_small_and_shows_each_layer_change_once() {
    let (compiled, history, text) = page_of("tests/data/configs/llama-3.1-8b", true);
    assert!(text.len() < 3 << 20, "{} bytes", text.len());
    assert_eq!(history.passes[0].name, "import");
    assert!(history.passes.windows(2).all(|pair| pair[0].nodes_after == pair[1].nodes_before));
    assert_eq!(history.passes.last().unwrap().nodes_after, compiled.module.graph.order.len());
    for step in &history.passes[1..] {
        assert_eq!(step.diff.is_some(), step.changed, "{}", step.name);
        assert!(step.diff.as_ref().is_none_or(|d| d.lines().count() <= 401), "{}", step.name);
    }
    let diff_of = |name| history.passes.iter().find(|p| p.name == name).unwrap().diff.as_deref().unwrap();
    let diff = diff_of("merge-matmuls");
    assert!(diff.contains("+    %") && diff.contains("model.layers.0.self_attn.q_proj"));
    assert!(!diff.contains("model.layers.17."), "layers are not folded");
    // Layers 1 and 31 become variants of their own here; what did not change in them is no change.
    let mut added = diff_of("fuse-add-norm").lines().filter(|l| l.starts_with('+'));
    assert!(added.all(|l| !l.contains("= reshape")), "a layer looks new");
}

#[test]
fn equal_input_gives_equal_pages() {
    let folder = "tests/data/tiny-random/qwen2";
    assert_eq!(page_of(folder, false).2, page_of(folder, false).2);
}

#[test]
fn hostile_names_stay_names() {
    let hostile = "</script><script>alert(1)</script><!-- {{script}} &amp; \u{2028}";
    let source = format!(
        r#"module @m phase imported {{
  weight @"{hostile}" : f32[4] = splat(1.0)
  graph @main(%0 "{hostile}": f32[4]) -> ("{hostile}": f32[4]) {{
    %1 = add %0, @"{hostile}" : f32[4] loc("{hostile}")
    return %1
  }}
}}"#
    );
    let text = page_of_text(&source);
    let (shell, data) = split(&text);
    assert!(!shell.contains("alert") && !text.contains('\u{2028}'));
    assert_eq!(text.matches("</script>").count(), 2);
    assert_eq!(data["inputs"][0][0], hostile);
    assert_eq!(data["weights"][0][1], hostile);
    // No plan and no kernels: the page says so instead of failing.
    assert_eq!(data["memory"]["peak"], Value::Null);
}

/// A graph of 50,000 nodes: 1,000 equal layers of 20 nodes, then 30,000 nodes without layers.
fn fifty_thousand() -> String {
    let mut body = String::new();
    let mut value = 0;
    for layer in 0..1000 {
        for part in 0..20 {
            let op = ["exp", "tanh", "neg", "silu"][part % 4];
            let _ = writeln!(
                body,
                "%{} = {op} %{value} : f32[64] loc(model.layers.{layer}.part{part})",
                value + 1
            );
            value += 1;
        }
    }
    for at in 0..30_000 {
        let _ =
            writeln!(body, "%{} = add %{value}, %{} : f32[64] loc(tail{at})", value + 1, value - at % 100);
        value += 1;
    }
    format!(
        "module @m phase imported {{\ngraph @main(%0 \"x\": f32[64]) -> (\"y\": f32[64]) {{\n{body}return %{value}\n}}\n}}"
    )
}

#[test]
fn fifty_thousand_nodes_have_a_page() {
    let text = page_of_text(&fifty_thousand());
    let (_, data) = split(&text);
    assert_eq!(data["nodes"]["id"].as_array().unwrap().len(), 50_000);
    assert_eq!(data["groups"][0][2].as_array().unwrap().len(), 1000);
    assert!(text.len() < 8 << 20, "{} bytes", text.len());
    // For a look at it in a browser.
    std::fs::write(Path::new(env!("CARGO_TARGET_TMPDIR")).join("fifty-thousand.html"), text).unwrap();
}

#[test]
fn both_verbs_write_pages() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_millrace")).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let model = root("tests/data/tiny-random/llama-rope-llama3").display().to_string();
    run(&["compile", &model, "-o", &at("e"), "--html", &at("built.html")]);
    run(&["inspect", &at("e"), "--html", &at("read.html")]);
    let data = |name: &str| split(&std::fs::read_to_string(at(name)).unwrap()).1;
    let (built, read) = (data("built.html"), data("read.html"));
    assert!(built["history"]["passes"].as_array().is_some_and(|p| p.len() > 5));
    assert_eq!(read["history"], Value::Null);
    assert_eq!(read["file"]["bytes"], std::fs::metadata(at("e")).unwrap().len());
    // The engine tells the same about the graph as the compiler did.
    for part in ["nodes", "values", "buffers", "memory", "kernels", "groups", "manifest"] {
        assert_eq!(built[part], read[part], "{part}");
    }
}

#[test]
fn a_page_shows_where_weights_are_under_a_budget() {
    let (compiled, history) = compiled("examples/models/baker-street-6m", false);
    let (module, manifest) = (&compiled.module, &compiled.manifest);
    let facts = Facts { manifest, weights: WeightMode::Stored, file: None };
    let plain = page(module, &facts, Some(&history));
    assert_eq!(split(&plain).1["streaming"], Value::Null);
    let session = SessionOptions { budget: WeightBudget::Fraction(0.3), ..SessionOptions::default() };
    let subject = Subject { module, manifest, table: None };
    let streaming = Streaming::of(subject, &Question { session, ..Question::default() }).unwrap();
    let text = page_with(module, &facts, Some(&history), Some(&streaming));
    assert_eq!(text, page_with(module, &facts, Some(&history), Some(&streaming)));
    let data = split(&text).1;
    let told = &data["streaming"];
    assert_eq!(told["moved"], streaming.placement.moved());
    assert_eq!(told["weights"].as_array().unwrap().len(), module.used_weights().len());
    assert_eq!(told["copies"].as_array().unwrap().len(), streaming.placement.copies.len());
    for (step, name) in told["steps"].as_array().unwrap().iter().zip(["decode", "prefill"]) {
        assert_eq!(step["name"], name);
        let spans = step["spans"].as_array().unwrap();
        let busy = |kind: u64| -> u64 {
            let mine = spans.iter().filter(|s| s[0] == kind);
            mine.map(|s| s[3].as_u64().unwrap() - s[2].as_u64().unwrap()).sum()
        };
        assert_eq!(busy(1), step["stall"].as_u64().unwrap());
        assert_eq!(busy(2), step["copies"].as_u64().unwrap());
        assert!(busy(0) <= step["compute"].as_u64().unwrap());
    }
}
