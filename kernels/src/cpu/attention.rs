//! Attention with an online softmax: scores exist for one block of 32 keys at a time.
//!
//! A task is a block of query rows of one sequence and one key head; a lane is one query row of one head. Many lanes go
//! side by side, 32 in a panel of the matmul tile: scores, softmax and sums are then products and columns. Few lanes,
//! as in decoding, go one by one over transposed keys. Both add in the same order with the same roundings, and every
//! lane visits the blocks it can see in rising order, so its result does not depend on the other lanes (Milakov and
//! Gimelshein 2018 for the online softmax).

use std::cell::RefCell;

use millrace_ir::Result;

use super::element::Element;
use super::math::exp;
use super::paging::{Paging, spans};
use super::parallel::{Pool, Shared};
use super::simd::{Isa, PANEL, TILE_ROWS, dispatch, pack_rows, packed_rows_len, part, tile};

/// Keys of one block.
const KEYS: usize = 32;

/// Most lanes of one task.
const LANES: usize = 128;

/// Fewest lanes that go side by side.
const PANEL_LANES: usize = 8;

thread_local! {
    /// Working memory of the task at hand.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Sizes and masking of an attention call.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `h` uses `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Head size.
    pub d: usize,
    /// Factor on `q . k`.
    pub scale: f32,
    /// Position `i` sees `j <= i` only.
    pub causal: bool,
    /// With w > 0, position `i` sees `j > i - w` only.
    pub window: usize,
}

struct Task {
    sequence: usize,
    /// First packed row and number of rows.
    row: usize,
    count: usize,
    /// Position of the first row.
    position: usize,
    /// Keys of the sequence.
    keys: usize,
    kv_head: usize,
}

/// The lanes of a task: its query rows times the query heads of its key head, heads fastest.
#[derive(Clone, Copy)]
struct Lanes<'a> {
    heads: Heads,
    task: &'a Task,
    /// Query heads of a key head.
    group: usize,
    count: usize,
}

impl<'a> Lanes<'a> {
    fn of(heads: Heads, task: &'a Task) -> Self {
        let group = heads.heads / heads.kv_heads.max(1);
        Lanes { heads, task, group, count: task.count * group }
    }

    /// Where a lane's row of `q` or `out` begins.
    fn place(&self, lane: usize) -> usize {
        let row = self.task.row + lane / self.group;
        (row * self.heads.heads + self.task.kv_head * self.group + lane % self.group) * self.heads.d
    }

    /// The position of a lane's row.
    fn position(&self, lane: usize) -> usize {
        self.task.position + lane / self.group
    }

    /// The keys that a lane sees: from, and up to but not including.
    fn visible(&self, lane: usize) -> (usize, usize) {
        visible(self.heads, self.position(lane), self.task.keys)
    }

    /// First key of each block that some lane sees, and behind the last key.
    fn blocks(&self) -> (impl Iterator<Item = usize> + use<>, usize) {
        let keys = self.task.keys;
        let last = if self.heads.causal { keys.min(self.task.position + self.task.count) } else { keys };
        let first = visible(self.heads, self.task.position, keys).0;
        ((first / KEYS * KEYS..last).step_by(KEYS), last)
    }
}

/// State of one query row and head while blocks go by.
#[derive(Clone)]
struct Running {
    top: f32,
    total: f32,
}

dispatch! {
    /// Scores of one query against a transposed key block `[d, 32]`.
    pub fn scores(q: &[f32], keys: &[f32], out: &mut [f32; 32]) {
        let mut sums = [0f32; 32];
        for (x, k) in q.iter().zip(keys.chunks_exact(32)) {
            for j in 0..32 {
                sums[j] = x.mul_add(k[j], sums[j]);
            }
        }
        *out = sums;
    }
}

dispatch! {
    /// Adds `weights[j] * values[j]` to `out`, `j` rising; `values [32, d]`.
    pub fn weigh(weights: &[f32], values: &[f32], out: &mut [f32]) {
        let d = out.len();
        for (w, v) in weights.iter().zip(values.chunks_exact(d)) {
            for (o, v) in out.iter_mut().zip(v) {
                *o = w.mul_add(*v, *o);
            }
        }
    }
}

dispatch! {
    /// Turns scores into weights `e^(s - top)`; masked ones are minus infinity and become 0.
    pub fn exponentials(s: &mut [f32; 32], top: f32) {
        for v in s.iter_mut() {
            *v = exp(*v - top);
        }
    }
}

dispatch! {
    /// Softmax of one block for 32 lanes: scores `s [keys, 32]` become weights, `top` and `total` go on, and `shrink`
    /// says by what the sums so far are multiplied. Lanes that see no key of the block stay as they are.
    pub fn soften(s: &mut [f32], top: &mut [f32; 32], total: &mut [f32; 32], shrink: &mut [f32; 32]) {
        let mut high = *top;
        for row in s.chunks_exact(32) {
            for l in 0..32 {
                high[l] = if row[l] > high[l] { row[l] } else { high[l] };
            }
        }
        let mut base = [0f32; 32];
        for l in 0..32 {
            base[l] = if high[l] == f32::NEG_INFINITY { 0.0 } else { high[l] };
            shrink[l] = if top[l] == f32::NEG_INFINITY { 0.0 } else { exp(top[l] - base[l]) };
        }
        let mut sum = [0f32; 32];
        for row in s.chunks_exact_mut(32) {
            for l in 0..32 {
                row[l] = exp(row[l] - base[l]);
                sum[l] += row[l];
            }
        }
        for l in 0..32 {
            total[l] = total[l] * shrink[l] + sum[l];
        }
        *top = high;
    }
}

dispatch! {
    /// Multiplies every row of `sums [d, 32]` by `factors`.
    pub fn scale_lanes(sums: &mut [f32], factors: &[f32; 32]) {
        for row in sums.chunks_exact_mut(32) {
            for (v, f) in row.iter_mut().zip(factors) {
                *v *= f;
            }
        }
    }
}

/// Reads the rows of one key block.
trait Rows<T>: Sync {
    /// The row of key `position` of `sequence` for a key head.
    fn key(&self, sequence: usize, position: usize, head: usize) -> &[T];
    fn value(&self, sequence: usize, position: usize, head: usize) -> &[T];
}

struct Paged<'a, T> {
    k: &'a [T],
    v: &'a [T],
    paging: Paging<'a>,
    heads: Heads,
}

struct Packed<'a, T> {
    k: &'a [T],
    v: &'a [T],
    starts: &'a [(usize, usize)],
    heads: Heads,
}

impl<T: Element> Rows<T> for Paged<'_, T> {
    fn key(&self, sequence: usize, position: usize, head: usize) -> &[T] {
        let at = (self.paging.slot(sequence, position) * self.heads.kv_heads + head) * self.heads.d;
        &self.k[at..at + self.heads.d]
    }
    fn value(&self, sequence: usize, position: usize, head: usize) -> &[T] {
        let at = (self.paging.slot(sequence, position) * self.heads.kv_heads + head) * self.heads.d;
        &self.v[at..at + self.heads.d]
    }
}

impl<T: Element> Rows<T> for Packed<'_, T> {
    fn key(&self, sequence: usize, position: usize, head: usize) -> &[T] {
        let at = ((self.starts[sequence].0 + position) * self.heads.kv_heads + head) * self.heads.d;
        &self.k[at..at + self.heads.d]
    }
    fn value(&self, sequence: usize, position: usize, head: usize) -> &[T] {
        let at = ((self.starts[sequence].0 + position) * self.heads.kv_heads + head) * self.heads.d;
        &self.v[at..at + self.heads.d]
    }
}

/// Attention over a paged cache `k, v [pages, tokens_per_block, kv_heads, d]` that holds this step's rows already;
/// `q, out [t, heads, d]`. Causal by nature.
///
/// # Errors
/// `run/bad-index` for index operands that do not fit.
pub fn paged_attention<T: Element>(
    pool: &Pool,
    heads: Heads,
    q: &[T],
    (k, v): (&[T], &[T]),
    paging: &Paging<'_>,
    out: &mut [T],
) -> Result<()> {
    let heads = Heads { causal: true, ..heads };
    let rows = q.len().checked_div(heads.heads * heads.d).unwrap_or(0);
    let sequences = paging.sequences(rows)?;
    let spans = sequences.iter().map(|(start, end, past)| (*start, *end, *past, past + end - start));
    run(pool, heads, q, &Paged { k, v, paging: *paging, heads }, spans, out);
    Ok(())
}

/// Attention within packed sequences; `q, out [t, heads, d]`, `k, v [t, kv_heads, d]`.
///
/// # Errors
/// `run/bad-index` unless `seq_starts` rises from 0 to `t`.
pub fn packed_attention<T: Element>(
    pool: &Pool,
    heads: Heads,
    q: &[T],
    (k, v): (&[T], &[T]),
    seq_starts: &[i32],
    out: &mut [T],
) -> Result<()> {
    let rows = q.len().checked_div(heads.heads * heads.d).unwrap_or(0);
    let starts = spans(seq_starts, rows)?;
    let spans = starts.iter().map(|(start, end)| (*start, *end, 0, end - start));
    run(pool, heads, q, &Packed { k, v, starts: &starts, heads }, spans, out);
    Ok(())
}

fn run<T: Element>(
    pool: &Pool,
    heads: Heads,
    q: &[T],
    rows: &impl Rows<T>,
    spans: impl Iterator<Item = (usize, usize, usize, usize)>,
    out: &mut [T],
) {
    let mut tasks = Vec::new();
    let mut work = 0;
    let group = (heads.heads / heads.kv_heads.max(1)).max(1);
    // Tall tasks share the work on keys; where they would leave threads idle they are cut to one panel.
    let spans: Vec<_> = spans.collect();
    let all: usize = spans.iter().map(|(start, end, ..)| (end - start) * heads.heads).sum();
    let lanes = if all / LANES >= 4 * pool.threads() { LANES } else { PANEL };
    let tall = (lanes / group).max(1);
    for (sequence, (start, end, past, keys)) in spans.into_iter().enumerate() {
        for row in (start..end).step_by(tall) {
            let count = tall.min(end - row);
            work += count * keys * heads.d * heads.heads * 2;
            let position = past + row - start;
            tasks.extend((0..heads.kv_heads).map(|kv_head| Task {
                sequence,
                row,
                count,
                position,
                keys,
                kv_head,
            }));
        }
    }
    let shared = Shared::new(out);
    pool.run(tasks.len(), work, |index| {
        let task = &tasks[index];
        // Without fused multiply-add in hardware the panel is faster for one lane as well.
        if task.count * group >= PANEL_LANES || pool.isa == Isa::Portable {
            SCRATCH.with_borrow_mut(|scratch| attend_panels(pool, heads, q, rows, task, &shared, scratch));
        } else {
            attend(pool, heads, q, rows, task, &shared);
        }
    });
}

/// The keys that a lane at `position` sees: from, and up to but not including.
fn visible(heads: Heads, position: usize, keys: usize) -> (usize, usize) {
    let low = if heads.window == 0 { 0 } else { (position + 1).saturating_sub(heads.window) };
    (low, if heads.causal { position + 1 } else { keys })
}

/// Takes `len` numbers off the front of a buffer.
fn take<'a>(buffer: &mut &'a mut [f32], len: usize) -> &'a mut [f32] {
    let (front, rest) = std::mem::take(buffer).split_at_mut(len);
    *buffer = rest;
    front
}

/// Lanes side by side, 32 in a panel.
fn attend_panels<T: Element>(
    pool: &Pool,
    heads: Heads,
    q: &[T],
    rows: &impl Rows<T>,
    task: &Task,
    out: &Shared<'_, T>,
    scratch: &mut Vec<f32>,
) {
    let Heads { d, scale, .. } = heads;
    let all = Lanes::of(heads, task);
    let lanes = all.count;
    let panels = lanes.div_ceil(PANEL);
    let padded = panels * PANEL;
    let needed = 2 * padded * d + 2 * KEYS * d + packed_rows_len(KEYS, d) + KEYS * PANEL + 2 * padded + d;
    if scratch.len() < needed {
        scratch.resize(needed, 0.0);
    }
    let mut buffer = &mut scratch[..];
    let queries = take(&mut buffer, padded * d);
    let sums = take(&mut buffer, padded * d);
    let keys = take(&mut buffer, KEYS * d);
    let values = take(&mut buffer, KEYS * d);
    let packed = take(&mut buffer, packed_rows_len(KEYS, d));
    let scores = take(&mut buffer, KEYS * PANEL);
    let tops = take(&mut buffer, padded);
    let totals = take(&mut buffer, padded);
    let row = take(&mut buffer, d);
    sums.fill(0.0);
    totals.fill(0.0);
    tops.fill(f32::NEG_INFINITY);
    queries.fill(0.0);
    for lane in 0..lanes {
        T::widen(&q[all.place(lane)..][..d], row);
        let panel = &mut queries[lane / PANEL * PANEL * d..][..PANEL * d];
        let column = panel[lane % PANEL..].iter_mut().step_by(PANEL);
        column.zip(row.iter()).for_each(|(to, x)| *to = x * scale);
    }
    let (blocks, last) = all.blocks();
    for block in blocks {
        let count = KEYS.min(last - block);
        for j in 0..count {
            T::widen(rows.key(task.sequence, block + j, task.kv_head), &mut keys[j * d..(j + 1) * d]);
            T::widen(rows.value(task.sequence, block + j, task.kv_head), &mut values[j * d..(j + 1) * d]);
        }
        pack_rows(pool.isa, &keys[..count * d], d, count, d, packed);
        for panel in 0..panels {
            let own = panel * PANEL..lanes.min((panel + 1) * PANEL);
            let (low, high) = (all.visible(own.start), all.visible(own.end - 1));
            // Windows move up with the position.
            if high.1 <= block || low.0 >= block + count {
                continue;
            }
            let scores = &mut scores[..count * PANEL];
            scores.fill(0.0);
            let columns = &queries[panel * PANEL * d..][..PANEL * d];
            let tiles = count.div_ceil(TILE_ROWS);
            for index in 0..tiles {
                let part = part(count, tiles, index);
                let acc = &mut scores[part.start * PANEL..part.end * PANEL];
                tile(pool.isa, &packed[part.start * d..], part.len(), part.len(), d, columns, acc);
            }
            if low.1 < block + count || high.0 > block {
                for lane in own.clone() {
                    let (low, high) = all.visible(lane);
                    for j in (0..count).filter(|j| block + j < low || block + j >= high) {
                        scores[j * PANEL + lane % PANEL] = f32::NEG_INFINITY;
                    }
                }
            }
            let state = panel * PANEL..(panel + 1) * PANEL;
            let (Ok(top), Ok(total)) =
                ((&mut tops[state.clone()]).try_into(), (&mut totals[state]).try_into())
            else {
                continue;
            };
            let mut shrink = [0f32; PANEL];
            soften(pool.isa, scores, top, total, &mut shrink);
            let sums = &mut sums[panel * PANEL * d..][..PANEL * d];
            if shrink.iter().any(|s| *s != 1.0) {
                scale_lanes(pool.isa, sums, &shrink);
            }
            let tiles = d.div_ceil(TILE_ROWS);
            for index in 0..tiles {
                let part = part(d, tiles, index);
                let acc = &mut sums[part.start * PANEL..part.end * PANEL];
                tile(pool.isa, &values[part.start..count * d], d, part.len(), count, scores, acc);
            }
        }
    }
    for lane in 0..lanes {
        let total = totals[lane];
        let factor = if total > 0.0 { 1.0 / total } else { 0.0 };
        let column = sums[lane / PANEL * PANEL * d + lane % PANEL..].iter().step_by(PANEL);
        row.iter_mut().zip(column).for_each(|(to, x)| *to = x * factor);
        // SAFETY: a task owns its rows and the query heads of its key head.
        #[allow(unsafe_code)]
        T::narrow(row, unsafe { out.range(all.place(lane), d) });
    }
}

fn attend<T: Element>(
    pool: &Pool,
    heads: Heads,
    q: &[T],
    rows: &impl Rows<T>,
    task: &Task,
    out: &Shared<'_, T>,
) {
    let Heads { d, scale, .. } = heads;
    let all = Lanes::of(heads, task);
    let lanes = all.count;
    // Query lanes are (row, head of the group), scaled once.
    let mut queries = vec![0f32; lanes * d];
    for (lane, to) in queries.chunks_exact_mut(d).enumerate() {
        let at = all.place(lane);
        T::widen(&q[at..at + d], to);
        to.iter_mut().for_each(|x| *x *= scale);
    }
    let mut sums = vec![0f32; lanes * d];
    let mut running = vec![Running { top: f32::NEG_INFINITY, total: 0.0 }; lanes];
    let (mut keys, mut values) = (vec![0f32; d * KEYS], vec![0f32; KEYS * d]);
    let mut row_buffer = vec![0f32; d];
    let (blocks, last) = all.blocks();
    for block in blocks {
        let count = KEYS.min(last - block);
        for j in 0..count {
            T::widen(rows.key(task.sequence, block + j, task.kv_head), &mut row_buffer);
            row_buffer.iter().enumerate().for_each(|(i, x)| keys[i * KEYS + j] = *x);
            T::widen(rows.value(task.sequence, block + j, task.kv_head), &mut values[j * d..(j + 1) * d]);
        }
        for lane in 0..lanes {
            let (low, high) = all.visible(lane);
            if high <= block || low >= block + count {
                continue;
            }
            let mut s = [0f32; KEYS];
            scores(pool.isa, &queries[lane * d..(lane + 1) * d], &keys, &mut s);
            for (j, s) in s.iter_mut().enumerate() {
                if j >= count || block + j < low || block + j >= high {
                    *s = f32::NEG_INFINITY;
                }
            }
            let state = &mut running[lane];
            let top = s.iter().copied().fold(state.top, f32::max);
            let shrink = if state.top == f32::NEG_INFINITY { 0.0 } else { exp(state.top - top) };
            exponentials(pool.isa, &mut s, top);
            state.total = state.total * shrink + s.iter().sum::<f32>();
            state.top = top;
            let sum = &mut sums[lane * d..(lane + 1) * d];
            if shrink != 1.0 {
                sum.iter_mut().for_each(|v| *v *= shrink);
            }
            // Masked keys have weight 0 and their stale values are finite, so all 32 may be added; but stale
            // values of a short block could be NaN, so only the block's own are.
            weigh(pool.isa, &s[..count], &values, sum);
        }
    }
    for (lane, sum) in sums.chunks_exact_mut(d).enumerate() {
        let total = running[lane].total;
        let factor = if total > 0.0 { 1.0 / total } else { 0.0 };
        sum.iter_mut().for_each(|v| *v *= factor);
        let at = all.place(lane);
        // SAFETY: a task owns its rows and the query heads of its key head.
        #[allow(unsafe_code)]
        T::narrow(sum, unsafe { out.range(at, d) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                (state >> 8) as f32 / (1 << 22) as f32 - 2.0
            })
            .collect()
    }

    /// Plain softmax attention of one query over listed keys, in f64.
    fn naive(q: &[f32], keys: &[&[f32]], values: &[&[f32]], scale: f32) -> Vec<f64> {
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let scores: Vec<f64> = keys.iter().map(|k| dot(q, k) * f64::from(scale)).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        (0..q.len())
            .map(|i| scores.iter().zip(values).map(|(s, v)| (s - top).exp() / total * f64::from(v[i])).sum())
            .collect()
    }

    fn packed_case(isa: Isa, causal: bool, window: usize, heads: usize, kv_heads: usize, d: usize) {
        let starts = [0, 5, 5, 75];
        let t = 75;
        let (q, k, v) = (noise(t * heads * d, 1), noise(t * kv_heads * d, 2), noise(t * kv_heads * d, 3));
        let shape = Heads { heads, kv_heads, d, scale: 0.3, causal, window };
        let mut out = vec![f32::NAN; t * heads * d];
        packed_attention(&Pool::with_isa(2, isa), shape, &q, (&k, &v), &starts, &mut out).unwrap();
        for (start, end) in [(0, 5), (5, 75)] {
            for i in start..end {
                for h in 0..heads {
                    let sees = |j: usize| (!causal || j <= i) && (window == 0 || j + window > i);
                    let row =
                        |x: &'_ [f32], j: usize| x[(j * kv_heads + h * kv_heads / heads) * d..][..d].to_vec();
                    let visible: Vec<usize> = (start..end).filter(|j| sees(*j)).collect();
                    let keys: Vec<Vec<f32>> = visible.iter().map(|j| row(&k, *j)).collect();
                    let values: Vec<Vec<f32>> = visible.iter().map(|j| row(&v, *j)).collect();
                    let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
                    let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
                    let at = (i * heads + h) * d;
                    for (found, expected) in
                        out[at..at + d].iter().zip(naive(&q[at..at + d], &keys, &values, 0.3))
                    {
                        assert!(
                            (f64::from(*found) - expected).abs() < 2e-5,
                            "{isa:?} row {i} head {h}: {found} {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn packed_attention_meets_the_definition() {
        for isa in Isa::available() {
            packed_case(isa, false, 0, 4, 4, 16);
            packed_case(isa, true, 0, 4, 2, 24);
            packed_case(isa, true, 9, 6, 1, 7);
        }
    }

    /// The same tokens in one prefill, in chunks and one by one, through shuffled pages, agree bitwise, and
    /// agree with packed attention.
    #[test]
    fn paging_and_chunking_do_not_matter() {
        let (heads, kv_heads, d, t, block) = (4, 2, 16, 83, 8);
        for (isa, window) in Isa::available().into_iter().flat_map(|i| [(i, 0), (i, 20)]) {
            let pool = Pool::with_isa(2, isa);
            let shape = Heads { heads, kv_heads, d, scale: 0.25, causal: true, window };
            let (q, k, v) = (noise(t * heads * d, 4), noise(t * kv_heads * d, 5), noise(t * kv_heads * d, 6));
            let mut expected = vec![0f32; q.len()];
            packed_attention(&pool, shape, &q, (&k, &v), &[0, t as i32], &mut expected).unwrap();
            let table: Vec<i32> = (0..11).map(|i| (i * 7 + 3) % 11).collect();
            for chunk in [83, 30, 1] {
                let width = kv_heads * d;
                let (mut kc, mut vc) =
                    (vec![f32::NAN; 11 * block * width], vec![f32::NAN; 11 * block * width]);
                let mut out = vec![0f32; q.len()];
                for start in (0..t).step_by(chunk) {
                    let end = t.min(start + chunk);
                    let (starts, lens) = ([0, (end - start) as i32], [end as i32]);
                    let paging = Paging {
                        seq_starts: &starts,
                        kv_lens: &lens,
                        block_table: &table,
                        tokens_per_block: block,
                        pages: 11,
                    };
                    super::super::paging::kv_append(&mut kc, &k[start * width..end * width], width, &paging)
                        .unwrap();
                    super::super::paging::kv_append(&mut vc, &v[start * width..end * width], width, &paging)
                        .unwrap();
                    let rows = start * heads * d..end * heads * d;
                    paged_attention(&pool, shape, &q[rows.clone()], (&kc, &vc), &paging, &mut out[rows])
                        .unwrap();
                }
                assert_eq!(out, expected, "chunks of {chunk} on {isa:?}");
            }
        }
    }

    #[test]
    fn bad_indices_are_errors() {
        let shape = Heads { heads: 1, kv_heads: 1, d: 2, scale: 1.0, causal: true, window: 0 };
        let pool = Pool::new(1);
        let mut out = [0f32; 2];
        let cache = [0f32; 8];
        for (starts, lens, table) in [
            ([0, 2], [1], [0]),
            ([0, 1], [9], [0]),
            ([0, 1], [1], [7]),
            ([0, 1], [1], [-1]),
            ([0, 1], [0], [0]),
        ] {
            let paging = Paging {
                seq_starts: &starts,
                kv_lens: &lens,
                block_table: &table,
                tokens_per_block: 4,
                pages: 1,
            };
            let result = paged_attention(&pool, shape, &[1.0, 1.0], (&cache, &cache), &paging, &mut out);
            assert_eq!(result.unwrap_err().code(), "run/bad-index");
        }
    }
}
