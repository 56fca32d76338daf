//! The crates' directions and what each may use, against `cargo metadata`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Package, then the workspace packages it may use.
const ARROWS: [(&str, &[&str]); 5] = [
    ("millrace-ir", &[]),
    ("millrace-kernels", &["millrace-ir"]),
    ("millrace-compiler", &["millrace-ir", "millrace-kernels"]),
    ("millrace-runtime", &["millrace-ir", "millrace-kernels"]),
    ("millrace", &["millrace-ir", "millrace-kernels", "millrace-compiler", "millrace-runtime"]),
];

/// Package from a registry, then the workspace packages that may use it in their code.
const ALLOWED: [(&str, &[&str]); 9] = [
    ("petgraph", &["millrace-ir"]),
    ("safetensors", &["millrace-ir"]),
    ("memmap2", &["millrace-runtime"]),
    ("tokenizers", &["millrace-runtime"]),
    ("minijinja", &["millrace-runtime"]),
    ("clap", &["millrace"]),
    ("indicatif", &["millrace"]),
    ("similar", &["millrace"]),
    ("cudarc", &["millrace-compiler", "millrace-runtime"]),
];

/// Packages of tests.
const TESTS_ONLY: [&str; 5] = ["insta", "proptest", "criterion", "tempfile", "cargo_metadata"];

#[test]
fn arrows_and_packages_are_where_the_table_allows_them() {
    let metadata = MetadataCommand::new().no_deps().exec().unwrap();
    let packages = metadata.workspace_packages();
    let names: BTreeSet<String> = packages.iter().map(|p| p.name.to_string()).collect();
    assert_eq!(names, ARROWS.iter().map(|(n, _)| n.to_string()).collect());
    let mut wrong = Vec::new();
    for package in packages {
        let name = package.name.to_string();
        let (_, arrows) = ARROWS.iter().find(|(n, _)| *n == name).unwrap();
        for dependency in package.dependencies.iter().filter(|d| d.kind != DependencyKind::Development) {
            let used = dependency.name.as_str();
            if names.contains(used) && !arrows.contains(&used) {
                wrong.push(format!("{name} -> {used}"));
            }
            if TESTS_ONLY.contains(&used) {
                wrong.push(format!("{name} uses {used} outside of tests"));
            }
            if ALLOWED.iter().any(|(p, users)| *p == used && !users.contains(&name.as_str())) {
                wrong.push(format!("{name} uses {used}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn unsafe_code_stays_in_the_named_modules() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for header in ["ir/src/lib.rs", "src/lib.rs", "src/main.rs"] {
        let text = std::fs::read_to_string(root.join(header)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{header} forbids unsafe code");
    }
    let denied = std::fs::read_to_string(root.join("compiler/src/lib.rs")).unwrap();
    assert!(denied.contains("#![deny(unsafe_code)]"), "the compiler denies unsafe code");
    let named = [
        "compiler/src/codegen/cuda/nvrtc.rs",
        "kernels/src/cpu/simd/",
        "kernels/src/cpu/parallel.rs",
        "kernels/src/cpu/workers.rs",
        "kernels/src/cpu/matmul.rs",
        "kernels/src/cpu/attention.rs",
        "kernels/src/cpu/program.rs",
        "runtime/src/memory.rs",
        "runtime/src/mapping.rs",
        "runtime/src/cpu/execute.rs",
        "runtime/src/cpu/readers.rs",
        "runtime/src/cpu/residence.rs",
        "runtime/src/cuda/driver",
        "runtime/src/cuda/transfer.rs",
        "runtime/src/cuda/launch.rs",
        "runtime/src/cuda/library.rs",
        "runtime/src/cuda/management.rs",
    ];
    let crates = ["compiler/src", "kernels/src", "runtime/src"];
    for file in crates.iter().flat_map(|c| sources(&root.join(c))) {
        let place = file.strip_prefix(root).unwrap().display().to_string();
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.lines().any(|l| {
            !l.trim_start().starts_with("//") && (l.contains("unsafe {") || l.contains("unsafe fn"))
        });
        assert!(!code || named.iter().any(|n| place.starts_with(n)), "{place} has unsafe code");
    }
}
