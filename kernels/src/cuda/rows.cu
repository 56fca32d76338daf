// Rows: normalisations and softmax over the last axis.
//
// T: element type. OP: RMS, LAYER, L2 or SOFTMAX. ADD: the row is x + r rounded to T. SUM: that sum is a result.
// BIAS: LAYER adds one. V: elements a load. LANES: threads a row, a power of two up to 32 or the whole block.
// WIDTH: elements a row, 0 if `width` says it. PACKS: packs a thread, 0 if it loops over the row in global memory.
// A result may have the memory of x: a thread reads an element before it writes it, and no other thread does.

constexpr int RMS = 0, LAYER = 1, L2 = 2, SOFTMAX = 3;
constexpr int GROUPS = THREADS / LANES;
constexpr bool BLOCK = LANES > 32;

DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// Over the threads of a row, in a fixed order.
DEVICE float row_sum(float v, float *scratch) {
    if (BLOCK) return block_sum<BLOCK ? THREADS / 32 : 1>(v, scratch);
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}
DEVICE float row_max(float v, float *scratch) {
    if (BLOCK) return block_max<BLOCK ? THREADS / 32 : 1>(v, scratch);
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

// Elements of a row by thread: in registers, or read again at every pass.
struct Row {
    const T *x, *r;
    T *s;
    bool live;
    int lane, width;

    DEVICE bool inside(int p) const { return live && (p * LANES + lane) * V < width; }
    DEVICE int column(int p) const { return (p * LANES + lane) * V; }
    // The numbers of pack p; `first` is true on the first pass, which also writes the sum.
    DEVICE void load(int p, float (&v)[V], bool first) const {
        const int c = column(p);
        if (ADD && SUM && !first) {
            const Pack<T, V> a = load_pack<T, V>(s + c);
#pragma unroll
            for (int i = 0; i < V; ++i) v[i] = to_f32(a.at[i]);
            return;
        }
        const Pack<T, V> a = load_pack<T, V>(x + c);
        if (!ADD) {
#pragma unroll
            for (int i = 0; i < V; ++i) v[i] = to_f32(a.at[i]);
            return;
        }
        const Pack<T, V> b = load_pack<T, V>(r + c);
        Pack<T, V> sum;
#pragma unroll
        for (int i = 0; i < V; ++i) {
            sum.at[i] = from_f32<T>(to_f32(a.at[i]) + to_f32(b.at[i]));
            v[i] = to_f32(sum.at[i]);
        }
        if (SUM && first) store_pack<T, V>(s + c, sum);
    }
};

// Calls f(v, p) for every pack p of the thread with its numbers v.
template <typename F> DEVICE void each(const Row &row, float (&held)[PACKS > 0 ? PACKS : 1][V], bool first, F f) {
    if (PACKS > 0) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (row.inside(p)) f(held[p], p);
        }
    } else {
        for (int p = 0; row.inside(p); ++p) {
            float v[V];
            row.load(p, v, first);
            f(v, p);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL(const T *x, const T *r, const T *w, const T *b, T *s, T *y, int rows, int given) {
    __shared__ float scratch[THREADS / 32];
    wait_for_predecessor();
    release_successor();
    const i64 at = (i64)blockIdx.x * GROUPS + threadIdx.x / LANES;
    Row row;
    row.width = WIDTH > 0 ? WIDTH : given;
    row.live = at < rows;
    row.lane = threadIdx.x % LANES;
    const i64 start = row.live ? at * row.width : 0;
    row.x = x + start;
    row.r = r + start;
    row.s = s + start;
    y += start;
    float held[PACKS > 0 ? PACKS : 1][V];
    if (PACKS > 0) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (row.inside(p)) row.load(p, held[p], true);
        }
    }
    const float n = (float)row.width;
    float shift = 0.0f, factor;
    bool first = true;
    if (OP == SOFTMAX) {
        float top = minus_infinity();
        each(row, held, first, [&](float (&v)[V], int) {
#pragma unroll
            for (int i = 0; i < V; ++i) top = fmaxf(top, v[i]);
        });
        first = false;
        shift = row_max(top, scratch);
    }
    if (OP == LAYER) {
        float sum = 0.0f;
        each(row, held, first, [&](float (&v)[V], int) {
#pragma unroll
            for (int i = 0; i < V; ++i) sum += v[i];
        });
        first = false;
        shift = row_sum(sum, scratch) / n;
    }
    float sum = 0.0f;
    each(row, held, first, [&](float (&v)[V], int) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            if (OP == SOFTMAX) {
                v[i] = expf(v[i] - shift);
                sum += v[i];
            } else {
                v[i] -= shift;
                sum += v[i] * v[i];
            }
        }
    });
    sum = row_sum(sum, scratch);
    if (OP == SOFTMAX) factor = 1.0f / sum;
    if (OP == RMS || OP == LAYER) factor = 1.0f / sqrtf(sum / n + EPS);
    if (OP == L2) factor = fmaxf(sqrtf(sum), EPS);
    each(row, held, false, [&](float (&v)[V], int p) {
        const int c = row.column(p);
        Pack<T, V> weight, bias, out;
        if (OP == RMS || OP == LAYER) weight = load_pack<T, V>(w + c);
        if (OP == LAYER && BIAS) bias = load_pack<T, V>(b + c);
#pragma unroll
        for (int i = 0; i < V; ++i) {
            float u = v[i];
            // Numbers in registers are shifted already.
            if (PACKS == 0 && OP == SOFTMAX) u = expf(u - shift);
            if (PACKS == 0 && OP == LAYER) u -= shift;
            u = OP == L2 ? u / factor : u * factor;
            if (OP == RMS || OP == LAYER) u *= to_f32(weight.at[i]);
            if (OP == LAYER && BIAS) u += to_f32(bias.at[i]);
            out.at[i] = from_f32<T>(u);
        }
        store_pack<T, V>(y + c, out);
    });
}
