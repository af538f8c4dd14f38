// Reading NF4 weights in device code. The numbers come from nf4_code.h, which is generated from format/nf4.py.
#pragma once

#include <cstdint>

#include "qlora/nf4_code.h"

namespace qlora {

constexpr int kNestedShift = 8;  // log2 of the 256 constants that share an absmax_scale
static_assert(1 << kNestedShift == kNestedBlocksize);

// The constants of a weight as every op takes them: absmax, or the other three. All in device memory.
struct Absmax {
    const float* absmax;         // fp32 [n_blocks], or null under double quantization
    const uint8_t* absmax_q;     // u8 [n_blocks]
    const float* absmax_scale;   // fp32 [ceil(n_blocks / 256)]
    const float* absmax_offset;  // fp32 [1]
    int block_shift;             // log2(blocksize)
};

__device__ __forceinline__ float nf4_code(int q) {
    static const float table[16] = {QLORA_NF4_CODE};
    return table[q];
}

// 1 KiB that stays in L1: the lanes of a warp ask for a handful of its entries at a time.
__device__ __forceinline__ float absmax_code(int q) {
    static const float table[256] = {QLORA_ABSMAX_CODE};
    return table[q];
}

// The first-level constant of block `index` under double quantization: an fp32 product and an fp32 sum, never fused.
template <class Index>
__device__ __forceinline__ float first_level_of_nested(const Absmax& constants, Index index) {
    const float value = absmax_code(__ldg(constants.absmax_q + index));
    const float scale = __ldg(constants.absmax_scale + (index >> kNestedShift));
    return __fadd_rn(__fmul_rn(value, scale), __ldg(constants.absmax_offset));
}

// The first-level constant of block `index`.
__device__ __forceinline__ float first_level(const Absmax& constants, int64_t index) {
    return constants.absmax ? __ldg(constants.absmax + index) : first_level_of_nested(constants, index);
}

// The same of several blocks, with one branch for all of them.
template <int COUNT>
__device__ __forceinline__ void first_levels(float (&to)[COUNT], const Absmax& constants,
                                             const uint32_t (&index)[COUNT]) {
    if (constants.absmax) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = __ldg(constants.absmax + index[i]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = first_level_of_nested(constants, index[i]);
    }
}

// The 16 code values in shared memory: 16 banks, one wavefront for any 32 indices. Measured against the alternatives in
// docs/kernels/cuda.md.
struct CodeTable {
    float value[16];

    __device__ __forceinline__ void fill(int thread) {
        if (thread < 16) value[thread] = nf4_code(thread);
    }

    // The eight elements of a little-endian word of packed indices: byte 0 first, in a byte the high nibble first. Two
    // masks turn the nibbles into byte offsets four at a time, so that each value costs one byte extraction and the
    // load: 1.5 integer instructions where a shift and a mask for each took 2.
    __device__ __forceinline__ void decode8(float (&to)[8], uint32_t word) const {
        const uint32_t even = word >> 2 & 0x3C3C3C3Cu, odd = word << 2 & 0x3C3C3C3Cu;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            to[2 * i] = at(__byte_perm(even, 0, 0x4440 + i));
            to[2 * i + 1] = at(__byte_perm(odd, 0, 0x4440 + i));
        }
    }

    __device__ __forceinline__ float at(uint32_t byte_offset) const {
        return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(value) + byte_offset);
    }
};

// Index i of a flat weight: the high nibble of byte i / 2 where i is even.
__device__ __forceinline__ int nibble(const uint8_t* packed, int64_t i) {
    return (packed[i >> 1] >> (i & 1 ? 0 : 4)) & 0xF;
}

}  // namespace qlora
