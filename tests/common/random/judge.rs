//! What outputs of a random graph have to be, and how far from that a legal implementation may be.
//!
//! The tolerance of an output is measured: the reference runs again with noise of the size of the roundings that
//! another implementation may do elsewhere or leave out, and the largest difference seen counts several times. An output
//! that no rounding reaches has to be met exactly. A graph of single kernels is judged strictly: only the last store of
//! each result rounds.

use millrace::Result;
use millrace::ir::checkpoint::TensorSource;
use millrace::ir::eval::{evaluate, evaluate_with};
use millrace::ir::ops::fused_matmul::Epilogue;
use millrace::ir::ops::pointwise::Step as PointwiseStep;
use millrace::ir::ops::unary::UnaryFn;
use millrace::ir::ops::{EvalCtx, Numerics};
use millrace::ir::sampling::{Random, RandomGraph};
use millrace::ir::tensor::Tensor;
use millrace::ir::weights::WeightReader;
use millrace::ir::{Bindings, DType, Id, Module, Node, Op, Operand};

/// Runs with noise.
const RUNS: u64 = 4;

/// How often the largest difference under noise counts.
const MARGIN: f64 = 6.0;

/// Relative size of a rounding: of the narrow types one unit in the last place, of `f32` some, since kernels sum and
/// approximate in it.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 8.0 / f64::from(1 << 24),
        DType::F16 => 1.0 / 1024.0,
        DType::BF16 => 1.0 / 128.0,
        DType::F8E4M3 => 1.0 / 8.0,
        DType::F8E5M2 => 1.0 / 4.0,
        _ => 0.0,
    }
}

/// One step with its inputs.
pub struct Step {
    pub bindings: Bindings,
    pub inputs: Vec<Tensor>,
    expected: Vec<Tensor>,
    /// Absolute tolerance of each output, besides a relative one; none if it has to be met exactly.
    slack: Vec<Option<f64>>,
}

/// Two steps of a graph, the second on the states that the first left.
pub struct Judge {
    pub steps: Vec<Step>,
    states: Vec<Tensor>,
    /// Outputs whose tolerance is a tenth of their size or more.
    pub vague: usize,
    /// How often the rounding of the last store counts.
    last: f64,
}

/// What is judged: a module with what its weights are read from.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    pub module: &'a Module,
    pub source: Option<&'a dyn TensorSource>,
    /// Whether every kernel rounds once, at its store, and none reads what another has rounded.
    pub strict: bool,
}

/// Whether kernels compute it with an absolute error: `x/2 (1 + erf(..))` cancels far from 0, and an angle is as exact as
/// its position is small.
fn activates(op: &Op) -> bool {
    use UnaryFn::{Erf, Gelu, GeluTanh, Sigmoid, Silu, Tanh};
    match op {
        Op::Unary(u) => matches!(u.function, Gelu | GeluTanh | Erf | Tanh | Sigmoid | Silu),
        Op::FusedMatmul(_) | Op::Pointwise(_) | Op::Rope(_) => true,
        _ => false,
    }
}

/// Bound of that error: a rounding of the largest value that an activation may read, times what its result meets.
fn activation_error(op: &Op, operands: &[&Tensor]) -> f64 {
    let largest = |t: &Tensor| t.data.iter().map(|v| v.abs()).fold(0.0, f64::max);
    let ulp = 1.0 / f64::from(1 << 24);
    if let Op::Rope(_) = op {
        return largest(operands[0]) * largest(operands[1]) * ulp;
    }
    let Op::FusedMatmul(fused) = op else { return largest(operands[0]) * ulp };
    let mut bound = operands[0].last() as f64 * largest(operands[0]) * largest(operands[1]);
    let mut error = 0.0;
    let mut more = operands[2..].iter().map(|t| largest(t));
    for step in &fused.epilogue {
        match step {
            Epilogue::Bias | Epilogue::Residual => bound += more.next().unwrap_or(0.0),
            Epilogue::Activation(_) => error += bound * ulp,
            Epilogue::Glu(_) => (error, bound) = (bound * bound * ulp, bound * bound),
            Epilogue::Mul => {
                let factor = more.next().unwrap_or(0.0);
                (error, bound) = (error * factor, bound * factor);
            }
        }
    }
    error
}

/// `node` with noise on what it reads and makes. `dirty` says which values a rounding has reached.
fn noisy(
    module: &Module,
    node: &Node,
    context: &EvalCtx<'_>,
    dirty: &mut [bool],
    random: &mut Random,
    strict: bool,
) -> std::result::Result<Vec<Tensor>, String> {
    let numerics = node.op.traits().numerics;
    let reached = |o: &Operand| matches!(o, Operand::Value(v) if dirty[v.index()]);
    let reads_dirty = node.operands.iter().any(reached);
    let integers = node.results.iter().all(|r| !module.graph.values[*r].ty.dtype.is_float());
    let keeps = numerics == Numerics::Exact
        || (integers && !node.op.traits().fused_only)
        || matches!(*node.op, Op::Cast(_)) && !reads_dirty;
    let mut results = if numerics == Numerics::Accumulated {
        // Steps of a pointwise region may compare, and only exact operands: those stay. An operand that is not exact
        // may come from a node that joins the region, and so without its rounding.
        let compares = |step: &PointwiseStep| matches!(step, PointwiseStep::Binary(f, ..) if f.compares());
        // Attention on tensor cores rounds the weight of each value row to the element type, half a unit at most.
        let values = match &*node.op {
            Op::Attention(_) | Op::PagedAttention(_) if strict => node.operands.get(2),
            _ => None,
        };
        let size = |operand: &Operand, dtype: DType| match &*node.op {
            _ if Some(operand) == values => rounding(dtype) / 2.0,
            Op::Pointwise(_) if reached(operand) => rounding(dtype),
            Op::Pointwise(p) if p.body.iter().any(compares) => 0.0,
            _ => rounding(DType::F32),
        };
        let mut shaken: Vec<Tensor> = context.operands.iter().map(|t| (*t).clone()).collect();
        for (t, operand) in shaken.iter_mut().zip(&node.operands).filter(|(t, _)| t.dtype.is_float()) {
            let size = size(operand, t.dtype);
            t.data.iter_mut().for_each(|v| *v *= 1.0 + size * random.uniform(-1.0, 1.0));
        }
        let shaken: Vec<&Tensor> = shaken.iter().collect();
        node.op.eval(&EvalCtx { operands: &shaken, results: context.results, bindings: context.bindings })?
    } else {
        node.op.eval(context)?
    };
    for result in &mut results {
        result.round();
        if !keeps && result.dtype.is_float() {
            let size = if strict { rounding(DType::F32) } else { rounding(result.dtype) };
            result.data.iter_mut().for_each(|v| *v *= 1.0 + size * random.uniform(-1.0, 1.0));
        }
        if activates(&node.op) && result.dtype.is_float() {
            let noise = activation_error(&node.op, context.operands);
            result.data.iter_mut().for_each(|v| *v += noise * random.uniform(-1.0, 1.0));
        }
    }
    node.results.iter().for_each(|r| dirty[r.index()] = reads_dirty || !keeps);
    Ok(results)
}

impl Judge {
    /// The reference's outputs of `graph`, with tolerances.
    pub fn new(graph: &RandomGraph) -> Result<Judge> {
        let mut random = Random::new(graph.seed ^ 0x6a75_6467);
        let first = graph.bindings(&mut random);
        let mut second = graph.bindings(&mut random);
        // A session's states keep their size.
        let pages = first.iter().find(|(s, _)| s.name() == "pages");
        pages.into_iter().for_each(|(sym, value)| second.set(sym, value));
        let states = graph.zero_states(&first);
        let steps = [first, second].map(|bindings| {
            let inputs = graph.inputs(&bindings, &mut random);
            (bindings, inputs)
        });
        let subject = Subject { module: &graph.module, source: None, strict: false };
        Judge::over(subject, states, steps.into(), &mut random)
    }

    /// The reference's outputs of given steps, one after the other on the same states, with tolerances.
    pub fn over(
        subject: Subject<'_>,
        states: Vec<Tensor>,
        steps: Vec<(Bindings, Vec<Tensor>)>,
        random: &mut Random,
    ) -> Result<Judge> {
        let Subject { module, source, strict } = subject;
        let last = if strict { 1.0 } else { 2.0 };
        let mut judge = Judge { steps: Vec::new(), states: states.clone(), vague: 0, last };
        let mut clean = states.clone();
        let mut shaken: Vec<Vec<Tensor>> = vec![states; RUNS as usize];
        for (bindings, inputs) in steps {
            let mut reader = WeightReader::new(module);
            if let Some(source) = source {
                reader = reader.with_source("model", source);
            }
            let expected = evaluate(module, &mut reader, &inputs, &mut clean)?;
            let mut dirty = vec![false; module.graph.values.bound()];
            let mut far = vec![0.0f64; expected.len()];
            for states in &mut shaken {
                let mut compute = |node: &Node, context: &EvalCtx<'_>| {
                    noisy(module, node, context, &mut dirty, random, strict)
                };
                let found = evaluate_with(module, &mut reader, &inputs, states, &mut compute)?;
                for ((far, a), b) in far.iter_mut().zip(&expected).zip(&found) {
                    *far = a.data.iter().zip(&b.data).map(|(x, y)| (x - y).abs()).fold(*far, f64::max);
                }
            }
            let mut slack = Vec::new();
            for ((output, far), expected) in module.graph.outputs.iter().zip(far).zip(&expected) {
                let scale = expected.data.iter().map(|v| v.abs()).fold(0.0, f64::max);
                let reached = dirty[output.value.index()] || !module.states.is_empty();
                slack.push(reached.then_some(MARGIN * far + 1e-6 * scale + 1e-9));
                judge.vague += usize::from(reached && MARGIN * far > 0.1 * scale.max(0.01));
            }
            judge.steps.push(Step { bindings, inputs, expected, slack });
        }
        Ok(judge)
    }

    /// Number of outputs in all steps.
    pub fn outputs(&self) -> usize {
        self.steps.iter().map(|s| s.expected.len()).sum()
    }

    /// Compares outputs of step `at`.
    pub fn compare(&self, at: usize, found: &[Tensor]) -> std::result::Result<(), String> {
        let step = &self.steps[at];
        for (n, (expected, found)) in step.expected.iter().zip(found).enumerate() {
            if (expected.dtype, &expected.shape) != (found.dtype, &found.shape) {
                return Err(format!(
                    "step {at}, output {n} is {}{:?} instead of {}{:?}",
                    found.dtype, found.shape, expected.dtype, expected.shape
                ));
            }
            for (i, (x, y)) in expected.data.iter().zip(&found.data).enumerate() {
                let allowed =
                    step.slack[n].map_or(0.0, |s| s + self.last * rounding(expected.dtype) * x.abs());
                let same = x == y || (x.is_nan() && y.is_nan()) || (x - y).abs() <= allowed;
                if !same {
                    return Err(format!(
                        "step {at}, output {n}, element {i} is {y} instead of {x} (allowed: {allowed:.2e})"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Evaluates another module with the same interface and compares it.
    pub fn evaluate(&self, module: &Module) -> std::result::Result<(), String> {
        let mut states = self.states.clone();
        let mut reader = WeightReader::new(module);
        for (at, step) in self.steps.iter().enumerate() {
            let found =
                evaluate(module, &mut reader, &step.inputs, &mut states).map_err(|e| e.to_string())?;
            self.compare(at, &found)?;
        }
        Ok(())
    }
}
