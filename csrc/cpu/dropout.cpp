// dropout_bits: the dropout mask as a bitmap; bit i is that of the flat element i.
//
// Philox4x32-10 with key = seed and counter = i >> 3: each call gives the eight 16-bit draws of one byte of the bitmap.
#include "ops.h"
#include "philox.h"
#include "qlora/parallel.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

// Converts the draws of four calls, eight each, to four bytes; draws of at least the threshold set their bit.
uint32_t kept(const uint32_t* words, uint32_t threshold) {
#ifdef __AVX512BW__
    const __m512i limit = _mm512_set1_epi16(static_cast<short>(threshold));
    return _mm512_cmpge_epu16_mask(_mm512_load_si512(words), limit);
#else
    uint32_t bits = 0;
    for (int w = 0; w < 16; ++w) {
        bits |= static_cast<uint32_t>((words[w] & 0xffff) >= threshold) << (2 * w);
        bits |= static_cast<uint32_t>((words[w] >> 16) >= threshold) << (2 * w + 1);
    }
    return bits;
#endif
}

}  // namespace

void dropout_bits(uint64_t seed, uint32_t threshold, int64_t numel, uint8_t* bits) {
    const int64_t bytes = (numel + 7) >> 3;
    parallel_ranges(bytes, 4096, [&](int64_t begin, int64_t end) {
        alignas(64) uint32_t words[4 * kPhiloxCalls];
        for (int64_t b = begin; b < end; b += kPhiloxCalls) {
            philox(seed, static_cast<uint64_t>(b), words);
            const int64_t n = end - b < kPhiloxCalls ? end - b : kPhiloxCalls;
            for (int64_t i = 0; i < n; i += 4) {
                const uint32_t four = kept(words + 4 * i, threshold);
                memcpy(bits + b + i, &four, static_cast<size_t>(n - i < 4 ? n - i : 4));
            }
        }
    });
}

}  // namespace qlora::QLORA_ISA
