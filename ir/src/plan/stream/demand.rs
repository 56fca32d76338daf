//! What a module asks of the memory for weights.

use std::ops::Range;

use crate::arena::Id;
use crate::error::Result;
use crate::graph::{Module, Node, Operand, WeightId};
use crate::ops::Op;
use crate::weights::WeightReader;

/// How a use may be served by less than the whole weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Tiles that begin at multiples of `granule` slices. If `parts` is 2, the weight's axis 0 has two equal halves, and a
    /// tile takes the same slices of both, the first half's before the second's.
    Tiles {
        /// Slices of a half, or of the weight if there is one part.
        granule: u64,
        /// 1 or 2.
        parts: u64,
    },
    /// Only rows that are picked by index: they are read where the weight lies, and nothing is copied.
    Rows,
    /// All of it at once.
    Whole,
}

/// One weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The weight.
    pub weight: WeightId,
    /// Its bytes.
    pub bytes: u64,
    /// Slices of one part; see [`Cut::Tiles`]. 1 where it is not cut into tiles.
    pub slices: u64,
    /// Bytes of one slice of every part.
    pub slice_bytes: u64,
    /// The least that its uses allow; `None` for a weight that stays: one that is not marked as streamable, a vector, or one
    /// beside a larger one in the same launch.
    pub cut: Option<Cut>,
    /// How many nodes read it.
    pub uses: usize,
}

/// A read of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// Index into [`Demand::items`].
    pub item: usize,
    /// Position of the node in the execution order.
    pub node: usize,
}

/// All weights that nodes read, in the order of their first use, and all reads in execution order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// Weights.
    pub items: Vec<Item>,
    /// Reads; a node that reads a weight twice counts once.
    pub uses: Vec<Use>,
    /// Nodes of the execution order.
    pub nodes: usize,
}

impl Demand {
    /// The demand of a module in which streamable weights are marked.
    ///
    /// # Errors
    /// `weights/..` where a weight has no size.
    pub fn of(module: &Module) -> Result<Demand> {
        let reader = WeightReader::new(module);
        let mut index = vec![usize::MAX; module.weights.bound()];
        let mut demand = Demand { nodes: module.graph.order.len(), ..Demand::default() };
        for (at, id) in module.graph.order.iter().enumerate() {
            let node = &module.graph.nodes[*id];
            for (operand, value) in node.operands.iter().enumerate() {
                let Operand::Weight(w) = *value else { continue };
                let weight = &module.weights[w];
                let (cut, axis) = (cut(module, node, operand), weight.ty.shape.first());
                if index[w.index()] == usize::MAX {
                    index[w.index()] = demand.items.len();
                    let bytes = reader.len(w)?;
                    let extent =
                        axis.and_then(|d| d.as_const()).and_then(|n| u64::try_from(n).ok()).unwrap_or(1);
                    // Vectors are small, and a kernel wants them beside its matrix.
                    let cut = weight.stream.as_ref().filter(|_| weight.ty.rank() > 1).map(|_| cut);
                    demand.items.push(Item {
                        weight: w,
                        bytes,
                        slices: extent.max(1),
                        slice_bytes: 0,
                        cut,
                        uses: 0,
                    });
                }
                let item = index[w.index()];
                let known = &mut demand.items[item];
                known.cut = known.cut.map(|known| if known == cut { cut } else { Cut::Whole });
                if demand.uses.iter().rev().take_while(|u| u.node == at).all(|u| u.item != item) {
                    known.uses += 1;
                    demand.uses.push(Use { item, node: at });
                }
            }
        }
        demand.items.iter_mut().for_each(Item::settle);
        for group in module.graph.launch_groups(&module.graph.order) {
            demand.one_of(group);
        }
        Ok(demand)
    }

    /// Of several weights that nodes launched together would stream, only the largest does: the ring holds what one
    /// launch reads, and gives it up after the launch.
    fn one_of(&mut self, nodes: Range<usize>) {
        let first = self.uses.partition_point(|u| u.node < nodes.start);
        let last = self.uses.partition_point(|u| u.node < nodes.end);
        let copied = |item: &Item| matches!(item.cut, Some(Cut::Tiles { .. } | Cut::Whole));
        let mut items: Vec<usize> = self.uses[first..last].iter().map(|u| u.item).collect();
        items.retain(|i| copied(&self.items[*i]));
        let largest = items.iter().copied().max_by_key(|i| (self.items[*i].bytes, std::cmp::Reverse(*i)));
        for index in items.into_iter().filter(|i| Some(*i) != largest) {
            let item = &mut self.items[index];
            (item.cut, item.slices, item.slice_bytes) = (None, 1, item.bytes);
        }
    }

    /// Bytes of the weights that may stream if those under `small` bytes may not.
    pub fn streamable(&self, small: u64) -> u64 {
        self.items.iter().filter(|i| i.streams(small)).map(|i| i.bytes).sum()
    }

    /// Bytes of all weights.
    pub fn total(&self) -> u64 {
        self.items.iter().map(|i| i.bytes).sum()
    }
}

impl Item {
    /// Whether it may stream if weights under `small` bytes may not.
    pub fn streams(&self, small: u64) -> bool {
        self.cut.is_some() && self.bytes >= small && self.bytes > 0
    }

    /// Derives what a slice is from the cut.
    fn settle(&mut self) {
        match self.cut {
            Some(Cut::Tiles { granule, parts })
                if granule > 0
                    && parts > 0
                    && self.slices.is_multiple_of(parts)
                    && self.bytes.is_multiple_of(self.slices) =>
            {
                self.slices /= parts;
            }
            Some(Cut::Rows) | None => self.slices = 1,
            Some(_) => (self.slices, self.cut) = (1, Some(Cut::Whole)),
        }
        self.slice_bytes = self.bytes / self.slices;
    }
}

/// How operand number `operand` of a node may be served. On the CPU only some kernels take less than a whole weight;
/// before kernels are chosen, those are assumed.
fn cut(module: &Module, node: &Node, operand: usize) -> Cut {
    let cuda = module.target.as_deref().is_some_and(|t| t.starts_with("cuda"));
    let kernel = node.kernel.and_then(|k| module.kernels.get(k)).map(|k| k.name.as_str());
    let runs = |name: &str| cuda || kernel.is_none_or(|kernel| kernel == name);
    match &*node.op {
        Op::FusedMatmul(op) if operand == 1 => match (op.glu().is_some(), op.cores, op.panel > 0) {
            // The panels of gate and up alternate.
            (true, true, _) if cuda => Cut::Tiles { granule: 2, parts: 1 },
            (false, true, _) if cuda => Cut::Tiles { granule: 1, parts: 1 },
            (gated, false, true) if !cuda && runs("cpu.matmul.packed") => {
                Cut::Tiles { granule: 1, parts: if gated { 2 } else { 1 } }
            }
            (false, false, false) if cuda => Cut::Tiles { granule: 1, parts: 1 },
            _ => Cut::Whole,
        },
        Op::Embedding(_) if operand == 0 && runs("cpu.gather") => Cut::Rows,
        Op::Gather(gather) if operand == 0 && gather.axis == 0 && runs("cpu.gather") => Cut::Rows,
        _ => Cut::Whole,
    }
}
