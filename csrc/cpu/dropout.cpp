// dropout_bits: the dropout mask as a bitmap, bit i for the flat element i.
//
// Philox4x32-10 with key = seed and counter = i >> 3: one call gives the eight 16-bit draws of one byte of the bitmap.
// Sixteen calls run side by side; the loops over `kCalls` are what the compiler turns into vectors.
#include "ops.h"
#include "qlora/parallel.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

constexpr int kCalls = 16;
constexpr uint32_t kMultiplier0 = 0xD2511F53;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9;
constexpr uint32_t kWeyl1 = 0xBB67AE85;

// words[4 * call + w]: word w of the call with counter `counter + call`.
void philox(uint64_t seed, uint64_t counter, uint32_t* words) {
    uint32_t c0[kCalls], c1[kCalls], c2[kCalls] = {}, c3[kCalls] = {};
    for (int i = 0; i < kCalls; ++i) {
        c0[i] = static_cast<uint32_t>(counter + static_cast<uint64_t>(i));
        c1[i] = static_cast<uint32_t>((counter + static_cast<uint64_t>(i)) >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kCalls; ++i) {
            const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * c0[i];
            const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * c2[i];
            c0[i] = static_cast<uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
            c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
            c1[i] = static_cast<uint32_t>(product1);
            c3[i] = static_cast<uint32_t>(product0);
        }
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    for (int i = 0; i < kCalls; ++i) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}

// Four calls' draws, eight each in order, to four bytes: a draw at or above the threshold is kept.
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
        alignas(64) uint32_t words[4 * kCalls];
        for (int64_t b = begin; b < end; b += kCalls) {
            philox(seed, static_cast<uint64_t>(b), words);
            const int64_t n = end - b < kCalls ? end - b : kCalls;
            for (int64_t i = 0; i < n; i += 4) {
                const uint32_t four = kept(words + 4 * i, threshold);
                memcpy(bits + b + i, &four, static_cast<size_t>(n - i < 4 ? n - i : 4));
            }
        }
    });
}

}  // namespace qlora::QLORA_ISA
