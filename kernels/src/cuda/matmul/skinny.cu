// y = epilogue(norm(x) w^T) for few rows of x; the weight in blocks of eight rows by eight columns.
//
// A block owns neighbouring tiles of TILE panels (eight weight rows each). One warp copies weights into a ring of STAGES
// buffers in shared memory, far ahead of the others and, on devices with overlapping launches, before the predecessor is
// done; the other warps multiply. The weight is the operand with 16 rows of the matrix instruction, x the one with 8
// columns. Warps divide the panels of a tile WARPS_N ways and the columns of a chunk WARPS_K ways; sums over warps are
// added in a fixed order.
//
// Constants: K, PANELS (of the weight), TILE, WARPS_N, WARPS_K, COLUMNS (most rows of x, a multiple of 8), CHUNK (columns
// of a stage, a multiple of 64), STAGES, WHOLE (x is in shared memory as a whole: X_ROWS rows, at most COLUMNS),
// NORM and EPS, AFTER (rows are multiplied with the norm's weight alone, and their results with what the mean of their
// squares tells), GATED, ALIAS (sums lie over the ring: each block has one tile), RELEASE (units before the last at which the
// successor may start), ROTATE (chunks by which neighbouring tiles are apart in their walk over K, so that blocks
// in step with each other read from different memory channels).
//# tiled
//
// A launch computes the panels [tile_first, tile_first + tile_count), and `w` begins with the first of them. Tiles are those
// of the whole weight all the same: a panel's walk over K, and with it every sum, is that of one launch over all panels.
//# end

constexpr int WARPS = WARPS_N * WARPS_K;
constexpr int THREADS = WARPS * 32;
constexpr int WARP_PANELS = TILE / WARPS_N;
constexpr int PAIRS = (WARP_PANELS + 1) / 2;
//# whole
constexpr int TILES = (PANELS + TILE - 1) / TILE;
//# end
constexpr int COLUMN_TILES = COLUMNS / 8;
constexpr int SLABS = CHUNK / 32;
constexpr int CHUNKS = (K + CHUNK - 1) / CHUNK;
constexpr int PANEL_STAGE = CHUNK * 16;
constexpr int W_STAGE = TILE * PANEL_STAGE;
constexpr int X_STAGE = WHOLE ? 0 : COLUMNS * CHUNK * 2;
constexpr int STAGE = W_STAGE + X_STAGE;
constexpr int RING = STAGES * STAGE;
constexpr int X_PITCH = CHUNKS * CHUNK * 2 + 16;
constexpr int X_BYTES = WHOLE ? X_ROWS * X_PITCH : 0;
constexpr int NORM_BYTES = NORM || AFTER ? (K * 2 + 15) / 16 * 16 : 0;
constexpr int ROWS = TILE * 8;
constexpr int SUM_PITCH = ROWS + 4;
constexpr int SUM_STEP = (WHOLE ? X_ROWS : COLUMNS) * SUM_PITCH;
constexpr int SUMS = WARPS_K * SUM_STEP;
constexpr int AT_X = RING;
constexpr int AT_NORM = AT_X + X_BYTES;
constexpr int AT_SUMS = ALIAS ? 0 : AT_NORM + NORM_BYTES;
constexpr int AT_BARRIERS = ALIAS ? AT_NORM + NORM_BYTES : AT_SUMS + SUMS * 4;
constexpr int AT_SCRATCH = AT_BARRIERS + STAGES * 16;
constexpr int AT_SQUARES = AT_SCRATCH + 128;
constexpr int SHARED = AT_SQUARES + (AFTER ? WARPS_K * COLUMNS * 4 : 0);
static_assert(TILE % WARPS_N == 0 && SLABS % WARPS_K == 0 && CHUNK % 64 == 0 && COLUMNS % 8 == 0, "shape of a block");
static_assert(!GATED || TILE % 2 == 0, "pairs of panels stay together");
static_assert(!AFTER || (!WHOLE && K % CHUNK == 0), "every column of x passes the ring");
static_assert(SHARED == EXPECTED_SHARED && (!ALIAS || SUMS * 4 <= RING), "shared memory");

// With the tensor memory unit the weight, and x where it is not whole, come as descriptors.
#if ARCH >= 900
struct __align__(64) Map { u64 words[16]; };
#define WEIGHT_TYPE const Map &
#define WEIGHT_PARAMETER const __grid_constant__ Map
#else
#define WEIGHT_TYPE const T *
#define WEIGHT_PARAMETER const T *
#endif
#if ARCH >= 900 && !WHOLE_ON
#define X_TYPE const Map &
#define X_PARAMETER const __grid_constant__ Map
#else
#define X_TYPE const T *
#define X_PARAMETER const T *
#endif

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
// Boxes of a tensor map into shared memory; coordinates innermost first.
DEVICE void copy_box(u32 shared, const Map *map, int c0, int c1, int c2, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared), "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier),
                 "l"(policy)
                 : "memory");
}
DEVICE void copy_box(u32 shared, const Map *map, int c0, int c1, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared), "l"(map), "r"(c0), "r"(c1), "r"(barrier)
                 : "memory");
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

// In front of loops of the warp that copies. Unrolled they are an eighth of the time to compile, and what was measured on Hopper.
#if ARCH == 900
#define ROLLED
#else
#define ROLLED _Pragma("unroll 1")
#endif

// A position in the work of a block: the chunks of K of its tiles, tile after tile.
struct Cursor {
    int tile, step;
    DEVICE void next() {
        if (++step == CHUNKS) step = 0, ++tile;
    }
    DEVICE int chunk() const { return (step + tile * ROTATE) % CHUNKS; }
};
//# tiled
// Tiles of a block: [first_tile(b), first_tile(b + 1)) of those that have panels of the launch.
DEVICE int first_tile(int block, int tile_first, int tile_count) {
    int first = tile_first / TILE, tiles = (tile_first + tile_count + TILE - 1) / TILE - first, blocks = gridDim.x;
    return first + tiles / blocks * block + min(block, tiles % blocks);
}
//# whole
// Tiles of a block: [first_tile(b), first_tile(b + 1)).
DEVICE int first_tile(int block) {
    int blocks = gridDim.x;
    return TILES / blocks * block + min(block, TILES % blocks);
}
//# end

#if ARCH >= 900
//# tiled
DEVICE void copy_weights(WEIGHT_TYPE w, u32 stage, u32 full, int tile, int chunk, u64 policy, int tile_first, int) {
    barrier_expect(full, STAGE);
    // Panels before the first are zeros like those behind the last.
    copy_box(stage, &w, 0, chunk * (CHUNK / 8), tile * TILE - tile_first, full, policy);
}
//# whole
DEVICE void copy_weights(WEIGHT_TYPE w, u32 stage, u32 full, int tile, int chunk, u64 policy) {
    barrier_expect(full, STAGE);
    copy_box(stage, &w, 0, chunk * (CHUNK / 8), tile * TILE, full, policy);
}
//# end
DEVICE void copy_x(X_TYPE x, u32 stage, u32 full, int chunk, int m) {
#if !WHOLE_ON
#pragma unroll
    for (int i = 0; i < CHUNK / 64; ++i)
        copy_box(stage + W_STAGE + i * COLUMNS * 128, &x, chunk * CHUNK + i * 64, 0, full);
#endif
}
#else
//# tiled
DEVICE void copy_weights(WEIGHT_TYPE w, u32 stage, u32 full, int tile, int chunk, u64 policy, int tile_first,
                         int tile_count) {
    // Panels of the tile that come before the launch's.
    const int before = tile_first - tile * TILE;
    const u8 *from = (const u8 *)w - (i64)before * K * 16 + (u64)chunk * PANEL_STAGE;
//# whole
DEVICE void copy_weights(WEIGHT_TYPE w, u32 stage, u32 full, int tile, int chunk, u64 policy) {
    const u8 *from = (const u8 *)w + (u64)tile * TILE * K * 16 + (u64)chunk * PANEL_STAGE;
//# end
    int bytes = K % CHUNK == 0 ? PANEL_STAGE : min(CHUNK, K - chunk * CHUNK) * 16;
//# tiled
    for (int p = max(0, before); p < min(TILE, before + tile_count); ++p)
//# whole
    for (int p = 0; p < min(TILE, PANELS - tile * TILE); ++p)
//# end
        for (int at = threadIdx.x % 32 * 16; at < PANEL_STAGE; at += 512)
            copy_async(stage + p * PANEL_STAGE + at, from + (u64)p * K * 16 + (at < bytes ? at : 0), at < bytes);
}
DEVICE void copy_x(X_TYPE x, u32 stage, u32 full, int chunk, int m) {
    constexpr int PIECES = CHUNK / 8;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < m * PIECES && !WHOLE; i += 32) {
        int row = i / PIECES, piece = i % PIECES;
        bool valid = K % CHUNK == 0 || chunk * CHUNK + piece * 8 < K;
        copy_async(stage + W_STAGE + piece / 8 * COLUMNS * 128 + row * 128 + (piece % 8 ^ row % 8) * 16,
                   x + (u64)row * K + (valid ? chunk * CHUNK + piece * 8 : 0), valid);
    }
    barrier_arrive_after_copies(full);
}
#endif

//# tiled
DEVICE void copy_all(X_TYPE x, WEIGHT_TYPE w, u32 shared, int m, int tile_first, int tile_count) {
//# whole
DEVICE void copy_all(X_TYPE x, WEIGHT_TYPE w, u32 shared, int m) {
//# end
    if (ARCH >= 900 && threadIdx.x % 32 != 0) return;
//# tiled
    int first = first_tile(blockIdx.x, tile_first, tile_count);
    int units = (first_tile(blockIdx.x + 1, tile_first, tile_count) - first) * CHUNKS;
//# whole
    int first = first_tile(blockIdx.x), units = (first_tile(blockIdx.x + 1) - first) * CHUNKS;
//# end
    u64 policy = 0;
#if ARCH >= 900
    policy = evict_first_policy();
#endif
    u32 full = shared + AT_BARRIERS, empty = full + STAGES * 8;
    int release = max(0, units - 1 - RELEASE);
    int ahead = min(units, STAGES);
    Cursor at = {first, 0};
    ROLLED
    for (int u = 0; u < ahead; ++u) {
//# tiled
        copy_weights(w, shared + u * STAGE, full + u * 8, at.tile, at.chunk(), policy, tile_first, tile_count);
//# whole
        copy_weights(w, shared + u * STAGE, full + u * 8, at.tile, at.chunk(), policy);
//# end
        if (u == release) release_successor();
        at.next();
    }
    if (!WHOLE || ARCH < 900) {
        if (!WHOLE) wait_for_predecessor();
        Cursor early = {first, 0};
        ROLLED
        for (int u = 0; u < ahead; ++u) {
            copy_x(x, shared + u * STAGE, full + u * 8, early.chunk(), m);
            early.next();
        }
    }
    int stage = 0, round = 0;
    ROLLED
    for (int u = ahead; u < units; ++u) {
        barrier_wait(empty + stage * 8, round & 1);
//# tiled
        copy_weights(w, shared + stage * STAGE, full + stage * 8, at.tile, at.chunk(), policy, tile_first,
                     tile_count);
//# whole
        copy_weights(w, shared + stage * STAGE, full + stage * 8, at.tile, at.chunk(), policy);
//# end
        if (!WHOLE || ARCH < 900) copy_x(x, shared + stage * STAGE, full + stage * 8, at.chunk(), m);
        if (u == release) release_successor();
        at.next();
        if (++stage == STAGES) stage = 0, ++round;
    }
#if ARCH < 900
    copy_async_commit();
    copy_async_wait<0>();
#endif
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
    constexpr int PIECES = CHUNKS * (CHUNK / 8);
    // One row is read by all warps, more rows by a warp each.
    constexpr int STEP = X_ROWS == 1 ? THREADS : 32;
    int start = X_ROWS == 1 ? threadIdx.x : threadIdx.x % 32;
    // A single row passes a barrier between its sum and the norm's weight.
    if (NORM && X_ROWS > 1) sync_warps();
    for (int row = X_ROWS == 1 ? 0 : threadIdx.x / 32; row < min(m, X_ROWS); row += X_ROWS == 1 ? 1 : WARPS) {
        const T *from = x + (u64)row * K;
        u8 *to = shared + AT_X + row * X_PITCH;
        float sum = 0.0f;
#pragma unroll 8
        for (int i = start; i < PIECES; i += STEP) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (K % CHUNK == 0 || i * 8 < K) v = load_fresh(from + i * 8);
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
// Sums of squares of the rows of x that a warp counts: the warps that share columns divide the rows.
typedef float Squares[COLUMN_TILES];

// Products of two pairs, each rounded.
template <typename E> DEVICE u32 product2(u32 a, u32 b);
template <> DEVICE u32 product2<bf16>(u32 a, u32 b) {
    u32 out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
    return out;
}
template <> DEVICE u32 product2<f16>(u32 a, u32 b) {
    u32 out;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

// Adds the products of one stage. `columns`: those of the chunk that exist; `norm`: the norm's weight for them.
DEVICE void multiply(Sums &sums, Squares &squares, u32 stage, u32 x, int columns, const u8 *norm) {
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
                           : x + piece / 8 * COLUMNS * 128 + row * 128 + (piece % 8 ^ row % 8) * 16;
            ldmatrix_x4(b[j], at);
        }
        if (AFTER) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 weight = *(const u32 *)(norm + (slab * 32 + i * 8 + lane % 4 * 2) * 2);
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; ++j) {
                    if (j % WARPS_N == warp % WARPS_N) {
                        const float2 v = unpack2<T>(b[j][i]);
                        squares[j] = fmaf(v.x, v.x, fmaf(v.y, v.y, squares[j]));
                    }
                    b[j][i] = product2<T>(b[j][i], weight);
                }
            }
        }
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            int panel = p * 2 + (p * 2 + 1 < WARP_PANELS ? odd : 0);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 a[4];
                ldmatrix_x4(a, w_at + panel * PANEL_STAGE + (slab * 4 + half * 2) * 128);
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

// The squares of a tile's walk to where `scale_of` finds them.
DEVICE void keep_squares(const Squares &squares, u8 *shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *to = (float *)(shared + AT_SQUARES) + warp / WARPS_N * COLUMNS;
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
        float sum = squares[j];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (j % WARPS_N == warp % WARPS_N && lane % 4 == 0) to[j * 8 + lane / 4] = sum;
    }
}

// What a row's products are multiplied with.
DEVICE float scale_of(const u8 *shared, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS_K; ++k) sum += ((const float *)(shared + AT_SQUARES))[k * COLUMNS + row];
    return rsqrtf(sum * (1.0f / K) + EPS);
}

DEVICE float total(const float *sums, int row, int column) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS_K; ++k) sum += sums[k * SUM_STEP + column * SUM_PITCH + row];
    return sum;
}

constexpr int FEATURES = GATED ? ROWS / 2 : ROWS;

// Feature number i of a tile: its first row there, and its place in the results.
DEVICE bool feature_of(int tile, int i, int &row, int &segment, int &at) {
    row = GATED ? i / 8 * 16 + i % 8 : i;
    return locate(tile * TILE + row / 8, row % 8, segment, at);
}

//# tiled
// Whether all panels of a tile are of the launch.
DEVICE bool whole_tile(int tile, int tile_first, int tile_count) {
    int before = tile * TILE - tile_first;
    return before >= 0 && before + TILE <= tile_count;
}
// Whether feature number i of a tile is made of panels of the launch.
DEVICE bool launched(int tile, int i, int tile_first, int tile_count) {
    return (u32)(tile * TILE + (GATED ? i / 8 * 2 : i / 8) - tile_first) < (u32)tile_count;
}

//# end
// Brings what the steps before the store read near, while the sums are still being made.
DEVICE void touch_tile(PARAMETERS, int tile, int m) {
//# tiled
    const bool whole = whole_tile(tile, tile_first, tile_count);
//# end
    for (int i = threadIdx.x; i < FEATURES * m; i += THREADS) {
        int row, segment, at;
//# tiled
        if (!whole && !launched(tile, i % FEATURES, tile_first, tile_count)) continue;
//# end
        if (feature_of(tile, i % FEATURES, row, segment, at)) touch(ARGUMENTS, i / FEATURES, segment, at);
    }
}

DEVICE void finish_tile(PARAMETERS, const float *sums, const u8 *shared, int tile, int m) {
//# tiled
    const bool whole = whole_tile(tile, tile_first, tile_count);
//# end
    for (int i = threadIdx.x; i < FEATURES * m; i += THREADS) {
        int row, segment, at, column = i / FEATURES;
//# tiled
        if (!whole && !launched(tile, i % FEATURES, tile_first, tile_count)) continue;
//# end
        if (!feature_of(tile, i % FEATURES, row, segment, at)) continue;
        float v = total(sums, row, column);
        float u = GATED ? total(sums, row + 8, column) : 0.0f;
        if (AFTER) {
            const float scale = scale_of(shared, column);
            v *= scale, u *= scale;
        }
        finish(ARGUMENTS, column, segment, at, v, u);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    KERNEL(X_PARAMETER x, WEIGHT_PARAMETER w, NORM_PARAMETER PARAMETERS, int m) {
    extern __shared__ __align__(1024) u8 memory[];
    u32 shared = shared_address(memory);
    u32 full = shared + AT_BARRIERS, empty = full + STAGES * 8;
    int warp = threadIdx.x / 32;
    m = min(m, WHOLE ? X_ROWS : COLUMNS);
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + s * 8, ARCH >= 900 ? 1 : 32);
            barrier_init(empty + s * 8, WARPS);
        }
#if ARCH >= 900
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    __syncthreads();
    if (warp == WARPS) {
//# tiled
        copy_all(x, w, shared, m, tile_first, tile_count);
//# whole
        copy_all(x, w, shared, m);
//# end
    } else {
#if NORM_ON
        load_norm_weight(norm_weight, memory);
        if (AFTER) sync_warps();
#endif
        wait_for_predecessor();
#if WHOLE_ON
        load_x(x, memory, m);
#endif
        int stage = 0, round = 0;
        float *kept = (float *)(memory + AT_SUMS);
//# tiled
        const int end = first_tile(blockIdx.x + 1, tile_first, tile_count);
        for (int tile = first_tile(blockIdx.x, tile_first, tile_count); tile < end; ++tile) {
//# whole
        for (int tile = first_tile(blockIdx.x), end = first_tile(blockIdx.x + 1); tile < end; ++tile) {
//# end
            Sums sums = {};
            Squares squares = {};
            if (TOUCH) touch_tile(ARGUMENTS, tile, m);
            for (Cursor at = {tile, 0}; at.tile == tile; at.next()) {
                int chunk = at.chunk();
                barrier_wait(full + stage * 8, round & 1);
                u32 w_at = shared + stage * STAGE;
                u32 x_at = WHOLE ? shared + AT_X + chunk * CHUNK * 2 : w_at + W_STAGE;
                multiply(sums, squares, w_at, x_at, K - chunk * CHUNK, memory + AT_NORM + chunk * CHUNK * 2);
                __syncwarp();
                if (threadIdx.x % 32 == 0) barrier_arrive(empty + stage * 8);
                if (++stage == STAGES) stage = 0, ++round;
            }
            // Everyone has read the sums of the tile before, or the ring that they lie over.
            sync_warps();
            keep_sums(sums, kept, m);
            if (AFTER) keep_squares(squares, memory);
            sync_warps();
            finish_tile(ARGUMENTS, kept, memory, tile, m);
        }
    }
}
