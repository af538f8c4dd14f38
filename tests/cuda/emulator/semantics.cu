// One small kernel for each thing the emulator promises about warps, barriers, asynchronous copies and atomics.
#include <cuda_fp16.h>

#include <cstdint>

#include "qlora/launch.cuh"
#include "qlora/ptx.cuh"
#include "qlora/shared_memory.cuh"

namespace semantics {

constexpr unsigned kAll = 0xFFFFFFFFu;

__global__ void warp_kernel(const int* x, int* y) {
    const int lane = threadIdx.x % 32, value = x[threadIdx.x];
    int* out = y + threadIdx.x * 8;
    out[0] = __shfl_sync(kAll, value, 5);
    out[1] = __shfl_xor_sync(kAll, value, 3);
    out[2] = __shfl_down_sync(kAll, value, 4);
    out[3] = __shfl_up_sync(kAll, value, 1);
    out[4] = int(__ballot_sync(kAll, value & 1));
    out[5] = lane < 16 ? __shfl_xor_sync(0x0000FFFFu, value, 8) : __shfl_xor_sync(0xFFFF0000u, value, 4);
    out[6] = __any_sync(kAll, value == 7);
    out[7] = __shfl_xor_sync(kAll, value, 2, 4);
}

__global__ void barrier_kernel(const int* x, int* y) {
    const int value = x[threadIdx.x];
    y[threadIdx.x * 3] = __syncthreads_or(value > 2);
    y[threadIdx.x * 3 + 1] = __syncthreads_and(value >= 0);
    y[threadIdx.x * 3 + 2] = __syncthreads_count(value & 1);
}

struct Words {
    uint32_t word[64];
};
// Shared memory as it is before anything is written, static and dynamic.
__global__ void poison_kernel(uint32_t* y) {
    y[threadIdx.x] = qlora::block_shared<Words>().word[threadIdx.x];
    y[64 + threadIdx.x] = qlora::dynamic_shared<Words>().word[threadIdx.x];
}

// Copies 64 words, the last `missing` of which are invalid and become zero; reads before the wait if `early`.
__global__ void copy_kernel(const uint32_t* x, uint32_t* y, int missing, int early) {
    Words& words = qlora::block_shared<Words>();
    const int i = threadIdx.x;
    qlora::ptx::cp_async<4>(&words.word[i], x + i, i < 64 - missing);
    qlora::ptx::cp_async_commit();
    if (!early) qlora::ptx::cp_async_wait<0>();
    y[i] = words.word[i];
    qlora::ptx::cp_async_wait<0>();
}

// d = a b on tensor cores: one warp, fp16 a [16, 16] and b [8, 16], both row-major.
__global__ void mma_kernel(const __half* a, const __half* b, float* d) {
    const int lane = threadIdx.x, row = lane / 4, pair = lane % 4 * 2;
    auto word = [&](const __half* matrix, int m, int k) {
        return *reinterpret_cast<const uint32_t*>(matrix + m * 16 + k);
    };
    const uint32_t words_a[4] = {word(a, row, pair), word(a, row + 8, pair), word(a, row, pair + 8),
                                 word(a, row + 8, pair + 8)};
    const uint32_t words_b[2] = {word(b, row, pair), word(b, row, pair + 8)};
    float sum[4] = {};
    qlora::ptx::mma_m16n8k16<__half>(sum, words_a, words_b);
    for (int i = 0; i < 4; i++) d[(row + i / 2 * 8) * 8 + pair + i % 2] = sum[i];
}

__global__ void atomic_kernel(int* sum, unsigned* largest) {
    atomicAdd(sum, int(threadIdx.x));
    atomicMax(largest, threadIdx.x * 7 % 61);
}

struct Banks {
    uint32_t word[32 * 33];
};
// Lane l reads word stride * l, and the 16 bytes from word 4 * wide_stride * l on.
__global__ void bank_kernel(uint32_t* y, int stride, int wide_stride) {
    const Banks& banks = qlora::block_shared<Banks>();
    const int lane = threadIdx.x;
    const uint4 wide = reinterpret_cast<const uint4*>(banks.word)[lane * wide_stride];
    y[lane] = banks.word[lane * stride] ^ wide.x ^ wide.y ^ wide.z ^ wide.w;
}

// Undefined on a GPU, by `which`: 0 a lane outside its mask, 1 a lane that never comes, 2 a read of an absent lane.
__global__ void misuse_kernel(int* y, int which) {
    const int lane = threadIdx.x;
    if (which == 0) y[lane] = __shfl_sync(0xFFFFu, lane, 0);
    if (which == 1 && lane != 7) y[lane] = __shfl_sync(kAll, lane, 0);
    if (which == 2 && lane < 16) y[lane] = __shfl_sync(0xFFFFu, lane, 20);
}

}  // namespace semantics

extern "C" {
cudaError_t launch_warp(const int* x, int* y) { return qlora::launch({1, 64}, semantics::warp_kernel, x, y); }
cudaError_t launch_barrier(const int* x, int* y) { return qlora::launch({1, 96}, semantics::barrier_kernel, x, y); }
cudaError_t launch_poison(uint32_t* y) {
    return qlora::launch({1, 64, sizeof(semantics::Words)}, semantics::poison_kernel, y);
}
cudaError_t launch_copy(const uint32_t* x, uint32_t* y, int missing, int early) {
    return qlora::launch({1, 64}, semantics::copy_kernel, x, y, missing, early);
}
cudaError_t launch_mma(const void* a, const void* b, float* d) {
    return qlora::launch({1, 32}, semantics::mma_kernel, static_cast<const __half*>(a), static_cast<const __half*>(b),
                         d);
}
cudaError_t launch_atomic(int* sum, unsigned* largest) {
    return qlora::launch({dim3(3, 2), dim3(16, 4)}, semantics::atomic_kernel, sum, largest);
}
cudaError_t launch_bank(uint32_t* y, int stride, int wide_stride) {
    return qlora::launch({1, 32}, semantics::bank_kernel, y, stride, wide_stride);
}
cudaError_t launch_misuse(int* y, int which) { return qlora::launch({1, 32}, semantics::misuse_kernel, y, which); }

// Launches that a driver refuses: 0 too many threads, 1 no threads, 2 too much shared memory.
cudaError_t launch_refused(int which) {
    const qlora::LaunchShape shapes[] = {{1, 2048}, {1, 0}, {1, 64, 512 * 1024}};
    return qlora::launch(shapes[which], semantics::atomic_kernel, nullptr, nullptr);
}

// A life of managed memory on a side stream, freed where any step fails.
cudaError_t use_managed_memory(int64_t bytes) {
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaError_t error = cudaMallocManaged(&memory, size_t(bytes), cudaMemAttachGlobal);
    const cudaMemLocation device{cudaMemLocationTypeDevice, 0};
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMemAdvise(memory, size_t(bytes), cudaMemAdviseSetPreferredLocation, device);
    if (error == cudaSuccess) error = cudaMemPrefetchAsync(memory, size_t(bytes), device, 0, stream);
    if (stream) cudaStreamDestroy(stream);
    cudaFree(memory);
    return error;
}
}
