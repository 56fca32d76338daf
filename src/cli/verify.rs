//! `millrace verify`: is this engine what was written?

use std::path::PathBuf;

use millrace::ir::engine::Verify;
use millrace::{Engine, Result};
use serde_json::json;

use super::{print, print_json, size};

/// Check an engine: container, hashes, manifest, graph; with --full also every weight.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file
    engine: PathBuf,
    /// Hash all weights, whatever their size
    #[arg(long)]
    full: bool,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let engine = Engine::open_with(&args.engine, if args.full { Verify::Full } else { Verify::Auto })?;
    let file = engine.file();
    let identity = millrace::compiler::compile::hex(&file.identity());
    if args.json {
        return print_json(&json!({
            "ok": true,
            "identity": identity,
            "bytes": file.file_len(),
            "producer": file.producer(),
            "weights_verified": file.weights_verified(),
        }));
    }
    let weights = if file.weights_verified() { "weights hashed" } else { "weights not hashed (use --full)" };
    print(&format!("ok: {} {}, {}, {weights}\n", identity, size::show(file.file_len()), file.producer()))
}
