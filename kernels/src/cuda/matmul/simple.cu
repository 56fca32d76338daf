// y = epilogue(x w^T) by tiles of 64 by 64 with f32 arithmetic, for every type, layout and extent.
//
// Constants: K, FEATURES (columns of the results, all segments), GATED, T. `weight_row(c)` is where row c of the weight
// begins, `weight_step(k)` what to add for column k; `place(c, segment, feature)` names the result of column c.
//# tiled
//
// A launch computes the slices [tile_first, tile_first + tile_count) of the weight along its axis 0, which are the columns
// from `slice_column(tile_first)` on, and `w` begins with the first of them; a slice has SLICE elements.
//# end

constexpr int EDGE = 64, DEPTH = 16;

extern "C" __global__ void __launch_bounds__(256) KERNEL(const T *x, const T *w, PARAMETERS, int m) {
    __shared__ float xs[DEPTH][EDGE + 4], ws[1 + GATED][DEPTH][EDGE + 4];
    wait_for_predecessor();
    release_successor();
    int tid = threadIdx.x, tx = tid % 16, ty = tid / 16;
//# tiled
    int column0 = slice_column(tile_first) + blockIdx.x * EDGE, row0 = blockIdx.y * EDGE;
    int end = slice_column(tile_first + tile_count);
    w -= (i64)tile_first * SLICE;
//# whole
    int column0 = blockIdx.x * EDGE, row0 = blockIdx.y * EDGE;
//# end
    float sums[1 + GATED][4][4] = {};
    for (int k0 = 0; k0 < K; k0 += DEPTH) {
#pragma unroll
        for (int i = 0; i < EDGE * DEPTH / 256; ++i) {
            int k = k0 + tid % DEPTH, r = tid / DEPTH + i * (256 / DEPTH);
            bool inside = k < K;
            xs[tid % DEPTH][r] = inside && row0 + r < m ? to_f32(x[(u64)(row0 + r) * K + k]) : 0.0f;
#pragma unroll
            for (int g = 0; g <= GATED; ++g) {
                int column = column0 + r;
//# tiled
                ws[g][tid % DEPTH][r] = inside && column < end
//# whole
                ws[g][tid % DEPTH][r] = inside && column < FEATURES
//# end
                    ? to_f32(w[weight_row(column + g * FEATURES) + weight_step(k)]) : 0.0f;
            }
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < DEPTH; ++k) {
            float4 a = *(float4 *)&xs[k][ty * 4];
            float av[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
            for (int g = 0; g <= GATED; ++g) {
                float4 b = *(float4 *)&ws[g][k][tx * 4];
                float bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[g][i][j] = fmaf(av[i], bv[j], sums[g][i][j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int row = row0 + ty * 4 + i, column = column0 + tx * 4 + j;
//# tiled
            if (row >= m || column >= end) continue;
//# whole
            if (row >= m || column >= FEATURES) continue;
//# end
            int segment, feature;
            place(column, segment, feature);
            finish(ARGUMENTS, row, segment, feature, sums[0][i][j], sums[GATED][i][j]);
        }
}
