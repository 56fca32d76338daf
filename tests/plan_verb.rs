//! `millrace plan`: packing a list of buffers from the command line.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn plan(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace")).arg("plan").args(args).output().unwrap()
}

fn file(folder: &Path, text: &str) -> String {
    let path: PathBuf = folder.join("buffers.csv");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_string()
}

/// Every pair of buffers, without help from the planner or its checker.
fn assert_disjoint(csv: &str, report: &serde_json::Value, capacity: u64) {
    let offsets = report["offsets"].as_object().unwrap();
    let rows: Vec<(u64, u64, u64, u64)> = csv
        .lines()
        .skip(1)
        .map(|line| {
            let f: Vec<u64> = line.split(',').map(|f| f.parse().unwrap()).collect();
            (f[1], f[2], offsets[&f[0].to_string()].as_u64().unwrap(), f[3])
        })
        .collect();
    assert_eq!(rows.len(), offsets.len());
    for (i, a) in rows.iter().enumerate() {
        assert!(a.2 + a.3 <= capacity, "{a:?}");
        for b in &rows[i + 1..] {
            let together = a.0 < b.1 && b.0 < a.1;
            assert!(!together || a.2 + a.3 <= b.2 || b.2 + b.3 <= a.2, "{a:?} {b:?}");
        }
    }
}

#[test]
fn published_hard_instances_fit() {
    for name in ["A", "C", "E"] {
        let path = format!("{}/tests/data/minimalloc/{name}.1048576.csv", env!("CARGO_MANIFEST_DIR"));
        let output = plan(&[&path, "--capacity", "1048576", "--json"]);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_disjoint(&std::fs::read_to_string(&path).unwrap(), &report, 1_048_576);
        assert!(report["seconds"].as_f64().unwrap() < 3.0, "{name}: {}", report["seconds"]);
        assert!(report["lower_bound"].as_u64().unwrap() <= report["peak"].as_u64().unwrap());
    }
}

#[test]
fn alignment_and_column_order_count() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), "size,id,upper,lower,alignment\n10,a,4,0,1\n10,b,4,0,64\n5,c,4,0,1\n");
    let output = plan(&[&path, "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // The aligned buffer lies at the bottom.
    assert_eq!(report["peak"], 25, "{report}");
    assert_eq!(report["offsets"]["b"].as_u64().unwrap() % 64, 0);
}

#[test]
fn a_table_without_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(folder.path(), "id,lower,upper,size\nx,0,2,8\ny,2,3,8\n");
    let output = plan(&[&path]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "id,lower,upper,size,offset\nx,0,2,8,0\ny,2,3,8,0\n");
}

#[test]
fn bad_files_and_small_capacities_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    for (text, args, exit, words) in [
        ("id,lower,size\n1,2,3\n", &[][..], 2, "no column `upper`"),
        ("id,lower,upper,size\n1,2,x,3\n", &[], 2, "buffers.csv:2"),
        ("id,lower,upper,size\n1,2,1,3\n", &[], 2, "above upper"),
        ("id,lower,upper,size\n1,2,3,3\n1,2,3,3\n", &[], 2, "listed twice"),
        ("id,lower,upper,size\n1,2,3\n", &[], 2, "plan/bad-buffers"),
        ("id,lower,upper,size\n1,0,1,99999999999999999\n", &[], 2, "2^46"),
        ("id,lower,upper,size\n1,0,1,60\n2,0,1,60\n", &["--capacity", "100"], 4, "120 are alive at once"),
    ] {
        let path = file(folder.path(), text);
        let mut all = vec![path.as_str()];
        all.extend(args);
        let output = plan(&all);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(exit), "{text}: {stderr}");
        assert!(stderr.contains(words), "{text}: {stderr}");
    }
}
