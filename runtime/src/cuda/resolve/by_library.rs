//! Products of a library with numbers for dims and operands, or the answer that kernels run in their place.

use millrace_ir::Result;
use millrace_ir::launch::{self, ByLibrary, LaunchTable};

use super::{Action, Scope};
use crate::cuda::library::{Places, Question};
use crate::cuda::products::{Call, Takes, question};
use crate::cuda::range::Range;
use crate::places::{Piece, forged};

impl Scope<'_> {
    /// What runs where `library` takes every product of a variant; `None` if it does not.
    pub(super) fn by_library(
        &self,
        table: &LaunchTable,
        run: &ByLibrary,
        library: &dyn Takes,
    ) -> Result<Option<Vec<Action>>> {
        let mut actions = self.launches(table, &run.before)?;
        for product in &run.products {
            let Some(call) = self.product(product)? else { continue };
            if !library.takes(&call) {
                return Ok(None);
            }
            actions.push(Action::Product(call));
        }
        Ok(Some(actions))
    }

    /// A product with its numbers, unless it has no rows.
    fn product(&self, product: &launch::Product) -> Result<Option<Call>> {
        let launch::Product { x, weight, first, y, bias, residual, rows, at, suggestion, .. } = product;
        let asked: Question = question(product, self.extent(rows)?);
        if asked.product.m == 0 {
            return Ok(None);
        }
        let small = || forged("a product of a library leaves its memory");
        let [w_bytes, _, y_bytes] = asked.bytes().ok_or_else(small)?;
        let behind = |all: Range, row: u64, bytes: u64| {
            let start = first.checked_mul(row)?;
            all.part(start, bytes)
        };
        let row_bytes = w_bytes / asked.product.n;
        let columns_bytes = y_bytes / asked.product.m;
        let bias = bias.map(|operand| self.operand(operand)).transpose()?;
        let bias = match bias {
            // Its elements are those of y.
            Some(all) => Some(behind(all, columns_bytes / asked.product.n, columns_bytes).ok_or_else(small)?),
            None => None,
        };
        let places = Places {
            w: behind(self.operand(*weight)?, row_bytes, w_bytes).ok_or_else(small)?,
            x: self.operand(*x)?,
            y: self.operand(*y)?,
            bias,
            residual: residual.map(|operand| self.operand(operand)).transpose()?,
        };
        if !asked.fits(&places) {
            return Err(small());
        }
        let reads = [Some(places.w), Some(places.x), places.bias];
        let apart = places.residual.filter(|r| r.base != places.y.base);
        if reads.into_iter().chain([apart]).flatten().any(|read| read.overlaps(places.y)) {
            return Err(forged("a product of a library writes over what it reads"));
        }
        Ok(Some(Call { question: asked, at: *at, suggestion: *suggestion, places }))
    }
}
