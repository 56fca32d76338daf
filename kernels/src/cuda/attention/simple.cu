// Attention of one query row and head by one warp: 32 keys at a time, a lane for each. Any head size and element type.

constexpr int WARPS = 4;
constexpr int COLUMNS = (D + 31) / 32;

// With a window the assembler would keep so few registers that it spills; one block is bound enough.
extern "C" __global__ void __launch_bounds__(WARPS * 32, WINDOW > 0 ? 1 : 0)
    KERNEL(const Element *q, const Element *k, const Element *v, const Starts *starts, PAGING_PARAMETERS Element *out,
           int t, int b) {
    __shared__ float queries[WARPS][D];
    wait_for_predecessor();
    release_successor();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 number = (i64)blockIdx.x * WARPS + warp;
    if (number >= (i64)t * HEADS) return;
    const int row = (int)(number / HEADS), head = (int)(number % HEADS), kv_head = head / GROUP;
    const int sequence = sequence_of(starts, b, row);
    const int start = (int)starts[sequence], rows = (int)starts[sequence + 1] - start;
#if PAGED
    const int keys = (int)lens[sequence];
    const Table *pages = table + (i64)sequence * width;
#else
    const int keys = rows;
#endif
    const int position = keys - rows + row - start;
    const int low = WINDOW > 0 ? max(0, position + 1 - WINDOW) : 0;
    const int high = CAUSAL ? position + 1 : keys;
    for (int c = lane; c < D; c += 32) queries[warp][c] = to_f32(q[number * D + c]) * SCALE;
    __syncwarp();

    float sums[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) sums[c] = 0.0f;
    float top = -INFINITY_F32, total = 0.0f;
    for (int block = low; block < high; block += 32) {
        const int key = block + lane;
        const bool valid = key < high;
        i64 at = 0;
        if (valid) {
#if PAGED
            const i64 slot = (i64)pages[key / TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK;
#else
            const i64 slot = start + key;
#endif
            at = (slot * KV_HEADS + kv_head) * D;
        }
        float score = -INFINITY_F32;
        if (valid) {
            float sum = 0.0f;
#pragma unroll 8
            for (int c = 0; c < D; ++c) sum = fmaf(queries[warp][c], to_f32(k[at + c]), sum);
            score = sum;
        }
        const float next = fmaxf(top, warp_max(score));
        const float base = next == -INFINITY_F32 ? 0.0f : next;
        const float shrink = expf(top - base);
        const float weight = valid ? expf(score - base) : 0.0f;
        total = total * shrink + weight;
        top = next;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sums[c] *= shrink;
        const int count = min(32, high - block);
#pragma unroll 4
        for (int j = 0; j < count; ++j) {
            const float w = __shfl_sync(0xffffffffu, weight, j);
            const i64 from = __shfl_sync(0xffffffffu, at, j);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const int column = c * 32 + lane;
                const float x = D % 32 == 0 || column < D ? to_f32(v[from + column]) : 0.0f;
                sums[c] = fmaf(w, x, sums[c]);
            }
        }
    }
    total = warp_sum(total);
    const float factor = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        const int column = c * 32 + lane;
        if (D % 32 == 0 || column < D) out[number * D + column] = from_f32<Element>(sums[c] * factor);
    }
}
