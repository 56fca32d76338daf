//! Activations.
//!
//! ```text
//! x * 0.5 * (1 + erf(x / sqrt 2))                            ->  gelu(x)
//! x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))      ->  gelu_tanh(x)
//! 1 / (1 + e^-x)                                             ->  sigmoid(x)
//! x * sigmoid(x), x / (1 + e^-x)                             ->  silu(x)
//! max(x, 0), select(x > 0, x, 0), 0.5 * (x + |x|)            ->  relu(x)
//! ```

use std::f64::consts::{FRAC_1_SQRT_2, PI};
use std::sync::LazyLock;

use millrace_ir::NodeId;
use millrace_ir::ops::Unary;
use millrace_ir::ops::unary::UnaryFn;

use crate::pattern::{
    Found, Pattern, abs, add, div, either, erf, exp, ge, gt, max, mul, neg, pow, product, select, sigmoid,
    square, sub, tanh,
};
use crate::rewrite::{From, Outcome, Patch, View};

static FORMULAS: LazyLock<Vec<(UnaryFn, Pattern)>> = LazyLock::new(|| {
    let x = || Pattern::from("x");
    let n = |value: f64| Pattern::from(value);
    let cube = || either([product([x(), x(), x()]), pow(x(), 3.0), mul(x(), square(x()))]);
    // sqrt(2/pi) * (x + 0.044715 x^3), as it stands or with x in front.
    let inner = |factor: f64| {
        let k = factor * (2.0 / PI).sqrt();
        either([
            product([n(k), add(x(), product([n(0.044715), cube()]))]),
            product([n(k), add(x(), product([n(0.044715), x(), square(x())]))]),
            product([n(k), x(), add(product([n(0.044715), x(), x()]), 1.0)]),
            product([n(k), x(), add(product([n(0.044715), square(x())]), 1.0)]),
        ])
    };
    vec![
        (UnaryFn::Gelu, product([x(), n(0.5), add(erf(mul("x", FRAC_1_SQRT_2)), 1.0)])),
        (UnaryFn::GeluTanh, product([x(), n(0.5), add(tanh(inner(1.0)), 1.0)])),
        (UnaryFn::GeluTanh, product([x(), sigmoid(inner(2.0))])),
        (UnaryFn::Sigmoid, div(1.0, add(exp(neg("x")), 1.0))),
        (UnaryFn::Silu, product([x(), sigmoid("x")])),
        (UnaryFn::Silu, div("x", add(exp(neg("x")), 1.0))),
        (UnaryFn::Relu, max("x", 0.0)),
        (UnaryFn::Relu, select(either([gt("x", 0.0), ge("x", 0.0)]), "x", 0.0)),
        (UnaryFn::Relu, product([n(0.5), add(x(), abs("x"))])),
        (UnaryFn::Tanh, sub(product([n(2.0), sigmoid(mul("x", 2.0))]), 1.0)),
    ]
});

/// Looks for an activation that ends in this node.
pub(super) fn look(view: &View<'_>, id: NodeId) -> Outcome {
    let result = view.node(id).results[0];
    let ty = &view.module.graph.values[result].ty;
    let mut blocked = None;
    for (function, formula) in FORMULAS.iter() {
        match formula.find(view, id) {
            Found::Nothing => {}
            Found::Read(reason) => {
                blocked.get_or_insert(format!("{}: {reason}", function.name()));
            }
            Found::Match(found) => {
                let Some(x) = found.value("x").filter(|x| view.ty(*x) == ty && ty.dtype.is_float()) else {
                    continue;
                };
                let mut patch = Patch::new(found.nodes());
                let new = patch.node(Unary { function: *function }, [From::Old(x)]);
                patch.replace(result, From::New(new, 0));
                return Outcome::Rewrite(patch);
            }
        }
    }
    blocked.map_or(Outcome::NoMatch, Outcome::Blocked)
}
