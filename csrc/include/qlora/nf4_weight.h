// A quantized weight as the kernels see it: borrowed pointers in the storage format, nothing repacked.
#pragma once

#include <cstdint>

#include "qlora/nf4_code.h"

namespace qlora {

// Row-major [N, K], two 4-bit indices a byte (element 2i in the high nibble), flattened into blocks of 2^block_shift
// elements that may straddle rows. Either `absmax` is given or the three members of the second level are.
struct NF4Weight {
    const uint8_t* packed;
    const float* absmax;
    const uint8_t* absmax_q;
    const float* absmax_scale;
    float absmax_offset;
    int64_t N;
    int64_t K;
    int block_shift;
};

// The absmax of one block. A product, then a sum: two roundings, so that every backend gets the same bits.
// static: kernels are compiled once per instruction set, and a shared definition could be the AVX-512 one.
static inline float block_absmax(const NF4Weight& w, int64_t block) {
    if (w.absmax) return w.absmax[block];
    const float product = kAbsmaxCode[w.absmax_q[block]] * w.absmax_scale[block / kNestedBlocksize];
    return product + w.absmax_offset;
}

}  // namespace qlora
