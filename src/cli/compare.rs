//! `millrace compare`: an engine against the reference evaluator, on random inputs.

use std::path::PathBuf;

use millrace::ir::eval::evaluate;
use millrace::ir::manifest::ModelKind;
use millrace::ir::tensor::{Tensor, decode};
use millrace::ir::weights::{WeightReader, normal};
use millrace::ir::{Bindings, DType, Dim};
use millrace::{Engine, Error, Kind, Result, SessionOptions, TensorRef};
use serde_json::json;

use super::compile::ModelOptions;
use super::run::open;
use super::{print, print_json, usage};

/// Run an engine and the reference evaluator on the same inputs and compare every output.
#[derive(clap::Args)]
pub struct Args {
    /// An engine file, a model folder or a file of IR text
    engine: PathBuf,
    /// Model folder with the weights of the reference; not needed for generated weights
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Largest accepted error, relative to 1 + |expected| [default: 1e-3 for f32, 5e-2 otherwise]
    #[arg(long)]
    tolerance: Option<f64>,
    /// Tokens of the packed batch
    #[arg(long, default_value_t = 12)]
    tokens: u64,
    /// Seed of the inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(flatten)]
    model_options: ModelOptions,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// Inputs of a language model step: two sequences that start here, on pages in falling order.
fn language_inputs(engine: &Engine, tokens: u64, seed: u64) -> Result<Vec<Tensor>> {
    let limits = engine.manifest().model.as_ref();
    let limits = limits.ok_or_else(|| usage("compare/no-limits", "the engine has no limits"))?;
    let tokens = tokens.clamp(2, limits.max_num_tokens.min(2 * limits.max_seq_len)).max(1);
    let sequences = if limits.max_batch_size > 1 && tokens > 1 { 2 } else { 1 };
    let first = if sequences == 2 { tokens / 3 + 1 } else { tokens };
    let lengths: Vec<u64> = if sequences == 2 { vec![first, tokens - first] } else { vec![tokens] };
    let ids = (0..tokens).map(|i| {
        let unit = (normal(seed, i).abs() * 0.37).fract();
        (unit * limits.vocab_size as f64).floor().min(limits.vocab_size as f64 - 1.0)
    });
    let blocks = lengths.iter().map(|l| l.div_ceil(limits.tokens_per_block)).max().unwrap_or(1);
    let pages = sequences * blocks;
    let mut starts = vec![0.0];
    lengths.iter().for_each(|l| starts.push(starts.last().copied().unwrap_or(0.0) + *l as f64));
    let positions: Vec<f64> = lengths.iter().flat_map(|l| (0..*l).map(|p| p as f64)).collect();
    let ints = |shape: &[u64], data: Vec<f64>| -> Result<Tensor> {
        let shape: Vec<usize> = shape.iter().map(|d| *d as usize).collect();
        Tensor::from_values(DType::I32, &shape, data)
            .ok_or_else(|| usage("compare/shape", "inputs do not fit"))
    };
    let token_ids = ints(&[tokens], ids.collect())?;
    let positions = ints(&[tokens], positions)?;
    let seq_starts = ints(&[sequences + 1], starts)?;
    if engine.manifest().kind == ModelKind::Encoder {
        return Ok(vec![token_ids, positions, ints(&[tokens], vec![0.0; tokens as usize])?, seq_starts]);
    }
    let rows = limits.max_logit_rows.min(tokens);
    Ok(vec![
        token_ids,
        positions,
        seq_starts,
        ints(&[sequences], lengths.iter().map(|l| *l as f64).collect())?,
        ints(&[sequences, blocks], (0..pages).rev().map(|p| p as f64).collect())?,
        ints(&[rows], (0..rows).map(|r| (tokens - 1 - r) as f64).collect())?,
    ])
}

/// Random inputs of a plain graph, every symbol small.
fn graph_inputs(engine: &Engine, seed: u64) -> Result<Vec<Tensor>> {
    let module = engine.module();
    let mut bindings = Bindings::new();
    for decl in &module.dims {
        let step = decl.multiple.max(1);
        let wanted = decl.hint.unwrap_or(decl.max).min(decl.min.max(5)).clamp(decl.min, decl.max);
        bindings.set(decl.sym, wanted.next_multiple_of(step).min(decl.max));
    }
    let shape = |dims: &[Dim]| {
        dims.iter().map(|d| d.extent(&bindings).map(|v| v as usize)).collect::<Option<Vec<_>>>()
    };
    module
        .input_types()
        .into_iter()
        .enumerate()
        .map(|(index, (name, ty))| {
            let shape = shape(&ty.shape);
            let tensor = shape.and_then(|s| Tensor::zeros(ty.dtype, &s));
            let mut tensor =
                tensor.ok_or_else(|| usage("compare/shape", format!("input `{name}` is too large")))?;
            for (i, v) in tensor.data.iter_mut().enumerate() {
                let noise = normal(seed + index as u64, i as u64);
                *v = if ty.dtype.is_float() { noise } else { noise.abs().floor() };
            }
            tensor.round();
            Ok(tensor)
        })
        .collect()
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let (engine, _scratch) = open(&args.engine, &args.model_options)?;
    let module = engine.module();
    let inputs = match engine.manifest().kind {
        ModelKind::Graph => graph_inputs(&engine, args.seed)?,
        _ => language_inputs(&engine, args.tokens, args.seed)?,
    };
    let folder = args.model.clone().or_else(|| args.engine.is_dir().then(|| args.engine.clone()));
    let checkpoint = match &folder {
        Some(folder) => Some(millrace::ir::checkpoint::Checkpoint::open(folder)?),
        None => None,
    };
    let mut reader = WeightReader::new(module);
    if let Some(checkpoint) = &checkpoint {
        reader = reader.with_source("model", checkpoint);
    }
    let pages = inputs.get(4).map_or(1, |t| t.data.len()) as u64;
    let has_states = !module.states.is_empty();
    let options = SessionOptions { kv_pages: has_states.then_some(pages), ..SessionOptions::default() };
    let mut session = engine.session(options)?;
    let bytes: Vec<Vec<u8>> = inputs.iter().map(Tensor::to_bytes).collect();
    let shapes: Vec<Vec<u64>> = inputs.iter().map(|t| t.shape.iter().map(|d| *d as u64).collect()).collect();
    let refs: Vec<TensorRef<'_>> = inputs
        .iter()
        .zip(&bytes)
        .zip(&shapes)
        .map(|((t, bytes), shape)| TensorRef { dtype: t.dtype, shape, bytes })
        .collect();
    session.run(&refs)?;
    let mut bindings = Bindings::maxima(&module.dims);
    module.dims.iter().filter(|d| d.sym.name() == "pages").for_each(|d| bindings.set(d.sym, pages));
    let mut states = module
        .states
        .iter()
        .map(|(_, s)| {
            let shape =
                s.ty.shape_at(&bindings)
                    .unwrap_or_default()
                    .into_iter()
                    .map(|d| d as usize)
                    .collect::<Vec<_>>();
            Tensor::zeros(s.ty.dtype, &shape).ok_or_else(|| usage("compare/shape", "the cache is too large"))
        })
        .collect::<Result<Vec<_>>>()?;
    let expected = evaluate(module, &mut reader, &inputs, &mut states)?;
    let mut report = Vec::new();
    let mut first_bad: Option<String> = None;
    for (index, ((name, ty), expected)) in module.output_types().into_iter().zip(&expected).enumerate() {
        let Some(output) = session.output(index) else { continue };
        let exact = engine.manifest().dtype == DType::F32;
        let tolerance = args.tolerance.unwrap_or(if exact { 1e-3 } else { 5e-2 });
        let found = decode(ty.dtype, output.bytes);
        let mut largest = 0f64;
        for (at, (f, e)) in found.iter().zip(&expected.data).enumerate() {
            let same = f == e || (f.is_nan() && e.is_nan());
            let error = if same { 0.0 } else { (f - e).abs() / (1.0 + e.abs()) };
            largest = if error.is_nan() { f64::INFINITY } else { largest.max(error) };
            if (error.is_nan() || error > tolerance) && first_bad.is_none() {
                let mut rest = at;
                let mut place = Vec::new();
                for extent in expected.shape.iter().rev() {
                    place.push(rest % extent.max(&1));
                    rest /= extent.max(&1);
                }
                place.reverse();
                first_bad = Some(format!(
                    "\"{name}\"{place:?} is {f}, expected {e} (error {error:.2e}, tolerance {tolerance:.0e})"
                ));
            }
        }
        report.push(
            json!({"name": name, "shape": output.shape, "largest_error": largest, "tolerance": tolerance}),
        );
        if !args.json {
            print(&format!(
                "{name}: {}{:?}, largest error {largest:.2e}, tolerance {tolerance:.0e}\n",
                ty.dtype, output.shape
            ))?;
        }
    }
    if args.json {
        print_json(&json!({"outputs": report, "first_bad": first_bad}))?;
    }
    match first_bad {
        None => Ok(()),
        Some(bad) => Err(Error::new(Kind::Mismatch, "compare/mismatch", bad)
            .hint("compare with -O0 to see whether a pass or a kernel is at fault")),
    }
}
