//! Bytes that a module needs at given values of its symbols.

use millrace_ir::{Bindings, Error, Kind, Module, Result, TensorType};

pub(crate) fn no_size(what: &str) -> Error {
    Error::new(Kind::BadInput, "run/no-size", format!("the size of {what} has no value"))
        .hint("every symbol of the graph must occur in an input or a state")
}

/// Bytes of a tensor called `what`.
pub(crate) fn bytes_at(ty: &TensorType, bindings: &Bindings, what: &str) -> Result<u64> {
    ty.bytes().extent(bindings).ok_or_else(|| no_size(what))
}

/// Bytes of what a step allocates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StepSizes {
    pub inputs: Vec<u64>,
    pub outputs: Vec<u64>,
    pub arenas: Vec<u64>,
}

impl StepSizes {
    /// Sizes at `bindings`.
    pub fn at(module: &Module, bindings: &Bindings) -> Result<StepSizes> {
        let tensors = |all: Vec<(&str, &TensorType)>| {
            all.into_iter().map(|(name, ty)| bytes_at(ty, bindings, name)).collect::<Result<Vec<u64>>>()
        };
        let arenas = module
            .arenas
            .iter()
            .map(|(_, arena)| arena.size.extent(bindings).ok_or_else(|| no_size(&arena.name)))
            .collect::<Result<Vec<u64>>>()?;
        Ok(StepSizes {
            inputs: tensors(module.input_types())?,
            outputs: tensors(module.output_types())?,
            arenas,
        })
    }

    /// No bytes for as many tensors and arenas as `module` has.
    pub fn none(module: &Module) -> StepSizes {
        StepSizes {
            inputs: vec![0; module.graph.inputs.len()],
            outputs: vec![0; module.graph.outputs.len()],
            arenas: vec![0; module.arenas.iter().count()],
        }
    }

    /// Each size the larger one of two.
    pub fn raise(&mut self, other: &StepSizes) {
        let raise = |all: &mut [u64], other: &[u64]| {
            all.iter_mut().zip(other).for_each(|(size, other)| *size = (*size).max(*other));
        };
        raise(&mut self.inputs, &other.inputs);
        raise(&mut self.outputs, &other.outputs);
        raise(&mut self.arenas, &other.arenas);
    }

    /// Bytes of inputs and outputs.
    pub fn io(&self) -> u64 {
        self.inputs.iter().chain(&self.outputs).sum()
    }

    /// Bytes of all arenas.
    pub fn activations(&self) -> u64 {
        self.arenas.iter().sum()
    }
}

/// Bytes of all states.
pub(crate) fn state_bytes(module: &Module, bindings: &Bindings) -> Result<u64> {
    module.states.iter().map(|(_, state)| bytes_at(&state.ty, bindings, &state.name)).sum()
}
