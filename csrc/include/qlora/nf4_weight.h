// A quantized weight as CPU kernels, CUDA launchers, CUDA kernels and bindings see it: borrowed pointers in the storage
// format, nothing repacked.
#pragma once

#include <cstdint>

#include "qlora/nf4_code.h"

namespace qlora {

// W [N, K], row-major, two 4-bit indices a byte (element 2i in the high nibble), flattened into blocks of 2^block_shift
// elements that may straddle rows. All pointers are in the memory of the device that computes. Either `absmax` is
// given, or absmax_q, absmax_scale and absmax_offset are.
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

// A tensor whose element type is known at run time: biases and LoRA factors keep the user's own dtype.
struct AnyFloat {
    const void* data;  // or null
    DType dtype;
};

}  // namespace qlora
