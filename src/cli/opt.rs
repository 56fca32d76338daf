//! `millrace opt`: run passes on IR text.

use std::path::PathBuf;

use millrace::compiler::pass::Context;
use millrace::compiler::pipeline::{Manager, Pipeline};
use millrace::ir::text;
use millrace::{Error, Result};

use super::print;

/// Run passes on a file of IR text and print the result.
#[derive(clap::Args)]
pub struct Args {
    /// A file of IR text
    file: PathBuf,
    /// Passes, such as canonicalize,fixpoint{cse,dce}; empty only verifies
    #[arg(long, default_value = "")]
    passes: String,
    /// Verify after every pass
    #[arg(long)]
    verify_each: bool,
    /// Print counters on standard error
    #[arg(long)]
    stats: bool,
    /// Print remarks on standard error
    #[arg(long)]
    remarks: bool,
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let source = std::fs::read_to_string(&args.file).map_err(|e| Error::io("read", &args.file, &e))?;
    let at = |e: Error| e.at(args.file.display());
    let mut module = text::parse(&source).map_err(at)?;
    let mut context = Context::cpu();
    if args.passes.trim().is_empty() {
        millrace::ir::verify::check(&module).map_err(at)?;
    } else {
        let pipeline = Pipeline::parse(&args.passes)?;
        let mut manager = Manager { verify_each: args.verify_each, ..Manager::default() };
        manager.run(&pipeline, &mut module, &mut context).map_err(at)?;
    }
    if args.stats {
        context.stats.iter().for_each(|(name, value)| eprintln!("{name} = {value}"));
    }
    if args.remarks {
        context.remarks.iter().for_each(|r| eprintln!("{r}"));
    }
    print(&text::print(&module))
}
