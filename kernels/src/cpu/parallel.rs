//! Threads that claim tasks one by one and park when there are none, and shared access to disjoint outputs.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::simd::Isa;

/// Where kernels run: an instruction set and, beyond one thread, a pool.
#[derive(Clone)]
pub struct Pool {
    /// Instruction set of every kernel call.
    pub isa: Isa,
    threads: usize,
    worth_it: usize,
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl Pool {
    /// A pool of `threads` threads (at least 1) with the best instruction set of this machine. Falls back to the
    /// calling thread where threads cannot be created.
    pub fn new(threads: usize) -> Self {
        Self::with_isa(threads, Isa::detect())
    }

    /// A pool with a given instruction set, which this machine must have; otherwise the best it has.
    pub fn with_isa(threads: usize, isa: Isa) -> Self {
        let isa = isa.min(Isa::detect());
        let threads = threads.max(1);
        let pool = (threads > 1)
            .then(|| rayon::ThreadPoolBuilder::new().num_threads(threads).build().ok().map(Arc::new))
            .flatten();
        let threads = if pool.is_some() { threads } else { 1 };
        Pool { isa, threads, worth_it: 1 << 19, pool }
    }

    /// The pool, but running in parallel what is hardly worth it: for tests on small tensors.
    #[must_use]
    pub fn eager(mut self) -> Self {
        self.worth_it = 0;
        self
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `task(0..tasks)`, in parallel if `work` (a rough count of operations) is worth it.
    pub fn run(&self, tasks: usize, work: usize, task: impl Fn(usize) + Send + Sync) {
        match &self.pool {
            Some(pool) if tasks > 1 && work >= self.worth_it => {
                let next = AtomicUsize::new(0);
                pool.broadcast(|_| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= tasks {
                            return;
                        }
                        task(index);
                    }
                });
            }
            _ => (0..tasks).for_each(task),
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads, {:?})", self.threads, self.isa)
    }
}

/// A mutable slice that several tasks write at disjoint ranges.
pub struct Shared<'a, T> {
    pointer: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `range`, whose callers write disjoint ranges; `T: Send` lets other threads write.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above; the slice is borrowed exclusively for 'a.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares `slice` for its borrow.
    pub fn new(slice: &'a mut [T]) -> Self {
        Shared { pointer: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Elements `start .. start + len`; panics outside the slice.
    ///
    /// # Safety
    /// No two live ranges may overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn range(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "range outside the slice");
        // SAFETY: the range is inside the borrowed slice, and the caller keeps live ranges disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}

/// Splits `slice` into chunks of `chunk` elements and runs `task(index, chunk)` for each.
pub fn for_chunks<T: Send>(
    pool: &Pool,
    slice: &mut [T],
    chunk: usize,
    work: usize,
    task: impl Fn(usize, &mut [T]) + Send + Sync,
) {
    let chunk = chunk.max(1);
    let (len, shared) = (slice.len(), Shared::new(slice));
    pool.run(len.div_ceil(chunk), work, |index| {
        let start = index * chunk;
        // SAFETY: chunks of different indices are disjoint, and each index runs once.
        let part = unsafe { shared.range(start, chunk.min(len - start)) };
        task(index, part);
    });
}

/// [`for_chunks`] over two slices with chunks of their own sizes.
pub fn for_chunks2<T: Send, U: Send>(
    pool: &Pool,
    (a, a_chunk): (&mut [T], usize),
    (b, b_chunk): (&mut [U], usize),
    work: usize,
    task: impl Fn(usize, &mut [T], &mut [U]) + Send + Sync,
) {
    let (a_len, b_len) = (a.len(), b.len());
    let (a, b) = (Shared::new(a), Shared::new(b));
    let count = a_len.div_ceil(a_chunk.max(1)).min(b_len.div_ceil(b_chunk.max(1)));
    pool.run(count, work, |index| {
        let (x, y) = (index * a_chunk, index * b_chunk);
        // SAFETY: chunks of different indices are disjoint, and each index runs once.
        let (x, y) = unsafe { (a.range(x, a_chunk.min(a_len - x)), b.range(y, b_chunk.min(b_len - y))) };
        task(index, x, y);
    });
}
