// Philox4x32-10, equal to qlora_kernels/ops/philox.py: key = seed, counter = (call, 0).
//
// Sixteen calls are computed at once. The words of a call are in 64-bit lanes, of which only the low half is used. The
// 32 x 32-bit multiply reads the low halves and leaves (high : low) in place, so that a round of all calls is two
// multiplies, two shifts and the exclusive ors, without shuffles between rounds.
#pragma once

#include <cstdint>

#include "simd.h"

namespace qlora::QLORA_ISA {

constexpr int kPhiloxCalls = 16;

namespace philox_detail {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

#if defined(__AVX512F__)

using Lanes = __m512i;
constexpr int kLaneCalls = 8;

static inline Lanes broadcast(uint32_t x) { return _mm512_set1_epi64(x); }
static inline Lanes high(Lanes a) { return _mm512_srli_epi64(a, 32); }
static inline Lanes product(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
static inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// Lane order with which the final unpacking returns the calls in sequence.
static inline Lanes counters(uint64_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first)), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
}

static inline void store_words(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t* words) {
    const Lanes first = _mm512_mask_blend_epi32(0xaaaa, c0, _mm512_slli_epi64(c1, 32));
    const Lanes second = _mm512_mask_blend_epi32(0xaaaa, c2, _mm512_slli_epi64(c3, 32));
    _mm512_storeu_si512(words, _mm512_unpacklo_epi64(first, second));
    _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(first, second));
}

#elif defined(__AVX2__)

using Lanes = __m256i;
constexpr int kLaneCalls = 4;

static inline Lanes broadcast(uint32_t x) { return _mm256_set1_epi64x(x); }
static inline Lanes high(Lanes a) { return _mm256_srli_epi64(a, 32); }
static inline Lanes product(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
static inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }

static inline Lanes counters(uint64_t first) {
    return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(first)), _mm256_set_epi64x(3, 1, 2, 0));
}

static inline void store_words(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t* words) {
    const Lanes first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    const Lanes second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_unpacklo_epi64(first, second));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + 8), _mm256_unpackhi_epi64(first, second));
}

#else

using Lanes = uint64_t;
constexpr int kLaneCalls = 1;

static inline Lanes broadcast(uint32_t x) { return x; }
static inline Lanes high(Lanes a) { return a >> 32; }
static inline Lanes product(Lanes a, Lanes b) { return (a & 0xffffffff) * (b & 0xffffffff); }
static inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return a ^ b ^ c; }
static inline Lanes counters(uint64_t first) { return first; }

static inline void store_words(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t* words) {
    const Lanes all[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) words[w] = static_cast<uint32_t>(all[w]);
}

#endif

}  // namespace philox_detail

// words[4 * i + w]: word w of the call with counter `counter + i`. Its 16-bit draws are the halves of the words, low
// first.
static inline void philox(uint64_t seed, uint64_t counter, uint32_t* words) {
    using namespace philox_detail;
    constexpr int kSets = kPhiloxCalls / kLaneCalls;
    const Lanes multiplier0 = broadcast(kMultiplier0), multiplier1 = broadcast(kMultiplier1);
    Lanes c0[kSets], c1[kSets], c2[kSets], c3[kSets];
    for (int i = 0; i < kSets; ++i) {
        c0[i] = counters(counter + static_cast<uint64_t>(i * kLaneCalls));
        c1[i] = high(c0[i]);
        c2[i] = broadcast(0);
        c3[i] = broadcast(0);
    }
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        const Lanes k0 = broadcast(key0), k1 = broadcast(key1);
        for (int i = 0; i < kSets; ++i) {
            const Lanes product0 = product(c0[i], multiplier0);
            const Lanes product1 = product(c2[i], multiplier1);
            c0[i] = xor3(high(product1), c1[i], k0);
            c2[i] = xor3(high(product0), c3[i], k1);
            c1[i] = product1;
            c3[i] = product0;
        }
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    for (int i = 0; i < kSets; ++i) store_words(c0[i], c1[i], c2[i], c3[i], words + 4 * kLaneCalls * i);
}

}  // namespace qlora::QLORA_ISA
