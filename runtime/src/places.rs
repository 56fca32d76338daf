//! Where values live during a step, for any kind of memory.
//!
//! A [`Piece`] is a range of memory that can be cut and compared; backends have their own. Places come from the engine
//! and are not trusted: a place that leaves its buffer or a result that overlaps what its node reads is an error.

use millrace_ir::{
    Bindings, Def, Error, Id, Kind, Module, Node, NodeId, Op, Operand, Place, Result, ValueId,
};

/// A range of memory.
pub(crate) trait Piece: Copy {
    /// Bytes `start .. start + len`, if they lie inside.
    fn part(self, start: u64, len: u64) -> Option<Self>;
    /// Whether two ranges share a byte.
    fn overlaps(self, other: Self) -> bool;
    /// Whether two ranges are the same bytes.
    fn same(self, other: Self) -> bool;
    /// Length in bytes.
    fn bytes(self) -> u64;
}

/// Memory of one step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Regions<P> {
    pub inputs: Vec<P>,
    pub outputs: Vec<P>,
    pub arenas: Vec<P>,
    pub states: Vec<Option<P>>,
    pub weights: Vec<Option<P>>,
}

pub(crate) fn forged(message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, "engine/forged", message).hint("the engine was altered: build it again")
}

impl<P: Piece> Regions<P> {
    /// By value: where the graph's inputs are; nothing is known of other values.
    pub fn input_values(&self, module: &Module) -> Vec<Option<P>> {
        let mut values = vec![None; module.graph.values.bound()];
        for (id, region) in module.graph.inputs.iter().zip(&self.inputs) {
            values[id.index()] = Some(*region);
        }
        values
    }

    /// Finds the places of the results of node `id`, adds them to `values`, and checks that they lie inside their
    /// buffers and overlap no operand. Returns the regions of operands and results.
    pub fn place_node(
        &self,
        module: &Module,
        bindings: &Bindings,
        id: NodeId,
        values: &mut [Option<P>],
    ) -> Result<(Vec<P>, Vec<P>)> {
        let node = &module.graph.nodes[id];
        for result in &node.results {
            let place = self.place(module, bindings, *result).map_err(|e| e.at(id))?;
            values[result.index()] = Some(place);
        }
        let operands =
            self.operands(node, values).ok_or_else(|| forged("an operand has no memory").at(id))?;
        let results: Vec<P> = node.results.iter().filter_map(|r| values[r.index()]).collect();
        disjoint(&node.op, &operands, &results).map_err(|e| e.at(id))?;
        Ok((operands, results))
    }

    fn operands(&self, node: &Node, values: &[Option<P>]) -> Option<Vec<P>> {
        node.operands.iter().map(|o| self.operand(*o, values)).collect()
    }

    /// Where an operand is, once its node has run.
    pub fn operand(&self, operand: Operand, values: &[Option<P>]) -> Option<P> {
        match operand {
            Operand::Value(v) => values.get(v.index()).copied().flatten(),
            Operand::Weight(w) => self.weights.get(w.index()).copied().flatten(),
            Operand::State(s) => self.states.get(s.index()).copied().flatten(),
        }
    }

    fn place(&self, module: &Module, bindings: &Bindings, value: ValueId) -> Result<P> {
        let value = &module.graph.values[value];
        debug_assert!(matches!(value.def, Def::Node { .. }));
        let bytes = value.ty.bytes().extent(bindings).ok_or_else(|| forged("a size has no value"))?;
        let region = match &value.place {
            Some(Place::Arena { arena, offset }) => {
                let index = module.arenas.ids().position(|a| a == *arena);
                let base = index.and_then(|i| self.arenas.get(i));
                offset.extent(bindings).zip(base).and_then(|(at, base)| base.part(at, bytes))
            }
            Some(Place::State(state)) => self.states.get(state.index()).copied().flatten(),
            Some(Place::Output(n)) => self.outputs.get(*n).and_then(|r| r.part(0, bytes)),
            None => None,
        };
        region.filter(|r| r.bytes() == bytes).ok_or_else(|| forged("a result has no memory"))
    }

    /// Inputs, versions of states and values with several names that end up in outputs: from where to where.
    pub fn late_outputs(&self, module: &Module, values: &[Option<P>]) -> Result<Vec<(P, P)>> {
        let mut copies = Vec::new();
        for (n, (output, region)) in module.graph.outputs.iter().zip(&self.outputs).enumerate() {
            let value = module.graph.values.get(output.value);
            if value.is_some_and(|v| v.place != Some(Place::Output(n))) {
                let from = values.get(output.value.index()).copied().flatten();
                let missing = || forged("an output has no memory").at(format!("\"{}\"", output.name));
                copies.push((from.ok_or_else(missing)?, *region));
            }
        }
        Ok(copies)
    }
}

/// No result shares a byte with another result or with an operand, except with the whole of the operand it may
/// replace.
fn disjoint<P: Piece>(op: &Op, operands: &[P], results: &[P]) -> Result<()> {
    let traits = op.traits();
    let replaced = if traits.writes_state { Some(0) } else { traits.in_place };
    for (r, result) in results.iter().enumerate() {
        for (o, operand) in operands.iter().enumerate() {
            let allowed = r == 0 && replaced == Some(o) && result.same(*operand);
            if result.overlaps(*operand) && !allowed {
                return Err(forged("a result overlaps an operand"));
            }
        }
        if results[..r].iter().any(|other| other.overlaps(*result)) {
            return Err(forged("two results overlap"));
        }
    }
    Ok(())
}
