//! Numbers of weights that passes look at while compiling.
//!
//! Numbers of files are unknown to them, and literals are equal in equal layers; **seeded** ones (`WeightExpr::Random`)
//! differ from layer to layer. `rolled{..}` rewrites few layers for all of them and has to know whose numbers decided
//! something, so every pass reads numbers with `Context::numbers` or `View::numbers`.

use std::collections::BTreeSet;

use millrace_ir::tensor::Tensor;
use millrace_ir::weights::WeightReader;
use millrace_ir::{Module, Result, WeightExpr, WeightId};

/// Seeded weights whose numbers were read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seeded(BTreeSet<WeightId>);

impl Seeded {
    /// The numbers of `weight`; remembers the seeded weights that it is made of.
    ///
    /// # Errors
    /// If they are in a file, or the weight's expression is broken.
    pub(crate) fn numbers(&mut self, module: &Module, weight: WeightId) -> Result<Tensor> {
        let numbers = WeightReader::new(module).tensor(weight)?;
        let mut work = vec![weight];
        while let Some(id) = work.pop() {
            let expr = &module.weights[id].expr;
            if matches!(expr, WeightExpr::Random { .. }) {
                self.0.insert(id);
            }
            work.extend(expr.parts());
        }
        Ok(numbers)
    }

    /// The weights.
    pub(crate) fn iter(&self) -> impl Iterator<Item = WeightId> + '_ {
        self.0.iter().copied()
    }

    /// Adds what others read.
    pub(crate) fn extend(&mut self, others: impl IntoIterator<Item = WeightId>) {
        self.0.extend(others);
    }
}
