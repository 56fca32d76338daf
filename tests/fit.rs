//! `fit` against sessions, published arithmetic and measured steps; weight budgets on the command line.

#[path = "common/models.rs"]
mod common;

use std::process::{Command, Output};

use common::{engine, root};
use millrace::compiler::codegen::cuda::Builder;
use millrace::compiler::target::TargetChoice;
use millrace::fit::{Fit, Question, Subject};
use millrace::ir::manifest::{LanguageModel, Manifest, ModelKind};
use millrace::ir::plan::stream::{Demand, Ring, place, schedule};
use millrace::ir::{DType, Module, text};
use millrace::{Allocation, Class, CompileOptions, Engine, SessionOptions, WeightBudget, compile};
use serde_json::Value;

const BAKER: &str = "examples/models/baker-street-6m";

fn baker() -> Engine {
    engine(BAKER, DType::F32, |o| o.weight_streaming = true)
}

fn ask(engine: &Engine, session: SessionOptions) -> Fit {
    let subject = Subject { module: engine.module(), manifest: engine.manifest(), table: None };
    Fit::of(subject, &Question { session, ..Question::default() }).unwrap()
}

#[test]
fn a_session_holds_what_was_told() {
    let engine = baker();
    for kv_pages in [None, Some(7)] {
        let options = SessionOptions { kv_pages, ..SessionOptions::default() };
        let fit = ask(&engine, options.clone());
        let session = engine.session(options.clone()).unwrap();
        for (class, bytes) in &fit.classes {
            assert_eq!(session.ledger().now(*class), *bytes, "{class:?}");
        }
        assert_eq!(session.ledger().total(), fit.total());
        assert_eq!(session.total_device_budget(), fit.streamable);
        assert_eq!(session.minimum_budget(), fit.minimum);
        let dynamic = SessionOptions { allocation: Allocation::Dynamic, ..options };
        assert_eq!(ask(&engine, dynamic).total(), fit.smallest);
    }
    // A session and a report place alike.
    let options = SessionOptions { budget: WeightBudget::Fraction(0.4), ..SessionOptions::default() };
    let fit = ask(&engine, options);
    let demand = Demand::of(engine.module()).unwrap();
    millrace::ir::plan::stream::check(&demand, &fit.placement, fit.placement.device_bytes()).unwrap();
    assert!(fit.placement.moved() > 0);
}

#[test]
fn errors_name_options_that_fit() {
    let engine = baker();
    let needed = ask(&engine, SessionOptions::default()).total();
    let cap = Some(needed - (1 << 20));
    let error = engine.session(SessionOptions { cap, ..SessionOptions::default() }).err().unwrap();
    assert_eq!(error.code(), "run/cap");
    let text = error.to_string();
    for expected in [&needed.to_string(), "--weights-budget", "--kv-pages", "--memory dynamic", "weights "] {
        assert!(text.contains(expected), "{expected} is not in: {text}");
    }
    // What is told works.
    let pages = text.split("--kv-pages ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    let with = SessionOptions { cap, kv_pages: Some(pages), ..SessionOptions::default() };
    engine.session(with.clone()).unwrap();
    engine.session(SessionOptions { kv_pages: Some(pages + 1), ..with }).err().unwrap();
    let dynamic = SessionOptions { cap, allocation: Allocation::Dynamic, ..SessionOptions::default() };
    engine.session(dynamic).unwrap();
    let fit = ask(&engine, SessionOptions { cap, ..SessionOptions::default() });
    assert!(!fit.fits() && fit.remedies.len() == 3, "{:?}", fit.remedies);
    // Under far too little, two together.
    let fit = ask(&engine, SessionOptions { cap: Some(20 << 20), ..SessionOptions::default() });
    assert!(fit.remedies.iter().any(|r| r.contains("together with --kv-pages")), "{:?}", fit.remedies);
    // Under hopelessly little, none.
    let fit = ask(&engine, SessionOptions { cap: Some(1 << 20), ..SessionOptions::default() });
    assert!(fit.remedies.is_empty() && fit.to_string().contains("no option makes it fit"));
    // An engine without weight streaming is told to have some.
    let plain = common::engine(BAKER, DType::F32, |_| {});
    let demand = Demand::of(plain.module()).unwrap();
    assert_eq!(demand.streamable(0), 0);
    let small = SessionOptions { cap: Some(20 << 20), kv_pages: Some(1), ..SessionOptions::default() };
    let error = plain.session(small).err().unwrap().to_string();
    assert!(error.contains("compile with --weight-streaming"), "{error}");
}

/// 70.48 GiB free, fraction 0.9, 32 layers of 16 KV heads of 128 in fp16, blocks of 64, sequences of 2048.
#[test]
fn the_published_cache_arithmetic() {
    let states: String = (0..64).map(|n| format!("  state @kv{n} : f16[$pages, 64, 16, 128]\n")).collect();
    let source = format!(
        "module @m phase imported {{
  dim $t in 1..=1
  dim $pages in 1..=100000
{states}  graph @main(%0 \"x\": f32[$t]) -> (\"y\": f32[$t]) {{
    %1 = exp %0 : f32[$t]
    return %1
  }}
}}"
    );
    let module: Module = text::parse(&source).unwrap();
    let model = LanguageModel {
        vocab_size: 2,
        max_batch_size: 1000,
        max_input_len: 1024,
        max_seq_len: 2048,
        max_num_tokens: 8192,
        max_logit_rows: 1,
        tokens_per_block: 64,
        eos: Vec::new(),
        bos: None,
    };
    let manifest = Manifest {
        kind: ModelKind::Decoder,
        family: "llama".to_string(),
        target: "cuda".to_string(),
        dtype: DType::F16,
        pipeline: String::new(),
        weight_streaming: false,
        profiles: Vec::new(),
        model: Some(model),
    };
    let subject = Subject { module: &module, manifest: &manifest, table: None };
    let free = (70.48 * f64::from(1 << 30)) as u64;
    let ask = |cap: u64| {
        let session = SessionOptions { cap: Some(cap), ..SessionOptions::default() };
        Fit::of(subject, &Question { session, ..Question::default() }).unwrap()
    };
    let rest = ask(free).classes.iter().filter(|(c, _)| *c != Class::Kv).map(|(_, b)| b).sum::<u64>();
    let fit = ask(free + rest);
    assert_eq!(fit.page_bytes, 262_144 * 64);
    let field = fit.field.unwrap();
    assert_eq!((field.blocks, field.tokens), (4060, 259_840));
    assert_eq!(format!("{:.2}", field.bytes as f64 / f64::from(1 << 30)), "63.44");
    // All of what is free: 32 blocks for each sequence of 2048.
    let capacity = &fit.capacities[0];
    assert_eq!((capacity.pages, capacity.batch), (free / (262_144 * 64), 4510 / 32));
    assert!(fit.to_string().contains("4060 blocks, 259840 tokens, 63.44 GiB"), "{fit}");
}

/// The 8B shape in bf16 on an H200: every row of a measured sweep, and 369 ms for 8 x 2048 tokens.
#[test]
fn predicted_steps_are_those_measured() {
    let mut options = CompileOptions {
        weight_streaming: true,
        target: TargetChoice::parse("cuda:sm_90a").unwrap(),
        builder: Builder { plan_only: true, ..Builder::default() },
        ..CompileOptions::default()
    };
    options.pipeline = options.target.level(2);
    options.import.dummy_weights = true;
    options.import.max_num_tokens = Some(16384);
    options.import.max_batch_size = Some(32);
    options.import.max_seq_len = Some(4096);
    options.import.max_input_len = Some(2048);
    let compiled = compile(&root("tests/data/configs/llama-3.1-8b"), &options, None).unwrap();
    let table = compiled.device.bundles.first().map(|b| &b.table);
    assert!(table.is_some());
    let subject = Subject { module: &compiled.module, manifest: &compiled.manifest, table };
    let ask = |batch, sequence| {
        Fit::of(subject, &Question { batch: Some(batch), sequence: Some(sequence), ..Question::default() })
            .unwrap()
    };
    let sweep = std::fs::read(root("benches/results/gpu-streaming-2026-11-21-3.json")).unwrap();
    let sweep: Value = serde_json::from_slice(&sweep).unwrap();
    let sweep = sweep["sweep"].as_array().unwrap();
    assert_eq!(sweep.len(), 12);
    for row in sweep {
        // Half of the new tokens are there, and the prompt.
        let past = row["input_len"].as_u64().unwrap() + row["output_len"].as_u64().unwrap() / 2;
        let fit = ask(row["batch_size"].as_u64().unwrap(), 2 * past);
        let percent = row["weights_budget"].as_str().unwrap();
        let told = fit.rows.iter().find(|r| format!("{}%", r.percent) == percent).unwrap();
        // Residents are spread by predicted times, which move the last tile.
        let (moved, streamed) = (told.moved, row["streamed_bytes_per_step"].as_u64().unwrap());
        assert!(moved.abs_diff(streamed) < 32 << 20, "{percent}: {moved} and {streamed}");
        let (told, measured) = (told.decode.unwrap().0, row["decode_ms_per_step"].as_f64().unwrap());
        let told = told as f64 / 1e6;
        assert!((told / measured - 1.0).abs() < 0.05, "{percent}: {told} ms, measured {measured}");
    }
    let fit = ask(1, 256);
    let decode: Vec<f64> = fit.rows.iter().map(|r| r.decode.unwrap().0 as f64 / 1e6).collect();
    assert!(decode.windows(2).all(|pair| pair[1] <= pair[0]), "{decode:?}");
    let floor = fit.rows[0].moved as f64 / 55.6e9 * 1e3;
    assert!((floor..1.03 * floor).contains(&decode[0]), "{decode:?}, floor {floor}");
    let prefill = ask(8, 2048).rows[5].prefill.0 as f64 / 1e6;
    assert!((prefill / 369.0 - 1.0).abs() < 0.1, "{prefill}");
    // Two slots of 32 MiB and the norms.
    assert!(fit.minimum <= 128 << 20, "{}", fit.minimum);
    assert_eq!(fit.rows[0].device, fit.minimum);
    assert!(fit.pinned == 0 && fit.context > 0);
    assert_eq!(fit.reason.class, Class::Weights);
}

#[test]
fn the_schedule_is_as_accepted() {
    let engine = engine("tests/data/tiny-random/qwen2", DType::F32, |o| o.weight_streaming = true);
    let demand = Demand::of(engine.module()).unwrap();
    let ring = Ring { slots: 2, slot_bytes: 4096, small: 1024, align: 64 };
    let all = millrace::ir::plan::stream::resident(&demand, &ring);
    let least = millrace::ir::plan::stream::minimum(&demand, &ring);
    let placement = place(&demand, least + (all - least) / 4, &ring, &[]).unwrap();
    let found = schedule(engine.module(), &demand, &placement);
    let path = root("tests/schedule.snap");
    if std::env::var("MILLRACE_ACCEPT").is_ok_and(|v| v == "1") {
        std::fs::write(&path, &found).unwrap();
    }
    let accepted = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == accepted, "found:\n{found}\nMILLRACE_ACCEPT=1 accepts it");
}

fn millrace(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace")).current_dir(root("")).args(args).output().unwrap()
}

#[test]
fn budgets_on_the_command_line() {
    let run = |extra: &[&str]| {
        let mut args =
            vec!["run", BAKER, "--dtype", "float32", "--token-ids", "1,2,3", "--max-new-tokens", "2"];
        args.extend(extra);
        millrace(&args)
    };
    let refused = [
        (&["--weights-budget", "100"][..], "has no unit"),
        (&["--gpu-weights-percent", "20"], "is no fraction"),
        (&["--gpu-weights-percent", "0.2;0.4"], "one --gpu-weights-percent"),
        (&["--weights-budget", "40%"], "compile with --weight-streaming"),
        (&["--ring-slots", "1"], "cannot work"),
        (&["--on-oom", "pray"], "use fail or shrink"),
        (&["--kv-pages", "0"], "use --kv-pages 1 to "),
    ];
    for (extra, expected) in refused {
        let output = run(extra);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{extra:?}: {text}");
        assert!(text.contains(expected), "{extra:?}: {text}");
    }
    let output = run(&["--verbose", "--kv-pages", "4"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    let lines = [
        "Loaded engine size: ",
        "Peak memory usage during engine building: CPU: ",
        "Total Weights Memory: 28.26 MiB",
        "Total Activation Memory: ",
        " for execution context memory.",
        " for the runtime buffers.",
        " for the decoder.",
        "total: ",
        "available: ",
        "Number of blocks in KV cache primary pool: 4",
        "Number of blocks in KV cache secondary pool: 0",
        "Number of tokens per block: 32",
        "Max KV cache blocks per sequence: 16",
        " for max tokens in paged KV cache (128).",
    ];
    for line in lines {
        assert!(text.contains(line), "{line} is not in {text}");
    }
}

#[test]
fn fit_on_the_command_line() {
    let output = millrace(&["fit", "tests/data/configs/llama-3.1-8b", "--memory-cap", "8GiB", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["fits"], false);
    assert_eq!(told["predictions"].as_array().unwrap().len(), 6);
    assert!(told["largest"]["parts"][0]["name"].as_str().unwrap().starts_with('@'));
    let sum: u64 = told["classes"].as_array().unwrap().iter().map(|c| c["bytes"].as_u64().unwrap()).sum();
    assert_eq!(told["total_bytes"], sum);
    let output = millrace(&["fit", BAKER, "--weights-budget", "auto"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("--memory-cap"));
    let output = millrace(&[
        "fit",
        BAKER,
        "--weights-budget",
        "auto:1MiB",
        "--memory-cap",
        "40MiB",
        "--kv-pages",
        "16",
    ]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("fits the cap of 40.00 MiB") && text.contains("weight ring"), "{text}");
    let output = millrace(&["fit", BAKER, "--dtype", "float32", "--weights-budget", "30%", "--schedule"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("rows are read where they lie") && text.contains("copy 0: @"), "{text}");
}
