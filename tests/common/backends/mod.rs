//! The differential suite: what is run, where, and what is expected.

pub mod case;
pub mod kernels;
pub mod models;
pub mod ops;
pub mod run;

use std::path::Path;

use case::Case;

/// Every case, by name; `graphs` of them are random graphs. Configurations are written into `folder`.
pub fn cases(folder: &Path, graphs: u64) -> Vec<Case> {
    // What takes longest comes first: cases run side by side.
    let mut cases = models::models(folder);
    cases.extend(kernels::paged());
    cases.extend(kernels::matmuls());
    cases.extend(kernels::sequences());
    cases.extend(ops::ops());
    cases.extend(models::random(graphs));
    let mut names: Vec<&str> = cases.iter().map(|c| c.name.as_str()).collect();
    names.sort_unstable();
    let twice = names.windows(2).find(|w| w[0] == w[1]);
    assert!(twice.is_none(), "two cases are called {twice:?}");
    cases
}
