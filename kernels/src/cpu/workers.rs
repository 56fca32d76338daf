//! Threads that wait for a job, run it beside the caller, and park when none comes.
//!
//! A step runs dozens of kernels, a few of them only microseconds long. So a worker spins for a moment after a job
//! before it parks, and the caller works as well instead of waiting for all the others.
#![allow(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Looks for a job before parking: some tens of microseconds.
const SPINS: usize = 20_000;

type Job<'a> = &'a (dyn Fn() + Sync + 'a);

struct State {
    /// Counts jobs; a change means that there is a new one.
    epoch: AtomicUsize,
    /// The job of this epoch; points to a [`Job`] on the caller's stack.
    job: AtomicPtr<()>,
    /// Workers that have not finished the job of this epoch.
    running: AtomicUsize,
    /// Whether a worker panicked in the job of this epoch.
    panicked: AtomicBool,
    stop: AtomicBool,
    parked: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// Parked threads, joined on drop.
pub(super) struct Workers {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
    /// Held by the caller whose job runs.
    busy: Mutex<()>,
}

impl Workers {
    /// `count` threads, or as many as the system gives; `None` if it gives none.
    pub(super) fn new(count: usize) -> Option<Self> {
        let state = Arc::new(State {
            epoch: AtomicUsize::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            running: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let threads: Vec<JoinHandle<()>> = (0..count)
            .map_while(|index| {
                let state = state.clone();
                let name = format!("millrace-{}", index + 1);
                std::thread::Builder::new().name(name).spawn(move || state.work()).ok()
            })
            .collect();
        (!threads.is_empty()).then(|| Workers { state, threads, busy: Mutex::new(()) })
    }

    /// Number of threads beside the caller.
    pub(super) fn count(&self) -> usize {
        self.threads.len()
    }

    /// Runs `job` once on every worker and on the calling thread; returns when all are done. While another caller has
    /// the workers (or the job itself calls this), only the calling thread runs it.
    ///
    /// # Panics
    /// If the job panics on any thread.
    pub(super) fn run(&self, job: Job<'_>) {
        let Ok(guard) = self.busy.try_lock() else {
            job();
            return;
        };
        let state = &*self.state;
        state.panicked.store(false, Ordering::Relaxed);
        state.job.store((&raw const job).cast_mut().cast(), Ordering::Relaxed);
        state.running.store(self.threads.len(), Ordering::Relaxed);
        // Everything above is visible to whoever sees the new epoch.
        state.epoch.fetch_add(1, Ordering::SeqCst);
        if state.parked.load(Ordering::SeqCst) > 0 {
            // Taking the lock orders this after a worker's last look at the epoch before it waits.
            drop(state.lock.lock());
            state.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(job));
        // `job` must outlive its use by the workers, also when the caller panicked.
        let mut spins = 0;
        while state.running.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let panicked = state.panicked.load(Ordering::Relaxed);
        // Before unwinding, which would poison it.
        drop(guard);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!panicked, "a task of a parallel kernel panicked");
    }
}

impl State {
    fn work(&self) {
        let mut seen = 0;
        loop {
            let mut spins = 0;
            while self.epoch.load(Ordering::Acquire) == seen {
                spins += 1;
                if spins < SPINS {
                    std::hint::spin_loop();
                    continue;
                }
                let Ok(mut guard) = self.lock.lock() else { return };
                self.parked.fetch_add(1, Ordering::SeqCst);
                while self.epoch.load(Ordering::SeqCst) == seen {
                    guard = match self.wake.wait(guard) {
                        Ok(guard) => guard,
                        Err(_) => return,
                    };
                }
                self.parked.fetch_sub(1, Ordering::SeqCst);
            }
            seen = seen.wrapping_add(1);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let job = self.job.load(Ordering::Relaxed).cast_const().cast::<Job<'_>>();
            // SAFETY: the caller of `run` stored a pointer to its `job` before this epoch and waits in `run` until
            // `running` is 0, so the pointer is valid here; the job is `Sync`.
            let job = unsafe { *job };
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.running.fetch_sub(1, Ordering::Release);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Release);
        self.state.epoch.fetch_add(1, Ordering::SeqCst);
        drop(self.state.lock.lock());
        self.state.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches panics of jobs and has none of its own.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn every_thread_runs_every_job_once() {
        let workers = Workers::new(3).unwrap();
        for round in 0..2000 {
            let ran = AtomicUsize::new(0);
            workers.run(&|| {
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), workers.count() + 1, "round {round}");
            if round % 500 == 0 {
                // Long enough for all to park.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    #[test]
    fn a_job_within_a_job_runs_on_its_caller() {
        let workers = Workers::new(2).unwrap();
        let (outer, inner) = (AtomicUsize::new(0), AtomicUsize::new(0));
        workers.run(&|| {
            outer.fetch_add(1, Ordering::Relaxed);
            workers.run(&|| {
                inner.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!((outer.into_inner(), inner.into_inner()), (3, 3));
    }

    #[test]
    fn panics_reach_the_caller_and_leave_the_workers_usable() {
        let workers = Workers::new(2).unwrap();
        let caller = std::thread::current().id();
        for on_caller in [true, false] {
            let found = catch_unwind(AssertUnwindSafe(|| {
                workers.run(&|| {
                    assert!((std::thread::current().id() == caller) != on_caller, "expected by the test");
                });
            }));
            assert!(found.is_err());
        }
        let ran = AtomicUsize::new(0);
        workers.run(&|| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 3);
    }
}
