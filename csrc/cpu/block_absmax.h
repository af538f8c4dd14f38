// Decodes the absmax of one block from either kind of constants.
#pragma once

#include "qlora/nf4_weight.h"

namespace qlora {

// The product and the sum are rounded separately, so that every backend gets the same bits. The function is static:
// kernels are compiled once per instruction set, and a shared definition could be the AVX-512 one.
static inline float block_absmax(const NF4Weight& w, int64_t block) {
    if (w.absmax) return w.absmax[block];
    const float product = kAbsmaxCode[w.absmax_q[block]] * w.absmax_scale[block / kNestedBlocksize];
    return product + *w.absmax_offset;
}

}  // namespace qlora
