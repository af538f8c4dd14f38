// Kernels for what the emulator promises about sm_90a: mbarriers, TMA copies and products of warpgroups.
#include <cstdint>

#include "qlora/launch.cuh"
#include "qlora/ptx_sm90.cuh"
#include "qlora/shared_memory.cuh"

namespace hopper {

using namespace qlora::ptx;

constexpr int kBoxBytes = 32 * 1024;
struct Box {
    alignas(1024) uint8_t bytes[kBoxBytes];
    uint64_t full;
};

// Copies one box to shared memory and the bytes from there to y, as they are; before the wait for them if `early`.
__global__ void __launch_bounds__(64)
    copy_kernel(const __grid_constant__ CUtensorMap map, uint8_t* y, int bytes, int row, int column, int early) {
    Box& box = qlora::dynamic_shared<Box>();
    if (threadIdx.x == 0) {
        barrier_init(&box.full, 1);
        barrier_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        barrier_arrive_expecting(&box.full, bytes);
        copy_tile(box.bytes, &map, column, row, &box.full);
    }
    __syncthreads();
    if (!early) barrier_wait(&box.full, 0);
    for (int i = threadIdx.x; i < bytes; i += 64) y[i] = box.bytes[i];
    __syncthreads();
    barrier_wait(&box.full, 0);
}

constexpr int kStages = 3, kDepth = 64, kThreads = 256;
template <int N>
struct Ring {
    alignas(1024) uint8_t tile[kStages][N * kDepth * 2];
    uint64_t full[kStages], empty[kStages];
};

// y = a b^T: a [128, K] and b [N, K] of T, y [128, N] fp32, K a multiple of 128. Two warpgroups, each 64 rows; tiles of
// b by TMA through a ring of stages; the products of a step are waited for in the next one.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    product_kernel(const __grid_constant__ CUtensorMap map, const T* __restrict__ a, float* __restrict__ y, int K) {
    Ring<N>& ring = qlora::dynamic_shared<Ring<N>>();
    const int thread = threadIdx.x, lane = thread % 32, row = thread / 32 * 16 + lane / 4, steps = K / kDepth;
    auto load = [&](int step) {
        const int stage = step % kStages;
        if (step >= kStages) barrier_wait(&ring.empty[stage], (step / kStages - 1) & 1);
        barrier_arrive_expecting(&ring.full[stage], sizeof ring.tile[stage]);
        copy_tile(ring.tile[stage], &map, step * kDepth, 0, &ring.full[stage]);
    };
    if (thread == 0) {
        for (int stage = 0; stage < kStages; stage++) {
            barrier_init(&ring.full[stage], 1);
            barrier_init(&ring.empty[stage], kThreads / 128);
        }
        barrier_fence();
        for (int step = 0; step < kStages - 1; step++) {
            if (step < steps) load(step);
        }
    }
    __syncthreads();
    float sum[N / 2] = {};
    auto multiply = [&](int step, uint32_t (&fragment)[4][4]) {
        for (int k = 0; k < 4; k++) {
            for (int i = 0; i < 4; i++) {
                const int column = step * kDepth + k * 16 + lane % 4 * 2 + i / 2 * 8;
                fragment[k][i] = *reinterpret_cast<const uint32_t*>(a + int64_t(row + i % 2 * 8) * K + column);
            }
        }
        barrier_wait(&ring.full[step % kStages], step / kStages & 1);
        const uint64_t tile = tile_descriptor(ring.tile[step % kStages]);
        wgmma_fence();
        for (int k = 0; k < 4; k++) wgmma_m64k16<T, N>(sum, fragment[k], tile + k * 2, step > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0 && thread % 128 == 0) barrier_arrive(&ring.empty[(step - 1) % kStages]);
        if (thread == 0 && step + kStages - 1 < steps) load(step + kStages - 1);
    };
    // Two sets of registers: those of the step before are still read.
    uint32_t fragment[2][4][4];
    for (int step = 0; step < steps; step += 2) {
        multiply(step, fragment[0]);
        multiply(step + 1, fragment[1]);
    }
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; i++) {
        y[(row + (i >> 1 & 1) * 8) * N + i / 4 * 8 + lane % 4 * 2 + (i & 1)] = sum[i];
    }
}

// The map of a matrix [rows, columns] in boxes [box_rows, box_columns]. Found as launchers find it: by the runtime.
CUresult make_map(CUtensorMap* map, const void* matrix, int type, int element_bytes, int64_t rows, int64_t columns,
                  int box_rows, int box_columns, int swizzle) {
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

template <typename T, int N>
cudaError_t launch(const void* a, const void* b, float* y, int K) {
    CUtensorMap map;
    const int type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    if (make_map(&map, b, type, 2, N, K, N, kDepth, CU_TENSOR_MAP_SWIZZLE_128B)) return cudaErrorInvalidValue;
    const auto kernel = product_kernel<T, N>;
    cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                         sizeof(Ring<N>));
    return qlora::launch({1, kThreads, sizeof(Ring<N>)}, kernel, map, static_cast<const T*>(a), y, K);
}

}  // namespace hopper

extern "C" {
int launch_copy(const void* x, int type, int element_bytes, int64_t rows, int64_t columns, int box_rows,
                int box_columns, int swizzle, int row, int column, int early, uint8_t* y) {
    CUtensorMap map;
    const CUresult refused =
        hopper::make_map(&map, x, type, element_bytes, rows, columns, box_rows, box_columns, swizzle);
    if (refused) return int(refused);
    return int(qlora::launch({1, 64, sizeof(hopper::Box)}, hopper::copy_kernel, map, y,
                             box_rows * box_columns * element_bytes, row, column, early));
}

// half: of fp16, else of bf16.
cudaError_t launch_product(int half, int N, const void* a, const void* b, float* y, int K) {
    if (half) return hopper::launch<__half, 64>(a, b, y, K);
    if (N == 64) return hopper::launch<__nv_bfloat16, 64>(a, b, y, K);
    if (N == 128) return hopper::launch<__nv_bfloat16, 128>(a, b, y, K);
    return hopper::launch<__nv_bfloat16, 256>(a, b, y, K);
}
}
