//! Filetests: a folder of `.ir` files, each with the passes to run in its first line and a snapshot beside it.
//!
//! ```text
//! // run: opt --passes=fuse-linear,dce
//! // run: not opt --passes=plan-memory            the passes have to fail
//! ```
//!
//! The options are those of `millrace opt` that change the result: `--passes`, `--pass-at` behind it, `--disable-pass`,
//! `--stop-at`, `--opt-bisect-limit`, `--target`, and `--remarks=PASS`, which shows remarks of one pass only. The snapshot (`case.snap` beside
//! `case.ir`) holds the difference the passes make, their counters and remarks, or their error. Every file is a
//! differential test as well: the reference evaluator gives the same outputs before and after. Modules are verified
//! after every pass.
//!
//! A crate with passes of its own has one test:
//!
//! ```no_run
//! use millrace::compiler::Registry;
//! # fn passes() -> Registry { Registry::standard() }
//!
//! let files = millrace::filetest::run("tests/filetests".as_ref(), &passes())?;
//! assert!(files > 0);
//! # Ok::<(), millrace::Error>(())
//! ```

use std::fmt::Write;
use std::path::{Path, PathBuf};

use millrace_compiler::Registry;
use millrace_compiler::differential::{detach_files, same_outputs, small_bindings};
use millrace_compiler::manager::ROLLED;
use millrace_compiler::pass::Context;
use millrace_compiler::pipeline::{Controls, Manager, Pipeline};
use millrace_compiler::target::Target;
use millrace_ir::verify::check;
use millrace_ir::{Error, Kind, Module, Phase, Result, plan, text};
use similar::TextDiff;

/// Set to 1, this environment variable makes [`run`] write snapshots instead of comparing them.
pub const ACCEPT: &str = "MILLRACE_ACCEPT";

/// The first line of a filetest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunLine {
    /// The passes.
    pub pipeline: Pipeline,
    /// What to leave out and where to stop.
    pub controls: Controls,
    /// The pass whose remarks are shown; all without one.
    pub remarks: Option<String>,
    /// Whether the passes have to fail.
    pub fails: bool,
    /// The target whose facts the passes see.
    pub target: Target,
}

fn malformed(message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, "usage/filetest", message).hint(
        "the first line is `// run: opt --passes=...`, or `// run: not opt ..` if the passes have to fail",
    )
}

impl RunLine {
    /// Reads the first line of `source`.
    ///
    /// # Errors
    /// `usage/filetest` for a line of another form, `compile/bad-pipeline` for unknown passes.
    pub fn read(source: &str, registry: &Registry) -> Result<RunLine> {
        let line = source.lines().next().and_then(|l| l.strip_prefix("// run: "));
        let line = line.ok_or_else(|| malformed("there is no run line"))?;
        let fails = line.starts_with("not ");
        let line = line.strip_prefix("not ").unwrap_or(line);
        let options = line.strip_prefix("opt").ok_or_else(|| malformed(format!("cannot run `{line}`")))?;
        let mut run = RunLine {
            pipeline: Pipeline::default(),
            controls: Controls::default(),
            remarks: None,
            fails,
            target: Target::named("cpu")?,
        };
        for option in options.split_whitespace() {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            match key {
                "--passes" => run.pipeline = registry.pipeline(value)?,
                "--pass-at" => run.pipeline.insert(value, registry)?,
                "--disable-pass" => run.controls.disabled.push(registry.get(value)?.name().to_string()),
                "--stop-at" => run.controls.stop = Some(registry.stop(value)?),
                "--opt-bisect-limit" => {
                    let limit = value.parse().map_err(|_| malformed(format!("`{value}` is no number")))?;
                    run.controls.limit = Some(limit);
                }
                "--target" => run.target = Target::named(value)?,
                "--remarks" if value.is_empty() => {}
                "--remarks" if value == ROLLED => run.remarks = Some(value.to_string()),
                "--remarks" => run.remarks = Some(registry.get(value)?.name().to_string()),
                "--verify-each" | "--stats" => {}
                _ => return Err(malformed(format!("filetests take no option `{option}`"))),
            }
        }
        Ok(run)
    }
}

/// What the snapshot of a filetest holds.
///
/// # Errors
/// `usage/filetest` for a malformed test or passes that fail, or do not, against the run line; `compare/mismatch` if
/// the passes change a result; `ir/*` for a module that does not parse or verify.
pub fn report(source: &str, registry: &Registry) -> Result<String> {
    let run = RunLine::read(source, registry)?;
    let before = text::parse(source)?;
    check(&before)?;
    let mut after = before.clone();
    let mut context = Context::of(&run.target);
    let mut manager = Manager { verify_each: true, controls: run.controls, ..Manager::default() };
    match (manager.run(&run.pipeline, &mut after, &mut context), run.fails) {
        (Err(error), true) => return Ok(format!("{error}\n")),
        (Err(error), false) => return Err(error),
        (Ok(()), true) => return Err(malformed("the passes succeed, and the run line says `not`")),
        (Ok(()), false) => {}
    }
    let printed = text::print(&after);
    let again = text::print(&text::parse(&printed)?);
    if again != printed {
        return Err(malformed("the result does not print back"));
    }
    compare(&before, &after)?;
    let before = text::print(&before);
    let diff = TextDiff::from_lines(&before, &printed);
    let mut out = diff.unified_diff().context_radius(2).to_string();
    if out.is_empty() {
        out.push_str("(unchanged)\n");
    }
    // Writing to a string cannot fail.
    for (name, value) in context.stats.iter().filter(|(_, v)| *v > 0) {
        let _ = writeln!(out, "stat {name} = {value}");
    }
    for remark in context.remarks.iter().filter(|r| run.remarks.as_ref().is_none_or(|p| p == r.pass)) {
        let _ = writeln!(out, "{remark}");
    }
    Ok(out)
}

/// Same outputs before and after, and a plan without overlaps. Weights that stand in files are random ones here.
fn compare(before: &Module, after: &Module) -> Result<()> {
    let bindings = small_bindings(before);
    let detached = |module: &Module| {
        let mut module = module.clone();
        detach_files(&mut module);
        module
    };
    same_outputs(&detached(before), &detached(after), &bindings)?;
    if after.phase >= Phase::Planned {
        plan::check(after, &bindings).map_err(|o| {
            Error::new(Kind::Internal, "compile/bad-plan", format!("the plan overlaps: {}", o.message))
        })?;
    }
    Ok(())
}

/// All `.ir` files below a folder, by path.
///
/// # Errors
/// `io/failed`.
pub fn cases(folder: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io("read", folder, &e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            found.extend(cases(&path)?);
        } else if path.extension().is_some_and(|e| e == "ir") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Runs every filetest below `folder` and compares it with its snapshot; returns how many there are. With
/// `MILLRACE_ACCEPT=1` in the environment, snapshots are written instead.
///
/// # Errors
/// `compare/filetests`, with every difference and every failure.
pub fn run(folder: &Path, registry: &Registry) -> Result<usize> {
    run_with(folder, registry, std::env::var(ACCEPT).is_ok_and(|v| v == "1"))
}

/// [`run`] with the choice in the code.
///
/// # Errors
/// As [`run`].
pub fn run_with(folder: &Path, registry: &Registry, accept: bool) -> Result<usize> {
    let files = cases(folder)?;
    let mut wrong = Vec::new();
    for file in &files {
        let place = file.strip_prefix(folder).unwrap_or(file).display();
        let source = std::fs::read_to_string(file).map_err(|e| Error::io("read", file, &e))?;
        let found = match report(&source, registry) {
            Ok(found) => found,
            Err(error) => {
                wrong.push(format!("{place}\n{error}\n"));
                continue;
            }
        };
        let snapshot = file.with_extension("snap");
        let expected = std::fs::read_to_string(&snapshot).unwrap_or_default();
        if found == expected {
            continue;
        }
        if accept {
            std::fs::write(&snapshot, found).map_err(|e| Error::io("write", &snapshot, &e))?;
        } else {
            let diff = TextDiff::from_lines(&expected, &found);
            wrong.push(format!("{place}\n{}", diff.unified_diff().context_radius(2)));
        }
    }
    if wrong.is_empty() {
        return Ok(files.len());
    }
    let message = format!("{} of {} filetests differ\n{}", wrong.len(), files.len(), wrong.join("\n"));
    Err(Error::new(Kind::Mismatch, "compare/filetests", message)
        .hint(format!("read the differences; {ACCEPT}=1 in the environment of the test accepts them")))
}
