//! `rolled{..}` makes of a module what its steps make of it, and says when it does not roll.

#[path = "../../tests/common/stack.rs"]
mod stack;

use millrace_compiler::pass::Context;
use millrace_compiler::pipeline::{Controls, LEVELS, Manager, Pipeline};
use millrace_ir::{Module, text};

struct Done {
    module: Module,
    context: Context,
    runs: Vec<(&'static str, bool, usize)>,
}

fn run(module: &Module, pipeline: &str, whole: bool) -> Done {
    let mut module = module.clone();
    let mut context = Context::cpu();
    let controls = Controls { whole, ..Controls::default() };
    let mut manager = Manager { controls, verify_each: true, ..Manager::default() };
    manager.run(&Pipeline::parse(pipeline).unwrap(), &mut module, &mut context).unwrap();
    let runs = manager.runs.iter().map(|r| (r.name, r.changed, r.nodes)).collect();
    module.compact();
    Done { module, context, runs }
}

/// What `rolled` said.
fn said(context: &Context) -> Vec<&str> {
    context.remarks.iter().filter(|r| r.pass == "rolled").map(|r| r.message.as_str()).collect()
}

/// Runs `pipeline` with and without rolling and asks for the same module, counters and runs.
#[track_caller]
fn same(module: &Module, pipeline: &str) -> Done {
    let [rolled, whole] = [false, true].map(|whole| run(module, pipeline, whole));
    assert_eq!(said(&whole.context), [""; 0]);
    if text::print(&rolled.module) != text::print(&whole.module) {
        let (a, b) = (text::print(&whole.module), text::print(&rolled.module));
        let diff = a
            .lines()
            .zip(b.lines())
            .filter(|(a, b)| a != b)
            .take(20)
            .map(|(a, b)| format!("{a}\n{b}\n"))
            .collect::<String>();
        panic!("{:?}\n{}", said(&rolled.context), diff);
    }
    assert_eq!(rolled.module, whole.module);
    assert_eq!(rolled.context.stats, whole.context.stats);
    assert_eq!(rolled.runs, whole.runs);
    rolled
}

#[test]
fn a_decoder_is_rolled() {
    for layers in [6, 7, 11, 12] {
        let module = stack::decoder(21 * layers).unwrap();
        for level in LEVELS {
            let text = level.replace("rolled{", "rolled<min=6>{");
            let done = same(&module, &text);
            if text.contains("rolled") {
                let [remark] = said(&done.context)[..] else { panic!("{:?}", said(&done.context)) };
                assert!(remark.contains("equal layers of 22 nodes"), "{remark}");
            }
        }
    }
}
