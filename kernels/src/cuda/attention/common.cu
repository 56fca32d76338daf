#define INFINITY_F32 __int_as_float(0x7f800000)

// 2^x with an error of two units in the last place; 0 for minus infinity.
DEVICE float exp2_fast(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}
