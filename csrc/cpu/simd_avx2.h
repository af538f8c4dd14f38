// AVX2 with FMA and F16C. simd.h describes the operations.
#pragma once

#include <immintrin.h>

#include "qlora/nf4_code.h"

namespace qlora::QLORA_ISA {

using F32 = __m256;
inline constexpr int kLanes = 8;
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));

static inline F32 zero() { return _mm256_setzero_ps(); }
static inline F32 set1(float x) { return _mm256_set1_ps(x); }
static inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
// max(|a|, |b|) for non-negative a, compared as integers, so that inf and NaN are kept.
static inline F32 max_magnitude(F32 a, F32 b) {
    const __m256i magnitude = _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), magnitude));
}
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }

static inline float hsum(F32 a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// sums[0..3] += hsum of a, b, c, d.
static inline void add_hsums(F32 a, F32 b, F32 c, F32 d, float* sums) {
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), half));
}

// v limited to [-limit, limit]; -limit for NaN.
static inline F32 clamp(F32 v, float limit) { return _mm256_min_ps(_mm256_max_ps(v, set1(-limit)), set1(limit)); }

static inline bool any_above(F32 v, float limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v, set1(limit), _CMP_GT_OQ)) != 0;
}

static inline void store_bytes(uint8_t* p, I32 v) {
    const __m256i dwords = reinterpret_cast<__m256i>(v);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

static inline void store_bytes(uint8_t* p, const I32 (&v)[4]) {
    const auto words = [&](int i) {
        return _mm256_packus_epi32(reinterpret_cast<__m256i>(v[i]), reinterpret_cast<__m256i>(v[i + 1]));
    };
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_packus_epi16(words(0), words(2));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
}

static inline F32 keep(F32 v, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
}

static inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
static inline F32 load(const Bf16* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}
static inline F32 load(const Fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

// Rounds to nearest even and keeps subnormals.
static inline __m128i round_bf16(F32 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

static inline __m128i round_fp16(F32 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
static inline void store(Bf16* p, F32 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_bf16(v)); }
static inline void store(Fp16* p, F32 v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round_fp16(v)); }

inline constexpr int kTranspose = 8;

static inline void transpose_tile(const uint32_t* src, int64_t ld, int rows, uint32_t* dst, int64_t dst_ld) {
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        a[i] = i < rows ? _mm256_loadu_ps(reinterpret_cast<const float*>(src + i * ld)) : _mm256_setzero_ps();
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    // a[4g + j], lane l: column 4l + j of rows 4g .. 4g + 3.
    const __m256i row = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i valid = _mm256_cmpgt_epi32(_mm256_set1_epi32(rows), row);
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
        const __m256 column = c < 4 ? _mm256_permute2f128_ps(a[c % 4], a[4 + c % 4], 0x20)
                                    : _mm256_permute2f128_ps(a[c % 4], a[4 + c % 4], 0x31);
        float* out = reinterpret_cast<float*>(dst + c * dst_ld);
        if (rows == 8) {
            _mm256_storeu_ps(out, column);
        } else {
            _mm256_maskstore_ps(out, valid, column);
        }
    }
}

// Sixteen values of one block. Floats: two registers, selected by bit 3 of an index. Words: a plane of low bytes and a
// plane of high bytes, each looked up by vpshufb.
template <class E>
struct Code16 {
    __m256i first;
    __m256i second;
};

struct Scaled {
    F32 low;
    F32 high;
};

static inline Scaled scaled_code(float absmax) {
    return {mul(_mm256_load_ps(kCode), set1(absmax)), mul(_mm256_load_ps(kCode + 8), set1(absmax))};
}

static inline Code16<float> code16(Scaled v, float*) {
    return {_mm256_castps_si256(v.low), _mm256_castps_si256(v.high)};
}

template <class E>
static inline Code16<E> byte_planes(__m128i low, __m128i high) {
    const __m128i mask = _mm_set1_epi16(0xff);
    const __m128i low_bytes = _mm_packus_epi16(_mm_and_si128(low, mask), _mm_and_si128(high, mask));
    const __m128i high_bytes = _mm_packus_epi16(_mm_srli_epi16(low, 8), _mm_srli_epi16(high, 8));
    return {_mm256_broadcastsi128_si256(low_bytes), _mm256_broadcastsi128_si256(high_bytes)};
}

static inline Code16<Bf16> code16(Scaled v, Bf16*) { return byte_planes<Bf16>(round_bf16(v.low), round_bf16(v.high)); }
static inline Code16<Fp16> code16(Scaled v, Fp16*) { return byte_planes<Fp16>(round_fp16(v.low), round_fp16(v.high)); }

static inline Code16<float> widen(Scaled v, float*) { return code16(v, static_cast<float*>(nullptr)); }
static inline Code16<float> widen(Scaled v, Bf16*) {
    const __m256i low = _mm256_slli_epi32(_mm256_cvtepu16_epi32(round_bf16(v.low)), 16);
    return {low, _mm256_slli_epi32(_mm256_cvtepu16_epi32(round_bf16(v.high)), 16)};
}
static inline Code16<float> widen(Scaled v, Fp16*) {
    const __m256 low = _mm256_cvtph_ps(round_fp16(v.low));
    return {_mm256_castps_si256(low), _mm256_castps_si256(_mm256_cvtph_ps(round_fp16(v.high)))};
}

// Eight values for the four bytes in each dword of `copies`, selected by `spread`.
static inline __m256 lookup8(const Code16<float>& code, __m256i copies, __m256i spread) {
    const __m256i index = _mm256_srlv_epi32(_mm256_shuffle_epi8(copies, spread), _mm256_set1_epi64x(4));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(code.first), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_castsi256_ps(code.second), index);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

// Looks up the thirty-two values of sixteen bytes.
template <class E>
static inline void lookup32(const Code16<E>& code, const uint8_t* bytes, E* dst) {
    const __m128i source = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    if constexpr (sizeof(E) == 2) {
        const __m128i nibble = _mm_set1_epi8(0xf);
        const __m128i low = _mm_and_si128(source, nibble);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(source, 4), nibble);
        const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
        const __m256i low_bytes = _mm256_shuffle_epi8(code.first, index);
        const __m256i high_bytes = _mm256_shuffle_epi8(code.second, index);
        const __m256i even = _mm256_unpacklo_epi8(low_bytes, high_bytes);  // values 0..7 and 16..23
        const __m256i odd = _mm256_unpackhi_epi8(low_bytes, high_bytes);   // values 8..15 and 24..31
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 16), _mm256_permute2x128_si256(even, odd, 0x31));
    } else {
        const __m256i copies = _mm256_broadcastsi128_si256(source);
        __m256i spread =
            _mm256_set_epi64x(0x8080800380808003, 0x8080800280808002, 0x8080800180808001, 0x8080800080808000);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            _mm256_storeu_ps(dst + 8 * i, lookup8(code, copies, spread));
            spread = _mm256_add_epi8(spread, _mm256_set1_epi32(4));
        }
    }
}

// Looks up the eight values of the high nibbles and the eight of the low nibbles of eight bytes.
static inline void lookup_even_odd(const Code16<float>& code, const uint8_t* bytes, F32& even, F32& odd) {
    const __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i high = _mm256_srli_epi32(low, 4);
    const __m256 first = _mm256_castsi256_ps(code.first);
    const __m256 second = _mm256_castsi256_ps(code.second);
    even = _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, high), _mm256_permutevar8x32_ps(second, high),
                            _mm256_castsi256_ps(_mm256_slli_epi32(high, 28)));
    odd = _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, low), _mm256_permutevar8x32_ps(second, low),
                           _mm256_castsi256_ps(_mm256_slli_epi32(low, 28)));
}

}  // namespace qlora::QLORA_ISA
