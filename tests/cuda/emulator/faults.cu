// Kernels with one planted fault each, FAULT = 1..8; 0 is right. The emulator must catch every one of them.
//   1 shared array written past its end          5 no barrier between pipeline steps
//   2 no barrier after filling a table           6 A's ldmatrix pattern used for B
//   3 cp.async.wait_group off by one             7 barrier in divergent code
//   4 global access one element past the end     8 pipeline stage refilled before the barrier
#include <cuda_bf16.h>

#include <cstdint>

#include "qlora/launch.cuh"
#include "qlora/ptx.cuh"
#include "qlora/shared_memory.cuh"

namespace faults {

using qlora::ptx::cp_async;

// y[i] = table[x[i]], x in 0..15, four elements a thread.
template <int FAULT>
__global__ void __launch_bounds__(64)
    lookup_kernel(const uint8_t* __restrict__ x, const float* __restrict__ table, float* __restrict__ y, int64_t n) {
    __shared__ float table_sh[16];
    const int entries = FAULT == 1 ? 17 : 16;
    if (int(threadIdx.x) < entries) table_sh[threadIdx.x] = table[threadIdx.x & 15];
    if constexpr (FAULT != 2) __syncthreads();
    const int64_t i = (int64_t(blockIdx.x) * 64 + threadIdx.x) * 4;
    if (FAULT == 4 ? i > n : i >= n) return;
    const uchar4 indices = *reinterpret_cast<const uchar4*>(x + i);
    *reinterpret_cast<float4*>(y + i) =
        make_float4(table_sh[indices.x], table_sh[indices.y], table_sh[indices.z], table_sh[indices.w]);
}

constexpr int kTile = 32, kStages = 3, kRow = kTile + 8;  // 8 elements of padding: conflict-free ldmatrix rows
struct Stage {
    __nv_bfloat16 a[kTile][kRow], b[kTile][kRow];
};
struct Pipeline {
    Stage stage[kStages];
};

// c = a b^T, a [32, K], b [32, K] bf16, c [32, 32] fp32; one block of four warps, each a 16x16 quarter.
template <int FAULT>
__global__ void __launch_bounds__(128)
    matmul_kernel(const __nv_bfloat16* __restrict__ a, const __nv_bfloat16* __restrict__ b, float* __restrict__ c,
                  int K) {
    Pipeline& pipeline = qlora::dynamic_shared<Pipeline>();
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int m0 = warp % 2 * 16, n0 = warp / 2 * 16, steps = K / kTile;
    auto load = [&](int step) {
        Stage& to = pipeline.stage[step % kStages];
        const int row = thread / 4, column = thread % 4 * 8;
        cp_async<16>(&to.a[row][column], a + int64_t(row) * K + step * kTile + column, true);
        cp_async<16>(&to.b[row][column], b + int64_t(row) * K + step * kTile + column, true);
    };
    float sum[2][4] = {};
    for (int step = 0; step < kStages - 1; step++) {
        if (step < steps) load(step);
        qlora::ptx::cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        qlora::ptx::cp_async_wait<FAULT == 3 ? kStages - 1 : kStages - 2>();
        if constexpr (FAULT == 8) {
            if (step + kStages - 1 < steps) load(step + kStages - 1);
        }
        if constexpr (FAULT != 5) __syncthreads();
        if constexpr (FAULT != 8) {
            if (step + kStages - 1 < steps) load(step + kStages - 1);
        }
        qlora::ptx::cp_async_commit();
        const Stage& from = pipeline.stage[step % kStages];
        for (int k = 0; k < kTile; k += 16) {
            uint32_t words_a[4], words_b[4];
            qlora::ptx::ldmatrix_x4(words_a, &from.a[m0 + lane % 16][k + lane / 16 * 8]);
            if constexpr (FAULT == 6) {
                qlora::ptx::ldmatrix_x4(words_b, &from.b[n0 + lane % 16][k + lane / 16 * 8]);
            } else {
                qlora::ptx::ldmatrix_x4(words_b, &from.b[n0 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
            }
            for (int j = 0; j < 2; j++) {
                const uint32_t fragment[2] = {words_b[j * 2], words_b[j * 2 + 1]};
                qlora::ptx::mma_m16n8k16<__nv_bfloat16>(sum[j], words_a, fragment);
            }
        }
        if constexpr (FAULT == 7) {
            if (m0 == 0) __syncthreads();
        }
    }
    for (int j = 0; j < 2; j++) {
        for (int i = 0; i < 4; i++) {
            c[(m0 + lane / 4 + i / 2 * 8) * kTile + n0 + j * 8 + lane % 4 * 2 + i % 2] = sum[j][i];
        }
    }
}

using LookupKernel = void (*)(const uint8_t*, const float*, float*, int64_t);
using MatmulKernel = void (*)(const __nv_bfloat16*, const __nv_bfloat16*, float*, int);

// Indexed by the fault. A fault is in one of the two kernels; the other one is right.
const LookupKernel kLookup[] = {lookup_kernel<0>, lookup_kernel<1>, lookup_kernel<2>,
                                lookup_kernel<0>, lookup_kernel<4>, lookup_kernel<0>,
                                lookup_kernel<0>, lookup_kernel<0>, lookup_kernel<0>};
const MatmulKernel kMatmul[] = {matmul_kernel<0>, matmul_kernel<0>, matmul_kernel<0>,
                                matmul_kernel<3>, matmul_kernel<0>, matmul_kernel<5>,
                                matmul_kernel<6>, matmul_kernel<7>, matmul_kernel<8>};

}  // namespace faults

extern "C" cudaError_t launch_lookup(int fault, const uint8_t* x, const float* table, float* y, int64_t n,
                                     cudaStream_t stream) {
    const dim3 grid(unsigned(qlora::ceil_div<int64_t>(n, 256)));
    return qlora::launch({grid, dim3(64), 0, stream}, faults::kLookup[fault], x, table, y, n);
}

extern "C" cudaError_t launch_matmul(int fault, const void* a, const void* b, float* c, int K, cudaStream_t stream) {
    return qlora::launch({dim3(1), dim3(128), sizeof(faults::Pipeline), stream}, faults::kMatmul[fault],
                         static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), c, K);
}
