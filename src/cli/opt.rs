//! `millrace opt`: run passes on IR text.

use std::path::PathBuf;

use millrace::compiler::Registry;
use millrace::compiler::pass::{Context, Pass};
use millrace::compiler::pipeline::Manager;
use millrace::compiler::target::TargetChoice;
use millrace::ir::{Module, Phase, text};
use millrace::{Error, Result};

use super::control::Control;
use super::print;

/// Run passes on a file of IR text and print the result.
#[derive(clap::Args)]
pub struct Args {
    /// A file of IR text
    file: PathBuf,
    /// Passes, such as O2 or canonicalize,fixpoint{cse,dce}; empty only verifies
    #[arg(long, default_value = "")]
    passes: String,
    /// The target whose facts the passes see
    #[arg(long, default_value = "cpu")]
    target: String,
    #[command(flatten)]
    control: Control,
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let registry = Registry::standard().with(Box::new(TriggerPanic));
    let mut pipeline = registry.pipeline(&args.passes)?;
    args.control.insert(&mut pipeline, &registry)?;
    let controls = args.control.controls(&registry)?;
    let mut dumper = args.control.dumper(&registry)?;
    let mut module = read_module(&args.file)?;
    dumper.observe("import", &module, true);
    let mut context = Context::of(&TargetChoice::parse(&args.target)?.target);
    let watched = dumper.watches();
    let mut observer =
        |pass: &'static str, module: &Module, changed: bool| dumper.observe(pass, module, changed);
    let mut manager = Manager {
        verify_each: args.control.verify_each,
        observer: if watched { Some(&mut observer) } else { None },
        controls,
        ..Manager::default()
    };
    let done = manager.run(&pipeline, &mut module, &mut context);
    let runs = manager.runs;
    // What was seen up to a failure matters most when there is one.
    args.control.report(&runs, &context);
    done.map_err(|e| e.at(args.file.display()))?;
    dumper.finish()?;
    print(&text::print(&module))
}

/// A pass that panics, so that one can see what a failing pass leaves behind. Only this verb knows it.
struct TriggerPanic;

impl Pass for TriggerPanic {
    fn name(&self) -> &'static str {
        "trigger-panic"
    }
    fn help(&self) -> &'static str {
        "panics, to try out what happens then"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Imported, Phase::Lowered)
    }
    fn run(&self, _: &mut Module, _: &mut Context) -> Result<bool> {
        panic!("asked for by name");
    }
}

/// Parses a file of IR text.
pub fn read_module(path: &std::path::Path) -> Result<Module> {
    let source = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
    text::parse(&source).map_err(|e| e.at(path.display()))
}
