// Prelude of every kernel: types, conversions, loads, tensor-core and copy instructions. No header is included: NVRTC
// and the driver are all that is needed.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define ARCH __CUDA_ARCH__

// ---- element types -------------------------------------------------------------------------------------------------

struct bf16 { u16 bits; };
struct f16 { u16 bits; };
struct f8e4m3 { u8 bits; };
struct f8e5m2 { u8 bits; };

DEVICE float to_f32(float v) { return v; }
DEVICE float to_f32(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
DEVICE float to_f32(f16 v) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
    return out;
}

// Rounds to nearest even.
template <typename T> DEVICE T from_f32(float v);
template <> DEVICE float from_f32<float>(float v) { return v; }
template <> DEVICE bf16 from_f32<bf16>(float v) {
    bf16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
    return out;
}
template <> DEVICE f16 from_f32<f16>(float v) {
    f16 out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
    return out;
}

// Two elements in one register; `lo` is the first in memory.
template <typename T> DEVICE u32 pack2(float lo, float hi);
template <> DEVICE u32 pack2<bf16>(float lo, float hi) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}
template <> DEVICE u32 pack2<f16>(float lo, float hi) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}
template <typename T> DEVICE float2 unpack2(u32 v);
template <> DEVICE float2 unpack2<bf16>(u32 v) {
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}
template <> DEVICE float2 unpack2<f16>(u32 v) {
    float2 out;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(out.x), "=f"(out.y) : "r"(v));
    return out;
}

// ---- loads and stores ----------------------------------------------------------------------------------------------

DEVICE u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }

// ---- reductions ----------------------------------------------------------------------------------------------------

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lane);
    return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
    return v;
}

// Sum over a block in a fixed order; `scratch` holds one float a warp. All threads get the sum.
template <int WARPS> DEVICE float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += scratch[w];
    return sum;
}
template <int WARPS> DEVICE float block_max(float v, float *scratch) {
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float most = scratch[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) most = fmaxf(most, scratch[w]);
    return most;
}

// ---- activations ---------------------------------------------------------------------------------------------------

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
DEVICE float silu(float x) { return x / (1.0f + __expf(-x)); }
DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
DEVICE float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
DEVICE float relu(float x) { return fmaxf(x, 0.0f); }

// ---- tensor cores --------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; thread i gives the address of row i%8 of matrix i/8.
DEVICE void ldmatrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// c[16, 8] += a[16, 16] b[16, 8], 16-bit elements, f32 accumulators. With g = lane / 4 and t = lane % 4:
// a0: row g, columns 2t, 2t+1; a1: row g+8; a2: row g, columns 2t+8, 2t+9; a3: row g+8 of those;
// b0: rows 2t, 2t+1, column g; b1: rows 2t+8, 2t+9; c0, c1: row g, columns 2t, 2t+1; c2, c3: row g+8.
template <typename T> DEVICE void mma_16x8x16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
template <> DEVICE void mma_16x8x16<bf16>(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <> DEVICE void mma_16x8x16<f16>(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, zeros where `valid` is false.
DEVICE void copy_async(u32 shared, const void *global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0));
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

// ---- order of launches ---------------------------------------------------------------------------------------------

// A kernel that starts before its predecessor ends waits here before it touches memory the predecessor writes or reads.
DEVICE void wait_for_predecessor() {
#if ARCH >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the successor may start; it still waits for the end of this grid before it reads results.
DEVICE void release_successor() {
#if ARCH >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
