//! Patterns over small bodies.

use std::cell::RefCell;

use millrace_ir::{Module, text};

use super::*;
use crate::pass::Context;
use crate::rewrite::{Outcome, Rule, rewrite};

/// Looks for a pattern at every node and keeps what it finds.
struct Probe(Pattern, RefCell<Vec<(NodeId, Found)>>);

impl Rule for Probe {
    fn look(&self, view: &View<'_>, node: NodeId) -> Outcome {
        match self.0.find(view, node) {
            Found::Nothing => {}
            found => self.1.borrow_mut().push((node, found)),
        }
        Outcome::NoMatch
    }
}

/// Where the pattern is found in a body over `%0` and `%1`.
fn found(pattern: Pattern, body: &str) -> Vec<(usize, Found)> {
    let source = format!(
        "module @m phase imported {{\n weight @two : f32[] = splat(2.0)\n weight @half : f32[1] = dense[0.5]\n \
         weight @big : f32[3, 4] = splat(2.0)\n \
         graph @main(%0 \"x\": f32[4], %1 \"z\": f32[4]) -> (\"y\": f32[4]) {{\n {body} return %9\n }}\n}}"
    );
    let mut module: Module = text::parse(&source).unwrap();
    let order = module.graph.order.clone();
    let probe = Probe(pattern, RefCell::default());
    rewrite("probe", &mut module, &mut Context::default(), &probe).unwrap();
    let place = |id: NodeId| order.iter().position(|n| *n == id).unwrap();
    probe.1.into_inner().into_iter().map(|(id, f)| (place(id), f)).collect()
}

fn is_found(pattern: Pattern, body: &str) -> bool {
    matches!(found(pattern, body).last(), Some((_, Found::Match(_))))
}

#[test]
fn names_repeat_and_operands_swap() {
    let pattern = || mul(add("a", exp("b")), "b");
    assert!(is_found(pattern(), "%2 = exp %1 : f32[4] %3 = add %2, %0 : f32[4] %9 = mul %1, %3 : f32[4]"));
    assert!(!is_found(pattern(), "%2 = exp %1 : f32[4] %3 = add %2, %0 : f32[4] %9 = mul %0, %3 : f32[4]"));
    assert!(!is_found(sub("a", exp("b")), "%2 = exp %1 : f32[4] %9 = sub %2, %0 : f32[4]"));
}

/// The first operand fits both sides of the sum, but only one choice lets the product match.
#[test]
fn matching_backtracks() {
    let pattern = mul(add(either(["a".into(), exp("a")]), exp("b")), "b");
    let body = "%2 = exp %0 : f32[4] %3 = exp %1 : f32[4] %4 = add %2, %3 : f32[4] %9 = mul %4, %0 : f32[4]";
    let Some((3, Found::Match(found))) = found(pattern, body).pop() else { panic!("not found") };
    assert_eq!(found.nodes().len(), 3);
    assert!(found.value("a") != found.value("b"));
}

#[test]
fn numbers_are_splats_of_any_spelling_that_enlarge_nothing() {
    assert!(is_found(mul("a", 0.5), "%9 = div %0, @two : f32[4]"));
    assert!(is_found(mul("a", 2.0000001), "%9 = mul @two, %0 : f32[4]"));
    assert!(!is_found(mul("a", 2.00001), "%9 = mul @two, %0 : f32[4]"));
    assert!(is_found(add("a", -0.5), "%9 = sub %0, @half : f32[4]"));
    assert!(!is_found(sub("a", 0.5), "%9 = sub @half, %0 : f32[4]"));
    let rows = "%2 = reduce_sum %3 {axes = [0]} : f32[4]";
    let body = format!("%3 = mul %0, @big : f32[3, 4] {rows} %9 = exp %2 : f32[4]");
    assert!(!found(mul("a", 2.0), &body).iter().any(|(at, _)| *at == 0));
}

#[test]
fn products_have_any_grouping() {
    let pattern = || product(["a".into(), exp("a"), "b".into(), 2.0.into()]);
    for (first, second) in [("mul %0, %2", "mul %3, %1"), ("mul %1, %2", "mul %0, %3")] {
        let body = format!(
            "%2 = exp %0 : f32[4] %3 = {first} : f32[4] %4 = {second} : f32[4] %9 = div %4, @half : f32[4]"
        );
        assert!(is_found(pattern(), &body), "{body}");
    }
    assert!(!is_found(pattern(), "%2 = exp %0 : f32[4] %3 = mul %0, %2 : f32[4] %9 = mul %3, @two : f32[4]"));
}

#[test]
fn other_readers_are_named_unless_shared() {
    let body = "%2 = exp %0 : f32[4] %3 = add %2, %1 : f32[4] %9 = mul %3, %2 : f32[4]";
    let all = found(add(exp("a"), "b"), body);
    assert_eq!(all, [(1, Found::Read("%2 is also read by n2".into()))]);
    assert!(is_found(add(shared(exp("a")), "b"), body));
}

#[test]
fn quotients_have_four_spellings() {
    let pattern = || div("a", sqrt("b"));
    for body in [
        "%2 = sqrt %1 : f32[4] %9 = div %0, %2 : f32[4]",
        "%2 = rsqrt %1 : f32[4] %9 = mul %2, %0 : f32[4]",
        "%2 = sqrt %1 : f32[4] %3 = recip %2 : f32[4] %9 = mul %0, %3 : f32[4]",
        "%2 = pow %1, @half : f32[4] %9 = div %0, %2 : f32[4]",
    ] {
        assert!(is_found(pattern(), body), "{body}");
    }
    assert!(!is_found(pattern(), "%2 = sqrt %1 : f32[4] %9 = mul %0, %2 : f32[4]"));
}
