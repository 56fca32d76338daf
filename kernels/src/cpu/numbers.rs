//! Pointwise programs on numbers of every element type, in f64 and therefore exactly as the reference evaluator
//! defines them: integers, 8-bit floats and conversions. Floats of 16 and 32 bits have the faster [`super::program`].

use millrace_ir::ops::binary::BinaryFn;
use millrace_ir::ops::pointwise::{Source, Step};
use millrace_ir::tensor::{decode, encode, round_to};
use millrace_ir::{DType, Error, Kind, Result};

use super::parallel::{Pool, for_chunks_all};
use super::view::{View, misfit};

/// Elements of one tile.
const TILE: usize = 256;

/// An operand: element type, little-endian bytes, and how they repeat over the result.
pub struct Operand<'a> {
    /// Element type, at least a byte.
    pub dtype: DType,
    /// Elements.
    pub bytes: &'a [u8],
    /// Repetition.
    pub view: View,
}

/// A result: element type and little-endian bytes.
pub struct Output<'a> {
    /// Element type, at least a byte.
    pub dtype: DType,
    /// Elements.
    pub bytes: &'a mut [u8],
}

/// Runs `body` over `len` elements; result `i` is `out[i]`, rounded to its element type.
///
/// # Errors
/// `run/no-kernel` for sizes that do not fit.
pub fn run(
    pool: &Pool,
    body: &[Step],
    out: &[Source],
    len: usize,
    operands: &[Operand<'_>],
    outputs: &mut [Output<'_>],
) -> Result<()> {
    for operand in operands {
        let size = size_of_element(operand.dtype)?;
        if operand.view.len() != len || operand.view.reach() > operand.bytes.len() / size {
            return Err(misfit("an operand"));
        }
    }
    for output in outputs.iter() {
        if len.checked_mul(size_of_element(output.dtype)?) != Some(output.bytes.len()) {
            return Err(misfit("a result"));
        }
    }
    const TILES: usize = 16;
    let chunk = TILE * TILES;
    let sizes: Vec<(DType, usize)> = outputs.iter().map(|o| (o.dtype, o.dtype.bits() / 8)).collect();
    let slices = outputs.iter_mut().zip(&sizes).map(|(o, (_, size))| (&mut *o.bytes, chunk * size)).collect();
    for_chunks_all(pool, slices, len.saturating_mul(body.len() + 2) * 8, |task, outputs| {
        let mut cursors: Vec<_> = operands.iter().map(|o| o.view.cursor(task * chunk)).collect();
        let mut loaded = vec![[0f64; TILE]; operands.len()];
        let mut steps = vec![[0f64; TILE]; body.len()];
        for start in (task * chunk..len.min((task + 1) * chunk)).step_by(TILE) {
            let count = TILE.min(len - start);
            for ((operand, cursor), tile) in operands.iter().zip(&mut cursors).zip(&mut loaded) {
                let mut raw = [0u8; TILE * 8];
                let size = operand.dtype.bits() / 8;
                let raw = &mut raw[..count * size];
                match size {
                    1 => cursor.load(operand.bytes, raw),
                    2 => cursor.load::<[u8; 2]>(operand.bytes.as_chunks().0, raw.as_chunks_mut().0),
                    4 => cursor.load::<[u8; 4]>(operand.bytes.as_chunks().0, raw.as_chunks_mut().0),
                    _ => cursor.load::<[u8; 8]>(operand.bytes.as_chunks().0, raw.as_chunks_mut().0),
                }
                widen(operand.dtype, raw, &mut tile[..count]);
            }
            for (at, step) in body.iter().enumerate() {
                let (before, here) = steps.split_at_mut(at);
                apply(step, &loaded, before, &mut here[0]);
            }
            for ((source, (dtype, size)), output) in out.iter().zip(&sizes).zip(outputs.iter_mut()) {
                let at = start - task * chunk;
                let bytes = &mut output[at * size..(at + count) * size];
                match source {
                    Source::Input(i) => narrow(*dtype, &loaded[*i][..count], bytes),
                    Source::Step(t) => narrow(*dtype, &steps[*t][..count], bytes),
                    Source::Const(c) => narrow(*dtype, &[*c; TILE][..count], bytes),
                }
            }
        }
    });
    Ok(())
}

fn size_of_element(dtype: DType) -> Result<usize> {
    dtype.size_bytes().ok_or_else(|| {
        Error::new(Kind::Internal, "run/no-kernel", format!("no kernel computes with elements of {dtype}"))
    })
}

fn widen(dtype: DType, bytes: &[u8], tile: &mut [f64]) {
    macro_rules! each {
        ($f:expr) => {
            tile.iter_mut().zip(bytes.as_chunks().0).for_each(|(t, b)| *t = $f(*b))
        };
    }
    match dtype {
        DType::F32 => each!(|b| f64::from(f32::from_le_bytes(b))),
        DType::I32 => each!(|b| f64::from(i32::from_le_bytes(b))),
        DType::I64 => each!(|b| i64::from_le_bytes(b) as f64),
        DType::Bool => each!(|[b]: [u8; 1]| f64::from(u8::from(b != 0))),
        DType::U8 => each!(|[b]: [u8; 1]| f64::from(b)),
        DType::I8 => each!(|[b]: [u8; 1]| f64::from(b as i8)),
        other => tile.iter_mut().zip(decode(other, bytes)).for_each(|(t, v)| *t = v),
    }
}

fn narrow(dtype: DType, tile: &[f64], bytes: &mut [u8]) {
    macro_rules! each {
        ($f:expr) => {
            bytes.as_chunks_mut().0.iter_mut().zip(tile).for_each(|(b, v)| *b = $f(*v))
        };
    }
    match dtype {
        DType::F32 => each!(|v| (v as f32).to_le_bytes()),
        DType::I32 => each!(|v| (v as i32).to_le_bytes()),
        DType::I64 => each!(|v| (v as i64).to_le_bytes()),
        DType::Bool => each!(|v| [u8::from(v != 0.0)]),
        DType::U8 => each!(|v| [v as u8]),
        DType::I8 => each!(|v| [(v as i8) as u8]),
        other => bytes.copy_from_slice(&encode(other, tile)),
    }
}

fn apply(step: &Step, loaded: &[[f64; TILE]], before: &[[f64; TILE]], out: &mut [f64; TILE]) {
    let mut constants = [[0f64; TILE]; 3];
    let sources = step.sources();
    for (source, tile) in sources.iter().zip(&mut constants) {
        if let Source::Const(c) = source {
            tile.fill(*c);
        }
    }
    let read = |index: usize| match sources[index] {
        Source::Input(i) => &loaded[i],
        Source::Step(t) => &before[t],
        Source::Const(_) => &constants[index],
    };
    match step {
        Step::Unary(f, _) => out.iter_mut().zip(read(0)).for_each(|(o, a)| *o = f.apply(*a)),
        Step::Binary(f, ..) => binary(*f, read(0), read(1), out),
        Step::Select(..) => {
            let choices = read(0).iter().zip(read(1)).zip(read(2));
            out.iter_mut().zip(choices).for_each(|(o, ((c, a), b))| *o = if *c != 0.0 { *a } else { *b });
        }
        Step::Cast(dtype, _) => out.iter_mut().zip(read(0)).for_each(|(o, a)| *o = round_to(*dtype, *a)),
        // Regions with reductions are not selected for this kernel.
        Step::Reduce(..) => {}
    }
}

fn binary(f: BinaryFn, a: &[f64; TILE], b: &[f64; TILE], out: &mut [f64; TILE]) {
    macro_rules! zip {
        ($g:expr) => {
            out.iter_mut().zip(a.iter().zip(b)).for_each(|(o, (a, b))| *o = $g(*a, *b))
        };
    }
    let truth = |t: bool| f64::from(u8::from(t));
    match f {
        BinaryFn::Add => zip!(|a: f64, b: f64| a + b),
        BinaryFn::Sub => zip!(|a: f64, b: f64| a - b),
        BinaryFn::Mul => zip!(|a: f64, b: f64| a * b),
        BinaryFn::Max => zip!(f64::max),
        BinaryFn::Min => zip!(f64::min),
        BinaryFn::Lt => zip!(|a, b| truth(a < b)),
        BinaryFn::Le => zip!(|a, b| truth(a <= b)),
        BinaryFn::Gt => zip!(|a, b| truth(a > b)),
        BinaryFn::Ge => zip!(|a, b| truth(a >= b)),
        BinaryFn::Eq => zip!(|a, b| truth(a == b)),
        BinaryFn::Ne => zip!(|a, b| truth(a != b)),
        BinaryFn::Div | BinaryFn::Pow => zip!(|a, b| f.apply(a, b)),
    }
}
