// w[n, k] = code[q] * absmax + scaling * sum over r of B[n, r] A[r, k]: the decoder of dequantize_nf4.cu with a LoRA
// update on tensor cores. Sums are fp32, w is rounded once.
//
// A block of four warps takes 128 rows and 256 columns of w. A warp keeps the fragments of A for its 64 columns in
// registers and goes down the rows, 16 at a time. Its eight n8 tiles share the 64 columns so that a thread's results of
// one row are 16 neighbours: eight packed bytes, two 16-byte stores.
//
//     tile j, column 2t + e of the tile  <->  column 16 t + 2 j + e of the warp's 64     (t = lane % 4)
#include "merge_lora.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4.cuh"
#include "qlora/ptx.cuh"
#include "qlora/shared_memory.cuh"

namespace qlora {

constexpr int kMergeWarps = 4;
constexpr int kMergeThreads = kMergeWarps * 32;
constexpr int kMergeColumns = 64;  // of a warp
constexpr int kMergeTiles = kMergeColumns / 8;
constexpr int kMergeRows = 128;  // of a block

struct MergeShared {
    CodeTable code;
};

// STEPS: of sixteen of the rank, which is padded to a multiple of sixteen.
template <typename T, int STEPS>
__global__ void __launch_bounds__(kMergeThreads) merge_lora_kernel(const MergeLoraArgs args) {
    MergeShared& shared = block_shared<MergeShared>();
    shared.code.fill(threadIdx.x);
    __syncthreads();
    constexpr int r = STEPS * 16;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int64_t N = args.weight.N, K = args.weight.K;
    const int64_t k0 = (int64_t(blockIdx.x) * kMergeWarps + warp) * kMergeColumns;
    if (k0 >= K) return;
    const T* __restrict__ lora_A = static_cast<const T*>(args.lora_A);
    const T* __restrict__ lora_B = static_cast<const T*>(args.lora_B);
    T* __restrict__ w = static_cast<T*>(args.w);
    const auto pair = [](const T* address) { return __ldg(reinterpret_cast<const uint32_t*>(address)); };

    uint32_t a_of_column[STEPS][kMergeTiles][2];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int j = 0; j < kMergeTiles; j++) {
            const int64_t k = k0 + (g >> 1) * 16 + j * 2 + (g & 1);
            const T* from = lora_A + k * r + step * 16 + t * 2;
            a_of_column[step][j][0] = pair(from);
            a_of_column[step][j][1] = pair(from + 8);
        }
    }
    const int64_t first = int64_t(blockIdx.y) * kMergeRows;
#pragma unroll 1
    for (int64_t n0 = first; n0 < first + kMergeRows && n0 < N; n0 += 16) {
        uint2 packed[2];
        float absmax[2];
        uint32_t b_of_row[STEPS][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int64_t n = n0 + g + i * 8, start = n * K + k0 + t * 16;
            const bool exists = n < N;
            packed[i] = exists ? __ldcs(reinterpret_cast<const uint2*>(args.weight.packed + start / 2)) : uint2{0, 0};
            absmax[i] = exists ? block_absmax(args.weight, start >> args.weight.block_shift) : 0.0f;
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                const T* from = lora_B + n * r + step * 16 + t * 2;
                b_of_row[step][i] = exists ? pair(from) : 0;
                b_of_row[step][i + 2] = exists ? pair(from + 8) : 0;
            }
        }
        float update[kMergeTiles][4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
#pragma unroll
            for (int j = 0; j < kMergeTiles; j++) {
                ptx::mma_m16n8k16<T>(update[j], b_of_row[step], a_of_column[step][j]);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int64_t n = n0 + g + i * 8;
            const uint32_t words[2] = {packed[i].x, packed[i].y};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float value[8];
                shared.code.decode8(value, words[half]);
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    const float of_update = __fmul_rn(args.scaling, update[half * 4 + e / 2][i * 2 + e % 2]);
                    value[e] = __fadd_rn(__fmul_rn(value[e], absmax[i]), of_update);
                }
                if (n < N) store8(w + n * K + k0 + t * 16 + half * 8, value);
            }
        }
    }
}

namespace {

template <typename T>
cudaError_t launch_merge(const MergeLoraArgs& args, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(args.weight.K, kMergeWarps * kMergeColumns)),
                    static_cast<unsigned>(ceil_div<int64_t>(args.weight.N, kMergeRows)));
    const LaunchShape shape{grid, kMergeThreads, 0, stream};
    switch (args.r) {
        case 16:
            return launch(shape, merge_lora_kernel<T, 1>, args);
        case 32:
            return launch(shape, merge_lora_kernel<T, 2>, args);
        case 48:
            return launch(shape, merge_lora_kernel<T, 3>, args);
        case 64:
            return launch(shape, merge_lora_kernel<T, 4>, args);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace qlora

cudaError_t launch_merge_lora(const qlora::MergeLoraArgs* args, cudaStream_t stream) {
    using namespace qlora;
    if (args->weight.K % kMergeColumns != 0) return cudaErrorInvalidValue;
    if (args->weight.N == 0 || args->weight.K == 0) return cudaSuccess;
    return with_16_bit_type(args->dtype, [&]<class T>(T*) { return launch_merge<T>(*args, stream); });
}
