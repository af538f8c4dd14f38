// Portable C++ with the compiler's four-float vectors, for any CPU. simd.h describes the operations.
#pragma once

#include "qlora/nf4_code.h"

namespace qlora::QLORA_ISA {

typedef float F32 __attribute__((vector_size(16)));
inline constexpr int kLanes = 4;
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));

static inline F32 zero() { return F32{}; }
static inline F32 set1(float x) { return F32{x, x, x, x}; }
static inline F32 add(F32 a, F32 b) { return a + b; }
static inline F32 mul(F32 a, F32 b) { return a * b; }
static inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
static inline F32 max_magnitude(F32 a, F32 b) {
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t magnitude = float_bits(b[i]) & 0x7fffffff;
        a[i] = float_bits(a[i]) > magnitude ? a[i] : bits_float(magnitude);
    }
    return a;
}
static inline float hsum(F32 a) { return (a[0] + a[2]) + (a[1] + a[3]); }
// sums[0..3] += hsum of a, b, c, d.
static inline void add_hsums(F32 a, F32 b, F32 c, F32 d, float* sums) {
    const float added[4] = {hsum(a), hsum(b), hsum(c), hsum(d)};
    for (int i = 0; i < 4; ++i) sums[i] += added[i];
}
// v limited to [-limit, limit]; -limit for NaN.
static inline F32 clamp(F32 v, float limit) {
    for (int i = 0; i < kLanes; ++i) {
        v[i] = v[i] > -limit ? v[i] : -limit;
        v[i] = v[i] < limit ? v[i] : limit;
    }
    return v;
}
static inline bool any_above(F32 v, float limit) {
    return (v[0] > limit) | (v[1] > limit) | (v[2] > limit) | (v[3] > limit);
}
static inline void store_bytes(uint8_t* p, I32 v) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(v[i]);
}
static inline void store_bytes(uint8_t* p, const I32 (&v)[4]) {
    for (int i = 0; i < 4; ++i) store_bytes(p + i * kLanes, v[i]);
}
static inline F32 keep(F32 v, uint32_t bits) {
    for (int i = 0; i < kLanes; ++i) v[i] = bits >> i & 1 ? v[i] : 0.0f;
    return v;
}

template <class T>
static inline F32 load(const T* p) {
    return F32{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

template <class T>
static inline void store(T* p, F32 v) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v[i]);
}

inline constexpr int kTranspose = 4;

static inline void transpose_tile(const uint32_t* src, int64_t ld, int rows, uint32_t* dst, int64_t dst_ld) {
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < kTranspose; ++c) dst[c * dst_ld + r] = src[r * ld + c];
    }
}

template <class E>
struct Code16 {
    E values[16];
};

struct Scaled {
    float values[16];
};

static inline Scaled scaled_code(float absmax) {
    Scaled scaled;
    for (int i = 0; i < 16; ++i) scaled.values[i] = kCode[i] * absmax;
    return scaled;
}

template <class E>
static inline Code16<E> code16(const Scaled& scaled, E*) {
    Code16<E> code;
    for (int i = 0; i < 16; ++i) code.values[i] = from_float<E>(scaled.values[i]);
    return code;
}

template <class T>
static inline Code16<float> widen(const Scaled& scaled, T*) {
    Code16<float> code;
    for (int i = 0; i < 16; ++i) code.values[i] = to_float(from_float<T>(scaled.values[i]));
    return code;
}

template <class E>
static inline void lookup32(const Code16<E>& code, const uint8_t* bytes, E* dst) {
    for (int i = 0; i < 16; ++i) {
        dst[2 * i] = code.values[bytes[i] >> 4];
        dst[2 * i + 1] = code.values[bytes[i] & 0xf];
    }
}

// Looks up the values of the high nibbles and of the low nibbles of kLanes bytes.
static inline void lookup_even_odd(const Code16<float>& code, const uint8_t* bytes, F32& even, F32& odd) {
    for (int i = 0; i < kLanes; ++i) {
        even[i] = code.values[bytes[i] >> 4];
        odd[i] = code.values[bytes[i] & 0xf];
    }
}

}  // namespace qlora::QLORA_ISA
