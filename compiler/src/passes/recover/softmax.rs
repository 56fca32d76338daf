//! Softmax along an axis.
//!
//! ```text
//! e = exp(x - max(x)) ; e / sum(e)  ->  softmax(x) {axis}
//! e = exp(x) ; e / sum(e)           ->  softmax(x) {axis}
//! ```

use std::sync::LazyLock;

use millrace_ir::NodeId;
use millrace_ir::ops::Softmax;

use crate::pattern::{Found, Pattern, div, either, exp, largest, named, sub, sum};
use crate::rewrite::{From, Outcome, Patch, View};

static SOFTMAX: LazyLock<Pattern> =
    LazyLock::new(|| div(named("e", exp(either([sub("x", largest("x")), "x".into()]))), sum("e")));

/// Looks for a softmax that ends in this node.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let result = view.node(id).results[0];
    match SOFTMAX.find(view, id) {
        Found::Nothing => Outcome::NoMatch,
        Found::Read(reason) => Outcome::Blocked(format!("softmax: {reason}")),
        Found::Match(found) => {
            let (Some(x), Some(axis)) = (found.value("x"), found.axis()) else { return Outcome::NoMatch };
            if view.ty(x) != &view.module.graph.values[result].ty {
                return Outcome::NoMatch;
            }
            let mut patch = Patch::new(found.nodes());
            let new = patch.node(Softmax { axis }, [From::Old(x)]);
            patch.replace(result, From::New(new, 0));
            Outcome::Rewrite(patch)
        }
    }
}
