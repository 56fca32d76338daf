//! Every file below `tests/filetests`, and what the runner itself promises.

use std::path::Path;

use millrace::compiler::Registry;
use millrace::filetest::{report, run, run_with};

const NEG: &str = "module @m phase imported {
  graph @main(%0 \"x\": f32[4]) -> (\"y\": f32[4]) {
    %1 = reshape %0 {shape = [4]} : f32[4]
    %2 = neg %1 : f32[4] loc(act)
    return %2
  }
}
";

fn reported(line: &str) -> Result<String, String> {
    report(&format!("// run: {line}\n{NEG}"), &Registry::standard()).map_err(|e| e.to_string())
}

#[test]
fn snapshots() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests");
    match run(&folder, &Registry::standard()) {
        Ok(files) => assert!(files >= 300, "{files} filetests"),
        Err(error) => panic!("{error}\naccept with: MILLRACE_ACCEPT=1 cargo test --test filetests"),
    }
}

#[test]
fn run_lines_take_the_options_of_opt() {
    assert!(reported("opt --passes=canonicalize").unwrap().contains("stat canonicalize.rewrites = 1"));
    // Number 1 is the pass's run, number 2 its rewrite.
    let unchanged = "module @m phase canonical {";
    for line in [
        "opt --passes=canonicalize --opt-bisect-limit=1",
        "opt --passes=canonicalize --disable-pass=canonicalize",
    ] {
        let found = reported(line).unwrap();
        assert!(
            found.contains(unchanged) && !found.contains("reshape %0 {shape = [4]} : f32[4]\n-"),
            "{found}"
        );
        assert!(!found.contains("stat canonicalize"), "{found}");
    }
    let stopped = reported("opt --passes=canonicalize,begin-fusion,schedule --stop-at=canonical").unwrap();
    assert!(stopped.contains("+module @m phase canonical"), "{stopped}");
    let stopped = reported("opt --passes=canonicalize,begin-fusion,schedule --stop-at=begin-fusion").unwrap();
    assert!(stopped.contains("+module @m phase fused"), "{stopped}");
}

#[test]
fn malformed_tests_say_what_is_wrong() {
    let message = |line: &str| reported(line).unwrap_err();
    assert!(message("cat").contains("cannot run `cat`"));
    assert!(message("opt --passes=canonicalise").contains("did you mean `canonicalize`?"));
    assert!(message("opt --passes=cse --frobnicate").contains("no option `--frobnicate`"));
    assert!(message("not opt --passes=cse").contains("the passes succeed"));
    assert!(message("opt --passes=plan-memory").contains("accepts phases"));
    assert!(reported("not opt --passes=plan-memory").unwrap().starts_with("error[compile/phase]"));
    assert!(report(NEG, &Registry::standard()).unwrap_err().to_string().contains("no run line"));
}

#[test]
fn snapshots_are_written_once_and_compared_after() {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::standard();
    std::fs::write(folder.path().join("case.ir"), format!("// run: opt --passes=canonicalize\n{NEG}"))
        .unwrap();
    let missing = run_with(folder.path(), &registry, false).unwrap_err().to_string();
    assert!(
        missing.contains("1 of 1 filetests differ") && missing.contains("MILLRACE_ACCEPT=1"),
        "{missing}"
    );
    assert_eq!(run_with(folder.path(), &registry, true).unwrap(), 1);
    assert_eq!(run_with(folder.path(), &registry, false).unwrap(), 1);
    let snapshot = folder.path().join("case.snap");
    let text = std::fs::read_to_string(&snapshot).unwrap().replace("neg", "exp");
    std::fs::write(&snapshot, text).unwrap();
    assert!(run_with(folder.path(), &registry, false).is_err());
}
