//! rten: reads the ONNX file, with weights packed at load.

use std::collections::BTreeMap;
use std::sync::Arc;

use peer_protocol::{Fallible, Output, Peer, Setup, Shape, serve, setup};
use rten::{Model, ModelOptions, NodeId, RunOptions, ThreadPool, Value, ValueOrView};
use rten_tensor::prelude::*;
use rten_tensor::{NdTensor, Tensor};

struct Rten {
    setup: Setup,
    pool: Arc<ThreadPool>,
    models: BTreeMap<String, Arc<Model>>,
}

struct Step {
    model: Arc<Model>,
    inputs: Vec<(NodeId, Value)>,
    output: NodeId,
    hidden: Option<Value>,
}

impl Peer for Rten {
    type Prepared = Step;

    fn prepare(&mut self, shape: &Shape, ids: &[u32]) -> Fallible<Step> {
        if !self.models.contains_key(&shape.model) {
            let mut options = ModelOptions::with_all_ops();
            options.prepack_weights(true);
            let model = options.load_file(self.setup.folder.join(&shape.model).join("model.onnx"))?;
            self.models.insert(shape.model.clone(), Arc::new(model));
        }
        let model = Arc::clone(&self.models[&shape.model]);
        let extents = [shape.batch, shape.length];
        let ids = NdTensor::from_data(extents, ids.iter().map(|t| *t as i32).collect::<Vec<_>>());
        let mask = NdTensor::from_data(extents, vec![1i32; shape.batch * shape.length]);
        let inputs = vec![
            (model.node_id("input_ids")?, Value::from(ids)),
            (model.node_id("attention_mask")?, Value::from(mask)),
        ];
        let output = *model.output_ids().first().ok_or("no output")?;
        Ok(Step { model, inputs, output, hidden: None })
    }

    fn step(&mut self, step: &mut Step) -> Fallible<()> {
        let inputs = step.inputs.iter().map(|(id, v)| (*id, ValueOrView::from(v))).collect();
        let options = RunOptions::default().with_thread_pool(Some(Arc::clone(&self.pool)));
        let [hidden] = step.model.run_n(inputs, [step.output], Some(options))?;
        step.hidden = Some(hidden);
        Ok(())
    }

    fn output(&mut self, step: &Step) -> Fallible<(Output, Vec<f32>)> {
        let hidden: Tensor<f32> = step.hidden.clone().ok_or("no step was run")?.try_into()?;
        Ok((Output::Hidden, hidden.to_vec()))
    }
}

fn main() -> Fallible<()> {
    let setup = setup()?;
    let pool = Arc::new(ThreadPool::with_num_threads(setup.threads));
    serve(Rten { setup, pool, models: BTreeMap::new() })
}
