//! What is known of the elements of a value, whatever the inputs hold.

use crate::dim::Dim;
use crate::dtype::DType;
use crate::ops::Op;
use crate::types::TensorType;

/// What is known of a tensor's elements, whatever the inputs.
#[derive(Clone, Debug)]
pub struct Known {
    /// Type.
    pub ty: TensorType,
    /// No element is smaller.
    pub low: f64,
    /// No element is larger.
    pub high: f64,
    /// Every legal implementation gives the same bits.
    pub exact: bool,
    /// All elements are valid indices of an axis of this extent.
    pub below: Option<Dim>,
}

impl Known {
    /// Largest magnitude.
    pub fn bound(&self) -> f64 {
        self.low.abs().max(self.high.abs())
    }

    /// Whether every element is an index of an axis of `extent`.
    pub fn indexes(&self, extent: &Dim) -> bool {
        let within = extent.as_const().is_some_and(|n| self.high < n as f64);
        self.low >= 0.0 && (within || self.below.as_ref() == Some(extent))
    }
}

/// Whether kernels compute in this element type.
pub fn computes(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

/// Whether it is an integer type.
pub fn counts(dtype: DType) -> bool {
    matches!(dtype, DType::I8 | DType::U8 | DType::I32 | DType::I64)
}

/// The extent of which all elements of the result are indices.
pub(super) fn index_bound(op: &Op, known: &[Known], inferred: &[TensorType]) -> Option<Dim> {
    match op {
        Op::Iota(iota) => Some(inferred[0].shape[iota.axis].clone()),
        Op::Reshape(_) | Op::Transpose(_) | Op::Slice(_) | Op::Broadcast(_) | Op::Gather(_) => {
            known[0].below.clone()
        }
        _ => None,
    }
}
