//! Feed-forward layers run in parts of their intermediate width, for machines with little memory: the widest
//! activation of most models is alive for one part at a time.
//!
//! ```text
//! h = matmul.fused(x, @up) {epilogue = [glu(silu)]} ; y = matmul.fused(h, @down, r) {epilogue = [residual]}
//!   ->  h0 = matmul.fused(x, @up.part0of2) {..} ; y0 = matmul.fused(h0, @down.part0of2, r) {epilogue = [residual]}
//!       h1 = matmul.fused(x, @up.part1of2) {..} ; y  = matmul.fused(h1, @down.part1of2, y0) {epilogue = [residual]}
//! ```
//!
//! The first part takes the bias and the residual; one that was joined with the norm behind it (`add_rms_norm`) comes
//! out of it again, so that it dies before the second part. It costs time: `x` and `y` are read and written once for
//! each part. The sum over the intermediate width is rounded to the element type after each part: f32 results move
//! by rounding, bf16 results by up to one rounding for each part.
//!
//! All layers are tried with 2, 4 and 8 parts (`parts=N`: with N only), and the largest live set at the symbols' upper
//! bounds decides: the fewest parts within 5 % of the best (`limit=BYTES`: the fewest that reach the limit, and nothing
//! where it is kept already). Nothing changes unless it falls (`force=true`: even then). A part is a whole number of
//! the target's weight panels. No level runs this pass.

use std::cell::RefCell;

use millrace_ir::names::WeightNames;
use millrace_ir::ops::FusedMatmul;
use millrace_ir::ops::fused_matmul::Epilogue;
use millrace_ir::{Id, Module, Node, NodeId, Op, Phase, Result};

use super::chunks::{self, Chunks, Pieces, Sum, blocked, constant, fused, joins, reader};
use crate::options::{PassOption, PassOptions};
use crate::pass::{Context, Pass};
use crate::rewrite::{From, Outcome, Patch, Rule, View, rewrite};

/// See the module.
#[derive(Default)]
pub(super) struct ChunkMlp(Chunks);

const NAME: &str = "chunk-mlp";

impl Pass for ChunkMlp {
    fn name(&self) -> &'static str {
        NAME
    }
    fn help(&self) -> &'static str {
        "runs feed-forward layers in parts of their intermediate width where that lowers the peak"
    }
    fn phases(&self) -> (Phase, Phase) {
        (Phase::Fused, Phase::Fused)
    }
    fn options(&self) -> &'static [PassOption] {
        chunks::OPTIONS
    }
    fn with_options(&self, options: &PassOptions) -> Option<Box<dyn Pass>> {
        Some(Box::new(ChunkMlp(Chunks::of(options))))
    }
    fn run(&self, module: &mut Module, context: &mut Context) -> Result<bool> {
        if self.0.parts == 1 {
            return Ok(false);
        }
        let apply = |module: &mut Module, context: &mut Context, parts| {
            let rule = Chunk::new(module, context, parts);
            rewrite(NAME, module, context, &rule)
        };
        self.0.run(NAME, &[2, 4, 8], module, context, &apply)
    }
}

/// The rule for one number of parts.
struct Chunk {
    parts: usize,
    panel: usize,
    /// Nodes from here on are the rule's own.
    bound: usize,
    names: RefCell<Option<WeightNames>>,
    /// What [`Rule::look`] found, for [`Rule::prepare`].
    layer: RefCell<Option<Layer>>,
}

/// A layer that falls into parts.
#[derive(Clone)]
struct Layer {
    up: (Node, FusedMatmul),
    down: Sum,
    /// Rows of `up` in one part.
    width: usize,
}

impl Chunk {
    fn new(module: &Module, context: &Context, parts: usize) -> Self {
        let bound = module.graph.nodes.bound();
        let (names, layer) = (RefCell::new(None), RefCell::new(None));
        Chunk { parts, panel: context.panel.max(1), bound, names, layer }
    }

    /// The layer that ends in `down`: with its sources, no layer, or the reason why it does not fall into parts.
    fn layer(
        &self,
        view: &View<'_>,
        down_id: NodeId,
        norm: Option<NodeId>,
    ) -> std::result::Result<(Vec<NodeId>, Layer), Option<String>> {
        let down_node = view.node(down_id);
        let down = fused(down_node).filter(|_| down_id.index() < self.bound).ok_or(None)?;
        let (up_id, _) = view.def(down_node.operands[0]).ok_or(None)?;
        let up_node = view.node(up_id);
        let up = fused(up_node).filter(|_| up_id.index() < self.bound).ok_or(None)?;
        let activates = |e: &Epilogue| matches!(e, Epilogue::Activation(_) | Epilogue::Glu(_));
        if !up.epilogue.iter().any(activates) {
            return Err(None);
        }
        if reader(view, up_node) != Some(down_id) {
            return blocked("the intermediate has other uses");
        }
        if !up.plain() || !down.plain() {
            return blocked("the weights are packed already");
        }
        let after_bias = up.epilogue.strip_prefix(&[Epilogue::Bias]).unwrap_or(&up.epilogue);
        if !matches!(after_bias, [step] if activates(step)) {
            return blocked("the first matmul does more than bias and activation");
        }
        let sum = Sum::of(view, down_id, norm, "the second matmul").map_err(Some)?;
        if !constant(up_node, up) {
            return blocked("a weight or bias is computed");
        }
        let whole = up.segments[0];
        let unit = self.parts * self.panel;
        if whole == 0 || !whole.is_multiple_of(unit) {
            let reason = match self.panel {
                1 => format!("a width of {whole} does not fall into {} parts", self.parts),
                panel => {
                    format!(
                        "a width of {whole} does not fall into {} parts of {panel}-row panels",
                        self.parts
                    )
                }
            };
            return Err(Some(reason));
        }
        let sources = [up_id, down_id].into_iter().chain(norm).collect();
        let up = (up_node.clone(), up.clone());
        Ok((sources, Layer { up, down: sum, width: whole / self.parts }))
    }

    /// Adds the parts of a layer to `patch`.
    fn build(&self, module: &mut Module, names: &mut WeightNames, layer: Layer, patch: &mut Patch) {
        let Layer { up: (up_node, up), mut down, width } = layer;
        let mut pieces = Pieces { module, names, parts: self.parts };
        let weight = down.weight();
        for part in 0..self.parts {
            let whole = up.segments[0];
            let rows: Vec<_> = (0..up.segments.len()).map(|s| (s * whole + part * width, width)).collect();
            let mut operands = vec![From::Old(up_node.operands[0])];
            for operand in &up_node.operands[1..] {
                operands.push(pieces.rows(*operand, &rows, part));
            }
            let segments = vec![width; up.segments.len()];
            let made = patch.node(FusedMatmul { segments: segments.into(), ..up.clone() }, operands);
            down.add(patch, From::New(made, 0), pieces.columns(weight, part * width, width, part));
        }
        down.finish(patch);
    }
}

impl Rule for Chunk {
    fn look(&self, view: &View<'_>, id: NodeId) -> Outcome {
        let node = view.node(id);
        // An addition and norm that only the second matmul's addition feeds is looked at instead of that matmul.
        let joined = |down: NodeId, norm: NodeId| norm.index() < self.bound && joins(view, down, norm);
        let found = match &*node.op {
            Op::FusedMatmul(_) => match reader(view, node) {
                Some(norm) if joined(id, norm) => Err(None),
                _ => self.layer(view, id, None),
            },
            Op::AddNorm(_) => {
                let downs = node.operands[..2].iter().filter_map(|o| view.def(*o)).map(|(down, _)| down);
                let of = downs.filter(|d| joined(*d, id) && reader(view, view.node(*d)) == Some(id));
                // The first layer that applies, or the first reason.
                let mut found = Err(None);
                for down in of {
                    match (&found, self.layer(view, down, Some(id))) {
                        (Ok(_), _) | (Err(Some(_)), Err(_)) => {}
                        (_, next) => found = next,
                    }
                }
                found
            }
            _ => Err(None),
        };
        match found {
            Ok((sources, layer)) => {
                self.layer.replace(Some(layer));
                Outcome::Rewrite(Patch::new(sources))
            }
            Err(Some(reason)) => Outcome::Blocked(reason),
            Err(None) => Outcome::NoMatch,
        }
    }

    fn prepare(&self, module: &mut Module, mut patch: Patch) -> Result<Patch> {
        if let Some(layer) = self.layer.take() {
            let mut names = self.names.borrow_mut();
            let names = names.get_or_insert_with(|| WeightNames::of(module));
            self.build(module, names, layer, &mut patch);
        }
        Ok(patch)
    }
}
