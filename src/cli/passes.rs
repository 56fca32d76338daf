//! `millrace passes` and `millrace explain`: what the pipeline can be made of.

use millrace::compiler::Registry;
use millrace::compiler::pass::{Context, Pass};
use millrace::compiler::passes::pages::header;
use millrace::compiler::pipeline::Manager;
use millrace::filetest::RunLine;
use millrace::ir::{Module, text};
use millrace::{Error, Kind, Result};
use serde_json::{Value, json};

use super::{print, print_json};

/// List the passes and the optimisation levels.
#[derive(clap::Args)]
pub struct Args {
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

fn options(pass: &dyn Pass) -> Vec<String> {
    pass.options().iter().map(ToString::to_string).collect()
}

/// Runs `passes`.
pub fn main(args: &Args) -> Result<()> {
    let registry = Registry::standard();
    if args.json {
        let list = registry.passes().map(|p| {
            let (first, last) = p.phases();
            json!({
                "name": p.name(),
                "help": p.help(),
                "first_phase": first.name(),
                "last_phase": last.name(),
                "options": options(p),
            })
        });
        return print_json(&json!({"passes": list.collect::<Vec<Value>>(), "levels": registry.levels()}));
    }
    for pass in registry.passes() {
        print(&format!("{:<16} {}\n", pass.name(), pass.help()))?;
    }
    for (level, pipeline) in registry.levels().iter().enumerate() {
        print(&format!("\nO{level}  {pipeline}\n"))?;
    }
    print("\n`millrace explain PASS` says more, with an example\n")
}

/// Explain a pass: phases, options, documentation, and an example before and after.
#[derive(clap::Args)]
pub struct Explain {
    /// A pass
    pass: String,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs `explain`.
pub fn explain(args: &Explain) -> Result<()> {
    let registry = Registry::standard();
    let pass = registry.get(&args.pass)?;
    let example = example(pass.as_ref(), &registry)?;
    let (first, last) = pass.phases();
    if args.json {
        return print_json(&json!({
            "name": pass.name(),
            "help": pass.help(),
            "first_phase": first.name(),
            "last_phase": last.name(),
            "leaves": pass.leaves().map(|p| p.name()),
            "options": options(pass.as_ref()),
            "doc": header(pass.doc()),
            "before": example.as_ref().map(|e| &e.0),
            "after": example.as_ref().map(|e| &e.1),
        }));
    }
    let leaves = pass.leaves().map_or_else(String::new, |p| format!(", leaves {p}"));
    let mut out = format!("{}: {}\n\nphases: {first} to {last}{leaves}\n", pass.name(), pass.help());
    for option in pass.options() {
        out.push_str(&format!("option: {option}: {}\n", option.help));
    }
    out.push_str(&format!("\n{}\n", header(pass.doc())));
    if let Some((before, after)) = example {
        out.push_str(&format!("\nbefore:\n{before}\nafter:\n{after}"));
    }
    print(&out)
}

/// The example right before and right after the pass.
fn example(pass: &dyn Pass, registry: &Registry) -> Result<Option<(String, String)>> {
    if pass.example().is_empty() {
        return Ok(None);
    }
    let run = RunLine::read(pass.example(), registry)?;
    let mut module = text::parse(pass.example())?;
    let mut last = text::print(&module);
    let mut found = None;
    let mut observer = |name: &'static str, module: &Module, _: bool| {
        let text = text::print(module);
        if name == pass.name() && found.is_none() {
            found = Some((last.clone(), text.clone()));
        }
        last = text;
    };
    let mut manager = Manager { observer: Some(&mut observer), ..Manager::default() };
    manager.run(&run.pipeline, &mut module, &mut Context::of(&run.target))?;
    let missing = || {
        Error::new(Kind::Internal, "internal/example", format!("the example does not run `{}`", pass.name()))
    };
    found.map(Some).ok_or_else(missing)
}
