//! Texts made to hurt: deep, long, wide or quadratic ones are refused or done quickly.

use std::time::{Duration, Instant};

use millrace_ir::text::{parse, print};
use millrace_ir::verify::{report, verify};

#[test]
fn texts_made_to_hurt_are_refused_or_done_quickly() {
    let module = |body: &str| format!("module @m phase imported {{\n{body}\n}}\n");
    let graph = |node: &str| {
        let dims: String = ('a'..='z').map(|c| format!("dim ${c} in 1..=64\n")).collect();
        module(&format!("{dims}graph @g(%0 \"x\": f32[$a]) -> (\"y\": f32[$a]) {{\n{node}\nreturn %1\n}}"))
    };
    let sum: Vec<String> = ('a'..='z').map(|c| format!("${c}")).collect();
    let factor = format!("({})", sum.join(" + "));
    let pairs: Vec<String> =
        ('a'..='y').step_by(2).map(|c| format!("${c} + ${}", (c as u8 + 1) as char)).collect();
    let squares = |n: usize| (0..n).map(|i| format!("{}*$a + $b", i + 2)).collect::<Vec<_>>().join(", ");
    let texts = [
        graph(&format!("%1 = exp %0 : f32[{}$a{}]", "(".repeat(100_000), ")".repeat(100_000))),
        graph(&format!("%1 = reshape %0 {{shape = {}}} : f32[$a]", "[".repeat(100_000))),
        graph(&format!("%1 = pointwise %0 {{body = {}}} : f32[$a]", "f(".repeat(100_000))),
        graph(&format!("%1 = exp %0 : f32[{}]", "max(".repeat(100_000))),
        graph(&format!("%1 = exp %0 : f32[{}]", "-".repeat(100_000))),
        graph(&format!("%1 = exp %0 : f32[{}]", [factor.as_str(); 8].join("*"))),
        graph(&format!("%1 = reshape %0 {{shape = [{}]}} : f32[$a]", pairs.join(", "))),
        graph(&format!("%1 = reshape %0 {{shape = [{}]}} : f32[{}]", pairs.join(", "), pairs.join(", "))),
        graph(&format!("%1 = exp %0 : f32[max({})]", squares(64))),
        graph(&format!("%1 = exp %0 : f32[max({})]", squares(5_000))),
        graph("%4294967295 = exp %0 : f32[$a]"),
        graph("%18446744073709551615 = exp %0 : f32[$a]"),
        graph(&format!("%1 = {} %0 : f32[$a]", "x".repeat(500_000))),
        module(&format!(
            "weight @{0} : f32[1] = splat(1.0)\nweight @b : f32[1] = cast(@{0}b)",
            "a".repeat(300_000)
        )),
        module(
            &(0..20_000)
                .map(|i| format!("weight @w{i} : f32[1] = reshape(@w{})\n", i + 1))
                .collect::<String>(),
        ),
        (0..50_000).map(|_| "\"\\u{").collect(),
        "%".repeat(500_000),
        "é".repeat(300_000),
    ];
    for text in texts {
        let started = Instant::now();
        if let Ok(module) = parse(&text)
            && let Err(violations) = verify(&module)
        {
            report(&module, &violations);
        }
        assert!(started.elapsed() < Duration::from_secs(5), "lingers: {:.80}", text);
    }
}

#[test]
fn a_long_module_takes_linear_time() {
    let text = |nodes: usize| {
        let mut text = String::from("module @m phase imported {\n  state @s : f32[4, 4, 4, 4]\n");
        text.push_str("  graph @g(%0 \"x\": f32[4, 4, 4], %1 \"starts\": i32[3], %2 \"lens\": i32[2], ");
        text.push_str("%3 \"table\": i32[2, 4]) -> (\"y\": f32[4, 4, 4, 4]) {\n");
        for id in 4..4 + nodes {
            let version = if id == 4 { "@s".to_string() } else { format!("%{}", id - 1) };
            text.push_str(&format!("    %{id} = kv_append {version}, %0, %1, %2, %3 : f32[4, 4, 4, 4]\n"));
        }
        text.push_str(&format!("    return %{}\n  }}\n}}\n", 3 + nodes));
        text
    };
    let time = |nodes: usize| {
        let text = text(nodes);
        let started = Instant::now();
        let module = parse(&text).unwrap();
        assert!(verify(&module).is_ok());
        assert_eq!(print(&module), text);
        started.elapsed()
    };
    time(1_000);
    let (short, long) = (time(5_000), time(40_000));
    // Eight times the nodes; quadratic work would take sixty-four times as long.
    assert!(long < short * 32 + Duration::from_millis(200), "{short:?} and {long:?}");
}
