//! The stored modules are canonical and legal, and together cover every phase and every op.

mod common;

use std::collections::BTreeSet;

use millrace_ir::text::{parse, print};
use millrace_ir::verify::check;
use millrace_ir::{Op, Phase};

#[test]
fn stored_modules_are_canonical_and_legal() {
    for (name, text) in common::modules() {
        let module = parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        common::assert_canonical(&name, &text, &print(&module));
        check(&module).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn stored_modules_cover_every_phase_and_op() {
    let modules: Vec<_> = common::modules().iter().map(|(_, text)| parse(text).unwrap()).collect();
    let phases: BTreeSet<Phase> = modules.iter().map(|m| m.phase).collect();
    assert_eq!(phases.len(), Phase::ALL.len());
    let used: BTreeSet<&str> =
        modules.iter().flat_map(|m| m.graph.nodes.iter()).map(|(_, node)| node.op.name()).collect();
    let missing: Vec<&str> = Op::all_names().into_iter().filter(|name| !used.contains(name)).collect();
    assert!(missing.is_empty(), "no stored module uses {missing:?}");
}
