//! The command line: one file per verb. Results go to standard output, everything else to standard error.

mod bench;
mod ceilings;
mod compare;
mod compile;
mod control;
mod demo;
mod diff;
mod doctor;
mod eval;
mod fit;
mod hunt;
mod inspect;
mod memory;
mod npy;
mod opt;
mod passes;
mod plan;
mod run;
mod size;
mod tune;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use millrace::{Error, Kind, Result};

/// Compile a model ahead of time into one engine file, and run it inside the memory you give it.
///
/// Exit codes: 0 ok, 1 usage, 2 bad input, 3 unsupported, 4 out of memory, 5 incompatible engine, 6 device, 7 mismatch.
#[derive(Parser)]
#[command(name = "millrace", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    #[command(visible_alias = "build")]
    Compile(compile::Args),
    Run(run::Args),
    Inspect(inspect::Args),
    Eval(eval::Args),
    Bench(bench::Args),
    Fit(fit::Args),
    Tune(tune::Args),
    Opt(opt::Args),
    Passes(passes::Args),
    Explain(passes::Explain),
    Bisect(hunt::Bisect),
    Reduce(hunt::Reduce),
    Diff(diff::Args),
    Plan(plan::Args),
    Compare(compare::Args),
    Verify(verify::Args),
    Doctor(doctor::Args),
    Demo(demo::Args),
}

/// Parses the command line, runs the verb and maps errors to exit codes.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 1 } else { 0 };
            // Nothing is left to report if the terminal is gone.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let result = match cli.verb {
        Verb::Compile(args) => compile::main(&args),
        Verb::Run(args) => run::main(&args),
        Verb::Inspect(args) => inspect::main(&args),
        Verb::Eval(args) => eval::main(&args),
        Verb::Bench(args) => bench::main(&args),
        Verb::Fit(args) => fit::main(&args),
        Verb::Tune(args) => tune::main(&args),
        Verb::Opt(args) => opt::main(&args),
        Verb::Passes(args) => passes::main(&args),
        Verb::Explain(args) => passes::explain(&args),
        Verb::Bisect(args) => hunt::main_bisect(&args),
        Verb::Reduce(args) => hunt::main_reduce(&args),
        Verb::Diff(args) => diff::main(&args),
        Verb::Plan(args) => plan::main(&args),
        Verb::Compare(args) => compare::main(&args),
        Verb::Verify(args) => verify::main(&args),
        Verb::Doctor(args) => doctor::main(&args),
        Verb::Demo(args) => demo::main(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(u8::try_from(error.kind().exit_code()).unwrap_or(70))
        }
    }
}

/// An error of the caller.
fn usage(code: &'static str, message: impl Into<String>) -> Error {
    Error::new(Kind::Usage, code, message)
}

/// Writes to standard output; a closed pipe ends the program quietly, a full disk is an error.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => Err(Error::io("write", "standard output".as_ref(), &e)),
        Ok(()) => Ok(()),
    }
}

/// Writes a value as one line of JSON.
fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&format!("{value}\n"))
}
