// How a block finds the keys of its range and brings them near.
//
// STAGES = 0: tiles go from global memory into registers. Otherwise each warp has a ring of so many tiles in shared memory,
// filled by asynchronous copies of whole rows, so that more of the cache is on its way than registers could hold.

constexpr int TILE = 16;
constexpr int STEP = WARPS * TILE;
constexpr int KR = (D + 31) / 32;  // 16-byte pieces of a key row that a lane holds
constexpr int VR = (D + 63) / 64;  // 16-byte pieces of a value row that a lane holds
constexpr int PIECES = D / 8;      // 16-byte pieces of a row

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
// Bytes that level 2 fetches when it misses: whole rows lie together, and all of them is wanted.
#if FETCH
#define FETCH_HINT ".L2::" TEXT(FETCH) "B"
#else
#define FETCH_HINT ""
#endif

// 16 bytes that are read once, zeros where `valid` is false.
DEVICE uint4 load_valid(const void *at, bool valid) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@p ld.global.L1::no_allocate" FETCH_HINT ".v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(at), "r"((u32)valid));
    return v;
}

DEVICE u32 word(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Cache slots of the keys of a tile that a lane reads. If pages hold whole tiles one lookup serves all.
struct Slots {
    const Table *pages;

    DEVICE i64 of(int key) const {
        return (i64)pages[key / TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK;
    }
};

// Keys of a block's range: equal parts of what the row sees, in whole grains. One cluster does as long as its blocks have few
// steps.
DEVICE int chunk_of(int span) {
    const int blocks = CLUSTER > 1 && span <= CLUSTER * ONE_CLUSTER ? CLUSTER : (int)gridDim.x;
    return max(MIN_CHUNK, ((span + blocks - 1) / blocks + GRAIN - 1) / GRAIN * GRAIN);
}

// Which range of which heads a block takes. HEADS_FIRST: heads of the same keys are launched side by side.
struct Share {
    int range, column;
};
DEVICE Share share_of_block() {
    if (!HEADS_FIRST) return {(int)blockIdx.x, (int)blockIdx.y};
    const int cluster = (blockIdx.y * gridDim.x + blockIdx.x) / CLUSTER;
    return {cluster / (int)gridDim.y * CLUSTER + (int)(blockIdx.x % CLUSTER), cluster % (int)gridDim.y};
}

template <typename I> DEVICE int peek(const I *at) { return (int)__ldcg(at); }

// Guesses the first tile of the warp while the predecessor still runs, and brings it into the level 2 cache.
//
// Lengths and table may hold anything here: an earlier step's, half of this one's, or what memory held before. So nothing read is
// an address as it is: a length counts up to the table's room and 2^30, so that no sum overflows and every key has an entry in
// the table; a page counts if the cache has it; rows are brought near, not read. Both are read past level 1, which would keep the old.
// A wrong guess brings wrong rows and nothing else: who uses the tile looks up its pages again after the wait, within the table,
// and compares the tile with its own.
DEVICE int prefetch(const Element *k, const Element *v, const Lens *lens, const Table *table, int b, int width, int pages,
                    Share share) {
#if ARCH >= 900
    const int guess = min((int)blockIdx.z, b - 1);
    const int room = min(width, (1 << 30) / TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK;
    const int length = min(max(0, peek(lens + guess)), room);
    const int aligned = (WINDOW > 0 ? max(0, length - WINDOW) : 0) / TILE * TILE;
    const int chunk = chunk_of(length - aligned);
    const int tile = aligned + share.range * chunk + threadIdx.x / 32 * TILE, key = tile + threadIdx.x % TILE;
    const int block = tile / TOKENS_PER_BLOCK;
    if (TOKENS_PER_BLOCK % TILE != 0 || key >= length) return tile;
    const int page = peek(table + (i64)guess * width + block);
    if (page < 0 || page >= pages) return tile;
    const Element *from = threadIdx.x % 32 < TILE ? k : v;
    from += (((i64)page * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK) * KV_HEADS + share.column / HEAD_BLOCKS) * D;
#pragma unroll
    for (int c = 0; c < D; c += 64) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + c));
    return tile;
#else
    return share.range * MIN_CHUNK + threadIdx.x / 32 * TILE;
#endif
}

#if STAGES == 0
constexpr bool AHEAD = D <= 128;  // registers hold the next tile while this one is used
#else
// A warp's ring. Pieces of a row are permuted within groups of eight, differently for neighbouring rows, so that the pieces that
// eight lanes read or write together lie in different banks.
constexpr int ROW_BYTES = VR * 128, SIDE_BYTES = TILE * ROW_BYTES, TILE_BYTES = 2 * SIDE_BYTES;
constexpr int RING_BYTES = STAGES * TILE_BYTES;
extern __shared__ __align__(128) u8 rings[];

DEVICE int key_piece(int row, int piece) { return row * ROW_BYTES + (piece ^ (row % 2 * 4)) * 16; }
DEVICE int value_piece(int row, int piece) { return SIDE_BYTES + row * ROW_BYTES + (piece ^ (row / 2 % 4 * 2)) * 16; }

// 16 bytes to shared memory, zeros where `valid` is false.
DEVICE void copy_piece(u32 to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global" FETCH_HINT " [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
#endif
