//! Random tests by seed, on all processors.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// The number in an environment variable, if it is set.
pub fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|v| v.parse().unwrap_or_else(|_| panic!("{variable}={v} is no number")))
}

/// Tries every seed with a summary of the thread's own, as long as `try_one` wants to go on; the summaries joined.
pub fn on_all_processors<S: Default + Send>(
    seeds: Range<u64>,
    try_one: impl Fn(u64, &mut S) -> bool + Sync,
    join: impl Fn(&mut S, S) + Sync,
) -> S {
    let next = AtomicU64::new(seeds.start);
    let total = Mutex::new(S::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = S::default();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || !try_one(seed, &mut mine) {
                        break;
                    }
                }
                join(&mut total.lock().unwrap(), mine);
            });
        }
    });
    total.into_inner().unwrap()
}
