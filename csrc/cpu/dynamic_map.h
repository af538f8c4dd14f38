// The 8-bit dynamic map over blocks of 256 (qlora_kernels/format/blockwise8.py), decoded by table and encoded by
// arithmetic.
//
// The map consists of seven decades of equal cells: decade d divides [0.1, 1) * 10^(d - 6) into 2^d cells, or 2^(d + 1)
// in the unsigned map. Within a decade, the code is therefore a linear function of the magnitude. The decade is
// estimated from the magnitude's bits, at most one too high, and corrected by one comparison. fp32 rounding can give a
// code that is off by one next to a boundary. A group of four vectors with an element that close, about 1 in 60 groups
// of 64 elements, is therefore compared with the boundaries themselves. Eight comparisons and selections instead of the
// estimate took 1.7 times as long.
#pragma once

#include <bit>
#include <cstring>

#include "qlora/nf4_code.h"
#include "simd.h"

namespace qlora::QLORA_ISA {

// Number of elements decoded at a time.
inline constexpr int kPiece = 64;

template <bool kSigned>
struct DynamicMap {
    static constexpr const float* kCode = kSigned ? kAbsmaxCode : kUnsignedCode;
    static constexpr const float* kBoundaries = kSigned ? kAbsmaxBoundaries : kUnsignedBoundaries;
    static constexpr int kOrigin = kSigned ? kAbsmaxZeroIndex : 0;  // index of zero; codes count from here
    static constexpr float kSmallest = kBoundaries[kOrigin];        // between zero and the first code
    static constexpr float kOne = kBoundaries[254];                 // between the last code and 1.0

    // Values per decade, as tables of eight; the last entry is for an estimate beyond the last decade. code =
    // round(magnitude * slope + offset), at most `last`, for magnitudes above `threshold`.
    struct Decades {
        alignas(64) float threshold[8]{}, slope[8]{}, offset[8]{}, last[8]{};

        constexpr Decades() {
            double unit = 1e-6;
            double cells = kSigned ? 1.0 : 2.0;
            for (int d = 0; d < 7; ++d, unit *= 10.0, cells *= 2.0) {
                const double first = kSigned ? cells : cells - 1.0;
                threshold[d] = d == 0 ? -1.0f : kBoundaries[kOrigin + static_cast<int>(first) - 1];
                slope[d] = static_cast<float>(cells / (0.9 * unit));
                offset[d] = static_cast<float>(first - cells / 9.0 - 0.5);
                last[d] = static_cast<float>(first + cells - 1.0);
            }
            threshold[7] = 2.0f;
        }
    };
    static constexpr Decades kDecades{};
};

#ifdef __AVX512BW__

// The floats of a map as two planes of words, for lookup by two permutes of 64 entries each and a selection.
template <bool kSigned>
struct WordPlanes {
    alignas(64) uint16_t low[256]{}, high[256]{};

    constexpr WordPlanes() {
        for (int i = 0; i < 256; ++i) {
            const uint32_t bits = std::bit_cast<uint32_t>(DynamicMap<kSigned>::kCode[i]);
            low[i] = static_cast<uint16_t>(bits);
            high[i] = static_cast<uint16_t>(bits >> 16);
        }
    }
};

struct WordTable {
    __m512i words[8];

    explicit WordTable(const uint16_t* plane) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) words[i] = _mm512_load_si512(plane + 32 * i);
    }

    __m512i operator[](__m512i index) const {
        const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
        const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x80));
        const __m512i low = _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(words[0], index, words[1]), bit6,
                                                  _mm512_permutex2var_epi16(words[2], index, words[3]));
        const __m512i high = _mm512_mask_mov_epi16(_mm512_permutex2var_epi16(words[4], index, words[5]), bit6,
                                                   _mm512_permutex2var_epi16(words[6], index, words[7]));
        return _mm512_mask_mov_epi16(low, bit7, high);
    }
};

// x[i] = code[q[i]] * absmax for kPiece elements.
template <bool kSigned>
static inline void decode_piece(const uint8_t* q, float absmax, float* x) {
    static constexpr WordPlanes<kSigned> kPlanes;
    const WordTable low(kPlanes.low), high(kPlanes.high);
    // Unpacking interleaves within 128 bits; with this order of the indices, its results are consecutive.
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
#pragma GCC unroll 2
    for (int i = 0; i < kPiece; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i));
        const __m512i index = _mm512_permutexvar_epi64(order, _mm512_cvtepu8_epi16(bytes));
        const __m512i low_words = low[index], high_words = high[index];
        const __m512i first = _mm512_unpacklo_epi16(low_words, high_words);
        const __m512i second = _mm512_unpackhi_epi16(low_words, high_words);
        store(x + i, mul(_mm512_castsi512_ps(first), set1(absmax)));
        store(x + i + 16, mul(_mm512_castsi512_ps(second), set1(absmax)));
    }
}

// The highest decade of the numbers with an exponent, indexed by the exponent's low five bits.
template <bool kSigned>
struct DecadeOfExponent {
    alignas(64) int32_t decade[32]{};

    constexpr DecadeOfExponent() {
        float end = 2.0f;  // upper bound of the numbers with that exponent
        for (int i = 31; i >= 0; --i, end *= 0.5f) {
            decade[i] = 6;
            while (decade[i] > 0 && DynamicMap<kSigned>::kDecades.threshold[decade[i]] >= end) --decade[i];
        }
    }
};

// Indices of kLanes normalized numbers. `farthest` collects the largest distance from the middle of a cell.
template <bool kSigned>
static inline I32 approximate_index(F32 x, F32& farthest) {
    using Map = DynamicMap<kSigned>;
    static constexpr DecadeOfExponent<kSigned> kHighest;
    const auto by_decade = [](const float* table, __m512i decade) {
        return _mm512_permutexvar_ps(decade, _mm512_broadcast_f32x8(_mm256_load_ps(table)));
    };
    const __m512i one = _mm512_set1_epi32(1);
    __m512i magnitude = _mm512_castps_si512(x);
    __mmask16 negative = 0;
    if constexpr (kSigned) {
        // A tie goes to the lower index, away from zero for negative numbers: their magnitude moves up one step.
        negative = _mm512_movepi32_mask(magnitude);
        magnitude = _mm512_and_si512(magnitude, _mm512_set1_epi32(0x7fffffff));
        magnitude = _mm512_mask_add_epi32(magnitude, negative, magnitude, one);
    }
    const __m512 a = _mm512_castsi512_ps(magnitude);
    // Exponents outside the table give a wrong decade; these codes are zeroed below.
    const __m512i highest = _mm512_permutex2var_epi32(
        _mm512_load_si512(kHighest.decade), _mm512_srli_epi32(magnitude, 23), _mm512_load_si512(kHighest.decade + 16));
    const __mmask16 below = _mm512_cmp_ps_mask(a, by_decade(Map::kDecades.threshold, highest), _CMP_LE_OQ);
    const __m512i decade = _mm512_mask_sub_epi32(highest, below, highest, one);
    const __m512 place = fma(a, by_decade(Map::kDecades.slope, decade), by_decade(Map::kDecades.offset, decade));
    const __m512 within = _mm512_min_ps(place, by_decade(Map::kDecades.last, decade));
    farthest = _mm512_range_ps(farthest, _mm512_reduce_ps(within, _MM_FROUND_TO_NEAREST_INT), 0xb);  // max |.|
    const __mmask16 counts = _mm512_cmp_ps_mask(a, set1(Map::kSmallest), _CMP_GT_OQ);
    __m512i code = _mm512_maskz_cvtps_epi32(counts, within);
    // Add one where x is 1.0, which has no negative counterpart.
    code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(x, set1(Map::kOne), _CMP_GT_OQ), code, one);
    if constexpr (kSigned) {
        const __m512i origin = _mm512_set1_epi32(Map::kOrigin);
        code = _mm512_mask_sub_epi32(_mm512_add_epi32(origin, code), negative, origin, code);
    }
    return reinterpret_cast<I32>(code);
}

#else

template <bool kSigned>
static inline void decode_piece(const uint8_t* q, float absmax, float* x) {
    for (int i = 0; i < kPiece; ++i) x[i] = DynamicMap<kSigned>::kCode[q[i]] * absmax;
}

// table[i & 7] in each lane.
static inline F32 lookup8(const float* table, I32 i) {
#ifdef __AVX2__
    return _mm256_permutevar8x32_ps(_mm256_load_ps(table), reinterpret_cast<__m256i>(i));
#elif defined(QLORA_NEON)
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(table);
    const uint8x16x2_t entries = {{vld1q_u8(bytes), vld1q_u8(bytes + 16)}};
    return vreinterpretq_f32_u8(vqtbl2q_u8(entries, dword_bytes(reinterpret_cast<uint32x4_t>(i & 7))));
#else
    return F32{table[i[0] & 7], table[i[1] & 7], table[i[2] & 7], table[i[3] & 7]};
#endif
}

// Rounds positive numbers that are not halfway between two integers to the nearest integer.
static inline I32 nearest(F32 x) {
#ifdef __AVX2__
    return reinterpret_cast<I32>(_mm256_cvtps_epi32(x));
#elif defined(QLORA_NEON)
    return reinterpret_cast<I32>(vcvtnq_s32_f32(x));
#else
    return __builtin_convertvector(x + 0.5f, I32);
#endif
}

// The same for compilers without AVX-512: the decade is estimated from the bits as an integer, a logarithm with an
// error below 0.03 decades.
template <bool kSigned>
static inline I32 approximate_index(F32 x, F32& farthest) {
    using Map = DynamicMap<kSigned>;
    constexpr float kLog10Of2 = 0.30103f;
    constexpr float kLogOfBits = kLog10Of2 / (1 << 23);
    constexpr float kLogOrigin = 7.0f - 127.0f * kLog10Of2 + 0.0265f;  // the bits underestimate by up to 0.026

    const I32 bits = reinterpret_cast<I32>(x);
    const I32 negative = kSigned ? bits >> 31 : bits ^ bits;  // -1 below zero
    // A tie takes the lower index, which for negative numbers is away from zero: their magnitude is raised by one ulp.
    const I32 magnitude = kSigned ? (bits & 0x7fffffff) - negative : bits;
    const F32 a = reinterpret_cast<F32>(magnitude);
    const F32 logarithm = fma(__builtin_convertvector(magnitude, F32), set1(kLogOfBits), set1(kLogOrigin));
    const I32 guess = __builtin_convertvector(logarithm, I32);  // wrong below kSmallest; zeroed below
    const I32 decade = guess + (a <= lookup8(Map::kDecades.threshold, guess));
    const F32 place = fma(a, lookup8(Map::kDecades.slope, decade), lookup8(Map::kDecades.offset, decade));
    const F32 last = lookup8(Map::kDecades.last, decade);
    const F32 within = place < last ? place : last;
    const I32 code = nearest(within);
    farthest = max_magnitude(farthest, within - __builtin_convertvector(code, F32));
    // Add one where x is 1.0, which has no negative counterpart.
    const I32 k = (code & (a > set1(Map::kSmallest))) - (x > set1(Map::kOne));
    return Map::kOrigin + ((k ^ negative) - negative);
}

#endif

// The index of x, the number of boundaries strictly below it, from an estimate that is off by at most one.
template <bool kSigned>
static inline int corrected_index(float x, int guess) {
    constexpr const float* kBoundaries = DynamicMap<kSigned>::kBoundaries;
    if (guess > 0 && !(x > kBoundaries[guess - 1])) return guess - 1;
    if (guess < 255 && x > kBoundaries[guess]) return guess + 1;
    return guess;
}

// largest[lane] = the largest magnitude so far in that lane, over `n` more elements, a multiple of kLanes.
static inline void collect_largest(const float* x, int n, F32& largest) {
    for (int i = 0; i < n; i += kLanes) largest = max_magnitude(largest, load(x + i));
}

// x[i] -> q[i], i < n <= 256; returns absmax. x has room for 256 elements and is zero from n on; `largest` covers all
// of them.
template <bool kSigned>
static inline float encode_block(const float* x, F32 largest, uint8_t* q, int n) {
    constexpr int kGroup = 4 * kLanes;
    constexpr float kClose = 0.5f - 0x1p-13f;  // this far from the middle of a cell, rounding may decide
    const float absmax = largest_lane(largest);
    if (absmax < kSmallestAbsmax) {
        memset(q, DynamicMap<kSigned>::kOrigin, static_cast<size_t>(n));
        return 0.0f;
    }
    const float inverse = 1.0f / absmax;
    alignas(64) uint8_t padded[256];
    uint8_t* index = n == 256 ? q : padded;
    for (int begin = 0; begin < 256; begin += kGroup) {
        F32 farthest = zero();
        I32 group[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            group[i] = approximate_index<kSigned>(mul(load(x + begin + i * kLanes), set1(inverse)), farthest);
        }
        store_bytes(index + begin, group);
        if (any_above(farthest, kClose)) {
            for (int i = begin; i < begin + kGroup; ++i) {
                index[i] = static_cast<uint8_t>(corrected_index<kSigned>(x[i] * inverse, index[i]));
            }
        }
    }
    if (n < 256) memcpy(q, padded, static_cast<size_t>(n));
    return absmax;
}

}  // namespace qlora::QLORA_ISA
