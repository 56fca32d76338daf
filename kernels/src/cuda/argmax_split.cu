// gridDim.x blocks a row, rows along y. `best` has a key a block; `arrived` has a counter a row, zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL(const float *rows, int *out, int width, u64 *best, u32 *arrived) {
    __shared__ u64 scratch[THREADS / 32];
    __shared__ bool last;
    wait_for_predecessor();
    release_successor();
    const u32 row = blockIdx.y, part = blockIdx.x, parts = gridDim.x;
    const u32 length = ((u32)width + parts - 1) / parts;
    const u32 from = min((u32)width, part * length), to = min((u32)width, from + length);
    const u64 key = largest(rows + (u64)row * width, from, to, scratch);
    if (threadIdx.x == 0) {
        best[row * parts + part] = key;
        __threadfence();
        last = atomicAdd(arrived + row, 1u) + 1 == parts;
        if (last) {
            __threadfence();
            u64 most = 0;
            for (u32 p = 0; p < parts; ++p) most = max(most, *(volatile u64 *)(best + row * parts + p));
            out[row] = verdict(most, width);
            arrived[row] = 0;
        }
    }
}
