// The interface of the CPU kernels: one table of functions per instruction set; cpu_kernels() is the table of
// cpu_isa().
//
// Every pointer refers to contiguous memory of the given shape; x, y and gradients have one dtype.
#pragma once

#include <cstdint>

#include "adamw_step.h"
#include "attention_problem.h"
#include "cross_entropy.h"
#include "model_parts.h"
#include "qlora/dtypes.h"
#include "qlora/nf4_weight.h"

namespace qlora {

// x [M, K] and y [M, N] of `dtype`; bias [N] or data == nullptr.
struct LinearProblem {
    NF4Weight weight;
    DType dtype;
    int64_t M;
};

// lora_A [r, K], lora_B [N, r]. threshold: an element is dropped if its 16-bit draw is below it; 0 means no dropout.
struct Lora {
    AnyFloat A;
    AnyFloat B;
    int64_t r;
    float scaling;
    uint32_t threshold;
    uint64_t seed;
};

// One of several linears that read the same x. lora.r may be 0, without factors; threshold and seed are equal for all.
struct GroupMember {
    NF4Weight weight;
    Lora lora;
};

// x [M, K] of `dtype`. s and ds have the columns of the members side by side, R in total.
struct LinearGroup {
    const GroupMember* members;
    int64_t count;
    DType dtype;
    int64_t M, K, R;
};

struct Kernels {
    // w [numel] of dtype -> packed [(numel + 1) / 2], absmax [ceil(numel / blocksize)]
    void (*quantize_nf4)(const void* w, DType dtype, int64_t numel, int block_shift, uint8_t* packed, float* absmax);
    // absmax [blocks], its mean -> absmax_q [blocks], absmax_scale [ceil(blocks / 256)]
    void (*quantize_absmax)(const float* absmax, int64_t blocks, float offset, uint8_t* absmax_q, float* absmax_scale);
    // out [N * K] of dtype
    void (*dequantize_nf4)(const NF4Weight& weight, DType dtype, void* out);
    // y = x W^T + bias
    void (*linear_nf4)(const LinearProblem& p, const void* x, AnyFloat bias, void* y);
    // grad_x = grad_y W
    void (*linear_nf4_grad_x)(const LinearProblem& p, const void* grad_y, void* grad_x);
    // s = dropout(x) A^T [M, r];  y = x W^T + bias + scaling s B^T
    void (*linear_nf4_lora)(const LinearProblem& p, const Lora& lora, const void* x, AnyFloat bias, void* y, void* s);
    // grad_x, grad_A [r, K] and grad_B [N, r], the latter two in fp32; each is skipped if null
    void (*linear_nf4_lora_backward)(const LinearProblem& p, const Lora& lora, const void* grad_y, const void* x,
                                     const void* s, void* grad_x, float* grad_A, float* grad_B);
    // the same for each member i: biases [count], ys [count], y_i [M, N_i]; s [M, R]
    void (*linear_nf4_lora_group)(const LinearGroup& group, const void* x, const AnyFloat* biases, void* const* ys,
                                  void* s);
    // grad_x, the sum over the members, grad_A [R, K] and each grad_B_i [N_i, r_i] in fp32; each is skipped if null
    void (*linear_nf4_lora_group_backward)(const LinearGroup& group, const void* const* grad_ys, const void* x,
                                           const void* s, void* grad_x, float* grad_A, float* const* grads_B);
    // bits [ceil(numel / 8)]: bit i is set if element i is kept
    void (*dropout_bits)(uint64_t seed, uint32_t threshold, int64_t numel, uint8_t* bits);
    // parameters and states in place
    void (*adamw_step)(const AdamWStep& step);
    // losses of the tokens over the logits of hidden [M, K], and their gradient
    void (*linear_cross_entropy)(const CrossEntropyProblem& p, const void* hidden, const CrossEntropyResults& results);
    // s = x + residual (if null, s is x and is not written), y, scale [rows] = 1 / rms of s's rows
    void (*rms_norm)(const RmsNorm& p, const void* x, const void* residual, float eps, void* s, void* y, float* scale);
    // s = x + residual of n elements each, rounded once; s may be x or residual
    void (*add_residual)(DType dtype, int64_t n, const void* x, const void* residual, void* s);
    // grad_x, with grad_s added unless null; grad_weight [columns] in fp32 unless null
    void (*rms_norm_backward)(const RmsNorm& p, const void* grad_y, const void* grad_s, const void* s,
                              const float* scale, void* grad_x, float* grad_weight);
    // q and k rotated
    void (*rope)(const Rope& p);
    // y = activation(gate) * up, n elements each
    void (*glu)(Activation activation, DType dtype, int64_t n, const void* gate, const void* up, void* y);
    void (*glu_backward)(Activation activation, DType dtype, int64_t n, const void* grad_y, const void* gate,
                         const void* up, void* grad_gate, void* grad_up);
    // attention of each query to its range of keys, and its gradients
    void (*attention)(const AttentionProblem& p, const AttentionOutputs& outputs);
    void (*attention_backward)(const AttentionProblem& p, const AttentionGradients& gradients);
};

const Kernels& cpu_kernels();

}  // namespace qlora
