//! A compiler killed at any moment leaves the old engine or the new one, never something between.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

fn compile(model: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millrace"));
    command.args(["compile".as_ref(), model.as_os_str(), "-o".as_ref(), output.as_os_str()]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().to_string())
        .collect();
    names.sort();
    names
}

#[test]
fn a_kill_leaves_the_old_or_the_new_engine() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("x.engine");
    let (a, b) = (root.join("tests/data/tiny-random/qwen3"), root.join("examples/models/baker-street-6m"));
    assert!(compile(&b, &output).status().unwrap().success());
    let new = std::fs::read(&output).unwrap();
    let start = std::time::Instant::now();
    assert!(compile(&b, &output).status().unwrap().success());
    let whole = start.elapsed();
    assert!(compile(&a, &output).status().unwrap().success());
    let old = std::fs::read(&output).unwrap();
    assert_ne!(old, new);
    let mut seed = 0x9e37_79b9u64;
    let (mut kept, mut replaced) = (0, 0);
    for _ in 0..50 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let fraction = (seed >> 40) as f64 / (1u64 << 24) as f64;
        let mut child = compile(&b, &output).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(whole.as_secs_f64() * 1.1 * fraction));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = std::fs::read(&output).unwrap();
        if found == old {
            kept += 1;
        } else {
            assert!(found == new, "neither the old nor the new engine");
            replaced += 1;
            std::fs::write(&output, &old).unwrap();
        }
    }
    assert!(kept > 0, "no kill came before the end ({replaced} after)");
    assert!(compile(&b, &output).status().unwrap().success());
    assert_eq!(names(folder.path()), ["x.engine"], "leftovers are cleared by the next build");
}
