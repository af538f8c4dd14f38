// y = x w_hat^T (or x w_hat) + bias + scaling * down up^T on tensor cores, w decoded in the main loop.
//
// A block of four warps computes BLOCK_M x 128 outputs; each warp takes all BLOCK_M rows and 32 outputs, so every
// weight is decoded once a block. A stage is 64 of the contraction: x (swizzled rows, read by ldmatrix), packed weights
// and their absmax, fetched kStages - 1 ahead by 16-byte cp.async; absmax, two a thread, by plain loads that are stored
// to the stage after the tensor-core work of the step that issued them.
//
// LoRA is extra steps at the front of the same pipeline, 16 of r each: down takes x's place and up that of the packed
// weights, undecoded. After them the sums are multiplied by `scaling` in fp32, which rounds nothing to T.
//
// Where the outputs alone do not fill the GPU, the contraction is split over grid.z; parts are added by a second kernel
// in a fixed order, so results do not depend on timing.
#include "launchers.h"
#include "qlora/ptx.cuh"
#include "qlora/shared_memory.cuh"
#include "weight_tiles.cuh"

namespace qlora {

constexpr int kGemmStages = 4;
constexpr int kLoraDepth = 16;  // of r in one step: its up tile fills the place of the packed weights exactly
constexpr int kRowChunks = kBlockDepth / 8;  // 16-byte chunks of a row of x
constexpr int kReduceThreads = 256;

struct GemmProblem {
    const void* x;  // T [M, depth]
    const uint8_t* packed;
    Absmax absmax;
    const void* bias;  // [out] of bias_type, or null
    int bias_type;
    const void* down;  // T [M, r], or null
    const void* up;    // T [out, r]
    int r;
    float scaling;
    void* y;         // T [M, out]
    float* partial;  // fp32 [splits, M, out], or null
    int M, N, K, depth, out;
    int steps_per_split;
};

template <int BLOCK_M>
struct GemmStage {
    uint4 x[BLOCK_M * kRowChunks];
    uint4 packed[kPieces];
    float absmax[kPieces];
};
static_assert(kBlockOut * kLoraDepth * 2 == sizeof(uint4) * kPieces);

template <int BLOCK_M>
struct GemmShared {
    GemmStage<BLOCK_M> stage[kGemmStages];
    CodeTable code;
};

// Chunk of 8 elements of a row of the x tile: eight neighbouring rows of one column fall into different banks.
__device__ __forceinline__ int x_chunk(int row, int column) { return row * kRowChunks + (column ^ (row & 7)); }

template <typename T, int BLOCK_M, class Weights>
__global__ void __launch_bounds__(kGemmThreads, 2) linear_nf4_gemm_kernel(const GemmProblem p) {
    constexpr int kRowTiles = BLOCK_M / 16;
    GemmShared<BLOCK_M>& shared = dynamic_shared<GemmShared<BLOCK_M>>();
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int out0 = int(blockIdx.x) * kBlockOut, m0 = int(blockIdx.y) * BLOCK_M;
    const int first_step = int(blockIdx.z) * p.steps_per_split;
    const int weight_steps = min(p.steps_per_split, ceil_div(p.depth, kBlockDepth) - first_step);
    const int lora_steps = p.down && blockIdx.z == 0 ? ceil_div(p.r, kLoraDepth) : 0;
    const int steps = lora_steps + weight_steps;
    shared.code.fill(thread);

    // Elements [column, column + 8) of row `row` of a matrix, or zeros outside it.
    auto fetch_chunk = [](uint4* to, const void* matrix, int row, int rows, int column, int columns) {
        const bool valid = row < rows && column < columns;
        ptx::cp_async<16>(to, static_cast<const T*>(matrix) + (valid ? int64_t(row) * columns + column : 0), valid);
    };
    auto fetch_lora = [&](int step) {
        GemmStage<BLOCK_M>& to = shared.stage[step % kGemmStages];
        const int r0 = step * kLoraDepth;
        for (int i = thread; i < BLOCK_M * 2; i += kGemmThreads) {
            fetch_chunk(&to.x[x_chunk(i / 2, i % 2)], p.down, m0 + i / 2, p.M, r0 + i % 2 * 8, p.r);
        }
        for (int i = thread; i < kBlockOut * 2; i += kGemmThreads) {
            const int position = i / 2;
            fetch_chunk(&to.packed[row_chunk(position, i % 2)], p.up, out0 + output_at(position), p.out, r0 + i % 2 * 8,
                        p.r);
        }
    };
    auto fetch_weights = [&](int step, float (&absmax)[kPiecesPerThread]) {
        GemmStage<BLOCK_M>& to = shared.stage[step % kGemmStages];
        const int depth0 = (first_step + step - lora_steps) * kBlockDepth;
#pragma unroll
        for (int i = thread; i < BLOCK_M * kRowChunks; i += kGemmThreads) {
            const int row = i / kRowChunks, column = i % kRowChunks;
            fetch_chunk(&to.x[x_chunk(row, column)], p.x, m0 + row, p.M, depth0 + column * 8, p.depth);
        }
#pragma unroll
        for (int i = 0; i < kPiecesPerThread; i++) {
            const Piece piece = Weights::piece(thread + i * kGemmThreads, out0, depth0);
            const bool valid = piece.n < p.N && piece.k < p.K;
            const int64_t weight = valid ? int64_t(piece.n) * p.K + piece.k : 0;
            ptx::cp_async<16>(&to.packed[piece.packed], p.packed + weight / 2, valid);
            // Missing weights are zero because their absmax is: zero bytes would decode to -1.
            absmax[i] = valid ? first_level(p.absmax, weight >> p.absmax.block_shift) : 0.0f;
        }
    };
    auto store_absmax = [&](int step, const float (&absmax)[kPiecesPerThread]) {
        GemmStage<BLOCK_M>& to = shared.stage[step % kGemmStages];
#pragma unroll
        for (int i = 0; i < kPiecesPerThread; i++) {
            to.absmax[Weights::piece(thread + i * kGemmThreads, 0, 0).absmax] = absmax[i];
        }
    };

    float sum[kRowTiles][kWarpTiles][4] = {};
    // Rows of sixteen of the contraction, A fragments by ldmatrix: chunk 2 * step and the next.
    auto multiply = [&](const uint4* x, int step, const uint32_t (&b)[kWarpTiles][2]) {
#pragma unroll
        for (int tile = 0; tile < kRowTiles; tile++) {
            uint32_t a[4];
            ptx::ldmatrix_x4(a, x + x_chunk(tile * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int column = 0; column < kWarpTiles; column++) {
                ptx::mma_m16n8k16<T>(sum[tile][column], a, b[column]);
            }
        }
    };

    float absmax[kPiecesPerThread];
#pragma unroll
    for (int step = 0; step < kGemmStages - 1; step++) {
        if (step < lora_steps) {
            fetch_lora(step);
        } else if (step < steps) {
            fetch_weights(step, absmax);
            store_absmax(step, absmax);
        }
        ptx::cp_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        ptx::cp_async_wait<kGemmStages - 2>();
        __syncthreads();  // the stage is there for all, and all have left the one that is fetched into next
        const int next = step + kGemmStages - 1;
        const bool next_has_weights = next >= lora_steps && next < steps;
        if (next_has_weights) {
            fetch_weights(next, absmax);
        } else if (next < lora_steps) {
            fetch_lora(next);
        }
        ptx::cp_async_commit();
        const GemmStage<BLOCK_M>& from = shared.stage[step % kGemmStages];
        if (step < lora_steps) {
            uint32_t b[kWarpTiles][2];
#pragma unroll
            for (int tile = 0; tile < kWarpTiles; tile += 2) {
                const int position = warp * 32 + (tile + lane / 16) * 8 + lane % 8;
                uint32_t word[4];
                ptx::ldmatrix_x4(word, &from.packed[row_chunk(position, lane / 8 % 2)]);
                b[tile][0] = word[0], b[tile][1] = word[1], b[tile + 1][0] = word[2], b[tile + 1][1] = word[3];
            }
            multiply(from.x, 0, b);
            if (step == lora_steps - 1) {
#pragma unroll
                for (int i = 0; i < kRowTiles * kWarpTiles * 4; i++) sum[i / 16][i / 4 % 4][i % 4] *= p.scaling;
            }
        } else {
#pragma unroll
            for (int half = 0; half < kBlockDepth / 32; half++) {
                uint32_t b[2][kWarpTiles][2];
                Weights::template fragments<T>(b, from.packed, from.absmax, shared.code, half);
                multiply(from.x, half * 2, b[0]);
                multiply(from.x, half * 2 + 1, b[1]);
            }
        }
        if (next_has_weights) store_absmax(next, absmax);
    }

    // A thread has eight neighbouring outputs of two rows of each 16.
    const int out = out0 + warp * 32 + lane % 4 * 8;
    float bias[8] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (p.bias && !p.partial && out + i < p.out) bias[i] = load_any(p.bias, p.bias_type, out + i);
    }
#pragma unroll
    for (int half = 0; half < kRowTiles * 2; half++) {
        const int m = m0 + half / 2 * 16 + half % 2 * 8 + lane / 4;
        if (m >= p.M || out >= p.out) continue;
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = sum[half / 2][i % 4][half % 2 * 2 + i / 4] + bias[i];
        const int64_t place = int64_t(m) * p.out + out;
        if (p.partial) {
            float* to = p.partial + int64_t(blockIdx.z) * p.M * p.out + place;
            if (p.out % 8 == 0) {
                store8(to, value);
            } else {
                for (int i = 0; i < 8 && out + i < p.out; i++) to[i] = value[i];
            }
        } else {
            T* to = static_cast<T*>(p.y) + place;
            if (p.out % 8 == 0) {
                store8(to, value);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (out + i < p.out) to[i] = round_to<T>(value[i]);
                }
            }
        }
    }
}

// y = the sum of the parts, first to last, + bias.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    linear_nf4_reduce_kernel(const float* __restrict__ partial, const int splits, const void* bias, const int bias_type,
                             T* __restrict__ y, const int64_t numel, const int out) {
    const int64_t i = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x;
    if (i >= numel) return;
    float sum = partial[i];
    for (int part = 1; part < splits; part++) sum += partial[part * numel + i];
    if (bias) sum += load_any(bias, bias_type, i % out);
    y[i] = round_to<T>(sum);
}

namespace {

template <typename T, int BLOCK_M, class Weights>
cudaError_t launch_tile(GemmProblem problem, int splits, cudaStream_t stream) {
    const int steps = ceil_div(problem.depth, kBlockDepth);
    problem.steps_per_split = ceil_div(steps, splits);
    splits = ceil_div(steps, problem.steps_per_split);
    if (splits == 1) problem.partial = nullptr;
    const dim3 grid(static_cast<unsigned>(ceil_div(problem.out, kBlockOut)),
                    static_cast<unsigned>(ceil_div(problem.M, BLOCK_M)), static_cast<unsigned>(splits));
    const cudaError_t error = launch({grid, kGemmThreads, sizeof(GemmShared<BLOCK_M>), stream},
                                     linear_nf4_gemm_kernel<T, BLOCK_M, Weights>, problem);
    if (error != cudaSuccess || splits == 1) return error;
    const int64_t numel = int64_t(problem.M) * problem.out;
    const dim3 reduce_grid(static_cast<unsigned>(ceil_div<int64_t>(numel, kReduceThreads)));
    return launch({reduce_grid, kReduceThreads, 0, stream}, linear_nf4_reduce_kernel<T>, problem.partial, splits,
                  problem.bias, problem.bias_type, static_cast<T*>(problem.y), numel, problem.out);
}

template <typename T, class Weights>
cudaError_t launch_rows(const GemmProblem& problem, int splits, cudaStream_t stream) {
    if (problem.M <= 16) return launch_tile<T, 16, Weights>(problem, splits, stream);
    if (problem.M <= 32) return launch_tile<T, 32, Weights>(problem, splits, stream);
    return launch_tile<T, 64, Weights>(problem, splits, stream);
}

template <typename T>
cudaError_t launch_gemm(const GemmProblem& problem, int splits, int transposed, cudaStream_t stream) {
    return transposed ? launch_rows<T, TransposedWeights>(problem, splits, stream)
                      : launch_rows<T, ForwardWeights>(problem, splits, stream);
}

}  // namespace
}  // namespace qlora

int linear_nf4_gemm_splits(int M, int out, int depth, int multiprocessors) {
    using namespace qlora;
    constexpr int kBlocksPerMultiprocessor = 2, kFewestSteps = 2 * kGemmStages;
    const int tile = M <= 16 ? 16 : M <= 32 ? 32 : 64;
    const int64_t blocks = ceil_div<int64_t>(out, kBlockOut) * ceil_div<int64_t>(M, tile);
    int64_t splits = int64_t(multiprocessors) * kBlocksPerMultiprocessor / blocks;
    // A part that is shorter than two fillings of the pipeline costs more in its ends than it gains.
    const int64_t most = ceil_div<int64_t>(depth, kBlockDepth) / kFewestSteps;
    if (splits > most) splits = most;
    return splits < 1 ? 1 : static_cast<int>(splits);
}

cudaError_t launch_linear_nf4_gemm(const void* x, int x_type, const uint8_t* packed, const float* absmax,
                                   const uint8_t* absmax_q, const float* absmax_scale, const float* absmax_offset,
                                   int block_shift, const void* bias, int bias_type, const void* down, const void* up,
                                   int r, float scaling, void* y, float* partial, int splits, int transposed, int M,
                                   int N, int K, cudaStream_t stream) {
    using namespace qlora;
    const bool aligned = is_aligned(x, 16) && is_aligned(packed, 16) && is_aligned(down, 16) && is_aligned(up, 16) &&
                         is_aligned(y, 16) && is_aligned(partial, 16);
    if (M < 1 || N < 1 || K < 32 || K % 32 || (transposed && N % 8) || r % 8 || !aligned || splits < 1 ||
        (splits > 1 && !partial)) {
        return cudaErrorInvalidValue;
    }
    const int depth = transposed ? N : K, out = transposed ? K : N;
    const GemmProblem problem{x,    packed,    {absmax, absmax_q, absmax_scale, absmax_offset, block_shift},
                              bias, bias_type, r > 0 ? down : nullptr,
                              up,   r,         scaling,
                              y,    partial,   M,
                              N,    K,         depth,
                              out,  0};
    switch (x_type) {
        case kBfloat16:
            return launch_gemm<__nv_bfloat16>(problem, splits, transposed, stream);
        case kFloat16:
            return launch_gemm<__half>(problem, splits, transposed, stream);
        default:
            return cudaErrorInvalidValue;
    }
}
