//! Tuning files: what they choose, that builds are a function of them, and what there is without a GPU.
#![allow(clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::Command;

use millrace::compiler::Tuning;
use millrace::compiler::codegen::cuda::{Builder, Trial, nvrtc_version, trials};
use millrace::compiler::compile::{Progress, prepare_with};
use millrace::compiler::import::Precision;
use millrace::compiler::target::TargetChoice;
use millrace::compiler::tuning::{Entry, VERSION};
use millrace::ir::engine::{SectionKind, Verify};
use millrace::ir::{Bindings, DType};
use millrace::kernels::cuda::Arch;
use millrace::{CompileOptions, Compiled, Engine, compile};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn options() -> CompileOptions {
    let target = TargetChoice::parse("cuda:sm_90a").unwrap();
    let builder = Builder { cache: Some(root("target/kernel-cache")), threads: None, plan_only: false };
    let mut options =
        CompileOptions { pipeline: target.level(2), target, builder, ..CompileOptions::default() };
    options.import.dummy_weights = true;
    options.import.precision = Precision::Fixed(DType::BF16);
    options
}

fn model() -> PathBuf {
    root("tests/data/tiny-random/qwen3")
}

fn all_trials() -> Vec<Trial> {
    let prepared = prepare_with(&model(), &options(), None, &mut Progress::default()).unwrap();
    trials(&prepared.module, Arch::Sm90a)
}

fn entry(candidate: &str, version: &str) -> Entry {
    Entry {
        candidate: candidate.into(),
        nanoseconds: 1000,
        built_in_nanoseconds: 1100,
        device: "NVIDIA H200".into(),
        driver: "13.0".into(),
        version: version.into(),
    }
}

fn bytes(compiled: &Compiled) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    compiled.write(file.path(), &mut |_, _| {}).unwrap();
    std::fs::read(file.path()).unwrap()
}

fn millrace(arguments: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_millrace")).args(arguments).output().unwrap();
    let text = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    (out.status.success(), text)
}

#[test]
fn trials_are_what_engines_run() {
    let all = all_trials();
    assert!(all.len() > 20, "{}", all.len());
    for trial in &all {
        assert!(trial.candidates.len() > 1 && trial.sites > 0, "{}", trial.key);
        assert!(trial.key.starts_with("matmul sm_90a bf16 "), "{}", trial.key);
        assert!((trial.rows.first..=trial.rows.last).contains(&trial.at), "{}", trial.key);
        assert!(trial.buffers.iter().all(|b| b.bytes > 0), "{}", trial.key);
    }
    let mut keys: Vec<&str> = all.iter().map(|t| t.key.as_str()).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), all.len());
    // A lowered module has the same sites.
    if nvrtc_version().is_ok() {
        let compiled = compile(&model(), &options(), None).unwrap();
        let lowered = trials(&compiled.module, Arch::Sm90a);
        assert_eq!(
            lowered.iter().map(|t| &t.key).collect::<Vec<_>>(),
            all.iter().map(|t| &t.key).collect::<Vec<_>>()
        );
    }
}

#[test]
fn engines_are_a_function_of_the_file() {
    if let Err(why) = nvrtc_version() {
        let required = std::env::var("MILLRACE_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
        assert!(!required, "NVRTC is required: {why}");
        eprintln!("SKIPPED engines_are_a_function_of_the_file: {why}");
        return;
    }
    let all = all_trials();
    let one = all.iter().find(|t| t.rows.at == 1).unwrap();
    let other = &one.candidates[1].name;
    let built_in = compile(&model(), &options(), None).unwrap();

    let mut tuned = options();
    tuned.tuning.entries.insert(one.key.clone(), entry(other, VERSION));
    // The text of the file is all that a build takes from it.
    tuned.tuning = Tuning::parse(tuned.tuning.to_text().as_bytes()).unwrap();
    let first = compile(&model(), &tuned, None).unwrap();
    let second = compile(&model(), &tuned, None).unwrap();
    assert_eq!(bytes(&first), bytes(&second));
    assert!(first.context.remarks.iter().all(|r| r.pass != "tuning"));
    let launched = |compiled: &Compiled| -> Vec<String> {
        let table = &compiled.device.bundles[0].table;
        let launches = table.launches_at(&Bindings::minima(&compiled.module.dims)).unwrap();
        launches.iter().map(|l| table.kernels[l.launch.kernel].source.clone()).collect()
    };
    assert_ne!(launched(&first), launched(&built_in));
    let engine = Engine::from_bytes(bytes(&first), Verify::Full).unwrap();
    let provenance = engine.file().section(SectionKind::Provenance).unwrap();
    let provenance: serde_json::Value = serde_json::from_slice(provenance).unwrap();
    assert_eq!(provenance["tuning"][&one.key], *other);

    // What chooses nothing leaves the engine as it is, and says so if it is about a site of the model.
    for (key, entry, said) in [
        (one.key.as_str(), entry(other, "0.0.0"), Some("is of version 0.0.0")),
        (one.key.as_str(), entry("skinny-t0", VERSION), Some("names skinny-t0, which is not known")),
        ("matmul of another model", entry(other, VERSION), None),
    ] {
        let mut stale = options();
        stale.tuning.entries.insert(key.into(), entry);
        let compiled = compile(&model(), &stale, None).unwrap();
        assert_eq!(bytes(&compiled), bytes(&built_in), "{key}");
        let remarks: Vec<&str> = compiled
            .context
            .remarks
            .iter()
            .filter(|r| r.pass == "tuning")
            .map(|r| r.message.as_str())
            .collect();
        assert_eq!(remarks.len(), usize::from(said.is_some()), "{remarks:?}");
        assert!(said.is_none_or(|s| remarks[0].contains(s)), "{remarks:?}");
    }
}

#[test]
fn sites_are_listed_without_a_gpu() {
    let model = model();
    let model = model.to_str().unwrap();
    let (done, text) = millrace(&["tune", model, "--dummy-weights", "--dtype", "bf16", "--dry-run"]);
    assert!(done && text.contains("sm_90a: ") && text.contains("sm_80: "), "{text}");
    let rows = ["tune", model, "--dummy-weights", "--dtype", "bf16", "--dry-run", "--rows", "1", "--json"];
    let (done, text) = millrace(&[&rows[..], &["--target", "cuda:sm_90a"]].concat());
    let list: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(done && list.as_array().unwrap().iter().all(|t| t["rows"] == 1), "{text}");
}

#[test]
fn without_a_gpu_measuring_says_why() {
    let (_, doctor) = millrace(&["doctor", "--json"]);
    let doctor: serde_json::Value = serde_json::from_str(&doctor).unwrap();
    if doctor["gpu_problem"].is_null() {
        eprintln!("SKIPPED without_a_gpu_measuring_says_why: there is a GPU");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.json");
    let (file, model) = (file.to_str().unwrap(), model());
    let model = model.to_str().unwrap();
    let compile = ["compile", model, "--dummy-weights", "--tune", "1s", "--tuning", file, "--dry-run"];
    for arguments in [
        vec!["tune", model, "--dummy-weights", "-o", file],
        [&compile[..], &["--target", "cuda:sm_90a"]].concat(),
    ] {
        let (done, text) = millrace(&arguments);
        assert!(!done && text.contains("error[cuda/no-"), "{text}");
    }
    let (done, text) = millrace(&compile);
    assert!(!done && text.contains("error[usage/tune-target]"), "{text}");
    assert!(!Path::new(file).exists());
}

#[test]
fn files_merge_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (a, b, c, d) = (path("a"), path("b"), path("c"), path("d"));
    let mut one = Tuning::default();
    one.entries.insert("k".into(), entry("slow", VERSION));
    let mut two = Tuning::default();
    two.entries.insert("k".into(), Entry { nanoseconds: 10, ..entry("fast", VERSION) });
    two.entries.insert("l".into(), entry("x", VERSION));
    one.write(Path::new(&a)).unwrap();
    two.write(Path::new(&b)).unwrap();
    assert!(millrace(&["tune", "--merge", &a, &b, "-o", &c]).0);
    assert!(millrace(&["tune", "--merge", &b, &a, "-o", &d]).0);
    assert_eq!(std::fs::read(&c).unwrap(), std::fs::read(&d).unwrap());
    let merged = Tuning::read(Path::new(&c)).unwrap();
    assert_eq!(merged.entries["k"].candidate, "fast");
    std::fs::write(&a, "{").unwrap();
    let (done, text) = millrace(&["tune", "--merge", &a, &b, "-o", &c]);
    assert!(!done && text.contains("error[compile/tuning]"), "{text}");
    let (done, text) = millrace(&["tune", &a, &b, "-o", &c]);
    assert!(!done && text.contains("error[usage/one-model]"), "{text}");
}
