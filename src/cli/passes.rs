//! `millrace passes`: what the pipeline can be made of.

use millrace::Result;
use millrace::compiler::passes::registry;
use millrace::compiler::pipeline::LEVELS;
use serde_json::json;

use super::{print, print_json};

/// List the passes and the optimisation levels.
#[derive(clap::Args)]
pub struct Args {
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let passes = registry();
    if args.json {
        let list = passes.iter().map(|p| {
            let (first, last) = p.phases();
            json!({"name": p.name(), "help": p.help(), "first_phase": first.name(), "last_phase": last.name()})
        });
        return print_json(&json!({"passes": list.collect::<Vec<_>>(), "levels": LEVELS}));
    }
    for pass in &passes {
        print(&format!("{:<16} {}\n", pass.name(), pass.help()))?;
    }
    for (level, pipeline) in LEVELS.iter().enumerate() {
        print(&format!("\n-O{level}  {pipeline}\n"))?;
    }
    Ok(())
}
