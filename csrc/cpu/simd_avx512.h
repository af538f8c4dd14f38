// AVX-512 (F, BW, VL, DQ), with AVX512-BF16 if the compiler flags enable it. simd.h describes the operations.
#pragma once

#include <immintrin.h>

#include "qlora/nf4_code.h"

namespace qlora::QLORA_ISA {

using F32 = __m512;
inline constexpr int kLanes = 16;
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));

static inline F32 zero() { return _mm512_setzero_ps(); }
static inline F32 set1(float x) { return _mm512_set1_ps(x); }
static inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
// max(|a|, |b|) for non-negative a, compared as integers, so that inf and NaN are kept.
static inline F32 max_magnitude(F32 a, F32 b) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), magnitude));
}
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
static inline float hsum(F32 a) { return _mm512_reduce_add_ps(a); }
// sums[0..3] += hsum of a, b, c, d.
static inline void add_hsums(F32 a, F32 b, F32 c, F32 d, float* sums) {
    const __m512 ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 abcd = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), quarter));
}
// v limited to [-limit, limit]; -limit for NaN.
static inline F32 clamp(F32 v, float limit) { return _mm512_min_ps(_mm512_max_ps(v, set1(-limit)), set1(limit)); }
static inline bool any_above(F32 v, float limit) { return _mm512_cmp_ps_mask(v, set1(limit), _CMP_GT_OQ) != 0; }
static inline void store_bytes(uint8_t* p, I32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
}
static inline void store_bytes(uint8_t* p, const I32 (&v)[4]) {
    const auto words = [&](int i) {
        return _mm512_packus_epi32(reinterpret_cast<__m512i>(v[i]), reinterpret_cast<__m512i>(v[i + 1]));
    };
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words(0), words(2))));
}
static inline F32 keep(F32 v, uint32_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v); }

static inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
static inline F32 load(const Bf16* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
static inline F32 load(const Fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Rounds to nearest even and keeps subnormals; vcvtneps2bf16 would flush them and break bit-equality between backends.
static inline __m256i round_bf16(F32 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// The faster rounding, for operands of vdpbf16ps, which flushes subnormals itself.
static inline __m256i round_bf16_fast(F32 v) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    return round_bf16(v);
#endif
}

static inline __m256i round_fp16(F32 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
static inline void store(Bf16* p, F32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(v)); }
static inline void store(Fp16* p, F32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_fp16(v)); }

inline constexpr int kTranspose = 16;

// Transposes 16 x 16 dwords by four rounds of 2 x 2 exchanges: dwords, qwords, then 128-bit lanes twice.
__attribute__((always_inline)) static inline void transpose_registers(__m512i (&a)[16]) {
    __m512i b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4g + j], lane l: column 4l + j of rows 4g .. 4g + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
        b[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        b[4 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        b[8 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        b[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = b[i];
}

static inline void transpose_tile(const uint32_t* src, int64_t ld, int rows, uint32_t* dst, int64_t dst_ld) {
    __m512i a[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = i < rows ? _mm512_loadu_si512(src + i * ld) : _mm512_setzero_si512();
    transpose_registers(a);
    const __mmask16 valid = static_cast<__mmask16>((1u << rows) - 1);
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) _mm512_mask_storeu_epi32(dst + c * dst_ld, valid, a[c]);
}

// Sixteen values of one block for lookups: as floats, or as words that are repeated, so that vpermw ignores the fifth
// bit of an index, which belongs to a neighbouring nibble.
template <class E>
struct Code16 {
    __m512i values;
};

static inline F32 scaled_code(float absmax) { return mul(_mm512_load_ps(kCode), set1(absmax)); }

static inline Code16<float> code16(F32 values, float*) { return {_mm512_castps_si512(values)}; }
static inline Code16<Bf16> code16(F32 values, Bf16*) { return {_mm512_broadcast_i64x4(round_bf16(values))}; }
static inline Code16<Fp16> code16(F32 values, Fp16*) { return {_mm512_broadcast_i64x4(round_fp16(values))}; }
#ifdef __AVX512BF16__
static inline Code16<Bf16> code16_fast(F32 values) {
    return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values, values))};
}
#endif

// The values that lookup() would store, as floats.
static inline Code16<float> widen(F32 values, float*) { return code16(values, static_cast<float*>(nullptr)); }
static inline Code16<float> widen(F32 values, Bf16*) {
    return {_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_bf16(values)), 16)};
}
static inline Code16<float> widen(F32 values, Fp16*) {
    return {_mm512_castps_si512(_mm512_cvtph_ps(round_fp16(values)))};
}

// Looks up the thirty-two values of sixteen bytes. One shuffle copies each byte to two places, and the even copies are
// shifted down to the high nibble; the table permutes ignore the bits above an index.
template <class E>
static inline void lookup32(const Code16<E>& code, const uint8_t* bytes, E* dst) {
    const __m512i copies = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    if constexpr (sizeof(E) == 2) {
        const __m512i spread =
            _mm512_set_epi64(0x800f800f800e800e, 0x800d800d800c800c, 0x800b800b800a800a, 0x8009800980088008,
                             0x8007800780068006, 0x8005800580048004, 0x8003800380028002, 0x8001800180008000);
        const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(copies, spread), _mm512_set1_epi32(4));
        _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(index, code.values));
    } else {
        const __m512i spread =
            _mm512_set_epi64(0x8080800780808007, 0x8080800680808006, 0x8080800580808005, 0x8080800480808004,
                             0x8080800380808003, 0x8080800280808002, 0x8080800180808001, 0x8080800080808000);
        const __m512i shift = _mm512_set1_epi64(4);
        const __m512i low = _mm512_srlv_epi32(_mm512_shuffle_epi8(copies, spread), shift);
        const __m512i next = _mm512_add_epi8(spread, _mm512_set1_epi32(8));
        const __m512i high = _mm512_srlv_epi32(_mm512_shuffle_epi8(copies, next), shift);
        _mm512_storeu_si512(dst, _mm512_permutexvar_epi32(low, code.values));
        _mm512_storeu_si512(dst + 16, _mm512_permutexvar_epi32(high, code.values));
    }
}

// Looks up the sixteen values of the high nibbles and the sixteen of the low nibbles of sixteen bytes.
static inline void lookup_even_odd(const Code16<float>& code, const uint8_t* bytes, F32& even, F32& odd) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    even = _mm512_castsi512_ps(_mm512_permutexvar_epi32(_mm512_srli_epi32(index, 4), code.values));
    odd = _mm512_castsi512_ps(_mm512_permutexvar_epi32(index, code.values));
}

#ifdef __AVX512BF16__
// The same for thirty-two bytes, as bf16.
static inline void lookup_even_odd(const Code16<Bf16>& code, const uint8_t* bytes, __m512i& even, __m512i& odd) {
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    even = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), code.values);
    odd = _mm512_permutexvar_epi16(index, code.values);
}

// The pairs a[i] | b[i] << 16, the operand layout of vdpbf16ps, of the first or the second 16 columns.
template <int kHalf>
static inline __m512i interleaved(__m512i a, __m512i b) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    return _mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16 * kHalf)), b);
}

// dst[c] = p[c] | q[c] << 16 for 16 or 32 columns.
template <int kColumns>
static inline void interleave(const Bf16* p, const Bf16* q, uint32_t* dst) {
    if constexpr (kColumns == 16) {
        const __m512i a = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
        _mm512_storeu_si512(dst, interleaved<0>(a, b));
    } else {
        static_assert(kColumns == 32);
        const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(q);
        _mm512_storeu_si512(dst, interleaved<0>(a, b));
        _mm512_storeu_si512(dst + 16, interleaved<1>(a, b));
    }
}
#endif

}  // namespace qlora::QLORA_ISA
