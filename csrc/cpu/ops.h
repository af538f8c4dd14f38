// The kernels of one instruction set, as the files of this folder define them; kernels.h describes each.
#pragma once

#include "kernels.h"

namespace qlora::QLORA_ISA {

void quantize_nf4(const void* w, DType dtype, int64_t numel, int block_shift, uint8_t* packed, float* absmax);
void quantize_absmax(const float* absmax, int64_t blocks, float offset, uint8_t* absmax_q, float* absmax_scale);
void dequantize_nf4(const NF4Weight& weight, DType dtype, void* out);
void linear_nf4(const LinearProblem& p, const void* x, AnyFloat bias, void* y);
void linear_nf4_grad_x(const LinearProblem& p, const void* grad_y, void* grad_x);
void linear_nf4_lora(const LinearProblem& p, const Lora& lora, const void* x, AnyFloat bias, void* y, void* s);
void linear_nf4_lora_backward(const LinearProblem& p, const Lora& lora, const void* grad_y, const void* x,
                              const void* s, void* grad_x, float* grad_A, float* grad_B);
void linear_nf4_lora_group(const LinearGroup& group, const void* x, const AnyFloat* biases, void* const* ys, void* s);
void linear_nf4_lora_group_backward(const LinearGroup& group, const void* const* grad_ys, const void* x, const void* s,
                                    void* grad_x, float* grad_A, float* const* grads_B);
void dropout_bits(uint64_t seed, uint32_t threshold, int64_t numel, uint8_t* bits);
void adamw_step(const AdamWStep& step);
void linear_cross_entropy(const CrossEntropyProblem& p, const void* hidden, const CrossEntropyResults& results);
void rms_norm(const RmsNorm& p, const void* x, const void* residual, float eps, void* s, void* y, float* scale);
void add_residual(DType dtype, int64_t n, const void* x, const void* residual, void* s);
void rms_norm_backward(const RmsNorm& p, const void* grad_y, const void* grad_s, const void* s, const float* scale,
                       void* grad_x, float* grad_weight);
void rope(const Rope& p);
void glu(Activation activation, DType dtype, int64_t n, const void* gate, const void* up, void* y);
void glu_backward(Activation activation, DType dtype, int64_t n, const void* grad_y, const void* gate, const void* up,
                  void* grad_gate, void* grad_up);
void attention(const AttentionProblem& p, const AttentionOutputs& outputs);
void attention_backward(const AttentionProblem& p, const AttentionGradients& gradients);

}  // namespace qlora::QLORA_ISA
