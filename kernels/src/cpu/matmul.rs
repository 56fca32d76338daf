//! Matrix products with packed weights and an epilogue in the tile.
//!
//! A packed weight is a sequence of panels of [`PANEL`] output columns, `[k, 32]` each; segments of columns are padded
//! separately. A thread claims some panels of one block of rows, which it packs for the tile; the inner extent runs in
//! sections that keep the rows in the second-level cache, and in blocks that keep the panel in the first, both in rising
//! order, so that every element is one chain. While a block is multiplied, the one after it is brought nearer.

mod units;

use std::cell::RefCell;
use std::ops::Range;

use super::element::Element;
use super::math::{Activation, activate};
use super::parallel::{Pool, Shared, for_chunks};
use super::simd::{Isa, TILE_ROWS, dispatch, pack_rows, packed_rows_len, part, tile_ahead};
use units::{Rectangle, Units};

pub use super::simd::PANEL;

/// Inner extent of one block: a panel block of f32 is 32 KiB.
const INNER: usize = 256;

/// Most packed numbers of one section of a block of rows: 512 KiB.
const SECTION: usize = 128 << 10;

/// Panels whose sums are held while their sections go by.
const HELD: usize = 8;

/// Working memory of a thread.
#[derive(Default)]
struct Scratch {
    /// The packed rows of the block at hand.
    packed: Vec<f32>,
    /// Sums of the panels at hand.
    sums: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A step between accumulators and store, with its operand.
#[derive(Clone, Copy, Debug)]
pub enum Epilogue<'a, T> {
    /// Adds `[n]` over all segments.
    Bias(&'a [T]),
    /// Applies a function.
    Activation(Activation),
    /// Adds `[m, width]`.
    Residual(&'a [T]),
    /// Adds what the output holds; the last step, and of one output.
    Accumulate,
    /// Multiplies by `[m, width]`.
    Mul(&'a [T]),
    /// Two equal segments become `activation(gate) * up`; only a bias may stand before it.
    Glu(Activation),
}

/// One product. Output `s` is `[m, n_s]` for segment `s`; a gated product has one output.
pub struct Matmul<'a, T, B> {
    /// Rows of `a`.
    pub m: usize,
    /// Inner extent.
    pub k: usize,
    /// `[m, k]`
    pub a: &'a [T],
    /// Packed weight of all segments.
    pub b: &'a [B],
    /// Columns of each segment.
    pub segments: &'a [usize],
    /// Steps before the store.
    pub epilogue: &'a [Epilogue<'a, T>],
}

/// Elements of a weight packed with these segments.
pub fn packed_len(segments: &[usize], k: usize) -> usize {
    segments.iter().map(|n| n.div_ceil(PANEL) * PANEL * k).sum()
}

/// Packs `w [n, k]`, `n` the sum of `segments`.
pub fn pack_matrix<T: Element>(w: &[T], segments: &[usize], k: usize) -> Vec<T> {
    let mut packed = vec![T::default(); packed_len(segments, k)];
    let mut panels = packed.chunks_exact_mut((PANEL * k).max(1));
    let mut row = 0;
    for n in segments {
        for first in (0..*n).step_by(PANEL) {
            let Some(panel) = panels.next() else { return packed };
            for j in 0..PANEL.min(n - first) {
                for i in 0..k {
                    panel[i * PANEL + j] = w[(row + first + j) * k + i];
                }
            }
        }
        row += n;
    }
    packed
}

/// How an unpacked weight lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `[n, k]`
    Rows,
    /// `[k, n]`
    Columns,
    /// Packed in panels of another width.
    Panels(usize),
}

/// Packs a weight of any order, panel by panel. `w` holds every row of `segments`; this is asserted.
pub fn repack<T: Element>(pool: &Pool, w: &[T], order: Order, segments: &[usize], k: usize) -> Vec<T> {
    let n: usize = segments.iter().sum();
    let needed = match order {
        Order::Rows | Order::Columns => n * k,
        Order::Panels(width) => segments.iter().map(|s| s.div_ceil(width) * width * k).sum(),
    };
    assert!(w.len() >= needed, "the weight is too short");
    let mut packed = vec![T::default(); packed_len(segments, k)];
    let targets = targets(segments);
    for_chunks(pool, &mut packed, PANEL * k, n * k, |index, panel| {
        let Target { column, segment, within, width } = targets[index];
        match order {
            Order::Rows => {
                const BLOCK: usize = 64;
                for start in (0..k).step_by(BLOCK) {
                    let count = BLOCK.min(k - start);
                    for j in 0..width {
                        let row = &w[(column + j) * k + start..][..count];
                        let lane = panel[start * PANEL + j..].iter_mut().step_by(PANEL);
                        lane.zip(row).for_each(|(p, v)| *p = *v);
                    }
                }
            }
            Order::Columns => {
                for (i, row) in panel.chunks_exact_mut(PANEL).enumerate() {
                    row[..width].copy_from_slice(&w[i * n + column..][..width]);
                }
            }
            Order::Panels(p) => {
                let before: usize = segments[..segment].iter().map(|s| s.div_ceil(p)).sum();
                for (i, row) in panel.chunks_exact_mut(PANEL).enumerate() {
                    for (j, value) in row[..width].iter_mut().enumerate() {
                        let at = within + j;
                        *value = w[((before + at / p) * k + i) * p + at % p];
                    }
                }
            }
        }
    });
    packed
}

/// Where a panel's columns go.
#[derive(Clone, Copy)]
struct Target {
    /// First column over all segments, for the bias.
    column: usize,
    /// Segment.
    segment: usize,
    /// First column within the segment.
    within: usize,
    /// Columns that exist.
    width: usize,
}

fn targets(segments: &[usize]) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut column = 0;
    for (segment, n) in segments.iter().enumerate() {
        for within in (0..*n).step_by(PANEL) {
            targets.push(Target { column: column + within, segment, within, width: PANEL.min(n - within) });
        }
        column += n;
    }
    targets
}

impl<T: Element, B: Element> Matmul<'_, T, B> {
    fn gated(&self) -> bool {
        self.epilogue.iter().any(|e| matches!(e, Epilogue::Glu(_)))
    }

    /// Panels of all segments; of a gated product, of each of the two.
    pub fn panels(&self) -> usize {
        let all: usize = self.segments.iter().map(|n| n.div_ceil(PANEL)).sum();
        if self.gated() { all / 2 } else { all }
    }

    /// Runs the product. `outputs` hold `m * n_s` elements each; sizes are the caller's promise and are asserted.
    pub fn run<O: Element>(&self, pool: &Pool, outputs: &mut [&mut [O]]) {
        self.run_panels(pool, 0..self.panels(), outputs);
    }

    /// Runs the part of the product that these panels make and writes its columns only, each bit as [`Matmul::run`]
    /// would. `b` holds nothing but these panels; of a gated product, first those of the gate and then those of the other
    /// segment. Everything else is whole.
    pub fn run_panels<O: Element>(&self, pool: &Pool, range: Range<usize>, outputs: &mut [&mut [O]]) {
        let Matmul { m, k, a, b, segments, epilogue } = *self;
        let (glu, whole) = (self.gated(), self.panels());
        assert!(range.start <= range.end && range.end <= whole, "panels outside the weight");
        // A gated product computes panel p of both segments together.
        let (first, panels) = (range.start, range.len());
        let parts = if glu { 2 } else { 1 };
        assert!(a.len() >= m * k && b.len() >= parts * panels * PANEL * k, "operands are too short");
        assert_eq!(outputs.len(), if glu { 1 } else { segments.len() }, "one output per segment");
        assert!(outputs.iter().zip(segments).all(|(o, n)| o.len() >= m * n), "outputs are too short");
        if m == 0 || panels == 0 {
            return;
        }
        let accumulates = matches!(epilogue.last(), Some(Epilogue::Accumulate));
        let after = epilogue.iter().position(|e| matches!(e, Epilogue::Glu(_))).map_or(0, |p| p + 1);
        let all = targets(segments);
        let units = Units::new(m, panels, PANEL * k * size_of::<B>(), pool.threads());
        let shared: Vec<Shared<'_, O>> = outputs.iter_mut().map(|o| Shared::new(o)).collect();
        let finish = |rows: Range<usize>, panel: usize, acc: &mut [f32]| {
            let target = all[first + panel];
            let (acc, up) = acc.split_at_mut(rows.len() * PANEL);
            if glu {
                gate(pool, epilogue, target, all[first + panel + whole], acc, up);
            }
            let width = segments[target.segment];
            finish(pool, &epilogue[after..], target, rows.start, width, acc);
            for (r, row) in acc.chunks_exact_mut(PANEL).enumerate() {
                let start = (rows.start + r) * width + target.within;
                // SAFETY: rectangles of rows and panels are disjoint, so are those of the outputs.
                #[allow(unsafe_code)]
                let out = unsafe { shared[target.segment].range(start, target.width) };
                if accumulates {
                    combine(pool.isa, true, row, out);
                }
                store(pool.isa, &row[..target.width], out);
            }
        };
        let work = |scratch: &mut Scratch| {
            let Scratch { packed, sums } = scratch;
            let mut held = None;
            while let Some(run) = units.claim() {
                for rectangle in units.rectangles(run) {
                    let block = rectangle.block.clone();
                    let rows = &a[block.start * k..block.end * k];
                    let packed = match T::as_f32(rows) {
                        Some(row) if block.len() == 1 => row,
                        _ => {
                            if held.as_ref() != Some(&block) {
                                packed.resize(packed_rows_len(block.len(), k).max(packed.len()), 0.0);
                                pack_rows(pool.isa, rows, k, block.len(), k, packed);
                                held = Some(block);
                            }
                            &packed[..]
                        }
                    };
                    let weights = Weights { b, k, panels, parts };
                    multiply(pool.isa, packed, &weights, &rectangle, sums, &finish);
                }
            }
        };
        // One task a thread; who comes late finds less left.
        pool.run(pool.threads(), m * k * panels * PANEL, |_| {
            SCRATCH.with_borrow_mut(|scratch| work(scratch))
        });
    }
}

/// Packed weights: `panels` of each of `parts` segments that are computed together.
struct Weights<'a, B> {
    b: &'a [B],
    k: usize,
    panels: usize,
    parts: usize,
}

impl<'a, B> Weights<'a, B> {
    /// Rows `section` of a panel.
    fn section(&self, panel: usize, part: usize, section: Range<usize>) -> &'a [B] {
        let panel = (part * self.panels + panel) * PANEL * self.k;
        &self.b[panel + section.start * PANEL..panel + section.end * PANEL]
    }
}

/// Multiplies a rectangle; `finish` gets rows, panel and sums `[parts, rows, 32]`.
fn multiply<B: Element>(
    isa: Isa,
    packed: &[f32],
    weights: &Weights<'_, B>,
    rectangle: &Rectangle,
    sums: &mut Vec<f32>,
    finish: &impl Fn(Range<usize>, usize, &mut [f32]),
) {
    let Weights { k, parts, .. } = *weights;
    let Rectangle { block, panels, .. } = rectangle;
    let tiles = Tiles { rows: block.len(), wanted: rectangle.tiles.clone(), k };
    let rows = tiles.rows_wanted();
    let size = rows.len() * PANEL;
    let sections = (block.len() * k).div_ceil(SECTION).max(1);
    let slices = if sections == 1 { panels.len() } else { panels.len().div_ceil(HELD) };
    for slice in 0..slices {
        let own = part(panels.len(), slices, slice);
        let own = panels.start + own.start..panels.start + own.end;
        let count = own.len() * parts;
        if sums.len() < count * size {
            sums.resize(count * size, 0.0);
        }
        let sums = &mut sums[..count * size];
        sums.fill(0.0);
        // Sections slowest, the parts of a panel side by side.
        let step = |index: usize| {
            let (section, slot) = (part(k, sections, index / count), index % count);
            (section.start, weights.section(own.start + slot / parts, slot % parts, section))
        };
        for index in 0..sections * count {
            let (start, columns) = step(index);
            let next = match index + 1 {
                next if next < sections * count => step(next).1,
                _ if own.end < weights.panels => weights.section(own.end, 0, part(k, sections, 0)),
                _ => &[],
            };
            let sums = &mut sums[index % count * size..][..size];
            accumulate(isa, packed, &tiles, start, columns, next, sums);
        }
        for (panel, sums) in own.zip(sums.chunks_exact_mut((parts * size).max(1))) {
            finish(block.start + rows.start..block.start + rows.end, panel, sums);
        }
    }
}

/// Tiles of packed rows.
struct Tiles {
    /// Rows of the block.
    rows: usize,
    /// Those of its tiles that are wanted.
    wanted: Range<usize>,
    /// Inner extent.
    k: usize,
}

impl Tiles {
    /// The rows of a tile.
    fn rows_of(&self, index: usize) -> Range<usize> {
        part(self.rows, self.rows.div_ceil(TILE_ROWS), index)
    }

    /// The rows of all wanted tiles.
    fn rows_wanted(&self) -> Range<usize> {
        self.rows_of(self.wanted.start).start..self.rows_of(self.wanted.end - 1).end
    }
}

/// Adds the packed rows times a section of a panel, from row `first` of it on, to `sums [rows, 32]`; `next` is what is
/// wanted after it.
fn accumulate<B: Element>(
    isa: Isa,
    packed: &[f32],
    tiles: &Tiles,
    first: usize,
    section: &[B],
    next: &[B],
    sums: &mut [f32],
) {
    let base = tiles.rows_wanted().start;
    let (count, k) = (tiles.wanted.len(), section.len() / PANEL);
    for start in (0..k).step_by(INNER) {
        let (columns, rest) = section[start * PANEL..].split_at(INNER.min(k - start) * PANEL);
        let next = if rest.is_empty() { next } else { rest };
        let next = &next[..next.len().min(INNER * PANEL)];
        for (turn, index) in tiles.wanted.clone().enumerate() {
            let rows = tiles.rows_of(index);
            let a = &packed[rows.start * tiles.k + (first + start) * rows.len()..];
            let sums = &mut sums[(rows.start - base) * PANEL..(rows.end - base) * PANEL];
            // A single tile reads the panel once and asks for rows just ahead of itself.
            let ahead = if count == 1 { &[] } else { &next[part(next.len(), count, turn)] };
            tile_ahead(isa, a, rows.len(), rows.len(), columns.len() / PANEL, columns, ahead, sums);
        }
    }
}

dispatch! {
    /// Rounds one row of a panel to its element type.
    pub fn store<O: Element>(row: &[f32], out: &mut [O]) {
        O::narrow(row, out);
    }
}

dispatch! {
    /// Adds `bias` to every row of 32.
    pub fn add_row<T: Element>(bias: &[T], acc: &mut [f32]) {
        let mut wide = [0f32; PANEL];
        for (w, b) in wide.iter_mut().zip(bias) {
            *w = b.to_f32();
        }
        for row in acc.chunks_exact_mut(PANEL) {
            for (v, b) in row.iter_mut().zip(&wide) {
                *v += b;
            }
        }
    }
}

dispatch! {
    /// Adds (or multiplies by) one row of another tensor.
    pub fn combine<T: Element>(add: bool, row: &mut [f32], x: &[T]) {
        if add {
            for (v, x) in row.iter_mut().zip(x) {
                *v += x.to_f32();
            }
        } else {
            for (v, x) in row.iter_mut().zip(x) {
                *v *= x.to_f32();
            }
        }
    }
}

fn gate<T: Element>(
    pool: &Pool,
    epilogue: &[Epilogue<'_, T>],
    left: Target,
    right: Target,
    acc: &mut [f32],
    up: &mut [f32],
) {
    for step in epilogue {
        match step {
            Epilogue::Bias(bias) => {
                add_row(pool.isa, &bias[left.column..][..left.width], acc);
                add_row(pool.isa, &bias[right.column..][..right.width], up);
            }
            Epilogue::Glu(f) => {
                activate(pool.isa, *f, acc);
                acc.iter_mut().zip(up.iter()).for_each(|(g, u)| *g *= u);
                return;
            }
            _ => {}
        }
    }
}

fn finish<T: Element>(
    pool: &Pool,
    epilogue: &[Epilogue<'_, T>],
    target: Target,
    first_row: usize,
    width: usize,
    acc: &mut [f32],
) {
    for step in epilogue {
        match step {
            Epilogue::Bias(bias) => add_row(pool.isa, &bias[target.column..][..target.width], acc),
            Epilogue::Activation(f) => activate(pool.isa, *f, acc),
            Epilogue::Residual(x) | Epilogue::Mul(x) => {
                let add = matches!(step, Epilogue::Residual(_));
                for (r, row) in acc.chunks_exact_mut(PANEL).enumerate() {
                    let at = (first_row + r) * width + target.within;
                    combine(pool.isa, add, row, &x[at..at + target.width]);
                }
            }
            Epilogue::Glu(_) | Epilogue::Accumulate => {}
        }
    }
}

/// Batched product of two activations: `a [batch, m, k]`, `b [batch, k, n]` or `[batch, n, k]` when transposed, `out
/// [batch, m, n]`. Batch strides of 0 repeat an operand.
#[allow(clippy::too_many_arguments)]
pub fn matmul_activations<T: Element, O: Element>(
    pool: &Pool,
    (m, n, k): (usize, usize, usize),
    transpose_b: bool,
    offsets: &[(usize, usize)],
    a: &[T],
    b: &[T],
    out: &mut [O],
) {
    let order = if transpose_b { Order::Rows } else { Order::Columns };
    let mut packed: Option<(usize, Vec<T>)> = None;
    for ((a_at, b_at), out) in offsets.iter().zip(out.chunks_mut((m * n).max(1))) {
        let b = match packed.take() {
            Some((at, same)) if at == *b_at => same,
            _ => repack(pool, &b[*b_at..b_at + n * k], order, &[n], k),
        };
        let product = Matmul { m, k, a: &a[*a_at..a_at + m * k], b: &b, segments: &[n], epilogue: &[] };
        product.run(pool, &mut [out]);
        packed = Some((*b_at, b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use half::bf16;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn reference(m: usize, n: usize, k: usize, a: &[f32], w: &[f32]) -> Vec<f64> {
        (0..m * n)
            .map(|i| (0..k).map(|l| f64::from(a[i / n * k + l]) * f64::from(w[i % n * k + l])).sum())
            .collect()
    }

    fn close(found: &[f32], expected: &[f64], tolerance: f64) {
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!(
                (f64::from(*f) - e).abs() <= tolerance * (1.0 + e.abs()),
                "element {i}: {f} instead of {e}"
            );
        }
    }

    #[test]
    fn odd_shapes_on_every_instruction_set() {
        for isa in Isa::available() {
            for (m, n, k) in [(1, 1, 1), (1, 33, 7), (3, 64, 129), (13, 31, 5), (97, 70, 600), (5, 100, 1025)]
            {
                let (a, w) = (noise(m * k, 1), noise(n * k, 2));
                let packed = pack_matrix(&w, &[n], k);
                let mut out = vec![f32::NAN; m * n];
                let pool = Pool::with_isa(2, isa);
                Matmul { m, k, a: &a, b: &packed, segments: &[n], epilogue: &[] }.run(&pool, &mut [&mut out]);
                close(&out, &reference(m, n, k, &a, &w), 1e-4);
            }
        }
    }

    /// Rows in halves of one block and in two blocks, each in sections and with more panels than are held at once.
    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        for isa in Isa::available() {
            for (m, n, k) in [(113usize, 290, 1300), (131, 75, 2100)] {
                assert!(m / m.div_ceil(128) * k > SECTION, "the inner extent has sections");
                let (a, w) = (noise(m * k, 3), noise(n * k, 4));
                let packed = pack_matrix(&w, &[n], k);
                let mut all = vec![0f32; m * n];
                let pool = Pool::with_isa(2, isa);
                Matmul { m, k, a: &a, b: &packed, segments: &[n], epilogue: &[] }.run(&pool, &mut [&mut all]);
                for r in [0, 1, 50, m / 2, m - 1] {
                    let mut one = vec![0f32; n];
                    let alone = Pool::with_isa(1, isa);
                    let row = &a[r * k..(r + 1) * k];
                    Matmul { m: 1, k, a: row, b: &packed, segments: &[n], epilogue: &[] }
                        .run(&alone, &mut [&mut one]);
                    assert_eq!(one, all[r * n..(r + 1) * n], "row {r} on {isa:?}");
                }
            }
        }
    }

    #[test]
    fn segments_bias_gate_and_residual() {
        // One tile, and halves of a block in sections.
        for (m, k) in [(14, 40), (127, 1040)] {
            segments_of(m, k);
        }
    }

    fn segments_of(m: usize, k: usize) {
        let pool = Pool::new(2);
        let segments = [45, 45];
        let (a, w, bias, res) = (noise(m * k, 5), noise(90 * k, 6), noise(90, 7), noise(m * 45, 8));
        // Sums near 1, as the tolerance expects of factors of a product.
        let w: Vec<f32> = w.iter().map(|w| w / (k as f32).sqrt()).collect();
        let packed = pack_matrix(&w, &segments, k);
        let (mut x, mut y) = (vec![0f32; m * 45], vec![0f32; m * 45]);
        let epilogue = [Epilogue::Bias(&bias[..]), Epilogue::Activation(Activation::Relu)];
        let product = Matmul { m, k, a: &a, b: &packed, segments: &segments, epilogue: &epilogue };
        product.run(&pool, &mut [&mut x, &mut y]);
        let plain = reference(m, 90, k, &a, &w);
        let with_bias = |r: usize, c: usize| plain[r * 90 + c] + f64::from(bias[c]);
        let left: Vec<f64> = (0..m * 45).map(|i| with_bias(i / 45, i % 45).max(0.0)).collect();
        let right: Vec<f64> = (0..m * 45).map(|i| with_bias(i / 45, i % 45 + 45).max(0.0)).collect();
        close(&x, &left, 1e-4);
        close(&y, &right, 1e-4);
        let epilogue =
            [Epilogue::Bias(&bias[..]), Epilogue::Glu(Activation::Silu), Epilogue::Residual(&res[..])];
        Matmul { epilogue: &epilogue, ..product }.run(&pool, &mut [&mut x]);
        let gated: Vec<f64> = (0..m * 45)
            .map(|i| {
                let (g, u) = (with_bias(i / 45, i % 45), with_bias(i / 45, i % 45 + 45));
                g / (1.0 + (-g).exp()) * u + f64::from(res[i])
            })
            .collect();
        close(&x, &gated, 1e-4);
    }

    /// Panels one by one, in uneven runs, and all at once give the same bits, with what stands in other columns left alone.
    #[test]
    fn panels_in_runs_are_the_whole() {
        let (k, n) = (1040, 100);
        let segments = [n, n];
        let (w, bias) = (noise(2 * n * k, 15), noise(2 * n, 16));
        let packed = pack_matrix(&w, &segments, k);
        for (m, threads) in [(1, 1), (1, 2), (5, 2), (127, 2), (130, 2)] {
            let pool = Pool::new(threads).eager();
            let (a, x) = (noise(m * k, 14), noise(m * n, 17));
            let plain = [Epilogue::Bias(&bias[..]), Epilogue::Activation(Activation::Silu)];
            let gated = [Epilogue::Bias(&bias[..]), Epilogue::Glu(Activation::Silu), Epilogue::Mul(&x[..])];
            let adding = [Epilogue::Glu(Activation::Gelu), Epilogue::Accumulate];
            for (epilogue, parts) in [(&plain[..], 1), (&gated[..], 2), (&adding[..], 2)] {
                let product = Matmul { m, k, a: &a, b: &packed, segments: &segments, epilogue };
                let panels = product.panels();
                assert_eq!(panels, 8 / parts);
                let outputs = || vec![x.clone(); 3 - parts];
                let run = |runs: &[Range<usize>]| {
                    let mut outputs = outputs();
                    for range in runs {
                        let mut b = Vec::new();
                        for part in 0..parts {
                            let from = (part * panels + range.start) * PANEL * k;
                            b.extend_from_slice(&packed[from..from + range.len() * PANEL * k]);
                        }
                        let mut refs: Vec<&mut [f32]> = outputs.iter_mut().map(|o| &mut o[..]).collect();
                        Matmul { b: &b, ..product }.run_panels(&pool, range.clone(), &mut refs);
                    }
                    outputs
                };
                let mut whole = outputs();
                let mut refs: Vec<&mut [f32]> = whole.iter_mut().map(|o| &mut o[..]).collect();
                product.run(&pool, &mut refs);
                let single: Vec<Range<usize>> = (0..panels).map(|p| p..p + 1).collect();
                assert_eq!(run(&single), whole);
                assert_eq!(run(&[0..3, 3..3, 3..panels]), whole);
                // The second panel alone: the first columns stay.
                let only = 1..2;
                let mut one = vec![run(std::slice::from_ref(&only)).swap_remove(0)];
                let (found, before) = (one.swap_remove(0), &x);
                for (i, value) in found.iter().enumerate() {
                    let expected =
                        if (PANEL..2 * PANEL).contains(&(i % n)) { whole[0][i] } else { before[i] };
                    assert_eq!(*value, expected);
                }
            }
        }
    }

    #[test]
    fn bf16_weights_widen_exactly() {
        let (m, n, k) = (9, 40, 77);
        let narrow = |v: Vec<f32>| v.into_iter().map(<bf16 as Element>::from_f32).collect::<Vec<bf16>>();
        let (a, w) = (narrow(noise(m * k, 9)), narrow(noise(n * k, 10)));
        let wide = |v: &[bf16]| v.iter().map(|x| Element::to_f32(*x)).collect::<Vec<f32>>();
        for isa in Isa::available() {
            let mut out = vec![0f32; m * n];
            let packed = pack_matrix(&w, &[n], k);
            let product = Matmul { m, k, a: &a, b: &packed, segments: &[n], epilogue: &[] };
            product.run(&Pool::with_isa(2, isa), &mut [&mut out]);
            close(&out, &reference(m, n, k, &wide(&a), &wide(&w)), 1e-4);
        }
    }

    #[test]
    fn every_order_packs_to_the_same_panels() {
        let (segments, k) = ([45, 3], 70);
        let w = noise(48 * k, 13);
        let expected = pack_matrix(&w, &segments, k);
        let turned: Vec<f32> = (0..48 * k).map(|i| w[i % 48 * k + i / 48]).collect();
        let mut narrow = vec![0f32; (9 + 1) * 5 * k];
        for (row, source) in w.chunks_exact(k).enumerate() {
            let (panel, lane) = if row < 45 { (row / 5, row % 5) } else { (9, row - 45) };
            source.iter().enumerate().for_each(|(i, v)| narrow[(panel * k + i) * 5 + lane] = *v);
        }
        let pool = Pool::new(2);
        for (order, w) in [(Order::Rows, &w), (Order::Columns, &turned), (Order::Panels(5), &narrow)] {
            assert_eq!(repack(&pool, w, order, &segments, k), expected, "{order:?}");
        }
    }

    #[test]
    fn activations_multiply_in_both_orientations() {
        let (m, n, k) = (5, 6, 7);
        let (a, w) = (noise(2 * m * k, 11), noise(n * k, 12));
        let turned: Vec<f32> = (0..n * k).map(|i| w[i % n * k + i / n]).collect();
        let expected: Vec<f64> =
            (0..2).flat_map(|b| reference(m, n, k, &a[b * m * k..(b + 1) * m * k], &w)).collect();
        for (transposed, b) in [(true, &w), (false, &turned)] {
            let mut out = vec![0f32; 2 * m * n];
            matmul_activations(&Pool::new(1), (m, n, k), transposed, &[(0, 0), (m * k, 0)], &a, b, &mut out);
            close(&out, &expected, 1e-5);
        }
    }
}
