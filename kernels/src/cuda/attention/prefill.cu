// Attention of tiles of query rows with an online softmax (Dao et al. 2022, Milakov and Gimelshein 2018).
//
// A block takes ROWS query rows of one sequence and one head; each of its warps owns MT * 16 of them. Keys and values go
// through two stages of shared memory, BN at a time, as rows with an odd number of 16-byte pieces, which keeps the
// matrix loads free of bank conflicts. Scores never leave registers.

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * MT * 16;
constexpr int DP = (D + 15) / 16 * 16;
constexpr int PIECES = DP / 8;
constexpr int STRIDE = (PIECES | 1) * 16;
constexpr int KV_BYTES = BN * STRIDE;
constexpr int RING = 4;

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    KERNEL(const Element *q, const Element *k, const Element *v, const Starts *starts, PAGING_PARAMETERS Element *out,
           int b) {
    extern __shared__ __align__(128) u8 shared[];
    wait_for_predecessor();
    release_successor();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
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
    const int past = keys - rows, first_row = tile * ROWS, count = min(ROWS, rows - first_row);
    const int first_position = past + first_row;
    const int key_end = CAUSAL ? first_position + count : keys;
    const int key_begin = WINDOW > 0 ? max(0, first_position + 1 - WINDOW) / BN * BN : 0;
    const int tiles = (key_end - key_begin + BN - 1) / BN;

    const u32 sq = shared_address(shared), sk = sq + ROWS * STRIDE, sv = sk + 2 * KV_BYTES;
    int *const slots = (int *)(shared + ROWS * STRIDE + 4 * KV_BYTES);

    // Cache slot of key `i` of a tile, by thread i.
    auto slot_of = [&](int number) -> int {
        const int key = min(key_begin + number * BN + (int)threadIdx.x, key_end - 1);
#if PAGED
        return (int)pages[key / TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK;
#else
        return start + key;
#endif
    };
    auto load_rows = [&](u32 to, const Element *from, int number) {
        const int *ring = slots + number % RING * BN;
        const int valid = key_end - key_begin - number * BN;
#pragma unroll 2
        for (int e = threadIdx.x; e < BN * PIECES; e += THREADS) {
            const int row = e / PIECES, piece = e % PIECES;
            const Element *at = from + (i64)ring[row] * (KV_HEADS * D) + piece * 8;
            copy_async(to + row * STRIDE + piece * 16, at, row < valid && (DP == D || piece * 8 < D));
        }
    };
    const Element *k_head = k + kv_head * D, *v_head = v + kv_head * D;

    if (threadIdx.x < BN) {
        slots[threadIdx.x] = slot_of(0);
        slots[BN + threadIdx.x] = slot_of(1);
    }
    const Element *q_head = q + ((i64)(start + first_row) * HEADS + head) * D;
    for (int e = threadIdx.x; e < ROWS * PIECES; e += THREADS) {
        const int row = e / PIECES, piece = e % PIECES;
        const bool valid = row < count && (DP == D || piece * 8 < D);
        copy_async(sq + row * STRIDE + piece * 16, q_head + (valid ? (i64)row * (HEADS * D) + piece * 8 : 0), valid);
    }
    __syncthreads();
    load_rows(sk, k_head, 0);
    load_rows(sv, v_head, 0);
    copy_async_commit();

    float o[MT][DP / 8][4];
    float top[MT][2], total[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int n = 0; n < DP / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
        top[m][0] = top[m][1] = -INFINITY_F32;
        total[m][0] = total[m][1] = 0.0f;
    }
    // What lanes add to a row-major tile to feed the matrix loads.
    const u32 q_at = sq + (warp * MT * 16 + lane % 16) * STRIDE + lane / 16 * 16;
    const u32 k_at = sk + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 16;
    const u32 v_at = sv + (lane % 16) * STRIDE + lane / 16 * 16;
    const int warp_row = first_position + warp * MT * 16;

    for (int number = 0; number < tiles; ++number) {
        const int block = key_begin + number * BN;
        int coming = 0;
        const bool ahead = number + 2 < tiles && threadIdx.x < BN;
        if (ahead) coming = slot_of(number + 2);
        copy_async_wait<0>();
        __syncthreads();
        if (number + 1 < tiles) {
            load_rows(sk + (number + 1) % 2 * KV_BYTES, k_head, number + 1);
            load_rows(sv + (number + 1) % 2 * KV_BYTES, v_head, number + 1);
        }
        copy_async_commit();
        if (ahead) slots[(number + 2) % RING * BN + threadIdx.x] = coming;
        const u32 k_stage = k_at + number % 2 * KV_BYTES, v_stage = v_at + number % 2 * KV_BYTES;

        float s[MT][BN / 8][4];
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int n = 0; n < BN / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
#pragma unroll
        for (int c = 0; c < DP / 16; ++c) {
            u32 a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; ++m) ldmatrix_x4(a[m], q_at + m * 16 * STRIDE + c * 32);
#pragma unroll
            for (int n = 0; n < BN / 16; ++n) {
                u32 f[4];
                ldmatrix_x4(f, k_stage + n * 16 * STRIDE + c * 32);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    mma_16x8x16<Element>(s[m][2 * n], a[m][0], a[m][1], a[m][2], a[m][3], f[0], f[1]);
                    mma_16x8x16<Element>(s[m][2 * n + 1], a[m][0], a[m][1], a[m][2], a[m][3], f[2], f[3]);
                }
            }
        }
        // Only tiles at the edge of what the rows see need a mask.
        const bool edge = block + BN > key_end || (CAUSAL && block + BN > first_position + 1) ||
                          (WINDOW > 0 && block + WINDOW <= first_position + ROWS);
        if (edge) {
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int n = 0; n < BN / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int key = block + n * 8 + 2 * t + i % 2, row = warp_row + m * 16 + g + i / 2 * 8;
                        const bool seen = key < key_end && (!CAUSAL || key <= row) && (WINDOW == 0 || key + WINDOW > row);
                        if (!seen) s[m][n][i] = -INFINITY_F32;
                    }
        }
        u32 p[MT][BN / 16][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float most = top[m][h];
#pragma unroll
                for (int n = 0; n < BN / 8; ++n) most = fmaxf(most, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                const float base = most == -INFINITY_F32 ? 0.0f : most * SCALE_LOG2;
                const float shrink = exp2_fast(fmaf(top[m][h], SCALE_LOG2, -base));
                top[m][h] = most;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < BN / 8; ++n) {
                    const float x = exp2_fast(fmaf(s[m][n][2 * h], SCALE_LOG2, -base));
                    const float y = exp2_fast(fmaf(s[m][n][2 * h + 1], SCALE_LOG2, -base));
                    sum += x + y;
                    p[m][n / 2][n % 2 * 2 + h] = pack2<Element>(x, y);
                }
                total[m][h] = total[m][h] * shrink + sum;
#pragma unroll
                for (int n = 0; n < DP / 8; ++n) o[m][n][2 * h] *= shrink, o[m][n][2 * h + 1] *= shrink;
            }
        }
#pragma unroll
        for (int c = 0; c < BN / 16; ++c) {
#pragma unroll
            for (int n = 0; n < DP / 16; ++n) {
                u32 f[4];
                ldmatrix_x4_trans(f, v_stage + c * 16 * STRIDE + n * 32);
#pragma unroll
                for (int m = 0; m < MT; ++m) {
                    mma_16x8x16<Element>(o[m][2 * n], p[m][c][0], p[m][c][1], p[m][c][2], p[m][c][3], f[0], f[1]);
                    mma_16x8x16<Element>(o[m][2 * n + 1], p[m][c][0], p[m][c][1], p[m][c][2], p[m][c][3], f[2], f[3]);
                }
            }
        }
    }

    // Through the warp's own rows of the query tile, which all lanes have read, to 16-byte stores.
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = total[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
            u8 *const to = shared + (warp * MT * 16 + m * 16 + g + 8 * h) * STRIDE + t * 4;
#pragma unroll
            for (int n = 0; n < DP / 8; ++n)
                *(u32 *)(to + n * 16) = pack2<Element>(o[m][n][2 * h] * factor, o[m][n][2 * h + 1] * factor);
        }
    __syncwarp();
    Element *const out_head = out + ((i64)(start + first_row) * HEADS + head) * D;
#pragma unroll
    for (int e = lane; e < MT * 16 * PIECES; e += 32) {
        const int row = warp * MT * 16 + e / PIECES, piece = e % PIECES;
        if (row < count && (DP == D || piece * 8 < D))
            *(uint4 *)(out_head + (i64)row * (HEADS * D) + piece * 8) =
                *(const uint4 *)(shared + row * STRIDE + piece * 16);
    }
}
