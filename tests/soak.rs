//! A mixed soak: budgets, allocations, profiles, shapes and cancelled requests at random, for a given time. Nothing grows, and every
//! result is that of a fresh session.
//!
//! `cargo test --test soak -- --ignored` runs for a minute; `MILLRACE_SOAK_SECONDS` sets the time, `MILLRACE_SOAK_SEED` the seed,
//! `MILLRACE_SOAK_TARGET` the target (`cuda:sm_90a` needs its kernels in the cache or NVRTC, and a GPU) and `MILLRACE_SOAK_MODEL` a
//! folder. The few rounds that always run keep the test itself working.
#![allow(clippy::print_stderr)]

#[path = "common/models.rs"]
mod common;

use std::time::{Duration, Instant};

use common::engine;
use millrace::compiler::target::TargetChoice;
use millrace::generation::{StepInputs, StepModel};
use millrace::ir::plan::stream::Ring;
use millrace::ir::{DType, ShapeProfile};
use millrace::{
    Allocation, Arena, Class, Decoder, Engine, ProfileChoice, Session, SessionOptions, WeightBudget,
};

/// xorshift: the rounds of a seed are the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n.max(1)
    }
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Bytes of this process in memory, 0 where the system does not tell.
fn resident_set() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) * 1024
}

/// A request: a prompt and how many steps it lives. One that is cancelled leaves its pages as they are.
struct Request {
    prompt: Vec<u32>,
    steps: usize,
}

fn step(ids: &[u32], from: usize, pages: &[i32], per_page: usize) -> StepInputs {
    let n = ids.len() - from;
    let used = ids.len().div_ceil(per_page);
    StepInputs {
        token_ids: ids[from..].iter().map(|t| *t as i32).collect(),
        positions: (from as i32..ids.len() as i32).collect(),
        seq_starts: vec![0, n as i32],
        kv_lens: vec![ids.len() as i32],
        block_table: pages[..used].to_vec(),
        pages_per_seq: used,
        logit_rows: vec![n as i32 - 1],
    }
}

/// The logits of every step of `request` on the cache pages from `first` on.
fn serve(model: &mut impl StepModel, request: &Request, first: i32) -> Vec<Vec<f32>> {
    let per_page = model.limits().tokens_per_block;
    let pages: Vec<i32> = (first..first + 8).collect();
    let (mut ids, mut from, mut all) = (request.prompt.clone(), 0, Vec::new());
    for _ in 0..request.steps {
        let mut logits = Vec::new();
        model.step(&step(&ids, from, &pages, per_page), &mut logits).unwrap();
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        from = ids.len();
        ids.push(best as u32);
        all.push(logits);
    }
    all
}

fn options(random: &mut Random) -> SessionOptions {
    SessionOptions {
        allocation: Allocation::ALL[random.below(4) as usize],
        ring: Ring { slots: 3, slot_bytes: 16 << 10, small: 0, ..Ring::DEFAULT },
        copy_queues: 2,
        threads: Some(2),
        ..SessionOptions::default()
    }
}

/// A weight budget that the session can take, or nothing where its weights do not stream.
fn budget(session: &Session<'_>, random: &mut Random) -> Option<WeightBudget> {
    let least = session.minimum_budget();
    Some(match random.below(5) {
        _ if session.total_device_budget() == 0 => return None,
        0 => WeightBudget::Resident,
        1 => WeightBudget::Bytes(least),
        2 => WeightBudget::Bytes(least + random.below(session.total_device_budget())),
        3 => WeightBudget::Fraction(random.below(101) as f64 / 100.0),
        _ => WeightBudget::Auto { reserve: 1 << 20 },
    })
}

/// One request under an allocation, a profile and a budget at random.
fn round(session: &mut Session<'_>, arena: &mut Arena, random: &mut Random) -> (Request, Vec<Vec<f32>>) {
    let allocation = Allocation::ALL[random.below(4) as usize];
    if let Some(budget) = budget(session, random) {
        match session.set_weight_budget(budget) {
            Ok(_) => {}
            // Backends that do not stream yet, and budgets between what tiles allow.
            Err(error) => assert!(["run/streaming", "run/weight-budget"].contains(&error.code()), "{error}"),
        }
    }
    let keeps = random.below(3) == 0;
    if keeps {
        session.set_allocation(allocation).unwrap();
    }
    let profile = random.below(3);
    session
        .select_profile(if profile == 0 {
            ProfileChoice::Name("large".into())
        } else {
            ProfileChoice::Automatic
        })
        .unwrap();
    let n = 1 + random.below(48) as usize;
    let prompt = (0..n).map(|_| 3 + random.below(90) as u32).collect();
    // A third of all requests end early.
    let wanted = 1 + random.below(6) as usize;
    let steps = if random.below(3) == 0 { 1 + random.below(wanted as u64) as usize } else { wanted };
    let request = Request { prompt, steps };
    let first = random.below(4) as i32 * 8;
    let mut guard = session.allocation(allocation).unwrap();
    let logits = match allocation {
        Allocation::UserManaged => {
            serve(&mut Decoder::new_in(&mut guard, arena.lend()).unwrap(), &request, first)
        }
        _ => serve(&mut Decoder::new(&mut guard).unwrap(), &request, first),
    };
    (request, logits)
}

/// What the session holds in a state that does not depend on the rounds before.
fn settled(session: &mut Session<'_>) -> Vec<(Class, u64)> {
    let _ = session.set_weight_budget(WeightBudget::Resident);
    session.select_profile(ProfileChoice::Automatic).unwrap();
    session.set_allocation(Allocation::Static).unwrap();
    session.trim_pool().unwrap();
    // Pinned memory grows to the largest output that was read and to the weights that once streamed, the pool to what a step
    // took, and no further: the resident set would show it.
    let steady = |c: &Class| c.is_own() && !c.is_on_host();
    Class::ALL.iter().filter(|c| steady(c)).map(|c| (*c, session.ledger().now(*c))).collect()
}

fn model(target: &str) -> Engine {
    let folder =
        std::env::var("MILLRACE_SOAK_MODEL").unwrap_or_else(|_| "tests/data/tiny-random/qwen3".into());
    engine(&folder, DType::F32, |o| {
        o.target = TargetChoice::parse(target).unwrap();
        o.pipeline = o.target.level(2);
        o.weight_streaming = true;
        let profiles = ["small:t=1..8,b=1..4,r=1..4", "large:t=1..64,b=1..2,r=1..2"];
        o.profiles = profiles.iter().map(|p| ShapeProfile::parse(p).unwrap()).collect();
    })
}

fn soak(rounds: Option<u64>, time: Duration) {
    let target = std::env::var("MILLRACE_SOAK_TARGET").unwrap_or_else(|_| "cpu".into());
    let seed = env("MILLRACE_SOAK_SEED").unwrap_or(1);
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let engine = model(&target);
    let mut session = engine.session(options(&mut random)).unwrap();
    let mut arena = Arena::on(session.device(), session.most_lent_bytes().unwrap()).unwrap();
    let empty = settled(&mut session);
    let (start, mut done, mut steady) = (Instant::now(), 0u64, 0);
    while rounds.map_or(start.elapsed() < time, |rounds| done < rounds) {
        let (request, found) = round(&mut session, &mut arena, &mut random);
        done += 1;
        if done % 4 == 0 {
            let mut fresh =
                engine.session(SessionOptions { threads: Some(2), ..SessionOptions::default() }).unwrap();
            let expected = serve(&mut Decoder::new(&mut fresh).unwrap(), &request, 0);
            assert!(
                found == expected,
                "seed {seed}, round {done}: other logits than those of a fresh session"
            );
        }
        if done % 16 == 0 {
            assert_eq!(settled(&mut session), empty, "seed {seed}, round {done}: the ledger grew");
        }
        if done == 256 {
            steady = resident_set();
        }
    }
    let end = resident_set();
    eprintln!("soak on {target}, seed {seed}: {done} rounds, resident set {steady} to {end}");
    if steady > 0 {
        // The allocator may keep some pages more; a leak of a page a round would show.
        assert!(
            end <= steady + (8 << 20),
            "seed {seed}: the resident set grew from {steady} to {end} in {done} rounds"
        );
    }
}

#[test]
fn a_few_rounds() {
    soak(Some(48), Duration::ZERO);
}

#[test]
#[ignore = "takes the time it is given"]
fn for_a_given_time() {
    soak(None, Duration::from_secs(env("MILLRACE_SOAK_SECONDS").unwrap_or(60)));
}
