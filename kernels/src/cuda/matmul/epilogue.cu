// From accumulators to memory. A warp holds 16 rows by N panels of 8 columns as tensor cores leave them: with
// g = lane / 4 and t = lane % 4, acc[j][0], acc[j][1] are row g, columns 2t, 2t+1 of panel j; acc[j][2], acc[j][3] are row
// g+8 of those. With a gated epilogue the even panels gate the odd ones, and panel j of the result is made of both.
//
// Constants and functions written for the problem: ELEMENT, OUT, GATED, BIAS, OPERANDS, LIGHT (nothing but one operand),
// ALIGNED (every width is a multiple of 8), OUT_PANELS, SECOND (position of the second segment in the bias), Pointers,
// place_of, operand_of, finish.

// Whether results go through scratch memory.
constexpr bool STAGED = ALIGNED && sizeof(OUT) == 2;

// Address in a warp's scratch memory of 16 bytes: row `row` of 16, unit `unit` of UNITS. Eight rows of one unit, and one
// row of all units, are in distinct banks.
template <int UNITS> DEVICE u32 scratch_slot(u32 scratch, int row, int unit) {
    static_assert(UNITS == 8 || UNITS == 4 || UNITS == 2 || UNITS == 1, "a row is at most 128 bytes");
    return scratch + row * (UNITS * 16) + ((unit ^ ((row * UNITS / 8) & (UNITS - 1))) << 4);
}

DEVICE void store_shared(u32 at, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
DEVICE void store_shared(u32 at, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE u32 load_shared_word(u32 at) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
DEVICE uint4 load_shared(u32 at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}

// Bias of columns `column`, `column + 1` of the result panel `panel`; the second segment's if `second`.
DEVICE float2 bias_of(const Pointers &p, const Place &place, int column, bool second) {
    if (!BIAS) return make_float2(0.0f, 0.0f);
    const ELEMENT *at = bias_pointer(p) + place.first + column + (second ? SECOND : 0);
    if (ALIGNED) return unpack2<ELEMENT>(*(const u32 *)at);
    return make_float2(column < place.width ? to_f32(at[0]) : 0.0f, column + 1 < place.width ? to_f32(at[1]) : 0.0f);
}

// The two neighbouring columns of row half `h` that accumulators of result panel `j` stand for.
template <int N>
DEVICE float2 finish_pair(const float (&acc)[N][4], int j, int h, float2 bias, float2 second, const float2 *operands) {
    float a[OPERANDS + 1], b[OPERANDS + 1];
#pragma unroll
    for (int q = 0; q < OPERANDS; ++q) a[q] = operands[q].x, b[q] = operands[q].y;
    if (GATED)
        return make_float2(finish(acc[2 * j][2 * h], acc[2 * j + 1][2 * h], bias.x, second.x, a),
                           finish(acc[2 * j][2 * h + 1], acc[2 * j + 1][2 * h + 1], bias.y, second.y, b));
    return make_float2(finish(acc[j][2 * h], 0.0f, bias.x, 0.0f, a), finish(acc[j][2 * h + 1], 0.0f, bias.y, 0.0f, b));
}

// How a warp's part of a tile goes through scratch memory: chunks of UNITS panels, STEP rows an access.
template <int N> struct Chunks {
    static constexpr int OUT_N = GATED ? N / 2 : N;
    // Operands beside other steps leave registers for half lines only.
    static constexpr int UNITS = OUT_N % 8 == 0 && (LIGHT || !OPERANDS) ? 8 : OUT_N % 4 == 0 ? 4 : OUT_N % 2 == 0 ? 2 : 1;
    static constexpr int STEP = 32 / UNITS, COUNT = OUT_N / UNITS;
    // Chunks whose operand is under way.
    static constexpr int DEPTH = !STAGED || !LIGHT ? 0 : COUNT < 2 ? COUNT : 2;
};

// A warp's accesses to operands in whole lines.
template <int N> struct Ahead {
    typedef Chunks<N> C;
    uint4 data[C::DEPTH + 1][16 / C::STEP];

    // Loads operand `q` of chunk `chunk` to place `at`; `panel` counts the result's.
    DEVICE void fetch(int at, const Pointers &p, int q, int chunk, int row, int panel, int m) {
        const int lane = threadIdx.x % 32, mine = panel + chunk * C::UNITS + lane % C::UNITS;
        const Place place = place_of(p, mine);
#pragma unroll
        for (int i = 0; i < 16 / C::STEP; ++i) {
            const int r = row + i * C::STEP + lane / C::UNITS;
            data[at][i] = make_uint4(0, 0, 0, 0);
            if (r < m && mine < OUT_PANELS)
                data[at][i] = *(const uint4 *)(operand_of(p, q) + (i64)r * place.width + place.column);
        }
    }
    // Begins what `store_rows` will wait for; call it before the accumulators are there.
    DEVICE void begin(const Pointers &p, int row, int panel, int m) {
#pragma unroll
        for (int chunk = 0; chunk < C::DEPTH; ++chunk) fetch(chunk, p, 0, chunk, row, GATED ? panel / 2 : panel, m);
    }
};

// Through scratch memory, so that loads and stores are whole lines: 16-bit results, aligned widths.
template <int N>
DEVICE void store_staged(const float (&acc)[N][4], Ahead<N> &ahead, const Pointers &p, int row, int panel, int from,
                         int m, u32 scratch) {
    typedef Chunks<N> C;
    constexpr int UNITS = C::UNITS, STEP = C::STEP;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int unit = lane % UNITS, first_row = lane / UNITS;
#pragma unroll
    for (int chunk = 0; chunk < C::COUNT; ++chunk) {
        if (panel + chunk * UNITS >= OUT_PANELS) break;
        u32 extra[OPERANDS + 1][UNITS][2];
#pragma unroll
        for (int q = 0; q < OPERANDS; ++q) {
            const int at = C::DEPTH ? chunk % (C::DEPTH + !C::DEPTH) : 0;
            if (!C::DEPTH) ahead.fetch(0, p, q, chunk, row, panel, m);
#pragma unroll
            for (int i = 0; i < 16 / STEP; ++i)
                store_shared(scratch_slot<UNITS>(scratch, i * STEP + first_row, unit), ahead.data[at][i]);
            __syncwarp();
            if (C::DEPTH && chunk + C::DEPTH < C::COUNT) ahead.fetch(at, p, q, chunk + C::DEPTH, row, panel, m);
#pragma unroll
            for (int j = 0; j < UNITS; ++j)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    extra[q][j][h] = load_shared_word(scratch_slot<UNITS>(scratch, g + 8 * h, j) + 4 * t);
            __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < UNITS; ++j) {
            float2 bias = make_float2(0.0f, 0.0f), second = bias;
            const int at = panel + chunk * UNITS + j;
            if (BIAS && at < OUT_PANELS) {
                const Place place = place_of(p, at);
                bias = bias_of(p, place, place.column + 2 * t, false);
                if (GATED) second = bias_of(p, place, place.column + 2 * t, true);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float2 operands[OPERANDS + 1];
#pragma unroll
                for (int q = 0; q < OPERANDS; ++q) operands[q] = unpack2<ELEMENT>(extra[q][j][h]);
                const float2 v = finish_pair(acc, chunk * UNITS + j, h, bias, second, operands);
                store_shared(scratch_slot<UNITS>(scratch, g + 8 * h, j) + 4 * t, pack2<OUT>(v.x, v.y));
            }
        }
        __syncwarp();
        const int mine = panel + chunk * UNITS + unit;
        const Place place = place_of(p, mine);
#pragma unroll
        for (int i = 0; i < 16 / STEP; ++i) {
            const int r = i * STEP + first_row;
            const uint4 v = load_shared(scratch_slot<UNITS>(scratch, r, unit));
            if (row + r >= from && row + r < m && mine < OUT_PANELS)
                *(uint4 *)(place.result + (i64)(row + r) * place.width + place.column) = v;
        }
        __syncwarp();
    }
}

// From registers, for results of any type and width.
template <int N> DEVICE void store_direct(const float (&acc)[N][4], const Pointers &p, int row, int panel, int from, int m) {
    constexpr int OUT_N = GATED ? N / 2 : N;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < OUT_N; ++j) {
        if (panel + j >= OUT_PANELS) break;
        const Place place = place_of(p, panel + j);
        const int column = place.column + 2 * t;
        const float2 bias = bias_of(p, place, column, false);
        const float2 second = GATED ? bias_of(p, place, column, true) : bias;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = row + g + 8 * h;
            const bool mine = r >= from && r < m;
            const bool one = mine && column < place.width, two = mine && column + 1 < place.width;
            const i64 at = (i64)r * place.width + column;
            float2 operands[OPERANDS + 1];
#pragma unroll
            for (int q = 0; q < OPERANDS; ++q) {
                operands[q].x = one ? to_f32(operand_of(p, q)[at]) : 0.0f;
                operands[q].y = two ? to_f32(operand_of(p, q)[at + 1]) : 0.0f;
            }
            const float2 v = finish_pair(acc, j, h, bias, second, operands);
            if (ALIGNED && sizeof(OUT) == 4) {
                if (one) *(float2 *)(place.result + at) = v;
            } else {
                if (one) place.result[at] = from_f32<OUT>(v.x);
                if (two) place.result[at + 1] = from_f32<OUT>(v.y);
            }
        }
    }
}

template <bool THROUGH_SCRATCH> struct Store;
template <> struct Store<true> {
    template <int N>
    DEVICE static void run(const float (&acc)[N][4], Ahead<N> &ahead, const Pointers &p, int row, int panel, int from,
                           int m, u32 scratch) {
        store_staged(acc, ahead, p, row, panel, from, m, scratch);
    }
};
template <> struct Store<false> {
    template <int N>
    DEVICE static void run(const float (&acc)[N][4], Ahead<N> &, const Pointers &p, int row, int panel, int from, int m,
                           u32) {
        store_direct(acc, p, row, panel, from, m);
    }
};

// Bytes of scratch memory of a warp.
constexpr int SCRATCH = 2048;

// Asks for the operands of 16 rows from `row` on by N weight panels from `panel` on, to have them in the L2 cache by the
// time of `store_rows`.
template <int N> DEVICE void prefetch_rows(const Pointers &p, int row, int panel, int m) {
    constexpr int OUT_N = GATED ? N / 2 : N, LINES = (OUT_N + 7) / 8;
    constexpr int COUNT = STAGED && OPERANDS ? 16 * LINES : 0;
#pragma unroll
    for (int i = threadIdx.x % 32; i < COUNT; i += 32) {
        const int r = row + i / LINES, mine = (GATED ? panel / 2 : panel) + i % LINES * 8;
        const Place place = place_of(p, mine);
#pragma unroll
        for (int q = 0; q < OPERANDS; ++q)
            if (r < m && mine < OUT_PANELS)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(operand_of(p, q) + (i64)r * place.width + place.column));
    }
}

// Stores 16 rows from `row` on by N weight panels from `panel` on; rows before `from` and from `m` on
// are left out. `ahead` has begun.
template <int N>
DEVICE void store_rows(const float (&acc)[N][4], Ahead<N> &ahead, const Pointers &p, int row, int panel, int from, int m,
                       u32 scratch) {
    if (row >= m || row + 16 <= from) return;
    Store<STAGED>::run(acc, ahead, p, row, GATED ? panel / 2 : panel, from, m, scratch);
}
