//! How the keys of single rows are split over blocks, and how a block reads them: what is built in, and what a measurement
//! may choose instead.
//!
//! Steps are told apart by their number of sequences ([`CLASSES`]) and by the longest context their block table has room
//! for ([`CONTEXTS`]). A [`Split`] has a name that says everything about it, and a key says everything that its time depends
//! on; [`Choices`](crate::cuda::Choices) maps keys to names, as for matmuls.

use std::fmt::Write;

use super::call::Call;
use crate::cuda::Arch;

/// Most sequences of the last class: blocks along the third axis of a grid.
pub(super) const MAX_ROWS: u64 = 65535;

/// Bytes of a multiprocessor's shared memory that each of its blocks takes for itself, with room for what the kernel
/// declares beside the rings.
const BLOCK_OVERHEAD: u64 = 5 << 10;

/// Keys of a tile of a warp.
const TILE: usize = 16;

/// Steps of up to some number of sequences, and how they are split.
pub(super) struct Class {
    /// Most sequences.
    pub most: u64,
    /// Blocks of a cluster, where the architecture has clusters.
    cluster: u64,
    /// Fewest keys of a block's range.
    min_chunk: usize,
    /// Keys of a block's range up to which a row takes one cluster only.
    one_cluster: usize,
    /// Blocks in all, in hundredths of what a device holds at once.
    percent: u64,
    /// What tables with room for each of [`CONTEXTS`] take instead, where it was measured.
    measured: [Way; 3],
}

/// Warps, stages, blocks of a multiprocessor, blocks of a cluster and hundredths of a device.
type Way = (u64, u64, u64, u64, u64);

/// Rings of three tiles in clusters of two, all that run at once.
const RING: Way = (4, 3, 2, 2, 100);

/// Rings of three tiles for eight warps, one block a multiprocessor.
const WIDE_RING: Way = (8, 3, 1, 2, 100);

/// Rings of two tiles, more blocks than run at once, since sequences may differ in length.
const MANY_RINGS: Way = (4, 2, 3, 1, 260);

/// Clusters shorten the way of few rows, as many as run at once: they do not fill a device to the last block. Many rows
/// need no splitting until contexts are long, and more blocks than run at once.
///
/// What was measured are whole decode steps of Llama 3.1 8B and 3.2 1B layers. There a launch shares the device with the ends of the
/// matmuls around it: blocks with large rings, which do not fit beside theirs, win over registers by 1 to 12 us a layer, also
/// where registers are faster by themselves.
pub(super) const CLASSES: [Class; 6] = [
    Class {
        most: 1,
        cluster: 8,
        min_chunk: 64,
        one_cluster: 128,
        percent: 85,
        measured: [WIDE_RING, RING, RING],
    },
    Class {
        most: 2,
        cluster: 8,
        min_chunk: 64,
        one_cluster: 128,
        percent: 85,
        measured: [WIDE_RING, RING, RING],
    },
    Class {
        most: 4,
        cluster: 4,
        min_chunk: 64,
        one_cluster: 256,
        percent: 85,
        measured: [WIDE_RING, RING, RING],
    },
    Class { most: 8, cluster: 4, min_chunk: 64, one_cluster: 1024, percent: 260, measured: [RING; 3] },
    Class { most: 16, cluster: 1, min_chunk: 256, one_cluster: 256, percent: 260, measured: [MANY_RINGS; 3] },
    Class {
        most: MAX_ROWS,
        cluster: 1,
        min_chunk: 1024,
        one_cluster: 1024,
        percent: 260,
        measured: [(4, 3, 2, 1, 400); 3],
    },
];

/// First and last positions that a block table has room for, in increasing order; together every number.
pub const CONTEXTS: [(u64, u64); 3] = [(0, 8191), (8192, 24575), (24576, u64::MAX)];

/// One way to split rows over blocks and to read their keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// Warps of a block.
    pub warps: u64,
    /// Tiles of a warp's ring in shared memory; 0 for tiles in registers.
    pub stages: u64,
    /// Blocks of a cluster; 1 for none.
    pub cluster: u64,
    /// Blocks that a multiprocessor holds at once.
    pub blocks: u64,
    /// Fewest keys of a block's range.
    pub min_chunk: usize,
    /// Keys of a block's range up to which a row takes one cluster only.
    pub one_cluster: usize,
    /// Blocks in all, in hundredths of what a device holds at once.
    pub percent: u64,
    /// Ranges are whole multiples of so many keys.
    pub grain: usize,
    /// Bytes that level 2 fetches when it misses; 0 for what it fetches by itself.
    pub fetch: usize,
    /// Whether blocks of different heads and the same keys are launched side by side.
    pub heads_first: bool,
}

impl Split {
    /// The name, unique among all splits.
    pub fn name(&self) -> String {
        let Split { warps, stages, cluster, blocks, min_chunk, one_cluster, percent, grain, fetch, .. } =
            self;
        let heads = u8::from(self.heads_first);
        format!(
            "split-w{warps}-s{stages}-x{cluster}-b{blocks}-k{min_chunk}-o{one_cluster}-p{percent}-g{grain}-f{fetch}-h{heads}"
        )
    }

    /// Bytes of a block's rings.
    pub fn shared(&self, d: usize) -> u64 {
        // Keys and values, rows in whole groups of 64 columns.
        self.warps * self.stages * (2 * TILE * d.next_multiple_of(64) * 2) as u64
    }
}

/// Query heads that a block takes: all that share a key head, if registers do.
pub(super) fn head_block(call: &Call<'_>) -> usize {
    // Wide heads leave registers for eight of them only.
    call.group().min(if call.d > 128 { 8 } else { 16 })
}

/// What steps of up to `class.most` sequences take where nothing was measured.
pub(super) fn built_in(call: &Call<'_>, class: &Class, contexts: (u64, u64)) -> Split {
    // Measured on this architecture, with heads of this width and few enough of them for one tile.
    let measured = call.site.arch == Arch::Sm90a && (64..=128).contains(&call.d) && head_block(call) <= 8;
    let way = CONTEXTS.iter().zip(class.measured).find(|(of, _)| measured && **of == contexts);
    let way = way.map(|(_, way)| split(call, class, &way));
    way.filter(|split| fits(call, split)).unwrap_or_else(|| in_registers(call, class))
}

/// Ranges of whole steps, through registers.
fn in_registers(call: &Call<'_>, class: &Class) -> Split {
    let blocks = match call.d {
        _ if head_block(call) > 8 => 2,
        // There the compiler finds no way with the registers of five.
        0..=64 if call.site.arch == Arch::Sm120 => 4,
        0..=64 => 5,
        65..=128 => 3,
        _ => 2,
    };
    let Class { cluster, min_chunk, one_cluster, percent, .. } = *class;
    let cluster = if call.site.arch.has_tma() { cluster } else { 1 };
    Split {
        warps: 4,
        stages: 0,
        cluster,
        blocks,
        min_chunk,
        one_cluster,
        percent,
        grain: 4 * TILE,
        fetch: 0,
        heads_first: false,
    }
}

/// A way in ranges of whole tiles.
fn split(call: &Call<'_>, class: &Class, &(warps, stages, blocks, cluster, percent): &Way) -> Split {
    let cluster = if call.site.arch.has_tma() { cluster } else { 1 };
    Split {
        warps,
        stages,
        cluster,
        blocks,
        min_chunk: if cluster > 1 { 64 } else { class.min_chunk },
        one_cluster: (512 / cluster as usize).max(class.min_chunk),
        percent,
        grain: TILE,
        fetch: 0,
        heads_first: false,
    }
}

/// Whether a multiprocessor has room for the blocks of a split.
fn fits(call: &Call<'_>, split: &Split) -> bool {
    let registers = split.blocks <= in_registers(call, &CLASSES[0]).blocks;
    let shared = split.blocks * (split.shared(call.d) + BLOCK_OVERHEAD);
    registers && (split.stages == 0 || shared <= u64::from(call.site.arch.max_shared()) + 1024)
}

/// Ways to run steps with few sequences.
///
/// Clusters of two fill every group of multiprocessors, larger ones leave some of it empty, and what asks for more clusters than
/// run at once runs in two turns.
const FEW: [Way; 7] = [
    RING,
    WIDE_RING,
    (4, 2, 3, 2, 100),
    (4, 2, 3, 4, 90),
    (4, 0, 3, 2, 100),
    (4, 0, 3, 4, 90),
    (4, 3, 2, 4, 90),
];

/// Ways to run steps with many sequences.
const MANY: [Way; 6] =
    [(4, 3, 2, 1, 100), RING, (4, 3, 2, 1, 400), (4, 3, 2, 4, 400), MANY_RINGS, (8, 3, 1, 1, 400)];

/// Ways to run steps of a class, the built-in one first.
pub(super) fn candidates(call: &Call<'_>, class: &Class, contexts: (u64, u64)) -> Vec<Split> {
    let first = built_in(call, class, contexts);
    let ways: &[Way] = if class.most <= 4 { &FEW } else { &MANY };
    let list = ways.iter().map(|way| split(call, class, way));
    // Level 2 may fetch rows as far as they are whole lines.
    let fetch = [256, 128].into_iter().find(|line| (call.d * 2).is_multiple_of(*line)).unwrap_or(0);
    let mut kept: Vec<Split> = Vec::new();
    let plain = [first, in_registers(call, class)].into_iter().chain(list);
    for plain in plain.filter(|split| fits(call, split)) {
        if kept.contains(&plain) {
            continue;
        }
        kept.push(plain);
        // What goes through registers as built in, and the deepest ring, also with what the memory may like.
        if plain == in_registers(call, class) || plain == split(call, class, &ways[0]) {
            for (fetch, heads_first) in [(fetch, false), (0, true), (fetch, true)] {
                let split = Split { fetch, heads_first, ..plain };
                if !kept.contains(&split) {
                    kept.push(split);
                }
            }
        }
    }
    kept
}

/// What the time of a split depends on: architecture, types, heads, page, window, whether the launch rotates and writes the
/// cache as well, numbers of sequences, and contexts.
pub(super) fn key(call: &Call<'_>, fused: bool, sequences: (u64, u64), contexts: (u64, u64)) -> String {
    let page = call.paged.as_ref().map_or(0, |paged| paged.tokens_per_block);
    let mut text = format!(
        "paged_attention {} {} heads={}/{} d={} page={page}",
        call.site.arch, call.dtype, call.heads, call.kv_heads, call.d
    );
    if call.window > 0 {
        // Writing to a string has no reason to fail.
        let _ = write!(text, " window={}", call.window);
    }
    if fused {
        text.push_str(" rope");
    }
    let range = |(first, last): (u64, u64)| match last {
        u64::MAX | MAX_ROWS => format!("{first}.."),
        _ => format!("{first}..{last}"),
    };
    let _ = write!(text, " b={} context={}", range(sequences), range(contexts));
    text
}
