// y[m, n] = sum_k x[m, k] w_hat[n, k] + bias[n] + scaling * sum_j s[m, j] B[n, j] for M <= 16, fp32 throughout.
//
// Bound by reading the packed weight once, so everything serves that stream: a warp owns ROWS rows of w (and, where N
// is small, a part of K, so that the machine is full), and fetches 512 bytes of each with one 16-byte cp.async per
// lane, kStages deep. It reads them back a word at a time: lane l takes words l, l + 32, ..., eight weights each, for
// which its slice of x is 16 contiguous bytes beside its neighbours'. Decoding straight from 16-byte registers would
// leave the lanes' slices of x 64 bytes apart and make L1 the bound from M = 4 on.
//
// Each lane computes the absmax of one 32-weight piece; a shuffle gives a word its own. Weights enter the products as
// code values: absmax multiplies the sum of eight. Rows of w must be whole 32-weight pieces: K % 32 == 0.
//
// At M = 1 the bound is instruction issue, so nothing is computed twice: indices count pieces in 32 bits, the
// pipeline's slot is carried along, and only rows of x that a tile may lack are tested for. docs/notebook has the
// counts.
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
constexpr int kSmallMDepth = 1024;  // k of one fetch: 32 lanes x a piece of 32 weights
constexpr int kPieceShift = 5;
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

struct SmallMProblem {
    const void* x;  // T [M, K]
    const uint8_t* packed;
    Absmax absmax;
    const void* bias;  // [N] of bias_type, or null
    int bias_type;
    const void* s;       // T [M, r], or null
    const void* lora_B;  // [N, r] of lora_type
    int lora_type, r;
    float scaling;
    void* y;  // T [M, N]
    int M, N, K;
    int warps_per_row;
};

template <int M_TILE, int ROWS>
struct SmallMShared {
    uint4 packed[kSmallMWarps][kSmallMStages][ROWS][32];
    float partial[kSmallMWarps][M_TILE * ROWS];
    CodeTable code;
};

template <typename T, int M_TILE, int ROWS>
__global__ void __launch_bounds__(kSmallMThreads, 2) linear_nf4_small_m_kernel(const SmallMProblem p) {
    using Shared = SmallMShared<M_TILE, ROWS>;
    Shared& shared = block_shared<Shared>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int rows_per_block = kSmallMWarps / p.warps_per_row * ROWS;
    const int n0 = int(blockIdx.x) * rows_per_block + warp / p.warps_per_row * ROWS;
    const int part = warp % p.warps_per_row;
    shared.code.fill(threadIdx.x);
    __syncthreads();

    // Rows past the end repeat the last one and are not stored.
    const int pieces = p.K / 32, fetches = ceil_div(pieces, 32), block_shift = p.absmax.block_shift - kPieceShift;
    uint32_t row_start[ROWS];  // index of its first piece
#pragma unroll
    for (int row = 0; row < ROWS; row++) row_start[row] = uint32_t(min(n0 + row, p.N - 1)) * pieces;

    auto fetch = [&](int index, int slot) {
        const int piece = index * 32 + lane;
        const bool valid = piece < pieces;
        const uint4* from = reinterpret_cast<const uint4*>(p.packed) + (valid ? piece : 0);
        if (index < fetches) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                ptx::cp_async<16>(&shared.packed[warp][slot][row][lane], from + row_start[row], valid);
            }
        }
        ptx::cp_async_commit();
    };
    // Past the end of K any absmax of the row will do: x is zero there.
    auto load_absmax = [&](float (&absmax)[ROWS], int index) {
        const int piece = min(index * 32 + lane, pieces - 1);
        uint32_t block[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) block[row] = (row_start[row] + piece) >> block_shift;
        first_levels(absmax, p.absmax, block);
    };

    float sum[M_TILE][ROWS] = {};
    float absmax[ROWS];
    for (int i = 0; i < kSmallMStages - 1; i++) fetch(part + i * p.warps_per_row, i);
    load_absmax(absmax, part);

    int slot = 0;
    for (int index = part; index < fetches; index += p.warps_per_row) {
        ptx::cp_async_wait<kSmallMStages - 2>();
        __syncwarp();  // every lane's bytes are there, and every lane has left the slot that is fetched into next
        fetch(index + (kSmallMStages - 1) * p.warps_per_row, slot == 0 ? kSmallMStages - 1 : slot - 1);
        float next_absmax[ROWS];
        load_absmax(next_absmax, index + p.warps_per_row);
        const uint32_t* words = reinterpret_cast<const uint32_t*>(shared.packed[warp][slot]) + lane;
        slot = slot == kSmallMStages - 1 ? 0 : slot + 1;
        const T* x_gl = static_cast<const T*>(p.x) + index * kSmallMDepth + lane * 8;
        // Unrolled, the compiler would gather the x of all four steps first, which many rows have no registers for.
#pragma unroll(M_TILE > 4 ? 1 : 4)
        for (int step = 0; step < 4; step++) {
            const bool valid = index * kSmallMDepth + lane * 8 + step * 256 < p.K;
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
#pragma unroll
        for (int row = 0; row < ROWS; row++) absmax[row] = next_absmax[row];
    }

    if (p.s && part == 0) {
        for (int j = lane; j < p.r; j += 32) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                const int64_t n = min(n0 + row, p.N - 1);
                const float b = p.scaling * load_any(p.lora_B, p.lora_type, n * p.r + j);
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
        float total = p.bias ? load_any(p.bias, p.bias_type, n) : 0.0f;
        for (int other = 0; other < p.warps_per_row; other++) {
            total += shared.partial[group * p.warps_per_row + other][i % (M_TILE * ROWS)];
        }
        static_cast<T*>(p.y)[int64_t(m) * p.N + n] = round_to<T>(total);
    }
}

namespace {

constexpr int kWarpsThatFill = 108 * 16;  // resident warps of a mid-size GPU at the kernel's registers

template <typename T, int M_TILE, int ROWS>
cudaError_t launch_small_m_tile(SmallMProblem problem, cudaStream_t stream) {
    const int groups = ceil_div(problem.N, ROWS), fetches = ceil_div(problem.K, kSmallMDepth);
    problem.warps_per_row = 1;
    while (problem.warps_per_row < kSmallMWarps && groups * problem.warps_per_row < kWarpsThatFill &&
           problem.warps_per_row < fetches) {
        problem.warps_per_row *= 2;
    }
    const dim3 grid(static_cast<unsigned>(ceil_div(problem.N, kSmallMWarps / problem.warps_per_row * ROWS)));
    return launch({grid, kSmallMThreads, 0, stream}, linear_nf4_small_m_kernel<T, M_TILE, ROWS>, problem);
}

template <typename T>
cudaError_t launch_small_m(const SmallMProblem& problem, cudaStream_t stream) {
    if (problem.M == 1) return launch_small_m_tile<T, 1, 4>(problem, stream);
    if (problem.M == 2) return launch_small_m_tile<T, 2, 4>(problem, stream);
    if (problem.M <= 4) return launch_small_m_tile<T, 4, 4>(problem, stream);
    if (problem.M <= 8) return launch_small_m_tile<T, 8, 2>(problem, stream);
    return launch_small_m_tile<T, 16, 2>(problem, stream);
}

}  // namespace
}  // namespace qlora

cudaError_t launch_linear_nf4_small_m(const void* x, int x_type, const uint8_t* packed, const float* absmax,
                                      const uint8_t* absmax_q, const float* absmax_scale, const float* absmax_offset,
                                      int block_shift, const void* bias, int bias_type, const void* s,
                                      const void* lora_B, int lora_type, int r, float scaling, void* y, int M, int N,
                                      int K, cudaStream_t stream) {
    using namespace qlora;
    const bool indexable = int64_t(N) * (K / 32) <= int64_t(UINT32_MAX);
    if (M < 1 || M > 16 || N < 1 || K < 32 || K % 32 || !indexable || !is_aligned(x, 16) || !is_aligned(packed, 16)) {
        return cudaErrorInvalidValue;
    }
    const SmallMProblem problem{x,       packed,    {absmax, absmax_q, absmax_scale, absmax_offset, block_shift},
                                bias,    bias_type, s,
                                lora_B,  lora_type, r,
                                scaling, y,         M,
                                N,       K,         1};
    switch (x_type) {
        case kFloat32:
            return launch_small_m<float>(problem, stream);
        case kBfloat16:
            return launch_small_m<__nv_bfloat16>(problem, stream);
        case kFloat16:
            return launch_small_m<__half>(problem, stream);
        default:
            return cudaErrorInvalidValue;
    }
}
