// exp and tanh of vectors, and the vector operations of a softmax that simd.h does not have.
#pragma once

#include <cmath>
#include <limits>

#include "simd.h"

namespace qlora::QLORA_ISA {

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

static inline F32 subtract(F32 a, F32 b) { return add(a, mul(b, set1(-1.0f))); }

// The larger of a and b in each lane. A NaN in a is kept, a NaN in b is lost.
static inline F32 maximum(F32 a, F32 b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(b, a);
#elif defined(__AVX2__)
    return _mm256_max_ps(b, a);
#else
    for (int i = 0; i < kLanes; ++i) a[i] = b[i] > a[i] ? b[i] : a[i];
    return a;
#endif
}

// The largest lane of a vector. A lane with NaN may be ignored.
static inline float highest(F32 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(v);
#else
    float lanes[kLanes];
    store(lanes, v);
    float result = lanes[0];
    for (int i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
    return result;
#endif
}

// v in the first n lanes, `other` in the rest.
static inline F32 first_lanes(F32 v, int64_t n, float other) {
    if (n >= kLanes) return v;
    float lanes[kLanes];
    store(lanes, v);
    for (int64_t i = n < 0 ? 0 : n; i < kLanes; ++i) lanes[i] = other;
    return load(lanes);
}

// 2^f for |f| <= 0.5 within 1.7e-7 relative. Coefficients: Cephes, exp2f.c (S. Moshier).
static inline F32 exp2_fraction(F32 f) {
    F32 p = set1(1.535336188319500e-4f);
    p = fma(p, f, set1(1.339887440266574e-3f));
    p = fma(p, f, set1(9.618437357674640e-3f));
    p = fma(p, f, set1(5.550332471162809e-2f));
    p = fma(p, f, set1(2.402264791363012e-1f));
    p = fma(p, f, set1(6.931472028550421e-1f));
    return fma(p, f, set1(1.0f));
}

// 2^x within 2^-22 relative for x <= 127; 0 below -126 (the results that would be subnormal); NaN for NaN.
static inline F32 exp2_vector(F32 x) {
#if defined(__AVX512F__)
    const F32 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 zero_lanes = _mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_LT_OQ);
    const F32 f = _mm512_maskz_sub_ps(_knot_mask16(zero_lanes), x, whole);
    return _mm512_maskz_scalef_ps(_knot_mask16(zero_lanes), exp2_fraction(f), whole);
#elif defined(__AVX2__)
    const F32 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F32 power =
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
    const F32 result = _mm256_mul_ps(exp2_fraction(_mm256_sub_ps(x, whole)), power);
    return _mm256_andnot_ps(_mm256_cmp_ps(x, set1(-126.0f), _CMP_LT_OQ), result);
#else
    // x + 1.5 * 2^23 has the integer nearest to x in its low bits, which are then shifted into the exponent.
    const F32 shifter = set1(12582912.0f), bounded = x < set1(-126.0f) ? set1(-126.0f) : x;
    const F32 shifted = bounded + shifter, fraction = exp2_fraction(bounded - (shifted - shifter));
    const F32 result = reinterpret_cast<F32>(reinterpret_cast<I32>(fraction) + (reinterpret_cast<I32>(shifted) << 23));
    return x < set1(-126.0f) ? zero() : (x == x ? result : x);
#endif
}

// exp(x) for x <= 88, within (4 + 3 |x|) units of roundoff relative.
static inline F32 exp_vector(F32 x) { return exp2_vector(mul(x, set1(kLog2E))); }

// tanh(x) within 2^-21 absolute; NaN for NaN.
static inline F32 tanh_vector(F32 x) {
    constexpr float kSaturated = 9.0f;  // 1 - tanh(9) is below the spacing of floats next to 1
    const F32 minus_x = maximum(mul(x, set1(-1.0f)), set1(-kSaturated));
    const F32 e = exp_vector(maximum(mul(minus_x, set1(-2.0f)), set1(-2 * kSaturated)));
    return subtract(set1(1.0f), set1(2.0f) / add(e, set1(1.0f)));
}

}  // namespace qlora::QLORA_ISA
