//! Weights that stream compute the same bits as weights that stay, under every budget, with every ring.
//!
//! What is compared are the bytes of outputs of a prefill and of decode steps that follow it, or of the steps of a random
//! graph. On a machine with a GPU `MILLRACE_TARGETS=cuda:sm_90a` runs the models there. `--ignored` runs a large shape.
#![allow(clippy::print_stderr)]

#[path = "common/models.rs"]
mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use common::{ids, json, root};
use millrace::compiler::codegen::WeightMode;
use millrace::compiler::import::Precision;
use millrace::compiler::target::TargetChoice;
use millrace::generation::{Generator, Request, StepInputs, StepModel};
use millrace::ir::plan::stream::{self, Cut, Ring};
use millrace::ir::sampling::{Random, graph};
use millrace::ir::{DType, text};
use millrace::runtime::WeightBudget;
use millrace::runtime::joint::{Share, set_joint_budget};
use millrace::{
    Allocation, Class, CompileOptions, Decoder, Engine, Profile, Session, SessionOptions, TensorRef, compile,
};

const BAKER: &str = "examples/models/baker-street-6m";

/// Targets to compile for, each with a device here: the processor, or what `MILLRACE_TARGETS` lists, such as
/// `cpu;cuda:sm_90a`.
fn targets() -> Vec<String> {
    let list = std::env::var("MILLRACE_TARGETS").unwrap_or_else(|_| "cpu".into());
    list.split(';').map(str::to_string).collect()
}

/// Rings so small that small models stream: of the usual two slots, and of five.
const RINGS: [Ring; 2] = [
    Ring { slots: 2, slot_bytes: 8 << 10, small: 0, align: 256 },
    Ring { slots: 5, slot_bytes: 24 << 10, small: 1 << 10, align: 64 },
];

fn folders() -> Vec<String> {
    let tiny = ["llama-rope-llama3", "mistral-sliding", "qwen2", "qwen3"];
    tiny.iter().map(|name| format!("tests/data/tiny-random/{name}")).collect()
}

fn options(dtype: DType, target: &str) -> CompileOptions {
    let mut options = CompileOptions::default();
    options.import.precision = Precision::Fixed(dtype);
    options.import.max_num_tokens = Some(64);
    options.weight_streaming = true;
    options.target = TargetChoice::parse(target).unwrap();
    options
}

fn write(source: &Path, options: &CompileOptions, file: &Path) {
    compile(source, options, None).unwrap().write(file, &mut |_, _| {}).unwrap();
}

/// An engine whose file has no name any more.
fn engine(folder: &str, options: &CompileOptions) -> Engine {
    let file = tempfile::Builder::new().suffix(".engine").tempfile().unwrap();
    write(&root(folder), options, file.path());
    Engine::open(file.path()).unwrap()
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 3 + (i * 37 + i * i) % 400).collect()
}

/// Step inputs of one sequence that has `before` tokens in the cache.
fn step_of(model: &Decoder<'_, '_>, new: &[u32], before: usize) -> StepInputs {
    let (per_block, end) = (model.limits().tokens_per_block, before + new.len());
    let pages = end.div_ceil(per_block);
    StepInputs {
        token_ids: new.iter().map(|t| *t as i32).collect(),
        positions: (before as i32..end as i32).collect(),
        seq_starts: vec![0, new.len() as i32],
        kv_lens: vec![end as i32],
        block_table: (0..pages as i32).collect(),
        pages_per_seq: pages,
        logit_rows: vec![new.len() as i32 - 1],
    }
}

/// Bits of the logits of a prefill of 20 tokens and of two decode steps.
fn three_steps(session: &mut Session<'_>) -> Vec<Vec<u32>> {
    session.reset_states();
    let mut model = Decoder::new(session).unwrap();
    let prompt = tokens(20);
    let mut bits = Vec::new();
    for (new, before) in [(&prompt[..], 0), (&prompt[4..5], 20), (&prompt[9..10], 21)] {
        let inputs = step_of(&model, new, before);
        let mut logits = Vec::new();
        model.step(&inputs, &mut logits).unwrap();
        bits.push(logits.into_iter().map(f32::to_bits).collect());
    }
    bits
}

fn session<'e>(engine: &'e Engine, allocation: Allocation, ring: Ring, budget: WeightBudget) -> Session<'e> {
    engine.session(session_options(allocation, ring, budget)).unwrap()
}

fn session_options(allocation: Allocation, ring: Ring, budget: WeightBudget) -> SessionOptions {
    // As many copies under way as a ring allows.
    let copy_queues = ring.slots - 1;
    SessionOptions { allocation, ring, copy_queues, budget, ..SessionOptions::default() }
}

/// What the ledger holds is what the placement says.
fn assert_exact(session: &Session<'_>) {
    let (_, placement) = session.placement();
    assert_eq!(session.ledger().now(Class::Weights), placement.resident_bytes);
    assert_eq!(session.ledger().now(Class::Ring), placement.ring_bytes());
    assert_eq!(session.device_budget(), placement.device_bytes());
}

/// The minimum, one tile more, the largest weight, parts, all but a byte, all.
fn budgets(session: &Session<'_>, ring: &Ring) -> Vec<WeightBudget> {
    let (demand, _) = session.placement();
    let least = session.minimum_budget();
    let largest = demand.items.iter().map(|i| i.bytes).max().unwrap();
    let all = stream::resident(demand, ring);
    let mut budgets: Vec<WeightBudget> =
        [least, least + ring.slot_bytes, least.max(largest), all - 1].map(WeightBudget::Bytes).into();
    budgets.extend([0.25, 0.5, 0.75].map(WeightBudget::Fraction));
    budgets.push(WeightBudget::Resident);
    budgets
}

/// Every budget and ring, with memory that stays and memory that goes: in sessions of their own, and live.
fn matrix(engine: &Engine, what: &str) {
    for allocation in [Allocation::Static, Allocation::Dynamic] {
        for ring in RINGS {
            let mut moving = session(engine, allocation, ring, WeightBudget::Resident);
            let expected = three_steps(&mut moving);
            let budgets = budgets(&moving, &ring);
            for budget in &budgets {
                let what = format!("{what}, {allocation:?}, {budget}, {ring:?}");
                moving.set_weight_budget(*budget).unwrap();
                assert_exact(&moving);
                assert!(three_steps(&mut moving) == expected, "{what}: live");
                let mut fresh = session(engine, allocation, ring, *budget);
                assert_exact(&fresh);
                assert!(three_steps(&mut fresh) == expected, "{what}");
                // Of little that streams, a part and the ring may be room for all.
                let all = match budget {
                    WeightBudget::Resident => true,
                    WeightBudget::Bytes(_) => false,
                    _ => fresh.device_budget() >= stream::resident(fresh.placement().0, &ring),
                };
                assert_eq!(fresh.placement().1.is_resident(), all, "{what}");
            }
            let least = moving.minimum_budget();
            let error = moving.set_weight_budget(WeightBudget::Bytes(least - 1)).unwrap_err();
            assert_eq!(error.code(), "run/weight-budget");
            assert!(error.to_string().contains(&least.to_string()), "{error}");
            assert!(three_steps(&mut moving) == expected, "{what}: after a refusal");
        }
    }
}

#[test]
fn tiny_models_compute_the_same_bits_under_every_budget() {
    for target in &targets() {
        for folder in folders() {
            matrix(&engine(&folder, &options(DType::F32, target)), &folder);
        }
    }
}

#[test]
fn baker_street_computes_the_same_bits_under_every_budget() {
    for target in &targets() {
        matrix(&engine(BAKER, &options(DType::BF16, target)), BAKER);
    }
}

/// A large shape under budgets that change in one session: with the usual ring, and with one of more slots than two.
///
/// The engine is the file `MILLRACE_STREAMING_ENGINE`, compiled with `--weight-streaming` and, if its weights are from a seed,
/// `--complete-weights`; or it is made of weights from a seed, computed each time they are read, in the shape
/// `MILLRACE_STREAMING_SHAPE` or that of Llama 3.1 8B in bf16 (16 GB).
#[test]
#[ignore = "takes the memory of a large model"]
fn a_large_shape_computes_the_same_bits_under_every_budget() {
    if let Ok(path) = std::env::var("MILLRACE_STREAMING_ENGINE") {
        let engine = Engine::open(&path).unwrap();
        return large_matrix(&engine, &engine.manifest().target);
    }
    let folder = std::env::var("MILLRACE_STREAMING_SHAPE");
    let folder = folder.unwrap_or_else(|_| "tests/data/configs/llama-3.1-8b".into());
    for target in &targets() {
        let mut options = options(DType::BF16, target);
        options.import.dummy_weights = true;
        large_matrix(&engine(&folder, &options), target);
    }
}

fn large_matrix(engine: &Engine, target: &str) {
    let wide = Ring { slots: 4, slot_bytes: 12 << 20, ..Ring::DEFAULT };
    for (allocation, ring) in [(Allocation::Static, Ring::DEFAULT), (Allocation::Dynamic, wide)] {
        let start = Instant::now();
        // The cache of a large shape takes gigabytes where it has room for all sequences.
        let options = session_options(allocation, ring, WeightBudget::Resident);
        let mut session = engine.session(SessionOptions { kv_pages: Some(4), ..options }).unwrap();
        let expected = three_steps(&mut session);
        assert!(expected.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
        let different = expected.iter().flatten().collect::<BTreeSet<_>>().len();
        assert!(different > 1000, "{different} different logits");
        eprintln!(
            "{target}, {allocation:?}, {} slots of {} bytes: resident in {:.1?}",
            ring.slots,
            ring.slot_bytes,
            start.elapsed()
        );
        // Twice on a device, so that it replays what it recorded.
        let times = if target.contains("cuda") { 2 } else { 1 };
        for budget in budgets(&session, &ring) {
            let start = Instant::now();
            session.set_weight_budget(budget).unwrap();
            let placed = start.elapsed();
            assert_exact(&session);
            let start = Instant::now();
            for _ in 0..times {
                assert!(
                    three_steps(&mut session) == expected,
                    "{target}, {allocation:?}, {budget}, {ring:?}"
                );
            }
            let placement = session.placement().1;
            eprintln!(
                "{target}, {allocation:?}, {budget}: {} bytes held, {} moved by a step, bits equal; placed in {placed:.1?}, {} steps in {:.1?}",
                placement.device_bytes(),
                placement.moved(),
                3 * times,
                start.elapsed()
            );
        }
        let least = session.minimum_budget();
        let error = session.set_weight_budget(WeightBudget::Bytes(least - 1)).unwrap_err();
        assert_eq!(error.code(), "run/weight-budget");
        assert!(error.to_string().contains(&least.to_string()), "{error}");
    }
}

/// Weights from a seed that are stored give the bits of those that loading computes, resident and from the file.
#[test]
fn complete_engines_hold_weights_from_a_seed() {
    for target in &targets() {
        let mut options = options(DType::BF16, target);
        options.import.dummy_weights = true;
        let made = engine(&folders()[0], &options);
        options.weights = WeightMode::Complete;
        let complete = engine(&folders()[0], &options);
        assert!(made.file().weights_range().is_none_or(|(_, len)| len == 0));
        let module = complete.module();
        for id in module.used_weights() {
            assert!(complete.file().weight(&module.weights[id].name).is_some());
        }
        let mut computed = session(&made, Allocation::Static, RINGS[0], WeightBudget::Resident);
        let expected = three_steps(&mut computed);
        let mut stored = session(&complete, Allocation::Static, RINGS[0], WeightBudget::Resident);
        assert!(three_steps(&mut stored) == expected);
        stored.set_weight_budget(WeightBudget::Fraction(0.0)).unwrap();
        assert!(stored.placement().1.moved() > 0);
        assert!(three_steps(&mut stored) == expected);
    }
}

/// Whatever the cut: panels, panels of gate and up, whole weights, rows.
#[test]
fn every_cut_occurs() {
    let engine = engine(BAKER, &options(DType::F32, "cpu"));
    let least = session(&engine, Allocation::Static, RINGS[0], WeightBudget::Fraction(0.0));
    let (demand, placement) = least.placement();
    let cuts: Vec<Cut> = demand.items.iter().filter_map(|i| i.cut).collect();
    assert!(cuts.contains(&Cut::Tiles { granule: 1, parts: 1 }));
    assert!(cuts.contains(&Cut::Tiles { granule: 1, parts: 2 }));
    assert!(cuts.contains(&Cut::Rows));
    assert!(placement.copies.len() > 2 * demand.items.len(), "{} copies", placement.copies.len());
    // A weight of another layout is served whole.
    let mut plain = options(DType::F32, "cpu");
    plain.pipeline = millrace::compiler::pipeline::Pipeline::level(0);
    let engine = common::engine(BAKER, DType::F32, |o| *o = plain);
    let ring = Ring { slot_bytes: 1 << 10, ..RINGS[0] };
    let mut whole = session(&engine, Allocation::Static, ring, WeightBudget::Resident);
    let expected = three_steps(&mut whole);
    assert!(whole.placement().0.items.iter().any(|i| i.cut == Some(Cut::Whole)));
    whole.set_weight_budget(WeightBudget::Fraction(0.0)).unwrap();
    assert!(three_steps(&mut whole) == expected);
}

#[test]
fn engines_without_streaming_refuse() {
    let mut plain = options(DType::F32, "cpu");
    plain.weight_streaming = false;
    let engine = engine(&folders()[0], &plain);
    let mut session = session(&engine, Allocation::Static, RINGS[0], WeightBudget::Resident);
    assert_eq!(session.total_device_budget(), 0);
    for budget in [WeightBudget::Bytes(1 << 40), WeightBudget::Fraction(0.5)] {
        let error = session.set_weight_budget(budget).unwrap_err();
        assert_eq!(error.code(), "run/not-streamable");
        assert!(error.to_string().contains("--weight-streaming"), "{error}");
    }
}

/// A guard changes the budget between steps of one generation, a hundred times, and restores it.
#[test]
fn live_changes_keep_the_tokens() {
    for target in &targets() {
        live_changes(target);
    }
}

fn live_changes(target: &str) {
    let reference = json(&format!("{BAKER}/reference.json"));
    let prompt = ids(&reference["prompts"][0]["input_ids"]);
    let engine = engine(BAKER, &options(DType::F32, target));
    let mut still = session(&engine, Allocation::Static, RINGS[0], WeightBudget::Resident);
    let mut model = Decoder::new(&mut still).unwrap();
    let request = Request { stop_at_eos: false, ..Request::greedy(prompt.clone(), 101) };
    let expected = Generator::new(&mut model).unwrap().generate(&[request], |_, _| {}).unwrap();
    let mut moving = session(&engine, Allocation::Static, RINGS[0], WeightBudget::Fraction(0.3));
    let (least, all) = {
        let (demand, _) = moving.placement();
        (moving.minimum_budget(), stream::resident(demand, &RINGS[0]))
    };
    let (mut found, mut before, mut random) = (Vec::<u32>::new(), 0, Random::new(7));
    let mut new = prompt;
    while found.len() < 101 {
        let budget = match found.len() % 5 {
            4 => WeightBudget::Resident,
            _ => WeightBudget::Bytes(least + random.below((all - least) as usize) as u64),
        };
        let mut session = moving.weight_budget(budget).unwrap();
        assert_exact(&session);
        let mut model = Decoder::new(&mut session).unwrap();
        let inputs = step_of(&model, &new, before);
        let mut next = Vec::new();
        model.step_argmax(&inputs, &mut next).unwrap();
        before += new.len();
        found.extend(&next);
        new = next;
        drop(session);
        assert_eq!(moving.current_weight_budget(), WeightBudget::Fraction(0.3));
    }
    assert_eq!(found, expected[0].token_ids);
    assert_exact(&moving);
}

/// Two sessions under one budget: the sum is kept in every order of changes, and tokens stay.
#[test]
fn sessions_share_a_budget() {
    let small = engine(&folders()[3], &options(DType::F32, "cpu"));
    let large = engine(BAKER, &options(DType::F32, "cpu"));
    let ring = RINGS[0];
    let mut a = session(&small, Allocation::Static, ring, WeightBudget::Resident);
    let mut b = session(&large, Allocation::Static, ring, WeightBudget::Resident);
    let expected = (three_steps(&mut a), three_steps(&mut b));
    let all = a.device_budget() + b.device_budget();
    for part in [2, 1, 3] {
        let budget = all * part / 4;
        for how in [Share::ByBenefit, Share::Proportional] {
            let parts = set_joint_budget(&mut [&mut a, &mut b], budget, how).unwrap();
            assert!(parts.iter().sum::<u64>() <= budget, "{parts:?}");
            assert!(a.device_budget() <= parts[0] && b.device_budget() <= parts[1], "{parts:?}");
            assert!((three_steps(&mut a), three_steps(&mut b)) == expected, "{how:?}, {part}/4");
        }
    }
    let (least, held) = (a.minimum_budget() + b.minimum_budget(), (a.device_budget(), b.device_budget()));
    for how in [Share::ByBenefit, Share::Proportional] {
        let error = set_joint_budget(&mut [&mut a, &mut b], least - 1, how).unwrap_err();
        assert_eq!(error.code(), "run/weight-budget");
        assert_eq!((a.device_budget(), b.device_budget()), held);
    }
}

/// Engines without weights: bound ones are compared once and then read piece by piece.
#[test]
fn bound_weights_stream() {
    let folder = &folders()[2];
    let stored = engine(folder, &options(DType::BF16, "cpu"));
    let mut resident = session(&stored, Allocation::Static, RINGS[0], WeightBudget::Resident);
    let expected = three_steps(&mut resident);
    let mut stripped = options(DType::BF16, "cpu");
    stripped.weights = WeightMode::Stripped;
    let stripped = engine(folder, &stripped);
    let bound = |folder: &str| SessionOptions {
        ring: RINGS[0],
        budget: WeightBudget::Fraction(0.2),
        weights: Some(root(folder)),
        ..SessionOptions::default()
    };
    let mut session = stripped.session(bound(folder)).unwrap();
    assert_exact(&session);
    assert!(three_steps(&mut session) == expected);
    session.set_weight_budget(WeightBudget::Resident).unwrap();
    assert!(three_steps(&mut session) == expected);
    session.set_weight_budget(WeightBudget::Fraction(0.0)).unwrap();
    assert!(three_steps(&mut session) == expected);
    // Another model's weights are refused under a budget as well.
    let error = stripped.session(bound(&folders()[0])).err().unwrap();
    assert!(
        ["engine/weight-hash", "weights/no-tensor", "weights/mis-shaped"].contains(&error.code()),
        "{error}"
    );
}

/// Engines in memory have no file to read ahead from.
#[test]
fn engines_in_memory_stream() {
    let file = tempfile::NamedTempFile::new().unwrap();
    write(&root(&folders()[3]), &options(DType::F32, "cpu"), file.path());
    let bytes = std::fs::read(file.path()).unwrap();
    let engine = Engine::from_bytes(bytes, millrace::ir::engine::Verify::Full).unwrap();
    let mut session = session(&engine, Allocation::Static, RINGS[1], WeightBudget::Resident);
    let expected = three_steps(&mut session);
    session.set_weight_budget(WeightBudget::Fraction(0.0)).unwrap();
    assert!(three_steps(&mut session) == expected);
}

/// A file that is cut off amid a generation fails steps, each with a typed error; when it is whole again the session
/// goes on, and so it does under another budget.
#[test]
fn a_truncated_file_fails_the_step_only() {
    let file = tempfile::NamedTempFile::new().unwrap();
    write(&root(BAKER), &options(DType::F32, "cpu"), file.path());
    let engine = Engine::open(file.path()).unwrap();
    let mut session = session(&engine, Allocation::Static, RINGS[0], WeightBudget::Fraction(0.1));
    let expected = three_steps(&mut session);
    let (start, len) = engine.file().weights_range().unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    let open = std::fs::OpenOptions::new().write(true).open(file.path()).unwrap();
    for keep in [0, len / 3, len * 9 / 10] {
        open.set_len(start + keep).unwrap();
        session.reset_states();
        for _ in 0..3 {
            let mut model = Decoder::new(&mut session).unwrap();
            let inputs = step_of(&model, &tokens(20), 0);
            let error = model.step(&inputs, &mut Vec::new()).unwrap_err();
            assert_eq!(error.code(), "engine/truncated");
        }
        // Weights that cannot be read cannot move either: the change fails, and steps say so.
        let error = session.set_weight_budget(WeightBudget::Fraction(0.6)).unwrap_err();
        assert_eq!(error.code(), "engine/truncated");
        open.write_all_at(&bytes, 0).unwrap();
        session.set_weight_budget(WeightBudget::Fraction(0.1)).unwrap();
        assert!(three_steps(&mut session) == expected);
    }
}

/// A step that a kernel refuses leaves copies under way; the next one is right all the same.
#[test]
fn a_refused_step_does_no_harm() {
    let engine = engine(BAKER, &options(DType::F32, "cpu"));
    let mut session = session(&engine, Allocation::Static, RINGS[0], WeightBudget::Fraction(0.1));
    let expected = three_steps(&mut session);
    let names: Vec<String> = engine.module().input_types().iter().map(|(name, _)| name.to_string()).collect();
    // In the first node, and in one near the end.
    for bad in ["token_ids", "logit_rows"] {
        let inputs = step_of(&Decoder::new(&mut session).unwrap(), &[4, 3, 5], 0);
        let values = names.iter().map(|name| match name.as_str() {
            name if name == bad => vec![1 << 20; if bad == "token_ids" { 3 } else { 1 }],
            "token_ids" => inputs.token_ids.clone(),
            "positions" => inputs.positions.clone(),
            "seq_starts" => inputs.seq_starts.clone(),
            "kv_lens" => inputs.kv_lens.clone(),
            "block_table" => inputs.block_table.clone(),
            _ => inputs.logit_rows.clone(),
        });
        let bytes: Vec<Vec<u8>> = values.map(|v| v.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        let shape = |(name, bytes): (&String, &Vec<u8>)| match name.as_str() {
            "block_table" => vec![1, bytes.len() as u64 / 4],
            _ => vec![bytes.len() as u64 / 4],
        };
        let shapes: Vec<Vec<u64>> = names.iter().zip(&bytes).map(shape).collect();
        let tensor = |(bytes, shape)| TensorRef { dtype: DType::I32, shape, bytes };
        let tensors: Vec<TensorRef<'_>> =
            bytes.iter().map(Vec::as_slice).zip(shapes.iter().map(Vec::as_slice)).map(tensor).collect();
        assert_eq!(session.run(&tensors).unwrap_err().code(), "run/bad-index", "{bad}");
        assert!(three_steps(&mut session) == expected, "{bad}");
    }
}

#[test]
fn profiles_tell_what_streamed() {
    let engine = engine(BAKER, &options(DType::F32, "cpu"));
    let mut session = session(&engine, Allocation::Static, RINGS[0], WeightBudget::Fraction(0.0));
    session.attach_profile(Profile::new());
    three_steps(&mut session);
    let profile = session.detach_profile().unwrap();
    let (demand, placement) = session.placement();
    let rows = demand.items.iter().find(|i| i.cut == Some(Cut::Rows)).unwrap();
    let row = rows.bytes / 4096;
    for (step, tokens) in profile.steps.iter().zip([20, 1, 1]) {
        let streamed: u64 = step.spans.iter().map(|s| s.streamed).sum();
        let table = streamed - placement.moved();
        assert!(table <= tokens * row && table >= row && table.is_multiple_of(row), "{table} bytes of rows");
        assert!(step.spans.iter().all(|s| s.stall <= s.duration));
    }
}

/// Sentences through an encoder, where its weights are there.
#[test]
fn encoders_stream() {
    let folder = "target/models/minilm";
    if !root(folder).join("model.safetensors").exists() {
        return;
    }
    let mut options = options(DType::BF16, "cpu");
    options.import.max_num_tokens = None;
    let engine = engine(folder, &options);
    let tokenizer = engine.tokenizer().unwrap();
    let ring = Ring { slots: 2, slot_bytes: 256 << 10, small: 1 << 10, align: 256 };
    let mut session = session(&engine, Allocation::Dynamic, ring, WeightBudget::Resident);
    let embed = |session: &mut Session<'_>| {
        let mut model = millrace::Encoder::new(session).unwrap();
        let texts = ["a mill by the river", "weights come and go", "weights come and go"];
        millrace::generation::embed_texts(&mut model, &tokenizer, &texts).unwrap()
    };
    let expected = embed(&mut session);
    for budget in budgets(&session, &ring) {
        session.set_weight_budget(budget).unwrap();
        assert_exact(&session);
        assert_eq!(embed(&mut session), expected, "{budget}");
    }
}

/// Inputs of a step: element type, shape, bytes.
type Inputs = Vec<(DType, Vec<u64>, Vec<u8>)>;

/// Outputs of two steps of a random graph.
fn graph_steps(session: &mut Session<'_>, steps: &[Inputs]) -> Vec<Vec<u8>> {
    session.reset_states();
    let mut outputs = Vec::new();
    for step in steps {
        let inputs: Vec<TensorRef<'_>> =
            step.iter().map(|(dtype, shape, bytes)| TensorRef { dtype: *dtype, shape, bytes }).collect();
        session.run(&inputs).unwrap();
        let count = session.engine().module().graph.outputs.len();
        outputs.extend((0..count).map(|n| session.output(n).unwrap().bytes.to_vec()));
    }
    outputs
}

/// Random graphs with random budgets, rings, threads and allocations.
#[test]
fn random_graphs_stream() {
    static STREAMED: AtomicU64 = AtomicU64::new(0);
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let count = std::env::var("MILLRACE_RANDOM_GRAPHS").map_or(800, |n| n.parse().unwrap());
    for seed in 0..count {
        let drawn = graph(seed, 4 + seed as usize % 20);
        let mut random = Random::new(seed ^ 0x7374_7265);
        let source = folder.path().join("graph.ir");
        std::fs::write(&source, text::print(&drawn.module)).unwrap();
        let level = random.below(4);
        let options = CompileOptions {
            pipeline: millrace::compiler::pipeline::Pipeline::level(level),
            weight_streaming: true,
            ..CompileOptions::default()
        };
        let file = folder.path().join("graph.engine");
        write(&source, &options, &file);
        let engine = Engine::open(&file).unwrap();
        let first = drawn.bindings(&mut random);
        let mut second = drawn.bindings(&mut random);
        let pages = first.iter().find(|(s, _)| s.name() == "pages");
        pages.into_iter().for_each(|(sym, value)| second.set(sym, value));
        let steps: Vec<Inputs> = [first, second]
            .iter()
            .map(|bindings| {
                let inputs = drawn.inputs(bindings, &mut random);
                let tensor = |t: &millrace::ir::tensor::Tensor| {
                    (t.dtype, t.shape.iter().map(|d| *d as u64).collect(), t.to_bytes())
                };
                inputs.iter().map(tensor).collect()
            })
            .collect();
        for _ in 0..4 {
            let ring = Ring {
                slots: random.below(5),
                slot_bytes: random.below(2000) as u64,
                small: random.below(3) as u64 * 40,
                align: 1 << random.below(10),
            };
            let options = SessionOptions {
                ring,
                threads: Some(1 + random.below(3)),
                allocation: random.pick(&[Allocation::Static, Allocation::Dynamic]),
                kv_pages: pages.map(|(_, pages)| pages),
                ..SessionOptions::default()
            };
            let mut session = engine.session(options).unwrap();
            let expected = graph_steps(&mut session, &steps);
            let (demand, placement) = session.placement();
            if demand.items.iter().all(|i| i.cut.is_none()) {
                continue;
            }
            let (least, all) = (session.minimum_budget(), placement.resident_bytes);
            for _ in 0..3 {
                let budget = least + random.below((all - least) as usize + 1) as u64;
                session.set_weight_budget(WeightBudget::Bytes(budget)).unwrap();
                assert_exact(&session);
                STREAMED.fetch_add(session.placement().1.copies.len() as u64, Ordering::Relaxed);
                assert!(
                    graph_steps(&mut session, &steps) == expected,
                    "seed {seed}, {budget} bytes, {ring:?}"
                );
            }
        }
    }
    assert!(count < 800 || STREAMED.load(Ordering::Relaxed) > 100, "{STREAMED:?} copies");
}
