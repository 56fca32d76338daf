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

// The largest of two, NaN if one is.
DEVICE float max_or_nan(float a, float b) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

// Calls f(value, index) for those of the elements from..to of a row that fall to the thread and where wanted(value) holds,
// indices rising. Elements are asked for four at a time, by their largest or a NaN among them; 16 bytes a load, DEPTH
// loads in flight.
template <int DEPTH, typename W, typename F>
DEVICE void each_wanted(const float *row, u32 from, u32 to, W wanted, F f) {
    const u32 thread = threadIdx.x;
    const u32 head = min(to, from + (u32)((16 - (u32)((u64)(row + from) % 16)) % 16 / 4));
    if (from + thread < head && wanted(row[from + thread])) f(row[from + thread], from + thread);
    const u32 packs = (to - head) / 4;
    const float4 *at = (const float4 *)(row + head);
    for (u32 pack = thread; pack < packs; pack += DEPTH * THREADS) {
        float4 v[DEPTH];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) v[d] = at[min(pack + d * THREADS, packs - 1)];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const u32 place = pack + d * THREADS;
            const float most = max_or_nan(max_or_nan(v[d].x, v[d].y), max_or_nan(v[d].z, v[d].w));
            if (place < packs && wanted(most)) {
                const u32 index = head + place * 4;
                if (wanted(v[d].x)) f(v[d].x, index);
                if (wanted(v[d].y)) f(v[d].y, index + 1);
                if (wanted(v[d].z)) f(v[d].z, index + 2);
                if (wanted(v[d].w)) f(v[d].w, index + 3);
            }
        }
    }
    const u32 tail = head + packs * 4 + thread;
    if (tail < to && wanted(row[tail])) f(row[tail], tail);
}

// What callers get instead of an index.
constexpr int NOT_A_NUMBER = -1, INFINITE = -2, NOTHING = -3;

// Marks a row with a NaN; above every other key.
constexpr u64 NAN_KEY = 0xffffffffffffffffull;

// The largest key of the thread's elements of from..to above minus infinity, 0 of none, NAN_KEY if there is a NaN.
DEVICE u64 largest_of_thread(const float *row, u32 from, u32 to) {
    float best = __uint_as_float(0xff800000u);
    u32 index = 0;
    bool nan = false, any = false;
    each_wanted<8>(row, from, to, [&](float v) { return !(v <= best); }, [&](float v, u32 i) {
        nan |= v != v;
        if (v > best) {
            best = v;
            index = i;
            any = true;
        }
    });
    return nan ? NAN_KEY : any ? key_of(best, index) : 0;
}

// The same of the block.
DEVICE u64 largest(const float *row, u32 from, u32 to, u64 *scratch) {
    u64 key = largest_of_thread(row, from, to);
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) key = max(key, __shfl_xor_sync(0xffffffffu, key, lane));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = key;
    __syncthreads();
    key = scratch[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; ++w) key = max(key, scratch[w]);
    return key;
}

DEVICE int verdict(u64 key, int width) {
    if (key == NAN_KEY) return NOT_A_NUMBER;
    if (key == 0) return width > 0 ? INFINITE : NOTHING;
    return of_ordered((u32)(key >> 32)) == __uint_as_float(0x7f800000u) ? INFINITE : (int)index_of(key);
}
