// y = epilogue(x w^T) for many rows in f32, the weight row by row: tiles of EDGE by EDGE, eight by eight sums a thread.
//
// DEPTH columns of x and of the weight are in shared memory, the next on their way through registers. Every sum adds its products
// in order of k. With a gated epilogue the second half of a tile's columns is the second segment's.
//
// Constants: K (a multiple of 4), FEATURES (columns of the results, all segments), GATED, EDGE. `weight_row` and `place` are
// those of `simple.cu`.
//# tiled
//
// A launch computes the slices [tile_first, tile_first + tile_count) of the weight along its axis 0, which are the columns
// from `slice_column(tile_first)` on, and `w` begins with the first of them; a slice has SLICE elements.
//# end

constexpr int DEPTH = 16, SIDE = EDGE / 8, THREADS = SIDE * SIDE, HALF = EDGE / 2, PITCH = EDGE + 4;
constexpr int COLUMNS = GATED ? HALF : EDGE;
// 16-byte pieces of each operand that a thread brings.
constexpr int PIECES = EDGE * DEPTH / 4 / THREADS;

typedef float Stage[DEPTH][PITCH];

DEVICE void keep(Stage &stage, int row, int k, const float4 &v) {
    stage[k][row] = v.x, stage[k + 1][row] = v.y, stage[k + 2][row] = v.z, stage[k + 3][row] = v.w;
}
DEVICE void take(float (&v)[8], const float (&row)[PITCH], int at) {
    const float4 a = *(const float4 *)&row[at], b = *(const float4 *)&row[HALF + at];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

extern "C" __global__ void __launch_bounds__(THREADS, EDGE == 128 ? 1 : 4) KERNEL(const T *x, const T *w, PARAMETERS, int m) {
    __shared__ __align__(16) Stage xs[2], ws[2];
    wait_for_predecessor();
    release_successor();
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE, row0 = blockIdx.y * EDGE;
//# tiled
    const int column0 = slice_column(tile_first) + blockIdx.x * COLUMNS, end = slice_column(tile_first + tile_count);
    w -= (i64)tile_first * SLICE;
//# whole
    const int column0 = blockIdx.x * COLUMNS, end = FEATURES;
//# end
    // What is outside of x and of the weight repeats their last rows; nobody keeps its sums.
    const T *from_x[PIECES], *from_w[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int at = threadIdx.x + i * THREADS, r = at / 4, k = at % 4 * 4, column = min(column0 + r % COLUMNS, end - 1);
        from_x[i] = x + (u64)min(row0 + r, m - 1) * K + k;
        from_w[i] = w + weight_row(column + (GATED ? r / COLUMNS * FEATURES : 0)) + k;
    }
    float4 next_x[PIECES], next_w[PIECES];
    auto fetch = [&](int k0) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            next_x[i] = next_w[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (K % DEPTH != 0 && k0 + (threadIdx.x + i * THREADS) % 4 * 4 >= K) continue;
            next_x[i] = *(const float4 *)(from_x[i] + k0), next_w[i] = *(const float4 *)(from_w[i] + k0);
        }
    };
    auto store = [&](int stage) {
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int at = threadIdx.x + i * THREADS;
            keep(xs[stage], at / 4, at % 4 * 4, next_x[i]);
            keep(ws[stage], at / 4, at % 4 * 4, next_w[i]);
        }
    };
    float sums[8][8] = {};
    fetch(0);
    store(0);
    __syncthreads();
    int stage = 0;
#pragma unroll 1
    for (int k0 = 0; k0 < K; k0 += DEPTH, stage ^= 1) {
        if (k0 + DEPTH < K) fetch(k0 + DEPTH);
#pragma unroll 1
        for (int k = 0; k < DEPTH; ++k) {
            float a[8], b[8];
            take(a, xs[stage][k], ty * 4);
            take(b, ws[stage][k], tx * 4);
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
        }
        if (k0 + DEPTH < K) store(stage ^ 1);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < (GATED ? 4 : 8); ++j) {
            const int row = row0 + i / 4 * HALF + ty * 4 + i % 4, column = column0 + j / 4 * HALF + tx * 4 + j % 4;
            if (row >= m || column >= end) continue;
            int segment, feature;
            place(column, segment, feature);
            finish(ARGUMENTS, row, segment, feature, sums[i][j], sums[i][GATED ? j + 4 : j]);
        }
}
