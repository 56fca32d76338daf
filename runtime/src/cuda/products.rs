//! Who computes the products that a launch table may have a library compute: the library where it is there, is wanted and
//! takes them, and the kernels beside them everywhere else.
//!
//! Which algorithm runs is settled when a session is opened: the library is asked once for each kind of product. At the
//! rows of a step it is only asked whether that algorithm takes them, when the step is prepared. Nothing here touches
//! memory of a session.

use std::sync::{Arc, Mutex, PoisonError};

use millrace_ir::Result;
use millrace_ir::launch::{self, LaunchTable};

use super::driver::Context;
use super::library::{ALIGN, Algorithm, Library, Places, Plan, Product, Question, suggestions};
use super::report::LibraryReport;

/// A product at certain rows and addresses.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    /// What is computed.
    pub question: Question,
    /// Rows that the library was asked about when its algorithm was chosen.
    pub at: u64,
    /// Which of its suggestions that is.
    pub suggestion: u32,
    /// Where everything is.
    pub places: Places,
}

/// Who may take products.
pub(super) trait Takes {
    /// Whether a product runs by the library; if not, the kernels beside it run.
    fn takes(&self, call: &Call) -> bool;
}

/// A product that is ready to be enqueued.
#[derive(Debug)]
pub(super) struct ReadyProduct {
    pub plan: Plan,
    pub places: Places,
}

/// The library as a table needs it.
pub(super) struct Supply {
    /// Variants of the table that name the library.
    variants: usize,
    library: Option<Arc<Library>>,
    /// By kind of product the algorithm, if the library has one. Rows are those that were asked about.
    algorithms: Vec<(Question, u32, Option<Algorithm>)>,
    /// Why kernels run instead, each said once.
    reasons: Mutex<Vec<String>>,
    workspace: u64,
}

/// The question that a table's product is, for `rows` rows.
pub(super) fn question(product: &launch::Product, rows: u64) -> Question {
    let launch::Product { n, k, dtype, out, bias, residual, .. } = product;
    let of = Product { m: rows, n: *n, k: *k, dtype: *dtype, out: *out };
    Question { product: of, bias: bias.is_some(), residual: residual.is_some() }
}

/// Whether every operand begins where the library's kernels want it.
fn aligned(places: &Places) -> bool {
    let Places { w, x, y, bias, residual } = places;
    let all = [Some(*w), Some(*x), Some(*y), *bias, *residual];
    all.into_iter().flatten().all(|range| range.base.is_multiple_of(ALIGN))
}

/// A kind of product in words.
fn words(question: &Question) -> String {
    let Product { m, n, k, dtype, out } = question.product;
    let with = |is: bool, what: &'static str| if is { what } else { "" };
    let (bias, residual) = (with(question.bias, " + bias"), with(question.residual, " + residual"));
    format!("[{m}, {k}] x [{n}, {k}]{bias}{residual}, {dtype} to {out}")
}

impl Supply {
    /// Asks the library for the products of `table`, unless it is not `wanted`. That it is not there, or fails, is a reason
    /// to run kernels and no error.
    pub fn open(context: &Arc<Context>, table: &LaunchTable, wanted: bool) -> Supply {
        let variants = table.by_library().count();
        if variants == 0 || !wanted {
            return Supply::without(table, "it is not wanted");
        }
        match Library::open(context) {
            Ok(Some(library)) => Supply::with(&library, table),
            Ok(None) => Supply::without(table, "it is not installed"),
            Err(error) => Supply::without(table, &error.to_string()),
        }
    }

    /// Kernels for everything.
    pub fn without(table: &LaunchTable, why: &str) -> Supply {
        let variants = table.by_library().count();
        let reasons = if variants > 0 { vec![why.to_string()] } else { Vec::new() };
        let reasons = Mutex::new(reasons);
        Supply { variants, library: None, algorithms: Vec::new(), reasons, workspace: 0 }
    }

    /// The products of `table` by a library that is open.
    pub fn with(library: &Arc<Library>, table: &LaunchTable) -> Supply {
        let mut supply = Supply { library: Some(library.clone()), ..Supply::without(table, "") };
        supply.reasons = Mutex::default();
        for product in table.by_library().flat_map(|l| &l.products) {
            let (question, suggestion) = (question(product, product.at), product.suggestion);
            if supply.algorithms.iter().any(|(q, s, _)| (q, *s) == (&question, suggestion)) {
                continue;
            }
            let algorithm = match suggestions(library, &question, suggestion as usize + 1) {
                Ok(found) => found.get(suggestion as usize).copied(),
                Err(error) => {
                    supply.because(error.to_string());
                    None
                }
            };
            if algorithm.is_none() {
                supply.because(format!("it has no algorithm {suggestion} for {}", words(&question)));
            }
            supply.algorithms.push((question, suggestion, algorithm));
        }
        if supply.algorithms.iter().all(|(_, _, algorithm)| algorithm.is_none()) {
            supply.library = None;
        } else {
            supply.workspace = table.library_workspace;
        }
        supply
    }

    /// Bytes of scratch memory that products want.
    pub fn workspace(&self) -> u64 {
        self.workspace
    }

    /// What there is to tell; `None` for a table that names no library.
    pub fn report(&self) -> Option<LibraryReport> {
        let reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let version = self.library.as_ref().map(|l| l.version());
        let bytes = self.workspace;
        (self.variants > 0).then_some(LibraryReport {
            variants: self.variants,
            version,
            bytes,
            reasons,
            last_products: 0,
        })
    }

    fn because(&self, reason: String) {
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }

    /// The plan of a product, if the library computes it.
    fn plan(&self, call: &Call) -> Result<Option<Plan>> {
        let asked = Question { product: Product { m: call.at, ..call.question.product }, ..call.question };
        let known = self.algorithms.iter().find(|(q, s, _)| (q, *s) == (&asked, call.suggestion));
        match (&self.library, known) {
            (Some(library), Some((_, _, Some(algorithm)))) => {
                Plan::new(library, call.question, *algorithm, call.places.bias)
            }
            _ => Ok(None),
        }
    }

    /// A product that [`Takes::takes`] took.
    pub fn ready(&self, call: &Call) -> Result<Option<ReadyProduct>> {
        Ok(self.plan(call)?.map(|plan| ReadyProduct { plan, places: call.places }))
    }
}

impl Takes for Supply {
    fn takes(&self, call: &Call) -> bool {
        if !aligned(&call.places) {
            self.because(format!("an operand of {} is not aligned", words(&call.question)));
            return false;
        }
        match self.plan(call) {
            Ok(Some(_)) => true,
            Ok(None) => {
                // Why there is no algorithm has been said.
                let asked = Product { m: call.at, ..call.question.product };
                if self.algorithms.iter().any(|(q, _, known)| q.product == asked && known.is_some()) {
                    self.because(format!(
                        "algorithm {} does not take {}",
                        call.suggestion,
                        words(&call.question)
                    ));
                }
                false
            }
            Err(error) => {
                self.because(error.to_string());
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::range::Range;
    use super::*;
    use millrace_ir::DType;

    fn call(base: u64) -> Call {
        let range = |len| Range { base, len };
        let product = Product { m: 2, n: 4, k: 4, dtype: DType::F32, out: DType::F32 };
        let places = Places { w: range(64), x: range(32), y: range(32), bias: None, residual: None };
        Call { question: Question::from(product), at: 64, suggestion: 0, places }
    }

    #[test]
    fn operands_are_aligned() {
        assert!(aligned(&call(4096).places) && !aligned(&call(4104).places));
        let odd = Range { base: 4100, len: 16 };
        assert!(!aligned(&Places { bias: Some(odd), ..call(4096).places }));
        assert!(!aligned(&Places { residual: Some(odd), ..call(4096).places }));
    }

    #[test]
    fn without_the_library_nothing_is_taken_and_the_reason_is_said_once() {
        let table = crate::cuda::testing::library_table();
        let supply = Supply::without(&table, "it is not installed");
        assert!(!supply.takes(&call(4096)) && !supply.takes(&call(4104)) && !supply.takes(&call(4104)));
        assert_eq!(supply.workspace(), 0);
        let report = supply.report().unwrap();
        assert_eq!((report.variants, report.version, report.bytes), (1, None, 0));
        assert_eq!(report.reasons.len(), 2, "{report:?}");
        assert!(report.to_string().contains("it is not installed"), "{report}");
        let mut plain = table;
        plain.steps[0].variants.iter_mut().for_each(|v| v.library = None);
        assert_eq!(Supply::without(&plain, "it is not wanted").report(), None);
    }
}
