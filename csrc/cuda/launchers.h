// The launchers: one struct of arguments with raw device pointers, and a stream, in; cudaError_t out. They do not
// depend on torch, allocate nothing and do not synchronize. Empty problems return without a launch. T is the element
// type given by a struct's `dtype`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "qlora/nf4_weight.h"

namespace qlora {

// w[n, k] = code[q[i]] * absmax[i >> block_shift] with i = n * K + k, rounded once, for the N * K elements of `weight`.
struct DequantizeNF4Args {
    NF4Weight weight;
    void* w;             // T [N, K]
    int64_t row_stride;  // elements from one row of w to the next, at least K; not read where N is 1
    DType dtype;
};

// packed, absmax of w.
struct QuantizeNF4Args {
    const void* w;  // T [numel]
    DType dtype;
    int block_shift;
    int64_t numel;
    uint8_t* packed;       // u8 [ceil(numel / 2)]
    float* absmax;         // fp32 [n_blocks]
    double* partial_sums;  // [quantize_nf4_partial_sums], what each thread block sums of absmax; or null
};

// absmax_q, absmax_scale, absmax_offset of absmax. absmax_offset = sum of partial_sums / n_blocks, in a fixed order.
struct QuantizeAbsmaxArgs {
    const float* absmax;  // fp32 [n_blocks]
    int64_t n_blocks;
    const double* partial_sums;
    int64_t n_partial_sums;
    uint8_t* absmax_q;     // u8 [n_blocks]
    float* absmax_scale;   // fp32 [ceil(n_blocks / 256)]
    float* absmax_offset;  // fp32 [1]
};

// y = x w_hat^T + bias + scaling s lora_B^T for M <= 16. x and packed are 16-byte aligned, K % 32 == 0. Products and
// sums are in fp32.
struct LinearNF4SmallMArgs {
    const void* x;  // T [M, K]
    NF4Weight weight;
    AnyFloat bias;    // [N], or null
    const void* s;    // T [M, r], or null
    AnyFloat lora_B;  // [N, r], given with s
    void* y;          // T [M, N]
    DType dtype;
    int M, r;
    float scaling;
    int multiprocessors;  // of the device: how many warps share a row of w follows from it
};

// The same for M <= 64, all of x, s, lora_B and y in bf16, and a blocksize of 64. K % 256 == 0, r % 8 == 0; x, packed,
// absmax, s, lora_B and y are 16-byte aligned. Codes are rounded to bf16, and absmax multiplies fp32 sums
// (docs/format.md).
struct LinearNF4PairsArgs {
    const void* x;
    NF4Weight weight;
    AnyFloat bias;       // [N], or null
    const void* s;       // [M, r], or null
    const void* lora_B;  // [N, r], given with s
    void* y;
    int M, r;
    float scaling;
    int multiprocessors;  // of the device: how many warps share rows of w follows from it
};

// y [M, gemm_n] = x w_hat^T (transposed 0: x [M, K], gemm_n = N) or x w_hat (transposed 1: x is grad_y [M, N] and y is
// grad_x, gemm_n = K), on tensor cores, plus bias, plus scaling * lora_left lora_right^T. Forward has s and lora_B for
// the two factors, backward ds and lora_A^T. T is bf16 or fp16. K % 32 == 0, N % 8 == 0 where transposed, r % 8 == 0;
// x, packed, lora_left, lora_right and y are 16-byte aligned. w_hat is rounded to T, sums are fp32.
struct LinearNF4GemmArgs {
    const void* x;
    NF4Weight weight;
    AnyFloat bias;           // [gemm_n], or null
    const void* lora_left;   // T [M, r], or null
    const void* lora_right;  // T [gemm_n, r], given with lora_left
    void* y;                 // T [M, gemm_n]
    float* partial;          // fp32 [splits, M, gemm_n]; null for one split
    DType dtype;
    int M, r;
    float scaling;
    int splits;  // parts of the contraction, from linear_nf4_gemm_splits
    int transposed;
};

// s = scale * dropout(x) lora_A^T, where dropout(x) keeps or zeroes x[m, k] by the draw of element m * K + k, on tensor
// cores; and copy = x where copy is given. T is bf16 or fp16. K % 8 == 0, r <= 64; x, lora_A and copy are 16-byte
// aligned, and copy_stride % 8 == 0. Sums are fp32, s is rounded once.
struct LoraDownArgs {
    const void* x;        // T [M, K]
    const void* lora_A;   // T [r, K]
    const int64_t* seed;  // [1], in device memory, or null without dropout
    void* s;              // T [M, r]
    int64_t s_stride;     // elements from one row of s to the next
    void* copy;           // T [M, K], or null
    int64_t copy_stride;  // elements from one row of copy to the next
    DType dtype;
    int64_t M;
    int K, r;
    int threshold;  // elements with a draw below it are dropped
    float scale;
};

// y[i] = keep(i) ? x[i] * scale : 0; with add = 1 the value is added to y[i]. keep(i): the draw of
// qlora_kernels/ops/philox.py for (seed, i) is at least threshold. y must not be x.
struct DropoutArgs {
    const void* x;  // T [numel]
    void* y;        // T [numel]
    DType dtype;
    int threshold;
    float scale;
    int add;
    const int64_t* seed;  // [1], in device memory
    int64_t numel;
};

// Hyperparameters of a step; lr counts where the learning rate is not in device memory.
struct AdamWScalars {
    double beta1, beta2, eps, weight_decay, lr;
};

// One step of qlora_kernels/ops/adamw_step.py. All pointers are to device memory. A segment that lies outside its
// parameter or outside the arena is skipped.
struct AdamWArgs {
    const void* tensors;  // int64 [n_params, 4]: param, grad or 0, DType, numel
    int64_t n_params;
    const int64_t* segments;  // [n_segments, 8]
    int64_t n_segments;
    const float* steps;  // [n_params]
    uint8_t* arena;
    int64_t arena_bytes;
    AnyFloat lr;                   // one element, or null
    const double* double_lr;       // one element where lr is a double, or null
    const int64_t* seed;           // [1], or null
    const float* grad_multiplier;  // [1], or null
    const float* found_inf;        // [1], or null
    AdamWScalars scalars;
    int64_t largest_segment;  // elements, a bound that sizes the grid
};

}  // namespace qlora

extern "C" {

cudaError_t launch_dequantize_nf4(const qlora::DequantizeNF4Args* args, cudaStream_t stream);

// Blocks that launch_quantize_nf4 and launch_sum_absmax use, and so the number of partial sums that each writes.
int64_t quantize_nf4_partial_sums(int64_t numel, int block_shift);
int64_t sum_absmax_partial_sums(int64_t n_blocks);

cudaError_t launch_quantize_nf4(const qlora::QuantizeNF4Args* args, cudaStream_t stream);
cudaError_t launch_sum_absmax(const float* absmax, double* partial_sums, int64_t n_blocks, cudaStream_t stream);
cudaError_t launch_quantize_absmax(const qlora::QuantizeAbsmaxArgs* args, cudaStream_t stream);

int linear_nf4_small_m_warps_per_row(int M, int64_t N, int64_t K, int multiprocessors);
cudaError_t launch_linear_nf4_small_m(const qlora::LinearNF4SmallMArgs* args, cudaStream_t stream);
int linear_nf4_pairs_tile(int M);
int linear_nf4_pairs_warps_per_row(int64_t N, int64_t K, int multiprocessors);
cudaError_t launch_linear_nf4_pairs(const qlora::LinearNF4PairsArgs* args, cudaStream_t stream);
int linear_nf4_gemm_splits(int M, int gemm_n, int gemm_k, int multiprocessors);
cudaError_t launch_linear_nf4_gemm(const qlora::LinearNF4GemmArgs* args, cudaStream_t stream);
// For sm_90a alone; cudaErrorNoKernelImageForDevice in a library without it. The arguments are those of
// linear_nf4_gemm, with K % 64 == 0 and a blocksize of at least 64.
int linear_nf4_wgmma_splits(int M, int N, int K, int multiprocessors);
cudaError_t launch_linear_nf4_wgmma(const qlora::LinearNF4GemmArgs* args, cudaStream_t stream);
cudaError_t launch_lora_down(const qlora::LoraDownArgs* args, cudaStream_t stream);
cudaError_t launch_dropout(const qlora::DropoutArgs* args, cudaStream_t stream);
cudaError_t launch_adamw_step(const qlora::AdamWArgs* args, cudaStream_t stream);

// Unified memory. allocate: zeroed on `stream`, *memory null where it fails. prefetch: bytes [start, stop) to `device`.
cudaError_t managed_concurrent_access(int device, int* supported);
cudaError_t managed_allocate(void** memory, int64_t bytes, cudaStream_t stream);
cudaError_t managed_prefer_device(void* memory, int64_t bytes, int device);
cudaError_t managed_prefetch(void* memory, int64_t start, int64_t stop, int device, cudaStream_t stream);
cudaError_t managed_free(void* memory);
}
