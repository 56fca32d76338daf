//! Engines that name a library of matrix products where a tuning chose it: what they hold, what tells of it, and, where a GPU and
//! the library are there, that both ways compute the same.
//!
//! Without a GPU the tests of the last kind say so and pass; `MILLRACE_REQUIRE_GPU` and `MILLRACE_REQUIRE_LIBRARY` make what is
//! missing an error.
#![allow(clippy::print_stderr)]

#[path = "common/by_library.rs"]
mod by_library;

use std::path::{Path, PathBuf};
use std::process::Command;

use millrace::compiler::codegen::cuda::{Builder, nvrtc_version};
use millrace::compiler::compile::{Progress, prepare_with};
use millrace::compiler::target::TargetChoice;
use millrace::fit::{Fit, Question, Subject};
use millrace::ir::engine::{SectionKind, Verify};
use millrace::ir::launch::{Bundle, LIBRARY_WORKSPACE, LaunchTable};
use millrace::ir::{Bindings, DType};
use millrace::runtime::cuda::{has_library, survey};
use millrace::{
    Allocation, Class, CompileOptions, Compiled, Engine, Session, SessionOptions, TensorRef, compile,
};

/// Two layers in f32: a norm with three results, then a bias and a residual.
const NET: &str = "module @net phase imported {
  dim $t in 1..=512 hint 8
  weight @n : f32[64] = splat(1.5)
  weight @q : f32[96, 64] = random(seed = 1, std = 0.125)
  weight @k : f32[96, 64] = random(seed = 2, std = 0.125)
  weight @v : f32[96, 64] = random(seed = 3, std = 0.125)
  weight @o : f32[64, 96] = random(seed = 4, std = 0.125)
  weight @b : f32[64] = random(seed = 5, std = 0.5)
  graph @main(%0 \"x\": f32[$t, 64]) -> (\"y\": f32[$t, 64]) {
    %1 = rms_norm %0, @n {eps = 1e-5} : f32[$t, 64]
    %2 = matmul %1, @q {transpose_b = true} : f32[$t, 96]
    %3 = matmul %1, @k {transpose_b = true} : f32[$t, 96]
    %4 = matmul %1, @v {transpose_b = true} : f32[$t, 96]
    %5 = silu %2 : f32[$t, 96]
    %6 = mul %5, %4 : f32[$t, 96]
    %7 = add %6, %3 : f32[$t, 96]
    %8 = matmul %7, @o {transpose_b = true} : f32[$t, 64]
    %9 = add %8, @b : f32[$t, 64]
    %10 = add %9, %0 : f32[$t, 64]
    return %10
  }
}
";

struct Net {
    path: PathBuf,
    _folder: tempfile::TempDir,
}

fn net() -> Net {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("net.ir");
    std::fs::write(&path, NET).unwrap();
    Net { path, _folder: folder }
}

fn options(target: &str, plan_only: bool) -> CompileOptions {
    let target = TargetChoice::parse(target).unwrap();
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/kernel-cache");
    let cache = std::env::var_os("MILLRACE_KERNEL_CACHE").map_or(cache, PathBuf::from);
    let builder = Builder { cache: Some(cache), threads: None, plan_only };
    CompileOptions { pipeline: target.level(2), target, builder, ..CompileOptions::default() }
}

/// The options with a tuning that names the library wherever it may be.
fn named(net: &Net, mut options: CompileOptions, suggestion: usize) -> CompileOptions {
    let prepared = prepare_with(&net.path, &options, None, &mut Progress::default()).unwrap();
    options.tuning = by_library::tuning(&prepared.module, &options.target.archs, suggestion);
    assert!(!options.tuning.entries.is_empty());
    options
}

fn bytes(compiled: &Compiled) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    compiled.write(file.path(), &mut |_, _| {}).unwrap();
    std::fs::read(file.path()).unwrap()
}

fn tables(engine: &Engine) -> Vec<LaunchTable> {
    engine.file().kernels().map(|(_, bytes)| Bundle::decode(bytes).unwrap().table).collect()
}

fn millrace(arguments: &[&str]) -> (bool, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_millrace")).args(arguments).output().unwrap();
    let text = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    (out.status.success(), text)
}

#[test]
fn engines_name_the_library_beside_their_kernels() {
    let net = net();
    let plain = options("cuda:sm_90a,sm_80", true);
    let tuned = named(&net, plain.clone(), 1);
    let built_in = compile(&net.path, &plain, None).unwrap();
    let first = compile(&net.path, &tuned, None).unwrap();
    assert_eq!(bytes(&first), bytes(&compile(&net.path, &tuned, None).unwrap()), "a function of its input");
    assert!(first.context.remarks.iter().all(|r| r.pass != "tuning"));

    let engine = Engine::from_bytes(bytes(&first), Verify::Full).unwrap();
    let provenance = engine.file().section(SectionKind::Provenance).unwrap();
    let provenance: serde_json::Value = serde_json::from_slice(provenance).unwrap();
    let own = tables(&Engine::from_bytes(bytes(&built_in), Verify::Full).unwrap());
    let with = tables(&engine);
    assert_eq!(with.len(), 2);
    for (own, table) in own.iter().zip(&with) {
        assert_eq!((own.library_workspace, table.library_workspace), (0, LIBRARY_WORKSPACE));
        assert_eq!(table.kernels, own.kernels, "the same kernels, all of them");
        let keys = tuned.tuning.entries.keys().filter(|k| k.contains(&format!(" {} ", table.arch)));
        assert!(keys.clone().count() > 8 && keys.clone().all(|k| provenance["tuning"][k] == "cublaslt-1"));
        // At any number of rows each step launches what it did, and has the library's products beside.
        for rows in [1, 3, 64, 100, 300, 512] {
            let mut at = Bindings::new();
            at.set(first.module.dims[0].sym, rows);
            for (own, step) in own.steps.iter().zip(&table.steps) {
                let (own, now) = (own.variant(&at).unwrap(), step.variant(&at).unwrap());
                assert_eq!(own.launches, now.launches, "{rows} rows");
            }
            let products: Vec<_> = table
                .steps
                .iter()
                .filter_map(|s| s.variant(&at).unwrap().library.as_ref())
                .flat_map(|l| &l.products)
                .collect();
            assert!(products.len() >= 2, "{rows} rows: {products:?}");
            assert!(products.iter().all(|p| p.suggestion == 1 && p.dtype == DType::F32 && p.at <= 512));
            assert!(products.iter().any(|p| p.bias.is_some() && p.residual.is_some()));
        }
    }
}

#[test]
fn a_library_that_is_not_wanted_leaves_the_engine_as_it_is() {
    let net = net();
    let plain = options("cuda:sm_90a", true);
    let refused = CompileOptions { library: false, ..named(&net, plain.clone(), 0) };
    let compiled = compile(&net.path, &refused, None).unwrap();
    assert_eq!(bytes(&compiled), bytes(&compile(&net.path, &plain, None).unwrap()));
    let remarks: Vec<&str> =
        compiled.context.remarks.iter().filter(|r| r.pass == "tuning").map(|r| r.message.as_str()).collect();
    assert!(
        !remarks.is_empty() && remarks.iter().all(|r| r.contains("names a library, which is not wanted"))
    );

    // By the command line, and what a way that is not known says.
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (file, model) = (path("t.json"), net.path.to_str().unwrap());
    refused.tuning.write(Path::new(&file)).unwrap();
    let dry = ["compile", model, "--target", "cuda:sm_90a", "--tuning", &file, "--dry-run", "--json"];
    let (done, text) = millrace(&[&dry[..], &["--no-library"]].concat());
    if nvrtc_version().is_ok() {
        assert!(done && text.contains("names a library, which is not wanted"), "{text}");
    }
    let (done, text) = millrace(&["tune", model, "--target", "cuda:sm_90a", "--dry-run"]);
    assert!(done && text.contains("simple, cublaslt-0, cublaslt-1"), "{text}");
    let (done, text) = millrace(&["tune", model, "--target", "cuda:sm_90a", "--dry-run", "--no-library"]);
    assert!(done && !text.contains("cublaslt"), "{text}");
}

#[test]
fn inspection_shows_both_ways() {
    let net = net();
    let tuned = named(&net, options("cuda:sm_90a", true), 0);
    let compiled = compile(&net.path, &tuned, None).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    compiled.write(file.path(), &mut |_, _| {}).unwrap();
    let path = file.path().to_str().unwrap();
    let (done, text) = millrace(&["inspect", path, "--kernels"]);
    assert!(done && text.contains("33554432 bytes of workspace"), "{text}");
    let line = text.lines().find(|l| l.contains("+ bias + residual")).unwrap();
    assert!(line.contains("where cuBLASLt is installed") && line.contains("cublaslt-0 [$t, 96] x [64, 96]"));
    let at = text.lines().position(|l| l == line).unwrap();
    let own = text.lines().nth(at + 1).unwrap();
    assert!(own.contains("cuda_matmul_gemv") && own.contains("grid ["), "{own}");
    let (done, text) = millrace(&["inspect", path, "--at", "t=7"]);
    assert!(done && text.contains(", or cuBLASLt"), "{text}");
    let (_, text) = millrace(&["inspect", path, "--json"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let steps = json["device"][0]["steps"].as_array().unwrap();
    let named = steps.iter().flat_map(|s| s["variants"].as_array().unwrap());
    let named: Vec<_> = named.filter(|v| !v["library"].is_null()).collect();
    assert!(!named.is_empty() && named.iter().all(|v| !v["launches"].as_array().unwrap().is_empty()));
    assert_eq!(json["device"][0]["library_workspace"], LIBRARY_WORKSPACE);
}

#[test]
fn scratch_memory_of_the_library_is_an_item_of_its_own() {
    let net = net();
    let plain = options("cuda:sm_90a", true);
    let bytes_of = |options: &CompileOptions| {
        let compiled = compile(&net.path, options, None).unwrap();
        let table = Some(&compiled.device.bundles[0].table);
        let subject = Subject { module: &compiled.module, manifest: &compiled.manifest, table };
        Fit::of(subject, &Question::default()).unwrap().classes
    };
    let (without, with) = (bytes_of(&plain), bytes_of(&named(&net, plain.clone(), 0)));
    let library = |all: &[(Class, u64)]| all.iter().find(|(c, _)| *c == Class::Library).map(|(_, b)| *b);
    assert_eq!((library(&without), library(&with)), (None, Some(32 << 20)));
    let sum = |all: &[(Class, u64)]| all.iter().map(|(_, b)| b).sum::<u64>();
    assert_eq!(sum(&with), sum(&without) + (32 << 20), "nothing else changes");
}

/// Every architecture's kernels; a cache that has them serves machines without NVRTC.
#[test]
fn kernels_beside_the_library_build() {
    if let Err(why) = nvrtc_version() {
        let required = std::env::var("MILLRACE_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
        assert!(!required, "NVRTC is required: {why}");
        eprintln!("SKIPPED kernels_beside_the_library_build: {why}");
        return;
    }
    let net = net();
    let tuned = named(&net, options("cuda", false), 0);
    let compiled = compile(&net.path, &tuned, None).unwrap();
    assert_eq!(compiled.device.bundles.len(), tuned.target.archs.len());
    for bundle in &compiled.device.bundles {
        assert_eq!(Bundle::decode(&bundle.encode()).unwrap(), *bundle);
        assert!(bundle.table.by_library().count() > 0 && bundle.images.iter().all(|i| !i.is_empty()));
    }
}

/// A GPU with the library, and NVRTC or its cache to build for it; nothing without.
fn machine(test: &str) -> Option<String> {
    let survey = survey();
    let required = |name: &str| std::env::var(name).is_ok_and(|v| v != "0");
    let Some(gpu) = survey.devices.first() else {
        let why = survey.problem.map(|e| e.to_string()).unwrap_or_default();
        assert!(!required("MILLRACE_REQUIRE_GPU"), "a GPU is required: {why}");
        eprintln!("SKIPPED {test}: {why}");
        return None;
    };
    if !has_library() {
        assert!(!required("MILLRACE_REQUIRE_LIBRARY"), "cuBLASLt is required and not installed");
        eprintln!("SKIPPED {test}: cuBLASLt is not installed");
        return None;
    }
    Some(format!("cuda:{}", gpu.target()?))
}

fn input(rows: usize, call: usize) -> Vec<u8> {
    let value = |i: usize| ((i * 13 + call * 7) % 29) as f32 / 8.0 - 1.5;
    (0..rows * 64).flat_map(|i| value(i).to_le_bytes()).collect()
}

fn step(session: &mut Session<'_>, rows: usize, call: usize) -> Vec<f32> {
    let (shape, data) = ([rows as u64, 64], input(rows, call));
    session.run(&[TensorRef { dtype: DType::F32, shape: &shape, bytes: &data }]).unwrap();
    let output = session.read_output(0).unwrap();
    output.bytes.as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c)).collect()
}

#[test]
fn the_library_computes_what_the_kernels_do() {
    let Some(target) = machine("the_library_computes_what_the_kernels_do") else { return };
    let net = net();
    for suggestion in 0..4 {
        let compiled = compile(&net.path, &named(&net, options(&target, false), suggestion), None).unwrap();
        let engine = Engine::from_bytes(bytes(&compiled), Verify::Full).unwrap();
        let refusing = SessionOptions { library: false, ..SessionOptions::default() };
        let mut kernels = engine.session(refusing).unwrap();
        assert_eq!(kernels.ledger().now(Class::Library), 0);
        let told = kernels.library_report().unwrap();
        assert_eq!((told.version, told.reasons.as_slice()), (None, &["it is not wanted".to_string()][..]));
        let mut sessions = Vec::new();
        for allocation in [Allocation::Static, Allocation::OnProfileChange, Allocation::Dynamic] {
            let options = SessionOptions { allocation, ..SessionOptions::default() };
            sessions.push((allocation, engine.session(options).unwrap()));
        }
        for (allocation, session) in &mut sessions {
            let report = session.library_report().unwrap();
            eprintln!("{suggestion} {allocation:?}: {report}");
            // Not every version has four suggestions for every product.
            let ran = report.version.is_some();
            assert!(ran || suggestion > 0, "{report}");
            let scratch = if ran { LIBRARY_WORKSPACE } else { 0 };
            assert_eq!(session.ledger().now(Class::Library), scratch);
            let allocations = session.allocations();
            for call in 0..12 {
                let rows = [512, 1, 100, 33][call % 4];
                let (found, expected) = (step(session, rows, call), step(&mut kernels, rows, call));
                for (at, (a, b)) in found.iter().zip(&expected).enumerate() {
                    assert!(
                        (a - b).abs() <= 1e-4 * b.abs().max(1.0),
                        "{rows} rows, element {at}: {a} and {b}"
                    );
                }
                let report = session.library_report().unwrap();
                assert!(!ran || !report.reasons.is_empty() || report.last_products >= 2, "{report:?}");
            }
            if *allocation == Allocation::Static {
                assert_eq!(session.allocations(), allocations, "steps allocate nothing");
                let graphs = session.graph_report().unwrap();
                assert_eq!(graphs.failure, None, "products are recorded");
                assert_eq!((graphs.recorded, graphs.replayed), (4, 8));
            }
            session.synchronize().unwrap();
        }
    }
}

/// The same algorithm whatever was asked first: equal bits in every session, and at every replay.
#[test]
fn results_are_the_same_bits_in_every_session() {
    let Some(target) = machine("results_are_the_same_bits_in_every_session") else { return };
    let net = net();
    let compiled = compile(&net.path, &named(&net, options(&target, false), 0), None).unwrap();
    let engine = Engine::from_bytes(bytes(&compiled), Verify::Full).unwrap();
    let mut first = engine.session(SessionOptions::default()).unwrap();
    let mut second = engine.session(SessionOptions { graphs: false, ..SessionOptions::default() }).unwrap();
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    for rows in [512, 64, 300, 64, 1, 512] {
        let expected = bits(step(&mut first, rows, 1));
        for _ in 0..3 {
            assert_eq!(bits(step(&mut first, rows, 1)), expected);
            assert_eq!(bits(step(&mut second, rows, 1)), expected);
        }
    }
}
