//! One self-contained HTML page of a compiled module: graph, kernels, memory plan, weights and what the passes did.
//!
//! The page needs no network: styles and scripts stand in it, and the facts are one block of JSON that the scripts
//! read. It is a function of its input; no time, path or device enters it.

mod data;
mod history;
mod streaming;

pub use history::{History, PassStep, Recorder};
pub use streaming::Streaming;

use millrace_compiler::codegen::WeightMode;
use millrace_ir::Module;
use millrace_ir::manifest::Manifest;

const SHELL: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPTS: [&str; 8] = [
    include_str!("js/model.js"),
    include_str!("js/table.js"),
    include_str!("js/graph.js"),
    include_str!("js/details.js"),
    include_str!("js/arena.js"),
    include_str!("js/stream.js"),
    include_str!("js/tables.js"),
    include_str!("js/main.js"),
];

/// What the module itself does not tell.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The manifest.
    pub manifest: &'a Manifest,
    /// Which weights the engine carries.
    pub weights: WeightMode,
    /// The engine file, if one is written.
    pub file: Option<FileFacts>,
}

/// What is known of an engine file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// Bytes.
    pub bytes: u64,
    /// Identity in hexadecimal.
    pub identity: String,
    /// Who wrote it.
    pub producer: String,
    /// Name and bytes of each section.
    pub sections: Vec<(String, u64)>,
}

/// The page of a module. `history` adds remarks and what each pass did.
pub fn page(module: &Module, facts: &Facts<'_>, history: Option<&History>) -> String {
    page_with(module, facts, history, None)
}

/// [`page`] with where weights are under a budget, and what processor and link do in a step.
pub fn page_with(
    module: &Module,
    facts: &Facts<'_>,
    history: Option<&History>,
    streaming: Option<&Streaming>,
) -> String {
    let mut data = data::data(module, facts, history);
    data["streaming"] = streaming.map(Streaming::json).into();
    let data = escape_json(&data.to_string());
    let title = escape_html(&format!("{} for {}", facts.manifest.family, facts.manifest.target));
    let script = SCRIPTS.concat();
    let mut page = String::with_capacity(data.len() + script.len() + STYLE.len() + SHELL.len());
    // Markers are found in the shell only: content that looks like a marker stays as it is.
    for part in SHELL.split("{{") {
        match part.split_once("}}") {
            None => page.push_str(part),
            Some((marker, rest)) => {
                page.push_str(match marker {
                    "title" => &title,
                    "style" => STYLE,
                    "data" => &data,
                    _ => &script,
                });
                page.push_str(rest);
            }
        }
    }
    page
}

/// JSON that may stand in a script element: without `<`, no tag or comment can begin in it.
fn escape_json(json: &str) -> String {
    json.replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029")
}

fn escape_html(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
