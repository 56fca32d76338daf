// New rows of a step whose queries and keys come unrotated: their rotation, and their way into the cache.

#if FUSED
// New rows before their rotation.
struct Fresh {
    const Element *k, *v;
    const Positions *positions;
};

constexpr int PAIRS = ROTARY / 2;
constexpr int PIECE_SHIFT = ROTARY / 16;                            // pieces between the halves of pairs
constexpr bool PARTNER_HELD = HALVES && ROTARY == D && D % 64 == 0;  // a lane holds both halves of its pairs

// Columns of a pair.
DEVICE int first_of(int pair) { return HALVES ? pair : 2 * pair; }
DEVICE int second_of(int pair) { return HALVES ? pair + PAIRS : 2 * pair + 1; }

DEVICE float element(const uint4 &v, int i) {
    const float2 both = unpack2<Element>(word(v, i / 2));
    return i % 2 == 0 ? both.x : both.y;
}

// Piece `piece` (8 columns) of a head after the rotation; `other` is the piece with the other halves of its pairs.
DEVICE uint4 turned(const uint4 &own, const uint4 &other, int piece, const float2 *turns) {
    if (piece * 8 >= ROTARY) return own;
    float x[8];
#if HALVES
    const bool second = piece >= PIECE_SHIFT;
    const float4 *at = (const float4 *)(turns + (second ? piece - PIECE_SHIFT : piece) * 8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float4 two = at[i / 2];
        const float sine = i % 2 == 0 ? two.x : two.z, cosine = i % 2 == 0 ? two.y : two.w;
        const float a = element(own, i), b = element(other, i);
        x[i] = second ? turned_second(b, a, sine, cosine) : turned_first(a, b, sine, cosine);
    }
#else
    const float4 *at = (const float4 *)(turns + piece * 4);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const float4 two = at[i / 4];
        const float sine = i % 4 == 0 ? two.x : two.z, cosine = i % 4 == 0 ? two.y : two.w;
        const float a = element(own, i), b = element(own, i + 1);
        x[i] = turned_first(a, b, sine, cosine), x[i + 1] = turned_second(a, b, sine, cosine);
    }
#endif
    return make_uint4(pack2<Element>(x[0], x[1]), pack2<Element>(x[2], x[3]), pack2<Element>(x[4], x[5]),
                      pack2<Element>(x[6], x[7]));
}

// Writes one new row of a key head to the cache, with all threads.
DEVICE void write_row(const Fresh &fresh, Element *k, Element *v, i64 row, i64 slot, int kv_head) {
    const i64 from = (row * KV_HEADS + kv_head) * D, to = (slot * KV_HEADS + kv_head) * D;
    const float position = (float)(int)fresh.positions[row];
    for (int pair = threadIdx.x; pair < PAIRS; pair += WARPS * 32) {
        float sine, cosine;
        angle(position, pair, sine, cosine);
        const float a = to_f32(fresh.k[from + first_of(pair)]), b = to_f32(fresh.k[from + second_of(pair)]);
        k[to + first_of(pair)] = from_f32<Element>(turned_first(a, b, sine, cosine));
        k[to + second_of(pair)] = from_f32<Element>(turned_second(a, b, sine, cosine));
    }
    for (int c = ROTARY + threadIdx.x; c < D; c += WARPS * 32) k[to + c] = fresh.k[from + c];
    for (int c = threadIdx.x; c < D; c += WARPS * 32) v[to + c] = fresh.v[from + c];
}
#define CACHE Element
#define FRESH_PARAMETERS , const Element *new_k, const Element *new_v, const Positions *positions
#else
#define CACHE const Element
#define FRESH_PARAMETERS
#endif
