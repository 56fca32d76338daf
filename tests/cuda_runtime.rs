//! The runtime on a GPU: memory, launches, graphs, profiles and failures, with an engine whose kernels are written here.
//!
//! Without a GPU the tests say so and pass; with `MILLRACE_REQUIRE_GPU` set they fail instead.
#![allow(clippy::print_stderr)]

#[path = "common/device_engine.rs"]
mod device_engine;

use std::process::Command;

use millrace_ir::engine::{EngineWriter, SectionKind, Verify, WeightMeta, WriterOptions};
use millrace_ir::launch::{Arg, Bundle, LaunchTable};
use millrace_ir::{
    Builder, DType, Dim, Id, Kernel, Kind, Phase, Place, TensorType, ValueId, WeightExpr, text,
};
use millrace_runtime::cuda::{DeviceInfo, RawStream};
use millrace_runtime::{Allocation, Arena, Class, Device, Engine, Profile, SessionOptions};

use device_engine::*;

#[test]
fn static_sessions_allocate_once_and_replay_graphs() {
    let Some(device) = gpu("static sessions") else { return };
    let engine = plain_engine(&device);
    let mut session = engine.session(SessionOptions::default()).unwrap();
    assert_eq!(session.device(), Device::Cuda(0));
    let allocations = session.allocations();
    assert!(allocations > 0);
    for call in 0..12 {
        step(&mut session, [64, 1, 33][call % 3], call, call >= 6);
    }
    assert_eq!(session.allocations(), allocations, "steps allocate nothing");
    let report = session.graph_report().unwrap();
    assert_eq!(report.failure, None);
    // Each of the three shapes, with and without argmax: the first time plain, the second time recorded.
    assert_eq!((report.recorded, report.held, report.replayed, report.plain), (6, 6, 6, 6));
    assert_eq!(report.last_launches, 5);
    let ledger = session.ledger();
    assert_eq!(ledger.now(Class::Activations), 2 * ROWS * 64);
    assert_eq!(ledger.now(Class::Io), 2 * ROWS * 64);
    assert_eq!(ledger.now(Class::Weights), 2 * 1024);
    // Scratch memory and counters of the graph; indices, counters and scratch of the argmax.
    let argmax = 2 * ROWS * 4 + ((ROWS + 2 * u64::from(device.multiprocessors)) * 8).next_multiple_of(256);
    assert_eq!(ledger.now(Class::Workspace), ROWS * 64 + 256 + 64 + argmax);
    assert!(ledger.now(Class::Staging) > 0);
}

#[test]
fn steps_begin_before_their_argmax_is_taken() {
    let Some(device) = gpu("steps ahead") else { return };
    let engine = plain_engine(&device);
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let code = |e: millrace_ir::Error| e.code();
    for call in 0..4 {
        let (shape, data) = ([20, WIDTH as u64], bytes(&input(20, call)));
        assert!(session.start_argmax(&[tensor(&shape, &data)], 0, None).unwrap());
        // The input has more than an index a row.
        let fed = session.start_argmax(&[tensor(&shape, &data)], 0, Some(0));
        assert_eq!(fed.map_err(code), Err("run/bad-order"));
        let told = session.take_argmax().unwrap();
        assert_eq!(told, session.argmax(0).unwrap());
        assert_eq!(session.take_argmax().map_err(code), Err("run/bad-order"));
        step(&mut session, 20, call, true);
    }
    let shape = [1, WIDTH as u64];
    let data = bytes(&input(1, 0));
    let alone = session.start_argmax(&[tensor(&shape, &data)], 0, Some(0));
    assert_eq!(alone.map_err(code), Err("run/bad-order"), "nothing to feed from");
    assert_eq!(session.graph_report().unwrap().failure, None);
    let mut waiting = engine.session(SessionOptions { ahead: false, ..SessionOptions::default() }).unwrap();
    assert!(!waiting.runs_ahead() && !waiting.start_argmax(&[tensor(&shape, &data)], 0, None).unwrap());
}

#[test]
fn dynamic_sessions_take_what_a_step_needs() {
    let Some(device) = gpu("dynamic sessions") else { return };
    let engine = plain_engine(&device);
    let options = SessionOptions { allocation: Allocation::Dynamic, ..SessionOptions::default() };
    let mut session = engine.session(options).unwrap();
    for (call, rows) in [1, 40, 7, 7, 64].into_iter().enumerate() {
        step(&mut session, rows, call, call % 2 == 0);
        assert_eq!(session.ledger().now(Class::Activations), 0, "given back");
        assert_eq!(session.ledger().now(Class::Io), 2 * rows as u64 * 64);
    }
    assert_eq!(session.ledger().peak(Class::Activations), 2 * ROWS * 64, "the plan at the largest step");
    let pool = session.pool_report().unwrap().unwrap();
    assert!(pool.reserved >= pool.used && pool.used >= 2 * ROWS * 64, "{pool:?}");
    let full = session.allocations();
    {
        let mut fixed = session.allocation(Allocation::Static).unwrap();
        (0..3).for_each(|call| step(&mut fixed, 9, call, true));
        assert_eq!(fixed.graph_report().unwrap().replayed, 2);
    }
    assert!(session.allocations() > full);
    step(&mut session, 9, 3, true);
    session.trim_pool().unwrap();
    assert!(session.pool_report().unwrap().unwrap().reserved <= pool.reserved);
}

/// The ledger against what the driver reports, in a process of its own: sums agree within 3 %, and are never below.
#[test]
fn the_ledger_is_what_the_driver_reports() {
    let Some(device) = gpu("reconciling") else { return };
    if std::env::var_os("MILLRACE_TEST_LEDGER").is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_ledger_is_what_the_driver_reports", "--nocapture"])
            .env("MILLRACE_TEST_LEDGER", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stdout));
        eprintln!("{text}");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.engine");
    large_engine(&device, &path, 1, false);
    let engine = Engine::open_with(&path, Verify::Metadata).unwrap();
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let found = session.reconcile().unwrap();
    eprintln!("{found:?} {:+.4}, {}", found.relative(), session.ledger());
    assert!(found.reported > 1 << 30 && (0.0..=0.03).contains(&found.relative()), "{found:?}");
    drop(session);
    let engine = plain_engine(&device);
    let mut session = engine.session(SessionOptions::default()).unwrap();
    for allocation in Allocation::ALL.into_iter().filter(|a| *a != Allocation::UserManaged) {
        let mut session = session.allocation(allocation).unwrap();
        (0..6).for_each(|call| step(&mut session, 40, call, call % 2 == 0));
        let found = session.reconcile().unwrap();
        eprintln!("{allocation:?}: {found:?} {:+.4}, {}", found.relative(), session.ledger());
        assert!(found.relative().abs() <= 0.03, "{found:?}");
        assert!(allocation != Allocation::Static || found.difference() >= 0, "{found:?}");
        assert!(session.ledger().on_device() >= found.reported, "what came late is counted from here on");
    }
}

/// Every allocation in turn, in both directions: the same results, graphs wherever memory stays.
#[test]
fn allocations_change_in_every_direction() {
    let Some(device) = gpu("allocations") else { return };
    let engine = plain_engine(&device);
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let mut arena = Arena::on(session.device(), session.most_lent_bytes().unwrap()).unwrap();
    for call in 0..16 {
        let allocation = Allocation::ALL[[0, 1, 2, 3, 2, 1, 0, 3, 1, 3, 0, 2, 0, 1, 3, 2][call]];
        let mut session = session.allocation(allocation).unwrap();
        assert_eq!(session.current_allocation(), allocation);
        for repeat in 0..3 {
            let replayed = session.graph_report().unwrap().replayed;
            let lent = (allocation == Allocation::UserManaged).then_some(&mut arena);
            step_in(&mut session, 9, call + repeat, lent);
            let expected = u64::from(repeat > 0 && allocation != Allocation::Dynamic);
            assert!(session.graph_report().unwrap().replayed >= replayed + expected, "{allocation:?}");
            let held = session.ledger().now(Class::Activations);
            let stays = matches!(allocation, Allocation::Static | Allocation::OnProfileChange);
            assert_eq!(held, if stays { 2 * ROWS * 64 } else { 0 }, "{allocation:?}");
        }
    }
}

/// Two sessions in one arena, each step on a stream of its own: turns are ordered on the device.
#[test]
fn sessions_take_turns_in_an_arena() {
    let Some(device) = gpu("shared arenas") else { return };
    let engine = plain_engine(&device);
    let options = || SessionOptions { allocation: Allocation::UserManaged, ..SessionOptions::default() };
    let mut sessions = [engine.session(options()).unwrap(), engine.session(options()).unwrap()];
    let needed = sessions[0].most_lent_bytes().unwrap();
    let mut arena = Arena::on(sessions[0].device(), needed).unwrap();
    for call in 0..64 {
        let data: Vec<Vec<u8>> = (0..2).map(|s| bytes(&input(64, call + s))).collect();
        // Both are enqueued before either is waited for.
        for (session, data) in sessions.iter_mut().zip(&data) {
            session.run_in(&mut arena.lend(), &[tensor(&[64, WIDTH as u64], data)]).unwrap();
        }
        for (at, session) in sessions.iter().enumerate() {
            check_output(session, &input(64, call + at));
        }
    }
    let mut small = Arena::on(sessions[0].device(), needed - 256).unwrap();
    let data = bytes(&input(64, 0));
    let error = sessions[0].run_in(&mut small.lend(), &[tensor(&[64, WIDTH as u64], &data)]).unwrap_err();
    assert_eq!(error.code(), "run/lent-too-small");
    let mut host = Arena::host(needed).unwrap();
    let error = sessions[0].run_in(&mut host.lend(), &[tensor(&[64, WIDTH as u64], &data)]).unwrap_err();
    assert_eq!(error.code(), "run/lent-elsewhere");
}

#[test]
fn without_graphs_and_on_the_callers_stream() {
    let Some(device) = gpu("plain launches") else { return };
    let engine = plain_engine(&device);
    let mut plain = engine.session(SessionOptions { graphs: false, ..SessionOptions::default() }).unwrap();
    // SAFETY: null is the default stream of the primary context, which always exists.
    let stream = Some(unsafe { RawStream::new(std::ptr::null_mut()) });
    let mut foreign = engine.session(SessionOptions { stream, ..SessionOptions::default() }).unwrap();
    for call in 0..3 {
        step(&mut plain, 20, call, true);
        step(&mut foreign, 20, call, true);
    }
    assert_eq!(plain.graph_report().unwrap().recorded, 0);
    assert_eq!(foreign.graph_report().unwrap().failure, None);
    assert_eq!(foreign.graph_report().unwrap().replayed, 2);
}

#[test]
fn sessions_of_several_threads_do_not_disturb_each_other() {
    let Some(device) = gpu("several threads") else { return };
    let engine = plain_engine(&device);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mut session = engine.session(SessionOptions::default()).unwrap();
            scope.spawn(move || (0..50).for_each(|call| step(&mut session, 5 + thread, call, call % 2 == 0)));
        }
    });
}

#[test]
fn profiles_tell_the_time_of_every_node() {
    let Some(device) = gpu("profiles") else { return };
    let engine = plain_engine(&device);
    let mut session = engine.session(SessionOptions::default()).unwrap();
    session.attach_profile(Profile::new());
    (0..3).for_each(|call| step(&mut session, 64, call, false));
    let profile = session.detach_profile().unwrap();
    assert_eq!(profile.steps.len(), 3);
    for step in &profile.steps {
        let nodes: Vec<usize> = step.spans.iter().map(|s| s.node.index()).collect();
        assert_eq!(nodes, [0, 1, 2, 3]);
        assert!(step.spans.iter().all(|s| !s.duration.is_zero()));
        assert!(step.spans.iter().map(|s| s.duration).sum::<std::time::Duration>() <= step.duration);
    }
}

#[test]
fn launches_are_replayed_by_themselves() {
    let Some(device) = gpu("replayed launches") else { return };
    let engine = plain_engine(&device);
    let order = &engine.module().graph.order;
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let mut groups: Vec<_> = order.iter().map(|node| vec![*node]).collect();
    groups.extend([order.clone(), Vec::new()]);
    assert_eq!(session.time_nodes(&groups).unwrap(), vec![None; groups.len()], "no step yet");
    (0..3).for_each(|call| step(&mut session, 64, call, true));
    let times = session.time_nodes(&groups).unwrap();
    let (whole, none) = (times[order.len()].unwrap(), times[order.len() + 1]);
    assert!(none.is_none() && !whole.is_zero());
    for time in &times[..order.len()] {
        assert!(time.is_some_and(|t| !t.is_zero() && t <= 2 * whole), "{times:?}");
    }
    // Steps go on.
    (0..3).for_each(|call| step(&mut session, 64, call, true));
    let options = SessionOptions { allocation: Allocation::Dynamic, ..SessionOptions::default() };
    let mut dynamic = engine.session(options).unwrap();
    step(&mut dynamic, 64, 0, false);
    assert_eq!(dynamic.time_nodes(&groups).unwrap(), vec![None; groups.len()], "its memory is gone");
}

#[test]
fn device_code_that_does_not_fit_is_an_error() {
    let Some(device) = gpu("device code") else { return };
    let open = |table: LaunchTable, image: Vec<u8>| {
        let engine = engine(table, image);
        let mut session = engine.session(SessionOptions::default()).map_err(|e| e.code())?;
        let data = bytes(&input(4, 0));
        session.run(&[tensor(&[4, WIDTH as u64], &data)]).map_err(|e| e.code())
    };
    let image = ptx(device.capability).into_bytes();
    assert_eq!(open(table(&device), image.clone()), Ok(()));
    assert_eq!(open(table(&device), b"no code".to_vec()), Err("cuda/image"));
    let mut missing = table(&device);
    missing.kernels[1].entry = "nothing".into();
    assert_eq!(open(missing, image.clone()), Err("cuda/entry"));
    let mut short = table(&device);
    short.steps[1].variants[0].launches[0].args.pop();
    assert_eq!(open(short, image.clone()), Err("cuda/arguments"));
    let mut wide = table(&device);
    wide.steps[1].variants[0].launches[0].args[3] = Arg::I32(Dim::from(1u64));
    assert_eq!(open(wide, image.clone()), Ok(()), "types of equal size cannot be told apart");
    let mut large = table(&device);
    large.steps[1].variants[0].launches[0].shared = 1 << 20;
    assert_eq!(open(large, image), Err("cuda/shared-memory"));
}

#[test]
fn a_fault_poisons_the_session() {
    let Some(device) = gpu("faults") else { return };
    // A fault ends the context of the whole process, so it happens in one of its own.
    if std::env::var_os("MILLRACE_TEST_FAULT").is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_fault_poisons_the_session"])
            .env("MILLRACE_TEST_FAULT", "1")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let mut table = table(&device);
    for launch in &mut table.steps[2].variants[0].launches {
        launch.kernel = 3;
    }
    let engine = engine(table, ptx(device.capability).into_bytes());
    let mut session = engine.session(SessionOptions::default()).unwrap();
    let data = bytes(&input(4, 0));
    let inputs = [tensor(&[4, WIDTH as u64], &data)];
    session.run(&inputs).unwrap();
    let first = session.synchronize().unwrap_err();
    assert_eq!((first.code(), first.kind()), ("cuda/poisoned", Kind::Device));
    assert!(first.message().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{first}");
    assert_eq!(first.kind().exit_code(), 6);
    // The original cause stays, whatever is asked for.
    assert_eq!(session.run(&inputs).unwrap_err(), first);
    assert_eq!(session.run_argmax(&inputs, 0).unwrap_err(), first);
    assert_eq!(session.argmax(0).unwrap_err(), first);
    assert_eq!(session.read_output(0).unwrap_err(), first);
    session.reset_states();
}

/// An engine file that looks up rows of a table of `gib` GiB, stored or computed.
fn large_engine(device: &DeviceInfo, path: &std::path::Path, gib: usize, stored: bool) {
    let rows_of_table = gib << 24;
    let mut builder = Builder::new("large");
    let t = builder.dim("t", 1, 8, None).unwrap();
    let ids = builder.input("ids", TensorType::new(DType::I32, [t]));
    let expr = match stored {
        true => WeightExpr::File { file: "model".into(), key: "w".into() },
        false => WeightExpr::Random { seed: 1, std: 1.0 },
    };
    let w = builder.weight("w", TensorType::new(DType::F32, [rows_of_table, WIDTH]), expr);
    let y = builder.one(millrace_ir::ops::Embedding, &[w, ids], "y").unwrap();
    builder.output("y", y).unwrap();
    let mut module = builder.finish();
    (module.phase, module.target) = (Phase::Lowered, Some("cuda".into()));
    let kernel = module.kernels.push(Kernel { name: "cuda.test".into(), dtypes: vec![DType::F32] });
    let id = module.graph.order[0];
    module.graph.nodes.get_mut(id).unwrap().kernel = Some(kernel);
    module.graph.values.get_mut(ValueId::from_index(1)).unwrap().place = Some(Place::Output(0));
    let mut table = table(device);
    table.steps.truncate(1);
    table.steps[0].variants[0].launches.clear();
    let mut writer = EngineWriter::create(path, &WriterOptions { producer: "test".into() }).unwrap();
    writer.section(SectionKind::Manifest, "", &manifest().to_json()).unwrap();
    writer.section(SectionKind::Ir, "", text::print(&module).as_bytes()).unwrap();
    let name = table.arch.clone();
    let bundle = Bundle { table, images: vec![ptx(device.capability).into_bytes()] };
    writer.section(SectionKind::Kernels, &name, &bundle.encode()).unwrap();
    if stored {
        let mut weights = writer.begin_weights().unwrap();
        let shape = vec![rows_of_table as u64, WIDTH as u64];
        weights
            .begin(WeightMeta { name: "w".into(), dtype: DType::F32, shape, sources: vec!["w".into()] })
            .unwrap();
        let piece: Vec<u8> = (0..1 << 26).map(|i: u32| (i % 251) as u8).collect();
        (0..gib * 16).for_each(|_| weights.write(&piece).unwrap());
        weights.finish().unwrap();
    }
    writer.finish().unwrap();
}

/// How fast weights arrive; run it alone with `--ignored --nocapture` in a release build.
#[test]
#[ignore = "measures"]
fn weights_arrive_at_the_rate_of_the_link() {
    let Some(device) = gpu("loading") else { return };
    let folder = tempfile::tempdir().unwrap();
    // Holds the context, so that opening it is not measured with the rest.
    let small = plain_engine(&device);
    let start = std::time::Instant::now();
    let _first = small.session(SessionOptions::default()).unwrap();
    eprintln!("first session of the process: {:.3} s", start.elapsed().as_secs_f64());
    let start = std::time::Instant::now();
    let _second = small.session(SessionOptions::default()).unwrap();
    eprintln!("second session: {:.3} s", start.elapsed().as_secs_f64());
    for (gib, stored) in [(8, true), (1, false)] {
        let path = folder.path().join("large.engine");
        large_engine(&device, &path, gib, stored);
        let engine = Engine::open_with(&path, Verify::Metadata).unwrap();
        for threads in [4, 8, 16] {
            let options = SessionOptions { threads: Some(threads), ..SessionOptions::default() };
            let start = std::time::Instant::now();
            let session = engine.session(options).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            let rate = session.ledger().now(Class::Weights) as f64 / seconds / 1e9;
            let source = if stored { "stored" } else { "computed" };
            eprintln!("{gib} GiB {source}, {threads} threads: {seconds:.3} s, {rate:.1} GB/s");
        }
    }
}

/// What a step costs on the host; run it alone with `--ignored --nocapture` in a release build.
#[test]
#[ignore = "measures"]
fn steps_cost_little_on_the_host() {
    let Some(device) = gpu("step cost") else { return };
    let engine = plain_engine(&device);
    let (shape, data) = ([8, WIDTH as u64], bytes(&input(8, 0)));
    for graphs in [false, true] {
        let mut session = engine.session(SessionOptions { graphs, ..SessionOptions::default() }).unwrap();
        for _ in 0..200 {
            session.run_argmax(&[tensor(&shape, &data)], 0).unwrap();
        }
        let start = std::time::Instant::now();
        for _ in 0..2000 {
            session.run_argmax(&[tensor(&shape, &data)], 0).unwrap();
        }
        let micros = start.elapsed().as_secs_f64() * 1e6 / 2000.0;
        eprintln!("5 kernels, argmax and back, graphs {graphs}: {micros:.1} us a step");
    }
}
