// Attention of single rows over a paged cache, split over the sequence.
//
// A block takes a range of keys for the query heads of one key head; its warps take tiles of 16 keys in turn. Scores are
// computed transposed: S^T[16 keys, 8 heads] = K Q^T and O^T[D, 8 heads] += V^T P^T, so that few heads fill the tensor
// core. A lane holds whole 16-byte pieces of rows as fragments of the matrix instruction: the order of a product's terms is
// free, so a lane's 16 contiguous bytes may stand for any columns, if both operands agree. Pieces come from global memory
// directly or through a ring in shared memory, with the same result.
// Blocks of a cluster join what they found through shared memory, each for a slice of the heads. If a row needs several
// clusters, each leaves maximum, sum and unscaled result in the workspace, and the last block to arrive for a slice of a row
// and key head joins them in order of the ranges. Without clusters every block stands for one.
//
// FUSED: queries and new keys come unrotated, and new rows are not in the cache yet. A block rotates its query heads; the
// block whose range ends with the row's own position takes that key and value from shared memory and writes them to the
// cache, where no other block reads them. A sequence of several rows is left to every block of it: each writes all rows it
// sees, to the same bits, and reads them back.

constexpr int NT = (HEAD_BLOCK + 7) / 8;  // tiles of 8 heads
constexpr int PAD = D + 4;

// Transposes an 8x8 matrix of 16-bit elements over the warp.
DEVICE u32 transpose(u32 v) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
    return out;
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(WARPS * 32, MIN_BLOCKS)
    KERNEL(const Element *q, CACHE *k, CACHE *v, const Starts *starts, const Lens *lens, const Table *table,
           Element *out, float *partials, u32 *counters, int b, int width, int pages FRESH_PARAMETERS) {
    constexpr int HEADS_SHARED = NT * 8;
    // Results of warps, SUMS floats apart.
#if STAGES
    constexpr int SUMS = RING_BYTES / 4;
    static_assert(HEADS_SHARED * PAD <= SUMS, "a warp's result takes the place of its ring");
    float *const sums = (float *)rings;
#else
    constexpr int SUMS = HEADS_SHARED * PAD;
    __shared__ __align__(16) float sums[WARPS * SUMS];
#endif
    __shared__ float tops[WARPS][HEADS_SHARED], totals[WARPS][HEADS_SHARED];
    __shared__ float2 joined[HEADS_SHARED];
    __shared__ u32 arrived;
    const Share share = share_of_block();
    const int guessed_tile = prefetch(k, v, lens, table, b, width, pages, share);
#if FUSED
    // Sines and cosines of the position as it looks before the wait; it is read again.
    static_assert(PAIRS <= WARPS * 32, "a thread has one pair");
    __shared__ __align__(16) float2 turns[PAIRS];
    __shared__ __align__(16) Element own_k[D], own_v[D];
    const int pair = threadIdx.x;
    const int guessed_position = peek(positions + blockIdx.z);
    float sine = 0.0f, cosine = 1.0f;
    if (pair < PAIRS) angle((float)guessed_position, pair, sine, cosine);
#endif
    wait_for_predecessor();
    release_successor();

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int kv_head = share.column / HEAD_BLOCKS, first_head = share.column % HEAD_BLOCKS * HEAD_BLOCK;
    const int heads = min(HEAD_BLOCK, GROUP - first_head);
    const int row = blockIdx.z;
    const i64 out_at = ((i64)row * HEADS + kv_head * GROUP + first_head) * D;

    uint4 qf[NT][KR];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int r = 0; r < KR; ++r) {
            const bool valid = n * 8 + g < heads && (t + 4 * r) * 8 < D;
            qf[n][r] = valid ? *(const uint4 *)(q + out_at + (n * 8 + g) * D + (t + 4 * r) * 8) : make_uint4(0, 0, 0, 0);
        }
    }

#if FUSED
    uint4 partner[NT][KR];
    if (HALVES && !PARTNER_HELD) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int r = 0; r < KR; ++r) {
                const int piece = t + 4 * r, other = piece < PIECE_SHIFT ? piece + PIECE_SHIFT : piece - PIECE_SHIFT;
                const bool valid = n * 8 + g < heads && piece * 8 < ROTARY;
                partner[n][r] = valid ? *(const uint4 *)(q + out_at + (n * 8 + g) * D + other * 8) : make_uint4(0, 0, 0, 0);
            }
        }
    }
    const i64 new_at = ((i64)row * KV_HEADS + kv_head) * D;
    const int position_of_row = (int)positions[row];
    Element new_first, new_second, new_rest, new_value[2];
    if (pair < PAIRS) new_first = new_k[new_at + first_of(pair)], new_second = new_k[new_at + second_of(pair)];
    if (ROTARY < D && ROTARY + pair < D) new_rest = new_k[new_at + ROTARY + pair];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x + i * WARPS * 32 < D) new_value[i] = new_v[new_at + threadIdx.x + i * WARPS * 32];
    }
#endif

    // What steps with one row a sequence need is read at once; other cases look again.
    constexpr int GUESSES = STAGES > 0 ? STAGES : 1;
    const int guess = min(row, b - 1);
    const int guessed_start = (int)starts[guess], guessed_end = (int)starts[guess + 1];
    int guessed_pages[GUESSES];
#pragma unroll
    for (int s = 0; s < GUESSES; ++s) {
        const int page = min((guessed_tile + s * STEP) / TOKENS_PER_BLOCK, width - 1);
        guessed_pages[s] = (int)table[(i64)guess * width + page];
    }
    int length = (int)lens[guess], sequence = guess, sequence_end = guessed_end;
    const bool others = guessed_start != row || guessed_end != row + 1;
    if (others) {
        sequence = sequence_of(starts, b, row);
        sequence_end = (int)starts[sequence + 1];
        length = (int)lens[sequence];
    }
    const int position = length - sequence_end + row;
    const Slots slots{table + (i64)sequence * width};

    const int last = position + 1, low = WINDOW > 0 ? max(0, last - WINDOW) : 0;
    const int aligned = low / TILE * TILE, span = last - aligned, chunk = chunk_of(span);
    const int used = (span + chunk - 1) / chunk;
    if (share.range >= used) return;
    const int begin = aligned + share.range * chunk, end = min(last, begin + chunk);

#if FUSED
    // Keys from here on are not read from the cache.
    const int fresh = others ? last : last - 1;
    if (others) {
        for (int earlier = (int)starts[sequence]; earlier <= row; ++earlier)
            write_row(Fresh{new_k, new_v, positions}, k, v, earlier, slots.of(length - sequence_end + earlier), kv_head);
        __syncthreads();
    }
    const int readable = min(end, fresh);
#else
    const int readable = end;
#endif

    const i64 row_stride = (i64)KV_HEADS * D;
    uint4 kf[2][KR], vf[4][VR];
    int tile = begin + warp * TILE;
    auto slot_of_tile = [&](int at) -> i64 {
        return TOKENS_PER_BLOCK % TILE == 0 && at < end ? slots.of(at) : 0;
    };
    const bool guessed = TOKENS_PER_BLOCK % TILE == 0 && sequence == guess && tile == guessed_tile;
    auto first_slot = [&](int s) -> i64 {
        const int at = tile + s * STEP;
        return guessed ? (i64)guessed_pages[s] * TOKENS_PER_BLOCK + at % TOKENS_PER_BLOCK : slot_of_tile(at);
    };
#if STAGES
    u8 *const ring = rings + warp * RING_BYTES;
    const Element *k_head = k + kv_head * D, *v_head = v + kv_head * D;
    auto fill = [&](int at, i64 base, int stage) {
        const u32 to = shared_address(ring + stage * TILE_BYTES);
#pragma unroll
        for (int i = 0; i < (TILE * PIECES + 31) / 32; ++i) {
            const int inside = (lane + 32 * i) / PIECES, piece = (lane + 32 * i) % PIECES, key = at + inside;
            if (TILE * PIECES % 32 != 0 && inside >= TILE) break;
            const bool valid = key >= low && key < readable;
            i64 slot = base + inside;
            if (TOKENS_PER_BLOCK % TILE != 0) slot = valid ? slots.of(key) : 0;
            copy_piece(to + key_piece(inside, piece), k_head + slot * row_stride + piece * 8, valid);
            copy_piece(to + value_piece(inside, piece), v_head + slot * row_stride + piece * 8, valid);
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
        if (tile + s * STEP < end) fill(tile + s * STEP, first_slot(s), s);
        copy_async_commit();
    }
    i64 next_base = slot_of_tile(tile + STAGES * STEP);
    int stage = 0;
#else
    const Element *k_head = k + kv_head * D + t * 8, *v_head = v + kv_head * D + g * 8;
    // Slots of the lane's rows: keys g and g + 8, values 2t, 2t + 1, 2t + 8, 2t + 9.
    auto load_k = [&](int tile, i64 base) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int key = tile + g + 8 * h;
            const bool valid = key >= low && key < readable;
            i64 slot = base + g + 8 * h;
            if (TOKENS_PER_BLOCK % TILE != 0) slot = valid ? slots.of(key) : 0;
#pragma unroll
            for (int r = 0; r < KR; ++r)
                kf[h][r] = load_valid(k_head + slot * row_stride + r * 32, valid && (t + 4 * r) * 8 < D);
        }
    };
    auto load_v = [&](int tile, i64 base) {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            const int inside = 2 * t + h % 2 + h / 2 * 8, key = tile + inside;
            const bool valid = key >= low && key < readable;
            i64 slot = base + inside;
            if (TOKENS_PER_BLOCK % TILE != 0) slot = valid ? slots.of(key) : 0;
#pragma unroll
            for (int r = 0; r < VR; ++r)
                vf[h][r] = load_valid(v_head + slot * row_stride + r * 64, valid && (g + 8 * r) * 8 < D);
        }
    };
    i64 next_base = first_slot(0);
    if (AHEAD && tile < end) {
        load_k(tile, next_base);
        load_v(tile, next_base);
    }
    i64 this_base = next_base;
    next_base = slot_of_tile(tile + STEP);
#endif

#if FUSED
    if (pair < PAIRS) {
        if (position_of_row != guessed_position) angle((float)position_of_row, pair, sine, cosine);
        const float p = to_f32(new_first), r = to_f32(new_second);
        turns[pair] = make_float2(sine, cosine);
        own_k[first_of(pair)] = from_f32<Element>(turned_first(p, r, sine, cosine));
        own_k[second_of(pair)] = from_f32<Element>(turned_second(p, r, sine, cosine));
    }
    if (ROTARY < D && ROTARY + pair < D) own_k[ROTARY + pair] = new_rest;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x + i * WARPS * 32 < D) own_v[threadIdx.x + i * WARPS * 32] = new_value[i];
    }
    __syncthreads();
    // The block at the end of the row's range owns its key; one for all query heads writes it.
    if (fresh < end && first_head == 0 && threadIdx.x < D / 4) {
        const i64 to = slots.of(fresh) * row_stride + kv_head * D;
        if (threadIdx.x < D / 8) {
            ((uint4 *)(k + to))[threadIdx.x] = ((const uint4 *)own_k)[threadIdx.x];
        } else {
            ((uint4 *)(v + to))[threadIdx.x - D / 8] = ((const uint4 *)own_v)[threadIdx.x - D / 8];
        }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int r = 0; r < KR; ++r) {
            if (PARTNER_HELD && r < KR / 2) {
                const uint4 low_half = qf[n][r], high_half = qf[n][r + KR / 2];
                qf[n][r] = turned(low_half, high_half, t + 4 * r, turns);
                qf[n][r + KR / 2] = turned(high_half, low_half, t + 4 * (r + KR / 2), turns);
            }
            if (!PARTNER_HELD) qf[n][r] = turned(qf[n][r], HALVES ? partner[n][r] : qf[n][r], t + 4 * r, turns);
        }
    }
#endif

    // acc[n][m]: columns (g + 8 (m / 4)) 8 + 2 (m % 4), and the next in the upper half; heads 2t and 2t + 1.
    float acc[NT][4 * VR][4];
    float top[NT][2], total[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int m = 0; m < 4 * VR; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[n][m][i] = 0.0f;
        top[n][0] = top[n][1] = -INFINITY_F32;
        total[n][0] = total[n][1] = 0.0f;
    }

    for (; tile < end; tile += STEP) {
#if STAGES
        copy_async_wait<STAGES - 1>();
        __syncwarp();
        const u8 *const here = ring + stage * TILE_BYTES;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int r = 0; r < KR; ++r) {
                const int piece = t + 4 * r;
                kf[h][r] = piece < PIECES ? *(const uint4 *)(here + key_piece(g + 8 * h, piece)) : make_uint4(0, 0, 0, 0);
            }
        }
#else
        if (!AHEAD) load_k(tile, this_base);
#endif
#if FUSED
        const bool has_own = tile <= fresh && fresh < min(end, tile + TILE);
        if (has_own) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int r = 0; r < KR; ++r) {
                    if (tile + g + 8 * h == fresh && (t + 4 * r) * 8 < D) kf[h][r] = ((const uint4 *)own_k)[t + 4 * r];
                }
            }
        }
#endif
        float s[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
            // Two sums, so that products wait less for each other.
            float other[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int r = 0; r < KR; ++r) {
                mma_16x8x16<Element>(s[n], kf[0][r].x, kf[1][r].x, kf[0][r].y, kf[1][r].y, qf[n][r].x, qf[n][r].y);
                mma_16x8x16<Element>(other, kf[0][r].z, kf[1][r].z, kf[0][r].w, kf[1][r].w, qf[n][r].z, qf[n][r].w);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] += other[i];
        }
#if STAGES
#pragma unroll
        for (int h = 0; h < 4; ++h) {
#pragma unroll
            for (int r = 0; r < VR; ++r) {
                const int inside = 2 * t + h % 2 + h / 2 * 8, piece = g + 8 * r;
                vf[h][r] = piece < PIECES ? *(const uint4 *)(here + value_piece(inside, piece)) : make_uint4(0, 0, 0, 0);
            }
        }
        __syncwarp();
        const int next = tile + STAGES * STEP;
        if (next < end) fill(next, next_base, stage);
        copy_async_commit();
        next_base = slot_of_tile(next + STEP);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
#else
        const int next = tile + STEP;
        const i64 base = next_base;
        if (AHEAD && next < end) load_k(next, base);
        if (!AHEAD) load_v(tile, this_base);
        next_base = slot_of_tile(next + STEP);
#endif

#if FUSED
        if (has_own) {
#pragma unroll
            for (int h = 0; h < 4; ++h) {
#pragma unroll
                for (int r = 0; r < VR; ++r) {
                    if (tile + 2 * t + h % 2 + h / 2 * 8 == fresh && (g + 8 * r) * 8 < D)
                        vf[h][r] = ((const uint4 *)own_v)[g + 8 * r];
                }
            }
        }
#endif

        u32 p[NT][2];
        const bool edge = tile + TILE > end || tile < low;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                x[i] = s[n][i] * SCALE_LOG2;
                const int key = tile + g + i / 2 * 8;
                if (edge && (key < low || key >= end)) x[i] = -INFINITY_F32;
            }
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float most = fmaxf(x[h], x[h + 2]);
#pragma unroll
                for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
                most = fmaxf(most, top[n][h]);
                shrink[h] = exp2_fast(top[n][h] - most);
                top[n][h] = most;
                x[h] = exp2_fast(x[h] - most);
                x[h + 2] = exp2_fast(x[h + 2] - most);
                total[n][h] = total[n][h] * shrink[h] + x[h] + x[h + 2];
            }
            p[n][0] = transpose(pack2<Element>(x[0], x[1]));
            p[n][1] = transpose(pack2<Element>(x[2], x[3]));
            if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int m = 0; m < 4 * VR; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) acc[n][m][i] *= shrink[i % 2];
            }
        }
#pragma unroll
        for (int r = 0; r < VR; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 a0 = __byte_perm(word(vf[0][r], i), word(vf[1][r], i), 0x5410);
                const u32 a1 = __byte_perm(word(vf[0][r], i), word(vf[1][r], i), 0x7632);
                const u32 a2 = __byte_perm(word(vf[2][r], i), word(vf[3][r], i), 0x5410);
                const u32 a3 = __byte_perm(word(vf[2][r], i), word(vf[3][r], i), 0x7632);
#pragma unroll
                for (int n = 0; n < NT; ++n) mma_16x8x16<Element>(acc[n][4 * r + i], a0, a1, a2, a3, p[n][0], p[n][1]);
            }
        }
#if !STAGES
        if (AHEAD && next < end) load_v(next, base);
        this_base = base;
#endif
    }

    // Join the warps.
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = total[n][h];
#pragma unroll
            for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
            const int head = n * 8 + 2 * t + h;
            if (g == 0) tops[warp][head] = top[n][h], totals[warp][head] = sum;
#pragma unroll
            for (int m = 0; m < 4 * VR; ++m) {
                const int column = (g + 8 * (m / 4)) * 8 + 2 * (m % 4);
                if (column < D)
                    *(float2 *)&sums[warp * SUMS + head * PAD + column] =
                        make_float2(acc[n][m][h], acc[n][m][h + 2]);
            }
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < heads * (D / 4); e += WARPS * 32) {
        const int head = e / (D / 4), column = e % (D / 4) * 4;
        float most = tops[0][head];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) most = fmaxf(most, tops[w][head]);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float all = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float factor = exp2_fast(tops[w][head] - most);
            const float4 x = *(const float4 *)&sums[w * SUMS + head * PAD + column];
            add(sum, x, factor);
            all = fmaf(totals[w][head], factor, all);
        }
        *(float4 *)&sums[head * PAD + column] = sum;
        if (column == 0) joined[head] = make_float2(most, all);
    }

    // Join the blocks of the cluster: each takes a slice of the heads, and those of blocks that a last cluster lacks.
    const int part = share.range / CLUSTER, parts = (used + CLUSTER - 1) / CLUSTER;
    const i64 cell = (i64)row * gridDim.y + share.column;
    float *const all_parts = partials + cell * (gridDim.x / CLUSTER) * PART, *const mine = all_parts + part * PART;
#if CLUSTER > 1
    cluster_arrive();
    cluster_wait();
    const int members = min(CLUSTER, used - part * CLUSTER), rank = share.range % CLUSTER;
#else
    __syncthreads();
    constexpr int members = 1, rank = 0;
#endif
    for (int slice = rank; slice < SLICES; slice += members) {
        const int slice_end = min(heads, (slice + 1) * SLICE) * (D / 4);
        for (int e = slice * SLICE * (D / 4) + threadIdx.x; e < slice_end; e += WARPS * 32) {
            const int head = e / (D / 4), column = e % (D / 4) * 4;
#if CLUSTER > 1
            const u32 at = shared_address(&sums[head * PAD + column]), state_at = shared_address(&joined[head]);
            float2 state[CLUSTER];
            float4 x[CLUSTER];
#pragma unroll
            for (int m = 0; m < CLUSTER; ++m) {
                state[m] = make_float2(-INFINITY_F32, 0.0f);
                x[m] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (m < members) state[m] = load_cluster2(in_block(state_at, m)), x[m] = load_cluster4(in_block(at, m));
            }
            float most = state[0].x;
#pragma unroll
            for (int m = 1; m < CLUSTER; ++m) most = fmaxf(most, state[m].x);
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            float all = 0.0f;
#pragma unroll
            for (int m = 0; m < CLUSTER; ++m) {
                const float factor = exp2_fast(state[m].x - most);
                add(sum, x[m], factor);
                all = fmaf(state[m].y, factor, all);
            }
#else
            const float4 sum = *(const float4 *)&sums[head * PAD + column];
            const float most = joined[head].x, all = joined[head].y;
#endif
            if (parts == 1) {
                store(out + out_at + head * D + column, sum, 1.0f / all);
            } else {
                *(float4 *)(mine + STATE + head * D + column) = sum;
                if (column == 0) *(float2 *)(mine + 2 * head) = make_float2(most, all);
            }
        }
    }
#if CLUSTER > 1
    // Nobody leaves while others read its memory; what a block has read is in its stores.
    cluster_arrive_relaxed();
#endif
    // Blocks that wrote a slice to the workspace arrive at its counter; the last of them joins the slice's parts.
    if (parts > 1) {
        for (int slice = rank; slice < SLICES; slice += members) {
            __syncthreads();
            if (threadIdx.x == 0) {
                u32 *const counter = counters + cell * SLICES + slice;
                arrived = arrive(counter);
                if (arrived == parts - 1) *counter = 0;
            }
            __syncthreads();
            if (arrived == parts - 1) {
                const int first = slice * SLICE, end = min(heads, first + SLICE);
                if (parts > FEW_PARTS) {
                    join_parts<MANY_PARTS>(all_parts, parts, first, end, out + out_at);
                } else {
                    join_parts<FEW_PARTS>(all_parts, parts, first, end, out + out_at);
                }
            }
        }
    }
#if CLUSTER > 1
    cluster_wait();
#endif
}
