//! Every rule of the verifier is broken here at least once, alone.
//!
//! `tests/verify/V7_use_before_def.ir` breaks rule V7 and no other; what the verifier says about it is the snapshot
//! beside it. Modules that the text form cannot spell are built below.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use millrace_ir::graph::*;
use millrace_ir::text::parse;
use millrace_ir::verify::{Rule, Violation, check, into_error, report, verify};
use millrace_ir::{Dim, Id};

fn violations(module: &Module) -> Vec<Violation> {
    verify(module).err().unwrap_or_default()
}

/// The rule a file or a case is named after.
fn rule_of(name: &str) -> Rule {
    let digits: String = name.chars().skip(1).take_while(char::is_ascii_digit).collect();
    Rule(digits.parse().unwrap())
}

fn assert_only(rule: Rule, module: &Module, name: &str) -> Vec<Violation> {
    let found = violations(module);
    assert!(!found.is_empty(), "{name} breaks no rule");
    assert!(found.iter().all(|v| v.rule == rule), "{name}:\n{}", report(module, &found));
    found
}

#[test]
fn broken_texts_break_the_rule_they_are_named_after() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/verify");
    let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("verify/snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    for file in files.iter().filter(|f| f.extension().is_some_and(|e| e == "ir")) {
        let name = file.file_stem().unwrap().to_string_lossy();
        let text = fs::read_to_string(file).unwrap();
        let module = parse(&text).unwrap_or_else(|e| panic!("{name}: {e}"));
        let found = assert_only(rule_of(&name), &module, &name);
        settings.bind(|| insta::assert_snapshot!(&*name, report(&module, &found)));
    }
}

const BASE: &str = r#"module @m phase imported {
  dim $t in 1..=64
  weight @w : f32[4] = splat(1.0)
  graph @main(%0 "x": f32[$t, 4]) -> ("y": f32[$t, 4]) {
    %1 = exp %0 : f32[$t, 4]
    %2 = rms_norm %1, @w {eps = 1e-5} : f32[$t, 4]
    return %2
  }
}
"#;

fn n(index: usize) -> NodeId {
    NodeId::from_index(index)
}

fn v(index: usize) -> ValueId {
    ValueId::from_index(index)
}

/// A name and an edit of [`BASE`] that no text can spell.
type Case = (&'static str, &'static str, fn(&mut Module));

const CASES: [Case; 21] = [
    ("V1 weight and state", "error[V1] the weight or state `w` is declared twice", |m| {
        let ty = m.weights[WeightId::from_index(0)].ty.clone();
        m.states.push(State { name: "w".into(), ty });
    }),
    ("V1 arenas", "error[V1] the arena `a` is declared twice", |m| {
        m.phase = Phase::Planned;
        let arena =
            || ArenaDecl { name: "a".into(), size: Dim::from(4096i64).mul(&Dim::from(8i64)), align: 64 };
        let first = m.arenas.push(arena());
        m.arenas.push(arena());
        for value in [1, 2] {
            m.graph.values[v(value)].place = Some(Place::Arena { arena: first, offset: Dim::from(0i64) });
        }
    }),
    ("V1 graph", "error[V1] the graph has no name", |m| m.graph.name.clear()),
    ("V1 module", "error[V1] the module has no name", |m| m.name.clear()),
    ("V4 part", "error[V4] @w: weight#9 does not exist", |m| {
        m.weights[WeightId::from_index(0)].expr = WeightExpr::Reshape { of: WeightId::from_index(9) };
    }),
    ("V4 self", "error[V4] @w: expressions are cyclic or nest deeper than 32", |m| {
        m.weights[WeightId::from_index(0)].expr = WeightExpr::Reshape { of: WeightId::from_index(0) };
    }),
    ("V4 dense", "error[V4] @w: 4097 literal elements for f32[4097]", |m| {
        let weight = WeightId::from_index(0);
        let ty = millrace_ir::TensorType::new(millrace_ir::DType::F32, [4097usize]);
        let expr = WeightExpr::Dense(vec![0.0; 4097]);
        m.weights.push(Weight { name: "d".into(), ty, expr, stream: None });
        m.weights[weight].name = "w0".into();
        let last = m.weights.ids().last().unwrap();
        m.weights[last].name = "w".into();
    }),
    ("V5 twice", "error[V5] n0: stands in the order twice", |m| m.graph.order.push(n(0))),
    ("V5 missing", "error[V5] n1: is missing from the order", |m| {
        m.graph.order.pop();
    }),
    ("V5 unknown", "error[V5] the order names n7, which does not exist", |m| m.graph.order.push(n(7))),
    ("V5 no result", "error[V5] n2: has no result", |m| {
        let op = m.graph.nodes[n(0)].op.clone();
        let empty = Node {
            op,
            operands: Vec::new().into(),
            results: Vec::new().into(),
            loc: Vec::new().into(),
            kernel: None,
            joined: false,
        };
        let node = m.graph.nodes.push(empty);
        m.graph.order.push(node);
    }),
    ("V5 foreign result", "error[V5] n0: %0 is not defined by this node", |m| {
        m.graph.nodes[n(0)].results.push(v(0));
    }),
    ("V5 wrong index", "error[V5] n0: %1 is not defined by this node", |m| {
        m.graph.values[v(1)].def = Def::Node { node: n(0), index: 1 };
    }),
    ("V5 orphan", "error[V5] %3 is defined by nobody", |m| {
        let value = m.graph.values[v(0)].clone();
        m.graph.values.push(value);
    }),
    ("V5 removed node", "error[V5] %2 is defined by nobody", |m| {
        m.graph.order.pop();
        m.graph.nodes.remove(n(1));
    }),
    ("V5 input", "error[V5] %2 is no input", |m| m.graph.inputs.push(v(2))),
    ("V6 value", "error[V6] n1: %9 does not exist", |m| {
        m.graph.nodes[n(1)].operands[0] = Operand::Value(v(9));
    }),
    ("V6 weight", "error[V6] n1: weight#9 does not exist", |m| {
        m.graph.nodes[n(1)].operands[1] = Operand::Weight(WeightId::from_index(9));
    }),
    ("V6 state", "error[V6] n1: state#0 does not exist", |m| {
        m.graph.nodes[n(1)].operands[0] = Operand::State(StateId::from_index(0));
    }),
    ("V12 input", "error[V12] input %0 has a place, but the caller owns it", |m| {
        m.graph.values[v(0)].place = Some(Place::Output(0));
    }),
    ("V13 output", "error[V13] output \"y\" is %9, which does not exist", |m| {
        m.graph.outputs[0].value = v(9)
    }),
];

#[test]
fn broken_modules_break_the_rule_they_are_named_after() {
    for (name, message, edit) in CASES {
        let mut module = parse(BASE).unwrap();
        edit(&mut module);
        let found = assert_only(rule_of(name), &module, name);
        assert!(found.iter().any(|v| v.to_string() == message), "{name}: {found:?}");
        // Showing a broken module must work too.
        assert!(report(&module, &found).contains(message));
    }
}

#[test]
fn every_rule_is_broken_by_some_test() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/verify");
    let files = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned());
    let mut rules: BTreeSet<Rule> = files.filter(|f| f.ends_with(".ir")).map(|f| rule_of(&f)).collect();
    rules.extend(CASES.iter().map(|(name, ..)| rule_of(name)));
    let all: BTreeSet<Rule> = (1..=Rule::COUNT).map(Rule).collect();
    assert_eq!(rules, all);
}

#[test]
fn violations_become_one_error_that_shows_twenty() {
    let mut module = parse(BASE).unwrap();
    assert!(check(&module).is_ok());
    assert_eq!(verify(&module).unwrap().module().name, "m");
    for _ in 0..150 {
        module.graph.order.push(n(0));
    }
    let found = violations(&module);
    assert_eq!(found.len(), 100);
    let error = into_error(&module, &found);
    assert_eq!(error.code(), "ir/invalid");
    assert_eq!(error.place(), Some("module @m"));
    assert_eq!(error.message().matches("error[V5]").count(), 20);
    assert!(error.message().contains("\n    %1 = exp %0 : f32[$t, 4]\n"));
}
