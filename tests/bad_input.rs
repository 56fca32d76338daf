//! Bad input on the command line: a typed error with the right exit code and a next step, no panic, nothing left behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use millrace::ir::DType;
use millrace::ir::checkpoint::{Checkpoint, TensorSource, write_safetensors};

const TINY: &str = "tests/data/tiny-random/qwen2";

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn millrace(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

/// Runs and checks the exit code and the error code.
#[track_caller]
fn fails(args: &[&str], exit: i32, code: &str) -> String {
    let output = millrace(args);
    let stderr = String::from_utf8_lossy(&output.stderr).to_string();
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    assert_eq!(output.status.code(), Some(exit), "{args:?}: {stderr}");
    assert!(stderr.contains(&format!("error[{code}]")), "{args:?}: {stderr}");
    stderr
}

fn engine(folder: &Path) -> PathBuf {
    let file = folder.join("x.engine");
    let output = millrace(&["compile", TINY, "-o", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    file
}

/// A copy of the tiny model that tests may damage.
fn model(folder: &Path) -> PathBuf {
    let copy = folder.join("model");
    std::fs::create_dir(&copy).unwrap();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(root(TINY).join(name), copy.join(name)).unwrap();
    }
    copy
}

/// Rewrites the weights of a model with tensors changed by `edit`.
fn edit_weights(model: &Path, edit: impl Fn(&mut Vec<(String, DType, Vec<u64>, Vec<u8>)>)) {
    let mut tensors = Vec::new();
    {
        let checkpoint = Checkpoint::open(model).unwrap();
        for t in checkpoint.tensors() {
            tensors.push((t.name.clone(), t.dtype, t.shape.clone(), checkpoint.read_all(&t.name).unwrap()));
        }
    }
    edit(&mut tensors);
    let named: Vec<_> =
        tensors.iter().map(|(n, d, s, b)| (n.as_str(), *d, s.as_slice(), b.as_slice())).collect();
    write_safetensors(&model.join("model.safetensors"), &named).unwrap();
}

fn compile_fails(model: &Path, exit: i32, code: &str) -> String {
    let output = model.join("out.engine");
    let stderr = fails(&["compile", model.to_str().unwrap(), "-o", output.to_str().unwrap()], exit, code);
    let left: Vec<_> = std::fs::read_dir(model)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().to_string())
        .filter(|n| n.contains("engine"))
        .collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    stderr
}

#[test]
fn damaged_engines() {
    let folder = tempfile::tempdir().unwrap();
    let file = engine(folder.path());
    let good = std::fs::read(&file).unwrap();
    let path = file.to_str().unwrap();
    let cases: [(&str, Vec<u8>); 7] = [
        ("empty", Vec::new()),
        ("half", good[..good.len() / 2].to_vec()),
        ("short", good[..good.len() - 1].to_vec()),
        ("long", [good.as_slice(), b"x"].concat()),
        ("text", b"this is no engine".to_vec()),
        ("flipped header", flip(&good, 20)),
        ("flipped weights", flip(&good, good.len() / 2)),
    ];
    for (what, bytes) in cases {
        std::fs::write(&file, bytes).unwrap();
        for verb in ["verify", "inspect"] {
            let output = millrace(&[verb, path]);
            let stderr = String::from_utf8_lossy(&output.stderr).to_string();
            assert!(matches!(output.status.code(), Some(2 | 5)), "{what}: {:?} {stderr}", output.status);
            assert!(stderr.contains("error[engine/") && stderr.contains("next:"), "{what}: {stderr}");
        }
    }
    fails(&["run", "/nonexistent.engine", "--prompt", "x"], 2, "io/failed");
}

fn flip(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    copy[at] ^= 0x10;
    copy
}

#[test]
fn tensors_that_do_not_fit_are_reported_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    edit_weights(&model, |tensors| {
        for (name, _, shape, _) in tensors.iter_mut() {
            if name.ends_with("layers.0.mlp.down_proj.weight") {
                *name = name.replace("down_proj", "down_prj");
            }
            if name.ends_with("layers.1.self_attn.o_proj.weight") {
                *shape = vec![shape[0] * 2, shape[1] / 2];
            }
        }
    });
    let stderr = compile_fails(&model, 2, "import/tensors");
    for part in [
        "missing: \"model.layers.0.mlp.down_proj.weight\" (the checkpoint has \"model.layers.0.mlp.down_prj.weight\")",
        "mis-shaped: \"model.layers.1.self_attn.o_proj.weight\"",
        "unused: \"model.layers.0.mlp.down_prj.weight\"",
    ] {
        assert!(stderr.contains(part), "{part}\n{stderr}");
    }
    edit_weights(&model, |tensors| {
        tensors.retain(|t| !t.0.contains("down_prj"));
        for (name, dtype, ..) in tensors.iter_mut() {
            if name.ends_with("norm.weight") {
                *dtype = if *dtype == DType::BF16 { DType::F16 } else { *dtype };
            }
        }
    });
    compile_fails(&model, 2, "import/tensors");
}

#[test]
fn unsafe_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let weights = model.join("model.safetensors");
    let good = std::fs::read(&weights).unwrap();
    let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(good[8..8 + length].to_vec()).unwrap();
    let with_header = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.extend(&good[8 + length..]);
        bytes
    };
    let first = header.find("data_offsets\":[0,").map(|at| at + "data_offsets\":[0,".len()).unwrap();
    let end = header[first..].find(']').unwrap() + first;
    let overlap =
        format!("{}{}{}", &header[..first], header[first..end].parse::<u64>().unwrap() + 2, &header[end..]);
    let huge = format!("{}{}{}", &header[..first], u64::MAX, &header[end..]);
    let twice = header.replacen("lm_head.weight", "model.norm.weight", 1).replacen(
        "model.layers.0.input_layernorm.weight",
        "model.norm.weight",
        1,
    );
    for (what, bytes) in [
        ("truncated", good[..good.len() - 10].to_vec()),
        ("no header", good[..7].to_vec()),
        ("forged length", [&u64::MAX.to_le_bytes(), &good[8..]].concat()),
        ("overlapping", with_header(&overlap)),
        ("out of range", with_header(&huge)),
        ("duplicate", with_header(&twice)),
        ("malformed", with_header(&header.replacen(':', ";", 1))),
    ] {
        std::fs::write(&weights, bytes).unwrap();
        let output =
            millrace(&["compile", model.to_str().unwrap(), "-o", model.join("o.engine").to_str().unwrap()]);
        let stderr = String::from_utf8_lossy(&output.stderr).to_string();
        assert_eq!(output.status.code(), Some(2), "{what}: {stderr}");
        assert!(stderr.contains("error[checkpoint/"), "{what}: {stderr}");
        assert!(!model.join("o.engine").exists());
    }
    std::fs::remove_file(&weights).unwrap();
    for name in ["/etc/hostname", "../model.safetensors", "sub/model.safetensors"] {
        let index = format!("{{\"weight_map\": {{\"lm_head.weight\": \"{name}\"}}}}");
        std::fs::write(model.join("model.safetensors.index.json"), index).unwrap();
        let output = millrace(&["compile", model.to_str().unwrap(), "-o", "/tmp/never.engine"]);
        let stderr = String::from_utf8_lossy(&output.stderr).to_string();
        assert_eq!(output.status.code(), Some(2), "{name}: {stderr}");
        assert!(stderr.contains("error[checkpoint/"), "{name}: {stderr}");
    }
    #[cfg(unix)]
    {
        std::fs::remove_file(model.join("model.safetensors.index.json")).unwrap();
        std::os::unix::fs::symlink(root(TINY).join("model.safetensors"), &weights).unwrap();
        let stderr = compile_fails(&model, 2, "checkpoint/symlink");
        assert!(stderr.contains("--follow-links"), "{stderr}");
        let followed = ["compile", model.to_str().unwrap(), "--dry-run", "--follow-links"];
        assert!(millrace(&followed).status.success());
    }
}

#[test]
fn configurations() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let good = std::fs::read_to_string(model.join("config.json")).unwrap();
    let edit = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        std::fs::write(model.join("config.json"), good.replacen(from, to, 1)).unwrap();
    };
    edit("\"qwen2\"", "\"mamba\"");
    compile_fails(&model, 3, "import/unsupported-model");
    edit("\"hidden_act\": \"silu\"", "\"hidden_act\": \"mish\"");
    compile_fails(&model, 3, "import/unsupported-option");
    edit("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\"");
    compile_fails(&model, 3, "import/unsupported-option");
    edit("\"hidden_size\": 64", "\"hidden_size\": 0");
    compile_fails(&model, 2, "import/bad-config");
    edit("\"hidden_size\": 64", "\"hidden_size\": 99999999999999");
    compile_fails(&model, 2, "import/bad-config");
    edit("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3");
    compile_fails(&model, 2, "import/bad-config");
    edit("\"vocab_size\"", "\"vocab\"");
    compile_fails(&model, 2, "import/bad-config");
    edit("{", "[");
    compile_fails(&model, 2, "import/bad-json");
    std::fs::remove_file(model.join("config.json")).unwrap();
    compile_fails(&model, 2, "import/no-config");
}

#[test]
fn ir_texts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.ir");
    let path = file.to_str().unwrap();
    let graph = |body: &str| {
        format!(
            "module @m phase imported {{\n  graph @main(%0 \"x\": f32[4]) -> (\"y\": f32[4]) {{\n    {body}\n    return %1\n  }}\n}}\n"
        )
    };
    for (code, text) in [
        ("ir/syntax", graph("%1 = exq %0 : f32[4]")),
        ("ir/syntax", "module @m phase nowhere {".to_string()),
        ("ir/syntax", "hello".to_string()),
        (
            "ir/syntax",
            graph(&format!("%1 = broadcast %0 {{shape = {}4{}}} : f32[4]", "[".repeat(90), "]".repeat(90))),
        ),
        ("ir/invalid", graph("%1 = exp %2 : f32[4]\n    %2 = exp %1 : f32[4]")),
        ("ir/invalid", graph("%1 = exp %0 : f32[5]").replace("(\"y\": f32[4])", "(\"y\": f32[5])")),
        ("ir/invalid", graph("%1 = pointwise %0 {body = [exp(i0)], out = [t0], dtypes = [f32]} : f32[4]")),
    ] {
        std::fs::write(&file, &text).unwrap();
        fails(&["opt", path], 2, code);
        fails(&["compile", path, "-o", folder.path().join("x.engine").to_str().unwrap()], 2, code);
    }
    assert!(!folder.path().join("x.engine").exists());
}

#[test]
fn prompts_and_options() {
    let folder = tempfile::tempdir().unwrap();
    let file = engine(folder.path());
    let path = file.to_str().unwrap();
    let long: Vec<String> = (0..300).map(|_| "1".to_string()).collect();
    let stderr = fails(&["run", path, "--token-ids", &long.join(",")], 2, "generation/prompt-too-long");
    assert!(stderr.contains("next:"), "{stderr}");
    fails(&["run", path, "--token-ids", ""], 2, "generation/empty-prompt");
    fails(&["run", path, "--token-ids", "1,512"], 2, "generation/token-out-of-range");
    fails(&["run", path, "--token-ids", "1,x"], 1, "usage/token-ids");
    fails(&["run", path, "--prompt", "hello"], 2, "run/no-tokenizer");
    fails(&["run", path], 1, "usage/inputs");
    fails(&["run", path, "--text", "hello"], 1, "usage/inputs");
    fails(&["run", path, "--token-ids", "1", "--memory", "elastic"], 1, "usage/memory");
    fails(&["run", path, "--token-ids", "1", "--memory-cap", "100"], 1, "usage/size");
    fails(&["run", path, "--token-ids", "1", "--memory-cap", "1KiB"], 4, "run/cap");
    for (flag, value) in [("--temperature", "-1"), ("--temperature", "NaN"), ("--top-p", "0")] {
        let output = millrace(&["run", path, "--token-ids", "1", flag, value]);
        assert!(matches!(output.status.code(), Some(1 | 2)), "{flag} {value}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("error["), "{flag} {value}: {output:?}");
    }
    fails(&["compile", TINY, "--dry-run", "--max-seq-len", "9999"], 1, "compile/bad-limit");
    fails(&["compile", TINY, "--dry-run", "--max-batch-size", "0"], 1, "compile/bad-limit");
    fails(&["compile", TINY, "--dry-run", "--target", "tpu"], 3, "compile/target");
    fails(&["compile", TINY, "--dry-run", "--dtype", "int3"], 1, "usage/dtype");
    fails(&["compile", TINY, "--dry-run", "--pipeline", "cse,fold"], 1, "compile/bad-pipeline");
    fails(&["compile", TINY, "-o", "/nonexistent/x.engine"], 2, "io/failed");
    for args in [&["compile"][..], &["fly"], &["compile", TINY, "-O", "9", "--dry-run"]] {
        assert_eq!(millrace(args).status.code(), Some(1), "{args:?}");
    }
    for args in [&["--help"][..], &["--version"], &["run", "--help"], &["passes"], &["doctor"]] {
        assert_eq!(millrace(args).status.code(), Some(0), "{args:?}");
    }
}

/// A tokenizer with more tokens than the model: the token is named, nothing is read out of bounds.
#[test]
fn a_vocabulary_smaller_than_the_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    std::fs::copy(root("examples/models/baker-street-6m/tokenizer.json"), model.join("tokenizer.json"))
        .unwrap();
    let stderr = fails(
        &["run", model.to_str().unwrap(), "--prompt", "It was a dark and stormy night"],
        2,
        "generation/token-out-of-range",
    );
    assert!(stderr.contains("next:"), "{stderr}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing() {
    let output = millrace(&["passes"]);
    assert!(output.status.success());
    let full = Command::new(env!("CARGO_BIN_EXE_millrace"))
        .args(["passes"])
        .stdout(std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap())
        .output()
        .unwrap();
    assert_eq!(full.status.code(), Some(4), "{}", String::from_utf8_lossy(&full.stderr));
    assert!(String::from_utf8_lossy(&full.stderr).contains("error[io/disk-full]"));
}
