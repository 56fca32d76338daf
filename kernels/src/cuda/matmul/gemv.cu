// y = epilogue(norm(x) w^T) for few rows of x by f32 arithmetic; the weight row by row, each row of K elements.
//
// A warp sums ROWS rows of the weight at a time with COLUMNS rows of x: its lanes take VECTOR neighbouring elements each, and
// SPLIT warps of a block share a row. What a lane reads comes straight from memory, one batch of UNROLL steps ahead of what it
// multiplies, the first before the predecessor is done; x is read again and again, from the nearest cache. An element's
// sum depends on K, VECTOR and SPLIT alone: the elements of a lane in rising order, lanes as a tree, then the SPLIT parts in order.
//
// Constants: K, FEATURES (columns of the results, all segments), GATED, T, VECTOR (a divisor of K; its bytes a power of two up
// to 16), ROWS (even where GATED), UNROLL, SPLIT, COLUMNS (most rows of x in a block, which
// has at least half of them), NORM and EPS (x is normalised,
// COLUMNS is 1), NORM_THREADS, RESIDENT (blocks of a multiprocessor). `place(c, segment, feature)` names the result of column c.
//# tiled
//
// A launch computes the columns [tile_first, tile_first + tile_count), and `w` begins with the first of them.
//# end

constexpr int WARPS = 4, THREADS = WARPS * 32;
constexpr int OWN = ROWS / (1 + GATED);
constexpr int GROUP = WARPS / SPLIT * OWN;
constexpr int STEP = SPLIT * 32 * VECTOR;
constexpr int BATCH = UNROLL * STEP;
constexpr int BATCHES = (K + BATCH - 1) / BATCH;
constexpr int BYTES = VECTOR * sizeof(T);
constexpr int WORDS = (BYTES + 3) / 4;
constexpr int SUMS = ROWS * COLUMNS;
static_assert(K % VECTOR == 0 && WARPS % SPLIT == 0 && ROWS % (1 + GATED) == 0 && (!NORM || COLUMNS == 1), "shape of a block");
static_assert((SUMS & (SUMS - 1)) == 0, "sums are halved over lanes");

// ---- loads ---------------------------------------------------------------------------------------------------------

// Read once: nothing that others want leaves a cache for it.
template <int BYTES> DEVICE void read_once(u32 *to, const void *at, u64 policy);
template <> DEVICE void read_once<16>(u32 *to, const void *at, u64 policy) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(at), "l"(policy));
}
template <> DEVICE void read_once<8>(u32 *to, const void *at, u64 policy) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                 : "=r"(to[0]), "=r"(to[1]) : "l"(at), "l"(policy));
}
template <> DEVICE void read_once<4>(u32 *to, const void *at, u64 policy) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(to[0]) : "l"(at), "l"(policy));
}
template <> DEVICE void read_once<2>(u32 *to, const void *at, u64 policy) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u16 %0, [%1], %2;"
                 : "=h"(*(u16 *)to) : "l"(at), "l"(policy));
}

template <int BYTES> DEVICE void read(u32 *to, const void *at);
template <> DEVICE void read<16>(u32 *to, const void *at) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(at));
}
template <> DEVICE void read<8>(u32 *to, const void *at) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(at));
}
template <> DEVICE void read<4>(u32 *to, const void *at) { asm volatile("ld.global.u32 %0, [%1];" : "=r"(to[0]) : "l"(at)); }
template <> DEVICE void read<2>(u32 *to, const void *at) {
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(*(u16 *)to) : "l"(at));
}

// Element `e` of what was read.
template <typename E> DEVICE float element(const u32 *words, int e) {
    E v;
    v.bits = (u16)(words[e / 2] >> (e % 2 * 16));
    return to_f32(v);
}
template <> DEVICE float element<float>(const u32 *words, int e) { return __uint_as_float(words[e]); }

// ---- a lane's part of the weight -----------------------------------------------------------------------------------

struct Batch { u32 words[UNROLL][ROWS][WORDS]; };

// The first column of a step that is this lane's.
DEVICE int own_column(int batch, int j) {
    return batch * BATCH + j * STEP + (threadIdx.x / 32 % SPLIT * 32 + threadIdx.x % 32) * VECTOR;
}
// Whether that column is there; K % BATCH is a constant.
DEVICE bool inside(int column) { return K % BATCH == 0 || column < K; }

//# tiled
// A warp's rows of the weight; a row past the end repeats the last one, and nobody reads its sum.
struct Rows {
    const T *each[OWN];
    DEVICE void aim(const T *w, int column0, int end) {
#pragma unroll
        for (int q = 0; q < OWN; ++q) each[q] = w + (u64)min(column0 + q, end - 1) * K;
    }
    DEVICE const T *at(int q) const { return each[q]; }
};
// Which of a warp's rows is column number `own` of its columns from `column0` on.
DEVICE int row_of(int column0, int own, int end) { return own; }
static_assert(!GATED, "no part of a weight holds gates and what they gate");
//# whole
// A warp's rows of the weight; past the end they are the last ones, and nobody reads the sums of others' columns.
struct Rows {
    const T *first;
    DEVICE void aim(const T *w, int column0, int end) { first = w + (u64)min(column0, end - OWN) * K; }
    DEVICE const T *at(int q) const { return first + ((u64)(q / OWN) * FEATURES + q % OWN) * K; }
};
// Which of a warp's rows is column number `own` of its columns from `column0` on.
DEVICE int row_of(int column0, int own, int end) { return own + column0 - min(column0, end - OWN); }
static_assert(FEATURES >= OWN, "a warp has columns of its own");
//# end
DEVICE void fetch(Batch &to, const Rows &rows, int batch, u64 policy) {
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
        int column = own_column(batch, j);
        if (inside(column)) {
#pragma unroll
            for (int q = 0; q < ROWS; ++q) read_once<BYTES>(to.words[j][q], rows.at(q) + column, policy);
        }
    }
}

// Which row of x the sums number r are of, if a block has `count` rows: the first half are the first rows, the second half the
// last ones, so that two addresses serve all rows and no row is read that is not there.
constexpr int HALF = (COLUMNS + 1) / 2;
DEVICE int sums_of(int row, int count) { return row < HALF ? row : row + COLUMNS - count; }

// Adds the products of a batch. `end` is K, which the compiler must not know: the branch keeps rows of x from being read far
// ahead, for which registers would not suffice.
DEVICE void multiply(float (&sums)[SUMS], const Batch &of, const T *x, const float *normed, int count, int end, int batch) {
#pragma unroll
    for (int j = 0; j < UNROLL; ++j) {
        int column = own_column(batch, j);
        const T *at = x + column, *late = at + (count - COLUMNS) * K;
        if (column < end) {
#pragma unroll
            for (int r = 0; r < COLUMNS; ++r) {
                u32 words[WORDS];
                float values[VECTOR];
                if (NORM) {
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) values[e] = normed[column + e];
                } else {
                    read<BYTES>(words, (r < HALF ? at : late) + r * K);
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) values[e] = element<T>(words, e);
                }
#pragma unroll
                for (int q = 0; q < ROWS; ++q)
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e)
                        sums[q * COLUMNS + r] = fmaf(element<T>(of.words[j][q], e), values[e], sums[q * COLUMNS + r]);
            }
        }
    }
    // Sums are made here and no later, or the batch would live beside two more.
#pragma unroll
    for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(sums[i]));
}

// ---- sums over lanes and warps -------------------------------------------------------------------------------------

// Sums of N values over the lanes whose numbers differ in bits of MASK and below: every step halves the values of a lane, the
// upper half to the lane with the bit. The tree is the same for every N.
template <int N, int MASK> struct Fold {
    static DEVICE void run(float *v) {
        bool upper = threadIdx.x & MASK;
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            float keep = upper ? v[i + N / 2] : v[i], give = upper ? v[i] : v[i + N / 2];
            v[i] = keep + __shfl_xor_sync(0xffffffffu, give, MASK);
        }
        Fold<N / 2, MASK / 2>::run(v);
    }
};
template <int MASK> struct Fold<1, MASK> {
    static DEVICE void run(float *v) {
        v[0] += __shfl_xor_sync(0xffffffffu, v[0], MASK);
        Fold<1, MASK / 2>::run(v);
    }
};
template <int N> struct Fold<N, 0> {
    static DEVICE void run(float *) {}
};
template <> struct Fold<1, 0> {
    static DEVICE void run(float *) {}
};

typedef float Kept[SPLIT][WARPS / SPLIT * SUMS];

DEVICE void keep_sums(Kept &to, float (&sums)[SUMS]) {
    constexpr int EACH = SUMS < 32 ? 1 : SUMS / 32, LANES = SUMS < 32 ? 32 / SUMS : 1;
    Fold<SUMS, 16>::run(sums);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane % LANES == 0) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) to[warp % SPLIT][warp / SPLIT * SUMS + lane / LANES * EACH + i] = sums[i];
    }
}
DEVICE float total(const Kept &kept, int at) {
    float sum = kept[0][at];
#pragma unroll
    for (int part = 1; part < SPLIT; ++part) sum += kept[part][at];
    return sum;
}

DEVICE void finish_group(PARAMETERS, const Kept &kept, int column0, int end, int row0, int count) {
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUP * count; i += THREADS) {
        int own = i % GROUP, r = i / GROUP;
        if (column0 + own >= end) continue;
        int row = row_of(column0 + own / OWN * OWN, own % OWN, end), at = own / OWN * SUMS + row * COLUMNS + sums_of(r, count);
        float v = total(kept, at), u = GATED ? total(kept, at + OWN * COLUMNS) : 0.0f;
        int segment, feature;
        place(column0 + own, segment, feature);
        finish(ARGUMENTS, row0 + r, segment, feature, v, u);
    }
}

#if NORM_ON
// Writes the normalised row to shared memory, with the sums and roundings of the norm as a kernel of its own: there a block has
// NORM_THREADS threads, and each of these stands for several of those.
DEVICE void normalise(float *to, const T *x, const T *weight, float *scratch) {
    for (int first = 0; first < NORM_THREADS; first += THREADS) {
        float sum = 0.0f;
        for (int i = first + threadIdx.x; i < K; i += NORM_THREADS) {
            float v = to_f32(x[i]);
            sum += v * v;
        }
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) scratch[(first + threadIdx.x) / 32] = sum;
    }
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < NORM_THREADS / 32; ++w) sum += scratch[w];
    float scale = rsqrtf(sum * (1.0f / K) + EPS);
    for (int i = threadIdx.x; i < K; i += THREADS)
        to[i] = to_f32(from_f32<T>(to_f32(x[i]) * scale * to_f32(weight[i])));
    __syncthreads();
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    KERNEL(const T *x, const T *w, NORM_PARAMETER PARAMETERS, int m) {
    __shared__ Kept kept[2];
#if NORM_ON
    extern __shared__ __align__(16) float normalised[];
    __shared__ float scratch[NORM_THREADS / 32];
#endif
    const float *normed = nullptr;
    const int row0 = m * blockIdx.x / gridDim.x, count = m * (blockIdx.x + 1) / gridDim.x - row0;
    const int own = threadIdx.x / 32 / SPLIT * OWN;
//# tiled
    const int begin = slice_column(tile_first), end = slice_column(tile_first + tile_count);
    w -= (i64)tile_first * SLICE;
//# whole
    const int begin = 0, end = FEATURES;
//# end
    int k = K;
    asm("" : "+r"(k));
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    Batch even, odd;
    Rows rows;
    int column0 = begin + blockIdx.y * GROUP;
    rows.aim(w, column0 + own, end);
    fetch(even, rows, 0, policy);
    release_successor();
    wait_for_predecessor();
    x += (u64)row0 * K;
#if NORM_ON
    normalise(normalised, x, norm_weight, scratch);
    normed = normalised;
#endif
    for (int turn = 0; column0 < end; turn ^= 1) {
        const int next = column0 + gridDim.y * GROUP;
        float sums[SUMS] = {};
#pragma unroll 1
        for (int batch = 0; batch < BATCHES; batch += 2) {
            if (batch + 1 < BATCHES) fetch(odd, rows, batch + 1, policy);
            multiply(sums, even, x, normed, count, k, batch);
            const bool last = batch + 2 >= BATCHES;
            if (last) rows.aim(w, next + own, end);
            if (!last || next < end) fetch(even, rows, last ? 0 : batch + 2, policy);
            if (batch + 1 < BATCHES) multiply(sums, odd, x, normed, count, k, batch + 1);
        }
        keep_sums(kept[turn], sums);
        __syncthreads();
        finish_group(ARGUMENTS, kept[turn], column0, end, row0, count);
        column0 = next;
    }
}
