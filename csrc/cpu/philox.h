// Philox4x32-10 as every backend draws it (qlora_kernels/ops/_philox.py): key = seed, counter = (call, 0).
//
// Sixteen calls run side by side; the loops over the calls are what the compiler turns into vectors.
#pragma once

#include <cstdint>

namespace qlora::QLORA_ISA {

constexpr int kPhiloxCalls = 16;

// words[4 * i + w]: word w of the call with counter `counter + i`. Its 16-bit draws are the words' halves, low first.
static inline void philox(uint64_t seed, uint64_t counter, uint32_t* words) {
    constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
    constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
    uint32_t c0[kPhiloxCalls], c1[kPhiloxCalls], c2[kPhiloxCalls] = {}, c3[kPhiloxCalls] = {};
    for (int i = 0; i < kPhiloxCalls; ++i) {
        c0[i] = static_cast<uint32_t>(counter + static_cast<uint64_t>(i));
        c1[i] = static_cast<uint32_t>((counter + static_cast<uint64_t>(i)) >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kPhiloxCalls; ++i) {
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
    for (int i = 0; i < kPhiloxCalls; ++i) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}

}  // namespace qlora::QLORA_ISA
