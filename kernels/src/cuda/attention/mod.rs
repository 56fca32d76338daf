//! Attention over packed sequences and over the paged cache, and the mean over a sequence's rows.
//!
//! Six families share the constants of a `Call`: `decode` serves steps of one row a sequence and splits the
//! sequence over blocks, `single` does so in f32 arithmetic, `prefill` serves any mix of rows with the tensor cores, `hopper`
//! does so with Hopper's, `plain` in f32 arithmetic, `simple` serves every element type and head size with one warp a row
//! and head. All read positions and pages as `millrace_ir::ops::paging` says and
//! keep a row's result independent of the other rows. They must not know how the pages were filled, but for `layer`, which
//! joins the rotation and the cache writes in front of an attention node to it.

mod call;
mod decode;
mod hopper;
mod layer;
mod mean_pool;
mod plain;
mod prefill;
mod simple;
mod single;
mod split;
#[cfg(test)]
mod tests;

use millrace_ir::Op;
use millrace_ir::launch::Condition;

use call::Call;

pub use layer::plan as plan_layer;
pub use split::Split;

use super::matmul::Choices;
use super::plan::{Planned, Site, SiteVariant, between};

/// Finds sequences and tiles of packed rows.
pub(super) const SEQUENCES: &str = include_str!("sequences.cu");

/// Plans `attention`, `paged_attention` and `mean_pool`. `choices` replace what is built in.
pub fn plan(site: Site<'_>, choices: &Choices) -> Option<Planned> {
    if let Op::MeanPool(_) = *site.only()?.op {
        return mean_pool::plan(site);
    }
    let call = Call::of(site)?;
    if !call.fits_tensor_cores() {
        let mut planned = single::plan(&call).unwrap_or_else(Planned::none);
        let simple = simple::launch(&call);
        match plain::launch(&call) {
            Some(plain) => {
                planned.variants.push(SiteVariant::new(single_rows(&call, 0, u64::MAX), vec![simple]));
                planned.variants.push(SiteVariant::new(Vec::new(), vec![plain]));
            }
            None => planned.variants.push(SiteVariant::new(Vec::new(), vec![simple])),
        }
        return Some(planned);
    }
    let hopper = hopper::launch(&call);
    let counters = if hopper.is_some() { hopper::COUNTERS } else { 0 };
    let rest = SiteVariant::new(Vec::new(), vec![hopper.unwrap_or_else(|| prefill::launch(&call))]);
    let mut planned = decode::plan(&call, None, choices).unwrap_or_else(Planned::none);
    planned.variants.push(rest);
    planned.counters = planned.counters.max(counters);
    Some(planned)
}

/// What there is to choose at a site of single rows: keys, and the splits for each, the built-in one first. None at any other
/// site.
pub fn splits(site: Site<'_>) -> Vec<(String, Vec<Split>)> {
    let Some((last, before)) = site.nodes.split_last() else { return Vec::new() };
    let Some(call) = Call::of(Site { nodes: std::slice::from_ref(last), ..site }) else { return Vec::new() };
    if call.paged.is_none() || !call.fits_tensor_cores() {
        return Vec::new();
    }
    decode::choices(&call, !before.is_empty() && layer::is_one_launch(site))
}

/// One row a sequence, and at most `most` of them. A step with as many rows as sequences of other lengths counts as
/// such too; kernels must not rely on more than the condition says.
fn single_rows(call: &Call<'_>, least: u64, most: u64) -> Vec<Condition> {
    vec![between(&call.t.sub(&call.b), 0, 0), between(&call.b, least, most)]
}
