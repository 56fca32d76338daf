//! Every error code of the sources stands in `docs/errors.md`, and nothing else does.

use std::collections::BTreeSet;
use std::path::Path;

const AREAS: [&str; 20] = [
    "checkpoint",
    "compare",
    "compile",
    "cuda",
    "demo",
    "engine",
    "eval",
    "generation",
    "import",
    "internal",
    "io",
    "ir",
    "kv",
    "npy",
    "plan",
    "run",
    "template",
    "tokenizer",
    "usage",
    "weights",
];

fn collect(folder: &Path, codes: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().to_string();
        if path.is_dir() {
            collect(&path, codes);
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") && name != "testing.rs" {
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap();
            // Codes are string literals of the form "area/what" in lower case.
            for area in AREAS {
                let start = format!("\"{area}/");
                for (at, _) in code.match_indices(&start) {
                    let literal = code[at + 1..].split('"').next().unwrap_or("");
                    let what = &literal[area.len() + 1..];
                    if !what.is_empty() && what.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
                        codes.insert(literal.to_string());
                    }
                }
            }
        }
    }
}

#[test]
fn the_page_lists_every_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut codes = BTreeSet::new();
    for folder in ["ir/src", "kernels/src", "compiler/src", "runtime/src", "src"] {
        collect(&root.join(folder), &mut codes);
    }
    let page = std::fs::read_to_string(root.join("docs/errors.md")).unwrap();
    let listed: BTreeSet<String> = page
        .lines()
        .filter_map(|l| {
            l.strip_prefix("| `").and_then(|l| l.split_once('`')).map(|(code, _)| code.to_string())
        })
        .filter(|c| c.contains('/'))
        .collect();
    let missing: Vec<&String> = codes.difference(&listed).collect();
    let extra: Vec<&String> = listed.difference(&codes).collect();
    assert!(missing.is_empty() && extra.is_empty(), "missing {missing:#?}, extra {extra:#?}");
    assert!(codes.len() > 60);
}
