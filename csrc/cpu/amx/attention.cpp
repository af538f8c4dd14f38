// Attention on AMX tiles for bf16; other dtypes use the avx512_bf16 kernels.
#include "../attention.h"

#include "amx_tiles.h"
#include "ops.h"

namespace qlora::QLORA_ISA {

void attention(const AttentionProblem& p, const AttentionOutputs& outputs) {
    if (p.dtype != DType::kBfloat16) return avx512_bf16::kKernels.attention(p, outputs);
    Attention<Bf16, AmxTiles>(p).forward(outputs);
}

void attention_backward(const AttentionProblem& p, const AttentionGradients& gradients) {
    if (p.dtype != DType::kBfloat16) return avx512_bf16::kKernels.attention_backward(p, gradients);
    Attention<Bf16, AmxTiles>(p).backward(gradients);
}

}  // namespace qlora::QLORA_ISA
