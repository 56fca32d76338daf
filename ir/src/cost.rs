//! What a node costs: floating point operations and bytes moved, at given bindings of the symbols.
//!
//! Counting rules. One addition, multiplication, comparison or function of one element (`exp` too) is one operation;
//! moving and converting elements is none. Bytes are those of operands read and results written once each, whatever
//! caches do; a view moves nothing, ops that pick rows (`embedding`, `gather`, `kv_append`, `paged_attention`) count
//! the rows they touch and not the table they stand in. Sequences of a packed batch count as equally long, and a
//! causal mask saves nothing. Counts saturate. The counts are estimates for people and rankings; no plan depends on
//! them.

use crate::dim::{Bindings, Dim};
use crate::graph::*;
use crate::ops::Op;
use crate::ops::add_norm::NormKind;
use crate::ops::fused_matmul::Epilogue;
use crate::ops::pointwise::{Pointwise, Step};
use crate::types::TensorType;

/// Work of one node or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating point operations.
    pub flops: u64,
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
}

impl Cost {
    /// Both costs together.
    #[must_use]
    pub fn plus(self, other: Cost) -> Cost {
        Cost {
            flops: self.flops.saturating_add(other.flops),
            read: self.read.saturating_add(other.read),
            written: self.written.saturating_add(other.written),
        }
    }
}

/// Sustained rates of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Floating point operations a second.
    pub flops: f64,
    /// Bytes of memory a second.
    pub bytes: f64,
}

impl Rates {
    /// Two server cores with AVX-512: 400 GFLOP/s and 25 GB/s.
    pub const CPU: Rates = Rates { flops: 400e9, bytes: 25e9 };
    /// One H200: 790 TFLOP/s in bf16 and 4.58 TB/s.
    pub const CUDA: Rates = Rates { flops: 790e12, bytes: 4.58e12 };

    /// The rates that stand for a target's kind of device, with its description.
    pub fn of_target(target: &str) -> (Rates, &'static str) {
        if target.starts_with("cuda") { (Self::CUDA, "H200, bf16") } else { (Self::CPU, "2 AVX-512 cores") }
    }
}

/// What a device sustains over whole steps of a model, for predictions of time; [`Rates`] are its ceilings.
///
/// A node takes [`Sustained::seconds`], a launch [`Sustained::launch`] more, and a copy of `n` bytes `copy + n / link` seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sustained {
    /// Arithmetic and memory traffic inside of kernels.
    pub rates: Rates,
    /// Share of its arithmetic that a node bound by memory takes besides: a product of few rows reads them again for each
    /// group of columns.
    pub exposed: f64,
    /// Seconds of each launch besides.
    pub launch: f64,
    /// Seconds of each step besides.
    pub step: f64,
    /// Bytes a second of large copies from where weights that are not resident lie: pinned host memory for a GPU, the engine
    /// file for a processor.
    pub link: f64,
    /// Seconds of each copy besides.
    pub copy: f64,
    /// Bytes that a device's driver takes for itself, about.
    pub context: u64,
}

impl Sustained {
    /// Two server cores with AVX-512 and a solid state disk of 2 GB/s; [`Sustained::with_link`] takes a measured one.
    pub const CPU: Sustained = Sustained {
        rates: Rates { flops: 340e9, bytes: 22e9 },
        exposed: 0.0,
        launch: 5e-6,
        step: 50e-6,
        link: 2e9,
        copy: 50e-6,
        context: 0,
    };
    /// One H200. The link moved 36.6, 48.7, 53.7 and 55.6 GB/s in copies of 256 KiB, 1, 4 and at least 16 MiB; a kernel
    /// boundary in a CUDA graph takes 1.3 us; kernels read weights at 90 % of the rate of memory and multiply at 82 % of
    /// the rate of 8192 x 8192 matrices. The matmuls of a Llama 3.1 8B layer took 102.4, 104.7 and 117.8 us for 1, 8 and 32
    /// rows: 0.7 of their arithmetic more (`benches/results/gpu-kernels-2026-11-21/skinny-matmul.txt`). Driver 580 took
    /// 526 MiB for its context and the code of a small engine; the estimate is to lie above.
    pub const CUDA: Sustained = Sustained {
        rates: Rates { flops: 650e12, bytes: 4.1e12 },
        exposed: 0.7,
        launch: 1.3e-6,
        step: 50e-6,
        link: 55.6e9,
        copy: 2.6e-6,
        context: 536 << 20,
    };

    /// What stands for a target's kind of device.
    pub fn of_target(target: &str) -> Sustained {
        if target.starts_with("cuda") { Self::CUDA } else { Self::CPU }
    }

    /// Seconds of a node inside of its kernel by the roofline, the slower of arithmetic and memory traffic (Williams, Waterman and
    /// Patterson 2009), and what of a memory-bound node's arithmetic is not hidden.
    pub fn seconds(&self, cost: Cost) -> f64 {
        let arithmetic = cost.flops as f64 / self.rates.flops;
        let memory = cost.read.saturating_add(cost.written) as f64 / self.rates.bytes;
        arithmetic.max(memory + self.exposed * arithmetic)
    }

    /// The same device with another link, in bytes a second.
    #[must_use]
    pub fn with_link(self, link: f64) -> Sustained {
        Sustained { link, ..self }
    }
}

/// The cost of a node; `None` if it does not exist, an extent is unbound, or an operand is missing.
pub fn node_cost(module: &Module, id: NodeId, bindings: &Bindings) -> Option<Cost> {
    let node = module.graph.nodes.get(id)?;
    let mut operands = Vec::with_capacity(node.operands.len());
    for operand in &node.operands {
        operands.push(match operand {
            Operand::Value(v) => &module.graph.values.get(*v)?.ty,
            Operand::Weight(w) => &module.weights.get(*w)?.ty,
            Operand::State(s) => &module.states.get(*s)?.ty,
        });
    }
    let results: Option<Vec<&TensorType>> =
        node.results.iter().map(|r| module.graph.values.get(*r).map(|v| &v.ty)).collect();
    let shapes = Shapes { operands, results: results?, bindings };
    let flops = flops(&node.op, &shapes)?;
    if node.op.traits().view {
        return Some(Cost { flops, read: 0, written: 0 });
    }
    let (read, written) = traffic(&node.op, &shapes)?;
    Some(Cost { flops, read, written })
}

/// Types of a node under bindings.
struct Shapes<'a> {
    operands: Vec<&'a TensorType>,
    results: Vec<&'a TensorType>,
    bindings: &'a Bindings,
}

impl Shapes<'_> {
    fn at(&self, dim: &Dim) -> Option<u64> {
        dim.extent(self.bindings)
    }

    fn count(&self, shape: &[Dim]) -> Option<u64> {
        shape.iter().try_fold(1u64, |acc, d| Some(acc.saturating_mul(self.at(d)?)))
    }

    fn bytes(&self, ty: &TensorType) -> Option<u64> {
        Some(self.count(&ty.shape)?.saturating_mul(ty.dtype.bits() as u64).div_ceil(8))
    }

    /// Elements of operand `n`.
    fn operand(&self, n: usize) -> Option<u64> {
        self.count(&self.operands.get(n)?.shape)
    }

    /// Elements of the first result.
    fn result(&self) -> Option<u64> {
        self.count(&self.results.first()?.shape)
    }

    /// Extent of an axis of operand `n`.
    fn extent(&self, n: usize, axis: usize) -> Option<u64> {
        self.at(self.operands.get(n)?.shape.get(axis)?)
    }

    /// Extent of the last axis of operand `n`.
    fn last(&self, n: usize) -> Option<u64> {
        self.at(self.operands.get(n)?.shape.last()?)
    }

    /// Keys that a row of paged attention sees: columns of the block table times tokens per block, cut by the window.
    fn paged_keys(&self, window: usize) -> Option<u64> {
        Some(windowed(self.last(5)?.saturating_mul(self.extent(1, 1)?), window))
    }
}

fn windowed(keys: u64, window: usize) -> u64 {
    if window == 0 { keys } else { keys.min(window as u64) }
}

fn product(factors: &[u64]) -> u64 {
    factors.iter().fold(1, |acc, f| acc.saturating_mul(*f))
}

/// Operations of `op`; see the module for the rules.
fn flops(op: &Op, s: &Shapes<'_>) -> Option<u64> {
    Some(match op {
        // One per element of the result.
        Op::Unary(_) | Op::Binary(_) => s.result()?,
        // Nothing is computed.
        Op::Select(_)
        | Op::Cast(_)
        | Op::Broadcast(_)
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Slice(_)
        | Op::Concat(_)
        | Op::Iota(_)
        | Op::Gather(_)
        | Op::Scatter(_)
        | Op::Embedding(_)
        | Op::KvAppend(_) => 0,
        // One per element that goes in.
        Op::Reduce(_) | Op::MeanPool(_) => s.operand(0)?,
        // 2 m n k.
        Op::Matmul(_) => product(&[2, s.result()?, s.last(0)?]),
        // 2 m n k over all segments, then each epilogue step once per element it makes; glu makes two steps.
        Op::FusedMatmul(op) => {
            let columns = op.segments.iter().fold(0u64, |acc, n| acc.saturating_add(*n as u64));
            let k = s.last(0)?;
            let rows = s.operand(0)?.checked_div(k).unwrap_or(0);
            let mut total = product(&[2, rows, columns, k]);
            let mut width = columns;
            for step in &op.epilogue {
                let steps = match step {
                    Epilogue::Glu(_) => {
                        width /= 2;
                        2
                    }
                    Epilogue::Bias | Epilogue::Activation(_) | Epilogue::Residual | Epilogue::Mul => 1,
                };
                total = total.saturating_add(product(&[steps, rows, width]));
            }
            total
        }
        // 2 per element of the window, with the channels of one group; a bias adds one.
        Op::Conv2d(_) => {
            let window = product(&[s.extent(1, 1)?, s.extent(1, 2)?, s.extent(1, 3)?]);
            let bias = u64::from(s.operands.len() > 2);
            s.result()?.saturating_mul(window.saturating_mul(2).saturating_add(bias))
        }
        // One per element of the window.
        Op::Pool2d(op) => product(&[s.result()?, op.kernel[0] as u64, op.kernel[1] as u64]),
        // Maximum, difference, exp, sum, quotient.
        Op::Softmax(_) => product(&[5, s.result()?]),
        // Square, sum, scale, weight.
        Op::RmsNorm(_) => product(&[4, s.result()?]),
        // Mean, difference, square, sum, scale, weight, and the bias if there is one.
        Op::LayerNorm(_) => product(&[6 + u64::from(s.operands.len() > 2), s.result()?]),
        // Square, sum, scale.
        Op::L2Normalize(_) => product(&[3, s.result()?]),
        // The addition and the normalisation.
        Op::AddNorm(op) => {
            let norm = match op.kind {
                NormKind::Rms => 4,
                NormKind::Layer => 7,
            };
            product(&[1 + norm, s.operand(0)?])
        }
        // Two products and a sum per rotated element.
        Op::Rope(op) => {
            let d = s.last(0)?;
            let rotated = if op.rotary == 0 { d } else { d.min(op.rotary as u64) };
            product(&[3, s.operand(0)?.checked_div(d).unwrap_or(0), rotated])
        }
        // 4 q k d heads: scores and weighted sum.
        Op::PagedAttention(op) => product(&[4, s.operand(0)?, s.paged_keys(op.window)?]),
        Op::Attention(op) => {
            let sequences = s.extent(3, 0)?.saturating_sub(1).max(1);
            let keys = s.extent(1, 0)?.div_ceil(sequences);
            product(&[4, s.operand(0)?, windowed(keys, op.mask.window)])
        }
        // One per step and element, of steps per row one per row, of reductions one per element that goes in;
        // conversions are none.
        Op::Pointwise(op) => {
            let inputs: Vec<bool> = s.operands.iter().map(|ty| Pointwise::is_per_row(&ty.shape)).collect();
            let types: Vec<TensorType> = s.operands.iter().map(|ty| (*ty).clone()).collect();
            let mut shape = Pointwise::shape(&types).ok()?;
            let elements = s.count(&shape)?;
            if let Some(last) = shape.last_mut() {
                *last = Dim::from(1i64);
            }
            let rows = s.count(&shape)?;
            let phases = op.phases(&inputs);
            let steps = op.body.iter().zip(&phases.per_row).map(|(step, per_row)| match step {
                Step::Cast(..) => 0,
                Step::Reduce(..) => elements,
                _ if *per_row => rows,
                _ => elements,
            });
            steps.fold(0, u64::saturating_add)
        }
    })
}

/// Bytes read and written by an op that is no view.
fn traffic(op: &Op, s: &Shapes<'_>) -> Option<(u64, u64)> {
    let sum =
        |types: &[&TensorType]| types.iter().try_fold(0u64, |acc, ty| Some(acc.saturating_add(s.bytes(ty)?)));
    let written = sum(&s.results)?;
    Some(match op {
        // The rows that are picked, and the indices.
        Op::Gather(_) | Op::Embedding(_) => (written.saturating_add(sum(s.operands.get(1..)?)?), written),
        // The rows that are stored, and the indices.
        Op::KvAppend(_) => (sum(s.operands.get(1..)?)?, s.bytes(s.operands.get(1)?)?),
        // Queries, indices, and the keys and values of every sequence.
        Op::PagedAttention(op) => {
            let cache = s.operands.get(1)?;
            let rows = s.extent(5, 0)?.saturating_mul(s.paged_keys(op.window)?);
            let row = s.count(cache.shape.get(2..)?)?.saturating_mul(cache.dtype.bits() as u64).div_ceil(8);
            let others = s.bytes(s.operands.first()?)?.saturating_add(sum(s.operands.get(3..)?)?);
            (others.saturating_add(product(&[2, rows, row])), written)
        }
        _ => (sum(&s.operands)?, written),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::parse;

    /// Costs of all nodes of a graph body at the hints.
    fn costs(head: &str, body: &str) -> Vec<Cost> {
        let phase = if body.contains("fused") || body.contains("add_rms") { "fused" } else { "imported" };
        let module = parse(&format!("module @m phase {phase} {{\n{head}\n{body}\n  }}\n}}")).unwrap();
        let hints = Bindings::hints(&module.dims);
        module.graph.order.iter().map(|id| node_cost(&module, *id, &hints).unwrap()).collect()
    }

    fn cost(flops: u64, read: u64, written: u64) -> Cost {
        Cost { flops, read, written }
    }

    #[test]
    fn matmuls_by_hand() {
        let found = costs(
            "dim $t in 1..=64 hint 10\n weight @w : f32[6, 5] = splat(1.0)\n weight @b : f32[6] = splat(1.0)",
            r#"graph @main(%0 "x": f32[$t, 5]) -> ("y": f32[$t, 6], "z": f32[$t, 3]) {
    %1 = matmul %0, @w {transpose_b = true} : f32[$t, 6]
    %2 = matmul.fused %0, @w, @b {segments = [3, 3], epilogue = [bias, glu(silu)]} : f32[$t, 3]
    return %1, %2"#,
        );
        // 2 * 10 * 6 * 5; reads 10*5 + 6*5 floats, writes 10*6.
        assert_eq!(found[0], cost(600, 4 * 80, 4 * 60));
        // The same, 60 for the bias, 2 * 30 for the gate; 6 floats of bias more, 30 written.
        assert_eq!(found[1], cost(600 + 60 + 60, 4 * 86, 4 * 30));
    }

    #[test]
    fn elementwise_views_and_norms_by_hand() {
        let found = costs(
            "weight @w : bf16[8] = splat(1.0)",
            r#"graph @main(%0 "x": bf16[4, 8], %9 "r": bf16[4, 8]) -> ("y": bf16[32], "z": f32[4, 8]) {
    %1, %2 = add_rms_norm %0, %9, @w {eps = 1e-5, sum = true} : bf16[4, 8], bf16[4, 8]
    %3 = exp %1 : bf16[4, 8]
    %4 = add %3, %2 : bf16[4, 8]
    %5 = reshape %4 {shape = [32]} : bf16[32]
    %6 = cast %4 {to = f32} : f32[4, 8]
    return %5, %6"#,
        );
        assert_eq!(found[0], cost(5 * 32, 2 * (32 + 32 + 8), 2 * 64));
        assert_eq!(found[1], cost(32, 64, 64));
        assert_eq!(found[2], cost(32, 128, 64));
        assert_eq!(found[3], cost(0, 0, 0));
        assert_eq!(found[4], cost(0, 64, 128));
    }

    #[test]
    fn a_decode_step_by_hand() {
        let found = costs(
            "dim $b in 1..=8 hint 2\n dim $p in 1..=16 hint 3\n state @k : bf16[100, 16, 4, 8]\n state @v : bf16[100, 16, 4, 8]\n weight @e : bf16[1000, 8] = splat(1.0)",
            r#"graph @main(%0 "ids": i32[$b], %1 "x": bf16[$b, 4, 8], %2 "q": bf16[$b, 12, 8], %3 "starts": i32[$b + 1], %4 "lens": i32[$b], %5 "table": i32[$b, $p]) -> ("e": bf16[$b, 8], "o": bf16[$b, 12, 8], "r": bf16[$b, 12, 8]) {
    %6 = embedding @e, %0 : bf16[$b, 8]
    %7 = kv_append @k, %1, %3, %4, %5 : bf16[100, 16, 4, 8]
    %8 = kv_append @v, %1, %3, %4, %5 : bf16[100, 16, 4, 8]
    %9 = paged_attention %2, %7, %8, %3, %4, %5 {scale = 0.5} : bf16[$b, 12, 8]
    %10 = rope %2, %0 {base = 10000.0, layout = half, rotary = 4} : bf16[$b, 12, 8]
    return %6, %9, %10"#,
        );
        // Two rows of 8 and two ids; never the table of 1000 rows.
        assert_eq!(found[0], cost(0, 32 + 8, 32));
        // Indices: (3 + 2 + 6) i32.
        assert_eq!(found[1], cost(0, 128 + 44, 128));
        // 4 * q 2 * keys 48 * d 8 * heads 12; caches: 2 of 2 sequences * 48 rows * 4 heads * 8 * 2 bytes.
        assert_eq!(found[3], cost(4 * 2 * 48 * 8 * 12, 384 + 44 + 2 * 2 * 48 * 64, 384));
        // Four of eight elements of 24 heads turn.
        assert_eq!(found[4], cost(3 * 24 * 4, 384 + 8, 384));
    }

    #[test]
    fn time_is_the_slower_of_both_and_what_is_not_hidden() {
        let rates = Rates { flops: 100.0, bytes: 10.0 };
        let hidden = Sustained { rates, ..Sustained::CPU };
        assert_eq!(hidden.seconds(cost(500, 20, 10)), 5.0);
        assert_eq!(hidden.seconds(cost(100, 20, 10).plus(cost(0, 5, 5))), 4.0);
        let half = Sustained { exposed: 0.5, ..hidden };
        assert_eq!(half.seconds(cost(500, 20, 10)), 5.5);
        assert_eq!(half.seconds(cost(800, 20, 10)), 8.0);
        assert_eq!(Rates::of_target("cuda:sm_90a").0, Rates::CUDA);
    }

    #[test]
    fn few_rows_cost_what_was_measured() {
        // Weights of a layer of Llama 3.1 8B: what rows add to the time of one.
        let weights = 218_103_808u64;
        let of = |rows: u64| Sustained::CUDA.seconds(cost(2 * weights * rows, 2 * weights, 0));
        for (rows, measured) in [(8, 2.3e-6), (32, 15.4e-6)] {
            let added = of(rows) - of(1);
            assert!((added - measured).abs() < 2e-6, "{rows}: {added:e}");
        }
        // Many rows hide memory altogether.
        assert_eq!(of(4096), (2 * weights * 4096) as f64 / Sustained::CUDA.rates.flops);
    }

    #[test]
    fn copies_take_what_was_measured() {
        let Sustained { link, copy, .. } = Sustained::CUDA;
        for (kib, measured) in [(256u64, 36.6e9), (1024, 48.7e9), (4096, 53.7e9), (32768, 55.3e9)] {
            let bytes = (kib << 10) as f64;
            let rate = bytes / (copy + bytes / link);
            assert!((rate / measured - 1.0).abs() < 0.03, "{kib} KiB: {rate:e} and not {measured:e}");
        }
        assert_eq!(Sustained::of_target("cuda:sm_90a"), Sustained::CUDA);
        assert_eq!(Sustained::of_target("cpu").with_link(5e9).link, 5e9);
    }

    #[test]
    fn unbound_symbols_have_no_cost() {
        let module = parse("module @m phase imported {\n dim $t in 1..=4\n graph @main(%0 \"x\": f32[$t]) -> (\"y\": f32[$t]) {\n %1 = exp %0 : f32[$t]\n return %1\n }\n}").unwrap();
        assert_eq!(node_cost(&module, module.graph.order[0], &Bindings::new()), None);
    }
}
