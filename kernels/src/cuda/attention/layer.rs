//! The launch group of a decoder layer's middle: `rope q, rope k, kv_append k, kv_append v, paged_attention`.
//!
//! Steps of one row a sequence are one launch, whose blocks rotate the queries that they use; others run rope and cache
//! writes first, then attention. Both give the same bits.

use millrace_ir::{NodeId, Op, Operand, ValueId};

use super::call::Call;
use super::decode;
use crate::cuda::matmul::Choices;
use crate::cuda::plan::{Planned, Site, SiteVariant};
use crate::cuda::rope::{self, BeforeAttention};

/// Plans a site that ends with a `paged_attention` behind ropes, cache writes and views. `choices` replace what is built in.
pub fn plan(site: Site<'_>, choices: &Choices) -> Option<Planned> {
    let (attention, before) = site.nodes.split_last()?;
    let attention = Site { nodes: std::slice::from_ref(attention), ..site };
    let works = |id| !matches!(*site.module.graph.nodes[id].op, Op::Reshape(_));
    let end = before.iter().rposition(|id| works(*id))? + 1;
    // `rope` sees to the views among its nodes.
    if !before[end..].iter().all(|id| renames(site, *id)) {
        return None;
    }
    let apart =
        in_turn(&rope::plan(Site { nodes: &before[..end], ..site })?, super::plan(attention, choices)?);
    let together = parts(site).and_then(|(call, before)| decode::plan(&call, Some(&before), choices));
    let Some(together) = together else { return Some(apart) };
    let mut variants = together.variants;
    // What they serve is never asked of the others.
    let served = |v: &SiteVariant| variants.iter().any(|own| v.when.starts_with(&own.when));
    let rest: Vec<SiteVariant> = apart.variants.into_iter().filter(|v| !served(v)).collect();
    variants.extend(rest);
    Some(Planned {
        streamed: Vec::new(),
        variants,
        workspace: together.workspace.max_of(&apart.workspace),
        counters: together.counters.max(apart.counters),
    })
}

/// Whether a view lies where its operand does, so that nothing is launched for it.
fn renames(site: Site<'_>, view: NodeId) -> bool {
    let graph = &site.module.graph;
    let node = &graph.nodes[view];
    let place = |value: ValueId| graph.values[value].place.as_ref();
    matches!(node.operands[0], Operand::Value(of) if place(of) == place(node.results[0]))
}

/// Every variant of `second` behind every variant of `first`. The first that holds of the pairs joins the first that
/// hold of either.
fn in_turn(first: &Planned, second: Planned) -> Planned {
    let join = |a: &SiteVariant, b: &SiteVariant| {
        let when = [b.when.as_slice(), &a.when].concat();
        SiteVariant::new(when, [a.launches.as_slice(), &b.launches].concat())
    };
    let pairs = second.variants.iter().flat_map(|b| first.variants.iter().map(move |a| join(a, b)));
    Planned {
        streamed: Vec::new(),
        variants: pairs.collect(),
        // What the first leaves there the second does not need.
        workspace: first.workspace.max_of(&second.workspace),
        counters: first.counters.max(second.counters),
    }
}

/// The call and what comes before it, if one launch can do all.
fn parts<'a>(site: Site<'a>) -> Option<(Call<'a>, BeforeAttention<'a>)> {
    let attention = site.nodes.split_last()?.0;
    let call = Call::of(Site { nodes: std::slice::from_ref(attention), ..site })?;
    let before = BeforeAttention::of(site)?;
    // Pieces of eight columns hold whole pairs, or one half of each.
    let pieces = before.rotary().is_multiple_of(if before.halves() { 16 } else { 8 });
    let one_element_a_thread = call.d - before.rotary() <= decode::THREADS as usize;
    (pieces && one_element_a_thread && call.fits_tensor_cores()).then_some((call, before))
}

/// Whether steps of one row a sequence are one launch.
pub(super) fn is_one_launch(site: Site<'_>) -> bool {
    parts(site).is_some()
}
