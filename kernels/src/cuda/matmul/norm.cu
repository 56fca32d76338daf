// y = x / sqrt(mean(x^2) + eps) * w, one block a row. Constants: K, THREADS, VECTOR (8 with 16-bit elements, or 1), EPS.

constexpr int PIECES = K / VECTOR;

extern "C" __global__ void __launch_bounds__(THREADS) KERNEL(const T *x, const T *w, T *y) {
    __shared__ float scratch[THREADS / 32];
    release_successor();
    wait_for_predecessor();
    x += (u64)blockIdx.x * K;
    y += (u64)blockIdx.x * K;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < PIECES; i += THREADS) {
        if (VECTOR == 8) {
            uint4 v = *(const uint4 *)(x + i * 8);
            u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float2 p = make_float2(to_f32(((T *)&words[j])[0]), to_f32(((T *)&words[j])[1]));
                sum += p.x * p.x + p.y * p.y;
            }
        } else {
            float v = to_f32(x[i]);
            sum += v * v;
        }
    }
    float scale = rsqrtf(block_sum<THREADS / 32>(sum, scratch) * (1.0f / K) + EPS);
    for (int i = threadIdx.x; i < PIECES; i += THREADS) {
        if (VECTOR == 8) {
            uint4 v = *(const uint4 *)(x + i * 8), u = *(const uint4 *)(w + i * 8), out;
            T *in = (T *)&v, *weight = (T *)&u, *to = (T *)&out;
#pragma unroll
            for (int j = 0; j < 8; ++j) to[j] = from_f32<T>(to_f32(in[j]) * scale * to_f32(weight[j]));
            *(uint4 *)(y + i * 8) = out;
        } else {
            y[i] = from_f32<T>(to_f32(x[i]) * scale * to_f32(w[i]));
        }
    }
}
