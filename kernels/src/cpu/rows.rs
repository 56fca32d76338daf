//! Pointwise regions with row reductions: a block of rows at a time goes through the phases of the region, tile by tile,
//! while it is in cache.
//!
//! A block is as many whole rows as fit one tile, or one longer row in several tiles. So a row is cut at the same places
//! whatever stands beside it, and its sums are added in the same order: neither threads nor other rows change a bit.

use millrace_ir::ops::phases::Phases;
use millrace_ir::ops::pointwise::{Pointwise, Source, Step};
use millrace_ir::ops::reduce::ReduceFn;

use super::parallel::Pool;
use super::program::{Input, Out, SharedOut, TILE, Tile, Tiles, fetch, share, store};
use super::reduce::fold_row;

/// Elements worth a task.
const TASK: usize = 16 * TILE;

/// The rows of a region.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Number of rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
}

/// Runs a region over all rows. The layouts of inputs that `phases` has per row are over one element per row, those of
/// the others over all elements; result `i` has one element per row or is full, as `region.out[i]` says.
pub fn run(
    pool: &Pool,
    region: &Pointwise,
    phases: &Phases,
    Rows { rows, columns }: Rows,
    inputs: &[Input<'_>],
    outputs: Vec<Out<'_>>,
) {
    let tall = (TILE / columns.max(1)).clamp(1, TILE);
    let blocks_per_task = (TASK / (tall * columns).max(1)).max(1);
    let outputs = share(outputs);
    let visits: Vec<Visit> = (0..phases.count).map(|phase| Visit::new(region, phases, phase)).collect();
    let work = rows.saturating_mul(columns).saturating_mul((region.body.len() + 2) * 4);
    pool.run(rows.div_ceil(tall * blocks_per_task), work, |task| {
        let sources: Vec<Source> = region.out.iter().map(|o| o.source).collect();
        let mut block = Block {
            pool,
            region,
            phases,
            columns,
            inputs,
            outputs: &outputs,
            tiles: Tiles::new(inputs.len(), &region.body, &sources),
            totals: vec![[0.0; TILE]; region.body.len()],
            kept: phases.kept.iter().map(|k| vec![0.0; if *k { columns * tall } else { 0 }]).collect(),
        };
        let first = task * tall * blocks_per_task;
        for row in (first..rows.min(first + tall * blocks_per_task)).step_by(tall) {
            block.run(row, tall.min(rows - row), &visits);
        }
    });
}

/// What one phase does.
struct Visit {
    /// Steps with one value per row that become known, reductions aside.
    once: Vec<usize>,
    /// Steps with a value per element.
    each: Vec<usize>,
    /// Inputs with a value per element that are read.
    load: Vec<usize>,
    /// Steps of earlier phases with a value per element that are read.
    back: Vec<usize>,
    /// Reductions that become complete at the end.
    reduce: Vec<usize>,
    /// Whether results of the region's shape are stored.
    stores: bool,
}

impl Visit {
    fn new(region: &Pointwise, phases: &Phases, phase: usize) -> Visit {
        let steps = || region.body.iter().enumerate();
        let reduces = |step: &Step| matches!(step, Step::Reduce(..));
        let here = |t: usize| phases.phase[t] == phase;
        let pick = |wanted: &dyn Fn(usize, &Step) -> bool| -> Vec<usize> {
            steps().filter(|(t, step)| wanted(*t, step)).map(|(t, _)| t).collect()
        };
        let once = pick(&|t, step| here(t) && phases.per_row[t] && !reduces(step));
        let each = pick(&|t, _| here(t) && !phases.per_row[t]);
        let reduce = pick(&|t, step| reduces(step) && phases.phase[t] == phase + 1);
        let stores = phase + 1 == phases.count && region.out.iter().any(|o| !o.per_row);
        let mut read: Vec<Source> =
            each.iter().chain(&reduce).flat_map(|t| region.body[*t].sources()).collect();
        if stores {
            read.extend(region.out.iter().filter(|o| !o.per_row).map(|o| o.source));
        }
        let (mut load, mut back) = (Vec::new(), Vec::new());
        for source in read.iter().filter(|s| !phases.is_per_row(s)) {
            match source {
                Source::Input(i) => load.push(*i),
                Source::Step(t) if phases.phase[*t] < phase => back.push(*t),
                Source::Step(_) | Source::Const(_) => {}
            }
        }
        for list in [&mut load, &mut back] {
            list.sort_unstable();
            list.dedup();
        }
        Visit { once, each, load, back, reduce, stores }
    }

    fn has_tiles(&self) -> bool {
        self.stores || !self.reduce.is_empty() || !self.each.is_empty()
    }
}

/// The rows at hand.
struct Block<'a> {
    pool: &'a Pool,
    region: &'a Pointwise,
    phases: &'a Phases,
    columns: usize,
    inputs: &'a [Input<'a>],
    outputs: &'a [SharedOut<'a>],
    /// Values of the tile at hand. What is per row stands there once per element.
    tiles: Tiles,
    /// Values per row of the steps that have such.
    totals: Vec<Tile>,
    /// Elements of all rows of the steps that are kept.
    kept: Vec<Vec<f32>>,
}

impl Block<'_> {
    /// Computes rows `row..row + count`.
    fn run(&mut self, row: usize, count: usize, visits: &[Visit]) {
        let mut per_row: Vec<(usize, Tile)> = Vec::new();
        for (i, input) in self.inputs.iter().enumerate().filter(|(i, _)| self.phases.inputs[*i]) {
            let mut values = [0.0; TILE];
            fetch(input, self.outputs, row, 1, &mut values[..count]);
            per_row.push((i, values));
        }
        let len = count * self.columns;
        for visit in visits {
            self.once(&per_row, visit, count);
            for (i, values) in &per_row {
                spread(&values[..count], self.columns, &mut self.tiles.inputs[*i]);
            }
            for t in (0..self.totals.len()).filter(|t| self.phases.per_row[*t]) {
                spread(&self.totals[t][..count], self.columns, &mut self.tiles.steps[t]);
            }
            for t in &visit.reduce {
                let Step::Reduce(f, _) = self.region.body[*t] else { continue };
                self.totals[*t][..count].fill(f.start() as f32);
            }
            if visit.has_tiles() {
                for start in (0..len).step_by(TILE) {
                    self.tile(row * self.columns, start, TILE.min(len - start), visit);
                }
            }
            for t in &visit.reduce {
                if let Step::Reduce(ReduceFn::Mean, _) = self.region.body[*t] {
                    self.totals[*t][..count].iter_mut().for_each(|v| *v /= self.columns as f32);
                }
            }
        }
        for (out, output) in self.region.out.iter().zip(self.outputs).filter(|(out, _)| out.per_row) {
            let constant;
            let values = match &out.source {
                Source::Input(i) => match per_row.iter().find(|(input, _)| input == i) {
                    Some((_, values)) => values,
                    None => continue,
                },
                Source::Step(t) => &self.totals[*t],
                Source::Const(c) => {
                    constant = [*c as f32; TILE];
                    &constant
                }
            };
            store(output, row, &values[..count]);
        }
    }

    /// Computes the steps that have one value per row.
    fn once(&mut self, per_row: &[(usize, Tile)], visit: &Visit, count: usize) {
        if visit.once.is_empty() {
            return;
        }
        for (i, values) in per_row {
            self.tiles.inputs[*i] = *values;
        }
        for t in (0..self.totals.len()).filter(|t| self.phases.per_row[*t]) {
            self.tiles.steps[t] = self.totals[t];
        }
        for t in &visit.once {
            self.tiles.apply(self.pool.isa, *t, &self.region.body[*t], count);
            self.totals[*t] = self.tiles.steps[*t];
        }
    }

    /// One tile of a phase: elements `start..start + count` of the block that begins at element `base`.
    fn tile(&mut self, base: usize, start: usize, count: usize, visit: &Visit) {
        let Block { pool, region, phases, columns, inputs, outputs, tiles, totals, kept } = self;
        for i in &visit.load {
            fetch(&inputs[*i], outputs, base + start, *columns, &mut tiles.inputs[*i][..count]);
        }
        for t in &visit.back {
            tiles.steps[*t][..count].copy_from_slice(&kept[*t][start..start + count]);
        }
        for t in &visit.each {
            tiles.apply(pool.isa, *t, &region.body[*t], count);
            if phases.kept[*t] {
                kept[*t][start..start + count].copy_from_slice(&tiles.steps[*t][..count]);
            }
        }
        for t in &visit.reduce {
            let Step::Reduce(f, source) = &region.body[*t] else { continue };
            let values = &tiles.get(source)[..count];
            // One row, or a piece of it, or several whole ones.
            for (total, values) in totals[*t].iter_mut().zip(values.chunks(*columns)) {
                fold_row(pool.isa, *f, values, total);
            }
        }
        if visit.stores {
            for (out, output) in region.out.iter().zip(outputs.iter()).filter(|(out, _)| !out.per_row) {
                store(output, base + start, &tiles.get(&out.source)[..count]);
            }
        }
    }
}

/// One value per row, repeated along the row: of all rows of a tile, or of the only one.
fn spread(values: &[f32], columns: usize, tile: &mut Tile) {
    match values {
        [one] => tile.fill(*one),
        _ => tile.chunks_mut(columns.max(1)).zip(values).for_each(|(row, v)| row.fill(*v)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::program::{Data, Layout};
    use millrace_ir::DType;
    use millrace_ir::ops::binary::BinaryFn;
    use millrace_ir::ops::pointwise::Out as Result;
    use millrace_ir::ops::unary::UnaryFn;

    /// `e = exp(x s - max(x s))`, `e / sum e`, and the sums.
    fn softmax() -> Pointwise {
        let (i, t) = (Source::Input, Source::Step);
        Pointwise {
            body: vec![
                Step::Binary(BinaryFn::Mul, i(0), i(1)),
                Step::Reduce(ReduceFn::Max, t(0)),
                Step::Binary(BinaryFn::Sub, t(0), t(1)),
                Step::Unary(UnaryFn::Exp, t(2)),
                Step::Reduce(ReduceFn::Sum, t(3)),
                Step::Unary(UnaryFn::Recip, t(4)),
                Step::Binary(BinaryFn::Mul, t(3), t(5)),
            ]
            .into(),
            out: vec![Result::full(t(6)), Result::row(t(4))].into(),
            dtypes: vec![DType::F32; 2].into(),
        }
    }

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin() * 3.0).collect()
    }

    /// Rows `rows` of the softmax of `x [.., columns]` with one scale per row.
    fn run_softmax(pool: &Pool, x: &[f32], scale: &[f32], columns: usize) -> (Vec<f32>, Vec<f32>) {
        let region = softmax();
        let inputs = [
            Input { data: Data::F32(x), layout: Layout::Full },
            Input { data: Data::F32(scale), layout: Layout::Full },
        ];
        let (mut y, mut sums) = (vec![f32::NAN; x.len()], vec![f32::NAN; scale.len()]);
        let rows = Rows { rows: scale.len(), columns };
        let outputs = vec![Out::F32(&mut y), Out::F32(&mut sums)];
        run(pool, &region, &region.phases(&[false, true]), rows, &inputs, outputs);
        (y, sums)
    }

    #[test]
    fn rows_of_every_length_meet_the_definition() {
        for isa in Isa::available() {
            for (rows, columns) in [(5, 1), (300, 3), (40, 100), (3, 255), (3, 256), (4, 257), (2, 5000)] {
                let (x, scale) = (values(rows * columns), values(rows));
                let (y, sums) = run_softmax(&Pool::with_isa(2, isa).eager(), &x, &scale, columns);
                for r in 0..rows {
                    let row: Vec<f64> =
                        x[r * columns..][..columns].iter().map(|v| f64::from(v * scale[r])).collect();
                    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = row.iter().map(|v| (v - top).exp()).sum();
                    assert!((f64::from(sums[r]) - total).abs() < 1e-5 * total, "{} {total}", sums[r]);
                    for (found, v) in y[r * columns..].iter().zip(&row) {
                        let expected = (v - top).exp() / total;
                        assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
                    }
                }
            }
        }
    }

    /// A row gives the same bits alone and among others.
    #[test]
    fn other_rows_do_not_matter() {
        let pool = Pool::new(1);
        for columns in [1, 7, 100, 130, 300, 1000] {
            let rows = 9;
            let (x, scale) = (values(rows * columns), values(rows));
            let (all, sums) = run_softmax(&Pool::new(2).eager(), &x, &scale, columns);
            for r in 0..rows {
                let (y, sum) = run_softmax(&pool, &x[r * columns..][..columns], &scale[r..=r], columns);
                assert_eq!((&all[r * columns..][..columns], sums[r]), (&y[..], sum[0]), "{columns}");
            }
        }
    }

    #[test]
    fn an_operand_may_be_the_output() {
        let mut x = values(7 * 300);
        let (expected, _) = run_softmax(&Pool::new(1), &x, &[0.5; 7], 300);
        let region = softmax();
        let inputs = [
            Input { data: Data::F32(&[]), layout: Layout::InOut },
            Input { data: Data::F32(&[0.5]), layout: Layout::Scalar },
        ];
        let mut sums = [0.0; 7];
        let rows = Rows { rows: 7, columns: 300 };
        let outputs = vec![Out::F32(&mut x), Out::F32(&mut sums)];
        run(&Pool::new(2).eager(), &region, &region.phases(&[false, true]), rows, &inputs, outputs);
        assert_eq!(x, expected);
    }

    #[test]
    fn empty_rows_have_neutral_sums() {
        let (y, sums) = run_softmax(&Pool::new(1), &[], &[1.0, 2.0], 0);
        assert_eq!((y, sums), (vec![], vec![0.0, 0.0]));
    }
}
