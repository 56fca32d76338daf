//! Elementwise regions: a small program evaluated tile by tile, so that intermediate values never leave the cache.
//! Regions with reductions are [`super::rows`]'.

use half::{bf16, f16};
use millrace_ir::DType;
use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::pointwise::{Source, Step};
use millrace_ir::ops::unary::UnaryFn;

use super::element::Element;
use super::math;
use super::parallel::{Pool, Shared};
use super::simd::{Isa, dispatch};
use super::view::View;

/// Elements of one tile.
pub const TILE: usize = 256;

/// Elements of an operand.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// f32
    F32(&'a [f32]),
    /// bf16
    Bf16(&'a [bf16]),
    /// f16
    F16(&'a [f16]),
    /// i32, exact up to 2^24
    I32(&'a [i32]),
    /// Truth values
    Bool(&'a [u8]),
}

/// How an operand repeats over the result `[rows, columns]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout<'a> {
    /// One element per result element.
    Full,
    /// One element for all.
    Scalar,
    /// One element per column.
    Row,
    /// One element per row.
    Column,
    /// Anything else.
    Strided(&'a View),
    /// The operand is what output 0 holds before the call.
    InOut,
}

/// An operand.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Elements; ignored for [`Layout::InOut`].
    pub data: Data<'a>,
    /// Repetition.
    pub layout: Layout<'a>,
}

/// A result.
pub enum Out<'a> {
    /// f32
    F32(&'a mut [f32]),
    /// bf16
    Bf16(&'a mut [bf16]),
    /// f16
    F16(&'a mut [f16]),
    /// Truth values
    Bool(&'a mut [u8]),
}

/// A result that tasks write at disjoint ranges.
pub(super) enum SharedOut<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, bf16>),
    F16(Shared<'a, f16>),
    Bool(Shared<'a, u8>),
}

/// Values of one tile.
pub(super) type Tile = [f32; TILE];

/// What the steps of a program have computed for one tile.
pub(super) struct Tiles {
    /// By input.
    pub inputs: Vec<Tile>,
    /// By step.
    pub steps: Vec<Tile>,
    constants: Vec<(u32, Tile)>,
}

impl Tiles {
    /// Room for a program, with its constants.
    pub fn new(inputs: usize, body: &[Step], out: &[Source]) -> Self {
        let mut constants: Vec<(u32, Tile)> = Vec::new();
        for source in body.iter().flat_map(Step::sources).chain(out.iter().copied()) {
            if let Source::Const(c) = source {
                let c = c as f32;
                if constants.iter().all(|(bits, _)| *bits != c.to_bits()) {
                    constants.push((c.to_bits(), [c; TILE]));
                }
            }
        }
        Tiles { inputs: vec![[0.0; TILE]; inputs], steps: vec![[0.0; TILE]; body.len()], constants }
    }

    /// The values of a source of the program.
    pub fn get(&self, source: &Source) -> &Tile {
        read(&self.inputs, &self.steps, &self.constants, source)
    }

    /// Computes the first `count` values of an elementwise step from its sources.
    pub fn apply(&mut self, isa: Isa, at: usize, step: &Step, count: usize) {
        let (before, here) = self.steps.split_at_mut(at);
        let here = &mut here[0][..count];
        let read = |source: &Source| &read(&self.inputs, before, &self.constants, source)[..count];
        match step {
            Step::Unary(f, a) => {
                here.copy_from_slice(read(a));
                unary(isa, *f, here);
            }
            Step::Binary(f, a, b) => {
                here.copy_from_slice(read(a));
                binary(isa, *f, here, read(b));
            }
            Step::Select(c, a, b) => {
                let choices = read(c).iter().zip(read(a)).zip(read(b));
                here.iter_mut()
                    .zip(choices)
                    .for_each(|(h, ((c, a), b))| *h = if *c != 0.0 { *a } else { *b });
            }
            Step::Cast(dtype, a) => {
                here.copy_from_slice(read(a));
                round(*dtype, here);
            }
            // Rows are another module's.
            Step::Reduce(..) => {}
        }
    }
}

fn read<'a>(
    inputs: &'a [Tile],
    steps: &'a [Tile],
    constants: &'a [(u32, Tile)],
    source: &Source,
) -> &'a Tile {
    const NOTHING: &Tile = &[0.0; TILE];
    match source {
        Source::Input(i) => &inputs[*i],
        Source::Step(t) => &steps[*t],
        Source::Const(c) => {
            let bits = (*c as f32).to_bits();
            constants.iter().find(|(b, _)| *b == bits).map_or(NOTHING, |(_, tile)| tile)
        }
    }
}

/// Shares the results among tasks.
pub(super) fn share(outputs: Vec<Out<'_>>) -> Vec<SharedOut<'_>> {
    let shared = |o| match o {
        Out::F32(x) => SharedOut::F32(Shared::new(x)),
        Out::Bf16(x) => SharedOut::Bf16(Shared::new(x)),
        Out::F16(x) => SharedOut::F16(Shared::new(x)),
        Out::Bool(x) => SharedOut::Bool(Shared::new(x)),
    };
    outputs.into_iter().map(shared).collect()
}

/// Runs elementwise steps over `len` elements in rows of `columns`; result `i` is `out[i]`.
pub fn run(
    pool: &Pool,
    body: &[Step],
    out: &[Source],
    columns: usize,
    len: usize,
    inputs: &[Input<'_>],
    outputs: Vec<Out<'_>>,
) {
    let outputs = share(outputs);
    const TILES: usize = 16;
    let columns = columns.max(1);
    pool.run(len.div_ceil(TILE * TILES), len * (body.len() + 2) * 4, |task| {
        let mut tiles = Tiles::new(inputs.len(), body, out);
        for start in (task * TILE * TILES..len.min((task + 1) * TILE * TILES)).step_by(TILE) {
            let count = TILE.min(len - start);
            for (input, tile) in inputs.iter().zip(&mut tiles.inputs) {
                fetch(input, &outputs, start, columns, &mut tile[..count]);
            }
            for (at, step) in body.iter().enumerate() {
                tiles.apply(pool.isa, at, step, count);
            }
            for (source, output) in out.iter().zip(&outputs) {
                store(output, start, &tiles.get(source)[..count]);
            }
        }
    });
}

/// Loads elements `start..` of an input as it repeats over rows of `columns`.
pub(super) fn fetch(
    input: &Input<'_>,
    outputs: &[SharedOut<'_>],
    start: usize,
    columns: usize,
    tile: &mut [f32],
) {
    if input.layout == Layout::InOut {
        read_back(&outputs[0], start, tile);
    } else {
        load(input, start, columns, tile);
    }
}

fn load(input: &Input<'_>, start: usize, columns: usize, tile: &mut [f32]) {
    fn from<T: Copy + Default>(
        x: &[T],
        layout: Layout<'_>,
        start: usize,
        columns: usize,
        tile: &mut [f32],
        f: impl Fn(T) -> f32,
    ) {
        match layout {
            Layout::Scalar => tile.fill(x.first().map_or(0.0, |v| f(*v))),
            Layout::Row => tile.iter_mut().enumerate().for_each(|(i, t)| *t = f(x[(start + i) % columns])),
            Layout::Column => tile.iter_mut().enumerate().for_each(|(i, t)| *t = f(x[(start + i) / columns])),
            Layout::Strided(view) => {
                let mut elements = [T::default(); TILE];
                let elements = &mut elements[..tile.len()];
                view.cursor(start).load(x, elements);
                tile.iter_mut().zip(elements).for_each(|(t, v)| *t = f(*v));
            }
            Layout::Full | Layout::InOut => {
                let x = &x[start..start + tile.len()];
                tile.iter_mut().zip(x).for_each(|(t, v)| *t = f(*v));
            }
        }
    }
    let layout = input.layout;
    match input.data {
        Data::F32(x) => from(x, layout, start, columns, tile, |v| v),
        Data::Bf16(x) => from(x, layout, start, columns, tile, Element::to_f32),
        Data::F16(x) => from(x, layout, start, columns, tile, Element::to_f32),
        Data::I32(x) => from(x, layout, start, columns, tile, |v| v as f32),
        Data::Bool(x) => from(x, layout, start, columns, tile, |v| f32::from(u8::from(v != 0))),
    }
}

/// Each task owns its tiles of every output, so ranges of one output are disjoint.
#[allow(unsafe_code)]
fn read_back(output: &SharedOut<'_>, start: usize, tile: &mut [f32]) {
    let n = tile.len();
    // SAFETY: the range lies in a tile of the calling task and lives for this statement only.
    unsafe {
        match output {
            SharedOut::F32(x) => f32::widen(x.range(start, n), tile),
            SharedOut::Bf16(x) => bf16::widen(x.range(start, n), tile),
            SharedOut::F16(x) => f16::widen(x.range(start, n), tile),
            SharedOut::Bool(x) => {
                tile.iter_mut().zip(x.range(start, n)).for_each(|(t, v)| *t = f32::from(*v));
            }
        }
    }
}

/// Rounds a tile to the elements `start..` of a result, which lie in a range of the calling task.
#[allow(unsafe_code)]
pub(super) fn store(output: &SharedOut<'_>, start: usize, tile: &[f32]) {
    let n = tile.len();
    // SAFETY: as in `read_back`.
    unsafe {
        match output {
            SharedOut::F32(x) => f32::narrow(tile, x.range(start, n)),
            SharedOut::Bf16(x) => bf16::narrow(tile, x.range(start, n)),
            SharedOut::F16(x) => f16::narrow(tile, x.range(start, n)),
            SharedOut::Bool(x) => {
                x.range(start, n).iter_mut().zip(tile).for_each(|(o, v)| *o = u8::from(*v != 0.0));
            }
        }
    }
}

fn round(dtype: DType, tile: &mut [f32]) {
    match dtype {
        DType::F32 => {}
        DType::BF16 => tile.iter_mut().for_each(|v| *v = <bf16 as Element>::from_f32(*v).to_f32()),
        DType::F16 => tile.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32()),
        other => {
            tile.iter_mut().for_each(|v| *v = millrace_ir::tensor::round_to(other, f64::from(*v)) as f32)
        }
    }
}

dispatch! {
    /// Applies a function to a tile.
    pub fn unary(f: UnaryFn, x: &mut [f32]) {
        macro_rules! map { ($g:expr) => { for v in x.iter_mut() { *v = ($g)(*v); } } }
        match f {
            UnaryFn::Neg => map!(|v: f32| -v),
            UnaryFn::Abs => map!(|v: f32| v.abs()),
            UnaryFn::Exp => map!(math::exp),
            UnaryFn::Log => map!(|v: f32| v.ln()),
            UnaryFn::Sqrt => map!(|v: f32| v.sqrt()),
            UnaryFn::Rsqrt => map!(|v: f32| 1.0 / v.sqrt()),
            UnaryFn::Recip => map!(|v: f32| 1.0 / v),
            UnaryFn::Sigmoid => map!(math::sigmoid),
            UnaryFn::Silu => map!(|v: f32| v * math::sigmoid(v)),
            UnaryFn::Tanh => map!(math::tanh),
            UnaryFn::Gelu => map!(math::gelu),
            UnaryFn::GeluTanh => map!(math::gelu_tanh),
            UnaryFn::Relu => map!(|v: f32| v.max(0.0)),
            UnaryFn::Erf => map!(math::erf),
            UnaryFn::Sin => map!(|v: f32| v.sin()),
            UnaryFn::Cos => map!(|v: f32| v.cos()),
            UnaryFn::Floor => map!(|v: f32| v.floor()),
            UnaryFn::Ceil => map!(|v: f32| v.ceil()),
        }
    }
}

dispatch! {
    /// Combines two tiles into the first.
    pub fn binary(f: BinaryFn, x: &mut [f32], y: &[f32]) {
        macro_rules! zip { ($g:expr) => { for (a, b) in x.iter_mut().zip(y) { *a = ($g)(*a, *b); } } }
        let truth = |t: bool| f32::from(u8::from(t));
        match f {
            BinaryFn::Add => zip!(|a: f32, b: f32| a + b),
            BinaryFn::Sub => zip!(|a: f32, b: f32| a - b),
            BinaryFn::Mul => zip!(|a: f32, b: f32| a * b),
            BinaryFn::Div => zip!(|a: f32, b: f32| a / b),
            BinaryFn::Max => zip!(|a: f32, b: f32| a.max(b)),
            BinaryFn::Min => zip!(|a: f32, b: f32| a.min(b)),
            BinaryFn::Pow => zip!(|a: f32, b: f32| a.powf(b)),
            BinaryFn::Lt => zip!(|a, b| truth(a < b)),
            BinaryFn::Le => zip!(|a, b| truth(a <= b)),
            BinaryFn::Gt => zip!(|a, b| truth(a > b)),
            BinaryFn::Ge => zip!(|a, b| truth(a >= b)),
            BinaryFn::Eq => zip!(|a, b| truth(a == b)),
            BinaryFn::Ne => zip!(|a, b| truth(a != b)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;

    #[test]
    fn every_step_and_layout_meets_the_definition() {
        let (rows, columns) = (37, 41);
        let len = rows * columns;
        let full: Vec<f32> = (0..len).map(|i| (i as f32 * 0.37).sin() * 2.0).collect();
        let (row, column) = (&full[..columns], &full[100..100 + rows]);
        let turned = View::new(&[rows, columns], &[1, rows]);
        let inputs = [
            Input { data: Data::F32(&full), layout: Layout::Full },
            Input { data: Data::F32(row), layout: Layout::Row },
            Input { data: Data::F32(column), layout: Layout::Column },
            Input { data: Data::F32(&full[7..8]), layout: Layout::Scalar },
            Input { data: Data::F32(&full), layout: Layout::Strided(&turned) },
        ];
        let mut body: Vec<Step> =
            BinaryFn::ALL.map(|f| Step::Binary(f, Source::Input(0), Source::Input(1))).to_vec();
        body.extend(UnaryFn::ALL.map(|f| Step::Unary(f, Source::Input(2))));
        body.push(Step::Select(Source::Step(7), Source::Input(3), Source::Const(0.25)));
        body.push(Step::Cast(DType::BF16, Source::Input(0)));
        body.push(Step::Binary(BinaryFn::Sub, Source::Input(0), Source::Input(4)));
        for isa in Isa::available() {
            for (t, step) in body.iter().enumerate() {
                let mut out = vec![0f32; len];
                let result = [Source::Step(t)];
                run(&Pool::with_isa(2, isa), &body, &result, columns, len, &inputs, vec![Out::F32(&mut out)]);
                for (at, found) in out.iter().enumerate() {
                    let (a, b, c) =
                        (f64::from(full[at]), f64::from(row[at % columns]), f64::from(column[at / columns]));
                    let expected = match step {
                        Step::Binary(_, _, Source::Input(4)) => {
                            a - f64::from(full[at % columns * rows + at / columns])
                        }
                        Step::Binary(f, ..) => f.apply(a, b),
                        Step::Unary(f, _) => f.apply(c),
                        Step::Select(..) => {
                            if a < b {
                                f64::from(full[7])
                            } else {
                                0.25
                            }
                        }
                        Step::Cast(..) => millrace_ir::tensor::round_to(DType::BF16, a),
                        Step::Reduce(..) => continue,
                    };
                    let found = f64::from(*found);
                    let same = (found.is_nan() && expected.is_nan()) || found == expected;
                    assert!(
                        same || (found - expected).abs() < 3e-6 * (1.0 + expected.abs()),
                        "{step:?} at {at}: {found} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn an_operand_may_be_the_output() {
        let mut x: Vec<bf16> = (0..600).map(|i| bf16::from_f32(i as f32)).collect();
        let inputs = [Input { data: Data::Bf16(&[]), layout: Layout::InOut }];
        let body = [Step::Binary(BinaryFn::Add, Source::Input(0), Source::Const(1.0))];
        run(&Pool::new(1), &body, &[Source::Step(0)], 600, 600, &inputs, vec![Out::Bf16(&mut x)]);
        assert!(
            x.iter().enumerate().all(|(i, v)| *v == bf16::from_f32(bf16::from_f32(i as f32).to_f32() + 1.0))
        );
    }
}
