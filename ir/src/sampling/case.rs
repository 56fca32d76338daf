//! A finished random graph, and values for everything it leaves open: symbols, inputs, states.

use super::draft::TOKENS_PER_BLOCK;
use super::random::Random;
use crate::dim::{Bindings, Dim, Sym};
use crate::graph::Module;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// What the elements of an input are.
#[derive(Clone, Debug, PartialEq)]
pub enum Fill {
    /// Numbers between two bounds; whole ones for integers.
    Uniform(f64, f64),
    /// Indices of an axis of this extent.
    Index(Dim),
    /// First row of each sequence, and the number of rows.
    SeqStarts,
    /// Length of each sequence after the step.
    KvLens,
    /// Pages of each sequence, no page twice.
    BlockTable,
}

impl Fill {
    /// Bounds of the elements.
    pub(super) fn range(&self, maxima: &Bindings) -> (f64, f64) {
        match self {
            Fill::Uniform(low, high) => (*low, *high),
            Fill::Index(extent) => (0.0, extent.extent(maxima).map_or(f64::MAX, |n| n as f64 - 1.0)),
            Fill::SeqStarts | Fill::KvLens | Fill::BlockTable => (0.0, 16.0),
        }
    }

    /// The public name that importers give such an input.
    pub(super) fn name(&self) -> Option<&'static str> {
        match self {
            Fill::Uniform(..) | Fill::Index(_) => None,
            Fill::SeqStarts => Some("seq_starts"),
            Fill::KvLens => Some("kv_lens"),
            Fill::BlockTable => Some("block_table"),
        }
    }
}

/// A module with what its inputs may hold.
#[derive(Clone, Debug)]
pub struct RandomGraph {
    /// The seed it follows from.
    pub seed: u64,
    /// The graph.
    pub module: Module,
    /// What each input holds, in the order of the inputs.
    pub fills: Vec<Fill>,
    /// Bounds of each output's elements.
    pub output_bounds: Vec<(f64, f64)>,
    /// Whether the inputs describe packed sequences with a cache.
    pub paged: bool,
}

impl RandomGraph {
    /// A graph that was written by hand: inputs are known by the names of packed sequences, integers are `0` or `1`,
    /// floats lie around 0.
    pub fn of(module: Module) -> Self {
        let fills: Vec<Fill> = module
            .input_types()
            .into_iter()
            .map(|(name, ty)| {
                match [Fill::SeqStarts, Fill::KvLens, Fill::BlockTable]
                    .iter()
                    .find(|f| f.name() == Some(name))
                {
                    Some(fill) => fill.clone(),
                    None if ty.dtype.is_float() => Fill::Uniform(-2.0, 2.0),
                    None => Fill::Uniform(0.0, 1.0),
                }
            })
            .collect();
        let paged = fills.contains(&Fill::SeqStarts);
        let output_bounds = vec![(f64::NEG_INFINITY, f64::INFINITY); module.graph.outputs.len()];
        RandomGraph { seed: 0, module, fills, output_bounds, paged }
    }

    /// Random values of all symbols, within their ranges and such that the packed rows fit the pages.
    pub fn bindings(&self, random: &mut Random) -> Bindings {
        let mut bindings = Bindings::new();
        for decl in &self.module.dims {
            let value = match random.below(4) {
                0 => decl.min,
                1 => decl.max,
                _ => random.between(decl.min as usize, decl.max as usize) as u64,
            };
            bindings.set(decl.sym, value / decl.multiple * decl.multiple);
        }
        if self.paged {
            let get = |name: &str| Sym::new(name).and_then(|s| bindings.get(s)).unwrap_or(1);
            let room = get("b") * get("p") * TOKENS_PER_BLOCK as u64;
            let rows = get("t").min(room);
            if let Some(t) = Sym::new("t") {
                bindings.set(t, rows);
            }
        }
        bindings
    }

    /// Inputs that the graph accepts at `bindings`.
    pub fn inputs(&self, bindings: &Bindings, random: &mut Random) -> Vec<Tensor> {
        let get = |name: &str| Sym::new(name).and_then(|s| bindings.get(s)).unwrap_or(1) as usize;
        let (t, b, p) = (get("t"), get("b"), get("p"));
        let room = p * TOKENS_PER_BLOCK;
        let mut lens = vec![0usize; b];
        for _ in 0..t {
            let start = random.below(b);
            if let Some(s) = (0..b).map(|i| (start + i) % b).find(|s| !self.paged || lens[*s] < room) {
                lens[s] += 1;
            }
        }
        let mut starts = vec![0usize];
        lens.iter().for_each(|n| starts.push(starts.last().copied().unwrap_or(0) + n));
        let kv: Vec<usize> = lens.iter().map(|n| random.between(*n, room.max(*n))).collect();
        let mut pages: Vec<usize> = (0..get("pages").max(b * p)).collect();
        (1..pages.len()).rev().for_each(|i| pages.swap(i, random.below(i + 1)));
        let types = self.module.input_types();
        types
            .into_iter()
            .zip(&self.fills)
            .map(|((_, ty), fill)| {
                let mut tensor = zeros(ty, bindings);
                for (i, v) in tensor.data.iter_mut().enumerate() {
                    *v = match fill {
                        // Equal elements, zeros and ends are where kernels differ from what they should be.
                        Fill::Uniform(low, high) if ty.dtype.is_float() && random.once_in(8) => {
                            random.pick(&[0.0, 1.0, -1.0, *low, *high]).clamp(*low, *high)
                        }
                        Fill::Uniform(low, high) if ty.dtype.is_float() => random.uniform(*low, *high),
                        Fill::Uniform(low, high) => {
                            (random.uniform(*low, *high + 1.0)).floor().clamp(*low, *high)
                        }
                        Fill::Index(extent) => {
                            random.below(extent.extent(bindings).unwrap_or(1) as usize) as f64
                        }
                        Fill::SeqStarts => starts[i] as f64,
                        Fill::KvLens => kv[i] as f64,
                        Fill::BlockTable => pages[i] as f64,
                    };
                }
                tensor.round();
                tensor
            })
            .collect()
    }

    /// States of zeros, as a session starts with.
    pub fn zero_states(&self, bindings: &Bindings) -> Vec<Tensor> {
        self.module.states.iter().map(|(_, s)| zeros(&s.ty, bindings)).collect()
    }

    /// States as earlier steps may have left them.
    pub fn states(&self, bindings: &Bindings, random: &mut Random) -> Vec<Tensor> {
        let mut states = self.zero_states(bindings);
        for state in &mut states {
            state.data.iter_mut().for_each(|v| *v = random.uniform(-1.0, 1.0));
            state.round();
        }
        states
    }
}

fn zeros(ty: &TensorType, bindings: &Bindings) -> Tensor {
    let shape: Vec<usize> =
        ty.shape_at(bindings).unwrap_or_default().into_iter().map(|d| d as usize).collect();
    let elements = shape.iter().product();
    Tensor { dtype: ty.dtype, shape, data: vec![0.0; elements] }
}
