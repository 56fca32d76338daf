// Mean over the rows of a sequence: a block owns 32 columns, its warps take the rows in turn.

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    KERNEL(const Element *x, const Starts *starts, Element *out) {
    __shared__ float parts[WARPS][32];
    wait_for_predecessor();
    release_successor();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int column = blockIdx.x * 32 + lane, sequence = blockIdx.y;
    const int start = (int)starts[sequence], end = (int)starts[sequence + 1];
    float sum = 0.0f;
    if (column < H) {
#pragma unroll 4
        for (int row = start + warp; row < end; row += WARPS) sum += to_f32(x[(i64)row * H + column]);
    }
    parts[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= H) return;
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[w][lane];
    out[(i64)sequence * H + column] = from_f32<Element>(end > start ? sum / (float)(end - start) : 0.0f);
}
