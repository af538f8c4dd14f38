// A product of two warpgroups over a ring of tiles that TMA fills, right or with one fault; and its tensor map.
#pragma once

#include <cstdint>
#include <type_traits>

#include "qlora/launch.cuh"
#include "qlora/ptx_sm90.cuh"
#include "qlora/shared_memory.cuh"

namespace hopper {

using namespace qlora::ptx;

// Faults of product_kernel, and of its tensor map.
enum Fault {
    kRight,
    kNoFullWait,         // 1 a tile is multiplied without a wait for its full barrier
    kWrongParity,        // 2 ... after a wait for the other parity
    kTooManyBytes,       // 3 more bytes are expected than a tile has
    kTooFewBytes,        // 4 fewer
    kNoEmptyWait,        // 5 a stage is refilled without a wait for its empty barrier
    kEarlyArrival,       // 6 a stage is given back before wgmma_wait
    kTooManyArrivals,    // 7 every thread gives the stage back
    kNoInitFence,        // 8 no barrier_fence
    kNoInitBarrier,      // 9 no __syncthreads after the initialization of the barriers
    kNoRegisterFence,    // 10 no wgmma_fence
    kNoCommit,           // 11 the last groups are not committed
    kNoLastWait,         // 12 sums are read before wgmma_wait
    kSumsWritten,        // 13 sums are written before wgmma_wait
    kOneSetOfRegisters,  // 14 the registers of a are written while they are read
    kNoSwizzle,          // 15 the map has no swizzle, the descriptor has one
    kMisplacedTile,      // 16 the tile begins at a multiple of 128 bytes, not of 1024
    kBoxWidth,           // 17 the rows of the box are no multiple of 16 bytes
    kFaults
};

constexpr int kStages = 3, kDepth = 64, kThreads = 256;
template <int N>
struct Ring {
    alignas(1024) uint8_t tile[kStages][N * kDepth * 2 + 1024];
    uint64_t full[kStages], empty[kStages];
};

// Stores the sums of a thread, whose first row is `row`.
template <int sums>
__device__ void store(const float (&sum)[sums], float* y, int row, int lane) {
    for (int i = 0; i < sums; i++) {
        y[(row + (i >> 1 & 1) * 8) * sums * 2 + i / 4 * 8 + lane % 4 * 2 + (i & 1)] = sum[i];
    }
}

// y = a b^T: a [128, K] and b [N, K] of T, y [128, N] fp32, K a multiple of 128. Two warpgroups, each 64 rows; tiles of
// b by TMA through a ring of stages; the products of a step are waited for in the next one.
template <typename T, int N, int FAULT = kRight>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const __grid_constant__ CUtensorMap map, const T* __restrict__ a, float* __restrict__ y, int K) {
    Ring<N>& ring = qlora::dynamic_shared<Ring<N>>();
    const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, steps = K / kDepth;
    constexpr int bytes = N * kDepth * 2,
                  expected = bytes + (FAULT == kTooManyBytes) * 64 - (FAULT == kTooFewBytes) * 64;
    auto tile = [&](int step) { return ring.tile[step % kStages] + (FAULT == kMisplacedTile) * 128; };
    auto load = [&](int step) {
        const int stage = step % kStages;
        if (step >= kStages && FAULT != kNoEmptyWait) barrier_wait(&ring.empty[stage], (step / kStages - 1) & 1);
        barrier_arrive_expecting(&ring.full[stage], expected);
        copy_tile(tile(step), &map, step * kDepth, 0, &ring.full[stage]);
    };
    if (thread == 0) {
        for (int stage = 0; stage < kStages; stage++) {
            barrier_init(&ring.full[stage], 1);
            barrier_init(&ring.empty[stage], kThreads / 128);
        }
        if (FAULT != kNoInitFence) barrier_fence();
        for (int step = 0; step < kStages - 1; step++) {
            if (step < steps) load(step);
        }
    }
    if (FAULT != kNoInitBarrier) __syncthreads();
    auto give_back = [&](int step) {
        if (FAULT == kTooManyArrivals || thread % 128 == 0) barrier_arrive(&ring.empty[step % kStages]);
    };
    float sum[N / 2] = {};
    auto multiply = [&](int step, uint32_t (&fragment)[4][4]) {
        for (int k = 0; k < 4; k++) {
            for (int i = 0; i < 4; i++) {
                const int column = step * kDepth + k * 16 + lane % 4 * 2 + i / 2 * 8;
                fragment[k][i] = *reinterpret_cast<const uint32_t*>(a + int64_t(row + i % 2 * 8) * K + column);
            }
        }
        const int parity = (step / kStages + (FAULT == kWrongParity)) & 1;
        if (FAULT != kNoFullWait) barrier_wait(&ring.full[step % kStages], parity);
        const uint64_t b = tile_descriptor(tile(step));
        if (FAULT != kNoRegisterFence) wgmma_fence();
        for (int k = 0; k < 4; k++) wgmma_m64k16<T, N>(sum, fragment[k], b + k * 2, step > 0 || k > 0);
        if (FAULT != kNoCommit || step + 2 < steps) wgmma_commit();
        if (FAULT == kSumsWritten) sum[5] *= 2.0f;
        if (FAULT == kEarlyArrival) give_back(step);
        wgmma_wait<1>();
        if (FAULT != kEarlyArrival && step > 0) give_back(step - 1);
        if (thread == 0 && step + kStages - 1 < steps) load(step + kStages - 1);
    };
    if constexpr (FAULT == kOneSetOfRegisters) {
        uint32_t fragment[4][4];
#pragma unroll 1
        for (int step = 0; step < steps; step++) multiply(step, fragment);
    } else {
        uint32_t fragment[2][4][4];  // those of the step before are still read
#pragma unroll 1
        for (int step = 0; step < steps; step += 2) {
            multiply(step, fragment[0]);
            multiply(step + 1, fragment[1]);
        }
    }
    if (FAULT != kNoLastWait) wgmma_wait<0>();
    store(sum, y, row, lane);
}

// The map of a matrix [rows, columns] in boxes [box_rows, box_columns]. Found as launchers find it: by the runtime.
inline CUresult make_map(CUtensorMap* map, const void* matrix, int type, int element_bytes, int64_t rows,
                         int64_t columns, int box_rows, int box_columns, int swizzle) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return CUDA_ERROR_NOT_FOUND;
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)},
                     strides[] = {cuuint64_t(columns * element_bytes)};
    const cuuint32_t box[] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[] = {1, 1};
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
        map, CUtensorMapDataType(type), 2, const_cast<void*>(matrix), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CUtensorMapSwizzle(swizzle), CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <typename T, int N, int FAULT = kRight>
cudaError_t launch_product(const void* a, const void* b, float* y, int K) {
    CUtensorMap map;
    const int type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const int swizzle = FAULT == kNoSwizzle ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B;
    const int width = kDepth - (FAULT == kBoxWidth) * 4;
    if (make_map(&map, b, type, 2, N, K, N, width, swizzle)) return cudaErrorInvalidValue;
    const auto kernel = product_kernel<T, N, FAULT>;
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                         sizeof(Ring<N>));
    return qlora::launch({1, kThreads, sizeof(Ring<N>)}, kernel, map, static_cast<const T*>(a), y, K);
}

}  // namespace hopper
