//! Ops recovered from primitives, so that a graph written with additions and reductions gets the kernels of one
//! written with norms and attention.
//!
//! ```text
//! mul(mul(x, rsqrt(add(mean(square(x)), eps))), @w)  ->  rms_norm(x, @w) {eps}
//! ```
//!
//! One file per family holds the formulas and what an op asks beyond them. A formula that is there, but does not
//! fit its op, is a remark with the reason. A recovered op leaves out the roundings between the primitives, as
//! fusion does. Run `canonicalize` before, which brings shapes and constants into one spelling.

mod activations;
mod attention;
mod mask;
mod narrow;
mod norms;
mod reductions;
mod rope;
mod rope_angles;
mod softmax;

use millrace_ir::ops::{Cast, Op};
use millrace_ir::{DType, Dim, NodeId, Operand, ValueId};

use super::{BEFORE_FUSION, rule_pass};
use crate::pattern::Match;
use crate::rewrite::{From, Outcome, Patch, Rule, View};

rule_pass!(
    /// See the module.
    Recover,
    "recover",
    "recovers norms, activations, softmax, attention and rope from primitives",
    BEFORE_FUSION,
    None
);

/// What looks at a node for one family of ops.
type Family = fn(&View<'_>, NodeId) -> Outcome;

const FAMILIES: [Family; 7] = [
    norms::look,
    activations::look,
    softmax::look,
    reductions::look,
    rope::look,
    attention::look,
    narrow::look,
];

impl Rule for Recover {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let mut blocked = None;
        for family in FAMILIES {
            match family(view, id) {
                Outcome::NoMatch => {}
                Outcome::Blocked(reason) => {
                    blocked.get_or_insert(reason);
                }
                rewrite => return rewrite,
            }
        }
        blocked.map_or(Outcome::NoMatch, Outcome::Blocked)
    }
}

/// The element type that holds the values of all these: the widest, f32 for two different ones of equal width.
fn widest(dtypes: impl IntoIterator<Item = DType>) -> DType {
    let wider = |a: DType, b: DType| match (a == b, a.bits().cmp(&b.bits())) {
        (true, _) | (_, std::cmp::Ordering::Greater) => a,
        (_, std::cmp::Ordering::Less) => b,
        _ => DType::F32,
    };
    dtypes.into_iter().reduce(wider).unwrap_or(DType::F32)
}

/// `below`, or what the match had cast from it, as an operand of element type `dtype`.
fn as_dtype(view: &View<'_>, found: &Match, patch: &mut Patch, below: Operand, dtype: DType) -> From {
    match found.above(view, below, dtype) {
        Some(operand) => From::Old(operand),
        None => From::New(patch.node(Cast { to: dtype }, [From::Old(below)]), 0),
    }
}

/// The first result of the patch's node `new`, of element type `from`, as one of `to`.
fn cast_result(patch: &mut Patch, new: usize, from: DType, to: DType) -> From {
    if from == to { From::New(new, 0) } else { From::New(patch.node(Cast { to }, [From::New(new, 0)]), 0) }
}

/// Whether the operand is a float vector `[n]`, or `[1, .., 1, n]`.
fn is_vector(view: &View<'_>, operand: Operand, n: &Dim) -> bool {
    let ty = view.ty(operand);
    let one = Dim::from(1i64);
    ty.dtype.is_float()
        && ty.shape.split_last().is_some_and(|(last, lead)| last == n && lead.iter().all(|d| *d == one))
}

/// The other operand of the binary node `user` of `value`.
fn other_operand(view: &View<'_>, user: NodeId, value: Operand) -> Option<Operand> {
    match view.node(user).operands[..] {
        [a, b] if a == value && b != value => Some(b),
        [a, b] if b == value && a != value => Some(a),
        _ => None,
    }
}

/// Whether the op is a cast between float types.
fn is_float_cast(view: &View<'_>, id: NodeId) -> bool {
    let node = view.node(id);
    matches!(&*node.op, Op::Cast(cast) if cast.to.is_float()) && view.ty(node.operands[0]).dtype.is_float()
}

/// The element type a recovered op computes for `result`, and the value it replaces: a result that is only cast to
/// `narrow` is computed in it at once, and the cast joins `nodes`.
fn stored_as(view: &View<'_>, result: ValueId, narrow: DType, nodes: &mut Vec<NodeId>) -> (DType, ValueId) {
    match cast_after(view, result, narrow) {
        Some((cast, value)) => {
            nodes.push(cast);
            (narrow, value)
        }
        None => (view.ty(Operand::Value(result)).dtype, result),
    }
}

/// The cast to `dtype`, with its result, that alone reads `value`, which is wider.
fn cast_after(view: &View<'_>, value: ValueId, dtype: DType) -> Option<(NodeId, ValueId)> {
    let [user] = view.users(value)[..] else { return None };
    let wider = view.ty(Operand::Value(value)).dtype.bits() > dtype.bits();
    let casts = matches!(&*view.node(user).op, Op::Cast(cast) if cast.to == dtype);
    (wider && casts && view.used_once(value)).then(|| (user, view.node(user).results[0]))
}
