//! The pass manager: what happens when passes fail, and what its controls do.

use std::path::Path;

use millrace_compiler::Registry;
use millrace_compiler::bisect::bisect;
use millrace_compiler::pass::{Context, Pass};
use millrace_compiler::passes::pages::header;
use millrace_compiler::pipeline::{Controls, Manager, Stop};
use millrace_compiler::rewrite::{From, Outcome, Patch, Rule, View, rewrite};
use millrace_compiler::target::Target;
use millrace_ir::verify::check;
use millrace_ir::{Error, Kind, Module, NodeId, Op, Phase, Result, text};

const CHAIN: &str = r#"module @m phase imported {
  graph @main(%0 "x": f32[4]) -> ("y": f32[4]) {
    %1 = reshape %0 {shape = [4]} : f32[4] loc(a)
    %2 = neg %1 : f32[4] loc(b)
    %3 = reshape %2 {shape = [2, 2]} : f32[2, 2] loc(c)
    %4 = reshape %3 {shape = [4]} : f32[4] loc(d)
    %5 = exp %4 : f32[4] loc(e)
    return %5
  }
}
"#;

fn chain() -> Module {
    text::parse(CHAIN).unwrap()
}

/// A pass that does something wrong where it meets `exp`.
struct Wrong(&'static str, fn(&mut Module) -> Result<bool>);

impl Pass for Wrong {
    fn name(&self) -> &'static str {
        self.0
    }
    fn help(&self) -> &'static str {
        "does something wrong"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Lowered)
    }
    fn run(&self, module: &mut Module, _: &mut Context) -> Result<bool> {
        let exp = module.graph.nodes.iter().any(|(_, n)| n.op.name() == "exp");
        if exp { (self.1)(module) } else { Ok(false) }
    }
}

fn registry() -> Registry {
    Registry::standard()
        .with(Box::new(Wrong("panics", |_| panic!("{} is a bad number", 13))))
        .with(Box::new(Wrong("breaks", |m| {
            m.graph.order.reverse();
            Ok(true)
        })))
        .with(Box::new(Wrong("refuses", |_| Err(Error::new(Kind::BadInput, "compile/too-large", "no")))))
        .with(Box::new(Wrong("changes", |m| {
            for (_, node) in m.graph.nodes.iter_mut().filter(|(_, n)| n.op.name() == "exp") {
                node.op = Op::from_text("abs", &Default::default()).unwrap().unwrap().into();
            }
            Ok(true)
        })))
}

fn run(passes: &str, controls: Controls) -> (Result<()>, Module, Context, Vec<&'static str>) {
    let (mut module, mut context) = (chain(), Context::cpu());
    let mut manager = Manager { controls, ..Manager::default() };
    let done = manager.run(&registry().pipeline(passes).unwrap(), &mut module, &mut context);
    (done, module, context, manager.runs.iter().map(|r| r.name).collect())
}

fn reproducers(folder: &Path) -> Controls {
    Controls { reproducers: Some(folder.to_path_buf()), ..Controls::default() }
}

/// The only file in a folder.
fn only_file(folder: &Path) -> (String, String) {
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    let [file] = files.as_slice() else { panic!("{files:?}") };
    (file.display().to_string(), std::fs::read_to_string(file).unwrap())
}

#[test]
fn a_panic_is_an_error_with_a_reproducer() {
    let folder = tempfile::tempdir().unwrap();
    let error = run("canonicalize,fixpoint{cse,panics},dce", reproducers(folder.path())).0.unwrap_err();
    assert_eq!((error.code(), error.kind()), ("compile/pass-panicked", Kind::Internal));
    assert_eq!(error.message(), "the pass panicked: 13 is a bad number");
    let (path, source) = only_file(folder.path());
    assert!(path.contains("millrace-reproducer-panics-"), "{path}");
    assert_eq!(error.next_step().unwrap(), format!("`millrace opt --passes='panics' {path}` reproduces it"));
    // One pass, on the module as the passes before it left it.
    assert!(source.starts_with("// run: opt --passes=panics\n// compile/pass-panicked: "), "{source}");
    let mut module = text::parse(&source).unwrap();
    let before = run("canonicalize,fixpoint{cse}", Controls::default()).1;
    assert_eq!(text::print(&module), text::print(&before));
    let again =
        Manager::default().run(&registry().pipeline("panics").unwrap(), &mut module, &mut Context::cpu());
    assert_eq!(again.unwrap_err().code(), "compile/pass-panicked");
}

#[test]
fn the_pass_that_broke_the_module_is_blamed_and_not_a_later_one() {
    let folder = tempfile::tempdir().unwrap();
    // Without --verify-each the broken order is seen when the phase changes, or in the next pass.
    let error = run("canonicalize,breaks,begin-fusion,schedule", reproducers(folder.path())).0.unwrap_err();
    assert_eq!(error.code(), "compile/pass-broke-module");
    assert_eq!(error.place().unwrap(), "after pass breaks");
    assert!(error.message().contains("V7"), "{error}");
    let (path, source) = only_file(folder.path());
    assert!(path.contains("reproducer-breaks-"), "{path}");
    assert!(check(&text::parse(&source).unwrap()).is_ok());
}

#[test]
fn errors_about_the_model_need_no_reproducer() {
    let folder = tempfile::tempdir().unwrap();
    let error = run("refuses", reproducers(folder.path())).0.unwrap_err();
    assert_eq!((error.code(), error.place()), ("compile/too-large", Some("pass refuses")));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_reproducer_that_cannot_be_written_hides_no_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = run("panics", reproducers(&file.path().join("x"))).0.unwrap_err();
    assert_eq!(error.code(), "compile/pass-panicked");
    assert!(error.next_step().unwrap().starts_with("cannot write a reproducer"), "{error}");
}

#[test]
fn limits_stop_rewrites_one_by_one() {
    let counts: Vec<u64> = (0..6)
        .map(|limit| {
            let controls = Controls { limit: Some(limit), ..Controls::default() };
            let (done, _, context, _) = run("canonicalize", controls);
            done.unwrap();
            context.stats.iter().find(|(n, _)| n == "canonicalize.rewrites").map_or(0, |(_, v)| *v)
        })
        .collect();
    // The first number is the run of the pass; then come its rewrites.
    assert_eq!(counts, [0, 0, 1, 2, 3, 3]);
    let controls = Controls { trace: true, ..Controls::default() };
    let events = run("canonicalize", controls).2.numbering.events;
    let shown: Vec<String> = events.iter().map(ToString::to_string).collect();
    assert_eq!(
        shown,
        [
            "rewrite 1 of pass canonicalize, its run as a whole",
            "rewrite 2 of pass canonicalize at n0 (a)",
            "rewrite 3 of pass canonicalize at n3 (d)",
            "rewrite 4 of pass canonicalize at n5 (c)"
        ]
    );
}

#[test]
fn what_phases_need_runs_beyond_the_limit() {
    let controls = Controls { limit: Some(0), ..Controls::default() };
    let (done, module, context, _) = run("O2", controls);
    done.unwrap();
    assert_eq!(module.phase, Phase::Planned);
    assert_eq!(module.graph.order.len(), 5);
    assert!(context.stats.iter().all(|(name, _)| name.starts_with("plan-memory.")), "{:?}", context.stats);
}

#[test]
fn passes_are_left_out_and_pipelines_stop() {
    // fuse-pointwise would make one node of what the two leave.
    let disabled = ["canonicalize", "cse", "fuse-pointwise"].map(String::from).to_vec();
    let disabled = Controls { disabled, ..Controls::default() };
    let (done, module, _, _) = run("O2", disabled);
    done.unwrap();
    assert_eq!((module.phase, module.graph.order.len()), (Phase::Planned, 5));
    let plan = Controls { disabled: vec!["plan-memory".into()], ..Controls::default() };
    assert_eq!(run("O0", plan).1.phase, Phase::Scheduled);
    let stop = |stop| run("O2", Controls { stop: Some(stop), ..Controls::default() });
    let (done, module, _, runs) = stop(Stop::Pass("cse".into()));
    done.unwrap();
    assert_eq!((module.phase, runs), (Phase::Canonical, vec!["canonicalize", "const-fold", "cse"]));
    assert_eq!(stop(Stop::Phase(Phase::Fused)).3.last(), Some(&"fuse-linear"));
}

#[test]
fn bisection_names_passes_without_rewrites_as_well() {
    let pipeline = registry().pipeline("canonicalize,cse,changes,dce").unwrap();
    let bad = |m: &Module| m.graph.nodes.iter().any(|(_, n)| n.op.name() == "abs");
    let found = bisect(&chain(), &pipeline, &mut |m| bad(m)).unwrap();
    assert_eq!((found.pass, found.node), ("changes", None));
    // A failing pass is bad whatever the predicate says.
    let pipeline = registry().pipeline("canonicalize,cse,panics,dce").unwrap();
    assert_eq!(bisect(&chain(), &pipeline, &mut |_| false).unwrap().pass, "panics");
    // A pass that cannot be left out is found too; a module that is bad before all passes has no culprit.
    let pipeline = registry().pipeline("O0").unwrap();
    let placed = |m: &Module| m.phase == Phase::Planned;
    assert_eq!(bisect(&chain(), &pipeline, &mut |m| placed(m)).unwrap().pass, "plan-memory");
    assert_eq!(bisect(&chain(), &pipeline, &mut |_| true), None);
}

#[test]
fn remarks_are_capped() {
    let mut context = Context::cpu();
    let module = chain();
    for _ in 0..Context::REMARKS + 5 {
        context.remark("p", &module.graph, module.graph.order[0], "something");
    }
    assert_eq!((context.remarks.len(), context.remarks_left_out), (Context::REMARKS, 5));
}

#[test]
fn every_pass_has_a_page_and_changes_its_example() {
    let registry = Registry::standard();
    let mut wrong = Vec::new();
    for pass in registry.passes() {
        if header(pass.doc()).len() < 20 {
            wrong.push(format!("{}: no documentation", pass.name()));
        }
        let Some(options) =
            pass.example().lines().next().and_then(|l| l.strip_prefix("// run: opt --passes="))
        else {
            wrong.push(format!("{}: no example", pass.name()));
            continue;
        };
        let (passes, target) = options.split_once(" --target=").unwrap_or((options, "cpu"));
        let mut context = Context::of(&Target::named(target).unwrap());
        let mut module = text::parse(pass.example()).unwrap();
        let mut last = text::print(&module);
        let mut changed = false;
        let mut observer = |name: &'static str, module: &Module, _: bool| {
            let text = text::print(module);
            changed |= name == pass.name() && text != last;
            last = text;
        };
        let mut manager = Manager { verify_each: true, observer: Some(&mut observer), ..Manager::default() };
        manager.run(&registry.pipeline(passes).unwrap(), &mut module, &mut context).unwrap();
        if !changed {
            wrong.push(format!("{}: the example stays as it is", pass.name()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn options_are_taken_by_every_pass_that_declares_them() {
    use millrace_compiler::options::OptionKind;
    for pass in Registry::standard().passes() {
        for option in pass.options() {
            let default = match option.kind {
                OptionKind::Flag { default } => default.to_string(),
                OptionKind::Integer { default, .. } => default.to_string(),
                OptionKind::Choice { default, .. } => default.to_string(),
            };
            let text = format!("{}{{{}={default}}}", pass.name(), option.name);
            assert_eq!(Registry::standard().pipeline(&text).unwrap().to_string(), text);
        }
    }
}

/// Swaps the operands of every subtraction, for ever.
struct Swap;

impl Rule for Swap {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        if node.op.name() != "sub" {
            return Outcome::NoMatch;
        }
        let mut patch = Patch::new([id]);
        let new = patch.node(node.op.clone(), node.operands.iter().rev().copied().map(From::Old));
        patch.replace(node.results[0], From::New(new, 0));
        Outcome::Rewrite(patch)
    }
}

impl Pass for Swap {
    fn name(&self) -> &'static str {
        "swap"
    }
    fn help(&self) -> &'static str {
        "never settles"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Fused)
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        Ok(rewrite(self.name(), module, context, self)? > 0)
    }
}

#[test]
fn a_rule_that_does_not_settle_is_stopped_and_named() {
    let source = CHAIN.replace("exp %4 ", "sub %4, %0 ");
    let mut module = text::parse(&source).unwrap();
    let mut context = Context::cpu();
    let pipeline = Registry::standard().with(Box::new(Swap)).pipeline("swap").unwrap();
    Manager::default().run(&pipeline, &mut module, &mut context).unwrap();
    let [remark] = context.remarks.as_slice() else { panic!("{:?}", context.remarks) };
    assert_eq!((remark.pass, remark.loc.as_str()), ("swap", "e"));
    assert_eq!(remark.message, "stopped after 104 rewrites: the rule does not settle");
    assert_eq!(module.graph.nodes[remark.node].op.name(), "sub");
}
