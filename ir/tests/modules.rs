//! The stored modules use every op, so that texts of every op are read, printed and mutated.

mod common;

use std::collections::BTreeSet;

use millrace_ir::Op;
use millrace_ir::text::parse;

#[test]
fn stored_modules_use_every_op() {
    let modules: Vec<_> = common::modules().iter().map(|(_, text)| parse(text).unwrap()).collect();
    let used: BTreeSet<&str> =
        modules.iter().flat_map(|m| m.graph.nodes.iter()).map(|(_, node)| node.op.name()).collect();
    let missing: Vec<&str> = Op::all_names().into_iter().filter(|name| !used.contains(name)).collect();
    assert!(missing.is_empty(), "no stored module uses {missing:?}");
}
