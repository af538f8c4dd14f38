// The launcher of merge_lora.cu, as launchers.h declares the others.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "qlora/nf4_weight.h"

namespace qlora {

// w[n, k] = code[q[i]] * absmax[i >> block_shift] + scaling * sum over j of lora_B[n, j] lora_A[k, j] with i = n * K +
// k, in fp32, rounded once. T is bf16 or fp16. K % 64 == 0, r is 16, 32, 48 or 64; packed is 8-byte aligned, lora_A and
// lora_B are 4-byte aligned, w is 16-byte aligned.
struct MergeLoraArgs {
    NF4Weight weight;
    const void* lora_A;  // T [K, r], transposed
    const void* lora_B;  // T [N, r]
    void* w;             // T [N, K]
    DType dtype;
    int r;
    float scaling;
};

}  // namespace qlora

extern "C" cudaError_t launch_merge_lora(const qlora::MergeLoraArgs* args, cudaStream_t stream);
