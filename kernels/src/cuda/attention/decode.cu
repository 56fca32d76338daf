// Attention of single rows over a paged cache, split over the sequence.
//
// A block takes a range of keys for the query heads of one key head; its warps take tiles of 16 keys in turn. Scores are
// computed transposed: S^T[16 keys, 8 heads] = K Q^T and O^T[D, 8 heads] += V^T P^T, so that few heads fill the tensor
// core. Keys and values go from global memory into the fragments of the matrix instruction directly: the order of a
// product's terms is free, so a lane's 16 contiguous bytes may stand for any columns, if both operands agree.
// Blocks of a cluster join what they found through shared memory. If a row needs several clusters, each leaves maximum,
// sum and unscaled result in the workspace, and the last cluster of a row and key head to arrive joins them in order of
// the ranges. Without clusters every block stands for one.

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

DEVICE void add(float4 &sum, const float4 &x, float factor) {
    sum.x = fmaf(x.x, factor, sum.x), sum.y = fmaf(x.y, factor, sum.y);
    sum.z = fmaf(x.z, factor, sum.z), sum.w = fmaf(x.w, factor, sum.w);
}
DEVICE void store(Element *at, const float4 &v, float factor) {
    *(uint2 *)at = make_uint2(pack2<Element>(v.x * factor, v.y * factor), pack2<Element>(v.z * factor, v.w * factor));
}

DEVICE u32 word(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

#if CLUSTER > 1
DEVICE u32 in_block(u32 address, u32 rank) {
    u32 out;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
    return out;
}
DEVICE float4 load_cluster4(u32 address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}
DEVICE float2 load_cluster2(u32 address) {
    float2 v;
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}
// The barrier of all blocks of the cluster that still run.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif

// Cache slots of the keys of a tile that a lane reads. If pages hold whole tiles one lookup serves all.
struct Slots {
    const Table *pages;

    DEVICE i64 of(int key) const {
        return (i64)pages[key / TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK;
    }
};

// Keys of a block's range: equal parts of what the row sees, in whole steps of the block. One cluster does as long as its
// blocks have few steps.
DEVICE int chunk_of(int span) {
    const int blocks = CLUSTER > 1 && span <= CLUSTER * ONE_CLUSTER ? CLUSTER : (int)gridDim.x;
    return max(MIN_CHUNK, ((span + blocks - 1) / blocks + STEP - 1) / STEP * STEP);
}

// Brings the first tile of each warp into the level 2 cache while the predecessor still runs. Whatever it reads may be
// about to change: it may bring the wrong rows, and nothing else depends on it.
template <typename I> DEVICE int peek(const I *at) { return (int)__ldcg(at); }
DEVICE void prefetch(const Element *k, const Element *v, const Lens *lens, const Table *table, int b, int width, int pages) {
#if ARCH >= 900
    if (TOKENS_PER_BLOCK % TILE != 0) return;
    const int guess = min((int)blockIdx.z, b - 1), length = peek(lens + guess);
    const int aligned = (WINDOW > 0 ? max(0, length - WINDOW) : 0) / TILE * TILE;
    const int chunk = chunk_of(max(0, length - aligned));
    const int tile = aligned + blockIdx.x * chunk + threadIdx.x / 32 * TILE, key = tile + threadIdx.x % TILE;
    const int block = tile / TOKENS_PER_BLOCK;
    if (key >= length || block >= width) return;
    const int page = peek(table + (i64)guess * width + block);
    if (page < 0 || page >= pages) return;
    const Element *from = threadIdx.x % 32 < TILE ? k : v;
    from += (((i64)page * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK) * KV_HEADS + blockIdx.y / HEAD_BLOCKS) * D;
#pragma unroll
    for (int c = 0; c < D; c += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + c));
#endif
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    KERNEL(const Element *q, const Element *k, const Element *v, const Starts *starts, const Lens *lens,
           const Table *table, Element *out, float *partials, u32 *counters, int b, int width, int pages) {
    constexpr int HEADS_SHARED = NT * 8;
    __shared__ __align__(16) float sums[WARPS * HEADS_SHARED * PAD];
    __shared__ float tops[WARPS][HEADS_SHARED], totals[WARPS][HEADS_SHARED];
    __shared__ float2 joined[HEADS_SHARED];
    __shared__ u32 arrived;
    prefetch(k, v, lens, table, b, width, pages);
    wait_for_predecessor();
    release_successor();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int kv_head = blockIdx.y / HEAD_BLOCKS, first_head = blockIdx.y % HEAD_BLOCKS * HEAD_BLOCK;
    const int heads = min(HEAD_BLOCK, GROUP - first_head);
    const int row = blockIdx.z;
    const i64 out_at = ((i64)row * HEADS + kv_head * GROUP + first_head) * D;

    uint4 qf[NT][KR];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int r = 0; r < KR; ++r) {
            const bool valid = n * 8 + g < heads && (t + 4 * r) * 8 < D;
            qf[n][r] = valid ? *(const uint4 *)(q + out_at + (n * 8 + g) * D + (t + 4 * r) * 8) : make_uint4(0, 0, 0, 0);
        }
    }

    // What a short context with one row a sequence needs is read at once; other cases look again.
    const int guess = min(row, b - 1), guessed_tile = blockIdx.x * MIN_CHUNK + warp * TILE;
    const int guessed_start = (int)starts[guess], guessed_end = (int)starts[guess + 1];
    const int guessed_page = (int)table[(i64)guess * width + min(guessed_tile / TOKENS_PER_BLOCK, width - 1)];
    int length = (int)lens[guess], sequence = guess, sequence_end = guessed_end;
    if (guessed_start != row || guessed_end != row + 1) {
        sequence = sequence_of(starts, b, row);
        sequence_end = (int)starts[sequence + 1];
        length = (int)lens[sequence];
    }
    const int position = length - sequence_end + row;
    const Slots slots{table + (i64)sequence * width};

    const int last = position + 1, low = WINDOW > 0 ? max(0, last - WINDOW) : 0;
    const int aligned = low / TILE * TILE, span = last - aligned, chunk = chunk_of(span);
    const int used = (span + chunk - 1) / chunk;
    if ((int)blockIdx.x >= used) return;
    const int begin = aligned + blockIdx.x * chunk, end = min(last, begin + chunk);

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
    const bool guessed = TOKENS_PER_BLOCK % TILE == 0 && sequence == guess && tile == guessed_tile;
    i64 next_base = guessed ? (i64)guessed_page * TOKENS_PER_BLOCK + tile % TOKENS_PER_BLOCK : slot_of_tile(tile);
    if (AHEAD && tile < end) {
        load_k(tile, next_base);
        load_v(tile, next_base);
    }
    i64 this_base = next_base;
    next_base = slot_of_tile(tile + STEP);

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
            // Two sums, so that products wait less for each other.
            float other[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int r = 0; r < KR; ++r) {
                mma_16x8x16<Element>(s[n], kf[0][r].x, kf[1][r].x, kf[0][r].y, kf[1][r].y, qf[n][r].x, qf[n][r].y);
                mma_16x8x16<Element>(other, kf[0][r].z, kf[1][r].z, kf[0][r].w, kf[1][r].w, qf[n][r].z, qf[n][r].w);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] += other[i];
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
            add(sum, x, factor);
            all = fmaf(totals[w][head], factor, all);
        }
        *(float4 *)&sums[head * PAD + column] = sum;
        if (column == 0) joined[head] = make_float2(most, all);
    }

    // Join the blocks of the cluster: each takes some of the columns.
    const int part = blockIdx.x / CLUSTER, parts = (used + CLUSTER - 1) / CLUSTER;
    const i64 cell = (i64)row * gridDim.y + blockIdx.y;
    // A part's maximum and sum of each head, then its result.
    constexpr int PART = HEAD_BLOCK * (D + 4), STATE = HEAD_BLOCK * 4;
    float *const all_parts = partials + cell * (gridDim.x / CLUSTER) * PART, *const mine = all_parts + part * PART;
#if CLUSTER > 1
    cluster_arrive();
    cluster_wait();
    const int members = min(CLUSTER, used - part * CLUSTER), rank = blockIdx.x % CLUSTER;
#else
    __syncthreads();
    constexpr int members = 1, rank = 0;
#endif
    for (int e = rank * WARPS * 32 + threadIdx.x; e < heads * (D / 4); e += members * WARPS * 32) {
        const int head = e / (D / 4), column = e % (D / 4) * 4;
#if CLUSTER > 1
        const u32 at = shared_address(&sums[head * PAD + column]), state_at = shared_address(&joined[head]);
        float2 state[CLUSTER];
        float4 x[CLUSTER];
#pragma unroll
        for (int m = 0; m < CLUSTER; ++m) {
            state[m] = make_float2(-INFINITY_F32, 0.0f);
            x[m] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (m < members) state[m] = load_cluster2(in_block(state_at, m)), x[m] = load_cluster4(in_block(at, m));
        }
        float most = state[0].x;
#pragma unroll
        for (int m = 1; m < CLUSTER; ++m) most = fmaxf(most, state[m].x);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float all = 0.0f;
#pragma unroll
        for (int m = 0; m < CLUSTER; ++m) {
            const float factor = exp2_fast(state[m].x - most);
            add(sum, x[m], factor);
            all = fmaf(state[m].y, factor, all);
        }
#else
        const float4 sum = *(const float4 *)&sums[head * PAD + column];
        const float most = joined[head].x, all = joined[head].y;
#endif
        if (parts == 1) {
            store(out + out_at + head * D + column, sum, 1.0f / all);
        } else {
            *(float4 *)(mine + STATE + head * D + column) = sum;
            if (column == 0) *(float2 *)(mine + 2 * head) = make_float2(most, all);
        }
    }
#if CLUSTER > 1
    // Nobody leaves while others read its memory.
    cluster_arrive();
#endif
    // Blocks that wrote to the workspace arrive at the counter; the last of them joins the parts.
    constexpr int WRITERS = (HEAD_BLOCK * (D / 4) + WARPS * 32 - 1) / (WARPS * 32);
    if (parts > 1 && rank < WRITERS) {
        const int last_members = used - (parts - 1) * CLUSTER;
        const int arrivals = (parts - 1) * min(CLUSTER, WRITERS) + min(last_members, WRITERS);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            arrived = atomicAdd(counters + cell, 1u);
            if (arrived == arrivals - 1) counters[cell] = 0;
            __threadfence();
        }
        __syncthreads();
        if (arrived == arrivals - 1) {
            for (int e = threadIdx.x; e < heads * (D / 4); e += WARPS * 32) {
                const int head = e / (D / 4), column = e % (D / 4) * 4;
                float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                float most = -INFINITY_F32, total = 0.0f;
                for (int base = 0; base < parts; base += 8) {
                    float2 state[8];
                    float4 x[8];
#pragma unroll
                    for (int s = 0; s < 8; ++s) {
                        const float *from = all_parts + min(base + s, parts - 1) * PART;
                        state[s] = __ldcg((const float2 *)(from + 2 * head));
                        x[s] = __ldcg((const float4 *)(from + STATE + head * D + column));
                        if (base + s >= parts) state[s] = make_float2(-INFINITY_F32, 0.0f);
                    }
                    float next = most;
#pragma unroll
                    for (int s = 0; s < 8; ++s) next = fmaxf(next, state[s].x);
                    const float shrink = exp2_fast(most - next);
                    sum.x *= shrink, sum.y *= shrink, sum.z *= shrink, sum.w *= shrink, total *= shrink;
                    most = next;
#pragma unroll
                    for (int s = 0; s < 8; ++s) {
                        const float factor = exp2_fast(state[s].x - most);
                        add(sum, x[s], factor);
                        total = fmaf(state[s].y, factor, total);
                    }
                }
                store(out + out_at + head * D + column, sum, 1.0f / total);
            }
        }
    }
#if CLUSTER > 1
    cluster_wait();
#endif
}
