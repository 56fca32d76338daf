// Matmul of many rows on Hopper: D[BM x BN] tiles, persistent blocks, one producer warp that feeds a ring of STAGES
// shared-memory stages through the tensor memory unit, and CONSUMERS groups of four warps that multiply 64 x BN each.
// A cluster of CLUSTER blocks works on neighbouring row tiles of the same columns: each block loads its part of the
// weight tile for all of them. Or, for few tiles, a cluster of SPLIT blocks works on one tile, each on a part of k, and
// each adds up a part of the columns, always in the same order.
//
// Constants: K, PANELS, BN, STAGES, CLUSTER, SPLIT (one of both is 1; with SPLIT > 1 each cluster has one tile),
// BOXES (copies that a row tile is loaded with), CONSUMERS, GROUP (row tiles, in clusters, that are walked before the next
// columns). Written for BN and ELEMENT: wgmma(acc, a, b, keep).

struct alignas(64) TensorMap { char bytes[128]; };

constexpr int BM = 64 * CONSUMERS, BK = 64;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2;
constexpr int STEPS = (K + BK - 1) / BK;
//# tiled
// Column tiles of the launch, which has the panels [tile_first, tile_first + tile_count); the weight begins with the first.
#define TILES_N ((tile_count + BN / 8 - 1) / (BN / 8))
//# whole
constexpr int TILES_N = (PANELS + BN / 8 - 1) / (BN / 8);
//# end
constexpr int PART = BN / 8 / CLUSTER, SHARE = BN / 8 / SPLIT;
constexpr int SPAN = CLUSTER * SPLIT;
constexpr int BOX = BM / BOXES;
constexpr int SCRATCH_AT = STAGES * (A_BYTES + B_BYTES);
constexpr int BARRIERS_AT = SCRATCH_AT + CONSUMERS * 4 * SCRATCH;

DEVICE void barrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
DEVICE void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 bar, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "AGAIN:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra DONE;\n"
                 "bra AGAIN;\n"
                 "DONE:\n"
                 "}" ::"r"(bar), "r"(parity) : "memory");
}
// Arrives at the barrier of block `rank` of the cluster that lies where `bar` lies here. What it orders are reads of the
// matrix instructions that have ended; a release at the scope of the cluster would cost a fence of the whole device.
DEVICE void barrier_arrive(u32 bar, u32 rank) {
    if (CLUSTER == 1) {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
    } else {
        asm volatile("{\n"
                     ".reg .b32 remote;\n"
                     "mapa.shared::cluster.u32 remote, %0, %1;\n"
                     "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                     "}" ::"r"(bar), "r"(rank) : "memory");
    }
}
DEVICE u32 cluster_rank() {
    u32 rank = 0;
    if (SPAN > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void cluster_sync() {
    if (SPAN == 1) {
        __syncthreads();
    } else {
        asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    }
}
DEVICE void load_rows(u32 shared, const TensorMap *map, u32 bar, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(shared), "l"(map), "r"(bar), "r"(column), "r"(row) : "memory");
}
DEVICE void load_panels(u32 shared, const TensorMap *map, u32 bar, int block, int panel) {
    if (CLUSTER == 1) {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5}], [%2];"
                     ::"r"(shared), "l"(map), "r"(bar), "r"(0), "r"(block), "r"(panel) : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4, %5}], [%2], %6;"
                     ::"r"(shared), "l"(map), "r"(bar), "r"(0), "r"(block), "r"(panel), "h"((u16)((1 << CLUSTER) - 1))
                     : "memory");
    }
}

// Activations: rows of 128 bytes, swizzled, groups of eight rows 1024 bytes apart.
DEVICE u64 describe_rows(u32 shared) {
    return (u64)((shared & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
// Weights: core matrices, 128 bytes apart along k and 1024 along the panels.
DEVICE u64 describe_panels(u32 shared) {
    return (u64)((shared & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(1024 >> 4) << 32;
}

template <int N> DEVICE void hold(float (&acc)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[j][i])::"memory");
}

// Adds up the accumulators of the blocks of a cluster, which are in their shared memory at `at`: SHARE panels.
DEVICE void add_up(float (&sum)[SHARE][4], u32 at) {
#pragma unroll
    for (int s = 0; s < SPLIT; ++s) {
        u32 remote;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(at), "r"(s));
#pragma unroll
        for (int j = 0; j < SHARE; ++j) {
            float v[4];
            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(remote + j * 512) : "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[j][i] = s == 0 ? v[i] : sum[j][i] + v[i];
        }
    }
}

// `store_rows` of a tile that is not split; split tiles never get here.
DEVICE void store_whole(const float (&acc)[SHARE][4], Ahead<SHARE> &ahead, const Pointers &p, int row, int panel, int from,
                        int m, u32 scratch) {
    store_rows(acc, ahead, p, row, panel, from, m, scratch);
}
template <int N>
DEVICE void store_whole(const float (&)[N][4], Ahead<SHARE> &, const Pointers &, int, int, int, int, u32) {}

// First row that a copy for the rows from `row` on loads. Rows past the end are slow to load, so the last copy takes
// rows that are another tile's as well; they are not stored.
DEVICE int box_row(int row, int m) { return max(0, min(row, m - BOX)); }

// Row tile (of the cluster's first block) and column tile of work item `item`.
//# tiled
DEVICE void tile_of(int item, int row_tiles, int &tm, int &tn, int tile_count) {
//# whole
DEVICE void tile_of(int item, int row_tiles, int &tm, int &tn) {
//# end
    const int first = item / (GROUP * TILES_N) * GROUP;
    const int size = min(GROUP, row_tiles - first);
    const int within = item - first * TILES_N;
    tm = (first + within % size) * CLUSTER;
    tn = within / size;
}

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, 1)
    KERNEL(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, int m, POINTER_PARAMETERS) {
    extern __shared__ u8 memory[];
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    const u32 a_base = base, b_base = base + STAGES * A_BYTES;
    const u32 full = base + BARRIERS_AT, empty = full + STAGES * 8;
    const u32 rank = SPLIT == 1 ? cluster_rank() : 0, slice = SPLIT == 1 ? 0 : cluster_rank();
    const int first_step = slice * STEPS / SPLIT, last_step = (slice + 1) * STEPS / SPLIT;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS * 4 * CLUSTER);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();

    const int row_tiles = (m + BM * CLUSTER - 1) / (BM * CLUSTER);
    const int items = row_tiles * TILES_N;
    int stage = 0;
    u32 phase = 0;
    const int role = threadIdx.x / 128;
    if (role == CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == CONSUMERS * 128) {
            // Weights are there before the predecessor ends.
            int ahead = 0;
            if (blockIdx.x / SPAN < items) {
                int tm, tn;
//# tiled
                tile_of(blockIdx.x / SPAN, row_tiles, tm, tn, tile_count);
//# whole
                tile_of(blockIdx.x / SPAN, row_tiles, tm, tn);
//# end
                const int panel = tn * (BN / 8) + rank * PART;
                for (; ahead < STAGES && first_step + ahead < last_step; ++ahead) {
                    barrier_expect(full + 8 * ahead, A_BYTES + B_BYTES);
                    load_panels(b_base + ahead * B_BYTES + rank * (PART * 1024), &w_map, full + 8 * ahead,
                                (first_step + ahead) * 8, panel);
                }
            }
            wait_for_predecessor();
            for (int item = blockIdx.x / SPAN; item < items; item += gridDim.x / SPAN) {
                int tm, tn;
//# tiled
                tile_of(item, row_tiles, tm, tn, tile_count);
//# whole
                tile_of(item, row_tiles, tm, tn);
//# end
                const int row = (tm + rank) * BM, panel = tn * (BN / 8) + rank * PART;
                for (int step = first_step; step < last_step; ++step) {
                    if (ahead > 0) {
                        --ahead;
                    } else {
                        barrier_wait(empty + 8 * stage, phase ^ 1);
                        barrier_expect(full + 8 * stage, A_BYTES + B_BYTES);
                        load_panels(b_base + stage * B_BYTES + rank * (PART * 1024), &w_map, full + 8 * stage, step * 8,
                                    panel);
                    }
#pragma unroll
                    for (int box = 0; box < BOXES; ++box)
                        load_rows(a_base + stage * A_BYTES + box * (BOX * BK * 2), &x_map, full + 8 * stage, step * BK,
                                  box_row(row + box * BOX, m));
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
            release_successor();
        }
        if (SPLIT > 1) cluster_sync();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_predecessor();
        const Pointers pointers = POINTERS;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const u32 scratch = base + SCRATCH_AT + warp * SCRATCH;
        const u64 a_first = describe_rows(a_base + role * (64 * BK * 2)), b_first = describe_panels(b_base);
        float acc[BN / 8][4];
        for (int item = blockIdx.x / SPAN; item < items; item += gridDim.x / SPAN) {
            int tm, tn;
//# tiled
            tile_of(item, row_tiles, tm, tn, tile_count);
//# whole
            tile_of(item, row_tiles, tm, tn);
//# end
            const int from = (tm + rank) * BM + warp * 16 / BOX * BOX;
//# tiled
            const int row = box_row(from, m) + warp * 16 % BOX, panel = tile_first + tn * (BN / 8);
//# whole
            const int row = box_row(from, m) + warp * 16 % BOX, panel = tn * (BN / 8);
//# end
            prefetch_rows<SHARE>(pointers, row, panel + slice * SHARE, m);
            int last = 0;
            hold(acc);
#pragma unroll 1
            for (int step = first_step; step < last_step; ++step) {
                barrier_wait(full + 8 * stage, phase);
                const u64 a = a_first + stage * (A_BYTES >> 4), b = b_first + stage * (B_BYTES >> 4);
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (int i = 0; i < BK / 16; ++i) wgmma(acc, a + 2 * i, b + 16 * i, (step - first_step) | i);
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (step > first_step && lane < CLUSTER) barrier_arrive(empty + 8 * last, lane);
                last = stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
            Ahead<SHARE> ahead;
            ahead.begin(pointers, row, panel + slice * SHARE, m);
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            hold(acc);
            if (lane < CLUSTER) barrier_arrive(empty + 8 * last, lane);
            if (SPLIT == 1) {
                store_whole(acc, ahead, pointers, row, panel, from, m, scratch);
                continue;
            }
            // The ring is free once all consumers are done with it.
            asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS * 128) : "memory");
            const u32 at = base + warp * (BN / 8 * 512) + lane * 16;
#pragma unroll
            for (int j = 0; j < BN / 8; ++j)
                store_shared(at + j * 512, make_uint4(__float_as_uint(acc[j][0]), __float_as_uint(acc[j][1]),
                                                      __float_as_uint(acc[j][2]), __float_as_uint(acc[j][3])));
            cluster_sync();
            float sum[SHARE][4];
            add_up(sum, at + slice * (SHARE * 512));
            store_rows(sum, ahead, pointers, row, panel + slice * SHARE, from, m, scratch);
        }
    }
    // No block may leave while another may still write to its shared memory or arrive at its barriers.
    if (SPAN > 1) cluster_sync();
}
