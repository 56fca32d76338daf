// Rotation of pairs. Every kernel that rotates does it in these very operations, so that all agree to the last bit.

// Sine and cosine of a pair. An angle is counted in turns: the frequency over a full turn is TURNS + TURNS_LOW, and the
// product with the position is exact before its whole turns are dropped.
DEVICE void angle(float position, int pair, float &sine, float &cosine) {
    const float whole = __fmul_rn(position, TURNS[pair]);
    const float error = fmaf(position, TURNS[pair], -whole);
    const float part = (whole - rintf(whole)) + fmaf(position, TURNS_LOW[pair], error);
    sincospif(2.0f * part, &sine, &cosine);
}

// A pair's first and second element after the rotation.
DEVICE float turned_first(float p, float r, float sine, float cosine) { return fmaf(p, cosine, -__fmul_rn(r, sine)); }
DEVICE float turned_second(float p, float r, float sine, float cosine) { return fmaf(r, cosine, __fmul_rn(p, sine)); }
