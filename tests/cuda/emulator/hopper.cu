// Kernels for what the emulator promises about sm_90a: mbarriers, TMA copies and products of warpgroups.
#include <cstdint>

#include "hopper_product.cuh"
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

// y = a b^T: a [64, 16] and b [64, 16] bf16, y [64, 64] fp32. The tile of b is written by ordinary stores, in rows of
// 128 bytes, of which the first 32 are used; without the fence if `unfenced`. One warpgroup.
__global__ void __launch_bounds__(128) stored_kernel(const uint32_t* a, const uint4* b, float* y, int unfenced) {
    Box& box = qlora::dynamic_shared<Box>();
    const int thread = threadIdx.x, row = thread / 2, piece = thread % 2, lane = thread % 32;
    *reinterpret_cast<uint4*>(box.bytes + row * 128 + (piece ^ row % 8) * 16) = b[row * 2 + piece];
    if (!unfenced) proxy_fence();
    __syncthreads();
    uint32_t fragment[4];
    const int first = thread / 32 * 16 + lane / 4;
    for (int i = 0; i < 4; i++) fragment[i] = a[(first + i % 2 * 8) * 8 + lane % 4 + i / 2 * 4];
    float sum[32];
    wgmma_fence();
    wgmma_m64k16<__nv_bfloat16, 64>(sum, fragment, tile_descriptor(box.bytes), false);
    wgmma_commit();
    wgmma_wait<0>();
    store(sum, y, first, lane);
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
    if (half) return hopper::launch_product<__half, 64>(a, b, y, K);
    if (N == 64) return hopper::launch_product<__nv_bfloat16, 64>(a, b, y, K);
    if (N == 128) return hopper::launch_product<__nv_bfloat16, 128>(a, b, y, K);
    return hopper::launch_product<__nv_bfloat16, 256>(a, b, y, K);
}

cudaError_t launch_stored(const void* a, const void* b, float* y, int unfenced) {
    return qlora::launch({1, 128, sizeof(hopper::Box)}, hopper::stored_kernel, static_cast<const uint32_t*>(a),
                         static_cast<const uint4*>(b), y, unfenced);
}
}
