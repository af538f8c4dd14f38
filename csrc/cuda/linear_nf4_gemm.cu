// y = x w_hat^T (or grad_x = grad_y w_hat) + bias + scaling * lora_left lora_right^T on tensor cores, with the weight
// decoded in the main loop.
//
// A thread block of four warps computes a tile of BLOCK_M x 128 outputs. Each warp takes all BLOCK_M rows and 32 output
// columns, so every weight is decoded once per thread block. One stage holds 64 of the contraction dimension gemm_k: x
// (swizzled rows, read by ldmatrix), packed weights and their absmax. Stages are fetched kStages - 1 ahead by 16-byte
// cp.async. The constants of two blocks for each thread are loaded with them into registers; absmax is computed and
// stored to the stage after the tensor-core work of that step, so no instruction before it waits for memory.
//
// LoRA takes extra steps at the front of the same pipeline, each 16 of the rank: a tile of lora_left is stored in the
// space of x, a tile of lora_right in the space of the packed weights, undecoded. After these steps the sums are
// multiplied by `scaling` in fp32, which rounds nothing to T.
//
// Where the output tiles alone do not fill the GPU, the contraction is split over grid.z. A second kernel adds the
// parts in a fixed order, so the result does not depend on timing.
#include "launchers.h"
#include "qlora/ptx.cuh"
#include "qlora/shared_memory.cuh"
#include "split_sums.cuh"
#include "weight_tiles.cuh"

namespace qlora {

constexpr int kLoraK = 16;               // of r in one step: a tile of lora_right is as large as the packed weights
constexpr int kRowChunks = kBlockK / 8;  // 16-byte chunks of a row of x

// The product as the kernel sees it: y [M, gemm_n] = x [M, gemm_k] times the weight or its transpose.
struct GemmProblem : LinearNF4GemmArgs {
    int N, K;
    int gemm_k, gemm_n;   // K and N; N and K where transposed
    int steps_per_split;  // of kBlockK along gemm_k
};

template <int BLOCK_M>
struct GemmStage {
    uint4 x[BLOCK_M * kRowChunks];
    uint4 packed[kChunks];
    float absmax[kChunks];
};
static_assert(kBlockN * kLoraK * 2 == sizeof(uint4) * kChunks);

// 64 rows take three stages instead of four: 40 KiB, so that two thread blocks fit the 100 KiB of sm_86, 89 and 120.
template <int BLOCK_M>
constexpr int kStagesOf = BLOCK_M < 64 ? 4 : 3;
constexpr int kMostStages = kStagesOf<16>;

template <int BLOCK_M>
struct GemmShared {
    GemmStage<BLOCK_M> stage[kStagesOf<BLOCK_M>];
    AbsmaxTable absmax;
    CodeTable code;
};

// Chunk of 8 elements of a row of the x tile: eight neighbouring rows of one column fall into different banks.
__device__ __forceinline__ int x_chunk(int row, int column) { return row * kRowChunks + (column ^ (row & 7)); }

template <typename T, int BLOCK_M, class Weights>
__global__ void __launch_bounds__(kGemmThreads, 2) linear_nf4_gemm_kernel(const GemmProblem p) {
    constexpr int kRowTiles = BLOCK_M / 16, kStages = kStagesOf<BLOCK_M>;
    using Shared = GemmShared<BLOCK_M>;
    Shared& shared = block_shared<Shared>();
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int n0 = int(blockIdx.x) * kBlockN, m0 = int(blockIdx.y) * BLOCK_M;
    const int first_step = int(blockIdx.z) * p.steps_per_split;
    const int weight_steps = min(p.steps_per_split, ceil_div(p.gemm_k, kBlockK) - first_step);
    const int lora_steps = p.lora_left && blockIdx.z == 0 ? ceil_div(p.r, kLoraK) : 0;
    const int steps = lora_steps + weight_steps;
    const AbsmaxReader constants(p.weight);

    // Elements [column, column + 8) of row `row` of a matrix, or zeros outside it.
    auto fetch_chunk = [](uint4* to, const void* matrix, int row, int rows, int column, int columns) {
        const bool valid = row < rows && column < columns;
        ptx::cp_async<16>(to, static_cast<const T*>(matrix) + (valid ? int64_t(row) * columns + column : 0), valid);
    };
    auto fetch_lora = [&](int step) {
        GemmStage<BLOCK_M>& to = shared.stage[step % kStages];
        const int r0 = step * kLoraK;
        static_assert(BLOCK_M * 2 <= kGemmThreads);
        const int row = thread / 2;
        if (row < BLOCK_M) {
            fetch_chunk(&to.x[x_chunk(row, thread % 2)], p.lora_left, m0 + row, p.M, r0 + thread % 2 * 8, p.r);
        }
#pragma unroll
        for (int j = 0; j < kBlockN * 2 / kGemmThreads; j++) {
            const int i = thread + j * kGemmThreads, slot = i / 2;
            fetch_chunk(&to.packed[row_chunk(slot, i % 2)], p.lora_right, n0 + column_of_slot(slot), p.gemm_n,
                        r0 + i % 2 * 8, p.r);
        }
    };
    auto fetch_weights = [&](int step, RawAbsmax(&raw)[kChunksPerThread]) {
        GemmStage<BLOCK_M>& to = shared.stage[step % kStages];
        const int k0 = (first_step + step - lora_steps) * kBlockK;
#pragma unroll
        for (int j = 0; j < BLOCK_M * kRowChunks / kGemmThreads; j++) {  // counted by j: nvcc peels a loop over i
            const int i = thread + j * kGemmThreads, row = i / kRowChunks, column = i % kRowChunks;
            fetch_chunk(&to.x[x_chunk(row, column)], p.x, m0 + row, p.M, k0 + column * 8, p.gemm_k);
        }
#pragma unroll
        for (int i = 0; i < kChunksPerThread; i++) {
            const WeightChunk chunk = Weights::chunk(thread + i * kGemmThreads, n0, k0);
            const bool valid = chunk.n < p.N && chunk.k < p.K;
            const int64_t first = valid ? int64_t(chunk.n) * p.K + chunk.k : 0;
            ptx::cp_async<16>(&to.packed[chunk.packed], p.weight.packed + first / 2, valid);
            // Missing weights are zero because their absmax is: zero bytes would decode to -1.
            raw[i] = constants.load(first >> p.weight.block_shift, valid);
        }
    };
    auto store_absmax = [&](int step, const RawAbsmax(&raw)[kChunksPerThread]) {
        GemmStage<BLOCK_M>& to = shared.stage[step % kStages];
#pragma unroll
        for (int i = 0; i < kChunksPerThread; i++) {
            to.absmax[Weights::chunk(thread + i * kGemmThreads, 0, 0).absmax] = constants.decode(shared.absmax, raw[i]);
        }
    };

    float sum[kRowTiles][kWarpTiles][4] = {};
    // One step of sixteen along the contraction: A fragments by ldmatrix from chunks 2 * step and 2 * step + 1 of x.
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

    RawAbsmax first[kStages - 1][kChunksPerThread];  // of all stages before any is decoded: one wait for memory
#pragma unroll
    for (int step = 0; step < kStages - 1; step++) {
        if (step < lora_steps) {
            fetch_lora(step);
        } else if (step < steps) {
            fetch_weights(step, first[step]);
        }
        ptx::cp_async_commit();
    }
    // The tables are filled while the first stages are on their way.
    shared.code.fill(thread);
    shared.absmax.template fill<kGemmThreads>(thread);
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kStages - 1; step++) {
        if (step >= lora_steps && step < steps) store_absmax(step, first[step]);
    }
    RawAbsmax raw[kChunksPerThread];
    for (int step = 0; step < steps; step++) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // the stage is there for all, and all have left the one that is fetched into next
        const int next = step + kStages - 1;
        const bool next_has_weights = next >= lora_steps && next < steps;
        if (next_has_weights) {
            fetch_weights(next, raw);
        } else if (next < lora_steps) {
            fetch_lora(next);
        }
        ptx::cp_async_commit();
        const GemmStage<BLOCK_M>& from = shared.stage[step % kStages];
        if (step < lora_steps) {
            uint32_t b[kWarpTiles][2];
#pragma unroll
            for (int tile = 0; tile < kWarpTiles; tile += 2) {
                const int slot = warp * 32 + (tile + lane / 16) * 8 + lane % 8;
                uint32_t word[4];
                ptx::ldmatrix_x4(word, &from.packed[row_chunk(slot, lane / 8 % 2)]);
                b[tile][0] = word[0], b[tile][1] = word[1], b[tile + 1][0] = word[2], b[tile + 1][1] = word[3];
            }
            multiply(from.x, 0, b);
            if (step == lora_steps - 1) {
#pragma unroll
                for (int i = 0; i < kRowTiles * kWarpTiles * 4; i++) sum[i / 16][i / 4 % 4][i % 4] *= p.scaling;
            }
        } else {
#pragma unroll
            for (int k_half = 0; k_half < kBlockK / 32; k_half++) {
                uint32_t b[2][kWarpTiles][2];
                Weights::template fragments<T>(b, from.packed, from.absmax, shared.code, k_half);
                multiply(from.x, k_half * 2, b[0]);
                multiply(from.x, k_half * 2 + 1, b[1]);
            }
        }
        if (next_has_weights) store_absmax(next, raw);
    }

    // A thread has eight neighbouring outputs of two rows of each 16.
    const int n = n0 + warp * 32 + lane % 4 * 8;
    float bias[8];
    load_bias(bias, p, n);
#pragma unroll
    for (int row_half = 0; row_half < kRowTiles * 2; row_half++) {
        const int m = m0 + row_half / 2 * 16 + row_half % 2 * 8 + lane / 4;
        if (m >= p.M || n >= p.gemm_n) continue;
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; i++) value[i] = sum[row_half / 2][i % 4][row_half % 2 * 2 + i / 4] + bias[i];
        store_outputs<T>(p, m, n, value);
    }
}

namespace {

template <typename T, int BLOCK_M, class Weights>
cudaError_t launch_tile(GemmProblem problem, cudaStream_t stream) {
    const int steps = ceil_div(problem.gemm_k, kBlockK);
    problem.steps_per_split = ceil_div(steps, problem.splits);
    const int splits = ceil_div(steps, problem.steps_per_split);
    if (splits == 1) problem.partial = nullptr;
    const dim3 grid(static_cast<unsigned>(ceil_div(problem.gemm_n, kBlockN)),
                    static_cast<unsigned>(ceil_div(problem.M, BLOCK_M)), static_cast<unsigned>(splits));
    const cudaError_t error =
        launch({grid, kGemmThreads, 0, stream}, linear_nf4_gemm_kernel<T, BLOCK_M, Weights>, problem);
    if (error != cudaSuccess || splits == 1) return error;
    return launch_reduce<T>(problem, splits, stream);
}

template <typename T, class Weights>
cudaError_t launch_rows(const GemmProblem& problem, cudaStream_t stream) {
    if (problem.M <= 16) return launch_tile<T, 16, Weights>(problem, stream);
    if (problem.M <= 32) return launch_tile<T, 32, Weights>(problem, stream);
    return launch_tile<T, 64, Weights>(problem, stream);
}

template <typename T>
cudaError_t launch_gemm(const GemmProblem& problem, cudaStream_t stream) {
    return problem.transposed ? launch_rows<T, TransposedWeights>(problem, stream)
                              : launch_rows<T, ForwardWeights>(problem, stream);
}

}  // namespace
}  // namespace qlora

int linear_nf4_gemm_splits(int M, int gemm_n, int gemm_k, int multiprocessors) {
    using namespace qlora;
    constexpr int kBlocksPerMultiprocessor = 2, kFewestSteps = 2 * kMostStages;
    const int tile = M <= 16 ? 16 : M <= 32 ? 32 : 64;
    const int64_t blocks = ceil_div<int64_t>(gemm_n, kBlockN) * ceil_div<int64_t>(M, tile);
    int64_t splits = int64_t(multiprocessors) * kBlocksPerMultiprocessor / blocks;
    // A part that is shorter than two fillings of the pipeline costs more in its ends than it gains.
    const int64_t max_splits = ceil_div<int64_t>(gemm_k, kBlockK) / kFewestSteps;
    if (splits > max_splits) splits = max_splits;
    return splits < 1 ? 1 : static_cast<int>(splits);
}

cudaError_t launch_linear_nf4_gemm(const qlora::LinearNF4GemmArgs* args, cudaStream_t stream) {
    using namespace qlora;
    const NF4Weight& w = args->weight;
    bool aligned = is_aligned(w.packed, 16);
    for (const void* pointer : {args->x, args->lora_left, args->lora_right, static_cast<const void*>(args->y),
                                static_cast<const void*>(args->partial)}) {
        aligned = aligned && is_aligned(pointer, 16);
    }
    if (args->M < 1 || w.N < 1 || w.N > INT32_MAX || w.K < 32 || w.K > INT32_MAX || w.K % 32 ||
        (args->transposed && w.N % 8) || args->r % 8 || !aligned || args->splits < 1 ||
        (args->splits > 1 && !args->partial)) {
        return cudaErrorInvalidValue;
    }
    GemmProblem problem{*args};
    problem.N = static_cast<int>(w.N);
    problem.K = static_cast<int>(w.K);
    problem.gemm_k = args->transposed ? problem.N : problem.K;
    problem.gemm_n = args->transposed ? problem.K : problem.N;
    if (args->r <= 0) problem.lora_left = nullptr;
    return with_16_bit_type(args->dtype, [&]<class T>(T*) { return launch_gemm<T>(problem, stream); });
}
