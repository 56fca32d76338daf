//! Millrace: compiles the model folder to an engine among the temporary files, then runs steps of a session on packed
//! token ids. The output is the sentence embedding: pooling is part of the step.

use std::collections::BTreeMap;

use millrace::compiler::import::Precision;
use millrace::ir::DType;
use millrace::{CompileOptions, Engine, Session, SessionOptions, TensorRef, compile};
use peer_protocol::{Fallible, Output, Peer, Setup, Shape, serve, setup};

struct Millrace {
    setup: Setup,
    sessions: BTreeMap<String, Session<'static>>,
}

struct Step {
    model: String,
    tensors: Vec<(Vec<u64>, Vec<u8>)>,
}

fn load(setup: &Setup, model: &str) -> Fallible<Session<'static>> {
    let mut options = CompileOptions::default();
    options.import.precision = Precision::Fixed(DType::F32);
    options.import.max_batch_size = Some(32);
    options.import.max_input_len = Some(128);
    options.import.max_num_tokens = Some(32 * 128);
    let file = std::env::temp_dir().join(format!("millrace-peer-{}-{model}.engine", std::process::id()));
    compile(&setup.folder.join(model), &options, None)?.write(&file, &mut |_, _| {})?;
    let engine = Engine::open(&file);
    // The engine keeps what it has mapped.
    std::fs::remove_file(&file)?;
    // A peer holds its few models until it ends.
    let engine: &'static Engine = Box::leak(Box::new(engine?));
    Ok(engine.session(SessionOptions { threads: Some(setup.threads), ..SessionOptions::default() })?)
}

fn i32_bytes(values: impl Iterator<Item = usize>) -> Vec<u8> {
    values.flat_map(|v| (v as i32).to_le_bytes()).collect()
}

impl Peer for Millrace {
    type Prepared = Step;

    fn prepare(&mut self, shape: &Shape, ids: &[u32]) -> Fallible<Step> {
        if !self.sessions.contains_key(&shape.model) {
            let session = load(&self.setup, &shape.model)?;
            self.sessions.insert(shape.model.clone(), session);
        }
        let tokens = ids.len();
        let inputs = [
            i32_bytes(ids.iter().map(|t| *t as usize)),
            i32_bytes((0..tokens).map(|i| i % shape.length)),
            i32_bytes((0..tokens).map(|_| 0)),
            i32_bytes((0..=shape.batch).map(|b| b * shape.length)),
        ];
        let tensors = inputs.into_iter().map(|bytes| (vec![bytes.len() as u64 / 4], bytes)).collect();
        Ok(Step { model: shape.model.clone(), tensors })
    }

    fn step(&mut self, step: &mut Step) -> Fallible<()> {
        let inputs: Vec<TensorRef<'_>> =
            step.tensors.iter().map(|(shape, bytes)| TensorRef { dtype: DType::I32, shape, bytes }).collect();
        Ok(self.sessions.get_mut(&step.model).ok_or("no session")?.run(&inputs)?)
    }

    fn output(&mut self, step: &Step) -> Fallible<(Output, Vec<f32>)> {
        let session = self.sessions.get(&step.model).ok_or("no session")?;
        let output = session.output(0).filter(|o| o.dtype == DType::F32).ok_or("no f32 output")?;
        let values = output.bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]));
        Ok((Output::Embedding, values.collect()))
    }
}

fn main() -> Fallible<()> {
    serve(Millrace { setup: setup()?, sessions: BTreeMap::new() })
}
