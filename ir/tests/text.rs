//! The text form: canonical texts print as they are, modules survive printing, and errors say where and what.

use std::fs;
use std::path::Path;

use millrace_ir::graph::Phase;
use millrace_ir::text::{operand_name, parse, print, print_node};
use millrace_ir::verify::{report, verify};
use millrace_ir::{Id, NodeId, Operand};

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

/// A small module around one changed piece.
fn around(dims: &str, declarations: &str, nodes: &str) -> String {
    format!(
        "module @m phase imported {{\n  dim $t in {dims}\n{declarations}  graph @main(%0 \"x\": f32[$t, 4]) -> \
         (\"y\": f32[$t, 4]) {{\n{nodes}\n    return %1\n  }}\n}}\n"
    )
}

fn node(line: &str) -> String {
    around("1..=64", "", &format!("    {line}"))
}

#[test]
fn errors_name_place_token_and_nearest_name() {
    let weight = "  weight @norm.w : f32[4] = splat(1.0)\n";
    let cases: [(String, &str); 24] = [
        (String::new(), "1:1: expected `module`, found the end of the text"),
        ("module @m phase fusd {".into(), "1:17: `fusd` is no phase\n  next: did you mean `fused`?"),
        (
            "module @m phase x {".into(),
            "1:17: `x` is no phase\n  next: phases are imported, canonical, fused, scheduled, planned, lowered",
        ),
        (
            node("%1 = rms_nrom %0 : f32[$t, 4]"),
            "4:10: there is no op `rms_nrom`\n  next: did you mean `rms_norm`?",
        ),
        (
            node("%1 = frobnicate %0 : f32[$t, 4]"),
            "4:10: there is no op `frobnicate`\n  next: docs/ir.md lists all ops",
        ),
        (node("%1 = exp %0 {eps = 1.0} : f32[$t, 4]"), "4:10: `exp`: unknown or repeated attribute `eps`"),
        (node("%1 = exp %7 : f32[$t, 4]"), "4:14: `%7` is never defined"),
        (
            node("%1 = exp %9999 : f32[$t, 4]"),
            "4:14: `%9999` is too large for this text\n  next: number values from %0",
        ),
        (node("%0 = exp %0 : f32[$t, 4]"), "4:5: `%0` is defined twice"),
        (node("%1 = exp %0 : f33[$t, 4]"), "4:19: `f33` is no element type\n  next: did you mean `f32`?"),
        (node("%1 = exp %0 f32[$t, 4]"), "4:17: expected `:`, found `f32`"),
        (node("%1 = exp %0 : f32[$t 4]"), "4:26: expected `]`, found `4`"),
        (node("%1 = exp %0 : f32[ceildiv($t, 0)]"), "4:35: a divisor is a positive integer"),
        (
            node("%1 = exp %0 : f32[9223372036854775808]"),
            "4:23: `9223372036854775808` does not fit in 64 bits",
        ),
        (node("%1, %2 = exp %0 : f32[$t, 4]"), "4:14: 2 results but 1 types"),
        (node("%1 = exp %0 : f32[$t, 4] @ act[0]"), "4:32: there is no arena `act`"),
        (node("%1 = exp %0 : f32[$t, 4] ; é"), "4:30: `;` starts no token"),
        (node("%1 = exp %0 : f32[$t, 4] loc(\"é\", ;)"), "4:39: `;` starts no token"),
        (node("%1 = exp %0 : f32[$t, 4] loc(\"a"), "4:34: a string does not end on its line"),
        (
            around("1..=64", weight, "    %1 = rms_norm %0, @norm.v {eps = 1.0} : f32[$t, 4]"),
            "5:23: there is no weight or state `@norm.v`\n  next: did you mean `@norm.w`?",
        ),
        (around("1..=64", &weight.repeat(2), ""), "4:10: `@norm.w` is defined twice"),
        (around("1..64", "", ""), "2:14: expected `..=`, found `..`"),
        (
            around("1..=64", "", "    %1 = exp %0 : f32[$t, 4]")
                .replace("(\"y\": f32[$t, 4])", "(\"y\": f32[$t])"),
            "3:39: output \"y\" is declared f32[$t], but `%1` is f32[$t, 4]",
        ),
        (node("%1 = exp %0 : f32[$t, 4]") + "x", "8:1: expected the end of the text, found `x`"),
    ];
    for (text, expected) in cases {
        let error = parse(&text).unwrap_err();
        assert_eq!(error.to_string(), format!("error[ir/syntax] {expected}"), "\n{text}");
        assert_eq!(error.kind().exit_code(), 2);
    }
}

#[test]
fn nesting_is_bounded_and_said_so() {
    let deep = |n: usize| node(&format!("%1 = exp %0 : f32[{}$t{}]", "(".repeat(n), ")".repeat(n)));
    assert!(parse(&deep(40)).unwrap_err().message().contains("nest deeper than 32"));
    let list = node(&format!("%1 = reshape %0 {{shape = {}1{}}} : f32[$t]", "[".repeat(40), "]".repeat(40)));
    assert!(parse(&list).unwrap_err().message().contains("nest deeper than 32"));
}

#[test]
fn free_spacing_and_comments_parse_to_the_same_module() {
    let (_, text) = modules().into_iter().find(|(name, _)| name == "lowered").unwrap();
    let spaced = text.replace(' ', "\t  ").replace("\n", "   // a comment\n# another\n\r\n");
    let spaced = spaced.replace("\"cpu\"", "\n\"cpu\"");
    assert_eq!(print(&parse(&spaced).unwrap()), text);
}

#[test]
fn numbers_come_back_exactly() {
    for value in [0.0, -0.0, 0.1, 1e-5, 5e-324, f64::MAX, f64::MIN_POSITIVE, -1.0 / 3.0, f64::INFINITY, 1e21]
    {
        let mut module =
            parse(&around("1..=64", "  weight @w : f32[1] = splat(1.0)\n", "%1 = exp %0 : f32[$t, 4]"))
                .unwrap();
        let id = module.weights.ids().next().unwrap();
        module.weights[id].expr = millrace_ir::WeightExpr::Splat(value);
        let again = parse(&print(&module)).unwrap();
        let millrace_ir::WeightExpr::Splat(found) = again.weights[id].expr else { panic!("{again:?}") };
        assert_eq!(found.to_bits(), value.to_bits());
    }
    for extent in [i64::MIN, i64::MIN + 1, -1, 0, i64::MAX] {
        for dim in [format!("{extent}"), format!("{extent}*$t"), format!("{extent}*$t + $t*$t")] {
            let module =
                parse(&around("1..=64", &format!("  state @s : i8[{dim}]\n"), "%1 = exp %0 : f32[$t, 4]"));
            let module = module.unwrap_or_else(|e| panic!("{e} in {dim}"));
            assert_eq!(parse(&print(&module)).unwrap(), module, "{dim}");
        }
    }
}

#[test]
fn holes_between_ids_and_odd_names_survive() {
    let text = r#"module @"a module" phase imported {
  weight @"two words" : f32[4] = splat(1.0)
  weight @"tab\tquote\"slash\\bell\u{7}" : f32[4] = reshape(@"two words")
  weight @b.first : f32[4] = reshape(@c-later)
  weight @c-later : f32[4] = splat(0.5)
  graph @"7th"(%3 "x y": f32[4]) -> ("": f32[4]) {
    %9 = rms_norm %3, @"two words" {eps = 1.0} : f32[4] loc(a.b-c, "a b", "")
    return %9
  }
}
"#;
    let module = parse(text).unwrap();
    assert_eq!(print(&module), text);
    assert_eq!(module.graph.values.bound(), 10);
    assert_eq!(module.graph.values.len(), 2);
}

#[test]
fn nodes_and_operands_are_shown_as_texts_spell_them() {
    let text = r#"module @m phase imported {
  weight @"odd name" : f32[4] = splat(1.0)
  state @s : f32[2, 2, 1, 4]
  graph @main(%0 "x": f32[4]) -> ("y": f32[4]) {
    %1 = rms_norm %0, @"odd name" {eps = 1.0} : f32[4] loc(a)
    return %1
  }
}
"#;
    let module = parse(text).unwrap();
    let node = module.graph.order[0];
    assert_eq!(print_node(&module, node), r#"%1 = rms_norm %0, @"odd name" {eps = 1.0} : f32[4] loc(a)"#);
    let state = Operand::State(module.states.ids().next().unwrap());
    let spelled: Vec<String> =
        module.graph.nodes[node].operands.iter().chain([&state]).map(|o| operand_name(&module, *o)).collect();
    assert_eq!(spelled, ["%0", "@\"odd name\"", "@s"]);
    assert_eq!(print_node(&module, NodeId::from_index(9)), "(n9 does not exist)");
}
