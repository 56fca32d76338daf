//! Engines for GPUs, built without one: every kernel family compiles for every architecture within its promises, the same
//! input gives the same bytes, and a decoder's layer is few launches.
//!
//! Needs NVRTC (`scripts/fetch_nvrtc.sh`). Without it the tests say that they skipped; with `MILLRACE_REQUIRE_NVRTC=1`
//! they fail instead. Kernels are kept below `target`, so that a second run compiles none.
#![allow(clippy::print_stderr)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use millrace::compiler::codegen::cuda::{Builder, nvrtc_version, splits};
use millrace::compiler::compile::{Progress, prepare_with};
use millrace::compiler::import::Precision;
use millrace::compiler::target::TargetChoice;
use millrace::compiler::tuning::{Entry, VERSION};
use millrace::ir::launch::{Bundle, Launch, LaunchTable, Variant};
use millrace::ir::{Bindings, DType, fold};
use millrace::kernels::cuda::Arch;
use millrace::{CompileOptions, Compiled, Engine, compile};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Whether NVRTC is here.
fn nvrtc(test: &str) -> bool {
    let Err(why) = nvrtc_version() else { return true };
    let required = std::env::var("MILLRACE_REQUIRE_NVRTC").is_ok_and(|v| v == "1");
    assert!(!required, "NVRTC is required: {why}");
    eprintln!("SKIPPED {test}: {why}");
    false
}

fn options(target: &str, cache: Option<PathBuf>) -> CompileOptions {
    let target = TargetChoice::parse(target).unwrap();
    let builder = Builder { cache, ..Builder::default() };
    let mut options =
        CompileOptions { pipeline: target.level(2), target, builder, ..CompileOptions::default() };
    options.import.dummy_weights = true;
    options
}

fn cached(target: &str) -> CompileOptions {
    options(target, Some(root("target/kernel-cache")))
}

fn write(compiled: &Compiled) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    compiled.write(file.path(), &mut |_, _| {}).unwrap();
    std::fs::read(file.path()).unwrap()
}

/// Every family that the sources of the kernels name.
fn families() -> BTreeSet<String> {
    fn collect(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
                for (at, _) in code.match_indices("\"cuda.") {
                    found.insert(code[at + 1..].split('"').next().unwrap().to_string());
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    collect(&root("kernels/src/cuda"), &mut found);
    found
}

/// One graph with the ops that no model of the zoo has by themselves; built without fusion.
const SINGLE: &str = "module @m phase imported {
  dim $t in 1..=64 hint 8
  dim $b in 1..=4
  weight @table : f32[16, 24] = random(seed = 1, std = 1.0)
  weight @picks : i32[2] = dense[0.0, 3.0]
  graph @main(%0 \"x\": f32[$t, 24], %1 \"ids\": i32[$t], %20 \"seq_starts\": i32[$b + 1]) -> (\"a\": f32[24, $t], \"b\": f32[$t], \"c\": f32[24, 8], \"d\": f32[24, 24], \"e\": f32[$t, 2], \"f\": f32[$t, 24], \"g\": f32[$b, 24]) {
    %2 = transpose %0 {perm = [1, 0]} : f32[24, $t] loc(turn)
    %3 = embedding @table, %1 : f32[$t, 24] loc(look)
    %4 = concat %0, %3 {axis = 1} : f32[$t, 48] loc(join)
    %5 = slice %4 {axis = 1, start = 12, end = 36} : f32[$t, 24] loc(cut)
    %6 = reduce_max %5 {axes = [1]} : f32[$t] loc(most)
    %7 = iota {shape = [24, 8], axis = 0, dtype = f32} : f32[24, 8] loc(count)
    %8 = softmax %7 {axis = 0} : f32[24, 8] loc(columns)
    %9 = matmul %2, %5 : f32[24, 24] loc(product)
    %10 = gather %0, @picks {axis = 1} : f32[$t, 2] loc(pick)
    %11 = scatter %0, @picks, %10 {axis = 1} : f32[$t, 24] loc(put)
    %12 = lt %11, %5 : bool[$t, 24] loc(less)
    %13 = select %12, %11, %5 : f32[$t, 24] loc(choose)
    %14 = cast %13 {to = f16} : f16[$t, 24] loc(narrow)
    %15 = cast %14 {to = f32} : f32[$t, 24] loc(widen)
    %16 = reshape %6 {shape = [$t, 1]} : f32[$t, 1] loc(column)
    %17 = broadcast %16 {shape = [$t, 24]} : f32[$t, 24] loc(repeat)
    %18 = add %15, %17 : f32[$t, 24] loc(sum)
    %19 = mean_pool %18, %20 : f32[$b, 24] loc(pool)
    return %2, %6, %8, %9, %10, %18, %19
  }
}
";

/// Many rows in f32, which a measurement may give to tiles of 64 or of 128.
const MANY_ROWS: &str = "module @m phase imported {
  dim $t in 1..=512 hint 8
  weight @w : f32[72, 36] = random(seed = 1, std = 0.1)
  graph @main(%0 \"x\": f32[$t, 36]) -> (\"y\": f32[$t, 72]) {
    %1 = matmul %0, @w {transpose_b = true} : f32[$t, 72] loc(many)
    return %1
  }
}
";

/// A measurement that chose `candidate`.
fn chosen(candidate: &str) -> Entry {
    Entry {
        candidate: candidate.into(),
        nanoseconds: 1,
        built_in_nanoseconds: 1,
        device: String::new(),
        driver: String::new(),
        version: VERSION.into(),
    }
}

/// A file of IR text.
fn text_file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".ir").tempfile().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

#[test]
fn every_family_builds_for_every_architecture() {
    if !nvrtc("every_family_builds_for_every_architecture") {
        return;
    }
    let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let (single, many) = (text_file(SINGLE), text_file(MANY_ROWS));
    let mut cases = [&single, &many].map(|file| (file.path().to_path_buf(), Precision::Auto)).to_vec();
    let zoo = [
        "lenet.ir",
        "depthwise.ir",
        "twin_decoder.ir",
        "primitive_encoder.ir",
        "gated_mlp.ir",
        "lookalikes.ir",
    ];
    for graph in zoo {
        cases.push((root("tests/zoo").join(graph), Precision::Auto));
    }
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        cases.push((root("examples/models/baker-street-6m"), Precision::Fixed(dtype)));
    }
    cases.push((root("tests/data/configs/minilm"), Precision::Fixed(DType::F16)));
    cases.push((root("tests/data/tiny-random/mistral-sliding"), Precision::Fixed(DType::F32)));
    for (path, precision) in cases {
        let mut options = cached("cuda,ptx");
        options.import.precision = precision;
        if path == single.path() {
            options.pipeline = options.target.level(0);
        }
        if path == many.path() {
            for arch in &options.target.archs {
                for (rows, candidate) in [("257..384", "simt-e64"), ("385..512", "simt-e128")] {
                    let key = format!("matmul {arch} f32 out=f32 rows k=36 n=72 m={rows}");
                    options.tuning.entries.insert(key, chosen(candidate));
                }
            }
        }
        let compiled = compile(&path, &options, None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(compiled.device.bundles.len(), Arch::ALL.len() + 1);
        for bundle in &compiled.device.bundles {
            Bundle::decode(&bundle.encode()).unwrap();
            let ptx = bundle.table.arch == "compute_80";
            for kernel in &bundle.table.kernels {
                // Registers of PTX are the driver's choice.
                assert_eq!(kernel.registers == 0, ptx, "{} and {}", path.display(), kernel.entry);
                let image = &bundle.images[kernel.image];
                assert_eq!(image.starts_with(b"\x7fELF"), !ptx, "{}", kernel.entry);
                if ptx {
                    let text = std::str::from_utf8(image).unwrap();
                    assert!(text.contains(".target compute_80") || text.contains(".target sm_80"), "{text}");
                    assert!(text.contains(&format!(".entry {}(", kernel.entry)), "{text}");
                }
                seen.entry(bundle.table.arch.clone()).or_default().insert(kernel.family.clone());
            }
        }
    }
    let families = families();
    assert!(families.len() > 20, "{families:?}");
    let built: BTreeSet<String> = seen.values().flatten().cloned().collect();
    let unknown: Vec<&String> = built.difference(&families).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    let missing: Vec<&String> =
        families.difference(&built).filter(|f| !NOT_BUILT.contains(&f.as_str())).collect();
    assert!(missing.is_empty(), "no graph here has {missing:?}");
    // Families for the matrix instructions of some architectures have a twin for the others.
    let twins = ["cuda.matmul.mma", "cuda.matmul.wgmma", "cuda.attention.prefill", "cuda.attention.hopper"];
    for (arch, here) in &seen {
        let only: Vec<&String> = built.difference(here).filter(|f| !twins.contains(&f.as_str())).collect();
        assert!(only.is_empty(), "{arch} lacks {only:?}");
    }
}

/// Kernels of engines whose weights may be streamed read parts of them.
/// The middle of a decoder's layer.
const MIDDLE: &str = "module @m phase imported {
  dim $t in 1..=64
  dim $b in 1..=8
  dim $p in 1..=2048
  dim $pages in 1..=4096
  state @k : bf16[$pages, 32, 2, 128]
  state @v : bf16[$pages, 32, 2, 128]
  graph @main(%0 \"q\": bf16[$t, 8, 128], %1 \"k\": bf16[$t, 2, 128], %2 \"v\": bf16[$t, 2, 128], %3 \"positions\": i32[$t], %4 \"seq_starts\": i32[$b + 1], %5 \"kv_lens\": i32[$b], %6 \"block_table\": i32[$b, $p]) -> (\"y\": bf16[$t, 8, 128]) {
    %7 = rope %0, %3 {base = 10000.0, layout = half} : bf16[$t, 8, 128] loc(q)
    %8 = rope %1, %3 {base = 10000.0, layout = half} : bf16[$t, 2, 128] loc(k)
    %9 = kv_append @k, %8, %4, %5, %6 : bf16[$pages, 32, 2, 128] loc(keys)
    %10 = kv_append @v, %2, %4, %5, %6 : bf16[$pages, 32, 2, 128] loc(values)
    %11 = paged_attention %7, %9, %10, %4, %5, %6 {scale = 0.088} : bf16[$t, 8, 128] loc(attention)
    return %11
  }
}
";

#[test]
fn every_split_of_single_rows_builds() {
    if !nvrtc("every_split_of_single_rows_builds") {
        return;
    }
    let file = text_file(MIDDLE);
    let built = |target: &str, at: usize| {
        let mut options = cached(target);
        let prepared = prepare_with(file.path(), &options, None, &mut Progress::default()).unwrap();
        let archs = options.target.archs.clone();
        let all: Vec<_> = archs.iter().flat_map(|arch| splits(&prepared.module, *arch)).collect();
        assert_eq!(all.len(), archs.len() * 12, "four classes, three ranges of contexts");
        let most = all.iter().map(|(_, _, names)| names.len()).max().unwrap();
        for (key, _, names) in all {
            assert!(key.contains(" rope "), "{key}");
            options.tuning.entries.insert(key, chosen(&names[at.min(names.len() - 1)]));
        }
        // Kernels that keep anything in local memory do not build.
        let compiled = compile(file.path(), &options, None).unwrap_or_else(|e| panic!("{target} {at}: {e}"));
        assert!(compiled.context.remarks.iter().all(|r| r.pass != "tuning"));
        let layers = compiled.device.bundles.iter().map(|bundle| {
            let kernels = bundle.table.kernels.iter();
            kernels.filter(|k| k.family == "cuda.attention.layer_decode").count()
        });
        assert!(layers.into_iter().all(|kernels| kernels > 1), "{target} {at}");
        most
    };
    let most = built("cuda", 1);
    assert!(most > 12, "{most}");
    (2..most).for_each(|at| assert!(built("cuda:sm_90a", at) <= most));
    assert_eq!(built("cuda", 4), most);
}

#[test]
fn streamed_weights_build_for_every_architecture() {
    if !nvrtc("streamed_weights_build_for_every_architecture") {
        return;
    }
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let cases = [
        (root("examples/models/baker-street-6m"), Precision::Fixed(DType::BF16)),
        (root("examples/models/baker-street-6m"), Precision::Fixed(DType::F32)),
        (root("tests/data/configs/minilm"), Precision::Fixed(DType::F16)),
    ];
    for (path, precision) in cases {
        let mut options = cached("cuda");
        options.import.precision = precision;
        let resident = compile(&path, &options, None).unwrap();
        options.weight_streaming = true;
        let streamed = compile(&path, &options, None).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert_eq!(streamed.device.bundles.len(), Arch::ALL.len());
        for (bundle, resident) in streamed.device.bundles.iter().zip(&resident.device.bundles) {
            Bundle::decode(&bundle.encode()).unwrap();
            let launches = |bundle: &Bundle| -> Vec<(String, Launch)> {
                let variants = bundle.table.steps.iter().flat_map(|s| s.streamed());
                let family = |l: &Launch| bundle.table.kernels[l.kernel].family.clone();
                variants.flat_map(|v| &v.launches).map(|l| (family(l), l.clone())).collect()
            };
            // With its whole weights the engine is the one that never streams.
            let whole = |bundle: &Bundle| -> Vec<Variant> {
                bundle.table.steps.iter().flat_map(|s| s.variants.clone()).collect()
            };
            let kernel = |bundle: &Bundle, at: usize| bundle.table.kernels[at].source.clone();
            for (a, b) in whole(bundle)
                .iter()
                .zip(whole(resident))
                .flat_map(|(a, b)| a.launches.clone().into_iter().zip(b.launches))
            {
                assert_eq!(kernel(bundle, a.kernel), kernel(resident, b.kernel));
                assert_eq!(Launch { kernel: 0, ..a }, Launch { kernel: 0, ..b });
            }
            let (streamed, resident) = (launches(bundle), launches(resident));
            assert_eq!(streamed.len(), resident.len());
            for ((family, launch), (other, whole)) in streamed.iter().zip(&resident) {
                assert_eq!((family, launch.shared, launch.block), (other, whole.shared, whole.block));
                assert_eq!(whole.tiles, None);
                // As many blocks for the whole weight as where it is never cut; `simple` may have some without columns.
                if family != "cuda.matmul.simple" {
                    assert_eq!(launch.whole_grid(), whole.grid, "{family}");
                }
                if launch.tiles.is_some() {
                    seen.insert(format!("{} {family}", bundle.table.arch));
                }
            }
        }
    }
    for arch in Arch::ALL {
        let large = if arch.has_wgmma() { "wgmma" } else { "mma" };
        for family in ["skinny", "gemv", "simple", large] {
            let name = format!("{arch} cuda.matmul.{family}");
            assert!(seen.contains(&name), "no {name} in {seen:?}");
        }
    }
}

/// Families that no graph above asks for: kernels of no launch table, and ops that passes turn into others or join.
const NOT_BUILT: [&str; 5] =
    ["cuda.argmax.split", "cuda.attention.decode", "cuda.broadcast", "cuda.kv_append", "cuda.topk"];

#[test]
fn equal_input_gives_equal_engines() {
    if !nvrtc("equal_input_gives_equal_engines") {
        return;
    }
    let build = || {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options("cuda:sm_90a,cuda:sm_80", Some(folder.path().to_path_buf()));
        options.import.precision = Precision::Fixed(DType::BF16);
        let compiled = compile(&root("examples/models/baker-street-6m"), &options, None).unwrap();
        assert_eq!(compiled.device.counts.cached, 0);
        let cold = write(&compiled);
        let again = compile(&root("examples/models/baker-street-6m"), &options, None).unwrap();
        assert_eq!(again.device.counts.compiled, 0);
        assert_eq!(cold, write(&again));
        cold
    };
    let engine = build();
    assert_eq!(engine, build());
    let engine = Engine::from_bytes(engine, millrace::ir::engine::Verify::Full).unwrap();
    let archs: Vec<&str> = engine.file().kernels().map(|(name, _)| name).collect();
    assert_eq!(archs, ["sm_90a", "sm_80"]);
    let bundles: Vec<Bundle> = engine.file().kernels().map(|(_, b)| Bundle::decode(b).unwrap()).collect();
    let nodes = engine.module().graph.order.len();
    assert!(bundles.iter().all(|b| b.nodes() == nodes));
}

/// Launches by layer of a step of one token.
fn launches_by_layer(compiled: &Compiled, table: &LaunchTable) -> BTreeMap<u64, usize> {
    let module = &compiled.module;
    let mut count = BTreeMap::new();
    for at in table.launches_at(&Bindings::minima(&module.dims)).unwrap() {
        let step = &table.steps[at.step];
        let nodes = module.graph.order[step.first..step.first + step.nodes].iter();
        let layers = nodes.flat_map(|n| &module.graph.nodes[*n].loc).filter_map(|l| fold::layer(l));
        if let Some((_, layer)) = layers.min() {
            *count.entry(layer).or_default() += 1;
        }
    }
    count
}

#[test]
fn a_layer_is_six_launches_at_decode() {
    if !nvrtc("a_layer_is_six_launches_at_decode") {
        return;
    }
    let compiled = compile(&root("tests/data/configs/llama-3.1-8b"), &cached("cuda"), None).unwrap();
    for bundle in &compiled.device.bundles {
        let count = launches_by_layer(&compiled, &bundle.table);
        assert_eq!(count.len(), 32);
        let most = count.values().max().unwrap();
        assert!(*most <= 6, "{}: {count:?}", bundle.table.arch);
    }
}

fn millrace(arguments: &[&str], with_libraries: bool) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millrace"));
    if !with_libraries {
        ["LD_LIBRARY_PATH", "CUDA_PATH", "CUDA_HOME"].into_iter().for_each(|v| {
            command.env_remove(v);
        });
    }
    let empty = tempfile::tempdir().unwrap();
    let cache = if with_libraries { root("target/kernel-cache") } else { empty.path().to_path_buf() };
    let out = command.args(arguments).env("MILLRACE_KERNEL_CACHE", cache).output().unwrap();
    let text = [out.stdout, out.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    (out.status.success(), text)
}

#[test]
fn without_nvrtc_the_error_says_what_to_install() {
    let (_, doctor) = millrace(&["doctor", "--json"], false);
    if !doctor.contains("\"nvrtc\": null") {
        eprintln!("SKIPPED without_nvrtc_the_error_says_what_to_install: the system has NVRTC");
        return;
    }
    let config = root("tests/data/configs/llama-3.2-1b");
    let config = config.to_str().unwrap();
    let (done, text) =
        millrace(&["compile", config, "--dummy-weights", "--target", "cuda", "--dry-run"], false);
    assert!(!done && text.contains("compile/no-nvrtc") && text.contains("pip install"), "{text}");
}

#[test]
fn inspect_shows_launches_and_texts() {
    if !nvrtc("inspect_shows_launches_and_texts") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let engine = folder.path().join("x.engine");
    let engine = engine.to_str().unwrap();
    let config = root("tests/data/configs/llama-3.1-8b");
    let config = config.to_str().unwrap();
    let build =
        ["compile", config, "--dummy-weights", "--target", "cuda:sm_90a,cuda:sm_80,ptx", "-o", engine];
    let (done, text) = millrace(&build, true);
    assert!(done, "{text}");
    let inspect = |more: &[&str]| {
        let (done, text) = millrace(&[&["inspect", engine], more].concat(), true);
        assert!(done, "{more:?}: {text}");
        text
    };
    let kernels = inspect(&["--kernels"]);
    for part in [
        "sm_90a: ",
        "sm_80: ",
        "compute_80: ",
        "threads, PTX, shared",
        "registers",
        "model.layers.3",
        "grid [",
        "else: ",
        "$t",
    ] {
        assert!(kernels.contains(part), "no {part} in {kernels}");
    }
    let at = inspect(&["--at", "t=1,b=1,r=1,p=8"]);
    assert!(at.contains("in each of 32 layers"), "{at}");
    let at: serde_json::Value = serde_json::from_str(&inspect(&["--at", "t=1", "--json"])).unwrap();
    let first = at[0]["launches"][0]["entry"].as_str().unwrap().to_string();
    let source = inspect(&["--source", &first]);
    assert!(
        source.contains(&format!("#define KERNEL {first}\n")) && source.contains("__global__"),
        "{source}"
    );
    assert!(inspect(&["--source", "all"]).len() > source.len());
    let whole: serde_json::Value = serde_json::from_str(&inspect(&["--json"])).unwrap();
    assert_eq!(whole["device"].as_array().unwrap().len(), 3);
    assert!(whole["device"][2]["kernels"][0]["registers"].is_null());
    for wrong in [["--at", "q=1"], ["--at", "t=0"], ["--at", "t"], ["--source", "nothing"]] {
        let (done, text) = millrace(&["inspect", engine, wrong[0], wrong[1]], true);
        assert!(!done && text.contains("error[usage/"), "{wrong:?}: {text}");
    }
}
