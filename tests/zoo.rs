//! The graphs of the zoo mean what they should: generated texts are current, both spellings of a model compute the
//! same, and neither optimising nor the kernels change a result.

#[path = "common/zoo/mod.rs"]
mod zoo;

use millrace::ir::eval::evaluate;
use millrace::ir::tensor::{Tensor, decode};
use millrace::ir::verify::check;
use millrace::ir::weights::{WeightReader, normal};
use millrace::ir::{Bindings, DType, Module, Sym, WeightExpr, text};
use millrace::{Engine, SessionOptions, TensorRef};
use zoo::{Graph, PAIRS};

/// Inputs of a graph: token ids below 64, positions in order, noise elsewhere.
fn inputs(module: &Module, bindings: &Bindings, seed: u64) -> Vec<Tensor> {
    let input = |(index, (name, ty)): (usize, (&str, &millrace::ir::TensorType))| {
        let shape: Vec<usize> = ty.shape_at(bindings).unwrap().into_iter().map(|d| d as usize).collect();
        let mut tensor = Tensor::zeros(ty.dtype, &shape).unwrap();
        for (i, v) in tensor.data.iter_mut().enumerate() {
            let noise = normal(seed + index as u64, i as u64);
            *v = match name {
                "token_ids" => (noise.abs() * 1e6).floor() % 64.0,
                "positions" => i as f64,
                _ => noise,
            };
        }
        tensor.round();
        tensor
    };
    module.input_types().into_iter().enumerate().map(input).collect()
}

fn outputs(module: &Module, bindings: &Bindings, seed: u64) -> Vec<Tensor> {
    evaluate(module, &mut WeightReader::new(module), &inputs(module, bindings, seed), &mut []).unwrap()
}

/// The shapes a module is tried at: its smallest, a typical one, its largest.
fn shapes(module: &Module) -> Vec<Bindings> {
    let mut shapes = vec![Bindings::hints(&module.dims)];
    if !module.dims.is_empty() {
        shapes.extend([Bindings::minima(&module.dims), Bindings::maxima(&module.dims)]);
    }
    shapes
}

/// Largest difference of two results, relative to values above 1.
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!((a.dtype, &a.shape), (b.dtype, &b.shape));
    let far = |(x, y): (&f64, &f64)| if x == y { 0.0 } else { (x - y).abs() / x.abs().max(1.0) };
    a.data
        .iter()
        .zip(&b.data)
        .map(far)
        .fold(0.0, |most, d| if d.is_nan() { f64::INFINITY } else { most.max(d) })
}

/// What two spellings differ by at most: roundings of the intermediate results that only one of them has.
fn tolerance(module: &Module) -> f64 {
    let narrow = module.graph.values.iter().any(|(_, v)| v.ty.dtype == DType::BF16);
    if narrow { 0.02 } else { 1e-5 }
}

fn pair(name: &str) -> [Module; 2] {
    ["primitive", "twin"].map(|spelling| Graph::named(&format!("{spelling}_{name}")).imported())
}

#[test]
fn generated_texts_are_current() {
    let accept = std::env::var("MILLRACE_ACCEPT").is_ok_and(|v| v == "1");
    for (file, expected) in zoo::generated() {
        let path = zoo::root().join("tests/zoo").join(&file);
        if accept {
            std::fs::write(&path, &expected).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            found == expected,
            "tests/zoo/{file} differs from what tests/common/zoo writes\naccept with: MILLRACE_ACCEPT=1 cargo test --test zoo"
        );
    }
}

#[test]
fn texts_are_canonical_and_verify() {
    for graph in zoo::graphs().iter().filter(|g| g.is_text()) {
        let module = graph.imported();
        check(&module).unwrap_or_else(|e| panic!("{}: {e}", graph.name));
        let source = std::fs::read_to_string(&graph.path).unwrap();
        let bare: String =
            source.lines().filter(|l| !l.starts_with("//")).map(|l| format!("{l}\n")).collect();
        assert_same_text(&bare, &text::print(&module), &graph.name);
    }
}

fn assert_same_text(found: &str, expected: &str, name: &str) {
    let diff = similar::TextDiff::from_lines(found, expected);
    assert!(found == expected, "{name}\n{}", diff.unified_diff().context_radius(1));
}

#[test]
fn primitive_models_use_primitives_only() {
    let allowed = [
        "neg",
        "exp",
        "sqrt",
        "rsqrt",
        "sigmoid",
        "tanh",
        "erf",
        "sin",
        "cos",
        "add",
        "sub",
        "mul",
        "div",
        "max",
        "pow",
        "ge",
        "select",
        "cast",
        "broadcast",
        "reshape",
        "transpose",
        "slice",
        "concat",
        "iota",
        "gather",
        "reduce_sum",
        "reduce_mean",
        "reduce_max",
        "matmul",
    ];
    for name in PAIRS {
        let [primitive, twin] = pair(name);
        let foreign = |module: &Module| {
            module.graph.nodes.iter().filter(|(_, n)| !allowed.contains(&n.op.name())).count()
        };
        assert_eq!(foreign(&primitive), 0, "{name}");
        assert!(foreign(&twin) > 8, "{name}");
        assert!(primitive.graph.order.len() > 2 * twin.graph.order.len(), "{name}");
    }
}

#[test]
fn twins_have_the_same_inputs_outputs_and_weights() {
    for name in PAIRS {
        let [primitive, twin] = pair(name);
        assert_eq!(primitive.input_types(), twin.input_types(), "{name}");
        assert_eq!(primitive.output_types(), twin.output_types(), "{name}");
        let weights = |module: &Module| -> Vec<(String, String, WeightExpr)> {
            let shared = module.weights.iter().filter(|(_, w)| !w.name.starts_with("const."));
            shared.map(|(_, w)| (w.name.clone(), w.ty.to_string(), w.expr.clone())).collect()
        };
        assert_eq!(weights(&primitive), weights(&twin), "{name}");
        assert!(weights(&twin).len() > 15, "{name}");
    }
}

#[test]
fn both_spellings_compute_the_same() {
    for name in PAIRS {
        let [primitive, twin] = pair(name);
        for bindings in shapes(&primitive) {
            for seed in [3, 400] {
                let (a, b) = (outputs(&primitive, &bindings, seed), outputs(&twin, &bindings, seed));
                let far = a.iter().zip(&b).map(|(a, b)| distance(a, b)).fold(0.0, f64::max);
                assert!(far <= tolerance(&twin), "{name}: {far}");
                let first = a[0].data[0];
                assert!(
                    a[0].data.iter().any(|v| (v - first).abs() > 0.01),
                    "{name}: all results are {first}"
                );
            }
        }
    }
}

#[test]
fn rope_tables_and_masks_matter() {
    // Reversed positions change the logits, so the comparison above sees them; so does the sequence's order.
    let [primitive, twin] = pair("decoder_tables");
    let mut bindings = Bindings::hints(&primitive.dims);
    bindings.set(Sym::new("t").unwrap(), 8);
    let mut given = inputs(&primitive, &bindings, 5);
    let run = |module: &Module, given: &[Tensor]| {
        evaluate(module, &mut WeightReader::new(module), given, &mut []).unwrap().remove(0)
    };
    let plain = run(&primitive, &given);
    given[1].data.reverse();
    let reversed = run(&primitive, &given);
    assert!(distance(&plain, &reversed) > 0.01);
    assert!(distance(&reversed, &run(&twin, &given)) <= 1e-5);
    given[1].data.reverse();
    // The last token is seen by the last row only.
    given[0].data[7] = (given[0].data[7] + 1.0) % 64.0;
    let other = run(&primitive, &given);
    assert_eq!(plain.data[..7 * 64], other.data[..7 * 64]);
    assert_ne!(plain.data[7 * 64..], other.data[7 * 64..]);
}

#[test]
fn optimising_changes_no_result() {
    for graph in zoo::graphs().iter().filter(|g| g.is_text()) {
        let before = graph.imported();
        let after = graph.compiled().module;
        for bindings in shapes(&before) {
            let (a, b) = (outputs(&before, &bindings, 9), outputs(&after, &bindings, 9));
            let far = a.iter().zip(&b).map(|(a, b)| distance(a, b)).fold(0.0, f64::max);
            assert!(far <= tolerance(&before), "{}: {far}", graph.name);
        }
    }
}

#[test]
fn kernels_compute_what_the_graphs_say() {
    let folder = tempfile::tempdir().unwrap();
    for graph in zoo::graphs().iter().filter(|g| g.is_text()) {
        let before = graph.imported();
        let file = folder.path().join(&graph.name);
        graph.compiled().write(&file, &mut |_, _| {}).unwrap();
        let engine = Engine::open(&file).unwrap();
        let mut session = engine.session(SessionOptions::default()).unwrap();
        for bindings in shapes(&before) {
            let given = inputs(&before, &bindings, 21);
            let bytes: Vec<Vec<u8>> = given.iter().map(Tensor::to_bytes).collect();
            let extents: Vec<Vec<u64>> =
                given.iter().map(|t| t.shape.iter().map(|d| *d as u64).collect()).collect();
            let refs: Vec<TensorRef<'_>> = given
                .iter()
                .zip(&bytes)
                .zip(&extents)
                .map(|((t, bytes), shape)| TensorRef { dtype: t.dtype, shape, bytes })
                .collect();
            session.run(&refs).unwrap();
            for (index, expected) in outputs(&before, &bindings, 21).into_iter().enumerate() {
                let data = decode(expected.dtype, session.output(index).unwrap().bytes);
                let found = Tensor { data, ..expected.clone() };
                let far = distance(&expected, &found);
                assert!(far <= tolerance(&before), "{}: {far}", graph.name);
            }
        }
    }
}

#[test]
fn the_zoo_is_varied() {
    let graphs = zoo::graphs();
    assert!(graphs.len() >= 16, "{} graphs", graphs.len());
    let mut names: Vec<&str> = graphs.iter().map(|g| g.name.as_str()).collect();
    names.dedup();
    assert_eq!(names.len(), graphs.len(), "names are unique");
    // No text of a pair that is no longer generated.
    let twins = names.iter().filter(|n| n.starts_with("twin_")).count();
    let primitives = names.iter().filter(|n| n.starts_with("primitive_")).count();
    assert_eq!((twins, primitives), (PAIRS.len(), PAIRS.len()));
}
