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
