//! Launch tables: how the nodes of a lowered graph run on a device with kernels of its own.
//!
//! One table serves one architecture. It lists the kernels of its device code, and for each *step* (a run of nodes in
//! execution order) the *variants* of which the first whose conditions hold at the bindings of a call is launched. Grids
//! and integer arguments are dims, so one table serves every shape. A table and its device images travel as one
//! section of the engine; [`Bundle::encode`] and [`Bundle::decode`] are its bytes.
//!
//! This module must not know what kernels compute; it is the contract between code generation and a runtime.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::dim::{Bindings, Dim, Sym};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result};
use crate::graph::{Operand, WeightId};
use text::{dim_list_text, dim_text, dims_text, dtype_text, operand_text, weight_text};

mod products;
mod text;

pub use products::{ByLibrary, LIBRARY_WORKSPACE, MOST_SUGGESTIONS, Product};

/// How one architecture runs a graph.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchTable {
    /// The architecture, such as `sm_90a`.
    pub arch: String,
    /// Kernels in order of first use.
    pub kernels: Vec<DeviceKernel>,
    /// Steps; together they cover every node of the execution order once, in order.
    pub steps: Vec<LaunchStep>,
    /// Bytes of scratch memory that any one step may use.
    #[serde(with = "dim_text")]
    pub workspace: Dim,
    /// Bytes of counters: zero at load, and left zero by every step.
    pub counters: u64,
    /// Bytes of scratch memory for products of a library, of a block of their own; 0 where no variant names one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub library_workspace: u64,
    /// Kernels that are not part of the graph, such as `argmax_split`; their arguments are fixed by name.
    pub helpers: Vec<Helper>,
}

/// A kernel of a table and what the compiler found out about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceKernel {
    /// Entry point in the image.
    pub entry: String,
    /// Family, such as `cuda.matmul.skinny`.
    pub family: String,
    /// Hash of source and options, 64 hexadecimal digits.
    pub source: String,
    /// Index of the device image.
    pub image: usize,
    /// Registers per thread; 0 if unknown.
    pub registers: u32,
    /// Bytes of shared memory fixed at build.
    pub shared: u32,
    /// Bytes of local memory per thread: stack and spills.
    pub local: u32,
}

/// Nodes that run together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchStep {
    /// Position of the first node in the execution order.
    pub first: usize,
    /// Number of nodes.
    pub nodes: usize,
    /// Ways to run them; the last has no condition.
    pub variants: Vec<Variant>,
    /// Ways to run them when a weight of theirs comes in parts, with the same results bit by bit; none where `variants`
    /// serve that too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streamed: Vec<Variant>,
}

/// One way to run a step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// All of these hold.
    pub when: Vec<Condition>,
    /// Launches in order; none for nodes that only rename memory.
    pub launches: Vec<Launch>,
    /// What may run in their place where the device has a library of matrix products.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<ByLibrary>,
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// `min <= dim <= max`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Condition {
    /// What is compared.
    #[serde(with = "dim_text")]
    pub dim: Dim,
    /// Smallest value.
    pub min: u64,
    /// Largest value.
    pub max: u64,
}

/// One launch of a kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Index into [`LaunchTable::kernels`].
    pub kernel: usize,
    /// Blocks along x, y and z; a launch with a zero among them does not happen.
    #[serde(with = "dims_text")]
    pub grid: [Dim; 3],
    /// Threads along x, y and z.
    pub block: [u32; 3],
    /// Blocks of a cluster along x; 1 for none.
    pub cluster: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// Whether the kernel waits for its predecessor by itself, so that it may start early.
    pub dependent: bool,
    /// Set if the launch may read a weight in parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiles: Option<Tiles>,
    /// Arguments in order.
    pub args: Vec<Arg>,
}

/// How a launch reads a weight in parts. It computes what the slices `$tile_first ..+ $tile_count` along the weight's
/// axis 0 contribute, so that launches over all tiles, in any order, do the work of one launch over all slices, bit by
/// bit. Grid and arguments of the launch are dims of [`tile_first`] and [`tile_count`] too, and the address of the weight
/// is that of slice `$tile_first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tiles {
    /// The weight.
    #[serde(with = "weight_text")]
    pub weight: WeightId,
    /// Its extent along axis 0.
    pub slices: u64,
    /// Tiles begin at multiples of this many slices.
    pub granule: u64,
}

impl Tiles {
    /// `bindings` with the tile of `count` slices from `first` on.
    pub fn bind(bindings: &Bindings, first: u64, count: u64) -> Bindings {
        let mut bound = bindings.clone();
        bound.set(tile_first(), first);
        bound.set(tile_count(), count);
        bound
    }
}

/// The symbol of the first slice of a tile; see [`Tiles`]. No dim of a module has its name.
pub fn tile_first() -> Sym {
    Sym::reserved("tile_first")
}

/// The symbol of the number of slices of a tile; see [`Tiles`]. No dim of a module has its name.
pub fn tile_count() -> Sym {
    Sym::reserved("tile_count")
}

/// One argument of a launch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Arg {
    /// Address of a value, weight or state.
    Address(#[serde(with = "operand_text")] Operand),
    /// Address of scratch memory at a byte offset.
    Workspace(#[serde(with = "dim_text")] Dim),
    /// Address of counters at a byte offset.
    Counters(u64),
    /// A 32-bit integer.
    I32(#[serde(with = "dim_text")] Dim),
    /// A 32-bit float.
    F32(f32),
    /// A descriptor of the tensor memory unit, 128 bytes.
    Map(TensorMap),
}

/// What a descriptor of the tensor memory unit says. Axes are innermost first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorMap {
    /// Memory it describes.
    pub of: MapBase,
    /// Element type.
    #[serde(with = "dtype_text")]
    pub dtype: DType,
    /// Extents.
    #[serde(with = "dim_list_text")]
    pub shape: Vec<Dim>,
    /// Bytes between neighbours along each axis but the first.
    #[serde(with = "dim_list_text")]
    pub strides: Vec<Dim>,
    /// Extents of the tile that one copy moves.
    pub tile: Vec<u32>,
    /// Bytes of the shared memory swizzle: 0, 32, 64 or 128.
    pub swizzle: u32,
}

/// Memory of a [`TensorMap`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MapBase {
    /// A value, weight or state.
    Address(#[serde(with = "operand_text")] Operand),
    /// Scratch memory at a byte offset.
    Workspace(#[serde(with = "dim_text")] Dim),
}

/// A kernel that is not part of the graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Helper {
    /// What it does: `argmax_split` takes `(const float *rows, int *out, int width, u64 *best, u32 *arrived)` on a grid of
    /// (parts, rows): 8 bytes of scratch a block and 4 bytes a row, zero before and after.
    pub name: String,
    /// Index into [`LaunchTable::kernels`].
    pub kernel: usize,
    /// Threads of a block.
    pub threads: u32,
}

impl LaunchStep {
    /// The ways to run the step when a weight of it comes in parts.
    pub fn streamed(&self) -> &[Variant] {
        if self.streamed.is_empty() { &self.variants } else { &self.streamed }
    }

    /// The variant of [`LaunchStep::streamed`] that serves `bindings`.
    pub fn streamed_variant(&self, bindings: &Bindings) -> Option<&Variant> {
        self.streamed().iter().find(|v| v.when.iter().all(|c| c.holds(bindings)))
    }

    /// All launches of all variants, those in front of products of a library included.
    pub fn all_launches(&self) -> impl Iterator<Item = &Launch> {
        self.all_variants().flat_map(Variant::all_launches)
    }

    /// All variants, in whatever way weights come.
    pub fn all_variants(&self) -> impl Iterator<Item = &Variant> {
        self.variants.iter().chain(&self.streamed)
    }

    /// The variant that serves `bindings`.
    pub fn variant(&self, bindings: &Bindings) -> Option<&Variant> {
        self.variants.iter().find(|v| v.when.iter().all(|c| c.holds(bindings)))
    }
}

impl Variant {
    /// All launches, those in front of products of a library included.
    pub fn all_launches(&self) -> impl Iterator<Item = &Launch> {
        self.launches.iter().chain(self.library.iter().flat_map(|l| &l.before))
    }
}

/// A launch at some bindings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaunchAt<'a> {
    /// Index of the step.
    pub step: usize,
    /// What is launched.
    pub launch: &'a Launch,
    /// Blocks along x, y and z, each at least 1.
    pub grid: [u64; 3],
    /// Whether a library runs the step instead, where the device has it.
    pub library: bool,
}

impl LaunchTable {
    /// What a call at `bindings` launches, in order; `None` where a grid has no value there.
    pub fn launches_at(&self, bindings: &Bindings) -> Option<Vec<LaunchAt<'_>>> {
        let mut launches = Vec::new();
        for (at, step) in self.steps.iter().enumerate() {
            let variant = step.variant(bindings)?;
            for launch in &variant.launches {
                let grid = launch.grid_at(&launch.whole(bindings))?;
                if !grid.contains(&0) {
                    launches.push(LaunchAt { step: at, launch, grid, library: variant.library.is_some() });
                }
            }
        }
        Some(launches)
    }
}

impl Launch {
    /// `bindings` with the tile that is the whole weight, if the launch knows tiles.
    pub fn whole<'a>(&self, bindings: &'a Bindings) -> Cow<'a, Bindings> {
        match self.tiles {
            Some(tiles) => Cow::Owned(Tiles::bind(bindings, 0, tiles.slices)),
            None => Cow::Borrowed(bindings),
        }
    }

    /// Blocks along x, y and z, if they have a value at `bindings`.
    pub fn grid_at(&self, bindings: &Bindings) -> Option<[u64; 3]> {
        let [x, y, z] = &self.grid;
        Some([x.extent(bindings)?, y.extent(bindings)?, z.extent(bindings)?])
    }
}

/// Whether a dim depends on the tile of a launch.
fn of_tile(dim: &Dim) -> bool {
    dim.symbols().iter().any(|s| [tile_first(), tile_count()].contains(s))
}

impl Launch {
    /// Blocks along x, y and z of a launch over the whole weight, if the launch knows tiles.
    pub fn whole_grid(&self) -> [Dim; 3] {
        let Some(tiles) = self.tiles else { return self.grid.clone() };
        let whole = [(tile_first(), Dim::from(0u64)), (tile_count(), Dim::from(tiles.slices))];
        self.grid.each_ref().map(|dim| dim.substitute(&whole))
    }

    /// Bounds of tiles mean something only where there are tiles, of a weight that is an argument.
    fn check_tiles(&self) -> Result<()> {
        let of = |base: &MapBase| match base {
            MapBase::Address(operand) => Some(*operand),
            MapBase::Workspace(_) => None,
        };
        let Some(tiles) = self.tiles else {
            let named = |arg: &Arg| match arg {
                Arg::Workspace(dim) | Arg::I32(dim) => of_tile(dim),
                Arg::Map(map) => {
                    let offset = if let MapBase::Workspace(dim) = &map.of { Some(dim) } else { None };
                    map.shape.iter().chain(&map.strides).chain(offset).any(of_tile)
                }
                Arg::Address(_) | Arg::Counters(_) | Arg::F32(_) => false,
            };
            return match self.grid.iter().any(of_tile) || self.args.iter().any(named) {
                true => Err(bad("a launch without tiles names their bounds")),
                false => Ok(()),
            };
        };
        if tiles.granule == 0 || tiles.slices == 0 {
            return Err(bad("a weight that is read in parts has none"));
        }
        let operand = |arg: &Arg| match arg {
            Arg::Address(operand) => Some(*operand),
            Arg::Map(map) => of(&map.of),
            _ => None,
        };
        if !self.args.iter().any(|a| operand(a) == Some(Operand::Weight(tiles.weight))) {
            return Err(bad("a launch has no weight that it reads in parts"));
        }
        Ok(())
    }
}

impl Condition {
    /// Whether it holds.
    pub fn holds(&self, bindings: &Bindings) -> bool {
        self.dim.extent(bindings).is_some_and(|v| (self.min..=self.max).contains(&v))
    }
}

/// A table with the device images its kernels are in.
#[derive(Clone, Debug, PartialEq)]
pub struct Bundle {
    /// The table.
    pub table: LaunchTable,
    /// Device images, each a cubin or PTX text.
    pub images: Vec<Vec<u8>>,
}

/// Alignment of images in an encoded bundle.
const ALIGN: usize = 64;

/// Most images of a bundle.
const MAX_IMAGES: usize = 4096;

fn bad(message: impl Into<String>) -> Error {
    Error::new(Kind::BadInput, "engine/launch-table", message)
        .hint("the engine was altered or is of another version: build it again")
}

impl Bundle {
    /// `u64` length of the table, `u64` number of images, `u64` length of each image, then table and images, each
    /// padded with zeros to 64 bytes; numbers little-endian.
    pub fn encode(&self) -> Vec<u8> {
        // A struct of plain fields has no reason to fail.
        let table = serde_json::to_vec(&self.table).unwrap_or_default();
        let mut out = Vec::new();
        let lengths = [table.len(), self.images.len()].into_iter().chain(self.images.iter().map(Vec::len));
        lengths.for_each(|n| out.extend((n as u64).to_le_bytes()));
        for part in std::iter::once(&table).chain(&self.images) {
            out.resize(out.len().next_multiple_of(ALIGN), 0);
            out.extend(part);
        }
        out
    }

    /// Reads what [`Bundle::encode`] wrote and checks every index of the table that concerns table and images alone.
    ///
    /// # Errors
    /// `engine/launch-table`.
    pub fn decode(bytes: &[u8]) -> Result<Bundle> {
        let number = |index: usize| -> Result<usize> {
            let at = index.checked_mul(8).ok_or_else(|| bad("the bundle is too large"))?;
            let field = bytes.get(at..at.saturating_add(8)).and_then(|b| b.first_chunk::<8>());
            let value =
                field.map(|b| u64::from_le_bytes(*b)).ok_or_else(|| bad("the bundle is cut short"))?;
            usize::try_from(value).map_err(|_| bad("a length of the bundle is too large"))
        };
        let (table_len, count) = (number(0)?, number(1)?);
        if count > MAX_IMAGES {
            return Err(bad(format!("{count} device images are too many")));
        }
        let mut at = (2 + count) * 8;
        let mut part = |len: usize| -> Result<&[u8]> {
            let start = at.next_multiple_of(ALIGN);
            let end = start.checked_add(len).ok_or_else(|| bad("a length of the bundle is too large"))?;
            at = end;
            bytes.get(start..end).ok_or_else(|| bad("the bundle is cut short"))
        };
        let table: LaunchTable = serde_json::from_slice(part(table_len)?)
            .map_err(|e| bad(format!("the launch table is malformed: {e}")))?;
        let images =
            (0..count).map(|i| part(number(2 + i)?).map(<[u8]>::to_vec)).collect::<Result<Vec<_>>>()?;
        let bundle = Bundle { table, images };
        bundle.check()?;
        Ok(bundle)
    }

    fn check(&self) -> Result<()> {
        let table = &self.table;
        if table.kernels.iter().any(|k| k.image >= self.images.len()) {
            return Err(bad("a kernel names an image that is not there"));
        }
        let variants = || table.steps.iter().flat_map(LaunchStep::all_variants);
        let launches = || variants().flat_map(Variant::all_launches);
        let kernels = launches().map(|l| l.kernel).chain(table.helpers.iter().map(|h| h.kernel));
        launches().try_for_each(Launch::check_tiles)?;
        table.check_library()?;
        let conditions = variants().flat_map(|v| &v.when).map(|c| &c.dim);
        if conditions.chain([&table.workspace]).any(of_tile) {
            return Err(bad("what does not depend on tiles of a weight names them"));
        }
        if kernels.into_iter().any(|k| k >= table.kernels.len()) {
            return Err(bad("a launch names a kernel that is not there"));
        }
        let mut next = 0;
        for step in &table.steps {
            if step.first != next || step.nodes == 0 {
                return Err(bad("the steps do not cover the graph in order"));
            }
            next = next.checked_add(step.nodes).ok_or_else(|| bad("a step is too long"))?;
            let open = |variants: &[Variant]| variants.last().is_none_or(|v| !v.when.is_empty());
            if open(&step.variants) || open(step.streamed()) {
                return Err(bad(format!("the step of node {} has no variant for every shape", step.first)));
            }
        }
        Ok(())
    }

    /// Number of nodes that the steps cover.
    pub fn nodes(&self) -> usize {
        self.table.steps.iter().map(|s| s.nodes).sum()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::arena::Id;
    use crate::graph::{StateId, ValueId};

    pub(super) fn bundle() -> Bundle {
        let t = Dim::from(Sym::new("t").unwrap());
        let launch = Launch {
            kernel: 0,
            grid: [t.ceil_div(4), Dim::from(2u64), Dim::from(1u64)],
            block: [128, 1, 1],
            cluster: 1,
            shared: 1024,
            dependent: true,
            tiles: Some(Tiles { weight: WeightId::from_index(3), slices: 8, granule: 2 }),
            args: vec![
                Arg::Address(Operand::Value(ValueId::from_index(7))),
                Arg::Address(Operand::Weight(WeightId::from_index(3))),
                Arg::Workspace(t.mul(&Dim::from(8u64))),
                Arg::I32(t.clone()),
                Arg::F32(1e-5),
                Arg::Map(TensorMap {
                    of: MapBase::Address(Operand::State(StateId::from_index(1))),
                    dtype: DType::BF16,
                    shape: vec![Dim::from(64u64), t.clone()],
                    strides: vec![Dim::from(128u64)],
                    tile: vec![64, 128],
                    swizzle: 128,
                }),
            ],
        };
        let small = Variant {
            when: vec![Condition { dim: t, min: 0, max: 64 }],
            launches: vec![launch],
            library: None,
        };
        let kernel = DeviceKernel {
            entry: "k".into(),
            family: "cuda.test".into(),
            source: "0".repeat(64),
            image: 1,
            registers: 32,
            shared: 0,
            local: 0,
        };
        let rest = Variant { when: Vec::new(), launches: Vec::new(), library: None };
        let table = LaunchTable {
            arch: "sm_90a".into(),
            kernels: vec![kernel],
            steps: vec![LaunchStep { first: 0, nodes: 2, variants: vec![small, rest], streamed: Vec::new() }],
            workspace: Dim::from(4096u64),
            counters: 16,
            library_workspace: 0,
            helpers: vec![Helper { name: "argmax_split".into(), kernel: 0, threads: 256 }],
        };
        Bundle { table, images: vec![vec![1; 70], vec![2; 3]] }
    }

    #[test]
    fn a_bundle_survives_its_bytes() {
        let bundle = bundle();
        assert_eq!(Bundle::decode(&bundle.encode()).unwrap(), bundle);
    }

    #[test]
    fn conditions_choose_the_variant() {
        let step = &bundle().table.steps[0];
        let mut bindings = Bindings::new();
        let launches = |bindings: &Bindings| step.variant(bindings).unwrap().launches.len();
        bindings.set(Sym::new("t").unwrap(), 64);
        assert_eq!(launches(&bindings), 1);
        bindings.set(Sym::new("t").unwrap(), 65);
        assert_eq!(launches(&bindings), 0);
    }

    #[test]
    fn damage_is_an_error() {
        let bytes = bundle().encode();
        for len in 0..bytes.len() {
            assert_eq!(Bundle::decode(&bytes[..len]).unwrap_err().code(), "engine/launch-table", "{len}");
        }
        for at in 0..32 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x80;
            assert!(Bundle::decode(&bytes).is_err(), "{at}");
        }
        let mut missing = bundle();
        missing.table.steps[0].variants[0].launches[0].kernel = 1;
        assert!(Bundle::decode(&missing.encode()).is_err());
        let mut gap = bundle();
        gap.table.steps[0].first = 1;
        assert!(Bundle::decode(&gap.encode()).is_err());
        let mut partial = bundle();
        partial.table.steps[0].variants.pop();
        assert!(Bundle::decode(&partial.encode()).is_err());
    }

    #[test]
    fn bounds_of_tiles_need_tiles() {
        type Change<'a> = dyn Fn(&mut LaunchTable, &mut Launch) + 'a;
        let tiled = |change: &Change<'_>| {
            let mut bundle = bundle();
            let mut launch = bundle.table.steps[0].variants[0].launches[0].clone();
            change(&mut bundle.table, &mut launch);
            bundle.table.steps[0].variants[0].launches[0] = launch;
            Bundle::decode(&bundle.encode())
        };
        let (first, count) = (|| Dim::from(tile_first()), || Dim::from(tile_count()));
        let blocks = || first().add(&count()).ceil_div(3).sub(&first().sub(&Dim::from(2u64)).ceil_div(3));
        let good = tiled(&|_, l| {
            l.grid[0] = blocks().min_of(&Dim::from(9u64));
            l.args.extend([Arg::I32(first()), Arg::I32(count())]);
        })
        .unwrap();
        let launch = &good.table.steps[0].variants[0].launches[0];
        assert_eq!(launch.grid[0], blocks().min_of(&Dim::from(9u64)));
        assert_eq!(launch.whole_grid()[0], Dim::from(3u64));
        for (first, count, want) in [(0, 8, 3), (2, 1, 1), (2, 2, 2), (3, 3, 1), (5, 3, 2)] {
            let bindings = Tiles::bind(&Bindings::new(), first, count);
            assert_eq!(launch.grid[0].extent(&bindings), Some(want), "{first} {count}");
        }
        let map = |shape: Dim, of: MapBase| {
            let (dtype, shape) = (DType::BF16, vec![shape]);
            Arg::Map(TensorMap { of, dtype, shape, strides: Vec::new(), tile: vec![8], swizzle: 0 })
        };
        let wrong: [&Change<'_>; 10] = [
            &|_, l| (l.tiles, l.grid[2]) = (None, count()),
            &|_, l| (l.tiles, l.args[3]) = (None, Arg::I32(first())),
            &|_, l| (l.tiles, l.args[3]) = (None, Arg::Workspace(first().add(&count()))),
            &|_, l| (l.tiles, l.args[3]) = (None, map(count(), MapBase::Workspace(Dim::from(0u64)))),
            &|_, l| (l.tiles, l.args[3]) = (None, map(Dim::from(8u64), MapBase::Workspace(first()))),
            &|_, l| l.args[1] = Arg::Address(Operand::Weight(WeightId::from_index(4))),
            &|_, l| l.tiles = l.tiles.map(|t| Tiles { slices: 0, ..t }),
            &|_, l| l.tiles = l.tiles.map(|t| Tiles { granule: 0, ..t }),
            &|t, _| t.workspace = count(),
            &|t, _| t.steps[0].variants[0].when[0].dim = first(),
        ];
        for (at, change) in wrong.into_iter().enumerate() {
            assert_eq!(tiled(change).unwrap_err().code(), "engine/launch-table", "{at}");
        }
    }
}
