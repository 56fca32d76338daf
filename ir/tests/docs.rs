//! The page about the IR: its examples are canonical and valid, and it mentions every op and every rule.

use std::fs;
use std::path::Path;

use millrace_ir::Op;
use millrace_ir::graph::Phase;
use millrace_ir::text::{parse, print};
use millrace_ir::verify::{Rule, report, verify};

fn page() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ir.md")).unwrap()
}

/// The code blocks marked `millrace`.
fn examples(page: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if line == "```millrace" {
            let block: Vec<&str> = lines.by_ref().take_while(|l| *l != "```").collect();
            blocks.push(block.join("\n") + "\n");
        }
    }
    blocks
}

#[test]
fn examples_are_canonical_and_valid() {
    let blocks = examples(&page());
    assert!(blocks.len() >= 3, "the page shows {} modules", blocks.len());
    for block in blocks {
        let module = parse(&block).unwrap_or_else(|e| panic!("{e}\n{block}"));
        assert_eq!(print(&module), block);
        if let Err(violations) = verify(&module) {
            panic!("{}\n{block}", report(&module, &violations));
        }
    }
}

#[test]
fn every_op_stands_in_the_op_table() {
    let page = page();
    let table: Vec<&str> = page.lines().filter(|l| l.starts_with("| `")).collect();
    let spelled = |name: &str| {
        let cell = format!("`{name}`");
        table.iter().any(|line| line.split('|').nth(1).is_some_and(|first| first.contains(&cell)))
    };
    let missing: Vec<&str> = Op::all_names().into_iter().filter(|name| !spelled(name)).collect();
    assert!(missing.is_empty(), "docs/ir.md lacks the ops {missing:?}");
}

#[test]
fn every_rule_and_phase_stands_on_the_page() {
    let page = page();
    for number in 1..=Rule::COUNT {
        assert!(page.contains(&format!("\n| {} |", Rule(number))), "docs/ir.md lacks rule V{number}");
    }
    for phase in Phase::ALL {
        assert!(page.contains(&format!("`{phase}`")), "docs/ir.md lacks phase {phase}");
    }
}
