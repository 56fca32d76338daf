// Attention of tiles of query rows on Hopper: matrix instructions of warp groups, a group that only copies.
//
// A block stays on its multiprocessor and takes tiles of 128 query rows, each of one sequence and one head, until a
// counter says that none is left. Group 0 copies: the queries, then keys and values 128 at a time through two stages
// each. Groups 1 and 2 compute, 64 rows each; while one takes its exponentials the other multiplies. All tiles lie in
// shared memory as columns of 64 elements, rows of 128 bytes, whose 16-byte pieces are exchanged by the row's number
// modulo 8.

constexpr int ROWS = 128;
constexpr int BN = 128;
constexpr int PIECES = D / 8;
constexpr int Q_BYTES = ROWS * D * 2;
constexpr int KV_BYTES = BN * D * 2;
constexpr int COLUMN_BYTES = 128 * 128;
constexpr int WARPS = 8;  // that compute
constexpr bool TURNS = true;

// ---- barriers in shared memory -------------------------------------------------------------------------------------

DEVICE void barrier_init(u32 at, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count)); }
DEVICE void barrier_arrive(u32 at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}
// Waits for the end of the phase of this parity.
DEVICE void barrier_wait(u32 at, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(at),
        "r"(parity)
        : "memory");
}

// Arrives once all earlier copies of this thread are done. Who waits needs `copies_visible` before the matrix unit reads.
DEVICE void barrier_arrive_after_copies(u32 at) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(at) : "memory");
}
DEVICE void copies_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Turns of the computing groups: while one multiplies, the other takes its exponentials.
DEVICE void turn_wait(int group) { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
DEVICE void turn_pass(int group) { asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory"); }

// ---- matrix instructions -------------------------------------------------------------------------------------------

// A tile in shared memory. `leading` is the distance of columns of 64 elements where rows are the inner dimension of
// the product; groups of eight rows are 1024 bytes apart.
DEVICE u64 descriptor(u32 address, u32 leading) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Keeps what computes `c` before this point, and what reads it behind.
template <int N> DEVICE void pin(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int PENDING, int N> DEVICE void products_wait(float (&c)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    pin(c);
}

#define SUMS_8(c, i) \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define SUMS_32(c, i) SUMS_8(c, i), SUMS_8(c, i + 8), SUMS_8(c, i + 16), SUMS_8(c, i + 24)
#define NAMES_32                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                       \
    NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "  \
             "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c[64, 128] = a[64, 16] b[128, 16]^T, plus c if `more`; both in shared memory.
DEVICE void product(float (&c)[64], u64 a, u64 b, int more) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT "." ELEMENT
                 " {" NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;}"
                 : SUMS_32(c, 0), SUMS_32(c, 32)
                 : "l"(a), "l"(b), "r"(more));
}
// c[64, 128] = a[64, 16] b[16, 128], plus c if `more`; a in registers, as of mma_16x8x16 for each warp.
DEVICE void product(float (&c)[64], const u32 (&a)[4], u64 b, int more) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT "." ELEMENT
                 " {" NAMES_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
                 : SUMS_32(c, 0), SUMS_32(c, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}
DEVICE void product(float (&c)[32], const u32 (&a)[4], u64 b, int more) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT "." ELEMENT
                 " {" NAMES_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"
                 : SUMS_32(c, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// Where a tile of query rows stands.
struct Tile {
    int head, sequence, start, first_row, count, first_position, key_begin, key_end, steps;
};

#if PAGED
DEVICE bool tile_at(Tile &tile, int item, int tiles, const Starts *starts, const Lens *lens, int b) {
#else
DEVICE bool tile_at(Tile &tile, int item, int tiles, const Starts *starts, int b) {
#endif
    int number;
    tile.head = item % HEADS;
    // Late tiles see the most keys and begin first.
    if (!tile_of<ROWS>(starts, b, tiles - 1 - item / HEADS, tile.sequence, number)) return false;
    tile.start = (int)starts[tile.sequence];
    const int rows = (int)starts[tile.sequence + 1] - tile.start;
#if PAGED
    const int keys = (int)lens[tile.sequence];
#else
    const int keys = rows;
#endif
    tile.first_row = number * ROWS;
    tile.count = min(ROWS, rows - tile.first_row);
    tile.first_position = keys - rows + tile.first_row;
    tile.key_end = CAUSAL ? tile.first_position + tile.count : keys;
    tile.key_begin = WINDOW > 0 ? max(0, tile.first_position + 1 - WINDOW) / BN * BN : 0;
    tile.steps = (tile.key_end - tile.key_begin + BN - 1) / BN;
    return true;
}

#if PAGED
#define TILE_AT(item) tile_at(tile, item, tiles, starts, lens, b)
#else
#define TILE_AT(item) tile_at(tile, item, tiles, starts, b)
#endif

extern "C" __global__ void __launch_bounds__(384, 1)
    KERNEL(const Element *q, const Element *k, const Element *v, const Starts *starts, PAGING_PARAMETERS Element *out,
           u32 *counters, int b, int tiles) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ __align__(8) u64 barriers[13];
    __shared__ volatile int ring[2];
    wait_for_predecessor();
    release_successor();
    const u32 sq = (shared_address(shared) + 1023) / 1024 * 1024, sk = sq + Q_BYTES, sv = sk + 2 * KV_BYTES;
    const u32 full_k = shared_address(barriers), full_v = full_k + 16, empty_k = full_k + 32, empty_v = full_k + 48;
    const u32 empty_q = full_k + 64, full_item = full_k + 72, empty_item = full_k + 88;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < 4; ++i) barrier_init(full_k + 8 * i, 128), barrier_init(empty_k + 8 * i, WARPS);
        barrier_init(empty_q, WARPS);
#pragma unroll
        for (int i = 0; i < 2; ++i) barrier_init(full_item + 8 * i, 1), barrier_init(empty_item + 8 * i, 12);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, items = tiles * HEADS;
    Tile tile;
    u32 step = 0;
    // The number of the tile for a turn; the same for all warps.
    auto take = [&](u32 turn) -> int {
        barrier_wait(full_item + 8 * (turn % 2), turn / 2 % 2);
        const int item = ring[turn % 2];
        __syncwarp();
        if (lane == 0) barrier_arrive(empty_item + 8 * (turn % 2));
        return item;
    };
    auto give = [&](u32 turn, int item) {
        barrier_wait(empty_item + 8 * (turn % 2), turn / 2 % 2 ^ 1);
        ring[turn % 2] = item;
        barrier_arrive(full_item + 8 * (turn % 2));
    };

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        const int warp = threadIdx.x / 32;
        // A warp copies 32 rows, as many at a time as it has lanes for.
        constexpr int AT_ONCE = 32 / PIECES;
        const int piece = lane % PIECES;
        u32 done = 0;
        if (threadIdx.x == 0) give(0, blockIdx.x);
        for (u32 turn = 0;; ++turn) {
            const int item = take(turn);
            if (item >= items) break;
            // Whoever is free takes the next tile.
            int next = 0;
            if (threadIdx.x == 0) next = gridDim.x + (int)atomicAdd(counters, 1u);
            if (!TILE_AT(item)) {
                if (threadIdx.x == 0) give(turn + 1, next);
                continue;
            }
#if PAGED
            const Table *pages = table + (i64)tile.sequence * width;
#endif
            // Row of the cache for key `lane` of the warp's part of a step.
            auto slot_of = [&](int number) -> int {
                const int key = min(tile.key_begin + number * BN + warp * 32 + lane, tile.key_end - 1);
#if PAGED
                return (int)pages[key / TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK + key % TOKENS_PER_BLOCK;
#else
                return tile.start + key;
#endif
            };
            auto copy_row = [&](u32 to, int row, const Element *from, bool valid) {
                to += piece / 8 * COLUMN_BYTES + row * 128 + (piece % 8 ^ row % 8) * 16;
                copy_async(to, from + piece * 8, valid);
            };
            const int kv_head = tile.head / GROUP;
            const Element *k_head = k + kv_head * D, *v_head = v + kv_head * D;
            const Element *q_head = q + ((i64)(tile.start + tile.first_row) * HEADS + tile.head) * D;
            int slot = slot_of(0);
            barrier_wait(empty_q, done % 2 ^ 1);
            ++done;
#pragma unroll 4
            for (int i = 0; i < 32; i += AT_ONCE) {
                const int row = warp * 32 + i + lane / PIECES;
                const bool valid = row < tile.count;
                copy_row(sq, row, q_head + (valid ? (i64)row * (HEADS * D) : 0), valid);
            }
            for (int number = 0; number < tile.steps; ++number, ++step) {
                const int coming = slot_of(number + 1);
                const u32 stage = step % 2, parity = step / 2 % 2 ^ 1;
                const int valid = tile.key_end - tile.key_begin - number * BN;
                auto copy_step = [&](u32 to, const Element *from) {
#pragma unroll 4
                    for (int i = 0; i < 32; i += AT_ONCE) {
                        const int inside = i + lane / PIECES, row = warp * 32 + inside;
                        const i64 at = __shfl_sync(0xffffffffu, slot, inside);
                        copy_row(to, row, from + at * (KV_HEADS * D), row < valid);
                    }
                };
                barrier_wait(empty_k + 8 * stage, parity);
                copy_step(sk + stage * KV_BYTES, k_head);
                barrier_arrive_after_copies(full_k + 8 * stage);
                barrier_wait(empty_v + 8 * stage, parity);
                copy_step(sv + stage * KV_BYTES, v_head);
                barrier_arrive_after_copies(full_v + 8 * stage);
                slot = coming;
            }
            if (threadIdx.x == 0) give(turn + 1, next);
        }
        // The last block to end leaves the counters as it found them.
        if (threadIdx.x == 0 && atomicAdd(counters + 1, 1u) == gridDim.x - 1) counters[0] = 0, counters[1] = 0;
        // Nothing is left in flight when the block ends.
        copy_async_commit();
        copy_async_wait<0>();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
        const int group = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, g = lane / 4, t = lane % 4;
        const u32 q_at = sq + group * 64 * 128;
        if (TURNS && group == 1) turn_pass(group);
        for (u32 turn = 0;; ++turn) {
            const int item = take(turn);
            if (item >= items) break;
            if (!TILE_AT(item)) continue;
            const int warp_row = group * 64 + warp * 16;
            float s[64], o[D / 2];
            float top[2] = {-INFINITY_F32, -INFINITY_F32}, total[2] = {0.0f, 0.0f};
            auto scores = [&](u32 at) {
                copies_visible();
                products_begin();
#pragma unroll
                for (int c = 0; c < D / 16; ++c) {
                    const u32 in = c / 4 * COLUMN_BYTES + c % 4 * 32;
                    product(s, descriptor(q_at + in, 16), descriptor(at + in, 16), c > 0);
                }
                products_commit();
            };
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] = 0.0f;
            float shrink[2];
            // Turns the scores of a step into weights, and says by what earlier sums shrink.
            auto soften = [&](int number) {
                const int block = tile.key_begin + number * BN;
                const bool edge = block + BN > tile.key_end || (CAUSAL && block + BN > tile.first_position + 1) ||
                                  (WINDOW > 0 && block + WINDOW <= tile.first_position + ROWS);
                if (edge) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int row = tile.first_position + warp_row + g + 8 * h;
                        const int high = (CAUSAL ? min(tile.key_end, row + 1) : tile.key_end) - block - 2 * t;
                        const int low = WINDOW > 0 ? row + 1 - WINDOW - block - 2 * t : -BN;
#pragma unroll
                        for (int n = 0; n < BN / 8; ++n)
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                const int key = n * 8 + i;
                                if (key >= high || (WINDOW > 0 && key < low)) s[4 * n + 2 * h + i] = -INFINITY_F32;
                            }
                    }
                }
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float most = top[h];
#pragma unroll
                    for (int n = 0; n < BN / 8; ++n) most = fmaxf(most, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
                    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
                    const float base = most == -INFINITY_F32 ? 0.0f : most * SCALE_LOG2;
                    shrink[h] = exp2_fast(fmaf(top[h], SCALE_LOG2, -base));
                    top[h] = most;
                    float sum = 0.0f;
#pragma unroll
                    for (int n = 0; n < BN / 8; ++n) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            float &x = s[4 * n + 2 * h + i];
                            x = exp2_fast(fmaf(x, SCALE_LOG2, -base));
                            sum += x;
                        }
                    }
                    total[h] = total[h] * shrink[h] + sum;
                }
            };
            u32 p[BN / 16][4];
            auto pack = [&]() {
#pragma unroll
                for (int c = 0; c < BN / 16; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i) p[c][i] = pack2<Element>(s[8 * c + 2 * i], s[8 * c + 2 * i + 1]);
            };
            auto values = [&](u32 at) {
                copies_visible();
                products_begin();
#pragma unroll
                for (int c = 0; c < BN / 16; ++c) product(o, p[c], descriptor(at + c * 2048, COLUMN_BYTES), 1);
                products_commit();
            };
            barrier_wait(full_k + 8 * (step % 2), step / 2 % 2);
            scores(sk + step % 2 * KV_BYTES);
            products_wait<0>(s);
            if (lane == 0) barrier_arrive(empty_k + 8 * (step % 2));
            if (lane == 0 && tile.steps == 1) barrier_arrive(empty_q);
            soften(0);
            pack();
            for (int number = 1; number < tile.steps; ++number, ++step) {
                const u32 next = step + 1;
                barrier_wait(full_k + 8 * (next % 2), next / 2 % 2);
                if (TURNS) turn_wait(group);
                scores(sk + next % 2 * KV_BYTES);
                barrier_wait(full_v + 8 * (step % 2), step / 2 % 2);
                values(sv + step % 2 * KV_BYTES);
                if (TURNS) turn_pass(group);
                products_wait<1>(s);
                if (lane == 0) barrier_arrive(empty_k + 8 * (next % 2));
                if (lane == 0 && number + 1 == tile.steps) barrier_arrive(empty_q);
                soften(number);
                products_wait<0>(o);
                if (lane == 0) barrier_arrive(empty_v + 8 * (step % 2));
                pack();
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[4 * n + i] *= shrink[i / 2];
            }
            barrier_wait(full_v + 8 * (step % 2), step / 2 % 2);
            values(sv + step % 2 * KV_BYTES);
            products_wait<0>(o);
            if (lane == 0) barrier_arrive(empty_v + 8 * (step % 2));
            ++step;

#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float sum = total[h];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
                const int row = warp_row + g + 8 * h;
                Element *to = out + ((i64)(tile.start + tile.first_row + row) * HEADS + tile.head) * D;
                // Four lanes hold a row's pieces of 16 bytes together; each collects one piece of four.
#pragma unroll
                for (int n = 0; n < D / 8; n += 4) {
                    u32 own[4], piece[4];
#pragma unroll
                    for (int j = 0; j < 4; ++j)
                        own[j] = pack2<Element>(o[4 * (n + j) + 2 * h] * factor, o[4 * (n + j) + 2 * h + 1] * factor);
#pragma unroll
                    for (int x = 0; x < 4; ++x) {
                        // Lane t sends piece t ^ x to its owner and gets its part from lane t ^ x.
                        const int give = t ^ x;
                        const u32 sent = give == 0 ? own[0] : give == 1 ? own[1] : give == 2 ? own[2] : own[3];
                        const u32 got = __shfl_xor_sync(0xffffffffu, sent, x);
#pragma unroll
                        for (int j = 0; j < 4; ++j)
                            if (give == j) piece[j] = got;
                    }
                    if (row < tile.count)
                        *(uint4 *)(to + (n + t) * 8) = make_uint4(piece[0], piece[1], piece[2], piece[3]);
                }
            }
        }
    }
}
