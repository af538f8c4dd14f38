// The launchers: raw device pointers and a stream in, cudaError_t out. They know nothing of torch, allocate nothing and
// do not synchronize. Types of elements are qlora::FloatType; empty problems are served without a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

extern "C" {

// w[i] = code[q[i]] * absmax[i >> block_shift], rounded once. absmax, or the other three, are given; the rest is null.
cudaError_t launch_dequantize_nf4(const uint8_t* packed, const float* absmax, const uint8_t* absmax_q,
                                  const float* absmax_scale, const float* absmax_offset, int block_shift, void* w,
                                  int w_type, int64_t numel, cudaStream_t stream);

// Blocks that launch_quantize_nf4 and launch_sum_absmax use, and so the number of partial sums that each writes.
int64_t quantize_nf4_partial_sums(int64_t numel, int block_shift);
int64_t sum_absmax_partial_sums(int64_t n_blocks);

// packed, absmax of w. partial_sums: double [quantize_nf4_partial_sums], what each block sums of absmax, or null.
cudaError_t launch_quantize_nf4(const void* w, int w_type, uint8_t* packed, float* absmax, double* partial_sums,
                                int64_t numel, int block_shift, cudaStream_t stream);
cudaError_t launch_sum_absmax(const float* absmax, double* partial_sums, int64_t n_blocks, cudaStream_t stream);

// The second level. absmax_offset = sum of partial_sums / n_blocks, summed in a fixed order.
cudaError_t launch_quantize_absmax(const float* absmax, const double* partial_sums, int64_t n_partial_sums,
                                   uint8_t* absmax_q, float* absmax_scale, float* absmax_offset, int64_t n_blocks,
                                   cudaStream_t stream);

// y = x w_hat^T + bias + scaling s lora_B^T for M <= 16, any float type. x T [M, K] and packed 16-byte aligned,
// K % 32 == 0. bias [N] or null; s T [M, r] with lora_B [N, r], or null. Products and sums in fp32.
cudaError_t launch_linear_nf4_small_m(const void* x, int x_type, const uint8_t* packed, const float* absmax,
                                      const uint8_t* absmax_q, const float* absmax_scale, const float* absmax_offset,
                                      int block_shift, const void* bias, int bias_type, const void* s,
                                      const void* lora_B, int lora_type, int r, float scaling, void* y, int M, int N,
                                      int K, cudaStream_t stream);

// y [M, out] = x w_hat^T (transposed 0: x [M, K], out = N) or x w_hat (transposed 1: x [M, N], out = K), on tensor
// cores, plus bias [out] or null, plus scaling * down up^T with down T [M, r] and up T [out, r], or null. T is bf16 or
// fp16. K % 32 == 0, N % 8 == 0, r % 8 == 0; x, packed, down, up and y 16-byte aligned. w_hat is rounded to T, sums are
// fp32. splits: parts of the contraction, from linear_nf4_gemm_splits; above 1 partial is fp32 [splits, M, out].
int linear_nf4_gemm_splits(int M, int out, int depth, int multiprocessors);
cudaError_t launch_linear_nf4_gemm(const void* x, int x_type, const uint8_t* packed, const float* absmax,
                                   const uint8_t* absmax_q, const float* absmax_scale, const float* absmax_offset,
                                   int block_shift, const void* bias, int bias_type, const void* down, const void* up,
                                   int r, float scaling, void* y, float* partial, int splits, int transposed, int M,
                                   int N, int K, cudaStream_t stream);

// y[i] = keep(i) ? x[i] * scale : 0, or y[i] += that where add is 1. x and y T [numel], seed int64 [1] in device
// memory; keep(i): the draw of qlora_kernels/ops/_philox.py for (seed, i) is at least threshold. y may not be x.
cudaError_t launch_dropout(const void* x, int type, const int64_t* seed, int threshold, float scale, int add, void* y,
                           int64_t numel, cudaStream_t stream);

// Hyperparameters of a step; lr counts where the learning rate is not in device memory.
struct AdamWScalars {
    double beta1, beta2, eps, weight_decay, lr;
};

// One step of qlora_kernels/ops/adamw_step.py. In device memory: tensors int64 [n_params, 4] (param, grad or 0, type,
// numel), segments int64 [n_segments, 8], steps fp32 [n_params], arena, lr (one element of lr_type, 3 being double) or
// null, seed, grad_multiplier, found_inf or null. scalars: in host memory. largest_segment: elements, a bound that
// sizes the grid. A segment that lies outside its parameter or outside the arena is skipped.
cudaError_t launch_adamw_step(const void* tensors, int64_t n_params, const int64_t* segments, int64_t n_segments,
                              const float* steps, uint8_t* arena, int64_t arena_bytes, const void* lr, int lr_type,
                              const int64_t* seed, const float* grad_multiplier, const float* found_inf,
                              const AdamWScalars* scalars, int64_t largest_segment, cudaStream_t stream);

// Unified memory. allocate: zeroed on `stream`, *memory null where it fails. prefetch: bytes [start, stop) to `device`.
cudaError_t managed_concurrent_access(int device, int* supported);
cudaError_t managed_allocate(void** memory, int64_t bytes, cudaStream_t stream);
cudaError_t managed_prefer_device(void* memory, int64_t bytes, int device);
cudaError_t managed_prefetch(void* memory, int64_t start, int64_t stop, int device, cudaStream_t stream);
cudaError_t managed_free(void* memory);
}
