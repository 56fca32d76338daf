//! A wrong rule, registered from outside, is found in a graph of a hundred nodes with the tools alone, and shown on a
//! graph of one.

use millrace::Result;
use millrace::compiler::Registry;
use millrace::compiler::bisect::bisect;
use millrace::compiler::pass::{Context, Pass};
use millrace::compiler::reduce::{Symptom, differs, reduce, reduce_pipeline, symptom};
use millrace::compiler::rewrite::{From, Outcome, Patch, Rule, View, rewrite};
use millrace::ir::ops::Binary;
use millrace::ir::ops::binary::BinaryFn;
use millrace::ir::{Module, NodeId, Op, Operand, Phase, text};

/// Sorts the operands of commutative nodes, and takes subtraction for one.
struct SortOperands;

impl Rule for SortOperands {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        let Op::Binary(Binary { function }) = &*node.op else { return Outcome::NoMatch };
        let [a @ Operand::Value(_), b @ Operand::Value(_)] = node.operands[..] else {
            return Outcome::NoMatch;
        };
        let sortable = function.commutative() || *function == BinaryFn::Sub;
        if !sortable || a >= b {
            return Outcome::NoMatch;
        }
        let mut patch = Patch::new([id]);
        let new = patch.node(Binary { function: *function }, [From::Old(b), From::Old(a)]);
        patch.replace(node.results[0], From::New(new, 0));
        Outcome::Rewrite(patch)
    }
}

impl Pass for SortOperands {
    fn name(&self) -> &'static str {
        "sort-operands"
    }
    fn help(&self) -> &'static str {
        "sorts operands"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Fused)
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        Ok(rewrite(self.name(), module, context, self)? > 0)
    }
}

fn zoo(name: &str) -> Module {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/zoo").join(name);
    text::parse(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_wrong_rule_is_found_and_shown_on_one_node() {
    let registry = Registry::standard().with(Box::new(SortOperands));
    for name in ["primitive_decoder.ir", "primitive_encoder.ir"] {
        let module = zoo(name);
        assert!(module.graph.order.len() > 80, "{name}");
        let text =
            "fixpoint{canonicalize,cse,dce},sort-operands,fuse-linear,merge-matmuls,fuse-pointwise,dce";
        let pipeline = registry.pipeline(text).unwrap();

        let found = bisect(&module, &pipeline, &mut |after| differs(&module, after).is_some()).unwrap();
        assert_eq!(found.pass, "sort-operands", "{name}: {found}");
        // The answer names the wrong rewrite itself: a subtraction in the graph as it was then.
        let mut before = module.clone();
        let before_pass = registry.pipeline("fixpoint{canonicalize,cse,dce}").unwrap();
        let mut manager = millrace::compiler::pipeline::Manager::default();
        manager.run(&before_pass, &mut before, &mut Context::cpu()).unwrap();
        let op = &before.graph.nodes[found.node.unwrap()].op;
        assert_eq!(*op, Op::Binary(Binary { function: BinaryFn::Sub }), "{name}: {found}");

        let wanted = Some(Symptom::Differs);
        let pipeline = reduce_pipeline(&pipeline, &mut |p| symptom(&module, p, &mut differs) == wanted);
        assert_eq!(pipeline.to_string(), "sort-operands");
        let small = reduce(&module, &mut |m| symptom(m, &pipeline, &mut differs) == wanted);
        let test = format!("// run: opt --passes={pipeline}\n{}", text::print(&small));
        assert!(test.lines().count() <= 15, "{test}");
        assert!(test.contains(" = sub "), "{test}");
        assert_eq!(small.graph.order.len(), 1, "{test}");
        // It is a filetest that fails for the right reason.
        let error = millrace::filetest::report(&test, &registry).unwrap_err();
        assert_eq!(error.code(), "compare/mismatch", "{error}");
    }
}

#[test]
fn a_right_pipeline_has_no_fault() {
    let module = zoo("mlp.ir");
    let pipeline = Registry::standard().pipeline("O2").unwrap();
    assert_eq!(bisect(&module, &pipeline, &mut |after| differs(&module, after).is_some()), None);
    let same = reduce(&module, &mut |m| symptom(m, &pipeline, &mut differs).is_some());
    assert_eq!(same, module);
}
