//! Every op against absurd parameters, types and empty tensors: inference answers `Err` and never panics, and
//! what inference lets through evaluates without a panic to results of the inferred types.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::Op;
use super::def::EvalCtx;
use crate::attr::{Attr, Attrs};
use crate::dim::{Bindings, Dim, Sym};
use crate::dtype::DType;
use crate::tensor::Tensor;
use crate::types::TensorType;

const HUGE: i64 = 1 << 46;

/// The ops under test: everything without paging or epilogues.
const NAMES: [&str; 37] = [
    "add",
    "sub",
    "mul",
    "div",
    "max",
    "min",
    "pow",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "exp",
    "rsqrt",
    "select",
    "cast",
    "broadcast",
    "reshape",
    "transpose",
    "slice",
    "concat",
    "iota",
    "reduce_sum",
    "reduce_mean",
    "reduce_max",
    "reduce_min",
    "gather",
    "scatter",
    "embedding",
    "matmul",
    "conv2d",
    "max_pool2d",
    "avg_pool2d",
    "softmax",
    "layer_norm",
    "l2_normalize",
];

fn extent() -> impl Strategy<Value = i64> {
    prop_oneof![
        8 => 0i64..4,
        1 => prop::sample::select(vec![-1, i64::MIN, i64::MAX, i64::MAX - 1, HUGE, 1 << 31, 1 << 62]),
    ]
}

fn dim() -> impl Strategy<Value = Dim> {
    let symbol = || Dim::from(Sym::new("t").unwrap());
    prop_oneof![
        6 => extent().prop_map(Dim::from),
        1 => extent().prop_map(move |c| symbol().add(&Dim::from(c))),
        1 => extent().prop_map(move |c| symbol().mul(&Dim::from(c))),
    ]
}

fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![3 => Just(DType::F32), 1 => prop::sample::select(DType::ALL.to_vec())]
}

fn dims(most: usize) -> impl Strategy<Value = Attr> {
    prop::collection::vec(dim().prop_map(Attr::Dim), 0..most).prop_map(Attr::List)
}

/// `count` numbers, mostly small.
fn numbers(count: std::ops::Range<usize>) -> impl Strategy<Value = Attr> {
    prop::collection::vec(extent().prop_map(Attr::from), count).prop_map(Attr::List)
}

fn number() -> impl Strategy<Value = Attr> {
    extent().prop_map(Attr::from)
}

fn pick(words: &'static [&'static str]) -> impl Strategy<Value = Attr> {
    prop::sample::select(words.to_vec()).prop_map(Attr::from)
}

/// A value for each parameter of every primitive op, most of them of the right kind.
fn attrs() -> impl Strategy<Value = Attrs> {
    let float = || prop::sample::select(vec![0.0, -1.0, 1e-5, f64::NAN, f64::INFINITY]).prop_map(Attr::Float);
    let some = |count: usize, low: i64, high: i64| {
        let one = prop_oneof![12 => low..high, 1 => extent()];
        prop::collection::vec(one.prop_map(Attr::from), count).prop_map(Attr::List)
    };
    let groups = prop_oneof![4 => Just(Attr::from(1i64)), 1 => number()];
    let flag = || pick(&["true", "false"]);
    let geometry = (some(2, 1, 3), some(2, 1, 3), some(4, 0, 2), some(2, 1, 3), groups, flag());
    let axis = prop_oneof![3 => (0i64..2).prop_map(Attr::from), 1 => number()];
    let shapes = (dims(4), numbers(0..4), numbers(1..3), axis, dim(), dim(), number());
    let words = (dtype(), dtype(), flag(), pick(&["f32", "bf16", "i8"]), float());
    let keep: BoxedStrategy<Vec<bool>> = prop::collection::vec(prop::bool::weighted(0.9), 18).boxed();
    (geometry, shapes, words, flag(), keep).prop_map(|(g, s, w, keep_axes, keep)| {
        let all = vec![
            ("kernel", g.0),
            ("stride", g.1),
            ("pad", g.2),
            ("dilation", g.3),
            ("groups", g.4),
            ("count_include_pad", g.5),
            ("shape", s.0),
            ("perm", s.1),
            ("axes", s.2),
            ("axis", s.3),
            ("start", Attr::Dim(s.4)),
            ("end", Attr::Dim(s.5)),
            ("step", s.6),
            ("to", Attr::from(w.0)),
            ("dtype", Attr::from(w.1)),
            ("transpose_b", w.2),
            ("out", w.3),
            ("eps", w.4),
        ];
        let mut kept: Vec<(String, Attr)> =
            all.into_iter().zip(keep).filter(|(_, k)| *k).map(|((k, v), _)| (k.to_string(), v)).collect();
        kept.push(("keep".into(), keep_axes));
        Attrs(kept)
    })
}

/// Operand types: unrelated ones, and ones that fit each other in the ways that ops ask for.
fn operands() -> impl Strategy<Value = Vec<TensorType>> {
    let shape = || prop::collection::vec(dim(), 0..5);
    let of = |dtype, shape: &[Dim]| TensorType { dtype, shape: shape.to_vec().into() };
    let unrelated = (prop::collection::vec((dtype(), shape()), 0..4)).prop_map(|all| {
        all.into_iter().map(|(dtype, shape)| TensorType { dtype, shape: shape.into() }).collect()
    });
    let alike = (dtype(), shape(), 1usize..4).prop_map(move |(d, s, n)| vec![of(d, &s); n]);
    let conditional =
        (dtype(), shape()).prop_map(move |(d, s)| vec![of(DType::Bool, &s), of(d, &s), of(d, &s)]);
    let rows = (dtype(), shape(), 1usize..3).prop_map(move |(d, s, n)| {
        let last = s.last().cloned().unwrap_or(Dim::from(1i64));
        let mut all = vec![of(d, &s)];
        all.resize(n + 1, of(d, &[last]));
        all
    });
    let indexed =
        (dtype(), shape(), dim(), 0usize..2, any::<bool>()).prop_map(move |(d, s, count, axis, three)| {
            let mut updates = s.clone();
            if let Some(slot) = updates.get_mut(axis) {
                *slot = count.clone();
            }
            let all = vec![of(d, &s), of(DType::I32, &[count]), of(d, &updates)];
            if three { all } else { all[..2].to_vec() }
        });
    let product = (dtype(), shape(), dim(), dim(), dim()).prop_map(move |(d, lead, m, k, n)| {
        let a = [lead, vec![m, k.clone()]].concat();
        vec![of(d, &a), of(d, &[k, n])]
    });
    let image = (prop::collection::vec(1i64..6, 6), prop::collection::vec(extent(), 3), 1usize..4).prop_map(
        move |(small, wild, n)| {
            let dims = |s: &[i64]| s.iter().map(|c| Dim::from(*c)).collect::<Vec<_>>();
            let x = dims(&[wild[0], small[0], small[1], small[2]]);
            let w = dims(&[wild[1], small[0], small[3], small[4].min(wild[2])]);
            let all = [of(DType::F32, &x), of(DType::F32, &w), of(DType::F32, &dims(&[wild[1]]))];
            all[..n].to_vec()
        },
    );
    prop_oneof![2 => unrelated, 2 => alike, 1 => conditional, 1 => rows, 2 => indexed, 1 => product, 2 => image]
}

/// The op spelled `name` with those of `attrs` that it knows.
fn parse(name: &str, Attrs(attrs): &Attrs) -> Option<Op> {
    let mut known = attrs.clone();
    loop {
        match Op::from_text(name, &Attrs(known.clone()))? {
            Ok(op) => return Some(op),
            Err(message) => {
                let unknown = message.starts_with("unknown");
                let at = known.iter().position(|(k, _)| unknown && message.contains(&format!("`{k}`")))?;
                known.remove(at);
            }
        }
    }
}

/// Zeros of `ty`; extents without a small value make it empty.
fn tensor(ty: &TensorType) -> Option<Tensor> {
    let shape: Vec<usize> =
        ty.const_shape()?.into_iter().map(usize::try_from).collect::<Result<_, _>>().ok()?;
    let small = shape.contains(&0) || shape.iter().all(|d| *d < 8);
    small.then(|| Tensor::zeros(ty.dtype, &shape)).flatten()
}

/// Infers and, where tensors of the operand types can be held, evaluates; tells whether that succeeded.
fn exercise(op: &Op, operands: &[TensorType]) -> bool {
    let Ok(results) = op.infer(operands) else { return false };
    assert_eq!(Op::from_text(op.name(), &op.attrs()), Some(Ok(op.clone())), "attributes read back");
    let Some(tensors) = operands.iter().map(tensor).collect::<Option<Vec<_>>>() else { return false };
    let affordable = |t: &TensorType| {
        t.const_shape().is_some_and(|s| {
            s.contains(&0) || s.iter().try_fold(1u64, |a, d| a.checked_mul(*d)).is_some_and(|n| n < 1 << 16)
        })
    };
    if !results.iter().all(affordable) {
        return false;
    }
    let refs: Vec<&Tensor> = tensors.iter().collect();
    let ctx = EvalCtx { operands: &refs, results: &results, bindings: &Bindings::new() };
    let Ok(out) = op.eval(&ctx) else { return false };
    for (t, expected) in out.iter().zip(&results) {
        assert_eq!(TensorType::new(t.dtype, t.shape.iter().copied()), *expected, "{op:?}");
    }
    true
}

/// Also counts the evaluations that succeed, so that the property cannot hold for want of cases.
#[test]
fn no_parameters_or_types_make_an_op_panic() {
    let config = Config { failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let (attrs, operands) = (attrs(), operands());
    for name in NAMES {
        let mut evaluated = 0;
        for _ in 0..1200 {
            let attrs = attrs.new_tree(&mut runner).unwrap().current();
            let types = operands.new_tree(&mut runner).unwrap().current();
            let Some(op) = parse(name, &attrs) else { continue };
            let ran = std::panic::catch_unwind(|| exercise(&op, &types));
            evaluated += usize::from(ran.unwrap_or_else(|_| panic!("{op:?} of {types:?}")));
        }
        assert!(evaluated >= 3, "`{name}` was evaluated {evaluated} times");
    }
}

fn f32s(shape: &[i64]) -> TensorType {
    TensorType::new(DType::F32, shape.iter().copied())
}

fn op(name: &str, attrs: &[(&str, Attr)]) -> Op {
    let attrs = Attrs(attrs.iter().map(|(k, v)| (k.to_string(), v.clone())).collect());
    Op::from_text(name, &attrs).unwrap().unwrap()
}

fn list(values: &[i64]) -> Attr {
    Attr::from(values.to_vec())
}

/// Products of the extents of an empty tensor leave the machine word, and loops over them never end.
#[test]
fn empty_tensors_with_huge_extents_evaluate_at_once() {
    let (front, back) = (f32s(&[0, HUGE, HUGE]), f32s(&[HUGE, 0]));
    let (none, two) = (TensorType::new(DType::I32, [0i64]), TensorType::new(DType::I32, [2i64]));
    let axis = |a: i64| ("axis", Attr::from(a));
    let eps = ("eps", Attr::from(1e-5));
    let iota = [("shape", list(&[0, HUGE, HUGE])), axis(0), ("dtype", Attr::from(DType::I32))];
    let slice = [axis(1), ("start", Attr::from(0i64)), ("end", Attr::from(2i64))];
    type Case = (&'static str, Vec<(&'static str, Attr)>, Vec<TensorType>);
    let cases: Vec<Case> = vec![
        ("transpose", vec![("perm", list(&[0, 2, 1]))], vec![front.clone()]),
        ("reduce_mean", vec![("axes", list(&[1, 2]))], vec![front.clone()]),
        ("reduce_sum", vec![("axes", list(&[0, 1, 2]))], vec![front.clone()]),
        ("softmax", vec![axis(0)], vec![front.clone()]),
        ("softmax", vec![axis(1)], vec![back.clone()]),
        ("concat", vec![axis(0)], vec![front.clone(), front.clone()]),
        ("gather", vec![axis(1)], vec![back.clone(), none.clone()]),
        ("gather", vec![axis(1)], vec![front.clone(), two.clone()]),
        ("scatter", vec![axis(0)], vec![front.clone(), none, front.clone()]),
        ("scatter", vec![axis(1)], vec![f32s(&[0, HUGE, HUGE]), two, f32s(&[0, 2, HUGE])]),
        ("iota", iota.to_vec(), vec![]),
        ("slice", slice.to_vec(), vec![front.clone()]),
        ("matmul", vec![], vec![f32s(&[HUGE, 0, 3]), f32s(&[3, 0])]),
        ("matmul", vec![], vec![f32s(&[0, HUGE, HUGE]), f32s(&[HUGE, 0])]),
        ("conv2d", vec![], vec![f32s(&[HUGE, 0, 1, 1]), f32s(&[0, 0, 1, 1])]),
        ("max_pool2d", vec![("kernel", list(&[1, 1]))], vec![f32s(&[0, HUGE, HUGE, HUGE])]),
        ("layer_norm", vec![eps.clone()], vec![back.clone(), f32s(&[0])]),
        ("l2_normalize", vec![eps.clone()], vec![front]),
    ];
    for (name, attrs, operands) in cases {
        assert!(exercise(&op(name, &attrs), &operands), "{name} of {operands:?}");
    }
    // No index lies within an empty axis.
    let outside = [back, TensorType::new(DType::I32, [2i64]), f32s(&[HUGE, 2])];
    assert!(!exercise(&op("gather", &[axis(1)]), &outside[..2]));
    assert!(!exercise(&op("scatter", &[axis(1)]), &outside));
}
