// Functions of elementwise kernels. With FAST, results are rounded to 16 bits or fewer and approximations of about
// 2^-20 do.

#if FAST
DEVICE float fn_exp(float x) { return __expf(x); }
DEVICE float fn_quotient(float a, float b) { return __fdividef(a, b); }
DEVICE float fn_rsqrt(float x) { return rsqrtf(x); }
// With erfc by Abramowitz and Stegun 7.1.26.
DEVICE float fn_gelu(float x) {
    const float a = fabsf(x) * 0.70710678118654752f;
    const float t = __fdividef(1.0f, 1.0f + 0.3275911f * a);
    const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * p * __expf(-a * a);
    return x * (x >= 0.0f ? 1.0f - tail : tail);
}
// (1 + tanh u) / 2 is the sigmoid of 2 u.
DEVICE float fn_gelu_tanh(float x) {
    return __fdividef(x, 1.0f + __expf(-1.59576912160573071f * (x + 0.044715f * x * x * x)));
}
#else
DEVICE float fn_gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }
DEVICE float fn_gelu_tanh(float x) {
    return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}
DEVICE float fn_exp(float x) { return expf(x); }
DEVICE float fn_quotient(float a, float b) { return a / b; }
DEVICE float fn_rsqrt(float x) { return 1.0f / sqrtf(x); }
#endif
DEVICE float fn_neg(float x) { return -x; }
DEVICE float fn_abs(float x) { return fabsf(x); }
DEVICE float fn_log(float x) { return logf(x); }
DEVICE float fn_sqrt(float x) { return sqrtf(x); }
DEVICE float fn_recip(float x) { return 1.0f / x; }
DEVICE float fn_sigmoid(float x) { return fn_quotient(1.0f, 1.0f + fn_exp(-x)); }
DEVICE float fn_silu(float x) { return fn_quotient(x, 1.0f + fn_exp(-x)); }
DEVICE float fn_tanh(float x) { return tanhf(x); }
DEVICE float fn_relu(float x) { return fmaxf(x, 0.0f); }
DEVICE float fn_erf(float x) { return erff(x); }
DEVICE float fn_sin(float x) { return sinf(x); }
DEVICE float fn_cos(float x) { return cosf(x); }
DEVICE float fn_floor(float x) { return floorf(x); }
DEVICE float fn_ceil(float x) { return ceilf(x); }

DEVICE double fn_neg(double x) { return -x; }
DEVICE double fn_abs(double x) { return fabs(x); }
DEVICE double fn_exp(double x) { return exp(x); }
DEVICE double fn_log(double x) { return log(x); }
DEVICE double fn_sqrt(double x) { return sqrt(x); }
DEVICE double fn_rsqrt(double x) { return 1.0 / sqrt(x); }
DEVICE double fn_recip(double x) { return 1.0 / x; }
DEVICE double fn_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
DEVICE double fn_silu(double x) { return x / (1.0 + exp(-x)); }
DEVICE double fn_tanh(double x) { return tanh(x); }
DEVICE double fn_gelu(double x) { return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440)); }
DEVICE double fn_gelu_tanh(double x) {
    return 0.5 * x * (1.0 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
}
DEVICE double fn_relu(double x) { return fmax(x, 0.0); }
DEVICE double fn_erf(double x) { return erf(x); }
DEVICE double fn_sin(double x) { return sin(x); }
DEVICE double fn_cos(double x) { return cos(x); }
DEVICE double fn_floor(double x) { return floor(x); }
DEVICE double fn_ceil(double x) { return ceil(x); }

DEVICE float fn_max(float a, float b) { return fmaxf(a, b); }
DEVICE float fn_min(float a, float b) { return fminf(a, b); }
DEVICE float fn_pow(float a, float b) { return powf(a, b); }
DEVICE double fn_max(double a, double b) { return fmax(a, b); }
DEVICE double fn_min(double a, double b) { return fmin(a, b); }
DEVICE double fn_pow(double a, double b) { return pow(a, b); }
