//! Matrix products that a library of the device may compute in place of a variant's launches.
//!
//! A table never needs the library: a variant that names it has launches of its own for the same rows, which run
//! wherever the library is absent, is not wanted or does not take a product. What is here names operands and extents only;
//! which library it is, and how it is asked, is the business of the runtime.

use serde::{Deserialize, Serialize};

use super::text::{dim_text, dtype_text, operand_option_text, operand_text};
use super::{Launch, LaunchTable, Variant, bad, of_tile};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::error::Result;
use crate::graph::Operand;

/// Bytes of scratch memory that every algorithm of a library gets, and no more.
pub const LIBRARY_WORKSPACE: u64 = 32 << 20;

/// Most bytes of it that a table may ask for.
const MOST_WORKSPACE: u64 = 1 << 30;

/// Most products of a variant.
const MOST_PRODUCTS: usize = 64;

/// Most suggestions that a library may be asked for.
pub const MOST_SUGGESTIONS: u32 = 32;

/// What runs instead of the launches of a variant where the library takes every product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ByLibrary {
    /// Launches in front of the products, such as a norm of their operand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub before: Vec<Launch>,
    /// Products in order.
    pub products: Vec<Product>,
}

/// `y = x w^T + bias + residual`, all row by row: sums are in f32 and rounded once, to the elements of `y`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Product {
    /// `[rows, k]`.
    #[serde(with = "operand_text")]
    pub x: Operand,
    /// A weight `[.., k]`, whose rows `first ..+ n` are `w`.
    #[serde(with = "operand_text")]
    pub weight: Operand,
    /// First row of the weight.
    pub first: u64,
    /// `[rows, n]`, a value.
    #[serde(with = "operand_text")]
    pub y: Operand,
    /// Elements `first ..+ n` of it are added to each row; of the type of `y`.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "operand_option_text")]
    pub bias: Option<Operand>,
    /// `[rows, n]` of the type of `y`, which is added: the memory of `y` or apart from it.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "operand_option_text")]
    pub residual: Option<Operand>,
    /// Rows of `x` and `y`.
    #[serde(with = "dim_text")]
    pub rows: Dim,
    /// Rows of `w`.
    pub n: u64,
    /// Columns of `x` and `w`.
    pub k: u64,
    /// Element type of `x` and `w`.
    #[serde(with = "dtype_text")]
    pub dtype: DType,
    /// Element type of `y`.
    #[serde(with = "dtype_text")]
    pub out: DType,
    /// Which of the library's suggestions for [`Product::at`] rows runs, from 0.
    pub suggestion: u32,
    /// Rows that the library is asked about. What it suggests serves all rows of the variant.
    pub at: u64,
}

impl Product {
    /// What table and types alone tell to be wrong.
    fn check(&self) -> Result<()> {
        let Product { x, weight, y, rows, n, k, dtype, out, suggestion, at, .. } = self;
        let float = |d: &DType| matches!(d, DType::F32 | DType::F16 | DType::BF16);
        let (value, held) =
            (|o: &Operand| matches!(o, Operand::Value(_)), matches!(weight, Operand::Weight(_)));
        if !value(x) || !value(y) || !held || !float(dtype) || !float(out) {
            return Err(bad("a product of a library has operands or types of another kind"));
        }
        if *n == 0 || *k == 0 || *at == 0 || *suggestion >= MOST_SUGGESTIONS || of_tile(rows) {
            return Err(bad("a product of a library has extents that none has"));
        }
        Ok(())
    }
}

impl LaunchTable {
    /// Variants that a library may run, in order.
    pub fn by_library(&self) -> impl Iterator<Item = &ByLibrary> {
        self.steps.iter().flat_map(|s| &s.variants).filter_map(|v| v.library.as_ref())
    }

    /// What a table says about a library: products where there is scratch memory for them and nowhere else, none for
    /// weights that come in parts, and launches of its own beside them.
    pub(super) fn check_library(&self) -> Result<()> {
        let streamed = |v: &Variant| v.library.is_some();
        if self.steps.iter().flat_map(|s| &s.streamed).any(streamed) {
            return Err(bad("a library reads weights as a whole"));
        }
        if self.by_library().next().is_some() != (self.library_workspace > 0)
            || self.library_workspace > MOST_WORKSPACE
        {
            return Err(bad("products of a library and scratch memory for them do not belong together"));
        }
        for variant in self.steps.iter().flat_map(|s| &s.variants) {
            let Some(ByLibrary { before, products }) = &variant.library else { continue };
            if variant.launches.is_empty() {
                return Err(bad("a variant needs a library"));
            }
            if products.is_empty() || products.len() > MOST_PRODUCTS || before.len() > MOST_PRODUCTS {
                return Err(bad(format!("a library is asked for {} products", products.len())));
            }
            if before.iter().any(|launch| launch.tiles.is_some()) {
                return Err(bad("a library reads weights as a whole"));
            }
            products.iter().try_for_each(Product::check)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "products_tests.rs"]
mod tests;
