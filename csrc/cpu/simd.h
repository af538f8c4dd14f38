// The vector operations of the kernels. Each kernel source is compiled once per instruction set, in the namespace
// QLORA_ISA; this header selects the implementation:
//
//     F32, kLanes                          a vector of floats and its length
//     load, load_n, store, store_n         from and to float, Bf16, Fp16; _n touches only the first n elements
//     I32, store_bytes                     a vector of as many int32; stores of their low bytes (one or four)
//     zero, set1, fma, add, mul, clamp, max_magnitude, hsum, add_hsums, any_above; F32 and I32 have operators as well
//     rounded_to<T>(v)                     v rounded to T and widened again
//     keep(v, bits)                        lane i of v if bit i is set, else 0
//     kTranspose, transpose_tile           dst[c * dst_ld + r] = src[r * ld + c] on dwords, a square tile
//     Code16, code16<T, E>, lookup         the sixteen values of one block, looked up by nibbles (decode.h)
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "qlora/dtypes.h"

#ifndef QLORA_ISA
#error "compile with -DQLORA_ISA=..., one of the names in python/build_support/cpu.py"
#endif

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(QLORA_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

namespace qlora::QLORA_ISA {

template <class T>
static inline F32 load_n(const T* p, int n) {
    if (n == kLanes) return load(p);
    T padded[kLanes] = {};
    memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <class T>
static inline void store_n(T* p, F32 v, int n) {
    if (n == kLanes) return store(p, v);
    T padded[kLanes];
    store(padded, v);
    memcpy(p, padded, n * sizeof(T));
}

// The largest lane of a result of max_magnitude; NaN and inf are kept.
static inline float largest_lane(F32 v) {
#if defined(QLORA_NEON)
    return bits_float(vmaxvq_u32(vreinterpretq_u32_f32(v)));
#elif defined(__AVX2__)
#ifdef __AVX512F__
    const __m512i all = _mm512_castps_si512(v);
    const __m256i half = _mm256_max_epu32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#else
    const __m256i half = _mm256_castps_si256(v);
#endif
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    return bits_float(static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1)))));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = float_bits(v[i]) > bits ? float_bits(v[i]) : bits;
    return bits_float(bits);
#endif
}

// dst[c * dst_ld + r] = src[r * src_ld + c] for rows x columns dwords; writes exactly `rows` dwords of each dst row.
static inline void transpose_dwords(const uint32_t* src, int64_t src_ld, int rows, int64_t columns, uint32_t* dst,
                                    int64_t dst_ld) {
    for (int r = 0; r < rows; r += kTranspose) {
        const int height = rows - r < kTranspose ? rows - r : kTranspose;
        int64_t c = 0;
        for (; c + kTranspose <= columns; c += kTranspose) {
            transpose_tile(src + r * src_ld + c, src_ld, height, dst + c * dst_ld + r, dst_ld);
        }
        for (; c < columns; ++c) {
            for (int i = 0; i < height; ++i) dst[c * dst_ld + r + i] = src[(r + i) * src_ld + c];
        }
    }
}

// store for sums, which need not be bit-exact: it may flush subnormal bf16 to zero.
template <class T>
static inline void store_sum(T* p, F32 v) {
    store(p, v);
}

#ifdef __AVX512BF16__
static inline void store_sum(Bf16* p, F32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16_fast(v)); }
#endif

// store_sum of two vectors, one after the other.
template <class T>
static inline void store_sums(T* p, F32 first, F32 second) {
    store_sum(p, first);
    store_sum(p + kLanes, second);
}

#ifdef __AVX512BF16__
static inline void store_sums(Bf16* p, F32 first, F32 second) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
#endif

template <class T>
static inline void store_sum_n(T* p, F32 v, int n) {
    if (n == kLanes) return store_sum(p, v);
    store_n(p, v, n);
}

// May flush subnormal bf16 to zero, as store_sum.
template <class T>
static inline F32 rounded_to(F32 v) {
    if constexpr (std::is_same_v<T, float>) {
        return v;
    } else {
        T words[kLanes];
        store_sum(words, v);
        return load(words);
    }
}

}  // namespace qlora::QLORA_ISA
