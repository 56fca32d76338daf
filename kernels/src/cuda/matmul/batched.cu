// c[.., m, n] = a[.., m, k] b[.., k, n] by tiles of 64 by 64 with f32 arithmetic; leading axes broadcast.
//
// Constants: T, OUT, TRANSPOSED (b is [.., n, k]). `offsets(batch, EXTENTS, a, b)` gives the matrices that `batch`
// reads, counted in matrices.

constexpr int EDGE = 64, DEPTH = 16;

extern "C" __global__ void __launch_bounds__(256) KERNEL(const T *a, const T *b, OUT *c, int m, int n, int k EXTENTS) {
    __shared__ float as[DEPTH][EDGE + 4], bs[DEPTH][EDGE + 4];
    wait_for_predecessor();
    release_successor();
    int tiles = (n + EDGE - 1) / EDGE;
    int batch = blockIdx.x / tiles;
    int tid = threadIdx.x, tx = tid % 16, ty = tid / 16;
    int column0 = blockIdx.x % tiles * EDGE, row0 = blockIdx.y * EDGE;
    u64 a_matrix, b_matrix;
    offsets(batch, a_matrix, b_matrix EXTENT_NAMES);
    a += a_matrix * m * k;
    b += b_matrix * n * k;
    c += (u64)batch * m * n;
    float sums[4][4] = {};
    for (int k0 = 0; k0 < k; k0 += DEPTH) {
#pragma unroll
        for (int i = 0; i < EDGE * DEPTH / 256; ++i) {
            int l = k0 + tid % DEPTH, r = tid / DEPTH + i * (256 / DEPTH);
            as[tid % DEPTH][r] = l < k && row0 + r < m ? to_f32(a[(u64)(row0 + r) * k + l]) : 0.0f;
            if (TRANSPOSED) {
                bs[tid % DEPTH][r] = l < k && column0 + r < n ? to_f32(b[(u64)(column0 + r) * k + l]) : 0.0f;
            } else {
                int l2 = k0 + tid / EDGE + i * (256 / EDGE), r2 = tid % EDGE;
                bs[tid / EDGE + i * (256 / EDGE)][r2] =
                    l2 < k && column0 + r2 < n ? to_f32(b[(u64)l2 * n + column0 + r2]) : 0.0f;
            }
        }
        __syncthreads();
#pragma unroll
        for (int l = 0; l < DEPTH; ++l) {
            float4 p = *(float4 *)&as[l][ty * 4], q = *(float4 *)&bs[l][tx * 4];
            float pv[4] = {p.x, p.y, p.z, p.w}, qv[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(pv[i], qv[j], sums[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int row = row0 + ty * 4 + i, column = column0 + tx * 4 + j;
            if (row < m && column < n) c[(u64)row * n + column] = from_f32<OUT>(sums[i][j]);
        }
}
