// The ops that are computed on AMX tiles, and the table with the kernels of all other ops.
#pragma once

#include "../kernels.h"

namespace qlora {

namespace avx512_bf16 {
extern const Kernels kKernels;
}

namespace QLORA_ISA {

void linear_nf4(const LinearProblem& p, const void* x, AnyFloat bias, void* y);
void linear_nf4_grad_x(const LinearProblem& p, const void* grad_y, void* grad_x);
void linear_nf4_lora(const LinearProblem& p, const Lora& lora, const void* x, AnyFloat bias, void* y, void* s);
void linear_nf4_lora_backward(const LinearProblem& p, const Lora& lora, const void* grad_y, const void* x,
                              const void* s, void* grad_x, float* grad_A, float* grad_B);
void linear_nf4_lora_group(const LinearGroup& group, const void* x, const AnyFloat* biases, void* const* ys, void* s);
void linear_nf4_lora_group_backward(const LinearGroup& group, const void* const* grad_ys, const void* x, const void* s,
                                    void* grad_x, float* grad_A, float* const* grads_B);
void linear_cross_entropy(const CrossEntropyProblem& p, const void* hidden, const CrossEntropyResults& results);
void attention(const AttentionProblem& p, const AttentionOutputs& outputs);
void attention_backward(const AttentionProblem& p, const AttentionGradients& gradients);
void dropout_bits(uint64_t seed, uint32_t threshold, int64_t numel, uint8_t* bits);

}  // namespace QLORA_ISA
}  // namespace qlora
