//! Tensor types: element type and symbolic shape, spelled `bf16[$t, 4096]`.

use std::collections::BTreeSet;
use std::fmt;

use crate::dim::{Bindings, Dim};
use crate::dtype::DType;
use crate::list::List;

/// Extents of a tensor, outermost first; types of repeated layers share them.
pub type Shape = List<Dim>;

/// Element type and shape. Memory order is row-major and dense.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Shape,
}

impl TensorType {
    /// A type from parts; constants and symbols both convert into [`Dim`].
    pub fn new<D: Into<Dim>>(dtype: DType, shape: impl IntoIterator<Item = D>) -> Self {
        TensorType { dtype, shape: shape.into_iter().map(Into::into).collect() }
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Number of elements.
    pub fn elements(&self) -> Dim {
        product(&self.shape)
    }

    /// Bytes of the dense tensor, without padding.
    pub fn bytes(&self) -> Dim {
        let bits = self.dtype.bits() as u64;
        if bits.is_multiple_of(8) {
            return self.elements().mul(&Dim::from(bits / 8));
        }
        self.elements().mul(&Dim::from(bits)).ceil_div(8)
    }

    /// A number that is equal for equal types; cheap, and different for most different ones.
    pub fn fingerprint(&self) -> u64 {
        self.shape.iter().fold(self.dtype as u64 + 1, |acc, dim| mix(acc, dim.fingerprint()))
    }

    /// The shape if it is free of symbols and no extent is negative.
    pub fn const_shape(&self) -> Option<Vec<u64>> {
        self.shape.iter().map(|d| d.as_const().and_then(|c| u64::try_from(c).ok())).collect()
    }

    /// The shape under `bindings`.
    pub fn shape_at(&self, bindings: &Bindings) -> Option<Vec<u64>> {
        self.shape.iter().map(|d| d.extent(bindings)).collect()
    }

    /// The last extent, 1 for a scalar.
    pub fn last(&self) -> Dim {
        self.shape.last().cloned().unwrap_or_else(|| Dim::from(1i64))
    }

    /// The same shape with another element type.
    #[must_use]
    pub fn with_dtype(&self, dtype: DType) -> Self {
        TensorType { dtype, shape: self.shape.clone() }
    }
}

/// Shapes that were seen, so that equal ones share their extents.
#[derive(Debug, Default)]
pub(crate) struct SharedShapes(BTreeSet<Shape>);

impl SharedShapes {
    /// Most shapes that are remembered: those of a model's layers, not of an adversary's.
    const MOST: usize = 4096;

    /// Lets `ty` share its shape with an equal one that was seen before.
    pub(crate) fn share(&mut self, ty: &mut TensorType) {
        if let Some(known) = self.0.get(&ty.shape) {
            ty.shape = known.clone();
        } else if self.0.len() < Self::MOST {
            self.0.insert(ty.shape.clone());
        }
    }
}

/// Product of extents.
pub fn product(shape: &[Dim]) -> Dim {
    // Constants first: they multiply without making a new sum.
    let constant = shape.iter().filter_map(Dim::as_const).fold(1i64, i64::saturating_mul);
    let symbolic = shape.iter().filter(|d| d.as_const().is_none()).cloned();
    match symbolic.reduce(|acc, d| acc.mul(&d)) {
        Some(dim) => dim.mul(&Dim::from(constant)),
        None => Dim::from(constant),
    }
}

/// Folds a number into a fingerprint.
pub(crate) fn mix(acc: u64, value: u64) -> u64 {
    (acc.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Bytes of a dense tensor with constant extents; `None` on overflow.
pub fn const_bytes(dtype: DType, shape: &[u64]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |acc, d| acc.checked_mul(*d))?;
    elements.checked_mul(dtype.bits() as u64).map(|bits| bits.div_ceil(8))
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, dim) in self.shape.iter().enumerate() {
            write!(f, "{}{dim}", if i == 0 { "" } else { ", " })?;
        }
        write!(f, "]")
    }
}

impl fmt::Debug for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
