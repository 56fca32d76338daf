//! Matmuls of many rows (prefill): tensor cores fed from shared memory, every weight read once per tile of rows.
//!
//! On Hopper, `wgmma.cu`: persistent blocks whose producer warp fills a ring of shared-memory stages through the tensor
//! memory unit. Elsewhere `mma.cu`: `mma.sync` fed by `cp.async`. Both end in `epilogue.cu`. The shape of the tiles depends
//! on the number of rows: [`variants`] answers one launch for each range of it.
//!
//! The weight must be in [`Layout::Cores`], whose blocks are what matrix instructions read; a norm in front must have
//! been launched before. A row's result does not depend on other rows as long as the variant is the same: each element
//! is one chain of accumulations over `k` in order.

use std::sync::Arc;

use millrace_ir::launch::{MapBase, TensorMap};
use millrace_ir::{DType, Dim};

use super::problem::{Layout, Problem};
use super::tile_epilogue;
use crate::cuda::arch::Arch;
use crate::cuda::plan::{Argument, SiteLaunch, SiteVariant, between};
use crate::cuda::source::{Promise, Source, SourceWriter, type_name};

/// Bytes of shared memory in which a warp turns its part of a tile into whole lines; `SCRATCH` in `epilogue.cu`.
const SCRATCH: u32 = 2048;

/// Columns of `k` in a stage of `wgmma.cu`: one line of the 128-byte swizzle.
const WGMMA_K: u32 = 64;

/// Row tiles of 128 up to which the number of rows decides on the tile.
const CHOICES: u64 = 32;

/// Percent of the best tile's time up to which the tile of fewer rows is kept.
const KEEP: u64 = 107;

/// Columns of `k` in a stage of `mma.cu`.
const MMA_K: u32 = 32;

/// How a kernel cuts the result into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// `wgmma.cu`.
    Wgmma {
        /// Groups of four warps, each with 64 rows of the tile.
        consumers: u32,
        /// Columns.
        columns: u32,
        /// Stages of the ring.
        stages: u32,
        /// Blocks that share their weight tiles, on neighbouring row tiles.
        cluster: u32,
        /// Blocks that share a tile, each with a part of `k`; 1 if `cluster` is not.
        split: u32,
        /// Copies that the rows of a tile are loaded with. Rows past the end slow a copy down, so it takes earlier rows
        /// instead if there are enough: tiles with one copy want 128 rows, with two 64.
        boxes: u32,
        /// Row tiles of clusters that are walked before the next columns.
        group: u32,
    },
    /// `mma.cu`.
    Mma {
        /// Warps along the rows, 64 each.
        warps_m: u32,
        /// Warps along the columns, 64 each.
        warps_n: u32,
        /// Stages of the ring.
        stages: u32,
        /// Row tiles that are walked before the next columns.
        group: u32,
    },
}

impl Tile {
    /// The tile for large numbers of rows on Hopper.
    const HOPPER: Tile =
        Tile::Wgmma { consumers: 2, columns: 256, stages: 4, cluster: 2, split: 1, boxes: 1, group: 8 };

    /// Tiles that [`variants`] chooses from.
    const CANDIDATES: [Tile; 6] = [
        Tile::hopper(256, 4, 1),
        Tile::hopper(192, 5, 1),
        Tile::hopper(128, 6, 1),
        Tile::hopper(64, 8, 1),
        Tile::hopper(128, 6, 2),
        Tile::hopper(64, 8, 2),
    ];

    /// Tiles beside them for a measurement to choose.
    const MEASURED: [Tile; 7] = [
        Tile::HOPPER,
        Tile::Wgmma { consumers: 2, columns: 192, stages: 5, cluster: 2, split: 1, boxes: 1, group: 8 },
        Tile::Wgmma { consumers: 2, columns: 128, stages: 6, cluster: 2, split: 1, boxes: 1, group: 8 },
        Tile::Wgmma { consumers: 2, columns: 256, stages: 4, cluster: 1, split: 1, boxes: 1, group: 4 },
        Tile::Wgmma { consumers: 2, columns: 256, stages: 4, cluster: 2, split: 1, boxes: 1, group: 4 },
        Tile::hopper(128, 6, 4),
        Tile::hopper(64, 8, 4),
    ];

    const fn hopper(columns: u32, stages: u32, split: u32) -> Tile {
        Tile::Wgmma { consumers: 2, columns, stages, cluster: 1, split, boxes: 1, group: 16 }
    }

    /// The tile for fewer rows than it has.
    fn halved(mut self) -> Tile {
        if let Tile::Wgmma { consumers: 2, boxes, .. } = &mut self {
            *boxes = 2;
        }
        self
    }

    /// About how long a problem takes on an H200. Measured there: a step of 64 along `k` takes 655, 505, 365 and 230 ns for
    /// tiles of 128 rows and 256, 192, 128 and 64 columns when every multiprocessor has one; a wave of tiles another
    /// 1.5 us, a launch 2 us, and adding up the parts of a split 4 us.
    fn nanoseconds(self, m: u64, k: u64, panels: u64, multiprocessors: u64) -> u64 {
        let Tile::Wgmma { columns, cluster, split, .. } = self else { return u64::MAX };
        let tiles = m.div_ceil(u64::from(self.rows())) * (8 * panels).div_ceil(u64::from(columns));
        let waves = tiles.div_ceil(multiprocessors / u64::from(cluster * split));
        let step = match columns {
            64 => 230,
            128 => 365,
            192 => 505,
            _ => 655,
        };
        // With one row tile, what counts is the memory the weights come from, and narrow tiles keep more of them coming:
        // 65 us with 128 columns against 78 with 256 for a weight of [28672, 4096].
        let step = if m <= 128 && columns > 128 { 2 * step } else { step };
        if split > 1 && waves > 1 {
            // Split tiles do not overlap their ends with the next tiles.
            return u64::MAX;
        }
        let steps = k.div_ceil(u64::from(WGMMA_K)).div_ceil(u64::from(split));
        waves * (steps * step + 1500) + 2000 + if split > 1 { 4000 } else { 0 }
    }

    /// Whether the kernel can do the problem: each block of a split needs a part of `k`, and of the columns whole pairs of
    /// panels if they are gated.
    fn fits(&self, problem: &Problem<'_>) -> bool {
        let Tile::Wgmma { columns, split, .. } = *self else { return true };
        let pair = if problem.gated() { 16 } else { 8 };
        columns.is_multiple_of(split * pair) && problem.k.div_ceil(WGMMA_K as usize) >= split as usize
    }

    /// Parts of `k` that blocks share out.
    fn split(self) -> u32 {
        if let Tile::Wgmma { split, .. } = self { split } else { 1 }
    }

    /// Rows of the tiles of one cluster.
    pub fn rows(self) -> u32 {
        match self {
            Tile::Wgmma { consumers, cluster, .. } => 64 * consumers * cluster,
            Tile::Mma { warps_m, .. } => 64 * warps_m,
        }
    }

    /// Columns.
    pub fn columns(self) -> u32 {
        match self {
            Tile::Wgmma { columns, .. } => columns,
            Tile::Mma { warps_n, .. } => 64 * warps_n,
        }
    }

    /// Blocks of a cluster.
    pub fn cluster(self) -> u32 {
        match self {
            Tile::Wgmma { cluster, split, .. } => cluster * split,
            Tile::Mma { .. } => 1,
        }
    }

    /// Threads of a block.
    pub fn threads(self) -> u32 {
        match self {
            Tile::Wgmma { consumers, .. } => (consumers + 1) * 128,
            Tile::Mma { warps_m, warps_n, .. } => warps_m * warps_n * 32,
        }
    }

    /// Bytes of dynamic shared memory: the ring, scratch of each warp, barriers, and what alignment may take.
    pub fn shared(self) -> u32 {
        match self {
            Tile::Wgmma { consumers, columns, stages, .. } => {
                let stage = (64 * consumers + columns) * WGMMA_K * 2;
                stages * (stage + 16) + consumers * 4 * SCRATCH + 1024
            }
            Tile::Mma { warps_m, warps_n, stages, .. } => {
                let stage = (64 * warps_m + 64 * warps_n) * MMA_K * 2;
                (stages * stage).max(warps_m * warps_n * SCRATCH)
            }
        }
    }
}

/// One launch that serves every number of rows, and the bytes of scratch memory it needs.
pub fn launches(problem: &Problem<'_>) -> Option<(Vec<SiteLaunch>, Dim)> {
    let tile = match problem.site.arch.has_wgmma() {
        true => Tile::HOPPER,
        false => mma_tile(problem.site.arch),
    };
    Some((vec![launch(problem, tile)?], Dim::from(0u64)))
}

/// Ways to run the problem by its number of rows; the first whose condition holds, and the last has none. None needs
/// scratch memory or counters.
pub fn variants(problem: &Problem<'_>) -> Option<Vec<SiteVariant>> {
    if !problem.site.arch.has_wgmma() {
        return Some(vec![SiteVariant::new(Vec::new(), launches(problem)?.0)]);
    }
    let ranges = choose(problem);
    let last = ranges.len().saturating_sub(1);
    ranges
        .into_iter()
        .enumerate()
        .map(|(index, (rows, tile))| {
            let when = if index == last { Vec::new() } else { vec![between(&problem.m, 0, rows)] };
            Some(SiteVariant::new(when, vec![launch(problem, tile)?]))
        })
        .collect()
}

/// Fewest rows of a problem in cores for which the family is built in; [`super::skinny`] serves fewer. On Hopper one tile of rows
/// takes 64 of them faster: 4 % less for the matmuls of a layer of the Llama 3.1 8B shape, 9 % for the 3.2 1B shape.
pub fn fewest_rows(problem: &Problem<'_>) -> u64 {
    if problem.site.arch.has_wgmma() { 49 } else { super::skinny::MAX_ROWS + 1 }
}

/// Tiles that may serve `m` rows, the built-in one first, then by the estimate of their time; all but the built-in one are
/// for a measurement to choose. Empty where the family does not serve the problem.
pub fn tiles(problem: &Problem<'_>, m: u64) -> Vec<Tile> {
    let arch = problem.site.arch;
    if launch(problem, mma_tile(arch)).is_none() {
        return Vec::new();
    }
    let mut tiles = Vec::new();
    if arch.has_wgmma() {
        tiles.extend(choose(problem).into_iter().find(|(rows, _)| m <= *rows).map(|(_, tile)| tile));
        let (k, panels) = (problem.k as u64, problem.panels() as u64);
        let cost = |t: &Tile| t.nanoseconds(m.max(1), k, panels, u64::from(arch.multiprocessors()));
        let halved = |t: Tile| if m < 128 { t.halved() } else { t };
        let mut others: Vec<Tile> = Tile::CANDIDATES.into_iter().chain(Tile::MEASURED).collect();
        // Clusters on two row tiles want two, and parts of `k` few tiles; fewer rows than a tile want two copies.
        // Nor do gated epilogues take parts of less than four panels.
        let part = |t: &Tile| t.columns() / 8 / t.split() >= if problem.gated() { 4 } else { 1 };
        others.retain(|t| {
            t.fits(problem) && part(t) && (m > 128 || t.rows() == 128) && (m <= 1024 || t.split() == 1)
        });
        others.sort_by_key(cost);
        tiles.extend(others.into_iter().map(halved));
    } else {
        let Tile::Mma { stages, group, .. } = mma_tile(arch) else { return tiles };
        let other = |(warps_m, warps_n)| Tile::Mma { warps_m, warps_n, stages, group };
        tiles.extend([(2, 2), (1, 2), (2, 1), (1, 4), (1, 1)].map(other));
        tiles.retain(|t| t.shared() <= arch.max_shared());
    }
    let mut seen = Vec::new();
    tiles.retain(|t| {
        !seen.contains(t) && {
            seen.push(*t);
            true
        }
    });
    tiles
}

/// Tiles for Hopper with the most rows that each serves, in increasing order.
fn choose(problem: &Problem<'_>) -> Vec<(u64, Tile)> {
    let multiprocessors = u64::from(problem.site.arch.multiprocessors());
    let (k, panels) = (problem.k as u64, problem.panels() as u64);
    let cost = |tile: Tile, m: u64| tile.nanoseconds(m, k, panels, multiprocessors);
    let fits = |tile: &Tile| tile.fits(problem);
    let mut ranges: Vec<(u64, Tile)> = Vec::new();
    let narrow = Tile::CANDIDATES.into_iter().filter(fits).min_by_key(|t| cost(*t, 1));
    ranges.extend(narrow.map(|tile| (127, tile.halved())));
    for row_tile in 1..=CHOICES {
        let m = row_tile * 128;
        let best =
            Tile::CANDIDATES.into_iter().filter(fits).min_by_key(|t| cost(*t, m)).unwrap_or(Tile::HOPPER);
        match ranges.last_mut() {
            // A few percent are not worth a kernel, nor is the estimate that good.
            Some((rows, tile))
                if row_tile > 1 && cost(*tile, m) <= cost(best, m).saturating_mul(KEEP) / 100 =>
            {
                *rows = m
            }
            _ => ranges.push((m, best)),
        }
    }
    // Beyond, waves are many and their number matters little; what is left is the traffic of the tiles.
    ranges.push((u64::MAX, Tile::HOPPER));
    ranges
}

fn mma_tile(arch: Arch) -> Tile {
    let stages = if arch.max_shared() < 128 << 10 { 3 } else { 4 };
    Tile::Mma { warps_m: 2, warps_n: 2, stages, group: 16 }
}

/// One launch with a given tile, or none if the problem is not for these kernels.
pub fn launch(problem: &Problem<'_>, tile: Tile) -> Option<SiteLaunch> {
    let float = matches!(problem.dtype, DType::BF16 | DType::F16);
    let out = matches!(problem.out, DType::BF16 | DType::F16 | DType::F32);
    let small = i32::try_from(problem.k).is_ok() && i32::try_from(problem.n()).is_ok();
    let whole = problem.k > 0 && problem.k.is_multiple_of(8) && problem.segments.iter().all(|s| *s > 0);
    if problem.layout != Layout::Cores || !float || !out || !small || !whole || !tile.fits(problem) {
        return None;
    }
    let (k, panels) = (problem.k as u64, problem.panels() as u64);
    let row_tiles = problem.m.ceil_div(i64::from(tile.rows()));
    let slices = problem.tile_slices();
    let tiles = row_tiles.mul(&slices.ceil_div(i64::from(tile.columns() / 8)));
    let tiled = problem.tiles();
    let one = || Dim::from(1u64);
    let arch = problem.site.arch;
    let mut writer = SourceWriter::new(match tile {
        Tile::Wgmma { .. } => "cuda.matmul.wgmma",
        Tile::Mma { .. } => "cuda.matmul.mma",
    });
    writer = writer
        .ty("ELEMENT", problem.dtype)
        .ty("OUT", problem.out)
        .int("K", k)
        .int("PANELS", panels)
        .body(&tile_epilogue::declare(problem)?)
        .body(include_str!("epilogue.cu"));
    let (blocks, maps) = match tile {
        Tile::Wgmma { consumers, columns, stages, cluster, split, boxes, group } => {
            writer = writer
                .int("BN", columns)
                .int("STAGES", stages)
                .int("CLUSTER", cluster)
                .int("SPLIT", split)
                .int("BOXES", boxes)
                .int("CONSUMERS", consumers)
                .int("GROUP", group)
                .body(&wgmma_instruction(columns, problem.dtype))
                .body_for(include_str!("wgmma.cu"), tiled.is_some());
            let resident = u64::from(arch.multiprocessors() / cluster);
            let clusters = if split > 1 { tiles } else { tiles.min_of(&Dim::from(resident)) };
            let x = TensorMap {
                of: MapBase::Address(problem.x),
                dtype: problem.dtype,
                shape: vec![Dim::from(k), problem.m.clone()],
                strides: vec![Dim::from(2 * k)],
                tile: vec![WGMMA_K, 64 * consumers / boxes],
                swizzle: 128,
            };
            let w = TensorMap {
                of: MapBase::Address(problem.weight),
                dtype: problem.dtype,
                shape: vec![Dim::from(64u64), Dim::from(k / 8), slices],
                strides: vec![Dim::from(128u64), Dim::from(16 * k)],
                tile: vec![64, WGMMA_K / 8, columns / 8 / cluster],
                swizzle: 0,
            };
            (clusters.mul(&Dim::from(u64::from(cluster * split))), [Argument::Map(x), Argument::Map(w)])
        }
        Tile::Mma { warps_m, warps_n, stages, group } => {
            writer = writer
                .int("WARPS_M", warps_m)
                .int("WARPS_N", warps_n)
                .int("STAGES", stages)
                .int("GROUP", group)
                .body_for(include_str!("mma.cu"), tiled.is_some());
            (tiles, [Argument::Address(problem.x), Argument::Address(problem.weight)])
        }
    };
    let source: Arc<Source> = writer.promise(Promise { registers: 0, no_local: true }).finish();
    let mut launch = SiteLaunch::new(source, [blocks, one(), one()], tile.threads());
    launch.cluster = tile.cluster();
    launch.shared = tile.shared();
    launch.dependent = arch.has_tma();
    launch.tiles = tiled;
    Some(launch.args(maps).args([Argument::I32(problem.m.clone())]).args(tile_epilogue::arguments(problem)))
}

/// `acc[64 rows, n] (+)= a[64, 16] b[16, n]`, one group of four warps; `a` and `b` are descriptors of shared memory, and
/// the accumulators are overwritten where `keep` is 0.
fn wgmma_instruction(n: u32, dtype: DType) -> String {
    let registers = n / 2;
    let list = |f: &dyn Fn(u32) -> String| (0..registers).map(f).collect::<Vec<_>>().join(", ");
    let ty = if dtype == DType::F16 { "f16" } else { type_name(DType::BF16) };
    format!(
        "DEVICE void wgmma(float (&d)[{}][4], u64 a, u64 b, int keep) {{\n    \
         asm volatile(\"{{.reg .pred p;\\nsetp.ne.b32 p, %{}, 0;\\n\"\n        \
         \"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ty}.{ty} {{{}}}, %{}, %{}, p, 1, 1, 0, 0;}}\"\n        \
         : {}\n        : \"l\"(a), \"l\"(b), \"r\"(keep));\n}}",
        n / 8,
        registers + 2,
        list(&|i| format!("%{i}")),
        registers,
        registers + 1,
        list(&|i| format!("\"+f\"(d[{}][{}])", i / 4, i % 4)),
    )
}

#[cfg(test)]
pub(super) mod tests {
    use millrace_ir::dim::{Bindings, Sym};
    use millrace_ir::text::parse;
    use millrace_ir::{Module, NodeId};

    use super::*;
    use crate::cuda::Site;

    /// A module of one matmul with input, bias and residual, whose weight the tests take to be in cores.
    pub fn module(dtype: &str, k: usize, segments: &[usize], epilogue: &str) -> Module {
        let n: usize = segments.iter().sum();
        let widths = if epilogue.contains("glu(") { &segments[..1] } else { segments };
        let names: Vec<String> = (0..widths.len()).map(|i| format!("%{}", i + 3)).collect();
        let types: Vec<String> = widths.iter().map(|w| format!("{dtype}[$t, {w}]")).collect();
        let outputs: Vec<String> = types.iter().enumerate().map(|(i, t)| format!("\"y{i}\": {t}")).collect();
        let mut operands = String::from("%0, @w");
        if epilogue.contains("bias") {
            operands += ", %1";
        }
        if epilogue.contains("residual") {
            operands += ", %2";
        }
        let text = format!(
            "module @m phase fused {{\n  dim $t in 1..=65536\n  weight @w : {dtype}[{n}, {k}] = \"m\"::\"w\"\n  \
             graph @main(%0 \"x\": {dtype}[$t, {k}], %1 \"b\": {dtype}[{n}], %2 \"r\": {dtype}[$t, {}]) -> ({}) {{\n    \
             {} = matmul.fused {operands} {{segments = {segments:?}, epilogue = [{epilogue}]}} : {}\n    \
             return {}\n  }}\n}}\n",
            widths[0],
            outputs.join(", "),
            names.join(", "),
            types.join(", "),
            names.join(", "),
        );
        parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    fn problem<'a>(module: &'a Module, nodes: &'a [NodeId], arch: Arch) -> Problem<'a> {
        let mut problem = Problem::of(Site { module, nodes, arch }).unwrap();
        problem.layout = Layout::Cores;
        problem
    }

    /// The problem of such a module, with its weight in cores.
    pub fn with<R>(arch: Arch, module: &Module, f: impl FnOnce(Problem<'_>) -> R) -> R {
        f(problem(module, &module.graph.order, arch))
    }

    fn blocks(launch: &SiteLaunch, m: u64) -> u64 {
        let mut bindings = Bindings::new();
        bindings.set(Sym::new("t").unwrap(), m);
        launch.grid[0].extent(&bindings).unwrap()
    }

    fn maps(launch: &SiteLaunch) -> Vec<TensorMap> {
        let map = |a: &Argument| if let Argument::Map(map) = a { Some(map.clone()) } else { None };
        launch.args.iter().filter_map(map).collect()
    }

    #[test]
    fn hopper_launch_of_a_large_problem() {
        let module = module("bf16", 4096, &[14336, 14336], "glu(silu)");
        with(Arch::Sm90a, &module, |problem| {
            let (launches, workspace) = launches(&problem).unwrap();
            let launch = &launches[0];
            assert_eq!((launches.len(), workspace.as_const()), (1, Some(0)));
            assert_eq!((launch.threads, launch.cluster, launch.dependent), (384, 2, true));
            assert!(launch.shared <= Arch::Sm90a.max_shared());
            // Two row tiles of 128 a cluster, 112 column tiles; never more blocks than multiprocessors.
            assert_eq!([1, 256, 257, 16384].map(|m| blocks(launch, m)), [132; 4]);
            let maps = maps(launch);
            assert_eq!((maps[0].tile.as_slice(), maps[0].swizzle), ([64, 128].as_slice(), 128));
            assert_eq!((maps[1].tile.as_slice(), maps[1].swizzle), ([64, 8, 16].as_slice(), 0));
            let extents: Vec<_> = maps[1].shape.iter().map(|d| d.as_const().unwrap()).collect();
            assert_eq!(extents, [64, 512, 3584]);
            let strides: Vec<_> = maps[1].strides.iter().map(|d| d.as_const().unwrap()).collect();
            assert_eq!(strides, [128, 512 * 128]);
            let order = launch.args.iter().map(|a| matches!(a, Argument::I32(_))).collect::<Vec<_>>();
            assert_eq!(order, [false, false, true, false]);
        });
    }

    #[test]
    fn few_tiles_make_few_blocks() {
        let module = module("f16", 512, &[600, 40], "");
        with(Arch::Sm90a, &module, |problem| {
            let launch = launch(&problem, Tile::HOPPER).unwrap();
            // 80 panels are three tiles of 32.
            assert_eq!([0, 1, 256, 257].map(|m| blocks(&launch, m)), [0, 6, 6, 12]);
        });
    }

    /// Where `wgmma.cu` tells the matrix instructions that element `[n, k]` of a tile is, against where a copy of the
    /// tile's box leaves it: boxes are written densely, innermost axis first.
    #[test]
    fn core_matrices_are_where_descriptors_say() {
        let (panels, blocks) = (32, 8);
        for n in 0..8 * panels {
            for k in 0..8 * blocks {
                let element = (n % 8) * 8 + k % 8;
                let box_at = ((n / 8 * blocks + k / 8) * 64 + element) * 2;
                let descriptor_at = n / 8 * 1024 + k / 8 * 128 + n % 8 * 16 + k % 8 * 2;
                assert_eq!(box_at, descriptor_at);
            }
        }
    }

    #[test]
    fn elsewhere_mma_with_plain_addresses() {
        let module = module("bf16", 64, &[64, 16, 16], "bias, relu");
        with(Arch::Sm80, &module, |problem| {
            let (launches, _) = launches(&problem).unwrap();
            assert_eq!(launches[0].source.family, "cuda.matmul.mma");
            // x, weight, m, bias, three results; 12 panels are one tile of 128 columns.
            assert_eq!((launches[0].args.len(), launches[0].dependent, launches[0].threads), (7, false, 128));
            assert_eq!([1, 128, 129].map(|m| blocks(&launches[0], m)), [1, 1, 2]);
            assert!(launches[0].source.promise.no_local);
        });
    }

    #[test]
    fn instructions_name_every_register() {
        for n in [64, 128, 192, 256] {
            let text = wgmma_instruction(n, DType::F16);
            assert_eq!(text.matches("\"+f\"").count() as u32, n / 2);
            assert!(text.contains(&format!("m64n{n}k16.f32.f16.f16 {{%0, ")));
            assert!(text.contains(&format!("}}, %{}, %{}, p,", n / 2, n / 2 + 1)));
        }
    }

    #[test]
    fn other_problems_are_left_to_others() {
        let none = |arch, module: &Module, layout| {
            with(arch, module, |mut problem| {
                problem.layout = layout;
                launches(&problem).is_none() && variants(&problem).is_none()
            })
        };
        assert!(none(Arch::Sm90a, &module("f32", 64, &[64], ""), Layout::Cores));
        assert!(none(Arch::Sm80, &module("bf16", 64, &[64], ""), Layout::Rows));
        assert!(none(Arch::Sm90a, &module("bf16", 60, &[64], ""), Layout::Cores));
    }

    #[test]
    fn shared_memory_fits_every_architecture() {
        let module = module("bf16", 4096, &[4096], "residual");
        for arch in Arch::ALL {
            with(arch, &module, |problem| {
                for variant in variants(&problem).unwrap() {
                    for launch in &variant.launches {
                        assert!(launch.shared <= arch.max_shared(), "{arch}: {launch:?}");
                        assert!(launch.source.promise.no_local);
                    }
                }
            });
        }
    }

    #[test]
    fn the_number_of_rows_decides_on_the_tile() {
        for (k, segments) in
            [(4096, vec![4096]), (14336, vec![4096]), (4096, vec![4096, 1024, 1024]), (64, vec![8])]
        {
            let module = module("bf16", k, &segments, "");
            with(Arch::Sm90a, &module, |problem| {
                let ranges = choose(&problem);
                assert!(ranges.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 != w[1].1), "{ranges:?}");
                assert_eq!(ranges.last().unwrap().1, Tile::HOPPER);
                // Fewer rows than a tile has are loaded in two copies.
                assert!(ranges[0].0 == 127 && matches!(ranges[0].1, Tile::Wgmma { boxes: 2, .. }));
                assert!(ranges[1..].iter().all(|r| matches!(r.1, Tile::Wgmma { boxes: 1, .. })));
                let variants = variants(&problem).unwrap();
                assert_eq!(variants.len(), ranges.len());
                for (variant, (rows, tile)) in variants.iter().zip(&ranges).rev().skip(1) {
                    assert_eq!((variant.when.len(), variant.when[0].max), (1, *rows));
                    assert_eq!(variant.launches[0].shared, tile.shared());
                }
                assert!(variants.last().unwrap().when.is_empty());
                for m in (128..=128 * CHOICES).step_by(128) {
                    let cost = |tile: Tile| tile.nanoseconds(m, k as u64, problem.panels() as u64, 132);
                    let chosen = ranges.iter().find(|r| m <= r.0).unwrap().1;
                    assert!(
                        Tile::CANDIDATES
                            .into_iter()
                            .all(|t| cost(chosen) * 100 <= cost(t).saturating_mul(KEEP)),
                        "{m}"
                    );
                }
            });
        }
    }
}
