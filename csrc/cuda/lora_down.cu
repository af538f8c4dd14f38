// s = scale * dropout(x) lora_A^T on tensor cores, and a copy of x, in one pass over x.
//
// A block takes 16 rows of x; its eight warps share the contraction, 64 of K in each step, and add their sums at the
// end in a fixed order. The order of the contraction inside a product is free as long as both operands have the same
// one, so that the fragments of mma.m16n8k16 come straight from 16-byte loads, without shared memory:
//
//     thread t = lane % 4 of row g = lane / 4     k = 8t .. 8t + 7 of 32: one 16-byte load, words 0 .. 3
//     product 0   k = 2t, 2t+1 | 2t+8, 2t+9       words 0 | 1
//     product 1   the same                        words 2 | 3
//
// The eight elements of one load are those of one philox call, and are stored to the copy as they were loaded.
#include "launchers.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/philox.cuh"
#include "qlora/ptx.cuh"
#include "qlora/shared_memory.cuh"

namespace qlora {

constexpr int kDownWarps = 8;
constexpr int kDownThreads = kDownWarps * 32;
constexpr int kDownRows = 16;
constexpr int kDownStep = 64;  // of the contraction, in a warp's step
constexpr int kMostRank = 64;
static_assert(kDrawsPerCall == 1 << 3);

// Sums of the warps, [warp][row][column].
template <int TILES>
struct DownShared {
    float sum[kDownWarps][kDownRows][TILES * 8];
};

// Zeroes the elements of eight that dropout drops.
template <typename T>
__device__ __forceinline__ void drop8(uint4& words, int64_t seed, int64_t call, uint32_t threshold) {
    bool keep[kDrawsPerCall];
    draw8(keep, seed, call, threshold);
    uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) word[i] &= (keep[2 * i] ? 0x0000FFFFu : 0u) | (keep[2 * i + 1] ? 0xFFFF0000u : 0u);
    words = make_uint4(word[0], word[1], word[2], word[3]);
}

// TILES: of eight columns of s. A row of x that does not exist is zero, and so is a row of lora_A.
template <typename T, int TILES, bool DROPOUT, bool COPY>
__global__ void __launch_bounds__(kDownThreads) lora_down_kernel(const LoraDownArgs args) {
    DownShared<TILES>& shared = block_shared<DownShared<TILES>>();
    const T* __restrict__ x = static_cast<const T*>(args.x);
    const T* __restrict__ lora_A = static_cast<const T*>(args.lora_A);
    T* __restrict__ copy = static_cast<T*>(args.copy);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int64_t first_row = int64_t(blockIdx.x) * kDownRows + g;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const int64_t seed = DROPOUT ? *args.seed : 0;

    // x of one step: [row g, row g + 8][first 32, second 32 of the step]
    uint4 next[2][2];
    const auto load = [&](int k) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int64_t row = first_row + i * 8;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = k + half * 32 + t * 8;
                next[i][half] = row < args.M && column < args.K
                                    ? __ldcs(reinterpret_cast<const uint4*>(x + row * args.K + column))
                                    : zero;
            }
        }
    };

    float sum[TILES][4] = {};
    load(warp * kDownStep);
    for (int k = warp * kDownStep; k < args.K; k += kDownWarps * kDownStep) {
        uint4 rows[2][2];
#pragma unroll
        for (int i = 0; i < 4; i++) rows[i / 2][i % 2] = next[i / 2][i % 2];
        load(k + kDownWarps * kDownStep);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = k + half * 32 + t * 8;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int64_t row = first_row + i * 8;
                const bool exists = row < args.M && column < args.K;
                if (COPY && exists) {
                    *reinterpret_cast<uint4*>(copy + row * args.copy_stride + column) = rows[i][half];
                }
                if (DROPOUT && exists) {
                    drop8<T>(rows[i][half], seed, (row * args.K + column) >> 3, static_cast<uint32_t>(args.threshold));
                }
            }
            const uint4 upper = rows[0][half], lower = rows[1][half];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const int j = tile * 8 + g;
                const uint4 factor = j < args.r && column < args.K
                                         ? __ldg(reinterpret_cast<const uint4*>(lora_A + int64_t(j) * args.K + column))
                                         : zero;
                const uint32_t first[2] = {factor.x, factor.y}, second[2] = {factor.z, factor.w};
                ptx::mma_m16n8k16<T>(sum[tile], {upper.x, lower.x, upper.y, lower.y}, first);
                ptx::mma_m16n8k16<T>(sum[tile], {upper.z, lower.z, upper.w, lower.w}, second);
            }
        }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) shared.sum[warp][g + i / 2 * 8][tile * 8 + t * 2 + i % 2] = sum[tile][i];
    }
    __syncthreads();
    T* s = static_cast<T*>(args.s);
    for (int i = threadIdx.x; i < kDownRows * TILES * 8; i += kDownThreads) {
        const int row = i / (TILES * 8), column = i % (TILES * 8);
        const int64_t m = int64_t(blockIdx.x) * kDownRows + row;
        if (m >= args.M || column >= args.r) continue;
        float total = shared.sum[0][row][column];
#pragma unroll
        for (int w = 1; w < kDownWarps; w++) total = __fadd_rn(total, shared.sum[w][row][column]);
        s[m * args.s_stride + column] = round_to<T>(__fmul_rn(total, args.scale));
    }
}

namespace {

template <typename T, int TILES, bool DROPOUT>
cudaError_t launch_tiles(const LoraDownArgs& args, cudaStream_t stream) {
    const LaunchShape shape{dim3(static_cast<unsigned>(ceil_div<int64_t>(args.M, kDownRows))), kDownThreads, 0, stream};
    return args.copy ? launch(shape, lora_down_kernel<T, TILES, DROPOUT, true>, args)
                     : launch(shape, lora_down_kernel<T, TILES, DROPOUT, false>, args);
}

template <typename T, bool DROPOUT>
cudaError_t launch_rank(const LoraDownArgs& args, cudaStream_t stream) {
    if (args.r <= 16) return launch_tiles<T, 2, DROPOUT>(args, stream);
    if (args.r <= 32) return launch_tiles<T, 4, DROPOUT>(args, stream);
    return launch_tiles<T, 8, DROPOUT>(args, stream);
}

template <typename T>
cudaError_t launch_typed(const LoraDownArgs& args, cudaStream_t stream) {
    return args.seed ? launch_rank<T, true>(args, stream) : launch_rank<T, false>(args, stream);
}

}  // namespace
}  // namespace qlora

cudaError_t launch_lora_down(const qlora::LoraDownArgs* args, cudaStream_t stream) {
    using namespace qlora;
    if (args->r > kMostRank || args->K % 8 != 0) return cudaErrorInvalidValue;
    if (args->M == 0 || args->r == 0) return cudaSuccess;
    return with_16_bit_type(args->dtype, [&]<class T>(T*) { return launch_typed<T>(*args, stream); });
}
