//! One pass per file: every `tests/filetests/<pass>/<case>.ir` starts with `// run: opt --passes=...`, and the snapshot
//! beside it holds the difference the passes make, their counters and remarks, or their error.
//!
//! Every file is also a differential test: the reference evaluator gives the same outputs before and after.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use millrace::compiler::pass::Context;
use millrace::compiler::pipeline::{Manager, Pipeline};
use millrace::ir::eval::evaluate;
use millrace::ir::tensor::Tensor;
use millrace::ir::verify::check;
use millrace::ir::weights::{WeightReader, normal};
use millrace::ir::{Bindings, DType, Module, TensorType, plan, text};
use millrace::{Error, Result};

fn cases(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(cases(&path));
        } else if path.extension().is_some_and(|e| e == "ir") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn optimise(module: &Module, passes: &str) -> Result<(Module, Context)> {
    let mut optimised = module.clone();
    let mut context = Context::cpu();
    let mut manager = Manager { verify_each: true, ..Manager::default() };
    manager.run(&Pipeline::parse(passes)?, &mut optimised, &mut context)?;
    Ok((optimised, context))
}

fn tensor(ty: &TensorType, bindings: &Bindings, seed: u64) -> Tensor {
    let shape: Vec<usize> = ty.shape_at(bindings).unwrap().into_iter().map(|d| d as usize).collect();
    let mut tensor = Tensor::zeros(ty.dtype, &shape).unwrap();
    for (i, v) in tensor.data.iter_mut().enumerate() {
        let noise = normal(seed, i as u64);
        *v = if ty.dtype.is_float() { noise } else { noise.abs().floor() };
    }
    tensor.round();
    tensor
}

/// Index inputs of packed graphs need values that fit together; they are told by their names.
fn inputs(module: &Module, bindings: &Bindings) -> Vec<Tensor> {
    module
        .input_types()
        .into_iter()
        .enumerate()
        .map(|(index, (name, ty))| {
            let mut t = tensor(ty, bindings, 11 + index as u64);
            let n = t.data.len();
            let rows = millrace::ir::Sym::new("t").and_then(|s| bindings.get(s)).unwrap_or(0) as usize;
            for (i, v) in t.data.iter_mut().enumerate() {
                match name {
                    "seq_starts" => *v = (i * rows / (n - 1)) as f64,
                    "kv_lens" => *v = ((i + 1) * rows / n - i * rows / n) as f64,
                    "positions" | "block_table" => *v = i as f64,
                    _ => {}
                }
            }
            t
        })
        .collect()
}

fn run(module: &Module, bindings: &Bindings) -> Result<Vec<Tensor>> {
    let mut states: Vec<Tensor> = module.states.iter().map(|(_, s)| tensor(&s.ty, bindings, 5)).collect();
    evaluate(module, &mut WeightReader::new(module), &inputs(module, bindings), &mut states)
}

/// Same outputs before and after, up to the rounding that fusion leaves out.
fn assert_same(before: &Module, after: &Module, place: &str) {
    let bindings = Bindings::hints(&before.dims);
    let (expected, found) = (run(before, &bindings), run(after, &bindings));
    let (expected, found) = match (expected, found) {
        (Ok(e), Ok(f)) => (e, f),
        (e, f) => panic!("{place}: evaluation before {:?}, after {:?}", e.err(), f.err()),
    };
    for (e, f) in expected.iter().zip(&found) {
        let narrow = [DType::BF16, DType::F16]
            .iter()
            .any(|d| before.graph.values.iter().any(|(_, v)| v.ty.dtype == *d));
        let tolerance = if narrow { 0.05 } else { 1e-5 };
        for (x, y) in e.data.iter().zip(&f.data) {
            let same = x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= tolerance * (1.0 + x.abs());
            assert!(same, "{place}: {x} became {y}");
        }
    }
    if after.phase >= millrace::ir::Phase::Planned {
        plan::check(after, &bindings).unwrap_or_else(|o| panic!("{place}: {}", o.message));
    }
}

fn report(source: &str, place: &str) -> String {
    let passes = source.lines().next().and_then(|l| l.strip_prefix("// run: opt --passes="));
    let passes = passes.unwrap_or_else(|| panic!("{place}: the first line is `// run: opt --passes=...`"));
    let module = text::parse(source).and_then(|m| check(&m).map(|_| ()).map(|()| m));
    let module = module.unwrap_or_else(|e: Error| panic!("{place}: {e}"));
    let (after, context) = match optimise(&module, passes) {
        Ok(done) => done,
        Err(error) => return format!("{error}\n"),
    };
    let printed = text::print(&after);
    assert_eq!(text::print(&text::parse(&printed).unwrap()), printed, "{place}: the result prints back");
    assert_same(&module, &after, place);
    let before = text::print(&module);
    let diff = similar::TextDiff::from_lines(&before, &printed);
    let mut out = diff.unified_diff().context_radius(2).to_string();
    if out.is_empty() {
        out.push_str("(unchanged)\n");
    }
    for (name, value) in context.stats.iter().filter(|(_, v)| *v > 0) {
        writeln!(out, "stat {name} = {value}").unwrap();
    }
    for remark in &context.remarks {
        writeln!(out, "{remark}").unwrap();
    }
    out
}

#[test]
fn snapshots() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/filetests");
    let files = cases(&folder);
    assert!(files.len() >= 40, "{} filetests", files.len());
    let update = std::env::var("MILLRACE_ACCEPT").is_ok_and(|v| v == "1");
    let mut wrong = Vec::new();
    for file in files {
        let place = file.strip_prefix(&folder).unwrap().display().to_string();
        let found = report(&std::fs::read_to_string(&file).unwrap(), &place);
        let snapshot = file.with_extension("snap");
        let expected = std::fs::read_to_string(&snapshot).unwrap_or_default();
        if found == expected {
            continue;
        }
        if update {
            std::fs::write(&snapshot, found).unwrap();
        } else {
            let diff = similar::TextDiff::from_lines(&expected, &found);
            wrong.push(format!("{place}\n{}", diff.unified_diff().context_radius(2)));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} snapshot(s) differ\n{}\naccept with: MILLRACE_ACCEPT=1 cargo test --test filetests",
        wrong.len(),
        wrong.join("\n")
    );
}
