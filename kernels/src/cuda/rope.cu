// Rotary position embedding, writes to the paged cache, and both in one pass.
//
// ROTATE: number of rotated tensors (0, 1 for `rope` alone, 2 for q and k of a group). APPEND: whether rows go to the
// cache. A head is cut into pieces: PAIRS pieces of VEC pairs and REST pieces of VEC elements behind the rotated ones. A
// thread keeps its piece while it goes from head to head, so that its sines and cosines serve all of them.

constexpr int PAIRS = ROTARY / 2 / VEC;
constexpr int REST = (D - ROTARY) / VEC;
constexpr int PIECES = PAIRS + REST;
constexpr int SLOTS = THREADS / PIECES;

struct __align__(VEC * sizeof(Element)) Vec {
    Element e[VEC];
};
struct __align__(PAIR_ALIGN) Pair {
    Element e[2 * VEC];
};

#if APPEND
// Where a row goes: its slot in the cache.
DEVICE i64 slot_of(const Starts *starts, const Lens *lens, const Table *table, int b, int width, int row) {
    const int sequence = sequence_of(starts, b, row);
    const int position = (int)lens[sequence] - (int)starts[sequence + 1] + row;
    const i64 page = (i64)table[(i64)sequence * width + position / TOKENS_PER_BLOCK];
    return page * TOKENS_PER_BLOCK + position % TOKENS_PER_BLOCK;
}
#endif

#if ROTATE
// Piece `piece` of a head at `from`, rotated, to one or two places.
DEVICE void turn(const Element *from, Element *to, Element *second, int piece, const float (&sines)[VEC],
                 const float (&cosines)[VEC]) {
    if (REST > 0 && piece >= PAIRS) {
        const int at = ROTARY + (piece - PAIRS) * VEC;
        const Vec v = *(const Vec *)(from + at);
        if (to != nullptr) *(Vec *)(to + at) = v;
        if (second != nullptr) *(Vec *)(second + at) = v;
        return;
    }
#if HALVES
    const int low = piece * VEC, high = low + ROTARY / 2;
    const Vec a = *(const Vec *)(from + low), b = *(const Vec *)(from + high);
    Vec x, y;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const float p = to_f32(a.e[i]), r = to_f32(b.e[i]);
        x.e[i] = from_f32<Element>(turned_first(p, r, sines[i], cosines[i]));
        y.e[i] = from_f32<Element>(turned_second(p, r, sines[i], cosines[i]));
    }
    if (to != nullptr) *(Vec *)(to + low) = x, *(Vec *)(to + high) = y;
    if (second != nullptr) *(Vec *)(second + low) = x, *(Vec *)(second + high) = y;
#else
    const int at = piece * 2 * VEC;
    const Pair a = *(const Pair *)(from + at);
    Pair x;
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const float p = to_f32(a.e[2 * i]), r = to_f32(a.e[2 * i + 1]);
        x.e[2 * i] = from_f32<Element>(turned_first(p, r, sines[i], cosines[i]));
        x.e[2 * i + 1] = from_f32<Element>(turned_second(p, r, sines[i], cosines[i]));
    }
    if (to != nullptr) *(Pair *)(to + at) = x;
    if (second != nullptr) *(Pair *)(second + at) = x;
#endif
}

// Sines and cosines of a piece.
DEVICE void angles(float position, int piece, float (&sines)[VEC], float (&cosines)[VEC]) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) angle(position, REST > 0 && piece >= PAIRS ? 0 : piece * VEC + i, sines[i], cosines[i]);
}
#endif

#if ROTATE == 0
extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL(Unit *cache, const Unit *x, const Starts *starts, const Lens *lens, const Table *table, int b, int width) {
    wait_for_predecessor();
    release_successor();
    const int row = blockIdx.x;
    const i64 slot = slot_of(starts, lens, table, b, width, row);
    for (int c = threadIdx.x; c < UNITS; c += THREADS) cache[slot * UNITS + c] = x[(i64)row * UNITS + c];
}
#elif ROTATE == 1
extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL(const Element *x, const Positions *positions, Element *out) {
    wait_for_predecessor();
    release_successor();
    const int row = blockIdx.x, piece = threadIdx.x % PIECES, slot = threadIdx.x / PIECES;
    float sines[VEC], cosines[VEC];
    angles((float)positions[row], piece, sines, cosines);
    for (int head = blockIdx.y * SLOTS + slot; head < HEADS && slot < SLOTS; head += SLOTS * gridDim.y) {
        const i64 at = ((i64)row * HEADS + head) * D;
        turn(x + at, out + at, nullptr, piece, sines, cosines);
    }
}
#else
extern "C" __global__ void __launch_bounds__(THREADS)
    KERNEL(const Element *q, Element *q_out, const Element *k, const Element *v, Element *k_cache, Element *v_cache,
           const Positions *positions, const Starts *starts, const Lens *lens, const Table *table, int b, int width
#if KEEP_K
           , Element *k_out
#endif
    ) {
    wait_for_predecessor();
    release_successor();
    const int row = blockIdx.x, piece = threadIdx.x % PIECES, slot = threadIdx.x / PIECES;
    const int position = (int)positions[row];
    const i64 place = slot_of(starts, lens, table, b, width, row) * KV_HEADS;
    float sines[VEC], cosines[VEC];
    angles((float)position, piece, sines, cosines);
    // Query heads, key heads, then value heads.
    for (int head = blockIdx.y * SLOTS + slot; head < HEADS + 2 * KV_HEADS && slot < SLOTS;
         head += SLOTS * gridDim.y) {
        if (head < HEADS) {
            const i64 at = ((i64)row * HEADS + head) * D;
            turn(q + at, q_out + at, nullptr, piece, sines, cosines);
        } else if (head < HEADS + KV_HEADS) {
            const int h = head - HEADS;
            const i64 at = ((i64)row * KV_HEADS + h) * D;
#if KEEP_K
            turn(k + at, k_cache + (place + h) * D, k_out + at, piece, sines, cosines);
#else
            turn(k + at, k_cache + (place + h) * D, nullptr, piece, sines, cosines);
#endif
        } else {
            const int h = head - HEADS - KV_HEADS;
            const Element *from = v + ((i64)row * KV_HEADS + h) * D;
            Element *to = v_cache + (place + h) * D;
#pragma unroll
            for (int c = 0; c < D / VEC; c += PIECES) {
                if (c + piece < D / VEC) ((Vec *)to)[c + piece] = ((const Vec *)from)[c + piece];
            }
        }
    }
}
#endif
