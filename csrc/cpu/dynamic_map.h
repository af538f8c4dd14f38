// The 8-bit dynamic map over blocks of 256 (qlora_kernels/format/blockwise8.py), decoded by table, encoded by
// arithmetic.
//
// The map is seven decades of equal cells: decade d divides [0.1, 1) * 10^(d - 6) into 2^d cells, or 2^(d + 1) in the
// unsigned map, so within a decade the code is a linear function of the magnitude, rounded down. The decade itself
// comes from the magnitude's bits read as an integer, a logarithm good to 0.03 decades, and one comparison. fp32
// rounding can miss by one next to a boundary; a group of elements that holds one that close, some 1 in 60 groups of
// 64, is compared with the boundaries themselves. Eight comparisons and selections instead of the logarithm took 1.7
// times as long.
#pragma once

#include <cstring>

#include "qlora/nf4_code.h"
#include "simd.h"

namespace qlora::QLORA_ISA {

typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));

template <bool kSigned>
static constexpr const float* dynamic_code() {
    return kSigned ? kAbsmaxCode : kUnsignedCode;
}

template <bool kSigned>
static constexpr const float* dynamic_boundaries() {
    return kSigned ? kAbsmaxBoundaries : kUnsignedBoundaries;
}

template <bool kSigned>
static inline void decode_block(const uint8_t* q, float absmax, float* x, int n) {
    const float* code = dynamic_code<kSigned>();
    for (int i = 0; i < n; ++i) x[i] = code[q[i]] * absmax;
}

// table[i], i in 0..7 in every lane.
static inline F32 lookup8(const float* table, I32 i) {
#if defined(__AVX512F__)
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(i), _mm512_broadcast_f32x8(_mm256_load_ps(table)));
#elif defined(__AVX2__)
    return _mm256_permutevar8x32_ps(_mm256_load_ps(table), reinterpret_cast<__m256i>(i));
#else
    return F32{table[i[0]], table[i[1]], table[i[2]], table[i[3]]};
#endif
}

static inline bool any(I32 mask) {
    int32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= mask[i];
    return bits != 0;
}

// Index of x: how many boundaries lie strictly below it, found from a guess that is off by one at most.
template <bool kSigned>
static inline int corrected_index(float x, int guess) {
    const float* boundaries = dynamic_boundaries<kSigned>();
    if (guess > 0 && !(x > boundaries[guess - 1])) return guess - 1;
    if (guess < 255 && x > boundaries[guess]) return guess + 1;
    return guess;
}

// What depends on the decade, as tables of eight: the last entry serves a guess beyond the last decade.
template <bool kSigned>
struct Decades {
    static constexpr int kOrigin = kSigned ? 127 : 0;  // index of zero; codes count from here
    alignas(64) float threshold[8], slope[8], offset[8], last[8];
    float smallest, one;  // boundaries between zero and the first code, and between the last one and 1.0

    constexpr Decades() : threshold{}, slope{}, offset{}, last{}, smallest{}, one{} {
        const float* boundaries = dynamic_boundaries<kSigned>();
        double unit = 1e-6;
        double cells = kSigned ? 1.0 : 2.0;
        for (int d = 0; d < 7; ++d, unit *= 10.0, cells *= 2.0) {
            const double first = kSigned ? cells : cells - 1.0;
            threshold[d] = d == 0 ? -1.0f : boundaries[kOrigin + static_cast<int>(first) - 1];
            slope[d] = static_cast<float>(cells / (0.9 * unit));
            offset[d] = static_cast<float>(first - cells / 9.0);
            last[d] = static_cast<float>(first + cells - 0.5);
        }
        threshold[7] = 2.0f;
        smallest = boundaries[kOrigin];
        one = boundaries[254];
    }
};

// Codes of kLanes normalized numbers. `close` collects lanes (all ones) that may be off by one.
template <bool kSigned>
static inline I32 approximate_index(F32 x, I32& close) {
    static constexpr Decades<kSigned> kTable;
    constexpr int kOrigin = Decades<kSigned>::kOrigin;
    constexpr float kLog10Of2 = 0.30103f;
    constexpr float kLogOfBits = kLog10Of2 / (1 << 23);
    constexpr float kLogOrigin = 7.0f - 127.0f * kLog10Of2 + 0.0265f;  // the bits underestimate by up to 0.026
    constexpr float kClose = 0x1p-13f;

    const I32 bits = reinterpret_cast<I32>(x);
    const I32 negative = kSigned ? bits >> 31 : bits ^ bits;  // -1 below zero
    // A tie goes to the lower index, away from zero for negative numbers: their magnitude moves up one step.
    const I32 magnitude = (bits & 0x7fffffff) - negative;
    const F32 a = reinterpret_cast<F32>(magnitude);
    const F32 logarithm = fma(__builtin_convertvector(magnitude, F32), set1(kLogOfBits), set1(kLogOrigin));
    const I32 rounded = __builtin_convertvector(logarithm, I32);
    const I32 guess = rounded & ~(rounded >> 31);  // the decade or one above
    const I32 decade = guess + (a <= lookup8(kTable.threshold, guess));
    const F32 place = fma(a, lookup8(kTable.slope, decade), lookup8(kTable.offset, decade));
    const F32 last = lookup8(kTable.last, decade);
    const F32 within = place < last ? place : last;
    const I32 code = __builtin_convertvector(within, I32);
    const F32 fraction = within - __builtin_convertvector(code, F32);
    close |= (fraction < set1(kClose)) | (fraction > set1(1.0f - kClose));
    // Zero where `a` is below the smallest; one more where it is 1.0, of which there is no negative.
    const I32 k = (code & (a > set1(kTable.smallest))) - ((a > set1(kTable.one)) & ~negative);
    return kOrigin + ((k ^ negative) - negative);
}

// x[i] -> q[i], i < n <= 256; returns absmax. x has room for 256 and is zero from n on.
template <bool kSigned>
static inline float encode_block(const float* x, uint8_t* q, int n) {
    constexpr int kGroup = 64;
    int32_t largest = 0;  // as integers, which order like magnitudes, and whose maximum compilers vectorize
    for (int i = 0; i < 256; ++i) {
        const int32_t bits = static_cast<int32_t>(float_bits(x[i]) & 0x7fffffff);
        largest = bits > largest ? bits : largest;
    }
    const float absmax = bits_float(static_cast<uint32_t>(largest));
    if (absmax < kSmallestAbsmax) {
        memset(q, Decades<kSigned>::kOrigin, static_cast<size_t>(n));
        return 0.0f;
    }
    const float inverse = 1.0f / absmax;
    alignas(64) int32_t index[256];
    for (int begin = 0; begin < 256; begin += kGroup) {
        I32 close{};
        for (int i = begin; i < begin + kGroup; i += kLanes) {
            const I32 codes = approximate_index<kSigned>(mul(load(x + i), set1(inverse)), close);
            memcpy(index + i, &codes, sizeof codes);
        }
        if (any(close)) {
            for (int i = begin; i < begin + kGroup; ++i) index[i] = corrected_index<kSigned>(x[i] * inverse, index[i]);
        }
    }
    alignas(64) uint8_t narrow[256];
    for (int i = 0; i < 256; ++i) narrow[i] = static_cast<uint8_t>(index[i]);
    memcpy(q, narrow, static_cast<size_t>(n));
    return absmax;
}

}  // namespace qlora::QLORA_ISA
