//! Threads that read ranges of the engine file into memory that is lent to them.
//!
//! A *ticket* counts reads that belong together, such as those of a slot of the ring. Reads start in the order they were
//! handed in, so the ring's next tile is always the one that is worked on, by all threads. An error stays with its ticket
//! until somebody waits for it; the ticket's other reads are then skipped.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use millrace_ir::{Error, Kind, Result};

use crate::direct::DirectFile;
use crate::memory::{Gap, Region};

/// Threads that read. They sleep while the device works; a few keep it busy.
const THREADS: usize = 4;

/// Bytes of one read at most: a tile is read by several threads at once.
const CHUNK: u64 = 4 << 20;

struct Job {
    ticket: usize,
    offset: u64,
    gap: Gap,
}

#[derive(Default)]
struct Ticket {
    pending: usize,
    error: Option<Error>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    tickets: Vec<Ticket>,
    stop: bool,
}

struct Shared {
    file: DirectFile,
    state: Mutex<State>,
    work: Condvar,
    done: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.lock();
        while !state.stop {
            let Some(mut job) = state.jobs.pop_front() else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let skip = state.tickets[job.ticket].error.is_some();
            drop(state);
            let result = if skip { Ok(()) } else { self.file.read(job.offset, job.gap.bytes()) };
            let number = job.ticket;
            state = self.lock();
            let ticket = &mut state.tickets[number];
            ticket.pending -= 1;
            if let Err(error) = result {
                ticket.error.get_or_insert(error);
            }
            if ticket.pending == 0 {
                self.done.notify_all();
            }
        }
    }
}

/// The threads; they end when this is dropped, which waits for reads under way.
pub(super) struct Readers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Readers {
    /// Threads that read `file` for so many tickets.
    ///
    /// # Errors
    /// `run/threads` if the system gives no thread.
    pub fn new(file: DirectFile, tickets: usize) -> Result<Readers> {
        let mut state = State::default();
        state.tickets.resize_with(tickets, Ticket::default);
        let shared =
            Arc::new(Shared { file, state: Mutex::new(state), work: Condvar::new(), done: Condvar::new() });
        let spawn = |index: usize| {
            let shared = shared.clone();
            let name = format!("millrace-read-{}", index + 1);
            std::thread::Builder::new().name(name).spawn(move || shared.serve()).ok()
        };
        let threads: Vec<JoinHandle<()>> = (0..THREADS).map_while(spawn).collect();
        if threads.is_empty() {
            return Err(Error::new(Kind::OutOfMemory, "run/threads", "the system gives no threads to read"));
        }
        Ok(Readers { shared, threads })
    }

    /// Hands in reads of `ticket`: from which offset, into which memory. Urgent ones go before all others.
    ///
    /// # Safety
    /// Until [`Readers::wait`] for the ticket, [`Readers::drain`] or the drop of `self` has returned, the regions live and
    /// nobody else touches them.
    pub unsafe fn submit(&self, ticket: usize, reads: impl IntoIterator<Item = (u64, Region)>, urgent: bool) {
        let mut jobs = Vec::new();
        for (offset, region) in reads {
            let len = region.len() as u64;
            for at in (0..len).step_by(CHUNK as usize) {
                let part = region.part(at, CHUNK.min(len - at));
                // SAFETY: the caller vouches for the regions, and chunks are disjoint.
                let gap = part.and_then(|part| unsafe { part.lend() });
                jobs.extend(gap.map(|gap| Job { ticket, offset: offset + at, gap }));
            }
        }
        let mut state = self.shared.lock();
        state.tickets[ticket].pending += jobs.len();
        if urgent {
            jobs.into_iter().rev().for_each(|job| state.jobs.push_front(job));
        } else {
            state.jobs.extend(jobs);
        }
        drop(state);
        self.shared.work.notify_all();
    }

    /// Waits until all reads of `ticket` have ended.
    ///
    /// # Errors
    /// The first error of one of them.
    pub fn wait(&self, ticket: usize) -> Result<()> {
        let mut state = self.shared.lock();
        while state.tickets[ticket].pending > 0 {
            state = self.shared.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.tickets[ticket].error.take().map_or(Ok(()), Err)
    }

    /// Waits for all reads and forgets their errors.
    pub fn drain(&self) {
        let mut state = self.shared.lock();
        for job in std::mem::take(&mut state.jobs) {
            state.tickets[job.ticket].pending -= 1;
        }
        let tickets = state.tickets.len();
        drop(state);
        (0..tickets).for_each(|ticket| drop(self.wait(ticket)));
    }

    /// Reads on the calling thread.
    ///
    /// # Errors
    /// As [`DirectFile::read`].
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.shared.file.read(offset, out)
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stop = true;
        state.jobs.clear();
        drop(state);
        self.shared.work.notify_all();
        // A reader does not panic; if one did, its memory is still no longer used.
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}
