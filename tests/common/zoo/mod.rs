//! The zoo: graphs of many shapes that the compiler is measured on, and the models that are written twice.
//!
//! A *pair* is one model in two spellings with the same inputs, outputs and weights: the *primitive* one knows only
//! elementwise ops, movement, reductions and matmul, the *twin* says `rms_norm`, `rope`, `attention`. The texts of the
//! pairs are written by the functions of this module and committed in `tests/zoo`.
#![allow(dead_code)]

mod decoder;
mod encoder;
mod lookalikes;
mod spelling;

use std::path::{Path, PathBuf};

use millrace::compiler::import::{SourceFolder, import};
use millrace::ir::{Module, text};
use millrace::{CompileOptions, Compiled, compile};

pub use spelling::Spelling;

/// Names of the pairs: the graphs are `primitive_NAME.ir` and `twin_NAME.ir`.
pub const PAIRS: [&str; 4] = ["encoder", "decoder", "decoder_tables", "decoder_bf16"];

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// One graph of the zoo.
pub struct Graph {
    /// Name in the scoreboard.
    pub name: String,
    /// A folder with `config.json`, or a file of IR text.
    pub path: PathBuf,
}

/// Every graph, by name: folders and IR files of `tests/zoo`, configurations of `tests/data/configs`, the example.
pub fn graphs() -> Vec<Graph> {
    let mut paths = vec![root().join("examples/models/baker-street-6m")];
    for folder in ["tests/zoo", "tests/data/configs"] {
        for entry in std::fs::read_dir(root().join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.join("config.json").is_file() || path.extension().is_some_and(|e| e == "ir") {
                paths.push(path);
            }
        }
    }
    let name = |path: &Path| {
        let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
        name.unwrap().to_str().unwrap().to_string()
    };
    let mut graphs: Vec<Graph> = paths.into_iter().map(|path| Graph { name: name(&path), path }).collect();
    graphs.sort_by(|a, b| a.name.cmp(&b.name));
    graphs
}

fn options() -> CompileOptions {
    let mut options = CompileOptions { weight_streaming: true, ..CompileOptions::default() };
    options.import.dummy_weights = true;
    options
}

impl Graph {
    /// The graph of a name.
    pub fn named(name: &str) -> Graph {
        graphs().into_iter().find(|g| g.name == name).unwrap_or_else(|| panic!("{name} is not in the zoo"))
    }

    /// Whether the graph is a file of IR text.
    pub fn is_text(&self) -> bool {
        self.path.is_file()
    }

    /// The module before any pass.
    pub fn imported(&self) -> Module {
        let module = if self.is_text() {
            text::parse(&std::fs::read_to_string(&self.path).unwrap())
        } else {
            let options = options().import;
            SourceFolder::open(&self.path, &options).and_then(|f| import(&f, &options)).map(|(m, _)| m)
        };
        module.unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// The module after `-O2`, with random weights and streamable ones marked.
    pub fn compiled(&self) -> Compiled {
        compile(&self.path, &options(), None).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }
}

/// File name and text of every graph that is generated.
pub fn generated() -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut write = |file: String, note: &str, module: &Module| {
        let mut source: String = note.lines().map(|l| format!("// {}\n", l.trim())).collect();
        source.push_str(&text::print(module));
        files.push((file, source));
    };
    let (note, module) = lookalikes::build();
    write("lookalikes.ir".to_string(), note, &module);
    for pair in PAIRS {
        for spelling in [Spelling::Primitive, Spelling::Twin] {
            let (note, module) = match pair {
                "encoder" => encoder::build(spelling),
                _ => decoder::build(spelling, &decoder::Shape::named(pair)),
            };
            write(format!("{spelling}_{pair}.ir"), note, &module);
        }
    }
    files
}
