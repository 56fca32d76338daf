//! `millrace diff`: what distinguishes two modules or engines.

use std::path::{Path, PathBuf};

use millrace::compiler::compile::hex;
use millrace::diff::{Diff, Side, diff};
use millrace::ir::engine::Verify;
use millrace::ir::text;
use millrace::{Engine, Error, Kind, Result};
use serde_json::json;

use super::size::show;
use super::{print, print_json};

/// Compare two engines or files of IR text by layer, kernel and byte; exit code 7 if they differ.
#[derive(clap::Args)]
pub struct Args {
    /// An engine or a file of IR text
    before: PathBuf,
    /// Another one
    after: PathBuf,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

fn side(path: &Path) -> Result<Side> {
    let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
    // IR text is told from engines by being text that begins like a module or a comment.
    let head = bytes.trim_ascii_start();
    if head.starts_with(b"module") || head.starts_with(b"//") {
        let source = String::from_utf8(bytes).map_err(|_| {
            Error::new(Kind::BadInput, "ir/syntax", "is neither an engine nor IR text").at(path.display())
        })?;
        let module = text::parse(&source).map_err(|e| e.at(path.display()))?;
        return Ok(Side::of(module));
    }
    drop(bytes);
    let engine = Engine::open_with(path, Verify::Auto)?;
    let hashes = engine.file().weight_index().iter().map(|r| (r.name.clone(), hex(&r.hash))).collect();
    Ok(Side { hashes, ..Side::of(engine.module().clone()) })
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let found = diff(&side(&args.before)?, &side(&args.after)?);
    if args.json {
        print_json(&json!(found))?;
    } else {
        print(&report(&found))?;
    }
    if found.equal() {
        return Ok(());
    }
    let message = format!("{} differs from {}", args.after.display(), args.before.display());
    Err(Error::new(Kind::Mismatch, "compare/differs", message))
}

fn report(found: &Diff) -> String {
    if found.equal() {
        return "equal\n".to_string();
    }
    let mut out = String::new();
    for (name, before, after) in &found.facts {
        out.push_str(&format!("{name}: {before} -> {after}\n"));
    }
    for (name, [before, after]) in [("weights", found.weight_bytes), ("activations", found.arena_bytes)] {
        if before != after {
            out.push_str(&format!("{name}: {} -> {}\n", show(before), show(after)));
        }
    }
    for layer in &found.layers {
        out.push_str(&format!("layer {}\n", layer.name));
        for (op, before, after) in &layer.ops {
            let sign = if after > before { '+' } else { '-' };
            out.push_str(&format!("  {sign}{:<4} {op}\n", after.abs_diff(*before)));
        }
    }
    for (kernel, before, after) in &found.kernels {
        out.push_str(&format!("kernel {kernel}: {before} -> {after}\n"));
    }
    for weight in &found.weights {
        out.push_str(&format!("weight {weight}\n"));
    }
    if found.same_summary() {
        out.push_str("the same parts in another order, or with other wiring\n");
    }
    out
}
