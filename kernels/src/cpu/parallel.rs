//! Threads that claim tasks one by one and park when there are none, and shared access to disjoint outputs.

use std::marker::PhantomData;
use std::ops::Range;
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

/// [`for_chunks`] over any number of slices, each with its own chunk size; all have the same number of chunks.
pub fn for_chunks_all<T: Send>(
    pool: &Pool,
    slices: Vec<(&mut [T], usize)>,
    work: usize,
    task: impl Fn(usize, &mut [&mut [T]]) + Send + Sync,
) {
    let count = slices.iter().map(|(slice, chunk)| slice.len().div_ceil((*chunk).max(1))).min().unwrap_or(0);
    let shared: Vec<_> =
        slices.into_iter().map(|(slice, chunk)| (slice.len(), chunk, Shared::new(slice))).collect();
    pool.run(count, work, |index| {
        let mut parts: Vec<&mut [T]> = Vec::with_capacity(shared.len());
        for (len, chunk, shared) in &shared {
            let start = index * chunk;
            // SAFETY: chunks of different indices are disjoint, and each index runs once.
            parts.push(unsafe { shared.range(start, (*chunk).min(len - start)) });
        }
        task(index, &mut parts);
    });
}

/// How `[outer, rows, width]` is cut into rectangles of at most `tall` rows and `wide` columns.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Matrices.
    pub outer: usize,
    /// Rows of a matrix.
    pub rows: usize,
    /// Columns of a matrix.
    pub width: usize,
    /// Rows of a rectangle.
    pub tall: usize,
    /// Columns of a rectangle.
    pub wide: usize,
}

impl Grid {
    /// Number of rectangles.
    pub fn tasks(&self) -> usize {
        self.outer * self.rows.div_ceil(self.tall.max(1)) * self.width.div_ceil(self.wide.max(1))
    }
}

/// A rectangle that one task owns.
pub struct Rectangle<'a, T> {
    /// Its matrix.
    pub outer: usize,
    /// Its rows.
    pub rows: Range<usize>,
    /// Its columns.
    pub columns: Range<usize>,
    grid: Grid,
    shared: &'a Shared<'a, T>,
}

impl<T> Rectangle<'_, T> {
    /// Row `index`, counted from the first of [`Rectangle::rows`].
    pub fn row(&mut self, index: usize) -> &mut [T] {
        assert!(index < self.rows.len(), "row outside the rectangle");
        let row = self.outer * self.grid.rows + self.rows.start + index;
        // SAFETY: rectangles are disjoint, each is given to one task, and the row borrows this one exclusively.
        unsafe { self.shared.range(row * self.grid.width + self.columns.start, self.columns.len()) }
    }
}

/// Runs `task` for each rectangle of `slice`, columns fastest. The grid has as many elements as the slice.
pub fn for_rectangles<T: Send>(
    pool: &Pool,
    slice: &mut [T],
    grid: Grid,
    work: usize,
    task: impl Fn(Rectangle<'_, T>) + Send + Sync,
) {
    assert_eq!(grid.outer * grid.rows * grid.width, slice.len(), "the grid covers the slice");
    let (tall, wide) = (grid.tall.max(1), grid.wide.max(1));
    let (down, across) = (grid.rows.div_ceil(tall), grid.width.div_ceil(wide));
    let shared = Shared::new(slice);
    pool.run(grid.tasks(), work, |index| {
        let (row, column) = (index / across % down * tall, index % across * wide);
        task(Rectangle {
            outer: index / across / down,
            rows: row..grid.rows.min(row + tall),
            columns: column..grid.width.min(column + wide),
            grid,
            shared: &shared,
        });
    });
}
