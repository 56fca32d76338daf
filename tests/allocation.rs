//! Allocations, shape profiles and memory that sessions share: bytes are those of the formulas, results are the same.

#[path = "common/models.rs"]
mod common;

use std::process::Command;

use common::{engine, prefill, root};
use millrace::ir::{Bindings, DType, ShapeProfile, Sym};
use millrace::{
    Allocation, AllocationGuard, Arena, Class, Decoder, Device, Engine, Lent, ProfileChoice, Session,
    SessionOptions,
};
use proptest::prelude::*;

const QWEN: &str = "tests/data/tiny-random/qwen3";
const MISTRAL: &str = "tests/data/tiny-random/mistral-sliding";

/// Two profiles that overlap: many sequences of few tokens, and one sequence of many.
const PROFILES: [&str; 2] = ["decode:t=1..8/4,b=1..8,r=1..8", "prefill:t=1..64/32,b=1..2,r=1..2"];

fn with_profiles(folder: &str, profiles: &[&str]) -> Engine {
    engine(folder, DType::F32, |o| {
        o.profiles = profiles.iter().map(|p| ShapeProfile::parse(p).unwrap()).collect()
    })
}

fn bindings(values: &[(&str, u64)]) -> Bindings {
    let mut bindings = Bindings::new();
    values.iter().for_each(|(name, value)| bindings.set(Sym::new(name).unwrap(), *value));
    bindings
}

/// Bytes of the arenas, from the text of the plan alone.
fn arena_bytes(engine: &Engine, values: &[(&str, u64)]) -> u64 {
    let module = engine.module();
    let mut all = Bindings::maxima(&module.dims);
    bindings(values).iter().for_each(|(sym, value)| all.set(sym, value));
    module.arenas.iter().map(|(_, arena)| arena.size.extent(&all).unwrap()).sum()
}

/// Bytes of all inputs and outputs.
fn io_bytes(engine: &Engine, values: &[(&str, u64)]) -> u64 {
    let module = engine.module();
    let mut all = Bindings::maxima(&module.dims);
    bindings(values).iter().for_each(|(sym, value)| all.set(sym, value));
    let types = module.input_types().into_iter().chain(module.output_types());
    types.map(|(_, ty)| ty.bytes().extent(&all).unwrap()).sum()
}

fn open(engine: &Engine, allocation: Allocation) -> Session<'_> {
    engine.session(SessionOptions { allocation, threads: Some(1), ..SessionOptions::default() }).unwrap()
}

fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| i * 7 % 50 + 3).collect()
}

/// Logits of the last of `n` tokens, in lent memory where the session needs it.
fn logits(session: &mut Session<'_>, n: u32) -> Vec<f32> {
    let rows = [n as i32 - 1];
    match session.current_allocation() {
        Allocation::UserManaged => {
            let mut arena = Arena::host(session.most_lent_bytes().unwrap()).unwrap();
            prefill(&mut Decoder::new_in(session, arena.lend()).unwrap(), &tokens(n), &rows).remove(0)
        }
        _ => prefill(&mut Decoder::new(session).unwrap(), &tokens(n), &rows).remove(0),
    }
}

#[test]
fn bytes_are_those_of_the_formulas_for_each_profile() {
    let engine = with_profiles(QWEN, &PROFILES);
    let decode = arena_bytes(&engine, &[("t", 8), ("b", 8), ("r", 8)]);
    let prefill = arena_bytes(&engine, &[("t", 64), ("b", 2), ("r", 2)]);
    assert_eq!(
        engine.manifest().model.as_ref().unwrap().max_num_tokens,
        64,
        "limits follow the union of profiles"
    );
    assert!(decode < prefill && prefill <= arena_bytes(&engine, &[]));

    let fixed = open(&engine, Allocation::Static);
    assert_eq!(fixed.profiles().collect::<Vec<_>>(), ["decode", "prefill"]);
    assert_eq!(fixed.profile_bytes().unwrap(), [decode, prefill]);
    assert_eq!(fixed.ledger().now(Class::Activations), decode.max(prefill));

    let mut session = open(&engine, Allocation::OnProfileChange);
    assert_eq!(session.ledger().now(Class::Activations), 0, "no profile yet");
    for (n, expected) in [(3, decode), (8, decode), (9, prefill), (64, prefill), (1, decode)] {
        logits(&mut session, n);
        assert_eq!(session.ledger().now(Class::Activations), expected, "{n} tokens");
    }
    assert_eq!(session.ledger().now(Class::Io), io_bytes(&engine, &[("t", 8), ("b", 8), ("r", 8)]));
    session.select_profile("prefill").unwrap();
    assert_eq!(session.ledger().now(Class::Activations), prefill);
    logits(&mut session, 2);
    assert_eq!(session.ledger().now(Class::Activations), prefill, "selected, whatever the shape");
    session.select_profile(0).unwrap();
    assert_eq!((session.selected_profile(), session.ledger().now(Class::Activations)), (Some(0), decode));
    session.select_profile(ProfileChoice::Automatic).unwrap();
    assert_eq!(session.select_profile("other").unwrap_err().code(), "run/no-such-profile");
    assert_eq!(session.select_profile(2).unwrap_err().code(), "run/no-such-profile");

    let selected = SessionOptions {
        allocation: Allocation::OnProfileChange,
        profile: "decode".into(),
        ..SessionOptions::default()
    };
    assert_eq!(engine.session(selected).unwrap().ledger().now(Class::Activations), decode);
}

/// What a step takes is known before it, and is what a dynamic session takes.
#[test]
fn shapes_tell_their_bytes() {
    let engine = with_profiles(QWEN, &PROFILES);
    for n in [1, 5, 8, 17, 64u64] {
        let mut session = open(&engine, Allocation::Dynamic);
        let shape = [("t", n), ("b", 1), ("r", 1), ("p", n.div_ceil(32))];
        let told = session.shapes_bytes(&bindings(&shape)).unwrap();
        assert_eq!(
            told,
            [(Class::Activations, arena_bytes(&engine, &shape)), (Class::Io, io_bytes(&engine, &shape))]
        );
        logits(&mut session, n as u32);
        let peaks: Vec<_> = told.iter().map(|(class, _)| (*class, session.ledger().peak(*class))).collect();
        assert_eq!(peaks, told);
    }
    let session = open(&engine, Allocation::Dynamic);
    assert_eq!(session.shapes_bytes(&Bindings::new()).unwrap_err().code(), "run/no-size");
}

#[test]
fn shapes_beyond_all_profiles_are_refused_under_every_allocation() {
    let engine = with_profiles(QWEN, &PROFILES);
    for allocation in Allocation::ALL {
        let mut session = open(&engine, allocation);
        let step = |session: &mut Session<'_>, b: u64, t: u64| {
            let ids: Vec<u8> = vec![0; 4 * t as usize];
            let starts: Vec<u8> = (0..=b).flat_map(|s| ((s * t / b) as i32).to_le_bytes()).collect();
            let lens: Vec<u8> =
                (0..b).flat_map(|s| (((s + 1) * t / b - s * t / b) as i32).to_le_bytes()).collect();
            let positions: Vec<u8> = (0..b)
                .flat_map(|s| (0..(s + 1) * t / b - s * t / b).flat_map(|i| (i as i32).to_le_bytes()))
                .collect();
            let table: Vec<u8> = (0..b).flat_map(|s| (s as i32).to_le_bytes()).collect();
            let rows = [0u8; 4];
            let tensor =
                |shape: &'static [u64], bytes| millrace::TensorRef { dtype: DType::I32, shape, bytes };
            let leak = |v: Vec<u64>| -> &'static [u64] { v.leak() };
            let inputs = [
                tensor(leak(vec![t]), &ids[..]),
                tensor(leak(vec![t]), &positions),
                tensor(leak(vec![b + 1]), &starts),
                tensor(leak(vec![b]), &lens),
                tensor(leak(vec![b, 1]), &table),
                tensor(leak(vec![1]), &rows),
            ];
            match session.current_allocation() {
                Allocation::UserManaged => {
                    session.run_in(&mut Arena::host(1 << 24).unwrap().lend(), &inputs).map_err(|e| e.code())
                }
                _ => session.run(&inputs).map_err(|e| e.code()),
            }
        };
        assert_eq!(step(&mut session, 8, 8), Ok(()), "{allocation:?}");
        assert_eq!(step(&mut session, 2, 64), Ok(()), "{allocation:?}");
        assert_eq!(step(&mut session, 3, 9), Err("run/no-profile"), "{allocation:?}");
        assert_eq!(step(&mut session, 1, 65), Err("run/out-of-range"), "{allocation:?}");
        session.select_profile("decode").unwrap();
        assert_eq!(step(&mut session, 2, 64), Err("run/no-profile"), "{allocation:?}");
        assert_eq!(step(&mut session, 8, 8), Ok(()), "{allocation:?}");
    }
}

/// Applies `path` of guards one within the other; on the way back each allocation holds what it held on the way there.
fn nest(session: &mut Session<'_>, path: &[Allocation], expected: &[f32]) {
    let held = |s: &Session<'_>| (s.current_allocation(), standing(s));
    assert_eq!(logits(session, 6), expected, "{:?}", session.current_allocation());
    let before = held(session);
    if let [first, rest @ ..] = path {
        let mut guard: AllocationGuard<'_, '_> = session.allocation(*first).unwrap();
        assert_eq!(guard.current_allocation(), *first);
        nest(&mut guard, rest, expected);
    }
    assert_eq!(logits(session, 6), expected, "{:?}", session.current_allocation());
    assert_eq!(held(session), before);
}

/// Activations held between steps.
fn standing(session: &Session<'_>) -> u64 {
    session.ledger().now(Class::Activations)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn guards_restore_in_any_nesting(
        start in 0usize..4,
        path in proptest::collection::vec(0usize..4, 0..7),
    ) {
        let engine = with_profiles(QWEN, &PROFILES);
        let expected = logits(&mut open(&engine, Allocation::Static), 6);
        let mut session = open(&engine, Allocation::ALL[start]);
        let path: Vec<Allocation> = path.into_iter().map(|i| Allocation::ALL[i]).collect();
        nest(&mut session, &path, &expected);
    }
}

#[test]
fn lent_memory_that_is_too_small_tells_what_is_needed() {
    let engine = with_profiles(QWEN, &PROFILES);
    let mut session = open(&engine, Allocation::UserManaged);
    assert_eq!(session.ledger().now(Class::Activations), 0);
    assert_eq!(
        session.ledger().now(Class::Io),
        {
            // Each input and output at its largest: tokens of one profile, sequences of the other.
            let tokens = io_bytes(&engine, &[("t", 64), ("b", 8), ("r", 8)]);
            assert!(tokens > io_bytes(&engine, &[("t", 64), ("b", 2), ("r", 2)]));
            tokens
        },
        "inputs and outputs are the session's"
    );
    let expected = logits(&mut open(&engine, Allocation::Static), 12);
    let shape = bindings(&[("t", 12), ("b", 1), ("r", 1), ("p", 1)]);
    let needed = session.lent_bytes(&shape).unwrap();
    assert!(needed < session.most_lent_bytes().unwrap());
    // Bytes of the caller, on no alignment.
    let mut block = vec![0x5au8; needed as usize + 2 * 64];
    let skew = (1..64).find(|n| block[*n..].as_ptr().align_offset(64) == 63).unwrap();
    let run = |session: &mut Session<'_>, memory: &mut [u8]| {
        let mut decoder = Decoder::new_in(session, Lent::from(memory)).unwrap();
        let mut logits = Vec::new();
        let inputs = millrace::generation::StepInputs {
            token_ids: tokens(12).iter().map(|t| *t as i32).collect(),
            positions: (0..12).collect(),
            seq_starts: vec![0, 12],
            kv_lens: vec![12],
            block_table: vec![0],
            pages_per_seq: 1,
            logit_rows: vec![11],
        };
        millrace::generation::StepModel::step(&mut decoder, &inputs, &mut logits).map(|()| logits)
    };
    assert_eq!(run(&mut session, &mut block[skew..skew + 63 + needed as usize]).unwrap(), expected);
    assert_eq!(session.ledger().now(Class::Activations), 0, "given back");
    assert_eq!(
        session.ledger().peak(Class::Activations),
        arena_bytes(&engine, &[("t", 12), ("b", 1), ("r", 1), ("p", 1)])
    );
    let error = run(&mut session, &mut block[skew..skew + 62 + needed as usize]).unwrap_err();
    assert_eq!(error.code(), "run/lent-too-small");
    assert!(error.message().starts_with(&format!("{needed} bytes are needed")), "{error}");
    assert_eq!(
        run(&mut session, &mut block[skew..skew + 63 + needed as usize]).unwrap(),
        expected,
        "still usable"
    );

    // Memory where none is wanted, and none where it is.
    let mut model = Decoder::new(&mut session).unwrap();
    let step = millrace::generation::StepInputs {
        token_ids: vec![1],
        positions: vec![0],
        seq_starts: vec![0, 1],
        kv_lens: vec![1],
        block_table: vec![0],
        pages_per_seq: 1,
        logit_rows: vec![0],
    };
    let error = millrace::generation::StepModel::step(&mut model, &step, &mut Vec::new()).unwrap_err();
    assert_eq!(error.code(), "run/nothing-lent");
    let mut fixed = open(&engine, Allocation::Static);
    assert_eq!(run(&mut fixed, &mut block).unwrap_err().code(), "run/not-user-managed");
}

/// Two engines in one arena, step by step in turns, give what each gives with memory of its own.
#[test]
fn sessions_that_share_an_arena_give_the_same_results() {
    let engines = [with_profiles(QWEN, &PROFILES), with_profiles(MISTRAL, &[])];
    let mut own: Vec<Session<'_>> = engines.iter().map(|e| open(e, Allocation::Static)).collect();
    let mut shared: Vec<Session<'_>> = engines.iter().map(|e| open(e, Allocation::UserManaged)).collect();
    let bytes = shared.iter().map(|s| s.most_lent_bytes().unwrap()).max().unwrap();
    let mut arena = Arena::on(Device::Cpu, bytes).unwrap();
    assert_eq!(arena.len(), bytes);
    let in_turn = |session: &mut Session<'_>, arena: &mut Arena, n: u32| {
        prefill(&mut Decoder::new_in(session, arena.lend()).unwrap(), &tokens(n), &[n as i32 - 1]).remove(0)
    };
    for n in [40, 1, 7, 64, 3] {
        for (own, shared) in own.iter_mut().zip(&mut shared) {
            assert_eq!(in_turn(shared, &mut arena, n), logits(own, n), "{n} tokens");
        }
    }
    assert!(shared.iter().all(|s| s.ledger().now(Class::Activations) == 0));
}

/// A cap that takes one profile and not the other: the step that does not fit fails, the session goes on.
#[test]
fn a_cap_holds_for_every_profile() {
    let engine = with_profiles(QWEN, &PROFILES);
    let roomy = open(&engine, Allocation::OnProfileChange);
    let total = |profile: usize| -> u64 {
        let maxima = roomy.profile_maxima(profile).unwrap();
        roomy.required(maxima).unwrap().iter().map(|(_, bytes)| bytes).sum()
    };
    let (small, large) = (total(0).min(total(1)), total(0).max(total(1)));
    let options =
        |allocation| SessionOptions { allocation, cap: Some(large - 1), ..SessionOptions::default() };
    assert_eq!(engine.session(options(Allocation::Static)).err().unwrap().code(), "run/cap");
    let mut session = engine.session(options(Allocation::OnProfileChange)).unwrap();
    let first = logits(&mut session, 4);
    assert!(session.ledger().total() <= small);
    assert_eq!(session.select_profile("prefill").unwrap_err().code(), "run/cap");
    assert_eq!(session.selected_profile(), None);
    assert_eq!(session.allocation(Allocation::Static).err().unwrap().code(), "run/cap");
    assert_eq!(logits(&mut session, 4), first);
}

/// On a CPU the resident set of the process grows by no more than the ledger counts, roughly: mapped and zeroed pages come with use.
#[test]
fn the_ledger_covers_what_the_process_grows_by() {
    let engine = with_profiles("examples/models/baker-street-6m", &[]);
    let mut session = open(&engine, Allocation::Static);
    logits(&mut session, 64);
    let found = session.reconcile().unwrap();
    assert_eq!(found.counted, session.ledger().total());
    assert!(found.counted > 24 << 20, "{found:?}");
    // Tests beside this one allocate too.
    assert!(found.reported <= found.counted + (256 << 20), "{found:?}");
}

#[test]
fn the_command_line_takes_and_reports_profiles() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.engine");
    let millrace = |args: &[&str]| {
        let done = Command::new(env!("CARGO_BIN_EXE_millrace")).args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (done.status.success(), text(done.stdout), text(done.stderr))
    };
    let (model, path) = (root(QWEN).display().to_string(), file.display().to_string());
    let (ok, out, err) = millrace(&[
        "compile",
        &model,
        "-o",
        &path,
        "--dtype",
        "f32",
        "--profile",
        PROFILES[0],
        "--profile",
        PROFILES[1],
    ]);
    assert!(ok, "{err}");
    assert!(out.contains("profile decode:t=1..8/4"), "{out}");
    let (_, out, _) = millrace(&["inspect", &path, "--json"]);
    let report: serde_json::Value = serde_json::from_str(&out).unwrap();
    let engine = Engine::open(&file).unwrap();
    let activations = &report["memory"]["activations"];
    let prefill = arena_bytes(&engine, &[("t", 64), ("b", 2), ("r", 2)]);
    assert_eq!(activations["static_bytes"], prefill);
    assert_eq!(activations["profiles"][1]["name"], "prefill");
    assert_eq!(activations["profiles"][1]["bytes"], prefill);
    let run = ["run", &path, "--token-ids", "5,6,7", "--max-new-tokens", "3", "--json"];
    let plain = millrace(&run);
    assert!(plain.0, "{}", plain.2);
    let tokens = |out: &str| serde_json::from_str::<serde_json::Value>(out).unwrap()[0]["token_ids"].clone();
    let changing =
        millrace(&[&run[..], &["--memory", "on-profile-change", "--shape-profile", "decode"]].concat());
    assert_eq!(tokens(&plain.1), tokens(&changing.1), "{}", changing.2);
    let (ok, _, err) = millrace(&[&run[..], &["--shape-profile", "nothing"]].concat());
    assert!(!ok && err.contains("it has decode, prefill"), "{err}");
    let (ok, _, err) = millrace(&["compile", &model, "--dry-run", "--profile", "a:t=9..1"]);
    assert!(!ok && err.contains("compile/bad-profile"), "{err}");
}
