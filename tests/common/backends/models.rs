//! Cases of whole graphs: decoders and encoders from configurations and checkpoints, the zoo, random graphs, texts.

use std::path::{Path, PathBuf};

use millrace::ir::{DType, text};
use serde_json::{Value, json};

use super::case::{Case, Seq, Source, Step};
use super::ops::extremes;

/// Where tests, examples and their data are: the repository, or what was packed for another machine.
pub fn root() -> PathBuf {
    std::env::var_os("MILLRACE_SUITE_ROOT").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

fn seq(rows: usize, kv_len: usize, first: usize) -> Seq {
    Seq { rows, kv_len, first }
}

/// A conversation of three sequences: prefill, decode alone and together, mixed steps, continued prefill.
fn conversation(prompt: usize) -> Vec<Step> {
    let at = |list: &[(usize, usize, usize)]| -> Vec<Seq> {
        list.iter().map(|(s, rows, kv_len)| seq(*rows, *kv_len, s * 12)).collect()
    };
    let n = prompt;
    vec![
        Step::Batch(at(&[(0, n, n)]), 0),
        Step::Batch(at(&[(0, 1, n + 1)]), 0),
        Step::Batch(at(&[(0, 1, n + 2), (1, 17, 17)]), 1),
        Step::Batch(at(&[(0, 1, n + 3), (1, 1, 18), (2, 33, 33)]), 0),
        Step::Batch(at(&[(0, 1, n + 4), (1, 1, 19), (2, 1, 34)]), 2),
        Step::Batch(at(&[(1, 30, 49), (2, 1, 35)]), 0),
        Step::Batch(at(&[(0, 1, n + 5), (1, 1, 50), (2, 1, 36)]), 0),
    ]
}

/// A prefill of `n` tokens in parts, then decoding.
fn long(n: usize) -> Vec<Step> {
    let part = 128;
    let mut steps: Vec<Step> = (1..=n / part).map(|i| Step::Batch(vec![seq(part, i * part, 0)], 0)).collect();
    steps.extend((1..4).map(|i| Step::Batch(vec![seq(1, n / part * part + i, 0)], 0)));
    steps
}

/// Small decoders of every family with random weights; their configurations are written into `folder`.
fn decoders(folder: &Path) -> Vec<Case> {
    let shapes: [(&str, &str, Value); 5] = [
        (
            "llama",
            "tests/data/configs/llama-3.2-1b",
            json!({"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
                "intermediate_size": 232}),
        ),
        (
            "llama-8b",
            "tests/data/configs/llama-3.1-8b",
            json!({"hidden_size": 264, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
                "intermediate_size": 344}),
        ),
        (
            "mistral",
            "tests/zoo/mistral-7b",
            json!({"hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 80,
                "intermediate_size": 200, "sliding_window": 24}),
        ),
        (
            "qwen2",
            "tests/zoo/qwen2-0.5b",
            json!({"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1,
                "intermediate_size": 136}),
        ),
        (
            "qwen3",
            "tests/zoo/qwen3-0.6b",
            json!({"hidden_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
                "intermediate_size": 328}),
        ),
    ];
    let mut cases = Vec::new();
    for (i, (name, from, changes)) in shapes.into_iter().enumerate() {
        let bytes = std::fs::read(root().join(from).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&bytes).unwrap();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config["num_hidden_layers"] = json!(2);
        config["vocab_size"] = json!(200);
        config["max_window_layers"] = json!(2);
        config["bos_token_id"] = json!(1);
        config["eos_token_id"] = json!(2);
        let path = folder.join(name);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("config.json"), config.to_string()).unwrap();
        for dtype in [DType::BF16, [DType::F32, DType::F16][i % 2]] {
            let path = path.clone();
            let source = Source::Folder { path, dtype, tokens: 192, positions: 1024, dummy: true };
            let mut steps = conversation(40 + i);
            if dtype == DType::BF16 && i < 2 {
                steps.extend(long(384 + 128 * i));
            }
            cases.push(Case {
                name: format!("decoder/{name}/{dtype}"),
                source,
                level: 2,
                steps,
                strict: false,
                split: None,
            });
        }
    }
    cases
}

/// Checkpoints that are part of the repository.
fn fixtures() -> Vec<Case> {
    let folder = root().join("tests/data/tiny-random");
    let mut cases = Vec::new();
    for name in ["llama-rope-llama3", "mistral-sliding", "qwen2", "qwen3"] {
        for dtype in [DType::F32, DType::BF16] {
            let path = folder.join(name);
            let source = Source::Folder { path, dtype, tokens: 64, positions: 256, dummy: false };
            let name = format!("fixture/{name}/{dtype}");
            cases.push(Case { name, source, level: 2, steps: conversation(19), strict: false, split: None });
        }
    }
    cases
}

/// Every text below `folder`, at its extremes.
fn texts(group: &str, folder: &str) -> Vec<Case> {
    let Ok(entries) = std::fs::read_dir(root().join(folder)) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    let texts = paths.iter().filter(|p| p.extension().is_some_and(|e| e == "ir"));
    texts
        .map(|path| {
            let source = std::fs::read_to_string(path).unwrap();
            let module = text::parse(&source).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let name = format!("{group}/{}", path.file_stem().unwrap().to_str().unwrap());
            let paged = module.input_types().iter().any(|(n, _)| *n == "kv_lens");
            let steps = if paged { conversation(5) } else { extremes(&module) };
            Case::of(name, &module, steps)
        })
        .collect()
}

/// All but random graphs; configurations are written into `folder`.
pub fn models(folder: &Path) -> Vec<Case> {
    let mut cases = decoders(folder);
    cases.extend(fixtures());
    cases.extend(texts("zoo", "tests/zoo"));
    cases.extend(texts("text", "tests/backends"));
    cases.extend(texts("regression", "tests/filetests/regressions"));
    cases
}

/// Random graphs, at every level in turn.
pub fn random(graphs: u64) -> Vec<Case> {
    let case = |seed: u64| {
        let level = 2 - seed as usize % 3;
        Case {
            name: format!("random/{seed}"),
            source: Source::Random(seed),
            level,
            steps: Vec::new(),
            strict: false,
            split: None,
        }
    };
    (0..graphs).map(case).collect()
}
