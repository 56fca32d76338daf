//! The reference evaluator: runs a graph node by node on f64 tensors. Slow, and the judge of everything else.

use std::rc::Rc;

use crate::arena::Id;
use crate::bind::bind;
use crate::error::{Error, Kind, Result};
use crate::graph::{Module, Node, Operand};
use crate::ops::EvalCtx;
use crate::tensor::Tensor;
use crate::types::TensorType;
use crate::weights::WeightReader;

/// What a node computes from its operands.
pub type Compute<'a> = dyn FnMut(&Node, &EvalCtx<'_>) -> std::result::Result<Vec<Tensor>, String> + 'a;

/// Runs `module` once. `inputs` are in the order of the graph's inputs, `states` in the order of the module's
/// states and updated in place; results are in the order of the outputs.
///
/// # Errors
/// `run/bad-inputs` for a wrong number of tensors, binding errors, weight errors, and `eval/failed` when an op
/// refuses the values it got (an index out of range, say).
pub fn evaluate(
    module: &Module,
    weights: &mut WeightReader<'_>,
    inputs: &[Tensor],
    states: &mut [Tensor],
) -> Result<Vec<Tensor>> {
    evaluate_with(module, weights, inputs, states, &mut |node, context| {
        let mut results = node.op.eval(context)?;
        results.iter_mut().for_each(Tensor::round);
        Ok(results)
    })
}

/// Runs `module` as [`evaluate`] does, with another meaning of its nodes: `compute` gets a node with its
/// operands and returns the results as they are stored.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_with(
    module: &Module,
    weights: &mut WeightReader<'_>,
    inputs: &[Tensor],
    states: &mut [Tensor],
    compute: &mut Compute<'_>,
) -> Result<Vec<Tensor>> {
    let declared = module.input_types();
    if declared.len() != inputs.len() || module.states.len() != states.len() {
        return Err(Error::new(
            Kind::BadInput,
            "run/bad-inputs",
            format!(
                "takes {} inputs and {} states, got {} and {}",
                declared.len(),
                module.states.len(),
                inputs.len(),
                states.len()
            ),
        ));
    }
    let shapes: Vec<Vec<u64>> =
        inputs.iter().chain(states.iter()).map(|t| t.shape.iter().map(|d| *d as u64).collect()).collect();
    let state_types = module.states.iter().map(|(_, s)| (s.name.as_str(), &s.ty));
    let named: Vec<(&str, &TensorType)> = declared.into_iter().chain(state_types).collect();
    let tensors: Vec<_> = named.iter().zip(&shapes).map(|((n, t), s)| (*n, *t, s.as_slice())).collect();
    for ((name, ty), tensor) in named.iter().zip(inputs.iter().chain(states.iter())) {
        if ty.dtype != tensor.dtype {
            let message = format!("holds {}, declared {}", tensor.dtype, ty.dtype);
            return Err(Error::new(Kind::BadInput, "run/bad-dtype", message).at(format!("\"{name}\"")));
        }
    }
    let bindings = bind(&module.dims, &tensors)?;
    let graph = &module.graph;
    let mut values: Vec<Option<Rc<Tensor>>> = vec![None; graph.values.bound()];
    for (id, tensor) in graph.inputs.iter().zip(inputs) {
        values[id.index()] = Some(Rc::new(tensor.clone()));
    }
    let state_index: Vec<Option<usize>> = {
        let mut index = vec![None; module.states.bound()];
        module.states.ids().enumerate().for_each(|(i, id)| index[id.index()] = Some(i));
        index
    };
    let mut last_use = vec![0usize; graph.values.bound()];
    for (at, id) in graph.order.iter().enumerate() {
        for operand in &graph.nodes[*id].operands {
            if let Operand::Value(v) = operand {
                last_use[v.index()] = at;
            }
        }
    }
    graph.outputs.iter().for_each(|o| last_use[o.value.index()] = usize::MAX);
    for (at, id) in graph.order.iter().enumerate() {
        let node = &graph.nodes[*id];
        let failed = |message: String| {
            let place = node.loc.first().map_or_else(|| id.to_string(), |l| format!("{id} ({l})"));
            Error::new(Kind::BadInput, "eval/failed", format!("`{}`: {message}", node.op.name())).at(place)
        };
        let operands = node
            .operands
            .iter()
            .map(|operand| match operand {
                Operand::Value(v) => {
                    values[v.index()].clone().ok_or_else(|| failed(format!("{v} has no value")))
                }
                Operand::Weight(w) => weights.tensor(*w).map(Rc::new),
                Operand::State(s) => match state_index[s.index()] {
                    Some(i) => Ok(Rc::new(states[i].clone())),
                    None => Err(failed(format!("{s} does not exist"))),
                },
            })
            .collect::<Result<Vec<_>>>()?;
        let types: Vec<TensorType> = node.results.iter().map(|r| graph.values[*r].ty.clone()).collect();
        let refs: Vec<&Tensor> = operands.iter().map(Rc::as_ref).collect();
        let context = EvalCtx { operands: &refs, results: &types, bindings: &bindings };
        let results = compute(node, &context).map_err(failed)?;
        for (result, tensor) in node.results.iter().zip(results) {
            if node.op.traits().writes_state
                && let Some(state) = module.state_of(Operand::Value(*result))
                && let Some(i) = state_index[state.index()]
            {
                states[i] = tensor.clone();
            }
            values[result.index()] = Some(Rc::new(tensor));
        }
        for operand in &node.operands {
            if let Operand::Value(v) = operand
                && last_use[v.index()] == at
            {
                values[v.index()] = None;
            }
        }
    }
    graph
        .outputs
        .iter()
        .map(|o| {
            values[o.value.index()].as_deref().cloned().ok_or_else(|| {
                Error::new(
                    Kind::BadInput,
                    "eval/no-output",
                    format!("output \"{}\" was not computed", o.name),
                )
            })
        })
        .collect()
}
