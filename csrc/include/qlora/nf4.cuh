// Reads NF4 weights in device code. The constants are those of nf4_code.h, generated from format/nf4.py.
#pragma once

#include <cstdint>

#include "qlora/nf4_weight.h"

namespace qlora {

constexpr int kNestedShift = 8;  // log2(256), the constants per absmax_scale
static_assert(1 << kNestedShift == kNestedBlocksize);

__device__ __forceinline__ float nf4_code(int q) {
    static const float table[16] = {QLORA_NF4_CODE};
    return table[q];
}

// A table of 1 KiB that stays in L1; the lanes of a warp read a few different entries at a time.
__device__ __forceinline__ float absmax_code(int q) {
    static const float table[256] = {QLORA_ABSMAX_CODE};
    return table[q];
}

// The absmax of block `index` under double quantization: an fp32 product and an fp32 sum, which must not be fused.
__device__ __forceinline__ float decoded_block_absmax(const NF4Weight& w, int64_t index) {
    const float value = absmax_code(__ldg(w.absmax_q + index));
    const float scale = __ldg(w.absmax_scale + (index >> kNestedShift));
    return __fadd_rn(__fmul_rn(value, scale), __ldg(w.absmax_offset));
}

// The absmax of block `index`.
__device__ __forceinline__ float block_absmax(const NF4Weight& w, int64_t index) {
    return w.absmax ? __ldg(w.absmax + index) : decoded_block_absmax(w, index);
}

// Constants of a block as loaded. A kernel with a pipeline loads them a step before it decodes them: a lookup by
// absmax_q straight after its load would hold up every later instruction until both loads have answered.
struct RawAbsmax {
    float scale;  // absmax itself, or under double quantization the absmax_scale
    uint32_t q;   // absmax_q, or kMissing
    static constexpr uint32_t kMissing = 256;
};

// The 256 values of absmax_q in shared memory.
struct AbsmaxTable {
    float value[256];

    template <int THREADS>
    __device__ __forceinline__ void fill(int thread) {
        static_assert(256 % THREADS == 0);
#pragma unroll
        for (int j = 0; j < 256 / THREADS; j++) value[thread + j * THREADS] = absmax_code(thread + j * THREADS);
    }
};

// Reads absmax in two parts: load() reads memory only, decode() computes. Holds what both need in registers.
class AbsmaxReader {
  public:
    __device__ __forceinline__ explicit AbsmaxReader(const NF4Weight& w)
        : scales_(w.absmax ? w.absmax : w.absmax_scale),
          q_(w.absmax ? nullptr : w.absmax_q),
          scale_shift_(w.absmax ? 0 : kNestedShift),
          offset_(w.absmax ? 0.0f : __ldg(w.absmax_offset)) {}

    // Of a block that does not exist, an absmax of zero: its weights are zero then.
    template <class Index>
    __device__ __forceinline__ RawAbsmax load(Index block, bool exists = true) const {
        return {exists ? __ldg(scales_ + (block >> scale_shift_)) : 0.0f, !exists ? RawAbsmax::kMissing
                                                                          : q_    ? __ldg(q_ + block)
                                                                                  : 0u};
    }

    // An fp32 product and an fp32 sum, never fused.
    __device__ __forceinline__ float decode(const AbsmaxTable& table, const RawAbsmax& raw) const {
        if (!q_) return raw.scale;
        if (raw.q == RawAbsmax::kMissing) return 0.0f;
        return __fadd_rn(__fmul_rn(table.value[raw.q], raw.scale), offset_);
    }

  private:
    const float* scales_;
    const uint8_t* q_;
    int scale_shift_;
    float offset_;
};

// The 16 code values in shared memory: 16 banks, one wavefront for any 32 indices. docs/kernels/cuda.md compares it
// with alternatives.
struct CodeTable {
    float value[16];

    __device__ __forceinline__ void fill(int thread) {
        if (thread < 16) value[thread] = nf4_code(thread);
    }

    // The eight elements of a little-endian word of packed indices: byte 0 first, and the high nibble of each byte
    // first. Two masks convert four nibbles at a time to byte offsets, so that each value costs one byte extraction and
    // the load: 1.5 integer instructions, where a shift and a mask for each took 2.
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

// Index i of a flat weight, in the high nibble of byte i / 2 if i is even.
__device__ __forceinline__ int nibble(const uint8_t* packed, int64_t i) {
    return (packed[i >> 1] >> (i & 1 ? 0 : 4)) & 0xF;
}

}  // namespace qlora
