// w[i] = code[q[i]] * absmax[i >> block_shift] in fp32, rounded once; the second level of absmax is read in the same
// pass.
//
// A block of 128 threads decodes 8192 weights. Each thread loads 4 x 16 packed bytes (LDG.128) into shared memory; then
// thread t takes words t, t + 128, ... so that each of its stores is a part of one full 512-byte line of the warp.
// Writing straight from the load would scatter every store over four times as many sectors. What whole tiles leave
// over, and tensors that are not 16-byte aligned, take a second kernel, so that the first one has no bounds to check.
//
// Rows of w may have a stride, for a workspace that has more columns than w. Each of a thread's stores is 1024 weights
// after the one before: RowWalk follows the row in which it lies without a division.
#include "launchers.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4.cuh"
#include "qlora/shared_memory.cuh"

namespace qlora {

constexpr int kDequantizeThreads = 128;
constexpr int kWeightsPerThread = 64;
constexpr int kDequantizeTile = kDequantizeThreads * kWeightsPerThread;
constexpr int kLoadsPerThread = kWeightsPerThread / 32;
constexpr int kStepShift = 10, kStep = 1 << kStepShift;  // weights that the block decodes at once, 8 a thread
static_assert(kStep == kDequantizeThreads * 8);
constexpr int kSmallestBlocksize = 32;

struct DequantizeShared {
    uint4 packed[kDequantizeTile / 32];
    float absmax[kDequantizeTile / kSmallestBlocksize];
    CodeTable code;
};

// Where the elements of a matrix are stored whose rows have a gap between them, in units of eight elements, of which a
// row is a multiple: 32 bits suffice for a division and for offsets in tensors of 2^35 elements.
struct RowWalk {
    uint32_t columns;      // K / 8
    uint32_t gap;          // between the end of one row and the start of the next
    uint32_t step_column;  // kStep / 8 % columns
    uint32_t step_place;   // kStep / 8, and the gaps of kStep / K rows
};

// No gap: w is contiguous.
struct Contiguous {
    int64_t place;
    __device__ __forceinline__ Contiguous(const RowWalk&, int64_t first) : place(first) {}
    __device__ __forceinline__ int64_t offset() const { return place; }
    __device__ __forceinline__ void advance(const RowWalk&) { place += kStep; }
};

struct Strided {
    uint32_t place, column;
    __device__ __forceinline__ Strided(const RowWalk& walk, int64_t first) {
        const uint32_t eights = static_cast<uint32_t>(first >> 3), row = eights / walk.columns;
        place = eights + row * walk.gap;
        column = eights - row * walk.columns;
    }
    __device__ __forceinline__ int64_t offset() const { return int64_t(place) * 8; }
    __device__ __forceinline__ void advance(const RowWalk& walk) {
        column += walk.step_column;
        place += walk.step_place;
        if (column >= walk.columns) {
            column -= walk.columns;
            place += walk.gap;
        }
    }
};

template <typename T, typename Place>
__device__ __forceinline__ void dequantize_tile(const NF4Weight& weight, T* __restrict__ w, const RowWalk& walk) {
    const uint4* packed = reinterpret_cast<const uint4*>(weight.packed);
    DequantizeShared& shared = block_shared<DequantizeShared>();
    const int thread = threadIdx.x;
    const int64_t start = int64_t(blockIdx.x) * kDequantizeTile;
#pragma unroll
    for (int i = 0; i < kLoadsPerThread; i++) {
        const int index = i * kDequantizeThreads + thread;
        shared.packed[index] = __ldcs(packed + start / 32 + index);
    }
    // One entry for each blocksize or kStep weights, whichever is less, so that a thread's entries are evenly spaced.
    const int shift = min(weight.block_shift, kStepShift);
    const int entries = kDequantizeTile >> shift;
#pragma unroll 1  // one round at blocksize 64
    for (int i = thread; i < entries; i += kDequantizeThreads) {
        shared.absmax[i] = block_absmax(weight, (start + (int64_t(i) << shift)) >> weight.block_shift);
    }
    shared.code.fill(thread);
    __syncthreads();
    const uint32_t* words = reinterpret_cast<const uint32_t*>(shared.packed);
    const float* absmax_sh = shared.absmax + (thread * 8 >> shift);
    Place place(walk, start + thread * 8);
#pragma unroll
    for (int step = 0; step < kWeightsPerThread / 8; step++) {
        const int index = step * kDequantizeThreads + thread;
        const float absmax = *absmax_sh;
        absmax_sh += kStep >> shift;
        float value[8];
        shared.code.decode8(value, words[index]);
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = __fmul_rn(value[i], absmax);
        store8(w + place.offset(), value);
        place.advance(walk);
    }
}

template <typename T>
__global__ void __launch_bounds__(kDequantizeThreads) dequantize_nf4_kernel(const NF4Weight weight, T* __restrict__ w) {
    dequantize_tile<T, Contiguous>(weight, w, {});
}

template <typename T>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_nf4_rows_kernel(const NF4Weight weight, T* __restrict__ w, const RowWalk walk) {
    dequantize_tile<T, Strided>(weight, w, walk);
}

// Weights [start, numel), one a thread.
template <typename T>
__global__ void __launch_bounds__(kDequantizeThreads)
    dequantize_nf4_rest_kernel(const NF4Weight weight, T* __restrict__ w, const int64_t gap, const int64_t start,
                               const int64_t numel) {
    const int64_t i = start + int64_t(blockIdx.x) * kDequantizeThreads + threadIdx.x;
    if (i >= numel) return;
    const float absmax = block_absmax(weight, i >> weight.block_shift);
    const int64_t place = gap == 0 ? i : i + i / weight.K * gap;
    w[place] = round_to<T>(__fmul_rn(nf4_code(nibble(weight.packed, i)), absmax));
}

namespace {

template <typename T>
cudaError_t launch_dequantize(const DequantizeNF4Args& args, cudaStream_t stream) {
    const int64_t K = args.weight.K, numel = args.weight.N * K;
    const int64_t gap = args.weight.N == 1 ? 0 : args.row_stride - K;
    T* w = static_cast<T*>(args.w);
    const bool whole_eights = K % 8 == 0 && gap % 8 == 0 && (args.weight.N * (K + gap)) >> 35 == 0;
    const bool aligned = is_aligned(args.weight.packed, 16) && is_aligned(w, 16);
    const int64_t tiles = aligned && (gap == 0 || whole_eights) ? numel / kDequantizeTile : 0;
    const int64_t rest = numel - tiles * kDequantizeTile;
    cudaError_t error = cudaSuccess;
    if (tiles > 0) {
        const LaunchShape shape{dim3(static_cast<unsigned>(tiles)), kDequantizeThreads, 0, stream};
        const auto eights = [](int64_t elements) { return static_cast<uint32_t>(elements / 8); };
        const RowWalk walk{eights(K), eights(gap), eights(kStep % K), eights(kStep + kStep / K * gap)};
        error = gap == 0 ? launch(shape, dequantize_nf4_kernel<T>, args.weight, w)
                         : launch(shape, dequantize_nf4_rows_kernel<T>, args.weight, w, walk);
    }
    if (rest > 0 && error == cudaSuccess) {
        const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(rest, kDequantizeThreads)));
        error = launch({grid, kDequantizeThreads, 0, stream}, dequantize_nf4_rest_kernel<T>, args.weight, w, gap,
                       tiles * kDequantizeTile, numel);
    }
    return error;
}

}  // namespace
}  // namespace qlora

cudaError_t launch_dequantize_nf4(const qlora::DequantizeNF4Args* args, cudaStream_t stream) {
    using namespace qlora;
    if (args->weight.N == 0 || args->weight.K == 0) return cudaSuccess;
    return with_float_type(args->dtype, [&]<class T>(T*) { return launch_dequantize<T>(*args, stream); });
}
