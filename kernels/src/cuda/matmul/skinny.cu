// y = epilogue(norm(x) w^T) for few rows of x; the weight in blocks of eight rows by eight columns.
//
// A block owns tiles of TILE panels (eight weight rows each), or with SPLIT > 1 a part of K of one tile that its cluster
// owns. One warp copies weights into a ring of STAGES buffers in shared memory, far ahead of the others and, on devices
// with overlapping launches, before the predecessor is done; the other warps multiply. The weight is the operand with 16
// rows of the matrix instruction, x the one with 8 columns. Warps divide the panels of a tile WARPS_N ways and the
// columns of a chunk WARPS_K ways; sums over warps and over the cluster are added in a fixed order.
//
// Constants: K, PANELS (of the weight), TILE, WARPS_N, WARPS_K, COLUMNS (most rows of x, a multiple of 8), CHUNK (columns
// of a stage, a multiple of 64), STAGES, SPLIT, WHOLE (x is in shared memory as a whole: X_ROWS rows, at most COLUMNS),
// NORM and EPS, GATED, ALIAS (sums lie over the ring: each block has one tile), RELEASE (units before the last at which
// the successor may start).

constexpr int WARPS = WARPS_N * WARPS_K;
constexpr int THREADS = WARPS * 32;
constexpr int WARP_PANELS = TILE / WARPS_N;
constexpr int PAIRS = (WARP_PANELS + 1) / 2;
constexpr int TILES = (PANELS + TILE - 1) / TILE;
constexpr int COLUMN_TILES = COLUMNS / 8;
constexpr int SLABS = CHUNK / 32;
constexpr int CHUNKS = (K + CHUNK - 1) / CHUNK;
constexpr int PANEL_STAGE = CHUNK * 16;
constexpr int W_STAGE = TILE * PANEL_STAGE;
constexpr int X_STAGE = WHOLE ? 0 : COLUMNS * CHUNK * 2;
constexpr int STAGE = W_STAGE + X_STAGE;
constexpr int RING = STAGES * STAGE;
constexpr int X_RANGE = (CHUNKS + SPLIT - 1) / SPLIT * CHUNK;
constexpr int X_PITCH = X_RANGE * 2 + 16;
constexpr int X_BYTES = WHOLE ? X_ROWS * X_PITCH : 0;
constexpr int NORM_BYTES = NORM ? (K * 2 + 15) / 16 * 16 : 0;
constexpr int ROWS = TILE * 8;
constexpr int SUM_PITCH = ROWS + 4;
constexpr int SUM_STEP = (WHOLE ? X_ROWS : COLUMNS) * SUM_PITCH;
constexpr int SUMS = WARPS_K * SUM_STEP;
constexpr int AT_X = RING;
constexpr int AT_NORM = AT_X + X_BYTES;
constexpr int AT_SUMS = ALIAS ? 0 : AT_NORM + NORM_BYTES;
constexpr int AT_BARRIERS = ALIAS ? AT_NORM + NORM_BYTES : AT_SUMS + SUMS * 4;
constexpr int AT_SCRATCH = AT_BARRIERS + STAGES * 16;
constexpr int SHARED = AT_SCRATCH + 128;
static_assert(TILE % WARPS_N == 0 && SLABS % WARPS_K == 0 && CHUNK % 64 == 0 && COLUMNS % 8 == 0, "shape of a block");
static_assert(!GATED || TILE % 2 == 0, "pairs of panels stay together");
static_assert(SPLIT == 1 || !NORM, "a part of K is no row");
static_assert(SHARED == EXPECTED_SHARED && (!ALIAS || SUMS * 4 <= RING), "shared memory");

// ---- barriers in shared memory -------------------------------------------------------------------------------------

DEVICE void barrier_init(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{.reg .pred p;\n"
        "AGAIN:\n"
#if ARCH >= 900
        "mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 p, [%0], %1;\n"
#endif
        "@!p bra AGAIN;}" ::"r"(barrier), "r"(parity) : "memory");
}
// Arrives when the copies that this thread has started are done.
DEVICE void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// The warps that multiply, without the one that copies.
DEVICE void sync_warps() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

#if ARCH >= 900
DEVICE u64 evict_first_policy() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [%0], %1;}" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
DEVICE void copy_bulk(u32 shared, const void *global, u32 bytes, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE float cluster_load(u32 shared, u32 rank) {
    u32 at;
    float v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
}
#endif

// 16 bytes that the predecessor may have written: not through the read-only path.
DEVICE uint4 load_fresh(const void *at) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
    return v;
}

// ---- copying -------------------------------------------------------------------------------------------------------

// Work of a block in order: chunks of its part of K, tile after tile.
struct Walk {
    int first_chunk, chunks, tile, units;
};
DEVICE Walk walk() {
    Walk w;
    int rank = SPLIT == 1 ? 0 : blockIdx.x % SPLIT;
    w.first_chunk = SPLIT == 1 ? 0 : CHUNKS * rank / SPLIT;
    w.chunks = SPLIT == 1 ? CHUNKS : CHUNKS * (rank + 1) / SPLIT - w.first_chunk;
    w.tile = blockIdx.x / SPLIT;
    int blocks = gridDim.x / SPLIT;
    w.units = (TILES - w.tile + blocks - 1) / blocks * w.chunks;
    return w;
}

DEVICE void copy_weights(const T *w, u32 stage, u32 full, int tile, int chunk, u64 policy) {
    int lane = threadIdx.x % 32;
    int panels = min(TILE, PANELS - tile * TILE);
    const u8 *from = (const u8 *)w + (u64)tile * TILE * K * 16 + (u64)chunk * PANEL_STAGE;
    int bytes = K % CHUNK == 0 ? PANEL_STAGE : min(CHUNK, K - chunk * CHUNK) * 16;
#if ARCH >= 900
    if (lane == 0) barrier_expect(full, bytes * panels);
    __syncwarp();
    for (int p = lane; p < panels; p += 32)
        copy_bulk(stage + p * PANEL_STAGE, from + (u64)p * K * 16, bytes, full, policy);
#else
    for (int p = 0; p < panels; ++p)
        for (int at = lane * 16; at < bytes; at += 512)
            copy_async(stage + p * PANEL_STAGE + at, from + (u64)p * K * 16 + at, true);
#endif
}

DEVICE void copy_x(const T *x, u32 stage, u32 full, int chunk, int m) {
    int lane = threadIdx.x % 32;
    constexpr int PIECES = CHUNK / 8;
    if (!WHOLE) {
#pragma unroll 1
        for (int i = lane; i < m * PIECES; i += 32) {
            int row = i / PIECES, piece = i % PIECES;
            bool valid = K % CHUNK == 0 || chunk * CHUNK + piece * 8 < K;
            copy_async(stage + W_STAGE + row * CHUNK * 2 + (piece ^ (row & 7)) * 16,
                       x + (u64)row * K + (valid ? chunk * CHUNK + piece * 8 : 0), valid);
        }
    }
    if (ARCH < 900 || !WHOLE) barrier_arrive_after_copies(full);
}

DEVICE void copy_all(const T *x, const T *w, u32 shared, int m) {
    Walk work = walk();
    int blocks = gridDim.x / SPLIT;
    u64 policy = 0;
#if ARCH >= 900
    policy = evict_first_policy();
#endif
    u32 full = shared + AT_BARRIERS, empty = full + STAGES * 8;
    int release = max(0, work.units - 1 - RELEASE);
    int ahead = min(work.units, STAGES);
    int tile = work.tile, chunk = 0;
    for (int u = 0; u < ahead; ++u) {
        copy_weights(w, shared + u * STAGE, full + u * 8, tile, work.first_chunk + chunk, policy);
        if (u == release) release_successor();
        if (++chunk == work.chunks) chunk = 0, tile += blocks;
    }
    if (!WHOLE || ARCH < 900) {
        if (!WHOLE) wait_for_predecessor();
        int c = 0;
        for (int u = 0; u < ahead; ++u) {
            copy_x(x, shared + u * STAGE, full + u * 8, work.first_chunk + c, m);
            if (++c == work.chunks) c = 0;
        }
    }
    int stage = 0, round = 0;
    for (int u = ahead; u < work.units; ++u) {
        barrier_wait(empty + stage * 8, round & 1);
        copy_weights(w, shared + stage * STAGE, full + stage * 8, tile, work.first_chunk + chunk, policy);
        copy_x(x, shared + stage * STAGE, full + stage * 8, work.first_chunk + chunk, m);
        if (u == release) release_successor();
        if (++chunk == work.chunks) chunk = 0, tile += blocks;
        if (++stage == STAGES) stage = 0, ++round;
    }
    copy_async_commit();
    copy_async_wait<0>();
}

// ---- x as a whole --------------------------------------------------------------------------------------------------

DEVICE float square_sum(uint4 v) {
    float2 a = unpack2<T>(v.x), b = unpack2<T>(v.y), c = unpack2<T>(v.z), d = unpack2<T>(v.w);
    return a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y + c.x * c.x + c.y * c.y + d.x * d.x + d.y * d.y;
}
DEVICE u32 scaled2(u32 x, float scale, u32 weight) {
    float2 v = unpack2<T>(x), w = unpack2<T>(weight);
    return pack2<T>(v.x * scale * w.x, v.y * scale * w.y);
}

DEVICE void load_norm_weight(const T *weight, u8 *shared) {
    for (int i = threadIdx.x; i < K / 8; i += THREADS)
        *(uint4 *)(shared + AT_NORM + i * 16) = *(const uint4 *)(weight + i * 8);
}

// Rows of x into shared memory, with NORM normalised and rounded as the node on its own would.
DEVICE void load_x(const T *x, u8 *shared, int m) {
    Walk work = walk();
    int first = work.first_chunk * CHUNK;
    int pieces = work.chunks * (CHUNK / 8);
    // One row is read by all warps, more rows by a warp each.
    constexpr int STEP = X_ROWS == 1 ? THREADS : 32;
    int start = X_ROWS == 1 ? threadIdx.x : threadIdx.x % 32;
    for (int row = X_ROWS == 1 ? 0 : threadIdx.x / 32; row < min(m, X_ROWS); row += X_ROWS == 1 ? 1 : WARPS) {
        const T *from = x + (u64)row * K + first;
        u8 *to = shared + AT_X + row * X_PITCH;
        float sum = 0.0f;
#pragma unroll 4
        for (int i = start; i < pieces; i += STEP) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (K % CHUNK == 0 || first + i * 8 < K) v = load_fresh(from + i * 8);
            if (NORM) sum += square_sum(v);
            *(uint4 *)(to + i * 16) = v;
        }
        if (NORM) {
            if (X_ROWS == 1) {
                float *scratch = (float *)(shared + AT_SCRATCH);
                sum = warp_sum(sum);
                if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
                sync_warps();
                sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) sum += scratch[w];
            } else {
                sum = warp_sum(sum);
            }
            float scale = rsqrtf(sum * (1.0f / K) + EPS);
            for (int i = start; i < K / 8; i += STEP) {
                uint4 v = *(uint4 *)(to + i * 16), w = *(uint4 *)(shared + AT_NORM + i * 16);
                v.x = scaled2(v.x, scale, w.x);
                v.y = scaled2(v.y, scale, w.y);
                v.z = scaled2(v.z, scale, w.z);
                v.w = scaled2(v.w, scale, w.w);
                *(uint4 *)(to + i * 16) = v;
            }
        }
    }
    sync_warps();
}

// ---- multiplying ---------------------------------------------------------------------------------------------------

typedef float Sums[PAIRS][COLUMN_TILES][4];

// Adds the products of one stage. `columns`: those of the chunk that exist.
DEVICE void multiply(Sums &sums, u32 stage, u32 x, int columns) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int first = warp % WARPS_N * WARP_PANELS, part = warp / WARPS_N;
    u32 w_at = stage + first * PANEL_STAGE + (lane / 16) * 128 + lane % 8 * 16;
    // In a last pair of one panel the second half repeats the first; nobody reads those sums.
    int odd = lane / 8 % 2;
#pragma unroll
    for (int s = 0; s < SLABS / WARPS_K; ++s) {
        int slab = s * WARPS_K + part;
        if (K % CHUNK != 0 && slab * 32 >= columns) break;
        u32 b[COLUMN_TILES][4];
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
            int row = j * 8 + lane % 8, piece = slab * 4 + lane / 8;
            u32 at = WHOLE ? x + min(row, X_ROWS - 1) * X_PITCH + piece * 16
                           : x + row * CHUNK * 2 + (piece ^ (row & 7)) * 16;
            ldmatrix_x4(b[j], at);
        }
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            int panel = p * 2 + (p * 2 + 1 < WARP_PANELS ? odd : 0);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 a[4];
                ldmatrix_x4(a, w_at + panel * PANEL_STAGE + (slab * 4 + half * 2) * 128);
                if (K % 32 != 0) {
                    // Beyond K the stage holds anything, even numbers that are none.
                    int at = slab * 32 + half * 16;
                    if (at >= columns) a[0] = a[1] = 0;
                    if (at + 8 >= columns) a[2] = a[3] = 0;
                }
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; ++j)
                    mma_16x8x16<T>(sums[p][j], a[0], a[1], a[2], a[3], b[j][half * 2], b[j][half * 2 + 1]);
            }
        }
    }
}

DEVICE void keep_sums(const Sums &sums, float *to, int m) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int row = warp % WARPS_N * WARP_PANELS * 8 + lane / 4;
    to += warp / WARPS_N * SUM_STEP;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p)
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int column = j * 8 + lane % 4 * 2 + i % 2;
                if (column < m && p * 2 + i / 2 < WARP_PANELS)
                    to[column * SUM_PITCH + row + (p * 2 + i / 2) * 8] = sums[p][j][i];
            }
}

DEVICE float total(const float *sums, u32 shared, int row, int column) {
    int at = column * SUM_PITCH + row;
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < SPLIT; ++r)
#pragma unroll
        for (int k = 0; k < WARPS_K; ++k) {
#if ARCH >= 900
            if (SPLIT > 1) {
                sum += cluster_load(shared + AT_SUMS + (at + k * SUM_STEP) * 4, r);
                continue;
            }
#endif
            sum += sums[at + k * SUM_STEP];
        }
    return sum;
}

DEVICE void finish_tile(PARAMETERS, const float *sums, u32 shared, int tile, int m) {
    constexpr int FEATURES = GATED ? ROWS / 2 : ROWS;
    int rank = SPLIT == 1 ? 0 : blockIdx.x % SPLIT;
    for (int i = rank * THREADS + threadIdx.x; i < FEATURES * m; i += THREADS * SPLIT) {
        int feature = i % FEATURES, column = i / FEATURES;
        int row = GATED ? feature / 8 * 16 + feature % 8 : feature;
        int segment, at;
        if (!locate(tile * TILE + row / 8, row % 8, segment, at)) continue;
        float v = total(sums, shared, row, column);
        float u = GATED ? total(sums, shared, row + 8, column) : 0.0f;
        finish(ARGUMENTS, column, segment, at, v, u);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, BLOCKS)
    KERNEL(const T *x, const T *w, NORM_PARAMETER PARAMETERS, int m) {
    extern __shared__ __align__(128) u8 memory[];
    u32 shared = shared_address(memory);
    u32 full = shared + AT_BARRIERS, empty = full + STAGES * 8;
    int warp = threadIdx.x / 32;
    m = min(m, WHOLE ? X_ROWS : COLUMNS);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + s * 8, ARCH >= 900 ? (WHOLE ? 1 : 33) : 32);
            barrier_init(empty + s * 8, WARPS);
        }
#if ARCH >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    __syncthreads();
    if (warp == WARPS) {
        copy_all(x, w, shared, m);
    } else {
#if NORM_ON
        load_norm_weight(norm_weight, memory);
#endif
        wait_for_predecessor();
        if (WHOLE) load_x(x, memory, m);
        Walk work = walk();
        int stage = 0, round = 0;
        float *kept = (float *)(memory + AT_SUMS);
        for (int tile = work.tile; tile < TILES; tile += gridDim.x / SPLIT) {
            Sums sums = {};
            for (int c = 0; c < work.chunks; ++c) {
                barrier_wait(full + stage * 8, round & 1);
                u32 at = shared + stage * STAGE;
                multiply(sums, at, WHOLE ? shared + AT_X + c * CHUNK * 2 : at + W_STAGE,
                         K - (work.first_chunk + c) * CHUNK);
                __syncwarp();
                if (threadIdx.x % 32 == 0) barrier_arrive(empty + stage * 8);
                if (++stage == STAGES) stage = 0, ++round;
            }
            // Everyone has read the sums of the tile before, or the ring that they lie over.
            sync_warps();
            keep_sums(sums, kept, m);
            sync_warps();
            if (SPLIT == 1) finish_tile(ARGUMENTS, kept, shared, tile, m);
        }
    }
#if ARCH >= 900
    if (SPLIT > 1) {
        __syncthreads();
        cluster_sync();
        if (warp < WARPS) finish_tile(ARGUMENTS, (float *)(memory + AT_SUMS), shared, blockIdx.x / SPLIT, m);
        __syncthreads();
        cluster_sync();
    }
#endif
}
