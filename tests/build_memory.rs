//! Memory of the compiler: reported by phase, bounded by a limit that changes no byte.

use std::path::Path;
use std::process::{Command, Output};

fn millrace(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

fn report(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_limit_is_met_and_changes_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    let baker = "examples/models/baker-street-6m";
    for (model, more, limit) in [
        (baker, &["--dtype", "bf16"][..], 48u64),
        (baker, &["--dtype", "f32", "--strip-weights"], 48),
        ("tests/data/configs/llama-3.1-8b", &["--dummy-weights", "--weight-streaming"], 64),
        ("examples/ir/mlp.ir", &[], 64),
    ] {
        let limit_text = format!("{limit}MiB");
        let (free, bounded) = (file("free.engine"), file("bounded.engine"));
        let compile = |path: &str, bound: &[&str]| {
            millrace(&[&["compile", model, "-o", path, "--json"], more, bound].concat())
        };
        report(&compile(&free, &[]));
        let report = report(&compile(&bounded, &["--host-mem-limit", &limit_text]));
        assert!(std::fs::read(&free).unwrap() == std::fs::read(&bounded).unwrap(), "{model}");
        let build = &report["memory"]["build"];
        let phases: Vec<&str> =
            build["phases"].as_array().unwrap().iter().map(|p| p["phase"].as_str().unwrap()).collect();
        assert_eq!(phases, ["import", "passes", "plan", "kernels", "writing"], "{model}");
        let peak = build["peak_bytes"].as_u64().unwrap();
        assert!(peak > 0 && peak <= limit << 20, "{model}: {build}");
    }
}

#[test]
fn a_limit_that_cannot_be_met_is_an_error_before_any_work() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none.engine").display().to_string();
    let output =
        millrace(&["compile", "examples/models/baker-street-6m", "-o", &path, "--host-mem-limit", "4MiB"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("compile/host-memory") && text.contains("--host-mem-limit "), "{text}");
    assert!(!Path::new(&path).exists());
    // The limit that the error names is enough.
    let named = text.split("--host-mem-limit ").nth(1).unwrap().split_whitespace().next().unwrap();
    let output = millrace(&[
        "compile",
        "examples/models/baker-street-6m",
        "-o",
        &path,
        "--host-mem-limit",
        named,
        "--json",
    ]);
    let build = &report(&output)["memory"]["build"];
    let limit = named.trim_end_matches("MiB").parse::<u64>().unwrap() << 20;
    assert!(build["peak_bytes"].as_u64().unwrap() <= limit, "{named}: {build}");
}
