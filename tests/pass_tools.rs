//! The command line of the pass manager: opt, compile, passes, explain, bisect, reduce, diff.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const TINY: &str = "tests/data/tiny-random/qwen2";
const MLP: &str = "tests/zoo/mlp.ir";

fn millrace(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).to_string()
}

/// Standard output and standard error of a run that succeeds.
#[track_caller]
fn works(args: &[&str]) -> (String, String) {
    let output = millrace(args);
    assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    (text(&output.stdout), text(&output.stderr))
}

/// Standard error of a run that fails with this exit code and error code.
#[track_caller]
fn fails(args: &[&str], exit: i32, code: &str) -> String {
    let output = millrace(args);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{args:?}: {stderr}");
    assert!(stderr.contains(&format!("error[{code}]")), "{args:?}: {stderr}");
    stderr
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().to_string())
        .collect();
    names.sort();
    names
}

fn path(folder: &Path, name: &str) -> (PathBuf, String) {
    let path = folder.join(name);
    (path.clone(), path.display().to_string())
}

#[test]
fn dumps_are_numbered_and_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let (dumps, at) = path(folder.path(), "dumps");
    let passes = "--passes=canonicalize,fixpoint{cse,dce},fuse-linear,dce";
    let (full, _) = works(&["opt", MLP, passes, "--dump-after=all", "--dump-dir", &at]);
    assert_eq!(
        names(&dumps),
        [
            "000-import.ir",
            "001-canonicalize.ir",
            "002-cse.ir",
            "003-dce.ir",
            "004-fuse-linear.ir",
            "005-dce.ir"
        ]
    );
    let (rest, _) = works(&["opt", &format!("{at}/003-dce.ir"), "--passes=fuse-linear,dce"]);
    assert_eq!(rest, full);
    std::fs::remove_dir_all(&dumps).unwrap();
    works(&["opt", MLP, passes, "--dump-after=changed", "--dump-dir", &at]);
    assert_eq!(names(&dumps), ["000-import.ir", "004-fuse-linear.ir"]);
    let (_, stderr) = works(&["opt", MLP, passes, "--dump-after=cse,fuse-linear"]);
    assert_eq!(stderr.matches("// after ").count(), 2, "{stderr}");
    fails(&["opt", MLP, passes, "--dump-after=csee"], 1, "compile/bad-pipeline");
    let output = millrace(&["compile", TINY, "--dry-run", "--dump-after=plan-memory", "--dump-dir", &at]);
    assert!(output.status.success());
    assert!(names(&dumps).iter().any(|n| n.ends_with("-plan-memory.ir")));
}

#[test]
fn stats_times_and_remarks() {
    let (_, stderr) = works(&["opt", MLP, "--passes=O1", "--stats=json"]);
    let stats: serde_json::Value = serde_json::from_str(stderr.trim()).unwrap();
    assert_eq!(stats["fuse-linear"]["rewrites"], 6);
    let (_, stderr) = works(&["opt", MLP, "--passes=O1", "--stats"]);
    assert!(stderr.contains("fuse-linear.rewrites = 6\n"), "{stderr}");
    let (_, stderr) = works(&["opt", MLP, "--passes=canonicalize,cse", "--time-passes"]);
    assert!(stderr.contains("share") && stderr.contains("100.0 %  2 runs"), "{stderr}");

    let blocked = "tests/filetests/fuse-glu/gate_used_twice.ir";
    let passes = "--passes=fuse-linear,merge-matmuls,fuse-glu,fuse-epilogue";
    let (_, all) = works(&["opt", blocked, passes, "--remarks"]);
    assert!(all.contains("remark[fuse-glu] n3 (mlp): blocked: gate or up has other uses"), "{all}");
    assert!(all.contains("remark[fuse-epilogue]"), "{all}");
    let (_, one) = works(&["opt", blocked, passes, "--remarks=fuse-glu"]);
    assert!(one.contains("remark[fuse-glu]") && !one.contains("remark[fuse-epilogue]"), "{one}");
    let (_, json) = works(&["opt", blocked, passes, "--remarks=fuse-glu", "--remarks-format=json"]);
    let json: serde_json::Value = serde_json::from_str(json.trim()).unwrap();
    assert_eq!(json["remarks"][0]["loc"], "mlp");
    assert_eq!(json["left_out"], 0);
    fails(&["opt", blocked, passes, "--remarks=glu"], 1, "compile/bad-pipeline");
}

#[test]
fn passes_are_left_out_and_stopped_at() {
    let (text, _) =
        works(&["opt", MLP, "--passes=O1", "--disable-pass=fuse-linear", "--stop-at=pack-weights"]);
    assert!(text.contains("phase fused") && !text.contains("matmul.fused"), "{text}");
    let (text, _) = works(&["opt", MLP, "--passes=O1", "--stop-at=scheduled"]);
    assert!(text.contains("phase scheduled"), "{text}");
    assert!(
        fails(&["opt", MLP, "--passes=O1", "--stop-at=sched"], 1, "compile/bad-pipeline").contains("no pass")
    );
    fails(&["opt", MLP, "--passes=O1", "--disable-pass=dcee"], 1, "compile/bad-pipeline");
    // `compile` writes the module where it stopped.
    let (text, _) = works(&["compile", TINY, "--stop-at=canonical"]);
    assert!(text.contains("phase canonical") && text.contains("embedding"), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let (file, at) = path(folder.path(), "fused.ir");
    works(&["compile", TINY, "--stop-at=pack-weights", "-o", &at]);
    assert!(std::fs::read_to_string(&file).unwrap().contains("phase fused"));
    works(&["compile", TINY, "--dry-run", "--disable-pass=fuse-glu", "--verify-each"]);
}

#[test]
fn rewrites_are_numbered_and_limited() {
    let (_, stderr) = works(&["opt", MLP, "--passes=fuse-linear", "--opt-bisect-limit=-1"]);
    assert!(stderr.contains("bisect: rewrite 1 of pass fuse-linear, its run as a whole"), "{stderr}");
    assert!(stderr.contains("bisect: rewrite 2 of pass fuse-linear at n0 (fc1)"), "{stderr}");
    for (limit, expected) in [("0", 0), ("1", 0), ("2", 1), ("4", 2), ("100", 3)] {
        let (text, _) = works(&["opt", MLP, "--passes=fuse-linear", "--opt-bisect-limit", limit]);
        assert_eq!(text.matches("matmul.fused").count(), expected, "{limit}");
    }
    // An engine is built with any limit.
    works(&["compile", TINY, "--dry-run", "--opt-bisect-limit=7"]);
    fails(&["opt", MLP, "--passes=cse", "--opt-bisect-limit=-2"], 1, "usage/bisect-limit");
}

#[test]
fn bisect_and_reduce_take_a_command() {
    let passes = "--passes=O1";
    let command = "--command=! grep -q 'epilogue = \\[bias, gelu\\]'";
    let (found, _) = works(&["bisect", MLP, passes, command]);
    assert!(found.starts_with("rewrite ") && found.contains("of pass fuse-epilogue at n"), "{found}");
    assert!(found.contains("(act2)") && found.contains("first bad: millrace opt"), "{found}");
    let (json, _) = works(&["bisect", MLP, passes, command, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["pass"], "fuse-epilogue");
    // The two commands that were printed are what they say.
    let number = json["rewrite"].as_u64().unwrap();
    for (limit, fused) in [(number - 1, false), (number, true)] {
        let (text, _) = works(&["opt", MLP, passes, &format!("--opt-bisect-limit={limit}")]);
        assert_eq!(text.contains("epilogue = [bias, gelu]"), fused);
    }
    let (small, summary) = works(&["reduce", MLP, passes, command]);
    assert!(small.starts_with("// run: opt --passes=fuse-linear,fuse-epilogue\n"), "{small}");
    assert!(small.contains("gelu") && !small.contains("relu") && !small.contains("softmax"), "{small}");
    assert!(small.lines().count() <= 15, "{small}");
    assert!(summary.contains("exit status 1 of the command: 3 of 9 nodes remain"), "{summary}");
}

#[test]
fn bisect_and_reduce_say_when_there_is_no_fault() {
    for verb in ["bisect", "reduce"] {
        for check in ["eval", "verify"] {
            let error = fails(&[verb, MLP, "--passes=O2", "--check", check], 1, "usage/no-fault");
            assert!(error.contains("next:"), "{error}");
        }
    }
}

#[test]
fn reduce_keeps_the_error_code() {
    let folder = tempfile::tempdir().unwrap();
    let (file, at) = path(folder.path(), "small.ir");
    works(&["reduce", MLP, "--passes=canonicalize,cse,plan-memory", "--check=verify", "-o", &at]);
    let small = std::fs::read_to_string(&file).unwrap();
    assert!(small.starts_with("// run: opt --passes=plan-memory\n"), "{small}");
    assert!(small.lines().count() <= 8, "{small}");
    assert!(fails(&["opt", &at, "--passes=plan-memory"], 1, "compile/phase").contains("plan-memory"));
}

#[test]
fn passes_explain_themselves() {
    let (list, _) = works(&["passes"]);
    let (json, _) = works(&["passes", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    for pass in json["passes"].as_array().unwrap() {
        let name = pass["name"].as_str().unwrap();
        assert!(list.contains(name) && list.contains(pass["help"].as_str().unwrap()));
        let (page, _) = works(&["explain", name]);
        for part in ["phases: ", "before:\nmodule @m", "after:\nmodule @m"] {
            assert!(page.contains(part), "{name}: {page}");
        }
    }
    let (page, _) = works(&["explain", "fuse-glu"]);
    assert!(page.contains("{epilogue = [glu(silu)]}") && !page.contains("```"), "{page}");
    assert!(works(&["explain", "schedule"]).0.contains("option: search=true|false (default false)"));
    assert!(works(&["explain", "schedule", "--json"]).0.contains("\"leaves\":\"scheduled\""));
    assert!(fails(&["explain", "fuse-glue"], 1, "compile/bad-pipeline").contains("did you mean `fuse-glu`?"));
}

#[test]
fn differences_are_shown_by_layer_kernel_and_byte() {
    let folder = tempfile::tempdir().unwrap();
    let [(_, plain), (_, fused), (_, again)] = ["a", "b", "c"].map(|n| path(folder.path(), n));
    works(&["compile", TINY, "-O0", "-o", &plain]);
    works(&["compile", TINY, "-O2", "-o", &fused]);
    works(&["compile", TINY, "-O2", "-o", &again]);
    assert_eq!(works(&["diff", &fused, &again]).0, "equal\n");
    let output = millrace(&["diff", &plain, &fused]);
    assert_eq!(output.status.code(), Some(7));
    let shown = text(&output.stdout);
    assert!(shown.contains("layer model.layers.*.mlp"), "{shown}");
    assert!(shown.contains("kernel cpu.matmul") && shown.contains("activations: "), "{shown}");
    assert!(shown.contains("weight + "), "{shown}");
    let output = millrace(&["diff", &plain, &fused, "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(json["arena_bytes"][0].as_u64() > json["arena_bytes"][1].as_u64(), "{json}");
    assert!(text(&output.stderr).contains("error[compare/differs]"));
}

#[test]
fn differences_of_texts() {
    let folder = tempfile::tempdir().unwrap();
    let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(MLP)).unwrap();
    let changed = |name: &str, from: &str, to: &str| {
        let (file, at) = path(folder.path(), name);
        assert!(source.contains(from));
        std::fs::write(file, source.replace(from, to)).unwrap();
        text(&millrace(&["diff", MLP, &at]).stdout)
    };
    assert_eq!(changed("same", "// Three", "// 3"), "equal\n");
    assert_eq!(changed("op", "gelu %5", "silu %5"), "layer act*\n  -1    gelu\n  +1    silu\n");
    assert_eq!(
        changed("seed", "random(seed = 3, std = 0.1)", "random(seed = 3, std = 0.2)"),
        "weight ~ fc2.weight\n"
    );
    assert_eq!(changed("wiring", "gelu %5", "gelu %4").lines().count(), 1);
    assert!(
        changed("range", "in 1..=64", "in 1..=32").starts_with("symbols: $t in 1..=64 by 1 -> $t in 1..=32")
    );
    fails(&["diff", MLP, "README.md"], 2, "engine/magic");
    fails(&["diff", MLP, "missing"], 2, "io/failed");
}

#[test]
fn a_pass_that_panics_leaves_a_reproducer() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().display().to_string();
    let passes = "--passes=canonicalize,fuse-linear,(cse,trigger-panic),dce";
    let stderr =
        fails(&["opt", MLP, passes, "--reproducer-dir", &at, "--stats"], 70, "compile/pass-panicked");
    assert!(stderr.contains("the pass panicked: asked for by name"), "{stderr}");
    // What was collected before is printed all the same.
    assert!(stderr.contains("fuse-linear.rewrites = 6\n"), "{stderr}");
    let [name] = &names(folder.path())[..] else { panic!("{:?}", names(folder.path())) };
    assert!(
        name.starts_with("millrace-reproducer-trigger-panic-") && stderr.contains(name.as_str()),
        "{name}"
    );
    let file = folder.path().join(name);
    let source = std::fs::read_to_string(&file).unwrap();
    assert!(source.starts_with("// run: opt --passes=trigger-panic\n"), "{source}");
    assert!(source.contains("phase fused") && source.contains("matmul.fused"), "{source}");
    // The command that the error names shows it again.
    let again = ["opt", "--passes=trigger-panic", &file.display().to_string(), "--reproducer-dir", &at];
    fails(&again, 70, "compile/pass-panicked");
}

#[test]
fn a_failing_compilation_prints_what_it_collected() {
    let args =
        ["compile", TINY, "--dry-run", "--pipeline", "canonicalize,fuse-linear,plan-memory", "--stats"];
    let stderr = fails(&args, 1, "compile/phase");
    assert!(stderr.contains("fuse-linear.rewrites = "), "{stderr}");
    let stopped = [&args[..], &["--stop-at=planned"]].concat();
    assert!(fails(&stopped, 1, "compile/phase").contains("fuse-linear.rewrites = "));
    let remarks =
        ["compile", TINY, "--dry-run", "--pipeline", "O1,cse", "--remarks=plan-memory", "--time-passes"];
    let stderr = fails(&remarks, 1, "compile/phase");
    assert!(stderr.contains("remark[plan-memory]") && stderr.contains(" runs"), "{stderr}");
}

#[test]
fn passes_are_put_in_at_places() {
    let place = "--pass-at=before:pack-weights=fixpoint{chunk-mlp,chunk-attention}";
    let compile = ["compile", "examples/models/baker-street-6m", "--dummy-weights", "--dry-run", "--json"];
    let (plain, _) = works(&compile);
    let (json, stderr) = works(&[&compile[..], &[place, "--remarks=chunk-attention"]].concat());
    let [plain, json] = [plain, json].map(|t| serde_json::from_str::<serde_json::Value>(&t).unwrap());
    let pipeline = json["manifest"]["pipeline"].as_str().unwrap();
    assert!(pipeline.contains(",fixpoint{chunk-mlp,chunk-attention},pack-weights,"), "{pipeline}");
    assert!(stderr.contains("remark[chunk-attention]"), "{stderr}");
    let peak = |report: &serde_json::Value| report["memory"]["activations"]["peak_bytes"].as_u64().unwrap();
    assert!(peak(&json) < peak(&plain), "{} is not below {}", peak(&json), peak(&plain));
    // Several places, in order; groups and fixpoints are searched.
    let two =
        ["--pass-at=after:fuse-linear=cse", "--pass-at=before:cse=dce", "--passes=fixpoint{fuse-linear}"];
    let (_, times) = works(&[&["opt", MLP, "--time-passes"], &two[..]].concat());
    assert!(times.contains("dce") && times.contains("cse"), "{times}");
    let wrong =
        |place: &str| fails(&["opt", MLP, "--passes=O1", "--pass-at", place], 1, "compile/bad-pipeline");
    assert!(wrong("before:schedul=cse").contains("did you mean `schedule`?"));
    assert!(wrong("before:chunk-mlp=cse").contains("does not call `chunk-mlp`"));
    assert!(wrong("beside:cse=dce").contains("before:PASS=PASSES"));
}
