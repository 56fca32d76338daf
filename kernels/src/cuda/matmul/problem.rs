//! What a matmul site asks for, taken apart once for all families.

use millrace_ir::launch::{Tiles, tile_count, tile_first};
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::{DType, Dim, Op, Operand};

use crate::cuda::plan::{Argument, Site, rows};

/// Order of a weight's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[n, k]`, row by row.
    Rows,
    /// `[panels, k / 8, 8, 8]`: panel, column block, row in the panel, column in the block. Each segment's rows fill whole
    /// panels, the last padded with zeros. With a gated epilogue the panels of the two segments alternate: first
    /// panel of the gate, first of the other, second of the gate, and so on.
    Cores,
}

/// An `rms_norm` of the operand, which a kernel may compute on the way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The node's operand: `[.., k]`.
    pub x: Operand,
    /// The norm's weight `[k]`.
    pub weight: Operand,
    /// Added to the mean square.
    pub eps: f32,
}

/// A step between accumulators and store, with its operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Term {
    /// The step.
    pub step: Epilogue,
    /// Its operand: bias `[n]` over all segments, or `[.., n]` like the result.
    pub operand: Option<Operand>,
}

/// `results = epilogue(norm(x) w^T)`.
#[derive(Clone, Debug)]
pub struct Problem<'a> {
    /// Where it comes from.
    pub site: Site<'a>,
    /// Rows of `x`, the product of its leading extents.
    pub m: Dim,
    /// Columns of `x`.
    pub k: usize,
    /// What the matmul reads: if there is a norm, its result, which has a place in memory that nobody else reads.
    pub x: Operand,
    /// The norm in front, if the site begins with one.
    pub norm: Option<Norm>,
    /// The weight.
    pub weight: Operand,
    /// Its layout.
    pub layout: Layout,
    /// Rows of the weight that each segment has.
    pub segments: Vec<usize>,
    /// Steps before the store.
    pub epilogue: Vec<Term>,
    /// One result a segment, or one in all if the epilogue is gated.
    pub results: Vec<Operand>,
    /// Element type of `x` and weight.
    pub dtype: DType,
    /// Element type of the results.
    pub out: DType,
    /// Whether launches read the whole weight even if it may come in parts.
    pub whole: bool,
}

impl<'a> Problem<'a> {
    /// The problem of a site `matmul.fused` or `rms_norm, matmul.fused` whose weight is in a layout of CUDA kernels.
    pub fn of(site: Site<'a>) -> Option<Problem<'a>> {
        let node = site.node(site.nodes.len() - 1);
        let Op::FusedMatmul(op) = &*node.op else { return None };
        let norm = match site.nodes.len() {
            1 => None,
            2 => match &*site.node(0).op {
                Op::RmsNorm(norm) => {
                    let first = site.node(0);
                    Some(Norm { x: first.operands[0], weight: first.operands[1], eps: norm.eps as f32 })
                }
                _ => return None,
            },
            _ => return None,
        };
        let (x, weight) = (node.operands[0], node.operands[1]);
        let (x_ty, w_ty) = (site.ty(x), site.ty(weight));
        let layout = match w_ty.rank() {
            2 => Layout::Rows,
            4 => Layout::Cores,
            _ => return None,
        };
        let mut operands = node.operands[2..].iter().copied();
        let epilogue = op
            .epilogue
            .iter()
            .map(|step| Term { step: *step, operand: step.has_operand().then(|| operands.next()).flatten() })
            .collect();
        Some(Problem {
            site,
            m: rows(x_ty),
            k: usize::try_from(x_ty.last().as_const()?).ok()?,
            x,
            norm,
            weight,
            layout,
            segments: op.segments.clone().to_vec(),
            epilogue,
            results: node.results.iter().map(|r| Operand::Value(*r)).collect(),
            dtype: x_ty.dtype,
            out: site.result_ty(node, 0).dtype,
            whole: false,
        })
    }

    /// Whether the epilogue is gated.
    pub fn gated(&self) -> bool {
        self.epilogue.iter().any(|t| matches!(t.step, Epilogue::Glu(_)))
    }

    /// Rows of the weight over all segments.
    pub fn n(&self) -> usize {
        self.segments.iter().sum()
    }

    /// Columns of the results over all segments, or of the gated one.
    pub fn features(&self) -> usize {
        if self.gated() { self.segments[0] } else { self.n() }
    }

    /// Panels of eight rows that a weight in [`Layout::Cores`] has.
    pub fn panels(&self) -> usize {
        self.segments.iter().map(|s| s.div_ceil(8)).sum()
    }

    /// How launches read the weight in parts; `None` if they read it as a whole: it may not be streamed, or no part of it
    /// holds the rows of a gate and those it gates.
    pub fn tiles(&self) -> Option<Tiles> {
        if self.whole {
            return None;
        }
        let Operand::Weight(weight) = self.weight else { return None };
        self.site.module.weights.get(weight)?.stream.as_ref().filter(|s| s.tile_axis == 0)?;
        let (slices, granule) = match self.layout {
            Layout::Cores => (self.panels(), if self.gated() { 2 } else { 1 }),
            Layout::Rows if self.gated() => return None,
            Layout::Rows => (self.n(), 1),
        };
        (slices > 0).then_some(Tiles { weight, slices: slices as u64, granule })
    }

    /// Slices of the weight that a launch computes.
    pub fn tile_slices(&self) -> Dim {
        match self.tiles() {
            Some(_) => Dim::from(tile_count()),
            None => Dim::from(if self.layout == Layout::Cores { self.panels() } else { self.n() }),
        }
    }

    /// The arguments `int tile_first, int tile_count` of kernels whose launches read the weight in parts.
    pub fn tile_arguments(&self) -> Vec<Argument> {
        match self.tiles() {
            Some(_) => [tile_first(), tile_count()].map(|s| Argument::I32(Dim::from(s))).to_vec(),
            None => Vec::new(),
        }
    }
}
