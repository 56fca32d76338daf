//! The CPU backend: runs a lowered graph node by node with the kernels it names.
//!
//! Before a node runs, its results are checked to overlap no operand, except the one it may replace in place. So
//! even an engine with a forged plan cannot make two references to the same bytes.

mod backend;
#[allow(unsafe_code)]
mod execute;
mod numeric;
#[allow(unsafe_code)]
mod readers;
mod reference;
#[allow(unsafe_code)]
mod residence;
mod tensors;

use std::cell::Cell;
use std::time::{Duration, Instant};

use millrace_ir::plan::stream::Cut;
use millrace_ir::{Bindings, Error, Id, Kind, Module, NodeId, Op, Operand, Result};
use millrace_kernels::cpu::Pool;
use millrace_kernels::cpu::select::{REFERENCE, select};

use crate::memory::Region;
use crate::places;
use crate::profile::Profile;
use crate::weights::Supply;
use residence::Streamed;

pub(crate) use backend::Cpu;

/// Memory of one step.
pub(crate) type Regions = places::Regions<Region>;

/// What is prepared once for a graph.
pub(crate) struct Program {
    /// By node: rotary frequencies, where a node needs them.
    frequencies: Vec<Option<Vec<f32>>>,
}

impl Program {
    /// Checks that this runtime has the kernels the graph names.
    pub fn new(module: &Module) -> Result<Program> {
        let graph = &module.graph;
        let mut frequencies = vec![None; graph.nodes.bound()];
        for (id, node) in graph.nodes.iter() {
            let kernel = node.kernel.and_then(|k| module.kernels.get(k)).map_or("none", |k| k.name.as_str());
            let expected = select(module, node);
            if kernel != expected && kernel != REFERENCE {
                let message =
                    format!("kernel `{kernel}` is not what this runtime has for `{}`", node.op.name());
                return Err(Error::new(Kind::Incompatible, "engine/kernel", message)
                    .at(id)
                    .hint("build the engine again with this version"));
            }
            if let Op::Rope(rope) = &*node.op {
                let d = module.operand_type(node.operands[0]).last().as_const().unwrap_or(0);
                // The verifier has bounded the head size with the type.
                frequencies[id.index()] =
                    Some(rope.frequencies(rope.rotated(usize::try_from(d).unwrap_or(0))));
            }
        }
        Ok(Program { frequencies })
    }

    /// Runs every node; the time of each goes into `profile`, if there is one.
    pub fn run(
        &self,
        module: &Module,
        pool: &Pool,
        regions: &mut Regions,
        bindings: &Bindings,
        mut streaming: Option<Streaming<'_, '_>>,
        mut profile: Option<&mut Profile>,
    ) -> Result<()> {
        let graph = &module.graph;
        let mut values = regions.input_values(module);
        if let Some(Streaming { streamed, .. }) = &mut streaming {
            streamed.begin()?;
        }
        for (at, id) in graph.order.iter().enumerate() {
            let node = &graph.nodes[*id];
            let mut step = Step {
                node: execute::Node {
                    module,
                    node,
                    operands: &[],
                    results: &[],
                    bindings,
                    frequencies: self.frequencies[id.index()].as_deref(),
                    panels: None,
                    table: None,
                },
                id: *id,
                pool,
                regions,
                values: &mut values,
            };
            let start = profile.as_ref().map(|_| Instant::now());
            let mut waited = Waited::default();
            match &mut streaming {
                Some(streaming) => step.run_streamed(at, streaming, &mut waited, start.is_some())?,
                None => step.run()?,
            }
            if let (Some(profile), Some(start)) = (profile.as_deref_mut(), start) {
                profile.node(*id, start);
                profile.streamed(waited.stall, waited.bytes);
            }
        }
        for (from, to) in regions.late_outputs(module, &values)? {
            execute::copy(from, to)?;
        }
        if let Some(Streaming { streamed, .. }) = streaming {
            streamed.end();
        }
        Ok(())
    }
}

/// Weights that stream during a step.
pub(crate) struct Streaming<'s, 'e> {
    pub streamed: &'s mut Streamed,
    pub supply: Supply<'e>,
}

/// What streaming cost a node.
#[derive(Default)]
struct Waited {
    stall: Duration,
    bytes: u64,
}

/// One node of a step.
struct Step<'a> {
    node: execute::Node<'a>,
    id: NodeId,
    pool: &'a Pool,
    regions: &'a mut Regions,
    values: &'a mut [Option<Region>],
}

impl Step<'_> {
    fn place(&mut self) -> Result<(Vec<Region>, Vec<Region>)> {
        self.regions.place_node(self.node.module, self.node.bindings, self.id, self.values)
    }

    /// Runs the kernel on these operands.
    fn call(
        &self,
        operands: &[Region],
        results: &[Region],
        panels: Option<std::ops::Range<usize>>,
        table: Option<execute::Table<'_>>,
    ) -> Result<()> {
        let node = execute::Node { operands, results, panels, table, ..self.node };
        node.run(self.pool).map_err(|e| match self.node.node.loc.first() {
            Some(loc) => e.at(format!("{} ({loc})", self.id)),
            None => e.at(self.id),
        })
    }

    fn run(&mut self) -> Result<()> {
        let (operands, results) = self.place()?;
        self.call(&operands, &results, None, None)
    }

    /// Runs the node with the weights that it streams: whole in a slot, tile by tile, or by the row.
    fn run_streamed(
        &mut self,
        at: usize,
        streaming: &mut Streaming<'_, '_>,
        waited: &mut Waited,
        timed: bool,
    ) -> Result<()> {
        let Streaming { streamed, supply } = streaming;
        let before = streamed.moved;
        let mut stall = |wait: &mut dyn FnMut() -> Result<Region>| {
            let start = timed.then(Instant::now);
            let region = wait();
            waited.stall += start.map_or(Duration::ZERO, |start| start.elapsed());
            region
        };
        let copies = streamed.copies(at);
        let first = copies.clone().next().map(|index| streamed.copy(index));
        let tiled = first.is_some_and(|(item, _, _)| matches!(item.cut, Some(Cut::Tiles { .. })));
        let prefix = first.map_or(0, |(_, resident, _)| resident as usize);
        let weight = first.map(|(item, _, _)| item.weight);
        let whole = copies.clone().next().filter(|_| !tiled);
        let place = whole.zip(weight);
        if let Some((copy, weight)) = place {
            let region = stall(&mut || streamed.arrive(supply, copy))?;
            self.regions.weights[weight.index()] = Some(region);
        }
        let (mut operands, results) = self.place()?;
        let operand = self.node.node.operands.iter().position(|o| Some(*o) == weight.map(Operand::Weight));
        if let (true, Some(operand)) = (tiled, operand) {
            if prefix > 0 {
                self.call(&operands, &results, Some(0..prefix), None)?;
            }
            for copy in copies {
                operands[operand] = stall(&mut || streamed.arrive(supply, copy))?;
                let (_, _, tile) = streamed.copy(copy);
                let first = tile.first as usize;
                self.call(&operands, &results, Some(first..first + tile.count as usize), None)?;
                streamed.leave(copy)?;
            }
        } else {
            let afar = match self.node.node.operands.first() {
                Some(Operand::Weight(w)) if operands[0].len() == 0 => streamed.table(*w),
                _ => None,
            };
            let read = Cell::new(0);
            let supply = std::cell::RefCell::new(&mut *supply);
            let table = |width: usize, places: &[usize], out: &mut [u8]| -> Result<()> {
                let Some(item) = afar else { return Err(execute::internal("a table has no place")) };
                let bytes = streamed.rows(&mut supply.borrow_mut(), item, width, places, out)?;
                read.set(read.get() + bytes);
                Ok(())
            };
            self.call(&operands, &results, None, afar.map(|_| &table as execute::Table<'_>))?;
            let bytes = read.get();
            streamed.moved += bytes;
            if let Some((copy, weight)) = place {
                self.regions.weights[weight.index()] = None;
                streamed.leave(copy)?;
            }
        }
        waited.bytes = streamed.moved - before;
        Ok(())
    }
}

#[cfg(test)]
mod differential_tests;
