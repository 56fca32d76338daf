//! tract: reads the ONNX file and optimises it for each shape, which is its strongest mode.

use std::sync::Arc;

use peer_protocol::{Fallible, Output, Peer, Setup, Shape, serve, setup};
use tract_linalg::multithread::{Executor, set_default_executor};
use tract_onnx::prelude::*;

struct Tract {
    setup: Setup,
}

struct Step {
    model: Arc<TypedRunnableModel>,
    inputs: TVec<TValue>,
    hidden: Option<TValue>,
}

impl Peer for Tract {
    type Prepared = Step;

    fn prepare(&mut self, shape: &Shape, ids: &[u32]) -> Fallible<Step> {
        let extents = [shape.batch, shape.length];
        // The file's shapes hold symbols; those of the inputs, set below, are known.
        let mut model = tract_onnx::onnx()
            .with_ignore_value_info(true)
            .with_ignore_output_shapes(true)
            .model_for_path(self.setup.folder.join(&shape.model).join("model.onnx"))
            .map_err(|e| format!("{e:#}"))?;
        let mut inputs = tvec![];
        for index in 0..model.input_outlets().map_err(|e| format!("{e:#}"))?.len() {
            model
                .set_input_fact(index, InferenceFact::dt_shape(i64::datum_type(), extents))
                .map_err(|e| format!("{e:#}"))?;
            let outlet = model.input_outlets().map_err(|e| format!("{e:#}"))?[index];
            let values: Vec<i64> = match model.node(outlet.node).name.as_str() {
                "input_ids" => ids.iter().map(|t| i64::from(*t)).collect(),
                "attention_mask" => vec![1; ids.len()],
                other => return Err(format!("unknown input {other}").into()),
            };
            inputs.push(Tensor::from_shape(&extents, &values).map_err(|e| format!("{e:#}"))?.into_tvalue());
        }
        let model = model.into_optimized().and_then(|m| m.into_runnable()).map_err(|e| format!("{e:#}"))?;
        Ok(Step { model, inputs, hidden: None })
    }

    fn step(&mut self, step: &mut Step) -> Fallible<()> {
        let mut outputs = step.model.run(step.inputs.clone()).map_err(|e| format!("{e:#}"))?;
        step.hidden = Some(outputs.remove(0));
        Ok(())
    }

    fn output(&mut self, step: &Step) -> Fallible<(Output, Vec<f32>)> {
        let hidden = step.hidden.as_ref().ok_or("no step was run")?;
        let view = hidden.to_plain_array_view::<f32>().map_err(|e| format!("{e:#}"))?;
        Ok((Output::Hidden, view.iter().copied().collect()))
    }
}

fn main() -> Fallible<()> {
    let setup = setup()?;
    if setup.threads > 1 {
        set_default_executor(Executor::multithread(setup.threads));
    }
    serve(Tract { setup })
}
