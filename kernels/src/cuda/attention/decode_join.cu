// How results of several ranges of a row become one: inside a cluster through shared memory, beyond it through the workspace.

DEVICE void add(float4 &sum, const float4 &x, float factor) {
    sum.x = fmaf(x.x, factor, sum.x), sum.y = fmaf(x.y, factor, sum.y);
    sum.z = fmaf(x.z, factor, sum.z), sum.w = fmaf(x.w, factor, sum.w);
}
template <typename E> DEVICE void store(E *at, const float4 &v, float factor) {
    *(uint2 *)at = make_uint2(pack2<E>(v.x * factor, v.y * factor), pack2<E>(v.z * factor, v.w * factor));
}
DEVICE void store(float *at, const float4 &v, float factor) {
    *(float4 *)at = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
}

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
// The barrier of all blocks of the cluster that still run. To arrive empty-handed spares the wait for what was written.
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif

// Counts an arrival of the block, with one thread behind a barrier of the block: what the block wrote before is seen by who
// arrives later. Returns how many arrived before.
DEVICE u32 arrive(u32 *counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// A part's maximum and sum of each head, then its result, in floats.
constexpr int PART = HEAD_BLOCK * (D + 4), STATE = HEAD_BLOCK * 4;

// Heads are joined in slices, each by another block of a cluster.
constexpr int SLICES = CLUSTER < HEAD_BLOCK ? CLUSTER : HEAD_BLOCK;
constexpr int SLICE = (HEAD_BLOCK + SLICES - 1) / SLICES;

// Joins the parts of a row for heads `first` up to `end` of a block in order, with all threads, `BATCH` parts on their way at once.
template <int BATCH> DEVICE void join_parts(const float *all_parts, int parts, int first, int end, Element *out) {
    for (int e = first * (D / 4) + threadIdx.x; e < end * (D / 4); e += WARPS * 32) {
        const int head = e / (D / 4), column = e % (D / 4) * 4;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float most = -INFINITY_F32, total = 0.0f;
        for (int base = 0; base < parts; base += BATCH) {
            float2 state[BATCH];
            float4 x[BATCH];
#pragma unroll
            for (int s = 0; s < BATCH; ++s) {
                const float *from = all_parts + min(base + s, parts - 1) * PART;
                state[s] = __ldcg((const float2 *)(from + 2 * head));
                x[s] = __ldcg((const float4 *)(from + STATE + head * D + column));
                if (base + s >= parts) state[s] = make_float2(-INFINITY_F32, 0.0f);
            }
            float next = most;
#pragma unroll
            for (int s = 0; s < BATCH; ++s) next = fmaxf(next, state[s].x);
            const float shrink = exp2_fast(most - next);
            sum.x *= shrink, sum.y *= shrink, sum.z *= shrink, sum.w *= shrink, total *= shrink;
            most = next;
#pragma unroll
            for (int s = 0; s < BATCH; ++s) {
                const float factor = exp2_fast(state[s].x - most);
                add(sum, x[s], factor);
                total = fmaf(state[s].y, factor, total);
            }
        }
        store(out + head * D + column, sum, 1.0f / total);
    }
}
// Many parts take as many registers as a thread has.
constexpr int FEW_PARTS = 8, MANY_PARTS = WARPS * MIN_BLOCKS <= 12 ? 24 : FEW_PARTS;
