//! The text form: canonical texts print as they are, modules survive printing, and errors say where and what.

use std::fs;
use std::path::Path;

use millrace_ir::graph::Phase;
use millrace_ir::text::{parse, print};
use millrace_ir::verify::{report, verify};

/// Every module under `tests/modules`, with its file name.
fn modules() -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/modules");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files
        .into_iter()
        .map(|p| (p.file_stem().unwrap().to_string_lossy().into_owned(), fs::read_to_string(p).unwrap()))
        .collect()
}

#[test]
fn canonical_texts_print_as_they_are_and_verify() {
    for (name, text) in modules() {
        let module = parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(print(&module), text, "{name}");
        assert_eq!(parse(&print(&module)).unwrap(), module, "{name}");
        if let Err(violations) = verify(&module) {
            panic!("{name}:\n{}", report(&module, &violations));
        }
    }
}

#[test]
fn every_phase_has_a_module() {
    let phases: Vec<Phase> = modules().iter().map(|(_, text)| parse(text).unwrap().phase).collect();
    for phase in Phase::ALL {
        assert!(phases.contains(&phase), "no module in phase {phase}");
        assert_eq!(Phase::parse(&phase.to_string()), Some(phase));
    }
}
