//! candle: the Bert of candle-transformers on the safetensors file. The number of threads is that of rayon's global
//! pool, which the driver sets with RAYON_NUM_THREADS.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, safetensors};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use peer_protocol::{Fallible, Output, Peer, Setup, Shape, serve, setup};

struct Candle {
    setup: Setup,
    models: BTreeMap<String, Arc<BertModel>>,
}

struct Step {
    model: Arc<BertModel>,
    ids: Tensor,
    types: Tensor,
    mask: Tensor,
    hidden: Option<Tensor>,
}

impl Peer for Candle {
    type Prepared = Step;

    fn prepare(&mut self, shape: &Shape, ids: &[u32]) -> Fallible<Step> {
        let device = Device::Cpu;
        if !self.models.contains_key(&shape.model) {
            let folder = self.setup.folder.join(&shape.model);
            let config: Config = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
            let tensors = safetensors::load(folder.join("model.safetensors"), &device)?;
            let weights = VarBuilder::from_tensors(tensors, DType::F32, &device);
            self.models.insert(shape.model.clone(), Arc::new(BertModel::load(weights, &config)?));
        }
        let model = Arc::clone(&self.models[&shape.model]);
        let ids = Tensor::from_vec(ids.to_vec(), (shape.batch, shape.length), &device)?;
        let (types, mask) = (ids.zeros_like()?, ids.ones_like()?);
        Ok(Step { model, ids, types, mask, hidden: None })
    }

    fn step(&mut self, step: &mut Step) -> Fallible<()> {
        step.hidden = Some(step.model.forward(&step.ids, &step.types, Some(&step.mask))?);
        Ok(())
    }

    fn output(&mut self, step: &Step) -> Fallible<(Output, Vec<f32>)> {
        let hidden = step.hidden.as_ref().ok_or("no step was run")?;
        Ok((Output::Hidden, hidden.flatten_all()?.to_vec1()?))
    }
}

fn main() -> Fallible<()> {
    serve(Candle { setup: setup()?, models: BTreeMap::new() })
}
