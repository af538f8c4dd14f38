// y[m, n] = sum_k x[m, k] w_hat[n, k] + bias[n] + scaling * sum_j s[m, j] B[n, j] for M <= 16, fp32 throughout.
//
// The kernel is bound by reading the packed weight once. A warp owns ROWS rows of w (and, where N is small, a part of
// K, so that the GPU is full). It fetches 512 bytes of each row with one 16-byte cp.async per lane, kSmallMStages deep,
// and reads them back a word at a time: lane l takes words l, l + 32, ..., eight weights each, for which its slice of x
// is 16 bytes next to those of its neighbours. Decoding from 16-byte registers instead would leave the lanes' slices of
// x 64 bytes apart and make L1 the bound from M = 4 on.
//
// Each lane computes the absmax of one chunk of 32 weights; a shuffle hands it to the lanes that read its words.
// Weights enter the products as code values: absmax multiplies the sum of eight. Rows of w must be whole chunks: K % 32
// == 0.
//
// At M = 1 the bound is instruction issue. So indices count chunks in 32 bits, the index of the pipeline stage is
// carried from fetch to fetch, and only rows of x that a tile may lack are tested for. docs/notebook has the
// instruction counts.
#include <algorithm>

#include "launchers.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4.cuh"
#include "qlora/ptx.cuh"
#include "qlora/shared_memory.cuh"

namespace qlora {

constexpr int kSmallMWarps = 4;
constexpr int kSmallMThreads = kSmallMWarps * 32;
constexpr int kSmallMStages = 3;
constexpr int kSmallMFetchK = 1024;  // k of one fetch: 32 lanes x a chunk of 32 weights
constexpr int kChunkShift = 5;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// The sizes are 32-bit: with those of NF4Weight the compiler would compute addresses in 64 bits.
struct SmallMProblem : LinearNF4SmallMArgs {
    int N, K;
    int warps_per_row;
};

template <int M_TILE, int ROWS>
struct SmallMShared {
    uint4 packed[kSmallMWarps][kSmallMStages][ROWS][32];
    float partial[kSmallMWarps][M_TILE * ROWS];
    AbsmaxTable absmax;
    CodeTable code;
};

template <typename T, int M_TILE, int ROWS>
__global__ void __launch_bounds__(kSmallMThreads, 2) linear_nf4_small_m_kernel(const SmallMProblem p) {
    using Shared = SmallMShared<M_TILE, ROWS>;
    Shared& shared = block_shared<Shared>();
    // Taken from lane 0, so that the compiler sees one value for the warp: loops that depend on it do not diverge.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(kWholeWarp, int(threadIdx.x) / 32, 0);
    const int rows_per_block = kSmallMWarps / p.warps_per_row * ROWS;
    const int n0 = int(blockIdx.x) * rows_per_block + warp / p.warps_per_row * ROWS;
    const int part = warp % p.warps_per_row;
    const AbsmaxReader constants(p.weight);

    // Rows past the end repeat the last one and are not stored.
    const int chunks = p.K / 32, fetches = ceil_div(chunks, 32), block_shift = p.weight.block_shift - kChunkShift;
    uint32_t row_start[ROWS];  // index of its first chunk
#pragma unroll
    for (int row = 0; row < ROWS; row++) row_start[row] = uint32_t(min(n0 + row, p.N - 1)) * chunks;

    auto fetch = [&](int index, int stage) {
        const int chunk = index * 32 + lane;
        const bool valid = chunk < chunks;
        const uint4* from = reinterpret_cast<const uint4*>(p.weight.packed) + (valid ? chunk : 0);
        if (index < fetches) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                ptx::cp_async<16>(&shared.packed[warp][stage][row][lane], from + row_start[row], valid);
            }
        }
        ptx::cp_async_commit();
    };
    // Past the end of K any absmax of the row will do: x is zero there.
    auto load_absmax = [&](RawAbsmax(&raw)[ROWS], int index) {
        const int chunk = min(index * 32 + lane, chunks - 1);
#pragma unroll
        for (int row = 0; row < ROWS; row++) raw[row] = constants.load((row_start[row] + chunk) >> block_shift);
    };

    float sum[M_TILE][ROWS] = {};
    RawAbsmax raw[ROWS];
    load_absmax(raw, part);
    for (int i = 0; i < kSmallMStages - 1; i++) fetch(part + i * p.warps_per_row, i);
    // The tables are filled while the first fetches are on their way.
    shared.code.fill(threadIdx.x);
    shared.absmax.template fill<kSmallMThreads>(threadIdx.x);
    __syncthreads();

    int stage = 0;
    for (int index = part; index < fetches; index += p.warps_per_row) {
        ptx::cp_async_wait<kSmallMStages - 2>();
        __syncwarp();  // every lane's bytes are there, and every lane has left the stage that is fetched into next
        fetch(index + (kSmallMStages - 1) * p.warps_per_row, stage == 0 ? kSmallMStages - 1 : stage - 1);
        float absmax[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) absmax[row] = constants.decode(shared.absmax, raw[row]);
        load_absmax(raw, index + p.warps_per_row);  // first used a step later
        const uint32_t* words = reinterpret_cast<const uint32_t*>(shared.packed[warp][stage]) + lane;
        stage = stage == kSmallMStages - 1 ? 0 : stage + 1;
        const T* x_gl = static_cast<const T*>(p.x) + index * kSmallMFetchK + lane * 8;
        // Unrolled, the compiler would gather the x of all four steps first, which many rows have no registers for.
#pragma unroll(M_TILE > 4 ? 1 : 4)
        for (int step = 0; step < 4; step++) {
            const bool valid = index * kSmallMFetchK + lane * 8 + step * 256 < p.K;
            float w[ROWS][8], scale[ROWS];
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                shared.code.decode8(w[row], words[row * 128 + step * 32]);
                scale[row] = __shfl_sync(kWholeWarp, absmax[row], lane / 4 + step * 8);
            }
#pragma unroll
            for (int m = 0; m < M_TILE; m++) {
                float x[8];
                // A tile is chosen for more than half its rows.
                load8_or_zeros(x, x_gl + int64_t(m) * p.K + step * 256, valid && (m <= M_TILE / 2 || m < p.M));
#pragma unroll
                for (int row = 0; row < ROWS; row++) {
                    float product = x[0] * w[row][0];
#pragma unroll
                    for (int i = 1; i < 8; i++) product = fmaf(x[i], w[row][i], product);
                    sum[m][row] = fmaf(product, scale[row], sum[m][row]);
                }
            }
        }
    }

    if (p.s && part == 0) {
        for (int j = lane; j < p.r; j += 32) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                const int64_t n = min(n0 + row, p.N - 1);
                const float b = p.scaling * load_any(p.lora_B, n * p.r + j);
#pragma unroll
                for (int m = 0; m < M_TILE; m++) {
                    if (m < p.M)
                        sum[m][row] = fmaf(to_float(static_cast<const T*>(p.s)[int64_t(m) * p.r + j]), b, sum[m][row]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < M_TILE; m++) {
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            float total = sum[m][row];
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(kWholeWarp, total, distance);
            if (lane == 0) shared.partial[warp][m * ROWS + row] = total;
        }
    }
    __syncthreads();
    // The warps that shared a row are added in order: the result does not depend on timing.
    for (int i = threadIdx.x; i < rows_per_block * M_TILE; i += kSmallMThreads) {
        const int group = i / (M_TILE * ROWS), m = i % (M_TILE * ROWS) / ROWS;
        const int n = int(blockIdx.x) * rows_per_block + group * ROWS + i % ROWS;
        if (m >= p.M || n >= p.N) continue;
        float total = p.bias.data ? load_any(p.bias, n) : 0.0f;
        for (int other = 0; other < p.warps_per_row; other++) {
            total += shared.partial[group * p.warps_per_row + other][i % (M_TILE * ROWS)];
        }
        static_cast<T*>(p.y)[int64_t(m) * p.N + n] = round_to<T>(total);
    }
}

namespace {

constexpr int kResidentWarps = 16;  // of a multiprocessor, at the kernel's registers

// Rows of w of one warp: more rows of x leave registers for fewer.
constexpr int rows_of_warp(int M) { return M <= 4 ? 4 : 2; }

// How many warps share a row. One fetch is added for a warp's begin and end; warps beyond the resident ones wait.
int warps_per_row(int M, int64_t N, int64_t K, int multiprocessors) {
    const int64_t groups = ceil_div<int64_t>(N, rows_of_warp(M)), fetches = ceil_div<int64_t>(K, kSmallMFetchK);
    const int64_t resident = int64_t(multiprocessors) * kResidentWarps;
    int best = 1;
    int64_t least = INT64_MAX;
    for (int warps = 1; warps <= kSmallMWarps && warps <= fetches; warps *= 2) {
        const int64_t cost = (ceil_div<int64_t>(fetches, warps) + 1) * std::max(resident, groups * warps);
        if (cost < least) least = cost, best = warps;
    }
    return best;
}

template <typename T, int M_TILE, int ROWS>
cudaError_t launch_small_m_tile(const LinearNF4SmallMArgs& args, cudaStream_t stream) {
    SmallMProblem problem{args};
    problem.N = static_cast<int>(args.weight.N);
    problem.K = static_cast<int>(args.weight.K);
    static_assert(ROWS == rows_of_warp(M_TILE));
    problem.warps_per_row = warps_per_row(M_TILE, problem.N, problem.K, args.multiprocessors);
    const dim3 grid(static_cast<unsigned>(ceil_div(problem.N, kSmallMWarps / problem.warps_per_row * ROWS)));
    return launch({grid, kSmallMThreads, 0, stream}, linear_nf4_small_m_kernel<T, M_TILE, ROWS>, problem);
}

template <typename T>
cudaError_t launch_small_m(const LinearNF4SmallMArgs& args, cudaStream_t stream) {
    if (args.M == 1) return launch_small_m_tile<T, 1, 4>(args, stream);
    if (args.M == 2) return launch_small_m_tile<T, 2, 4>(args, stream);
    if (args.M <= 4) return launch_small_m_tile<T, 4, 4>(args, stream);
    if (args.M <= 8) return launch_small_m_tile<T, 8, 2>(args, stream);
    return launch_small_m_tile<T, 16, 2>(args, stream);
}

}  // namespace
}  // namespace qlora

int linear_nf4_small_m_warps_per_row(int M, int64_t N, int64_t K, int multiprocessors) {
    return qlora::warps_per_row(M, N, K, multiprocessors);
}

cudaError_t launch_linear_nf4_small_m(const qlora::LinearNF4SmallMArgs* args, cudaStream_t stream) {
    using namespace qlora;
    const int64_t N = args->weight.N, K = args->weight.K;
    if (args->M < 1 || args->M > 16 || args->multiprocessors < 1 || N < 1 || N > INT32_MAX || K < 32 || K > INT32_MAX ||
        K % 32 || N * (K / 32) > int64_t(UINT32_MAX) || !is_aligned(args->x, 16) ||
        !is_aligned(args->weight.packed, 16)) {
        return cudaErrorInvalidValue;
    }
    return with_float_type(args->dtype, [&]<class T>(T*) { return launch_small_m<T>(*args, stream); });
}
