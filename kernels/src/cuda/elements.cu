// Conversions between element types and the numbers that elementwise kernels compute with, and packs of elements.

// Texts that are written for a graph may name what they do not use.
#pragma nv_diag_suppress 128, 177

// A truth value: 0 or not.
struct truth { u8 bits; };

// ---- 8-bit floats: EXPONENT and MANTISSA bits, the largest finite code -----------------------------------------------

// Rounds to nearest even; what is beyond the largest finite value saturates to it, NaN becomes 0x7f.
template <int BIAS, int MANTISSA, int LARGEST> DEVICE u8 to_minifloat(float v) {
    const u32 bits = __float_as_uint(v);
    const u32 sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (u8)(sign | 0x7fu);
    // The exponent of the largest code, shifted to where f32 has it.
    const u32 largest = ((u32)(LARGEST >> MANTISSA) + 127u - BIAS) << 23
                        | (u32)(LARGEST & ((1 << MANTISSA) - 1)) << (23 - MANTISSA);
    if (magnitude >= largest) return (u8)(sign | LARGEST);
    u32 code;
    if (magnitude < (u32)(128 - BIAS) << 23) {
        // Below the smallest normal value codes count multiples of one step.
        const float step = __uint_as_float((u32)(127 + BIAS - 1 + MANTISSA) << 23);
        code = (u32)__float2int_rn(__uint_as_float(magnitude) * step);
    } else {
        const u32 odd = magnitude >> (23 - MANTISSA) & 1u;
        const u32 rounded = magnitude + ((1u << (22 - MANTISSA)) - 1u) + odd;
        code = (rounded >> (23 - MANTISSA)) - ((u32)(127 - BIAS) << MANTISSA);
    }
    return (u8)(sign | code);
}
template <int BIAS, int MANTISSA> DEVICE float of_minifloat(u32 byte) {
    const u32 code = byte & 0x7fu, sign = (byte & 0x80u) << 24;
    float v;
    if (code >> MANTISSA == 0) {
        v = (float)code * __uint_as_float((u32)(128 - BIAS - MANTISSA) << 23);
    } else {
        v = __uint_as_float((code << (23 - MANTISSA)) + ((u32)(127 - BIAS) << 23));
    }
    return __uint_as_float(__float_as_uint(v) | sign);
}
DEVICE float to_f32(f8e4m3 v) {
    return (v.bits & 0x7f) == 0x7f ? __uint_as_float(0x7fc00000u) : of_minifloat<7, 3>(v.bits);
}
DEVICE float to_f32(f8e5m2 v) {
    const u32 code = v.bits & 0x7fu;
    if (code > 0x7cu) return __uint_as_float(0x7fc00000u);
    if (code == 0x7cu) return __uint_as_float(0x7f800000u | (u32)(v.bits & 0x80u) << 24);
    return of_minifloat<15, 2>(v.bits);
}
template <> DEVICE f8e4m3 from_f32<f8e4m3>(float v) {
    f8e4m3 out;
#if ARCH >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
    out.bits = (u8)pair;
#else
    out.bits = to_minifloat<7, 3, 0x7e>(v);
#endif
    return out;
}
template <> DEVICE f8e5m2 from_f32<f8e5m2>(float v) {
    f8e5m2 out;
#if ARCH >= 890
    u16 pair;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
    out.bits = (u8)pair;
#else
    out.bits = to_minifloat<15, 2, 0x7b>(v);
#endif
    return out;
}

// ---- numbers -------------------------------------------------------------------------------------------------------

// Elements as numbers: `float` where that is exact, `double` for wide integers (exact up to 2^53).
DEVICE float number(float v) { return v; }
DEVICE float number(bf16 v) { return to_f32(v); }
DEVICE float number(f16 v) { return to_f32(v); }
DEVICE float number(f8e4m3 v) { return to_f32(v); }
DEVICE float number(f8e5m2 v) { return to_f32(v); }
DEVICE float number(i8 v) { return (float)v; }
DEVICE float number(u8 v) { return (float)v; }
DEVICE float number(truth v) { return v.bits != 0 ? 1.0f : 0.0f; }
DEVICE double number(i32 v) { return (double)v; }
DEVICE double number(i64 v) { return (double)v; }

// A float that rounds to 16 bits and fewer as the double does: truncated, the last bit telling whether anything was cut.
DEVICE float to_odd(double v) {
    const float cut = __double2float_rz(v);
    const bool inexact = (double)cut != v && v == v && fabsf(cut) < __uint_as_float(0x7f800000u);
    return inexact ? __uint_as_float(__float_as_uint(cut) | 1u) : cut;
}

// Numbers as elements: floats are rounded to nearest even, integers drop the fraction, saturate, and take 0 for NaN.
template <typename T> struct Narrow {
    static DEVICE T of(float v) { return from_f32<T>(v); }
    static DEVICE T of(double v) { return from_f32<T>(to_odd(v)); }
};
template <> struct Narrow<float> {
    static DEVICE float of(float v) { return v; }
    static DEVICE float of(double v) { return (float)v; }
};
template <> struct Narrow<truth> {
    static DEVICE truth of(float v) { return truth{(u8)(v != 0.0f)}; }
    static DEVICE truth of(double v) { return truth{(u8)(v != 0.0)}; }
};
template <> struct Narrow<i32> {
    static DEVICE i32 of(float v) { return v != v ? 0 : __float2int_rz(v); }
    static DEVICE i32 of(double v) { return v != v ? 0 : __double2int_rz(v); }
};
template <> struct Narrow<i64> {
    static DEVICE i64 of(float v) { return v != v ? 0 : __float2ll_rz(v); }
    static DEVICE i64 of(double v) { return v != v ? 0 : __double2ll_rz(v); }
};
template <> struct Narrow<i8> {
    template <typename N> static DEVICE i8 of(N v) { return (i8)max(-128, min(127, Narrow<i32>::of(v))); }
};
template <> struct Narrow<u8> {
    template <typename N> static DEVICE u8 of(N v) { return (u8)max(0, min(255, Narrow<i32>::of(v))); }
};

// ---- packs ---------------------------------------------------------------------------------------------------------

// V neighbouring elements that are loaded and stored at once.
template <typename T, int V> struct alignas(sizeof(T) * V > 16 ? 16 : sizeof(T) * V) Pack { T at[V]; };

template <typename T, int V> DEVICE Pack<T, V> load_pack(const T *at) { return *(const Pack<T, V> *)at; }
template <typename T, int V> DEVICE void store_pack(T *at, const Pack<T, V> &pack) { *(Pack<T, V> *)at = pack; }
template <typename T, int V> DEVICE Pack<T, V> splat(T v) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.at[i] = v;
    return pack;
}
