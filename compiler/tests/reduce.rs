//! Reduction: what is left, and that it is a function of module and predicate.

use millrace_compiler::Registry;
use millrace_compiler::reduce::{reduce, reduce_pipeline};
use millrace_ir::verify::check;
use millrace_ir::{Module, text};

/// A decoder-like stack with a state, an index computation and one `tanh` in the middle of the second layer.
const STACK: &str = r#"module @stack phase imported {
  dim $t in 1..=64 hint 8
  weight @embed : f32[40, 16] = random(seed = 1, std = 0.5)
  weight @a.long.name : f32[16, 16] = random(seed = 2, std = 0.5)
  weight @b : f32[16] = dense[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]
  graph @main(%0 "ids": i32[$t], %1 "z": f32[$t, 16]) -> ("y": f32[$t, 16], "w": f32[$t, 16]) {
    %2 = gather @embed, %0 {axis = 0} : f32[$t, 16] loc(embed)
    %3 = matmul %2, @a.long.name {transpose_b = true} : f32[$t, 16] loc(l.0)
    %4 = exp %3 : f32[$t, 16] loc(l.0)
    %5 = add %4, %1 : f32[$t, 16] loc(l.0)
    %6 = matmul %5, @a.long.name {transpose_b = true} : f32[$t, 16] loc(l.1)
    %7 = tanh %6 : f32[$t, 16] loc(l.1)
    %8 = mul %7, @b : f32[$t, 16] loc(l.1)
    %9 = sub %8, %5 : f32[$t, 16] loc(l.1)
    %10 = exp %9 : f32[$t, 16] loc(head)
    %11 = abs %5 : f32[$t, 16] loc(head)
    return %10, %11
  }
}
"#;

fn has(module: &Module, op: &str) -> bool {
    module.graph.nodes.iter().any(|(_, n)| n.op.name() == op)
}

fn stack() -> Module {
    text::parse(STACK).unwrap()
}

#[test]
fn one_node_is_left_where_one_node_matters() {
    let small = reduce(&stack(), &mut |m| has(m, "tanh"));
    assert_eq!(
        text::print(&small),
        "module @stack phase imported {\n  graph @main(%0 \"x0\": f32[1, 1]) -> (\"y\": f32[1, 1]) {\n    %1 = tanh %0 : f32[1, 1]\n    return %1\n  }\n}\n"
    );
}

#[test]
fn what_belongs_together_stays() {
    // A predicate on two nodes that read one another through others, and on a symbol.
    let mut predicate = |m: &Module| has(m, "gather") && has(m, "sub") && !m.dims.is_empty();
    let small = reduce(&stack(), &mut predicate);
    assert!(predicate(&small) && check(&small).is_ok());
    assert!(small.graph.order.len() <= 3, "{}", text::print(&small));
    assert_eq!(small.graph.outputs.len(), 1);
}

#[test]
fn the_result_is_a_function_of_module_and_predicate() {
    let twice = [0, 1].map(|_| text::print(&reduce(&stack(), &mut |m| has(m, "matmul") && has(m, "mul"))));
    assert_eq!(twice[0], twice[1]);
}

#[test]
fn the_predicate_sees_legal_modules_only() {
    let mut seen = 0;
    reduce(&stack(), &mut |m| {
        seen += 1;
        assert!(check(m).is_ok());
        // Rejecting at random, the same each time.
        has(m, "tanh") && seen % 3 != 2
    });
    assert!(seen > 10 && seen < 1000, "{seen}");
}

#[test]
fn what_does_not_fail_is_left_alone() {
    assert_eq!(reduce(&stack(), &mut |_| false), stack());
}

#[test]
fn pipelines_are_cut_and_unrolled() {
    let registry = Registry::standard();
    let long = registry.pipeline("canonicalize,fixpoint{cse,(const-fold,dce)},O1").unwrap();
    let text = |p: &millrace_compiler::pipeline::Pipeline| p.to_string();
    let small =
        reduce_pipeline(&long, &mut |p| text(p).contains("const-fold") && text(p).contains("pack-weights"));
    assert_eq!(small.to_string(), "const-fold,pack-weights");
}
