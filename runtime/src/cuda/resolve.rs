//! From a launch table to what is launched at given bindings and addresses: no device is touched here.
//!
//! The table comes from the engine and is not trusted. Every address lies inside its buffer, results overlap no operand
//! of their node, tensor maps stay inside their memory, grids and blocks keep the limits of the hardware; else the
//! error is `engine/forged` with the node.

mod by_library;

use std::collections::BTreeMap;
use std::ops::Range as Span;

use millrace_ir::launch::{Arg, Launch, LaunchStep, LaunchTable, MapBase, TensorMap, Tiles};
use millrace_ir::{Bindings, DType, Dim, Error, Kind, Module, NodeId, Operand, Result, WeightId};

use super::driver::DeviceInfo;
use super::products::{Call, Takes};
use super::range::Range;
use crate::places::{Piece, Regions, forged};

/// Memory that launches may name.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Addresses {
    /// Values, weights and states.
    pub regions: Regions<Range>,
    /// Scratch memory.
    pub workspace: Range,
    /// Counters.
    pub counters: Range,
    /// What comes through the ring.
    pub ring: Ring,
}

/// Weights that come in parts. The range of such a weight among the regions is that of its resident slices.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Ring {
    /// Copies of a step, in the order of their uses.
    pub copies: Vec<Tile>,
    /// By weight: its resident slices, and its slices; for weights with copies.
    pub parts: BTreeMap<WeightId, (u64, u64)>,
}

/// A copy's content.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tile {
    /// Position in the execution order of the node that reads it.
    pub node: usize,
    /// The weight.
    pub weight: WeightId,
    /// First slice.
    pub first: u64,
    /// Slices.
    pub count: u64,
    /// Where it is when it is read.
    pub range: Range,
}

/// What a launch may ask for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Compute capability of the device.
    pub capability: u32,
    /// Most bytes of shared memory of a block.
    pub max_shared: u32,
}

impl Limits {
    /// Those of a device.
    pub fn of(device: &DeviceInfo) -> Limits {
        Limits { capability: device.capability, max_shared: device.max_shared }
    }
}

/// A step with numbers for dims and operands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Resolved {
    /// What happens, in order.
    pub actions: Vec<Action>,
    /// For each step of the table its nodes, as positions in the execution order, and its actions.
    pub steps: Vec<(Span<usize>, Span<usize>)>,
}

/// One entry of a stream.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Action {
    /// A launch.
    Launch(Resolution),
    /// A product of a library.
    Product(Call),
    /// What follows reads this copy of the ring.
    Arrive(usize),
    /// Nothing that follows reads this copy in this step.
    Leave(usize),
    /// A copy on the device.
    Copy {
        /// Source.
        from: Range,
        /// Target, of the same length.
        to: Range,
    },
}

/// One launch.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Resolution {
    pub kernel: usize,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: u32,
    pub shared: u32,
    pub dependent: bool,
    pub params: Params,
}

/// Values of parameters, laid out as a kernel receives them.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Params {
    /// Bytes; those of tensor maps are zero until they are encoded.
    pub bytes: Vec<u8>,
    /// Offset and size of each parameter.
    pub places: Vec<(usize, usize)>,
    /// Tensor maps with the offsets of their parameters.
    pub maps: Vec<(usize, Map)>,
}

/// A tensor map with numbers. Axes are innermost first.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Map {
    pub base: u64,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
    pub tile: Vec<u32>,
    pub swizzle: u32,
}

/// Bytes and alignment of a tensor map.
const MAP_BYTES: usize = 128;
const MAP_ALIGN: usize = 64;

impl Params {
    /// Adds a parameter that is aligned to its size.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.resize(self.bytes.len().next_multiple_of(bytes.len().max(1)), 0);
        self.places.push((self.bytes.len(), bytes.len()));
        self.bytes.extend(bytes);
    }

    fn push_map(&mut self, map: Map) {
        self.bytes.resize(self.bytes.len().next_multiple_of(MAP_ALIGN), 0);
        self.places.push((self.bytes.len(), MAP_BYTES));
        self.maps.push((self.bytes.len(), map));
        self.bytes.resize(self.bytes.len() + MAP_BYTES, 0);
    }
}

/// Checks once what does not depend on bindings: the steps cover the graph.
pub(super) fn check_table(module: &Module, table: &LaunchTable) -> Result<()> {
    let nodes: usize = table.steps.iter().map(|s| s.nodes).sum();
    if nodes == module.graph.order.len() {
        return Ok(());
    }
    let message =
        format!("the launch table covers {nodes} nodes, the graph has {}", module.graph.order.len());
    Err(forged(message))
}

/// What is launched at `bindings`. Where a variant names a library and `library` takes all its products, they run in place
/// of its launches.
pub(super) fn resolve(
    module: &Module,
    table: &LaunchTable,
    addresses: &Addresses,
    bindings: &Bindings,
    limits: Limits,
    library: Option<&dyn Takes>,
) -> Result<Resolved> {
    let (regions, ring) = (&addresses.regions, &addresses.ring);
    let mut values = regions.input_values(module);
    let mut actions = Vec::new();
    let mut copies = 0;
    let mut steps = Vec::with_capacity(table.steps.len());
    for step in &table.steps {
        let nodes = step.first..step.first + step.nodes;
        let ids = module.graph.order.get(nodes.clone()).ok_or_else(|| forged("a step has no nodes"))?;
        let Some(first) = ids.first() else { return Err(forged("a step has no nodes")) };
        let mut memory = Vec::with_capacity(ids.len());
        for id in ids {
            memory.push(regions.place_node(module, bindings, *id, &mut values)?);
        }
        check_group(&memory).map_err(|e| e.at(first))?;
        let until = copies + ring.copies[copies..].iter().take_while(|c| c.node < nodes.end).count();
        let variant = if copies == until { step.variant(bindings) } else { step.streamed_variant(bindings) };
        let variant = variant.ok_or_else(|| forged("no variant fits").at(first))?;
        let begin = actions.len();
        let scope = Scope { addresses, values: &values, bindings, limits, tile: None };
        if copies == until {
            let by_library = variant.library.as_ref().zip(library);
            let taken = by_library.map(|(run, library)| scope.by_library(table, run, library)).transpose();
            match taken.map_err(|e| e.at(first))?.flatten() {
                Some(all) => actions.extend(all),
                None => {
                    let launched = scope.launches(table, &variant.launches);
                    actions.extend(launched.map_err(|e| e.at(first))?);
                }
            }
        } else {
            scope.tiled(table, &variant.launches, copies..until, &mut actions).map_err(|e| e.at(first))?;
        }
        copies = until;
        if variant.launches.is_empty() {
            views(module, step, ids, &memory, &mut actions)?;
        }
        steps.push((nodes, begin..actions.len()));
    }
    for (from, to) in regions.late_outputs(module, &values)? {
        if from.len != to.len || from.overlaps(to) {
            return Err(forged("an output is copied onto itself or to another size"));
        }
        actions.push(Action::Copy { from, to });
    }
    Ok(Resolved { actions, steps })
}

/// What the first step of a table launches, apart from any module: `values` are where its launches find values. What it
/// names a library for runs by `library` or not at all.
///
/// # Errors
/// `cuda/library` for products that the library does not take.
pub(super) fn resolve_step(
    table: &LaunchTable,
    addresses: &Addresses,
    values: &[Option<Range>],
    bindings: &Bindings,
    limits: Limits,
    library: &dyn Takes,
) -> Result<Vec<Action>> {
    let step = table.steps.first().ok_or_else(|| forged("a table has no steps"))?;
    let variant = step.variant(bindings).ok_or_else(|| forged("no variant fits"))?;
    let scope = Scope { addresses, values, bindings, limits, tile: None };
    let Some(run) = &variant.library else { return scope.launches(table, &variant.launches) };
    scope.by_library(table, run, library)?.ok_or_else(|| {
        Error::new(Kind::Unsupported, "cuda/library", "the library does not compute this product")
    })
}

/// Inside a group nobody knows which node runs when: ranges are the same or disjoint. Ranges that begin together are
/// allowed too, since a view of an empty or joined tensor may differ in length.
fn check_group(memory: &[(Vec<Range>, Vec<Range>)]) -> Result<()> {
    if memory.len() < 2 {
        return Ok(());
    }
    let reads = || memory.iter().flat_map(|(operands, _)| operands);
    for result in memory.iter().flat_map(|(_, results)| results) {
        if reads().any(|read| read.overlaps(*result) && read.base != result.base) {
            return Err(forged("memory overlaps inside a launch group"));
        }
    }
    Ok(())
}

/// Nodes without a launch only rename memory; where the plan did not let them share it, the bytes are copied.
fn views(
    module: &Module,
    step: &LaunchStep,
    ids: &[NodeId],
    memory: &[(Vec<Range>, Vec<Range>)],
    actions: &mut Vec<Action>,
) -> Result<()> {
    // A variant without launches among others with launches is for shapes without elements.
    for (id, (operands, results)) in ids.iter().zip(memory) {
        let node = &module.graph.nodes[*id];
        let view = node.op.traits().view;
        match (operands.first(), results.as_slice()) {
            (Some(from), [to]) if view && from.len == to.len => {
                if from.base != to.base && to.len > 0 {
                    actions.push(Action::Copy { from: *from, to: *to });
                }
            }
            _ if step.variants.len() > 1 && results.iter().all(|r| r.len == 0) => {}
            _ => return Err(forged("a node that computes has no launch").at(id)),
        }
    }
    Ok(())
}

/// What arguments are resolved with.
struct Scope<'a> {
    addresses: &'a Addresses,
    values: &'a [Option<Range>],
    bindings: &'a Bindings,
    limits: Limits,
    /// The part of a weight that launches read, and where it is.
    tile: Option<(WeightId, Range)>,
}

/// Whether a launch reads `weight`.
pub(crate) fn reads(launch: &Launch, weight: WeightId) -> bool {
    let wanted = Operand::Weight(weight);
    launch.args.iter().any(|arg| match arg {
        Arg::Address(operand) => *operand == wanted,
        Arg::Map(map) => matches!(&map.of, MapBase::Address(operand) if *operand == wanted),
        Arg::Workspace(_) | Arg::Counters(_) | Arg::I32(_) | Arg::F32(_) => false,
    })
}

/// Limits of the hardware (CUDA C++ programming guide, technical specifications).
const MAX_GRID: [u64; 3] = [(1 << 31) - 1, 65535, 65535];
const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
const MAX_THREADS: u32 = 1024;
const MAX_CLUSTER: u32 = 16;

impl Scope<'_> {
    /// The launches of a step whose weight comes in the parts `copies` besides what is resident: those that read it once for
    /// each part.
    fn tiled(
        &self,
        table: &LaunchTable,
        launches: &[Launch],
        copies: Span<usize>,
        actions: &mut Vec<Action>,
    ) -> Result<()> {
        let ring = &self.addresses.ring;
        let weight = ring.copies[copies.start].weight;
        let (resident, slices) = ring.parts.get(&weight).copied().unwrap_or_default();
        if ring.copies[copies.clone()].iter().any(|c| c.weight != weight) {
            return Err(forged("a step reads two weights in parts"));
        }
        let first = launches.iter().position(|l| reads(l, weight)).unwrap_or(launches.len());
        let last = launches.iter().rposition(|l| reads(l, weight)).map_or(first, |at| at + 1);
        let part = |first_slice: u64, count: u64, range: Range, actions: &mut Vec<Action>| -> Result<()> {
            let whole = first_slice == 0 && count == slices;
            for launch in &launches[first..last] {
                let bindings = match launch.tiles.filter(|t| t.weight == weight) {
                    // Beside variants that do not know tiles, a weight comes as one slice.
                    Some(t) if whole && slices == 1 => Tiles::bind(self.bindings, 0, t.slices),
                    Some(t) if t.slices == slices && first_slice.is_multiple_of(t.granule) => {
                        Tiles::bind(self.bindings, first_slice, count)
                    }
                    None if whole && launch.tiles.is_none() => self.bindings.clone(),
                    _ => return Err(forged("a launch cannot read its weight in parts")),
                };
                if !reads(launch, weight) {
                    return Err(forged("a launch cannot read its weight in parts"));
                }
                let scope = Scope { bindings: &bindings, tile: Some((weight, range)), ..*self };
                actions.extend(scope.launch(table, launch)?.map(Action::Launch));
            }
            Ok(())
        };
        actions.extend(self.launches(table, &launches[..first])?);
        if resident > 0 {
            let range = self.operand(Operand::Weight(weight))?;
            part(0, resident, range, actions)?;
        }
        for index in copies {
            let Tile { first, count, range, .. } = ring.copies[index];
            actions.push(Action::Arrive(index));
            part(first, count, range, actions)?;
            actions.push(Action::Leave(index));
        }
        actions.extend(self.launches(table, &launches[last..])?);
        Ok(())
    }

    /// The launches that have blocks.
    fn launches(&self, table: &LaunchTable, launches: &[Launch]) -> Result<Vec<Action>> {
        let mut actions = Vec::with_capacity(launches.len());
        for launch in launches {
            actions.extend(self.launch(table, launch)?.map(Action::Launch));
        }
        Ok(actions)
    }

    /// The launch, unless its grid has no block.
    fn launch(&self, table: &LaunchTable, launch: &Launch) -> Result<Option<Resolution>> {
        let kernel = table.kernels.get(launch.kernel).ok_or_else(|| forged("a launch names no kernel"))?;
        if let (Some(tiles), None) = (launch.tiles, self.tile) {
            let bindings = Tiles::bind(self.bindings, 0, tiles.slices);
            let range = self.operand(Operand::Weight(tiles.weight))?;
            let whole = Scope { bindings: &bindings, tile: Some((tiles.weight, range)), ..*self };
            return whole.launch(table, launch);
        }
        let mut grid = [0u32; 3];
        for ((out, dim), most) in grid.iter_mut().zip(&launch.grid).zip(MAX_GRID) {
            let blocks = self.extent(dim)?;
            if blocks > most {
                return Err(forged(format!("a grid of {blocks} blocks exceeds {most}")).at(&kernel.family));
            }
            *out = blocks as u32;
        }
        if grid.contains(&0) {
            return Ok(None);
        }
        let legal = launch.block.iter().zip(MAX_BLOCK).all(|(n, most)| (1..=most).contains(n));
        if !legal || launch.block.iter().product::<u32>() > MAX_THREADS {
            return Err(
                forged(format!("a block of {:?} threads is illegal", launch.block)).at(&kernel.family)
            );
        }
        let cluster = launch.cluster;
        let clusters =
            cluster == 1 || (self.limits.capability >= 90 && grid[0].is_multiple_of(cluster.max(1)));
        if !(1..=MAX_CLUSTER).contains(&cluster) || !clusters {
            return Err(forged(format!("clusters of {cluster} blocks are illegal here")).at(&kernel.family));
        }
        if launch.shared.checked_add(kernel.shared).is_none_or(|n| n > self.limits.max_shared) {
            let message = format!("a block asks for {} bytes of shared memory", launch.shared);
            return Err(forged(message).at(&kernel.family));
        }
        let mut params = Params::default();
        for arg in &launch.args {
            self.arg(arg, &mut params).map_err(|e| e.at(&kernel.family))?;
        }
        let dependent = launch.dependent && self.limits.capability >= 90;
        let Launch { kernel, block, shared, .. } = *launch;
        Ok(Some(Resolution { kernel, grid, block, cluster, shared, dependent, params }))
    }

    fn arg(&self, arg: &Arg, params: &mut Params) -> Result<()> {
        match arg {
            Arg::Address(operand) => params.push(&self.operand(*operand)?.base.to_ne_bytes()),
            Arg::Workspace(offset) => params.push(&self.workspace(offset)?.base.to_ne_bytes()),
            Arg::Counters(offset) => {
                let counters = self.addresses.counters;
                let left = counters.len.checked_sub(*offset).filter(|n| *n >= 4);
                let at = left.and_then(|n| counters.part(*offset, n));
                params.push(&at.ok_or_else(|| forged("a counter lies outside"))?.base.to_ne_bytes());
            }
            Arg::I32(dim) => {
                let value = dim.eval(self.bindings).and_then(|v| i32::try_from(v).ok());
                let value = value.ok_or_else(|| forged(format!("{dim} is no 32-bit integer here")))?;
                params.push(&value.to_ne_bytes());
            }
            Arg::F32(value) => params.push(&value.to_ne_bytes()),
            Arg::Map(map) => params.push_map(self.map(map)?),
        }
        Ok(())
    }

    fn extent(&self, dim: &Dim) -> Result<u64> {
        dim.extent(self.bindings).ok_or_else(|| forged(format!("{dim} has no value here")))
    }

    fn operand(&self, operand: Operand) -> Result<Range> {
        if let (Operand::Weight(id), Some((weight, range))) = (operand, self.tile)
            && id == weight
        {
            return Ok(range);
        }
        let found = self.addresses.regions.operand(operand, self.values);
        found.ok_or_else(|| match operand {
            Operand::Value(id) => forged(format!("argument {id} has no memory")),
            Operand::Weight(id) => forged(format!("argument {id} has no memory")),
            Operand::State(id) => forged(format!("argument {id} has no memory")),
        })
    }

    fn workspace(&self, offset: &Dim) -> Result<Range> {
        let (at, all) = (self.extent(offset)?, self.addresses.workspace);
        let rest = all.len.checked_sub(at).and_then(|left| all.part(at, left));
        rest.ok_or_else(|| forged("scratch memory is too small"))
    }

    fn map(&self, map: &TensorMap) -> Result<Map> {
        let TensorMap { of, dtype, shape, strides, tile, swizzle } = map;
        let memory = match of {
            MapBase::Address(operand) => self.operand(*operand)?,
            MapBase::Workspace(offset) => self.workspace(offset)?,
        };
        let numbers = |dims: &[Dim]| dims.iter().map(|d| self.extent(d)).collect::<Result<Vec<u64>>>();
        let resolved = Map {
            base: memory.base,
            dtype: *dtype,
            shape: numbers(shape)?,
            strides: numbers(strides)?,
            tile: tile.clone(),
            swizzle: *swizzle,
        };
        match resolved.fault(memory.len) {
            Some(fault) => Err(forged(format!("a tensor map {fault}"))),
            None => Ok(resolved),
        }
    }
}

impl Map {
    /// What the tensor memory unit would not take, or what would leave the `len` bytes of memory.
    fn fault(&self, len: u64) -> Option<&'static str> {
        let Map { base, dtype, shape, strides, tile, swizzle } = self;
        let rank = shape.len();
        if !(1..=5).contains(&rank) || strides.len() + 1 != rank || tile.len() != rank {
            return Some("has extents, strides and tile that do not belong together");
        }
        let Some(element) = dtype.size_bytes().map(|n| n as u64) else {
            return Some("has elements that share bytes");
        };
        if base % 16 != 0 || strides.iter().any(|s| s % 16 != 0 || *s >= 1 << 40) {
            return Some("is not aligned to 16 bytes");
        }
        if shape.iter().any(|n| !(1..=1 << 32).contains(n)) || tile.iter().any(|n| !(1..=256).contains(n)) {
            return Some("has an extent out of range");
        }
        let row = u64::from(tile[0]) * element;
        if !matches!(swizzle, 0 | 32 | 64 | 128)
            || row % 16 != 0
            || (*swizzle > 0 && row > u64::from(*swizzle))
        {
            return Some("has a tile that its swizzle does not take");
        }
        let reach = shape[1..].iter().zip(strides).try_fold(shape[0].checked_mul(element)?, |end, (n, s)| {
            (n - 1).checked_mul(*s).and_then(|bytes| end.checked_add(bytes))
        });
        if reach.is_none_or(|end| end > len) {
            return Some("leaves its memory");
        }
        None
    }
}

/// Compares a launch with what the driver says of the kernel: the size of each parameter. It may say nothing.
pub(super) fn check_params(params: &Params, expected: Option<&[usize]>, entry: &str) -> Result<()> {
    let sizes: Vec<usize> = params.places.iter().map(|(_, size)| *size).collect();
    match expected {
        Some(expected) if expected != sizes => {
            let message =
                format!("a launch passes parameters of {sizes:?} bytes, the kernel takes {expected:?}");
            Err(Error::new(Kind::BadInput, "cuda/arguments", message)
                .at(entry)
                .hint("build the engine again"))
        }
        _ => Ok(()),
    }
}

/// Bytes of scratch memory at `bindings`.
pub(super) fn workspace_bytes(table: &LaunchTable, bindings: &Bindings) -> Result<u64> {
    table.workspace.extent(bindings).ok_or_else(|| forged("scratch memory has no size"))
}

/// Values in one block, each aligned to 256 bytes: the offset of each, and the bytes of all.
pub(super) fn pack(sizes: &[u64]) -> Option<(Vec<u64>, u64)> {
    let mut end = 0u64;
    let mut offsets = Vec::with_capacity(sizes.len());
    for size in sizes {
        let start = end.checked_next_multiple_of(ALIGN)?;
        offsets.push(start);
        end = start.checked_add(*size)?;
    }
    Some((offsets, end.checked_next_multiple_of(ALIGN)?))
}

/// Alignment of inputs and weights in their blocks, that of allocations.
pub(super) const ALIGN: u64 = 256;

/// The parts of `block` at `offsets` with `sizes`.
pub(super) fn parts(block: Range, offsets: &[u64], sizes: &[u64]) -> Option<Vec<Range>> {
    offsets.iter().zip(sizes).map(|(at, len)| block.part(*at, *len)).collect()
}

#[cfg(test)]
#[path = "resolve_tests.rs"]
mod tests;
