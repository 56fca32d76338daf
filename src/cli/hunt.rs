//! `millrace bisect` and `millrace reduce`: which rewrite is at fault, and the smallest graph that shows it.

use std::path::{Path, PathBuf};
use std::process::Command;

use millrace::compiler::Registry;
use millrace::compiler::bisect::bisect;
use millrace::compiler::differential::{detach_files, outputs, small_bindings};
use millrace::compiler::pipeline::Pipeline;
use millrace::compiler::reduce::{Symptom, differs, reduce, reduce_pipeline, symptom};
use millrace::ir::verify::check;
use millrace::ir::{Module, text};
use millrace::{Error, Result};
use serde_json::json;

use super::opt::read_module;
use super::{print, print_json, usage};

/// What is wrong with a result.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Check {
    /// The reference evaluator gives other outputs than before the passes, or a pass fails
    Eval,
    /// A pass fails, panics or leaves a module that breaks rules
    Verify,
}

/// What both verbs take.
#[derive(clap::Args)]
struct Hunt {
    /// A file of IR text
    file: PathBuf,
    /// Passes, such as O2 or canonicalize,fixpoint{cse,dce}
    #[arg(long)]
    passes: String,
    /// What is wrong with a result
    #[arg(long, default_value = "eval")]
    check: Check,
    /// A shell command that gets the optimised module as a file and fails if the result is wrong
    #[arg(long, value_name = "COMMAND", conflicts_with = "check")]
    command: Option<String>,
}

/// A scratch file that goes with its owner.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing to do about a file that cannot be removed.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Hunt {
    fn read(&self) -> Result<(Module, Pipeline)> {
        let pipeline = Registry::standard().pipeline(&self.passes)?;
        let mut module = read_module(&self.file)?;
        check(&module).map_err(|e| e.at(self.file.display()))?;
        let detached = detach_files(&mut module);
        if detached > 0 {
            eprintln!("note: {detached} weights from files are replaced by random ones");
        }
        if self.command.is_none() && self.check == Check::Eval {
            // Without a reference there is nothing to compare with.
            outputs(&module, &small_bindings(&module))
                .map_err(|e| e.at(self.file.display()).hint("use --check=verify or --command"))?;
        }
        Ok((module, pipeline))
    }

    /// Judges a module before and after the passes.
    fn judge(&self) -> impl Fn(&Module, &Module) -> Option<Symptom> + '_ {
        let scratch = Scratch(std::env::temp_dir().join(format!("millrace-hunt-{}.ir", std::process::id())));
        move |before, after| match (&self.command, self.check) {
            (Some(command), _) => status(command, &scratch.0, after),
            (None, Check::Eval) => differs(before, after),
            (None, Check::Verify) => check(after).err().map(|e| Symptom::Error(e.code())),
        }
    }

    fn no_fault(&self) -> Error {
        usage("usage/no-fault", "the passes do nothing wrong on this module")
            .at(self.file.display())
            .hint("check the passes, or say with --command what is wrong with the result")
    }
}

/// Runs a command on a module.
fn status(command: &str, file: &Path, module: &Module) -> Option<Symptom> {
    std::fs::write(file, text::print(module)).ok()?;
    let status =
        Command::new("sh").arg("-c").arg(format!("{command} \"$1\"")).arg("millrace").arg(file).status();
    match status.ok()?.code() {
        Some(0) => None,
        code => Some(Symptom::Status(code.unwrap_or(-1))),
    }
}

/// Panics are part of the search; their messages are not.
fn quietly<T>(search: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = search();
    std::panic::set_hook(hook);
    found
}

/// Find the first rewrite that makes the result of a pipeline wrong.
#[derive(clap::Args)]
pub struct Bisect {
    #[command(flatten)]
    hunt: Hunt,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `bisect`.
pub fn main_bisect(args: &Bisect) -> Result<()> {
    let hunt = &args.hunt;
    let (module, pipeline) = hunt.read()?;
    let judge = hunt.judge();
    let found = quietly(|| bisect(&module, &pipeline, &mut |after| judge(&module, after).is_some()));
    let found = found.ok_or_else(|| hunt.no_fault())?;
    if args.json {
        return print_json(&json!({
            "pass": found.pass,
            "rewrite": found.number,
            "node": found.node.map(|n| n.to_string()),
            "loc": found.loc,
        }));
    }
    let (file, passes) = (hunt.file.display(), &hunt.passes);
    print(&format!(
        "{found}\n  last good: millrace opt --passes='{passes}' --opt-bisect-limit={} {file}\n  first bad: millrace opt --passes='{passes}' --opt-bisect-limit={} {file}\n",
        found.number - 1,
        found.number
    ))
}

/// Make a module and a pipeline as small as they can be while the result stays wrong in the same way.
#[derive(clap::Args)]
pub struct Reduce {
    #[command(flatten)]
    hunt: Hunt,
    /// The filetest to write [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs `reduce`.
pub fn main_reduce(args: &Reduce) -> Result<()> {
    let hunt = &args.hunt;
    let (module, pipeline) = hunt.read()?;
    let judge = hunt.judge();
    let mut tried = 0u64;
    let mut fails = |module: &Module, pipeline: &Pipeline| {
        tried += 1;
        symptom(module, pipeline, &mut |before, after| judge(before, after))
    };
    let found = quietly(|| {
        let wanted = fails(&module, &pipeline)?;
        // A short pipeline makes the rest fast, and a small module may do with a shorter one.
        let pipeline = reduce_pipeline(&pipeline, &mut |p| fails(&module, p).as_ref() == Some(&wanted));
        let small = reduce(&module, &mut |m| fails(m, &pipeline).as_ref() == Some(&wanted));
        let pipeline = reduce_pipeline(&pipeline, &mut |p| fails(&small, p).as_ref() == Some(&wanted));
        Some((small, pipeline, wanted))
    });
    let (small, pipeline, wanted) = found.ok_or_else(|| hunt.no_fault())?;
    eprintln!(
        "{wanted}: {} of {} nodes remain, after {tried} runs",
        small.graph.order.len(),
        module.graph.order.len()
    );
    let test = format!("// run: opt --passes={pipeline}\n{}", text::print(&small));
    match &args.output {
        Some(path) => std::fs::write(path, test).map_err(|e| Error::io("write", path, &e)),
        None => print(&test),
    }
}
