// The largest element of each row of floats, and the k largest.

// Floats as integers of the same order; equal floats are equal, so -0 counts as 0.
DEVICE u32 ordered(float v) {
    const u32 bits = __float_as_uint(v + 0.0f);
    return bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
}
DEVICE float of_ordered(u32 v) { return __uint_as_float(v ^ ((v >> 31) != 0 ? 0x80000000u : 0xffffffffu)); }

// Larger for larger values, then for lower indices.
DEVICE u64 key_of(float v, u32 index) { return (u64)ordered(v) << 32 | (u64)(0xffffffffu - index); }
DEVICE u32 index_of(u64 key) { return 0xffffffffu - (u32)key; }

// Calls f(value, index) for the elements from..to of a row that falls to the thread, indices rising; 16 bytes at a time
// with DEPTH loads in flight.
template <int DEPTH, typename F> DEVICE void each_element(const float *row, u32 from, u32 to, F f) {
    const u32 thread = threadIdx.x;
    const u32 head = min(to, from + (u32)((16 - (u32)((u64)(row + from) % 16)) % 16 / 4));
    if (from + thread < head) f(row[from + thread], from + thread);
    const u32 packs = (to - head) / 4;
    const uint4 *at = (const uint4 *)(row + head);
    for (u32 pack = thread; pack < packs; pack += DEPTH * THREADS) {
        uint4 v[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) v[d] = at[min(pack + d * THREADS, packs - 1)];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            if (pack + d * THREADS < packs) {
                const u32 index = head + (pack + d * THREADS) * 4;
                f(__uint_as_float(v[d].x), index);
                f(__uint_as_float(v[d].y), index + 1);
                f(__uint_as_float(v[d].z), index + 2);
                f(__uint_as_float(v[d].w), index + 3);
            }
        }
    }
    const u32 tail = head + packs * 4 + thread;
    if (tail < to) f(row[tail], tail);
}

// What callers get instead of an index.
constexpr int NOT_A_NUMBER = -1, INFINITE = -2, NOTHING = -3;

// Marks a row with a NaN; above every other key.
constexpr u64 NAN_KEY = 0xffffffffffffffffull;

// The largest key of elements from..to of a row; 0 of none, NAN_KEY if there is a NaN. All threads get it.
DEVICE u64 largest(const float *row, u32 from, u32 to, u64 *scratch) {
    float best = __uint_as_float(0xff800000u);
    u32 index = 0xffffffffu;
    bool nan = false;
    each_element<8>(row, from, to, [&](float v, u32 i) {
        nan |= v != v;
        // Minus infinity is better than nothing; indices rise within a thread.
        if (v > best || index == 0xffffffffu) {
            best = v;
            index = i;
        }
    });
    u64 key = nan ? NAN_KEY : index == 0xffffffffu ? 0 : key_of(best, index);
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) key = max(key, __shfl_xor_sync(0xffffffffu, key, lane));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = key;
    __syncthreads();
    key = scratch[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; ++w) key = max(key, scratch[w]);
    return key;
}

DEVICE int verdict(u64 key) {
    if (key == NAN_KEY) return NOT_A_NUMBER;
    if (key == 0) return NOTHING;
    const float best = of_ordered((u32)(key >> 32));
    return fabsf(best) == __uint_as_float(0x7f800000u) ? INFINITE : (int)index_of(key);
}
