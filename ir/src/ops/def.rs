//! What an op must say of itself.

use crate::attr::{AttrReader, Attrs};
use crate::dim::{Bindings, Dim};
use crate::dtype::DType;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// How far a faster implementation may differ from `eval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// Moves or selects elements: results are bitwise equal.
    Exact,
    /// One rounding per element.
    Rounded,
    /// Sums or transcendental functions: the error grows with the reduced extent.
    Accumulated,
}

/// Properties that passes and planners rely on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpTraits {
    /// Error class.
    pub numerics: Numerics,
    /// The first two operands may be swapped.
    pub commutative: bool,
    /// Result `i, j, ..` depends only on operand elements at `i, j, ..`.
    pub elementwise: bool,
    /// Operand 0 is a state (or a version of one) and result 0 is its next version, in place.
    pub writes_state: bool,
    /// Result 0 may share the buffer of this operand if the sizes agree and the operand dies here.
    pub in_place: Option<usize>,
    /// Result 0 is the operand's bytes unchanged.
    pub view: bool,
    /// Legal only from phase fused on.
    pub fused_only: bool,
}

impl OpTraits {
    /// No special property.
    pub const fn plain(numerics: Numerics) -> Self {
        OpTraits {
            numerics,
            commutative: false,
            elementwise: false,
            writes_state: false,
            in_place: None,
            view: false,
            fused_only: false,
        }
    }
}

/// Operand types during inference.
pub struct InferCtx<'a> {
    /// One type per operand.
    pub operands: &'a [TensorType],
}

impl<'a> InferCtx<'a> {
    /// Exactly `N` operands.
    pub fn exactly<const N: usize>(&self) -> Result<[&'a TensorType; N], String> {
        let refs: Vec<&TensorType> = self.operands.iter().collect();
        refs.try_into().map_err(|_| format!("takes {N} operands, got {}", self.operands.len()))
    }

    /// At least `n` operands.
    pub fn at_least(&self, n: usize) -> Result<(), String> {
        if self.operands.len() < n {
            return Err(format!("takes at least {n} operands, got {}", self.operands.len()));
        }
        Ok(())
    }
}

/// Fails unless `ty` has a float element type.
pub fn need_float(what: &str, ty: &TensorType) -> Result<(), String> {
    if ty.dtype.is_float() { Ok(()) } else { Err(format!("{what} must be a float tensor, not {ty}")) }
}

/// Fails unless `ty` is an `i32` or `i64` tensor.
pub fn need_index(what: &str, ty: &TensorType) -> Result<(), String> {
    if matches!(ty.dtype, DType::I32 | DType::I64) {
        Ok(())
    } else {
        Err(format!("{what} must be an i32 or i64 tensor, not {ty}"))
    }
}

/// Fails unless `ty` has `rank` dimensions.
pub fn need_rank(what: &str, ty: &TensorType, rank: usize) -> Result<(), String> {
    if ty.rank() == rank { Ok(()) } else { Err(format!("{what} must have rank {rank}, not {ty}")) }
}

/// Fails unless both have one element type.
pub fn need_same_dtype(a: &TensorType, b: &TensorType) -> Result<(), String> {
    if a.dtype == b.dtype { Ok(()) } else { Err(format!("element types differ: {a} and {b}")) }
}

/// Fails unless the extents agree.
pub fn need_dim(what: &str, found: &Dim, expected: &Dim) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{what} is {found}, expected {expected}")) }
}

/// Fails unless `axis` exists in `ty`.
pub fn need_axis(axis: usize, ty: &TensorType) -> Result<(), String> {
    if axis < ty.rank() { Ok(()) } else { Err(format!("axis {axis} does not exist in {ty}")) }
}

/// Fails unless `eps` is finite and not negative.
pub fn need_eps(eps: f64) -> Result<(), String> {
    if eps.is_finite() && eps >= 0.0 {
        Ok(())
    } else {
        Err(format!("eps must be finite and not negative, not {eps}"))
    }
}

/// Operands and symbol values during evaluation.
pub struct EvalCtx<'a> {
    /// Operand tensors.
    pub operands: &'a [&'a Tensor],
    /// Result types with shapes at these bindings.
    pub results: &'a [TensorType],
    /// Symbol values.
    pub bindings: &'a Bindings,
}

impl<'a> EvalCtx<'a> {
    /// Operand `index`.
    pub fn operand(&self, index: usize) -> Result<&'a Tensor, String> {
        self.operands.get(index).copied().ok_or_else(|| format!("operand {index} is missing"))
    }

    /// A dim's value.
    pub fn extent(&self, dim: &Dim) -> Result<usize, String> {
        dim.extent(self.bindings)
            .and_then(|v| usize::try_from(v).ok())
            .ok_or_else(|| format!("`{dim}` has no non-negative value here"))
    }

    /// The shape of result `index`.
    pub fn result_shape(&self, index: usize) -> Result<Vec<usize>, String> {
        let ty = self.results.get(index).ok_or_else(|| format!("result {index} is missing"))?;
        ty.shape.iter().map(|d| self.extent(d)).collect()
    }

    /// A zero tensor of the type of result `index`.
    pub fn empty(&self, index: usize) -> Result<Tensor, String> {
        let shape = self.result_shape(index)?;
        let dtype = self.results[index].dtype;
        Tensor::zeros(dtype, &shape).ok_or_else(|| format!("result {index} is too large to evaluate"))
    }
}

/// An op family: its parameters are the fields of the implementing type.
pub trait OpDef: Clone + PartialEq + std::fmt::Debug + Sized {
    /// Spellings in the text form; a family of similar functions has several.
    const NAMES: &'static [&'static str];

    /// This op's spelling.
    fn name(&self) -> &'static str {
        Self::NAMES[0]
    }

    /// Its parameters, defaults left out.
    fn attrs(&self) -> Attrs;

    /// The op spelled `name` from parameters.
    fn from_attrs(name: &str, attrs: &mut AttrReader<'_>) -> Result<Self, String>;

    /// Result types from operand types.
    fn infer(&self, ctx: &InferCtx<'_>) -> Result<Vec<TensorType>, String>;

    /// The meaning: naive, in f64, results unrounded. Shapes were checked by `infer`; values (indices, lengths)
    /// were not.
    fn eval(&self, ctx: &EvalCtx<'_>) -> Result<Vec<Tensor>, String>;

    /// Properties.
    fn traits(&self) -> OpTraits;
}
