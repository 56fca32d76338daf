//! Binding: the values of symbols that make declared types equal actual shapes.

use crate::dim::{Bindings, Dim, Sym, SymDecl};
use crate::error::{Error, Kind, Result};
use crate::graph::{Def, Module};
use crate::types::TensorType;

/// Binds every symbol that occurs alone or plus a constant in `declared`, and checks all extents and ranges.
///
/// `tensors` pairs what a tensor is called with its declared type and actual shape.
///
/// # Errors
/// `run/bad-shape` if an extent disagrees, `run/out-of-range` if a symbol leaves its declared range.
pub fn bind(decls: &[SymDecl], tensors: &[(&str, &TensorType, &[u64])]) -> Result<Bindings> {
    let mut bindings = Bindings::new();
    for (_, ty, shape) in tensors {
        for (dim, extent) in ty.shape.iter().zip(*shape) {
            if let Some((sym, offset)) = affine(dim)
                && let Some(value) = (*extent as i64).checked_sub(offset)
                && value >= 0
                && bindings.get(sym).is_none()
            {
                bindings.set(sym, value as u64);
            }
        }
    }
    for (name, ty, shape) in tensors {
        let expected = ty.shape_at(&bindings);
        if expected.as_deref() != Some(shape) {
            let bound: Vec<String> = bindings.iter().map(|(s, v)| format!("{s} = {v}")).collect();
            return Err(Error::new(
                Kind::BadInput,
                "run/bad-shape",
                format!("has shape {shape:?} but is declared {ty} ({})", bound.join(", ")),
            )
            .at(format!("\"{name}\"")));
        }
    }
    for decl in decls {
        if let Some(value) = bindings.get(decl.sym)
            && (value < decl.min || value > decl.max || !value.is_multiple_of(decl.multiple.max(1)))
        {
            return Err(Error::new(
                Kind::BadInput,
                "run/out-of-range",
                format!(
                    "{} = {value} is outside {}..={} (multiple {})",
                    decl.sym, decl.min, decl.max, decl.multiple
                ),
            )
            .hint("stay within the limits the engine was compiled for, or compile it with larger ones"));
        }
    }
    Ok(bindings)
}

/// The symbol and constant of `$s + c`.
fn affine(dim: &Dim) -> Option<(Sym, i64)> {
    let [sym] = dim.symbols().try_into().ok()?;
    let offset = dim.sub(&Dim::from(sym)).as_const()?;
    Some((sym, offset))
}

impl Module {
    /// Public name and type of every graph input, in order.
    pub fn input_types(&self) -> Vec<(&str, &TensorType)> {
        self.graph
            .inputs
            .iter()
            .filter_map(|id| self.graph.values.get(*id))
            .filter_map(|v| match &v.def {
                Def::Input(name) => Some((name.as_str(), &v.ty)),
                Def::Node { .. } => None,
            })
            .collect()
    }

    /// Public name and type of every graph output, in order.
    pub fn output_types(&self) -> Vec<(&str, &TensorType)> {
        self.graph.outputs.iter().map(|o| (o.name.as_str(), &self.graph.values[o.value].ty)).collect()
    }
}
