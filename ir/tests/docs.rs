//! `docs/ir.md` is true: its modules are canonical and legal, and its tables name every op, phase and rule.

mod common;

use std::collections::BTreeSet;

use millrace_ir::text::{parse, print};
use millrace_ir::verify::{Rule, check};
use millrace_ir::{DType, Op, Phase};

fn page() -> String {
    std::fs::read_to_string(common::path("../docs/ir.md")).unwrap()
}

/// Contents of the fenced blocks marked `millrace`.
fn blocks(page: &str) -> Vec<String> {
    let marked = page.split("```millrace\n").skip(1);
    marked.map(|rest| rest.split("```").next().unwrap_or(rest).to_string()).collect()
}

/// First cells of the table rows between two headings.
fn first_cells(page: &str, from: &str, to: &str) -> Vec<String> {
    let section = page.split(from).nth(1).unwrap_or_else(|| panic!("no heading {from:?}"));
    let section = section.split(to).next().unwrap_or(section);
    let rows = section.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
    rows.map(|cell| cell.trim_matches('`').to_string()).collect()
}

#[test]
fn examples_are_canonical_and_legal() {
    let page = page();
    let blocks = blocks(&page);
    assert!(blocks.len() >= 4, "only {} examples found", blocks.len());
    for (number, text) in blocks.iter().enumerate() {
        let name = format!("example {}", number + 1);
        let module = parse(text).unwrap_or_else(|e| panic!("{name}: {e}"));
        common::assert_canonical(&name, text, &print(&module));
        check(&module).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn op_tables_list_exactly_the_ops() {
    let listed = first_cells(&page(), "\n## Ops\n", "\n## From planned");
    let listed: Vec<&str> = listed.iter().map(String::as_str).filter(|c| *c != "op" && *c != "---").collect();
    let ops: BTreeSet<&str> = Op::all_names().into_iter().collect();
    assert_eq!(listed.iter().copied().collect::<BTreeSet<_>>(), ops);
    assert_eq!(listed.len(), ops.len(), "an op is listed twice");
}

#[test]
fn fused_ops_are_those_in_the_fused_table() {
    let page = page();
    let fused: BTreeSet<String> =
        first_cells(&page, "\n### Fused\n", "\n## From planned").into_iter().collect();
    for (name, text) in common::modules() {
        for (id, node) in parse(&text).unwrap().graph.nodes.iter() {
            let op = node.op.name();
            assert_eq!(node.op.traits().fused_only, fused.contains(op), "{name} {id}: {op}");
        }
    }
}

#[test]
fn phases_rules_and_element_types_are_all_named() {
    let page = page();
    let rules = first_cells(&page, "\n## Verifier rules\n", "\n## ");
    assert_eq!(rules[2..], (1..=Rule::COUNT).map(|n| Rule(n).to_string()).collect::<Vec<_>>());
    let phases = first_cells(&page, "\n**Phase**", "\n## Grammar");
    assert_eq!(phases[2..], Phase::ALL.map(|p| p.name().to_string()));
    for dtype in DType::ALL {
        assert!(page.contains(&format!("\"{dtype}\"")), "the grammar lacks {dtype}");
    }
}
