// A quantized weight for CPU kernels, CUDA launchers, CUDA kernels and bindings: borrowed pointers to the storage
// format.
#pragma once

#include <cstdint>

#include "qlora/nf4_code.h"

namespace qlora {

// W [N, K], row-major, two 4-bit indices per byte (element 2i in the high nibble), flattened into blocks of
// 2^block_shift elements that may straddle rows. All pointers refer to memory of the computing device. Either `absmax`
// is given, or absmax_q, absmax_scale and absmax_offset are.
struct NF4Weight {
    const uint8_t* packed;       // u8 [ceil(N * K / 2)]
    const float* absmax;         // fp32 [n_blocks], or null under double quantization
    const uint8_t* absmax_q;     // u8 [n_blocks]
    const float* absmax_scale;   // fp32 [ceil(n_blocks / 256)]
    const float* absmax_offset;  // fp32 [1]
    int64_t N;
    int64_t K;
    int block_shift;  // log2(blocksize)
};

// A tensor whose dtype is known at run time, such as a bias or LoRA factor in the user's dtype.
struct AnyFloat {
    const void* data;  // or null
    DType dtype;
};

}  // namespace qlora
