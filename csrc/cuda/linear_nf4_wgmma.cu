// y = x w_hat^T (or grad_x = grad_y w_hat) + bias + scaling * lora_left lora_right^T by wgmma, for sm_90a alone, with
// the weight decoded in the main loop. w_hat is rounded as in linear_nf4_gemm.cu.
//
// A thread block computes 128 outputs, which are rows of w (or its columns), for M_TILE rows of x. Two warpgroups have
// 64 outputs each, whose weights they decode in registers into the left operand of wgmma.m64nNk16 (wgmma_weights.cuh);
// x is the right operand, in shared memory. The TMA copies of x and packed weights, two of four stages of 64 along the
// contraction ahead, are issued by lane 0 of a warp. Barriers tell when a stage is full, and when all warps have left
// it.
//
// A table in shared memory has one entry for each packed byte: the byte's two codes in fp32. A byte becomes an operand
// by a byte permutation, a load, two products with absmax and one conversion, which rounds.
//
// While the products of a stage run, the next stage is decoded into a second set of operands. LoRA's product comes
// first: lora_left lies in the space of x of stages that are not filled yet, lora_right is read from global memory.
#include <cuda.h>

#include "launchers.h"

#ifdef QLORA_WITHOUT_SM90A

// Compiled for other architectures: the launcher exists and says that the kernel does not.
int linear_nf4_wgmma_splits(int, int, int, int) { return 1; }
cudaError_t launch_linear_nf4_wgmma(const qlora::LinearNF4GemmArgs*, cudaStream_t) {
    return cudaErrorNoKernelImageForDevice;
}

#else

#include <algorithm>

#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4.cuh"
#include "qlora/ptx_sm90.cuh"
#include "qlora/shared_memory.cuh"
#include "split_sums.cuh"
#include "wgmma_stages.cuh"
#include "wgmma_weights.cuh"

namespace qlora {

// sum += a times the tile of x: four steps of 16 along k, as one group of wgmma.
template <typename T, int M_TILE>
__device__ __forceinline__ void multiply(float (&sum)[M_TILE / 2], const uint32_t (&a)[4][4], uint64_t tile) {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) ptx::wgmma_m64k16<T, M_TILE>(sum, a[step], tile + 2 * step, true);
    ptx::wgmma_commit();
}

// The left operands of LoRA's step: rows n[0] and n[1] of lora_right, 64 columns from `first` on, zeros past the end.
__device__ __forceinline__ void load_right(uint32_t (&a)[4][4], const WgmmaProblem& p, const int (&n)[2], int first,
                                           int t) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int column = first + i / 4 * 16 + i / 2 % 2 * 8;  // of eight
        const bool exists = column < p.r;
        const int64_t at = (int64_t(n[i % 2]) * p.r + (exists ? column : 0)) / 2 + t;
        const uint32_t pair = __ldg(static_cast<const uint32_t*>(p.lora_right) + at);
        a[i / 4][i % 4] = exists ? pair : 0u;
    }
}

template <typename T, int M_TILE, class Weights>
__global__ void __launch_bounds__(kWgmmaThreads, M_TILE == 64 ? 2 : 1)
    linear_nf4_wgmma_kernel(const __grid_constant__ WgmmaProblem p) {
    using Shared = WgmmaShared<M_TILE>;
    Shared& shared = dynamic_shared<Shared>();
    // Taken from lane 0, so that the compiler sees one value for the warp.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(kWholeWarp, int(threadIdx.x) / 32, 0);
    const int n0 = int(blockIdx.x) * kWgmmaRows, m0 = int(blockIdx.y) * M_TILE;
    const int first_step = int(blockIdx.z) * p.steps_per_split;
    // Not always a multiple of kWgmmaStages.
    const int steps = min(p.steps_per_split, ceil_div(p.gemm_k, kWgmmaBlockK) - first_step);
    const int lora_steps = p.lora_left && blockIdx.z == 0 ? ceil_div(p.r, kWgmmaBlockK) : 0;
    const TileCopies<M_TILE, Weights::kTransposed> copies(p, shared);
    if (threadIdx.x == 0) {
        copies.make_barriers();
        if (lora_steps) copies.fetch_left(0);
        for (int step = 0; step < kAhead; step++) copies.fetch(step);
    }
    Weights weights(p, shared.absmax, first_step, steps, warp, lane);
    const PairLookup pair_of(shared.line, lane, Weights::byte_of_lane(lane));
    fill_lines(shared.line, warp, lane);
    shared.absmax.template fill<kWgmmaThreads>(threadIdx.x);
    __syncthreads();

    const int t = lane % 4, output[2] = {Weights::output(warp, lane, 0), Weights::output(warp, lane, 1)};
    const uint64_t first_tile = ptx::tile_descriptor(shared.x[0]);
    constexpr int kTile = sizeof shared.x[0] / 16;
    float sum[M_TILE / 2] = {};
    for (int step = 0; step < lora_steps; step++) {
        if (threadIdx.x == 0 && step + 1 < lora_steps) copies.fetch_left(step + 1);
        uint32_t a[4][4];
        // Outputs past the end repeat the last one and are not stored.
        const int n[2] = {min(n0 + output[0], p.gemm_n - 1), min(n0 + output[1], p.gemm_n - 1)};
        load_right(a, p, n, step * kWgmmaBlockK, t);
        ptx::barrier_wait(shared.lora_full(step % 2), step / 2 % 2);
        multiply<T, M_TILE>(sum, a, first_tile + left_stage(step) * kTile);
        ptx::wgmma_wait<0>();
        __syncthreads();  // all warps have left the tile
    }
    // Without a condition, because wgmma is not asynchronous where paths with different sums meet.
#pragma unroll
    for (int i = 0; i < M_TILE / 2; i++) sum[i] *= p.scaling;

    uint32_t a[2][4][4];
    // In whole groups of stages: TMA gives zeros past the end of the contraction, where the absmax is zero too. A
    // branch out of a group would end the asynchrony of wgmma.
    for (int step = 0; step < steps; step += kWgmmaStages) {
        weights.begin_group(step);
#pragma unroll
        for (int stage = 0; stage < kWgmmaStages; stage++) {
            weights.begin_stage(step + stage, stage);
            ptx::barrier_wait(shared.full(stage), step / kWgmmaStages % 2);
            if (warp == stage * 2 && lane == 0 && (stage < kWgmmaStages - kAhead || step + kWgmmaStages < steps)) {
                copies.fetch(step + stage + kAhead);
            }
            weights.template decode<T>(a[stage % 2], shared.packed[stage], pair_of);
            multiply<T, M_TILE>(sum, a[stage % 2], first_tile + stage * kTile);
            ptx::wgmma_wait<1>();  // the products of the previous stage
            __syncwarp();          // all lanes have read its packed weights
            if (lane == 0 && (stage > 0 || step > 0)) {
                ptx::barrier_arrive(shared.empty((stage + kWgmmaStages - 1) % kWgmmaStages));
            }
        }
    }
    ptx::wgmma_wait<0>();  // the last products

    // Through shared memory, so that a thread stores eight neighbouring outputs of a row of y.
    __syncthreads();
    float* const sums_sh = reinterpret_cast<float*>(&shared);
    static_assert(sizeof(float) * M_TILE * kPitch <= sizeof shared);
#pragma unroll
    for (int i = 0; i < M_TILE / 2; i++) {
        sums_sh[(i / 4 * 8 + t * 2 + i % 2) * kPitch + output[i / 2 % 2]] = sum[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < M_TILE * kWgmmaRows / 8; i += kWgmmaThreads) {
        const int column = i % (kWgmmaRows / 8) * 8, m = i / (kWgmmaRows / 8), first_n = n0 + column;
        if (m0 + m >= p.M || first_n >= p.gemm_n) continue;
        float value[8], bias[8];
        load_bias(bias, p, first_n);
        load8(value, sums_sh + m * kPitch + column);
#pragma unroll
        for (int k = 0; k < 8; k++) value[k] += bias[k];
        store_outputs<T>(p, m0 + m, first_n, value);
    }
}

namespace {

// The driver's function, found at run time so that the library is not linked to libcuda.
using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

cudaError_t find_encode_tiled(EncodeTiled* function) {
    constexpr unsigned kSince = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince, cudaEnableDefault, &status);
    if (error != cudaSuccess) return error;
    if (status != cudaDriverEntryPointSuccess || !found) return cudaErrorSymbolNotFound;
    *function = reinterpret_cast<EncodeTiled>(found);
    return cudaSuccess;
}

// A matrix of `rows` rows, and the box of it that a copy takes: `box_rows` rows of `box_columns` elements.
struct TileShape {
    CUtensorMapDataType type;
    CUtensorMapSwizzle swizzle;
    int bytes;  // of an element
    int rows, columns, box_rows, box_columns;
};

cudaError_t encode(EncodeTiled function, CUtensorMap* map, const void* matrix, const TileShape& shape) {
    const cuuint64_t sizes[2] = {cuuint64_t(shape.columns), cuuint64_t(shape.rows)};
    const cuuint64_t strides[1] = {cuuint64_t(shape.columns) * shape.bytes};
    const cuuint32_t box[2] = {cuuint32_t(shape.box_columns), cuuint32_t(shape.box_rows)}, steps[2] = {1, 1};
    const CUresult result = function(map, shape.type, 2, const_cast<void*>(matrix), sizes, strides, box, steps,
                                     CU_TENSOR_MAP_INTERLEAVE_NONE, shape.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return static_cast<cudaError_t>(result);  // the numbers of the common errors are the same
}

cudaError_t encode_maps(WgmmaProblem& p, int m_tile) {
    EncodeTiled function = nullptr;
    cudaError_t error = find_encode_tiled(&function);
    if (error != cudaSuccess) return error;
    const CUtensorMapDataType type =
        p.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const TileShape x{type, CU_TENSOR_MAP_SWIZZLE_128B, 2, p.M, p.gemm_k, m_tile, kWgmmaBlockK};
    const TileShape left{type, CU_TENSOR_MAP_SWIZZLE_128B, 2, p.M, p.r, m_tile, kWgmmaBlockK};
    const bool transposed = p.transposed != 0;
    const TileShape packed{CU_TENSOR_MAP_DATA_TYPE_UINT8,
                           transposed ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B,
                           1,
                           p.N,
                           p.K / 2,
                           transposed ? kWgmmaBlockK : kWgmmaRows,
                           transposed ? kColumnBytes : kRowBytes};
    error = encode(function, &p.x_map, p.x, x);
    if (error == cudaSuccess) error = encode(function, &p.packed_map, p.weight.packed, packed);
    if (error == cudaSuccess && p.lora_left) error = encode(function, &p.left_map, p.lora_left, left);
    return error;
}

int wgmma_tile(int M) { return M <= 64 ? 64 : M <= 128 ? 128 : 256; }

template <typename T, int M_TILE, class Weights>
cudaError_t launch_wgmma_tile(WgmmaProblem problem, cudaStream_t stream) {
    using Shared = WgmmaShared<M_TILE>;
    const int groups = ceil_div(problem.gemm_k, kWgmmaBlockK * kWgmmaStages);  // parts are whole groups of stages
    const int groups_per_split = ceil_div(groups, problem.splits), splits = ceil_div(groups, groups_per_split);
    problem.steps_per_split = groups_per_split * kWgmmaStages;
    if (splits == 1) problem.partial = nullptr;
    const auto kernel = linear_nf4_wgmma_kernel<T, M_TILE, Weights>;
    cudaError_t error = encode_maps(problem, M_TILE);
    if (error != cudaSuccess) return error;
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 sizeof(Shared));
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(problem.gemm_n, kWgmmaRows)),
                    static_cast<unsigned>(ceil_div(problem.M, M_TILE)), static_cast<unsigned>(splits));
    error = launch({grid, kWgmmaThreads, sizeof(Shared), stream}, kernel, problem);
    if (error != cudaSuccess || splits == 1) return error;
    return launch_reduce<T>(problem, splits, stream);
}

template <typename T, class Weights>
cudaError_t launch_wgmma_rows(const WgmmaProblem& problem, cudaStream_t stream) {
    if (problem.M <= 64) return launch_wgmma_tile<T, 64, Weights>(problem, stream);
    if (problem.M <= 128) return launch_wgmma_tile<T, 128, Weights>(problem, stream);
    return launch_wgmma_tile<T, 256, Weights>(problem, stream);
}

template <typename T>
cudaError_t launch_wgmma(const WgmmaProblem& problem, cudaStream_t stream) {
    return problem.transposed ? launch_wgmma_rows<T, ColumnWeights>(problem, stream)
                              : launch_wgmma_rows<T, RowWeights>(problem, stream);
}

}  // namespace
}  // namespace qlora

int linear_nf4_wgmma_splits(int M, int N, int K, int multiprocessors) {
    using namespace qlora;
    // A part of fewer steps than two fillings of the pipeline costs more in its ends than it gains.
    constexpr int kFewestSteps = 2 * kWgmmaStages;
    const int64_t blocks = ceil_div<int64_t>(N, kWgmmaRows) * ceil_div<int64_t>(M, wgmma_tile(M));
    const int64_t most = K / kWgmmaBlockK / kFewestSteps;
    return static_cast<int>(std::max<int64_t>(1, std::min(multiprocessors / blocks, most)));
}

cudaError_t launch_linear_nf4_wgmma(const qlora::LinearNF4GemmArgs* args, cudaStream_t stream) {
    using namespace qlora;
    const NF4Weight& w = args->weight;
    bool aligned = is_aligned(w.packed, 16);
    for (const void* pointer : {args->x, args->lora_left, args->lora_right, static_cast<const void*>(args->y),
                                static_cast<const void*>(args->partial)}) {
        aligned = aligned && is_aligned(pointer, 16);
    }
    if (args->M < 1 || (args->transposed && w.N % 8) || w.N < 1 || w.N > INT32_MAX - kWgmmaRows || w.K < kWgmmaBlockK ||
        w.K > INT32_MAX || w.K % kWgmmaBlockK || 1 << w.block_shift < kWgmmaBlockK ||
        w.N * (w.K / kWgmmaBlockK) > int64_t(UINT32_MAX) || args->r % 8 || !aligned || args->splits < 1 ||
        (args->splits > 1 && !args->partial)) {
        return cudaErrorInvalidValue;
    }
    WgmmaProblem problem{*args, {}, {}, {}, 0, 0, 0, 0, 0};
    problem.N = static_cast<int>(w.N);
    problem.K = static_cast<int>(w.K);
    problem.gemm_k = args->transposed ? problem.N : problem.K;
    problem.gemm_n = args->transposed ? problem.K : problem.N;
    if (args->r <= 0) problem.lora_left = nullptr, problem.scaling = 0.0f;
    return with_16_bit_type(args->dtype, [&]<class T>(T*) { return launch_wgmma<T>(problem, stream); });
}

#endif
