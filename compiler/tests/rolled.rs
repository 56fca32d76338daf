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

#[test]
fn filetests_are_what_the_steps_make_of_them() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/filetests/rolled");
    let mut rolled = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "ir") {
            continue;
        }
        let source = std::fs::read_to_string(&path).unwrap();
        let passes = source.lines().next().and_then(|l| l.split_once("--passes=")).unwrap().1;
        let passes = passes.split(' ').next().unwrap();
        let done = same(&text::parse(&source).unwrap(), passes);
        if said(&done.context).iter().any(|s| s.contains("equal layers")) {
            rolled.push(path.file_stem().unwrap().to_str().unwrap().to_string());
        }
    }
    rolled.sort();
    let expected = [
        "constant_shapes",
        "gated_layers",
        "norms_are_recovered_bf16",
        "norms_are_recovered_f16",
        "one_layer_differs",
        "one_mask_for_all",
    ];
    assert_eq!(rolled, expected);
}

/// A pass that changed nothing before a group does not run in it, nor behind it one that changed nothing in it.
#[test]
fn settled_passes_stay_settled() {
    let module = stack::decoder(21 * 8).unwrap();
    let done = same(
        &module,
        "begin-fusion,cse,dce,rolled<min=6>{cse,fuse-glu,dce,const-fold},const-fold,cse,schedule",
    );
    assert!(said(&done.context).iter().any(|s| s.contains("8 equal layers")));
    let names: Vec<&str> = done.runs.iter().map(|(name, ..)| *name).collect();
    assert_eq!(names, ["begin-fusion", "cse", "dce", "fuse-glu", "const-fold", "schedule"]);
}

#[test]
fn who_watches_sees_every_layer() {
    let module = stack::decoder(21 * 12).unwrap();
    let pipeline = Pipeline::level(2);
    let mut nodes = Vec::new();
    let mut observer = |_: &'static str, module: &Module, _: bool| nodes.push(module.graph.order.len());
    let mut manager = Manager { observer: Some(&mut observer), ..Manager::default() };
    let mut context = Context::cpu();
    manager.run(&pipeline, &mut module.clone(), &mut context).unwrap();
    assert_eq!(said(&context), [""; 0]);
    assert!(nodes.iter().all(|n| *n > 100), "{nodes:?}");
}
