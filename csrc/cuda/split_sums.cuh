// The end of a product y [M, gemm_n] of type T whose contraction may be split over grid.z: outputs are stored by
// eights, as the result or as a part, and a second kernel adds the parts in a fixed order.
//
// A Problem is a struct derived from LinearNF4GemmArgs with gemm_n beside it; `partial` is null where nothing is split.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launchers.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"

namespace qlora {

constexpr int kReduceThreads = 64;

// The bias of columns n to n + 7, zero past the end and in a part.
template <class Problem>
__device__ __forceinline__ void load_bias(float (&bias)[8], const Problem& p, int n) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        bias[i] = 0.0f;
        if (p.bias.data && !p.partial && n + i < p.gemm_n) bias[i] = load_any(p.bias, n + i);
    }
}

// Stores columns n to n + 7 of row m, those that exist, to y or to part blockIdx.z. n is a multiple of 8.
template <typename T, class Problem>
__device__ __forceinline__ void store_outputs(const Problem& p, int m, int n, const float (&value)[8]) {
    const int64_t offset = int64_t(m) * p.gemm_n + n;
    if (p.partial) {
        float* to = p.partial + int64_t(blockIdx.z) * p.M * p.gemm_n + offset;
        if (p.gemm_n % 8 == 0) {
            store8(to, value);
        } else {
            for (int i = 0; i < 8 && n + i < p.gemm_n; i++) to[i] = value[i];
        }
    } else {
        T* to = static_cast<T*>(p.y) + offset;
        if (p.gemm_n % 8 == 0) {
            store8(to, value);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (n + i < p.gemm_n) to[i] = round_to<T>(value[i]);
            }
        }
    }
}

// y = the sum of the parts, first to last, + bias. A thread has eight neighbouring columns of row blockIdx.x.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    linear_nf4_reduce_kernel(const float* __restrict__ partial, const int splits, const AnyFloat bias,
                             T* __restrict__ y, const int gemm_n) {
    const int64_t row = blockIdx.x, numel = int64_t(gridDim.x) * gemm_n;
    const int columns_of_grid = int(gridDim.y) * kReduceThreads * 8;
    const bool whole = gemm_n % 8 == 0;  // rows begin at 16-byte boundaries
    for (int64_t n = (blockIdx.y * kReduceThreads + threadIdx.x) * 8; n < gemm_n; n += columns_of_grid) {
        const int count = whole ? 8 : int(min(int64_t(8), gemm_n - n));
        float sum[8] = {};
        for (int part = 0; part < splits; part++) {
            const float* from = partial + part * numel + row * gemm_n + n;
            float value[8] = {};
            if (whole) {
                load8(value, from);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (i < count) value[i] = from[i];
                }
            }
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] += value[i];
        }
        if (bias.data) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i < count) sum[i] += load_any(bias, n + i);
            }
        }
        T* to = y + row * gemm_n + n;
        if (whole) {
            store8(to, sum);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i < count) to[i] = round_to<T>(sum[i]);
            }
        }
    }
}

template <typename T, class Problem>
cudaError_t launch_reduce(const Problem& problem, int splits, cudaStream_t stream) {
    constexpr int kMostGridRows = 65535;
    const int column_blocks = std::min(ceil_div(problem.gemm_n, kReduceThreads * 8), kMostGridRows);
    const dim3 grid(static_cast<unsigned>(problem.M), static_cast<unsigned>(column_blocks));
    return launch({grid, kReduceThreads, 0, stream}, linear_nf4_reduce_kernel<T>, problem.partial, splits, problem.bias,
                  static_cast<T*>(problem.y), problem.gemm_n);
}

}  // namespace qlora
