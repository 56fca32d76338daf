// Attention of single rows over a paged cache, split over the sequence.
//
// A block takes a range of keys for the query heads of one key head; its warps take tiles of 16 keys in turn. Scores are
// computed transposed: S^T[16 keys, 8 heads] = K Q^T and O^T[D, 8 heads] += V^T P^T, so that few heads fill the tensor
// core. Keys and values go from global memory into the fragments of the matrix instruction directly: the order of a
// product's terms is free, so a lane's 16 contiguous bytes may stand for any columns, if both operands agree.
// Each block leaves maximum, sum and unscaled result of its range in the workspace; the last block of a row and
// key head to arrive joins them in order of the ranges.

constexpr int WARPS = 4;
constexpr int TILE = 16;
constexpr int STEP = WARPS * TILE;
constexpr int NT = (HEAD_BLOCK + 7) / 8;  // tiles of 8 heads
constexpr int KR = (D + 31) / 32;         // 16-byte pieces of a key row that a lane holds
constexpr int VR = (D + 63) / 64;         // 16-byte pieces of a value row that a lane holds
constexpr int PAD = D + 4;
constexpr bool AHEAD = D <= 128;           // registers hold the next tile while this one is used

// 16 bytes that are read once, zeros where `valid` is false.
DEVICE uint4 load_valid(const void *at, bool valid) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(at), "r"((u32)valid));
    return v;
}

// Transposes an 8x8 matrix of 16-bit elements over the warp.
DEVICE u32 transpose(u32 v) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
    return out;
}

DEVICE u32 word(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Cache slots of the keys of a tile that a lane reads. If pages hold whole tiles one lookup serves all.
struct Slots {
    const Table *pages;

    DEVICE i64 of(int key) const {
        return (i64)pages[key / TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK;
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    KERNEL(const Element *q, const Element *k, const Element *v, const Starts *starts, const Lens *lens,
           const Table *table, Element *out, float *partials, u32 *counters, int b, int width) {
    constexpr int HEADS_SHARED = NT * 8;
    __shared__ float sums[WARPS * HEADS_SHARED * PAD > HEADS_SHARED * MAX_SPLITS ? WARPS * HEADS_SHARED * PAD
                                                                                 : HEADS_SHARED * MAX_SPLITS];
    __shared__ float tops[WARPS][HEADS_SHARED], totals[WARPS][HEADS_SHARED];
    __shared__ u32 arrived;
    wait_for_predecessor();
    release_successor();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int kv_head = blockIdx.x / HEAD_BLOCKS, first_head = blockIdx.x % HEAD_BLOCKS * HEAD_BLOCK;
    const int heads = min(HEAD_BLOCK, GROUP - first_head);
    const int row = blockIdx.y;
    const int sequence = sequence_of(starts, b, row);
    const int position = (int)lens[sequence] - (int)starts[sequence + 1] + row;
    const Slots slots{table + (i64)sequence * width};

    // The range of keys of this block: equal parts of what the row sees, in whole steps of the block.
    const int last = position + 1, low = WINDOW > 0 ? max(0, last - WINDOW) : 0;
    const int aligned = low / TILE * TILE;
    const int part = (last - aligned + (int)gridDim.z - 1) / (int)gridDim.z;
    const int chunk = max(MIN_CHUNK, (part + STEP - 1) / STEP * STEP);
    const int used = (last - aligned + chunk - 1) / chunk;
    if ((int)blockIdx.z >= used) return;
    const int begin = aligned + blockIdx.z * chunk, end = min(last, begin + chunk);

    const i64 out_at = ((i64)row * HEADS + kv_head * GROUP + first_head) * D;
    const i64 row_stride = (i64)KV_HEADS * D;
    const Element *k_head = k + kv_head * D + t * 8, *v_head = v + kv_head * D + g * 8;

    uint4 kf[2][KR], vf[4][VR];
    // Slots of the lane's rows: keys g and g + 8, values 2t, 2t + 1, 2t + 8, 2t + 9.
    auto load_k = [&](int tile, i64 base) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int key = tile + g + 8 * h;
            const bool valid = key >= low && key < end;
            i64 slot = base + g + 8 * h;
            if (TOKENS_PER_BLOCK % TILE != 0) slot = valid ? slots.of(key) : 0;
#pragma unroll
            for (int r = 0; r < KR; ++r)
                kf[h][r] = load_valid(k_head + slot * row_stride + r * 32, valid && (t + 4 * r) * 8 < D);
        }
    };
    auto load_v = [&](int tile, i64 base) {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            const int inside = 2 * t + h % 2 + h / 2 * 8, key = tile + inside;
            const bool valid = key >= low && key < end;
            i64 slot = base + inside;
            if (TOKENS_PER_BLOCK % TILE != 0) slot = valid ? slots.of(key) : 0;
#pragma unroll
            for (int r = 0; r < VR; ++r)
                vf[h][r] = load_valid(v_head + slot * row_stride + r * 64, valid && (g + 8 * r) * 8 < D);
        }
    };
    auto slot_of_tile = [&](int tile) -> i64 {
        return TOKENS_PER_BLOCK % TILE == 0 && tile < end ? slots.of(tile) : 0;
    };

    int tile = begin + warp * TILE;
    i64 next_base = slot_of_tile(tile);
    if (AHEAD && tile < end) {
        load_k(tile, next_base);
        load_v(tile, next_base);
    }
    i64 this_base = next_base;
    next_base = slot_of_tile(tile + STEP);

    uint4 qf[NT][KR];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int r = 0; r < KR; ++r) {
            const bool valid = n * 8 + g < heads && (t + 4 * r) * 8 < D;
            qf[n][r] = valid ? *(const uint4 *)(q + out_at + (n * 8 + g) * D + (t + 4 * r) * 8) : make_uint4(0, 0, 0, 0);
        }
    }
    // acc[n][m]: columns (g + 8 (m / 4)) 8 + 2 (m % 4), and the next in the upper half; heads 2t and 2t + 1.
    float acc[NT][4 * VR][4];
    float top[NT][2], total[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int m = 0; m < 4 * VR; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[n][m][i] = 0.0f;
        top[n][0] = top[n][1] = -INFINITY_F32;
        total[n][0] = total[n][1] = 0.0f;
    }

    for (; tile < end; tile += STEP) {
        if (!AHEAD) load_k(tile, this_base);
        float s[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
#pragma unroll
            for (int r = 0; r < KR; ++r) {
                mma_16x8x16<Element>(s[n], kf[0][r].x, kf[1][r].x, kf[0][r].y, kf[1][r].y, qf[n][r].x, qf[n][r].y);
                mma_16x8x16<Element>(s[n], kf[0][r].z, kf[1][r].z, kf[0][r].w, kf[1][r].w, qf[n][r].z, qf[n][r].w);
            }
        }
        const int next = tile + STEP;
        const i64 base = next_base;
        if (AHEAD && next < end) load_k(next, base);
        if (!AHEAD) load_v(tile, this_base);
        next_base = slot_of_tile(next + STEP);

        u32 p[NT][2];
        const bool edge = tile + TILE > end || tile < low;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i] = s[n][i] * SCALE_LOG2;
                const int key = tile + g + i / 2 * 8;
                if (edge && (key < low || key >= end)) x[i] = -INFINITY_F32;
            }
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float most = fmaxf(x[h], x[h + 2]);
#pragma unroll
                for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
                most = fmaxf(most, top[n][h]);
                shrink[h] = exp2_fast(top[n][h] - most);
                top[n][h] = most;
                x[h] = exp2_fast(x[h] - most);
                x[h + 2] = exp2_fast(x[h + 2] - most);
                total[n][h] = total[n][h] * shrink[h] + x[h] + x[h + 2];
            }
            p[n][0] = transpose(pack2<Element>(x[0], x[1]));
            p[n][1] = transpose(pack2<Element>(x[2], x[3]));
            if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int m = 0; m < 4 * VR; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) acc[n][m][i] *= shrink[i % 2];
            }
        }
#pragma unroll
        for (int r = 0; r < VR; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 a0 = __byte_perm(word(vf[0][r], i), word(vf[1][r], i), 0x5410);
                const u32 a1 = __byte_perm(word(vf[0][r], i), word(vf[1][r], i), 0x7632);
                const u32 a2 = __byte_perm(word(vf[2][r], i), word(vf[3][r], i), 0x5410);
                const u32 a3 = __byte_perm(word(vf[2][r], i), word(vf[3][r], i), 0x7632);
#pragma unroll
                for (int n = 0; n < NT; ++n) mma_16x8x16<Element>(acc[n][4 * r + i], a0, a1, a2, a3, p[n][0], p[n][1]);
            }
        }
        if (AHEAD && next < end) load_v(next, base);
        this_base = base;
    }

    // Join the warps.
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = total[n][h];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
            const int head = n * 8 + 2 * t + h;
            if (g == 0) tops[warp][head] = top[n][h], totals[warp][head] = sum;
#pragma unroll
            for (int m = 0; m < 4 * VR; ++m) {
                const int column = (g + 8 * (m / 4)) * 8 + 2 * (m % 4);
                if (column < D)
                    *(float2 *)&sums[(warp * HEADS_SHARED + head) * PAD + column] =
                        make_float2(acc[n][m][h], acc[n][m][h + 2]);
            }
        }
    }
    __syncthreads();
    const i64 cell = (i64)row * gridDim.x + blockIdx.x;
    // A range's maximum and sum of each head, then its result.
    float *const mine = partials + (cell * gridDim.z + blockIdx.z) * (HEAD_BLOCK * (D + 2));
    for (int e = threadIdx.x; e < heads * (D / 4); e += WARPS * 32) {
        const int head = e / (D / 4), column = e % (D / 4) * 4;
        float most = tops[0][head];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) most = fmaxf(most, tops[w][head]);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = exp2_fast(tops[w][head] - most);
            const float4 x = *(const float4 *)&sums[(w * HEADS_SHARED + head) * PAD + column];
            sum.x = fmaf(x.x, factor, sum.x), sum.y = fmaf(x.y, factor, sum.y);
            sum.z = fmaf(x.z, factor, sum.z), sum.w = fmaf(x.w, factor, sum.w);
            all = fmaf(totals[w][head], factor, all);
        }
        if (used == 1) {
            const float factor = 1.0f / all;
            *(uint2 *)(out + out_at + head * D + column) =
                make_uint2(pack2<Element>(sum.x * factor, sum.y * factor), pack2<Element>(sum.z * factor, sum.w * factor));
        } else {
            float *at = mine + 2 * HEAD_BLOCK + head * D + column;
            *(float2 *)at = make_float2(sum.x, sum.y);
            *(float2 *)(at + 2) = make_float2(sum.z, sum.w);
            if (column == 0) *(float2 *)(mine + 2 * head) = make_float2(most, all);
        }
    }
    if (used == 1) return;

    // The last block to arrive joins the ranges.
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counters + cell, 1u);
        if (arrived == used - 1) counters[cell] = 0;
    }
    __syncthreads();
    if (arrived != used - 1) return;
    __threadfence();
    const float *const all = partials + cell * gridDim.z * (HEAD_BLOCK * (D + 2));
    // Factor of each head and range, by one warp a head.
    for (int head = warp; head < heads; head += WARPS) {
        float most = -INFINITY_F32;
        for (int s = lane; s < used; s += 32)
            most = fmaxf(most, __ldcg((const float2 *)(all + s * (HEAD_BLOCK * (D + 2)) + 2 * head)).x);
        most = warp_max(most);
        float sum = 0.0f;
        for (int s = lane; s < used; s += 32) {
            const float2 own = __ldcg((const float2 *)(all + s * (HEAD_BLOCK * (D + 2)) + 2 * head));
            const float factor = exp2_fast(own.x - most);
            sums[head * MAX_SPLITS + s] = factor;
            sum = fmaf(own.y, factor, sum);
        }
        sum = warp_sum(sum);
        __syncwarp();
        for (int s = lane; s < used; s += 32) sums[head * MAX_SPLITS + s] /= sum;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < heads * (D / 4); e += WARPS * 32) {
        const int head = e / (D / 4), column = e % (D / 4) * 4;
        const float *from = all + 2 * HEAD_BLOCK + head * D + column;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (int s = 0; s < used; ++s) {
            const float factor = sums[head * MAX_SPLITS + s];
            const float2 x = __ldcg((const float2 *)(from + s * (HEAD_BLOCK * (D + 2))));
            const float2 y = __ldcg((const float2 *)(from + s * (HEAD_BLOCK * (D + 2)) + 2));
            sum.x = fmaf(x.x, factor, sum.x), sum.y = fmaf(x.y, factor, sum.y);
            sum.z = fmaf(y.x, factor, sum.z), sum.w = fmaf(y.y, factor, sum.w);
        }
        *(uint2 *)(out + out_at + head * D + column) =
            make_uint2(pack2<Element>(sum.x, sum.y), pack2<Element>(sum.z, sum.w));
    }
}
