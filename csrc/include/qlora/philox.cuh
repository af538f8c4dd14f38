// Random bits as a pure function of (seed, counter) by Philox4x32-10, equal to qlora_kernels/ops/philox.py.
#pragma once

#include <cstdint>

namespace qlora {

__device__ __forceinline__ uint4 philox(int64_t seed, int64_t counter) {
    constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
    constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint4 c = make_uint4(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(c.x, kMultiplier0), high1 = __umulhi(c.z, kMultiplier1);
        c = make_uint4(high1 ^ c.y ^ key0, c.z * kMultiplier1, high0 ^ c.w ^ key1, c.x * kMultiplier0);
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return c;
}

constexpr int kDrawsPerCall = 8;

// keep[j] of element 8 * call + j: its draw is 16-bit half (j & 1) of word j >> 1.
__device__ __forceinline__ void draw8(bool (&keep)[kDrawsPerCall], int64_t seed, int64_t call, uint32_t threshold) {
    const uint4 words = philox(seed, call);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int j = 0; j < kDrawsPerCall; j++) keep[j] = (word[j / 2] >> (16 * (j & 1)) & 0xFFFFu) >= threshold;
}

}  // namespace qlora
