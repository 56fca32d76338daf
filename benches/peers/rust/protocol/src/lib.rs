//! The line protocol of the peers: a driver writes one command a line, the peer answers with one line.
//!
//! | command | answer |
//! | --- | --- |
//! | (start) | `ready` |
//! | `run MODEL BATCH LENGTH COUNT` | `ok MS`: the median of COUNT steps, after one that is not counted |
//! | `check MODEL BATCH LENGTH FILE` | `ok hidden` or `ok embedding`: what was written to FILE, little-endian f32 |
//! | `quit` | (ends) |
//!
//! A failure is answered by `error MESSAGE`; the peer stays usable. Models are folders `FOLDER/MODEL` with `config.json`,
//! `model.safetensors` and `model.onnx`; they are loaded when a command first names them. Token ids depend only on the
//! shape ([`token_ids`]), so that all peers compute the same step. Only the step is timed: loading, building inputs and
//! reading the output are not.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

/// Any failure of a peer.
pub type Fallible<T> = Result<T, Box<dyn Error>>;

/// A model and the extents of its input.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shape {
    /// Folder of the model, below [`Setup::folder`].
    pub model: String,
    /// Sequences.
    pub batch: usize,
    /// Tokens of each sequence.
    pub length: usize,
}

/// The peer's command line: `FOLDER THREADS`.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where the models are.
    pub folder: PathBuf,
    /// Threads a step may use.
    pub threads: usize,
}

/// What a peer computes: the last hidden state of every token, or the sentence embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// `[batch, length, hidden]`.
    Hidden,
    /// `[batch, hidden]`.
    Embedding,
}

/// A runtime behind the protocol.
pub trait Peer {
    /// A model made ready for one shape, with its inputs.
    type Prepared;

    /// Loads the model if need be and builds the inputs; not timed. `ids` is row-major `[batch, length]`.
    fn prepare(&mut self, shape: &Shape, ids: &[u32]) -> Fallible<Self::Prepared>;

    /// One step; timed.
    fn step(&mut self, prepared: &mut Self::Prepared) -> Fallible<()>;

    /// The output of the last step; not timed.
    fn output(&mut self, prepared: &Self::Prepared) -> Fallible<(Output, Vec<f32>)>;
}

/// Token ids of a shape, from a linear congruential generator; they lie in 1000..21000.
pub fn token_ids(shape: &Shape) -> Vec<u32> {
    let mut state = (shape.batch * 1000 + shape.length) as u64;
    (0..shape.batch * shape.length)
        .map(|_| {
            state = (state * 1_103_515_245 + 12_345) & 0x7fff_ffff;
            1000 + ((state >> 8) % 20_000) as u32
        })
        .collect()
}

/// Reads the command line.
pub fn setup() -> Fallible<Setup> {
    let mut args = std::env::args().skip(1);
    match (args.next(), args.next(), args.next()) {
        (Some(folder), Some(threads), None) => {
            Ok(Setup { folder: PathBuf::from(folder), threads: threads.parse::<usize>()?.max(1) })
        }
        _ => Err("usage: PEER FOLDER THREADS".into()),
    }
}

/// Serves commands until `quit` or the end of the input.
pub fn serve<P: Peer>(mut peer: P) -> Fallible<()> {
    let mut prepared: BTreeMap<Shape, P::Prepared> = BTreeMap::new();
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        if words == ["quit"] {
            break;
        }
        let answer = match answer(&mut peer, &mut prepared, &words) {
            Ok(text) => format!("ok {text}"),
            Err(error) => format!("error {}", error.to_string().replace(['\n', '\r'], " ")),
        };
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

fn answer<P: Peer>(
    peer: &mut P,
    prepared: &mut BTreeMap<Shape, P::Prepared>,
    words: &[&str],
) -> Fallible<String> {
    let [verb, model, batch, length, last] = words else { return Err("takes five words".into()) };
    let shape = Shape { model: model.to_string(), batch: batch.parse()?, length: length.parse()? };
    if !prepared.contains_key(&shape) {
        let ready = peer.prepare(&shape, &token_ids(&shape))?;
        prepared.insert(shape.clone(), ready);
    }
    let ready = prepared.get_mut(&shape).ok_or("not prepared")?;
    peer.step(ready)?;
    match *verb {
        "run" => {
            let mut milliseconds = Vec::new();
            for _ in 0..last.parse::<usize>()?.max(1) {
                let start = Instant::now();
                peer.step(ready)?;
                milliseconds.push(start.elapsed().as_secs_f64() * 1e3);
            }
            milliseconds.sort_by(f64::total_cmp);
            let middle = milliseconds.len() / 2;
            let median = if milliseconds.len() % 2 == 1 {
                milliseconds[middle]
            } else {
                (milliseconds[middle - 1] + milliseconds[middle]) / 2.0
            };
            Ok(format!("{median:.6}"))
        }
        "check" => {
            let (kind, values) = peer.output(ready)?;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            std::fs::write(last, bytes)?;
            Ok(match kind {
                Output::Hidden => "hidden".to_string(),
                Output::Embedding => "embedding".to_string(),
            })
        }
        other => Err(format!("no command `{other}`").into()),
    }
}
