// Attention of tiles of 32 query rows of one sequence and one head in plain f32 arithmetic. Each of four warps owns eight
// rows; 32 keys at a time go through shared memory. For scores a lane is a key, for sums it is a column of the result.

constexpr int WARPS = 4;
constexpr int OWN = 8;
constexpr int ROWS = WARPS * OWN;
constexpr int KEYS = 32;
constexpr int STRIDE = D + 4;
constexpr int COLUMNS = (D + 31) / 32;

// For heads of less than 16 elements and with a window the assembler would keep so few registers
// that it spills; one block is bound enough.
extern "C" __global__ void __launch_bounds__(WARPS * 32, D < 16 || WINDOW > 0 ? 1 : 0)
    KERNEL(const Element *q, const Element *k, const Element *v, const Starts *starts, PAGING_PARAMETERS Element *out,
           int b) {
    extern __shared__ __align__(16) float shared[];
    float *const queries = shared, *const keys_tile = queries + ROWS * D, *const values = keys_tile + KEYS * STRIDE;
    wait_for_predecessor();
    release_successor();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *const weights = values + KEYS * D + warp * OWN * KEYS;
    const int head = blockIdx.x, kv_head = head / GROUP;
    int sequence, tile;
    // Late tiles see the most keys and begin first.
    if (!tile_of<ROWS>(starts, b, (int)(gridDim.y - 1 - blockIdx.y), sequence, tile)) return;
    const int start = (int)starts[sequence], rows = (int)starts[sequence + 1] - start;
#if PAGED
    const int keys = (int)lens[sequence];
    const Table *pages = table + (i64)sequence * width;
#else
    const int keys = rows;
#endif
    const int first_row = tile * ROWS, count = min(ROWS, rows - first_row), first_position = keys - rows + first_row;
    const int key_end = CAUSAL ? first_position + count : keys;
    const int key_begin = WINDOW > 0 ? max(0, first_position + 1 - WINDOW) : 0;
    const i64 q_at = ((i64)(start + first_row) * HEADS + head) * D;
    for (int e = threadIdx.x; e < ROWS * D; e += WARPS * 32) {
        const int row = e / D, c = e % D;
        queries[e] = row < count ? to_f32(q[q_at + (i64)row * (HEADS * D) + c]) * SCALE : 0.0f;
    }

    float sums[OWN][COLUMNS], top[OWN], total[OWN];
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
        top[r] = -INFINITY_F32, total[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] = 0.0f;
    }
    for (int block = key_begin; block < key_end; block += KEYS) {
        __syncthreads();
        for (int e = threadIdx.x; e < KEYS * D; e += WARPS * 32) {
            const int row = e / D, c = e % D, key = block + row;
            float x = 0.0f, y = 0.0f;
            if (key < key_end) {
#if PAGED
                const i64 slot = (i64)pages[key / TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK;
#else
                const i64 slot = start + key;
#endif
                const i64 at = (slot * KV_HEADS + kv_head) * D + c;
                x = to_f32(k[at]), y = to_f32(v[at]);
            }
            keys_tile[row * STRIDE + c] = x;
            values[e] = y;
        }
        __syncthreads();

        float s[OWN];
#pragma unroll
        for (int r = 0; r < OWN; ++r) s[r] = 0.0f;
#pragma unroll 4
        for (int c = 0; c < D; c += 4) {
            const float4 x = *(const float4 *)(keys_tile + lane * STRIDE + c);
#pragma unroll
            for (int r = 0; r < OWN; ++r) {
                const float4 y = *(const float4 *)(queries + (warp * OWN + r) * D + c);
                s[r] = fmaf(x.x, y.x, s[r]), s[r] = fmaf(x.y, y.y, s[r]);
                s[r] = fmaf(x.z, y.z, s[r]), s[r] = fmaf(x.w, y.w, s[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < OWN; ++r) {
            const int key = block + lane, position = first_position + warp * OWN + r;
            const bool seen = key < key_end && (!CAUSAL || key <= position) && (WINDOW == 0 || key + WINDOW > position);
            const float score = seen ? s[r] : -INFINITY_F32;
            const float next = fmaxf(top[r], warp_max(score));
            const float base = next == -INFINITY_F32 ? 0.0f : next;
            const float shrink = expf(top[r] - base), weight = expf(score - base);
            total[r] = total[r] * shrink + weight;
            top[r] = next;
            weights[r * KEYS + lane] = weight;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) sums[r][c] *= shrink;
        }
        __syncwarp();
#pragma unroll 2
        for (int j = 0; j < KEYS; j += 4) {
            float4 w[OWN];
#pragma unroll
            for (int r = 0; r < OWN; ++r) w[r] = *(const float4 *)(weights + r * KEYS + j);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const int column = c * 32 + lane;
                const float *from = values + j * D + (D % 32 == 0 ? column : min(column, D - 1));
                const float x = from[0], y = from[D], z = from[2 * D], u = from[3 * D];
#pragma unroll
                for (int r = 0; r < OWN; ++r) {
                    sums[r][c] = fmaf(w[r].x, x, sums[r][c]), sums[r][c] = fmaf(w[r].y, y, sums[r][c]);
                    sums[r][c] = fmaf(w[r].z, z, sums[r][c]), sums[r][c] = fmaf(w[r].w, u, sums[r][c]);
                }
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < OWN; ++r) {
        const float sum = warp_sum(total[r]), factor = sum > 0.0f ? 1.0f / sum : 0.0f;
        const int row = warp * OWN + r;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const int column = c * 32 + lane;
            if (row < count && (D % 32 == 0 || column < D))
                out[q_at + (i64)row * (HEADS * D) + column] = from_f32<Element>(sums[r][c] * factor);
        }
    }
}
