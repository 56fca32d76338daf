// Attention of single rows over a paged cache in plain f32 arithmetic, split over the sequence; any element type.
//
// A block takes a range of keys for the query heads of one key head. LANES lanes hold a key, four columns in each of PIECES
// pieces, so that a warp has GROUPS keys at a time and DEPTH times as many on their way. Every group of lanes keeps maximum, sum
// and result of its own keys; groups, then warps, then ranges are joined in a fixed order.

constexpr int GROUPS = 32 / LANES;
constexpr int STEP = WARPS * GROUPS;
constexpr int PIECES = (D / 4 + LANES - 1) / LANES;

DEVICE float4 load4(const float *at) {
    float4 v;
    asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(at));
    return v;
}
template <typename E> DEVICE float4 load4(const E *at) {
    u32 low, high;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "l"(at));
    const float2 a = unpack2<E>(low), b = unpack2<E>(high);
    return make_float4(a.x, a.y, b.x, b.y);
}
DEVICE float dot(const float4 &a, const float4 &b, float sum) {
    return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}
DEVICE void scale(float4 &v, float factor) { v.x *= factor, v.y *= factor, v.z *= factor, v.w *= factor; }
DEVICE float shuffle(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
// A maximum to subtract: nothing was seen where it is minus infinity.
DEVICE float base_of(float most) { return most == -INFINITY_F32 ? 0.0f : most; }

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    KERNEL(const Element *q, const Element *k, const Element *v, const Starts *starts, const Lens *lens, const Table *table,
           Element *out, float *partials, u32 *counters, int b, int width) {
    __shared__ __align__(16) float sums[WARPS][HEAD_BLOCK][D];
    __shared__ float2 states[WARPS][HEAD_BLOCK];
    __shared__ u32 arrived;
    wait_for_predecessor();
    release_successor();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, member = lane % LANES;
    const int kv_head = blockIdx.y / HEAD_BLOCKS, first_head = blockIdx.y % HEAD_BLOCKS * HEAD_BLOCK;
    const int heads = min(HEAD_BLOCK, GROUP - first_head), row = blockIdx.z;
    const i64 out_at = ((i64)row * HEADS + kv_head * GROUP + first_head) * D;
    const int sequence = sequence_of(starts, b, row);
    const int last = (int)lens[sequence] - (int)starts[sequence + 1] + row + 1;
    const int low = WINDOW > 0 ? max(0, last - WINDOW) : 0, span = last - low;
    const int chunk = max(MIN_CHUNK, ((span + (int)gridDim.x - 1) / (int)gridDim.x + STEP - 1) / STEP * STEP);
    const int parts = (span + chunk - 1) / chunk, part = blockIdx.x;
    if (part >= parts) return;
    const int begin = low + part * chunk, end = min(last, begin + chunk);
    const Table *pages = table + (i64)sequence * width;

    float4 queries[HEAD_BLOCK][PIECES], acc[HEAD_BLOCK][PIECES];
    float top[HEAD_BLOCK], total[HEAD_BLOCK];
#pragma unroll
    for (int h = 0; h < HEAD_BLOCK; ++h) {
        top[h] = -INFINITY_F32, total[h] = 0.0f;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int column = (member + p * LANES) * 4;
            queries[h][p] = acc[h][p] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (h < heads && column < D) queries[h][p] = load4(q + out_at + h * D + column);
            scale(queries[h][p], SCALE_LOG2);
        }
    }
#pragma unroll 1
    for (int first = begin + warp * GROUPS + lane / LANES; first - lane / LANES < end; first += DEPTH * STEP) {
        float4 keys[DEPTH][PIECES], values[DEPTH][PIECES];
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            // What is behind the end repeats its last key, and counts for nothing below.
            const int key = min(first + i * STEP, end - 1);
            const i64 slot = (i64)pages[key / TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK;
            const i64 at = (slot * KV_HEADS + kv_head) * D;
#pragma unroll
            for (int p = 0; p < PIECES; ++p) {
                const int column = (member + p * LANES) * 4;
                keys[i][p] = values[i][p] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (D % (LANES * 4) == 0 || column < D) keys[i][p] = load4(k + at + column), values[i][p] = load4(v + at + column);
            }
        }
#pragma unroll
        for (int h = 0; h < HEAD_BLOCK; ++h) {
            float score[DEPTH], most = top[h];
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                score[i] = 0.0f;
#pragma unroll
                for (int p = 0; p < PIECES; ++p) score[i] = dot(queries[h][p], keys[i][p], score[i]);
#pragma unroll
                for (int mask = LANES / 2; mask > 0; mask /= 2) score[i] += shuffle(score[i], mask);
                if (first + i * STEP >= end) score[i] = -INFINITY_F32;
                most = fmaxf(most, score[i]);
            }
            const float base = base_of(most), shrink = exp2f(top[h] - base);
            top[h] = most, total[h] *= shrink;
#pragma unroll
            for (int p = 0; p < PIECES; ++p) scale(acc[h][p], shrink);
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                const float weight = exp2f(score[i] - base);
                total[h] += weight;
#pragma unroll
                for (int p = 0; p < PIECES; ++p) add(acc[h][p], values[i][p], weight);
            }
        }
    }

    // Join the groups of a warp, then the warps.
#pragma unroll
    for (int h = 0; h < HEAD_BLOCK; ++h) {
        float most = top[h];
#pragma unroll
        for (int mask = LANES; mask < 32; mask *= 2) most = fmaxf(most, shuffle(most, mask));
        const float factor = exp2f(top[h] - base_of(most));
        float all = total[h] * factor;
#pragma unroll
        for (int mask = LANES; mask < 32; mask *= 2) all += shuffle(all, mask);
        if (lane == 0) states[warp][h] = make_float2(most, all);
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            float4 sum = acc[h][p];
            scale(sum, factor);
#pragma unroll
            for (int mask = LANES; mask < 32; mask *= 2)
                sum.x += shuffle(sum.x, mask), sum.y += shuffle(sum.y, mask), sum.z += shuffle(sum.z, mask), sum.w += shuffle(sum.w, mask);
            const int column = (member + p * LANES) * 4;
            if (lane < LANES && column < D) *(float4 *)&sums[warp][h][column] = sum;
        }
    }
    __syncthreads();
    const i64 cell = (i64)row * gridDim.y + blockIdx.y;
    float *const all_parts = partials + cell * gridDim.x * PART, *const mine = all_parts + part * PART;
    for (int e = threadIdx.x; e < heads * (D / 4); e += WARPS * 32) {
        const int head = e / (D / 4), column = e % (D / 4) * 4;
        float most = -INFINITY_F32, all = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, states[w][head].x);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = exp2f(states[w][head].x - base_of(most));
            add(sum, *(const float4 *)&sums[w][head][column], factor);
            all = fmaf(states[w][head].y, factor, all);
        }
        if (parts == 1) {
            store(out + out_at + head * D + column, sum, 1.0f / all);
        } else {
            *(float4 *)(mine + STATE + head * D + column) = sum;
            if (column == 0) *(float2 *)(mine + 2 * head) = make_float2(most, all);
        }
    }
    if (parts == 1) return;
    // The last block to arrive joins the parts of its row and heads.
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = arrive(counters + cell);
        if (arrived == parts - 1) counters[cell] = 0;
    }
    __syncthreads();
    if (arrived == parts - 1) join_parts<FEW_PARTS>(all_parts, parts, 0, heads, out + out_at);
}
