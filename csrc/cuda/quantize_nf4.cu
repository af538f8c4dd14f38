// Quantization to NF4 and of the constants themselves, byte-identical to format/reference.py.
//
// A thread holds 8 weights (one 16-byte load of bf16); blocksize / 8 neighbouring threads share an absmax, found by
// shuffles within a warp and through shared memory beyond. The index of a weight takes 4 steps of a binary search over
// the 15 boundaries in shared memory, 16 banks wide and so free of conflicts; eight indices leave as one 32-bit store.
//
// Both levels take two launches: the first also sums its absmax into one double per block, and every block of the
// second adds those (at most 1024) in the same fixed order, so the mean needs neither atomics nor a launch of its own.
#include "launchers.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4.cuh"
#include "qlora/shared_memory.cuh"

namespace qlora {

constexpr unsigned kFullMask = 0xFFFFFFFFu;
constexpr int kQuantizeThreads = 256;
constexpr int kLargestBlockThreads = 512;  // 4096 weights, the largest blocksize
constexpr int64_t kMaxPartialSums = 1024;  // blocks of a grid-stride launch: enough to fill 128 multiprocessors

struct QuantizeShared {
    float boundary[16];
    uint32_t warp_max[kLargestBlockThreads / 32];
    double warp_sum[kLargestBlockThreads / 32];
};

// The largest of the bits of `threads` neighbours, a power of two. As unsigned integers the absolute values of floats
// keep their order, and inf and NaN are larger than all numbers, so a block that holds one shows it.
__device__ __forceinline__ uint32_t block_max(uint32_t bits, int threads, uint32_t* warp_max) {
    for (int distance = min(threads, 32) / 2; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(kFullMask, bits, distance));
    }
    if (threads <= 32) return bits;
    const int warp = threadIdx.x / 32, first = warp / (threads / 32) * (threads / 32);
    __syncthreads();  // warp_max is free again
    if (threadIdx.x % 32 == 0) warp_max[warp] = bits;
    __syncthreads();
    for (int i = 0; i < threads / 32; i++) bits = max(bits, warp_max[first + i]);
    return bits;
}

// The sum over the thread block, in an order that depends on its size alone. Every thread receives it.
__device__ __forceinline__ double block_sum(double value, double* warp_sum) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kFullMask, value, distance);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0;
    for (int i = 0; i < int(blockDim.x) / 32; i++) sum += warp_sum[i];
    return sum;
}

__device__ __forceinline__ float reciprocal_or_zero(float absmax) { return absmax > 0 ? __frcp_rn(absmax) : 0.0f; }

template <typename T>
__global__ void __launch_bounds__(kLargestBlockThreads)
    quantize_nf4_kernel(const T* __restrict__ w, uint8_t* __restrict__ packed, float* __restrict__ absmax,
                        double* __restrict__ partial_sums, const int64_t numel, const int block_shift,
                        const bool vectorized) {
    QuantizeShared& shared = block_shared<QuantizeShared>();
    const int thread = threadIdx.x;
    if (thread < 16) {
        static const float boundaries[16] = {QLORA_NF4_BOUNDARIES, 2.0f};  // the last is never read
        shared.boundary[thread] = boundaries[thread];
    }
    __syncthreads();
    const int threads = 1 << block_shift >> 3;  // that share an absmax
    const int64_t tile = int64_t(blockDim.x) * 8;
    double sum = 0;
    for (int64_t start = int64_t(blockIdx.x) * tile; start < numel; start += int64_t(gridDim.x) * tile) {
        const int64_t mine = start + thread * 8;
        const int count = static_cast<int>(max(int64_t(0), min(int64_t(8), numel - mine)));
        float value[8];
        if (vectorized && count == 8) {
            load8(value, w + mine);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) value[i] = i < count ? to_float(w[mine + i]) : 0.0f;
        }
        uint32_t largest = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) largest = max(largest, __float_as_uint(value[i]) & 0x7FFFFFFFu);
        float scale = __uint_as_float(block_max(largest, threads, shared.warp_max));
        if (scale < kSmallestAbsmax) scale = 0.0f;
        if (thread % threads == 0 && count > 0) {
            absmax[mine >> block_shift] = scale;
            sum += scale;
        }
        const float inverse = reciprocal_or_zero(scale);
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // How many boundaries lie strictly below; the missing half of an odd tail is 0 * inverse, kZeroIndex.
            const float normalized = __fmul_rn(value[i], inverse);
            int q = 0;
#pragma unroll
            for (int step = 8; step > 0; step /= 2) q += normalized > shared.boundary[q + step - 1] ? step : 0;
            word |= uint32_t(q) << (i / 2 * 8 + (i % 2 ? 0 : 4));
        }
        if (vectorized && count == 8) {
            *reinterpret_cast<uint32_t*>(packed + mine / 2) = word;
        } else {
            for (int i = 0; i < (count + 1) / 2; i++) packed[mine / 2 + i] = static_cast<uint8_t>(word >> (8 * i));
        }
    }
    if (partial_sums) {
        sum = block_sum(sum, shared.warp_sum);
        if (thread == 0) partial_sums[blockIdx.x] = sum;
    }
}

__global__ void __launch_bounds__(kQuantizeThreads)
    sum_absmax_kernel(const float* __restrict__ absmax, double* __restrict__ partial_sums, const int64_t n_blocks) {
    QuantizeShared& shared = block_shared<QuantizeShared>();
    double sum = 0;
    const int64_t stride = int64_t(gridDim.x) * kQuantizeThreads;
    for (int64_t i = int64_t(blockIdx.x) * kQuantizeThreads + threadIdx.x; i < n_blocks; i += stride) sum += absmax[i];
    sum = block_sum(sum, shared.warp_sum);
    if (threadIdx.x == 0) partial_sums[blockIdx.x] = sum;
}

struct QuantizeAbsmaxShared {
    float boundary[256];
    uint32_t warp_max[kNestedBlocksize / 32];
    double warp_sum[kNestedBlocksize / 32];
};

// One thread block for each 256 constants.
__global__ void __launch_bounds__(kNestedBlocksize)
    quantize_absmax_kernel(const float* __restrict__ absmax, const double* __restrict__ partial_sums,
                           const int n_partial_sums, uint8_t* __restrict__ absmax_q, float* __restrict__ absmax_scale,
                           float* __restrict__ absmax_offset, const int64_t n_blocks) {
    QuantizeAbsmaxShared& shared = block_shared<QuantizeAbsmaxShared>();
    const int thread = threadIdx.x;
    static const float boundaries[256] = {QLORA_ABSMAX_BOUNDARIES, 2.0f};  // the last is never read
    shared.boundary[thread] = boundaries[thread];
    double sum = 0;
    for (int i = thread; i < n_partial_sums; i += kNestedBlocksize) sum += partial_sums[i];
    sum = block_sum(sum, shared.warp_sum);
    const float offset = static_cast<float>(sum / static_cast<double>(n_blocks));
    if (blockIdx.x == 0 && thread == 0) *absmax_offset = offset;

    const int64_t index = int64_t(blockIdx.x) * kNestedBlocksize + thread;
    const float centred = index < n_blocks ? __fsub_rn(absmax[index], offset) : 0.0f;
    const uint32_t bits = __float_as_uint(centred) & 0x7FFFFFFFu;
    float scale = __uint_as_float(block_max(bits, kNestedBlocksize, shared.warp_max));
    if (scale < kSmallestAbsmax) scale = 0.0f;
    if (thread == 0) absmax_scale[blockIdx.x] = scale;
    const float normalized = __fmul_rn(centred, reciprocal_or_zero(scale));
    int q = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2) q += normalized > shared.boundary[q + step - 1] ? step : 0;
    if (index < n_blocks) absmax_q[index] = static_cast<uint8_t>(q);
}

namespace {

int quantize_threads(int block_shift) {
    const int threads = 1 << block_shift >> 3;
    return threads > kQuantizeThreads ? threads : kQuantizeThreads;
}

int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }

template <typename T>
cudaError_t launch_quantize(const QuantizeNF4Args& args, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(quantize_nf4_partial_sums(args.numel, args.block_shift)));
    const bool vectorized = is_aligned(args.w, 16) && is_aligned(args.packed, 4);
    return launch({grid, static_cast<unsigned>(quantize_threads(args.block_shift)), 0, stream}, quantize_nf4_kernel<T>,
                  static_cast<const T*>(args.w), args.packed, args.absmax, args.partial_sums, args.numel,
                  args.block_shift, vectorized);
}

}  // namespace
}  // namespace qlora

int64_t quantize_nf4_partial_sums(int64_t numel, int block_shift) {
    using namespace qlora;
    return at_most(ceil_div<int64_t>(numel, int64_t(quantize_threads(block_shift)) * 8), kMaxPartialSums);
}

int64_t sum_absmax_partial_sums(int64_t n_blocks) {
    using namespace qlora;
    return at_most(ceil_div<int64_t>(n_blocks, kQuantizeThreads), kMaxPartialSums);
}

cudaError_t launch_quantize_nf4(const qlora::QuantizeNF4Args* args, cudaStream_t stream) {
    using namespace qlora;
    if (args->numel == 0) return cudaSuccess;
    return with_float_type(args->dtype, [&]<class T>(T*) { return launch_quantize<T>(*args, stream); });
}

cudaError_t launch_sum_absmax(const float* absmax, double* partial_sums, int64_t n_blocks, cudaStream_t stream) {
    using namespace qlora;
    if (n_blocks == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>(sum_absmax_partial_sums(n_blocks)));
    return launch({grid, kQuantizeThreads, 0, stream}, sum_absmax_kernel, absmax, partial_sums, n_blocks);
}

cudaError_t launch_quantize_absmax(const qlora::QuantizeAbsmaxArgs* args, cudaStream_t stream) {
    using namespace qlora;
    if (args->n_blocks == 0) return cudaMemsetAsync(args->absmax_offset, 0, sizeof(float), stream);
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(args->n_blocks, kNestedBlocksize)));
    return launch({grid, kNestedBlocksize, 0, stream}, quantize_absmax_kernel, args->absmax, args->partial_sums,
                  static_cast<int>(args->n_partial_sums), args->absmax_q, args->absmax_scale, args->absmax_offset,
                  args->n_blocks);
}
