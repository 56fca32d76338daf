// The k largest elements of a row, largest first, lower indices first among equals; one block a row, k <= CAPACITY.
// Rows shorter than k end with minus infinity at index -1; a row with a NaN has index -1 everywhere.
//
// Keys (value, index) are all different. Every thread has a largest element; what k threads reach is at most the k-th of
// the row, and few others are above it. If more are than shared memory holds, digits of the keys, highest first, are counted
// until those from the k-th upwards fit. What is left is gathered, and each finds its rank.
constexpr int CAPACITY = 1024, BINS = 2048, LEVELS = 6;

// Gathers the keys from `least` upwards of a row without NaN; returns how many there are, of which CAPACITY are kept.
DEVICE u32 gather(const float *row, int width, u64 least, u64 *keys, u32 *found) {
    __syncthreads();
    if (threadIdx.x == 0) *found = 0;
    __syncthreads();
    const float floor = least == 0 ? __uint_as_float(0xff800000u) : of_ordered((u32)(least >> 32));
    each_wanted<8>(row, 0, (u32)width, [&](float v) { return v >= floor; }, [&](float v, u32 i) {
        const u64 key = key_of(v, i);
        if (key >= least) {
            const u32 slot = atomicAdd(found, 1u);
            if (slot < CAPACITY) keys[slot] = key;
        }
    });
    __syncthreads();
    return *found;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL(const float *rows, float *values, int *indices, int width, int k) {
    __shared__ u64 keys[CAPACITY];
    __shared__ u32 bins[BINS];
    __shared__ u32 found, bin, above;
    wait_for_predecessor();
    release_successor();
    const float *row = rows + (u64)blockIdx.x * width;
    values += (u64)blockIdx.x * k;
    indices += (u64)blockIdx.x * k;
    for (int i = threadIdx.x; i < k; i += THREADS) {
        values[i] = __uint_as_float(0xff800000u);
        indices[i] = -1;
    }
    // Keys from `least` upwards are wanted; `taken` of them are above the digits counted next.
    u64 least = 0;
    u32 taken = 0;
    const u64 mine = largest_of_thread(row, 0, (u32)width);
    if (__syncthreads_or(mine == NAN_KEY)) return;
    if (width > CAPACITY) {
        // The largest value that at least k threads reach, bit by bit.
        const u32 reached = (u32)(mine >> 32);
        u32 bound = 0;
        for (u32 bit = 1u << 31; bit > 0; bit >>= 1) {
            if (__syncthreads_count(reached >= (bound | bit)) >= k) bound |= bit;
        }
        least = (u64)bound << 32;
    }
    u32 count = gather(row, width, least, keys, &found);
    if (count > CAPACITY) {
        least = 0;
        int shift = 64;
        for (int level = 0; level < LEVELS; ++level) {
            const int digit = level % 3 == 2 ? 10 : 11;
            const u64 prefix = least;
            const int upper = shift;
            shift -= digit;
            for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
            __syncthreads();
            each_wanted<4>(row, 0, (u32)width, [](float) { return true; }, [&](float v, u32 i) {
                const u64 key = key_of(v, i);
                if (upper == 64 || key >> upper == prefix >> upper) {
                    atomicAdd(bins + ((u32)(key >> shift) & ((1u << digit) - 1)), 1u);
                }
            });
            __syncthreads();
            // The first warp looks for the bin of the k-th key, from the top.
            if (threadIdx.x < 32) {
                u32 before = taken;
                for (int top = (1 << digit) - 1; top >= 0; top -= 32) {
                    const u32 count = bins[top - (int)threadIdx.x];
                    u32 sum = count;
#pragma unroll
                    for (int lane = 1; lane < 32; lane <<= 1) {
                        const u32 other = __shfl_up_sync(0xffffffffu, sum, lane);
                        if (threadIdx.x >= lane) sum += other;
                    }
                    const u32 reached = __ballot_sync(0xffffffffu, before + sum >= (u32)k);
                    if (reached != 0) {
                        if (threadIdx.x == __ffs(reached) - 1) {
                            bin = top - threadIdx.x;
                            above = before + sum - count;
                            found = before + sum;
                        }
                        break;
                    }
                    before += __shfl_sync(0xffffffffu, sum, 31);
                }
            }
            __syncthreads();
            least = prefix | (u64)bin << shift;
            taken = above;
            const bool fits = found <= CAPACITY;
            __syncthreads();
            if (fits) break;
        }
        count = gather(row, width, least, keys, &found);
    }
    count = min(count, (u32)CAPACITY);
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        const u64 key = keys[i];
        u32 rank = 0;
        for (u32 j = 0; j < count; ++j) rank += keys[j] > key;
        if (rank < (u32)k) {
            values[rank] = row[index_of(key)];
            indices[rank] = (int)index_of(key);
        }
    }
}
