// Matmul of many rows with `mma.sync`: D[BM x BN] tiles, warps of 64 x 64, a ring of STAGES stages filled by `cp.async`.
// Constants: K, PANELS, WARPS_M, WARPS_N, STAGES, GROUP (row tiles that are walked before the next columns).

constexpr int BM = 64 * WARPS_M, BN = 64 * WARPS_N, BK = 32;
constexpr int THREADS = WARPS_M * WARPS_N * 32;
constexpr int A_BYTES = BM * BK * 2, B_BYTES = BN * BK * 2, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int STEPS = (K + BK - 1) / BK;
//# tiled
// Column tiles of the launch, which has the panels [tile_first, tile_first + tile_count); the weight begins with the first.
#define TILES_N ((tile_count + BN / 8 - 1) / (BN / 8))
//# whole
constexpr int TILES_N = (PANELS + BN / 8 - 1) / (BN / 8);
//# end

// Activations in shared memory: rows of 64 bytes whose 16-byte units are permuted so that eight rows of one unit are in
// distinct banks.
DEVICE u32 a_slot(int row, int unit) { return row * 64 + ((unit ^ ((row >> 1) & 3)) << 4); }

//# tiled
DEVICE void load_stage(u32 at, const ELEMENT *x, const ELEMENT *w, int m, int row, int panel, int step,
                       int tile_count) {
//# whole
DEVICE void load_stage(u32 at, const ELEMENT *x, const ELEMENT *w, int m, int row, int panel, int step) {
//# end
#pragma unroll
    for (int i = threadIdx.x; i < BM * 4; i += THREADS) {
        const int r = i / 4, unit = i % 4, column = step * BK + unit * 8;
        const bool valid = row + r < m && column < K;
        copy_async(at + a_slot(r, unit), valid ? x + (i64)(row + r) * K + column : x, valid);
    }
#pragma unroll
    for (int i = threadIdx.x; i < BN * 4; i += THREADS) {
        const int p = i / 32, block = step * 4 + i % 32 / 8;
//# tiled
        const bool valid = panel + p < tile_count && block * 8 < K;
//# whole
        const bool valid = panel + p < PANELS && block * 8 < K;
//# end
        copy_async(at + A_BYTES + i * 16, valid ? w + ((i64)(panel + p) * (K / 8) + block) * 64 + i % 8 * 8 : w, valid);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    KERNEL(const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ w, int m, POINTER_PARAMETERS) {
    extern __shared__ __align__(128) u8 memory[];
    const u32 base = shared_address(memory);
    const Pointers pointers = POINTERS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp % WARPS_M, warp_n = warp / WARPS_M;
    const int row_tiles = (m + BM - 1) / BM;
    const int first = blockIdx.x / (GROUP * TILES_N) * GROUP;
    const int size = min(GROUP, row_tiles - first), within = blockIdx.x - first * TILES_N;
    const int row = (first + within % size) * BM, panel = within / size * (BN / 8);
    wait_for_predecessor();

    float acc[4][8][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[i][j][c] = 0.0f;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
//# tiled
        if (s < STEPS) load_stage(base + s * STAGE_BYTES, x, w, m, row, panel, s, tile_count);
//# whole
        if (s < STEPS) load_stage(base + s * STAGE_BYTES, x, w, m, row, panel, s);
//# end
        copy_async_commit();
    }

    // Activations of one half of a stage, 16 along k, are loaded while those of the other are multiplied, and weights two
    // panels ahead: two core matrices along k of each.
    u32 a[2][4][4], b[2][4];
    const int a_row = warp_m * 64 + lane % 16;
    const u32 b_first = A_BYTES + warp_n * 8 * 512 + lane / 16 * 512 + lane % 16 * 16;
    auto load_a = [&](int half, u32 at) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ldmatrix_x4(a[half][i], at + a_slot(a_row + i * 16, half * 2 + lane / 16));
    };
    auto load_b = [&](int slot, u32 at, int half, int pair) {
        ldmatrix_x4(b[slot], at + b_first + half * 256 + pair * 1024);
    };
    auto multiply = [&](int half, int pair) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                mma_16x8x16<ELEMENT>(acc[i][2 * pair + j], a[half][i][0], a[half][i][1], a[half][i][2], a[half][i][3],
                                     b[pair % 2][2 * j], b[pair % 2][2 * j + 1]);
    };
    copy_async_wait<STAGES - 2>();
    __syncthreads();
    load_a(0, base);
    load_b(0, base, 0, 0);
    int stage = 0;
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const u32 at = base + stage * STAGE_BYTES;
        // The stage of the step before is free: all warps have passed the barrier below.
        const int next = step + STAGES - 1;
        if (next < STEPS) {
            const int slot = stage == 0 ? STAGES - 1 : stage - 1;
//# tiled
            load_stage(base + slot * STAGE_BYTES, x, w, m, row, panel, next, tile_count);
//# whole
            load_stage(base + slot * STAGE_BYTES, x, w, m, row, panel, next);
//# end
        }
        copy_async_commit();
        if (++stage == STAGES) stage = 0;
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            if (pair == 0) load_a(1, at);
            load_b((pair + 1) % 2, at, (pair + 1) / 4, (pair + 1) % 4);
            multiply(0, pair);
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            if (pair < 3) {
                load_b((pair + 1) % 2, at, 1, pair + 1);
            } else {
                copy_async_wait<STAGES - 2>();
                __syncthreads();
                load_a(0, base + stage * STAGE_BYTES);
                load_b(0, base + stage * STAGE_BYTES, 0, 0);
            }
            multiply(1, pair);
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    release_successor();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        Ahead<8> ahead;
//# tiled
        ahead.begin(pointers, row + warp_m * 64 + i * 16, tile_first + panel + warp_n * 8, m);
        store_rows(acc[i], ahead, pointers, row + warp_m * 64 + i * 16, tile_first + panel + warp_n * 8, 0,
                   m, base + warp * SCRATCH);
//# whole
        ahead.begin(pointers, row + warp_m * 64 + i * 16, panel + warp_n * 8, m);
        store_rows(acc[i], ahead, pointers, row + warp_m * 64 + i * 16, panel + warp_n * 8, 0, m,
                   base + warp * SCRATCH);
//# end
    }
}
