//! Matmuls: `y = x w^T` with norms before and epilogues behind.
//!
//! Weights come in two layouts. *Rows* is the plain `[n, k]`. *Cores* is `[n / 8, k / 8, 8, 8]`: blocks of eight rows by
//! eight columns, 128 contiguous bytes for 16-bit elements. A warp reads four neighbouring blocks as 512 contiguous bytes,
//! and a tile of blocks is what the matrix instructions read from shared memory without a swizzle.
//!
//! Four families share the work. Weights in cores: [`skinny`] for few rows, [`large`] for many. Others: [`gemv`] for few rows,
//! [`simple`] for everything else. Where a measurement chose it, [`simt`] serves many rows in f32, and products of a [`library`]
//! stand beside kernels.

pub mod choice;
pub mod epilogue;
pub mod gemv;
pub mod large;
pub mod library;
pub mod norm;
pub mod problem;
pub mod simple;
pub mod simt;
pub mod skinny;
pub mod tile_epilogue;

pub use choice::Choices;
pub use problem::{Layout, Norm, Problem, Term};

use millrace_ir::{Dim, Op};

use super::plan::{Planned, Site, SiteVariant};

/// How to run `matmul`, `matmul.fused` or `rms_norm, matmul.fused`; `None` for any other site. `choices` replace built-in
/// ones.
pub fn plan(site: Site<'_>, choices: &Choices) -> Option<Planned> {
    if site.only().is_some_and(|node| matches!(*node.op, Op::Matmul(_))) {
        return simple::activations(site);
    }
    let problem = Problem::of(site)?;
    // Kernels that compute all of the weight know its bounds, which is a little faster.
    let streamed = match problem.tiles() {
        Some(_) => variants(&problem, choices)?,
        None => Vec::new(),
    };
    let variants = variants(&Problem { whole: true, ..problem }, choices)?;
    Some(Planned { variants, streamed, workspace: Dim::from(0u64), counters: 0 })
}

/// The ways to run a problem.
fn variants(problem: &Problem<'_>, choices: &Choices) -> Option<Vec<SiteVariant>> {
    let mut variants = skinny::variants(problem);
    match large::variants(problem) {
        Some(tail) => {
            let fewest = large::fewest_rows(problem);
            variants.retain(|few| few.when.iter().all(|c| c.max < fewest));
            variants.extend(tail.into_iter().map(|mut variant| {
                variant.launches.splice(0..0, norm::launch(problem));
                variant
            }));
        }
        None => {
            variants.extend(gemv::variants(problem));
            variants.push(SiteVariant::new(Vec::new(), simple::launches(problem)?));
        }
    }
    choice::apply(problem, choices, &mut variants);
    if let Some(m) = problem.m.as_const() {
        // The number of rows is known: one variant is all.
        let fits = |v: &SiteVariant| {
            v.when.iter().all(|c| u64::try_from(m).is_ok_and(|m| (c.min..=c.max).contains(&m)))
        };
        variants = variants.into_iter().find(fits).into_iter().collect();
        variants.iter_mut().for_each(|v| v.when.clear());
    }
    Some(variants)
}
