// y = x w^T + bias + scaling s lora_B^T for M <= 64 rows of bf16 and blocks of 64, on tensor cores from the first row.
//
// A table in shared memory has one entry for each packed byte: the byte's two codes, times kPairScale, in bf16. Two
// instructions, a byte permutation and a load, turn a byte into an operand of mma.m16n8k16. The rows of w are the rows
// of the product and the rows of x its columns. absmax multiplies the fp32 sums of each block of 64 weights, so w_hat
// itself is never computed: docs/format.md compares the rounding with that of the other kernels.
//
//     line of the table, 256 bytes, one for each value of a byte
//     bytes 0 to 127     the entry, once in each bank; a lane reads the copy in the bank of its own number
//     bytes 128 to 255   packed weights of the cp.async pipeline, 32 KiB over all lines
//
// A warp owns 32 rows of w and reads every warps_per_row-th group of four blocks along K, so K must be a multiple of
// 256. The warps that share rows add their sums in order. A result depends on N, K and the GPU, not on M, on the other
// rows of x or on timing.
#include <algorithm>

#include "launchers.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4.cuh"
#include "qlora/ptx.cuh"
#include "qlora/shared_memory.cuh"

namespace qlora {

constexpr int kPairsWarps = 8;
constexpr int kPairsThreads = kPairsWarps * 32;
constexpr int kPairsRows = 32;    // rows of w of a warp: two tiles of 16
constexpr int kPairsBlockK = 64;  // weights that share an absmax; the k of a pipeline stage
constexpr int kGroupBlocks = 4;
constexpr int kGroupK = kGroupBlocks * kPairsBlockK;
constexpr int kPairsStages = kGroupBlocks;  // stage i holds block i of a group
constexpr int kPairsMostRows = 64;          // of x
constexpr int kPairsMostTile = 32;          // rows of x in a thread block; 64 would take all registers
constexpr int kLinesOfStage = kPairsRows * kPairsBlockK / 2 / 128;
constexpr int kLineChunks = 16;  // of 16 bytes
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// Of the scales in [1, 2) this one leaves the rounded codes the smallest mean squared error: 0.47 times that of
// rounding each weight to bf16. Results are divided by it in fp32.
constexpr float kPairScale = 1.436767578125f;

struct PairLine {
    uint32_t pair[32];
    uint4 packed[8];
};
static_assert(kPairsWarps * kPairsStages * kLinesOfStage == 256);

struct PairsShared {
    PairLine line[256];
    float absmax[kPairsWarps][2][kGroupBlocks][kPairsRows];  // of the present group and of the next one
    AbsmaxTable absmax_table;
};

// The sizes are 32-bit: with those of NF4Weight the compiler would compute addresses in 64 bits.
struct PairsProblem : LinearNF4PairsArgs {
    int N, K;
    int warps_per_row;
};

// The constants of the four blocks of a group in one row of w, as loaded. DOUBLE: whether they are double-quantized.
template <bool DOUBLE>
struct RawGroup;
template <>
struct RawGroup<false> {
    float4 absmax;

    static __device__ __forceinline__ RawGroup load(const NF4Weight& w, uint32_t first_block) {
        return {*reinterpret_cast<const float4*>(w.absmax + first_block)};
    }
    __device__ __forceinline__ float4 decode(const AbsmaxTable&, float) const { return absmax; }
};
template <>
struct RawGroup<true> {
    uint32_t q;  // four absmax_q
    float scale;

    static __device__ __forceinline__ RawGroup load(const NF4Weight& w, uint32_t first_block) {
        return {*reinterpret_cast<const uint32_t*>(w.absmax_q + first_block),
                w.absmax_scale[first_block >> kNestedShift]};
    }
    // An fp32 product and an fp32 sum, never fused.
    __device__ __forceinline__ float4 decode(const AbsmaxTable& table, float offset) const {
        auto absmax = [&](int i) {
            return __fadd_rn(__fmul_rn(table.value[__byte_perm(q, 0, 0x4440 + i)], scale), offset);
        };
        return make_float4(absmax(0), absmax(1), absmax(2), absmax(3));
    }
};

// Lane l computes one entry of the table; then the warp writes four entries at a time to all banks.
template <typename T>
__device__ __forceinline__ void fill_pairs(PairLine (&line)[256], int warp, int lane) {
    const int byte = warp * 32 + lane;
    const uint32_t pair = pack_pair<T>(nf4_code(byte >> 4) * kPairScale, nf4_code(byte & 15) * kPairScale);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int from = i * 4 + lane / 8;
        const uint32_t entry = __shfl_sync(kWholeWarp, pair, from);
        reinterpret_cast<uint4*>(line[warp * 32 + from].pair)[lane % 8] = make_uint4(entry, entry, entry, entry);
    }
}

// The products of one step of 16 along k in a warp: two tiles of 16 rows of w by all tiles of 8 rows of x.
//
// Row i of the tiles: tile `tile`, row g or g + 8, is row 4 g + 2 tile or 4 g + 2 tile + 1 of the warp, so that a
// thread (g = lane / 4, t = lane % 4) holds the sums of four neighbouring rows of w. The order of k within a block of
// 64 is free as long as both operands share it: thread t has k 16 t to 16 t + 15, of which step s takes 16 t + 4 s to
// + 3.
template <typename T, int M_TILE, bool DOUBLE>
__global__ void __launch_bounds__(kPairsThreads, M_TILE <= 16 ? 2 : 1) linear_nf4_pairs_kernel(const PairsProblem p) {
    constexpr int kTiles = M_TILE / 8;
    PairsShared& shared = dynamic_shared<PairsShared>();
    // Taken from lane 0, so that the compiler sees one value for the warp: loops that depend on it do not diverge.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(kWholeWarp, int(threadIdx.x) / 32, 0);
    const int g = lane / 4, t = lane % 4;
    const int part = warp % p.warps_per_row, groups_of_rows = kPairsWarps / p.warps_per_row;
    const int n0 = (int(blockIdx.x) * groups_of_rows + warp / p.warps_per_row) * kPairsRows;
    const int m0 = int(blockIdx.y) * M_TILE, rows_of_x = min(M_TILE, p.M - m0);
    // Rows past the end of w or x repeat the last one and are not stored.
    auto row_of_w = [&](int row) { return min(n0 + row, p.N - 1); };

    const int groups = p.K / kGroupK;
    const int first_group = groups * part / p.warps_per_row;
    const int own_groups = groups * (part + 1) / p.warps_per_row - first_group;  // at least one

    // Lane l copies pieces l and l + 32 of the 64 pieces of 16 bytes of a stage. Piece i goes to bytes 16 (i % 8) of
    // line i / 8 and holds half i % 2 of row 4 g' + i / 16, where g' = i / 8 % 2 * 4 + i % 8 / 2. So a half-warp that
    // reads 8 bytes a lane of rows 4 g + r, for one r, reads 128 adjacent bytes.
    const uint8_t* packed_gl[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = (lane / 8 % 2 * 4 + lane % 8 / 2) * 4 + lane / 16 + 2 * i;
        packed_gl[i] =
            p.weight.packed + int64_t(row_of_w(row)) * (p.K / 2) + first_group * (kGroupK / 2) + lane % 2 * 16;
    }
    const uint64_t policy = ptx::evict_first_policy();
    PairLine* const lines = &shared.line[warp * kPairsStages * kLinesOfStage];
    // Through a shuffle, so that the compiler keeps the index instead of computing it in every stage.
    const int first_chunk =
        __shfl_sync(kWholeWarp, (warp * kPairsStages * kLinesOfStage + lane / 8) * kLineChunks + 8 + lane % 8, lane);
    uint4* const packed_sh = reinterpret_cast<uint4*>(shared.line) + first_chunk;
    auto fetch = [&](int block, bool exists) {  // block: counted from the group at packed_gl
        if (exists) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                ptx::cp_async_once(packed_sh + (block % kPairsStages * kLinesOfStage + 4 * i) * kLineChunks,
                                   packed_gl[i] + block * (kPairsBlockK / 2), policy);
            }
        }
        ptx::cp_async_commit();
    };
    // Lane l has the constants of row l, loaded a group before they are decoded.
    const float offset = DOUBLE ? __ldg(p.weight.absmax_offset) : 0.0f;
    uint32_t first_block = uint32_t(row_of_w(lane)) * uint32_t(groups * kGroupBlocks) + first_group * kGroupBlocks;
    auto load_constants = [&](int group) {  // group: counted from the group at first_block
        return RawGroup<DOUBLE>::load(p.weight, first_block + group * kGroupBlocks);
    };
    auto store_constants = [&](int buffer, const RawGroup<DOUBLE>& raw) {
        const float4 absmax = raw.decode(shared.absmax_table, offset);
        auto& to = shared.absmax[warp][buffer];
        to[0][lane] = absmax.x, to[1][lane] = absmax.y, to[2][lane] = absmax.z, to[3][lane] = absmax.w;
    };

    const T* x_gl[kTiles];
    uint4 x[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
        const int m = min(m0 + tile * 8 + g, p.M - 1);
        x_gl[tile] = static_cast<const T*>(p.x) + int64_t(m) * p.K + first_group * kGroupK + t * 16;
    }
    auto load_x = [&](int tile, int block) {  // block: counted from the group at x_gl
        const uint4* from = reinterpret_cast<const uint4*>(x_gl[tile] + block * kPairsBlockK);
        x[tile][0] = from[0], x[tile][1] = from[1];
    };

#pragma unroll
    for (int block = 0; block < kPairsStages - 1; block++) fetch(block, true);
    const RawGroup<DOUBLE> first = load_constants(0);
    RawGroup<DOUBLE> raw = load_constants(own_groups > 1 ? 1 : 0);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) load_x(tile, 0);
    // The tables are filled while the first fetches are on their way.
    fill_pairs<T>(shared.line, warp, lane);
    shared.absmax_table.template fill<kPairsThreads>(threadIdx.x);

    float sum[kTiles][2][4] = {};
    if (p.s && part == 0) {
        // Step s of r: thread t has j = 16 s + 4 t to + 3, in both operands. Unrolled, it would spill.
#pragma unroll 1
        for (int j = t * 4; j - t * 4 < p.r; j += 16) {
            auto load = [&](const void* matrix, int64_t row) {
                const T* from = static_cast<const T*>(matrix) + row * p.r + j;
                return j < p.r ? *reinterpret_cast<const uint2*>(from) : make_uint2(0, 0);
            };
            uint32_t a[2][4];
#pragma unroll
            for (int row = 0; row < 4; row++) {
                const uint2 words = load(p.lora_B, row_of_w(4 * g + row));
                a[row / 2][row % 2] = words.x, a[row / 2][2 + row % 2] = words.y;
            }
#pragma unroll
            for (int tile = 0; tile < kTiles; tile++) {
                const uint2 words = load(p.s, min(m0 + tile * 8 + g, p.M - 1));
                const uint32_t b[2] = {words.x, words.y};
                ptx::mma_m16n8k16<T>(sum[tile][0], a[0], b);
                ptx::mma_m16n8k16<T>(sum[tile][1], a[1], b);
            }
        }
        const float scaling = p.scaling * kPairScale;
#pragma unroll
        for (int i = 0; i < kTiles * 8; i++) sum[i / 8][i / 4 % 2][i % 4] *= scaling;
    }
    __syncthreads();

    const char* const table = reinterpret_cast<const char*>(shared.line);
    const uint32_t bank = lane * 4;
    // The byte becomes bits 8 to 15 of the offset, the lane's bank bits 2 to 6: one instruction.
    auto pair_of = [&](uint32_t word, int byte) {
        return *reinterpret_cast<const uint32_t*>(table + __byte_perm(word, bank, 0x5504 | byte << 4));
    };
    const uint2* const words_sh = reinterpret_cast<const uint2*>(lines[g / 4].packed) + g % 4 * 4 + t;
    constexpr int kLineWords = sizeof(PairLine) / sizeof(uint2);

    store_constants(0, first);
    int buffer = 0;
    for (int left = own_groups * kGroupBlocks; left > 0; left -= kGroupBlocks) {
#pragma unroll
        for (int j = 0; j < kGroupBlocks; j++) {
            ptx::cp_async_wait<kPairsStages - 2>();
            __syncwarp();  // every lane's bytes are there, and every lane has left the stage that is fetched into next
            fetch(j + kPairsStages - 1, j == 0 || left > kGroupBlocks);
            if (j == 2) {
                store_constants(buffer ^ 1, raw);
                if (left > 2 * kGroupBlocks) raw = load_constants(2);
            }
            const float4 scales = *reinterpret_cast<const float4*>(&shared.absmax[warp][buffer][j][4 * g]);
            const float scale[4] = {scales.x, scales.y, scales.z, scales.w};
            uint32_t a[2][4][4];  // tile, step of 16 along k
#pragma unroll
            for (int row = 0; row < 4; row++) {
                const uint2 words = words_sh[(j * kLinesOfStage + row * 2) * kLineWords];
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    const uint32_t word = s < 2 ? words.x : words.y;
                    a[row / 2][s][row % 2] = pair_of(word, s % 2 * 2);
                    a[row / 2][s][2 + row % 2] = pair_of(word, s % 2 * 2 + 1);
                }
            }
#pragma unroll
            for (int tile = 0; tile < kTiles; tile++) {
                const uint32_t b[4][2] = {{x[tile][0].x, x[tile][0].y},
                                          {x[tile][0].z, x[tile][0].w},
                                          {x[tile][1].x, x[tile][1].y},
                                          {x[tile][1].z, x[tile][1].w}};
                float product[2][4];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    ptx::mma_m16n8k16_from_zero(product[half], a[half][0], b[0]);
#pragma unroll
                    for (int s = 1; s < 4; s++) ptx::mma_m16n8k16<T>(product[half], a[half][s], b[s]);
                }
                // Into the registers that the products have just read.
                if (j < kGroupBlocks - 1 || left > kGroupBlocks) load_x(tile, j + 1);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    sum[tile][i / 4][i % 4] = fmaf(scale[i / 2], product[i / 4][i % 4], sum[tile][i / 4][i % 4]);
                }
            }
            // Never true. A branch keeps the compiler from moving loads of later stages up, for which registers lack.
            if (left <= j) break;
        }
        buffer ^= 1;
        first_block += kGroupBlocks;
        packed_gl[0] += kGroupK / 2, packed_gl[1] += kGroupK / 2;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) x_gl[tile] += kGroupK;
    }

    // The sums take the memory of the table. Chunk c of a row of x holds rows 4 c to 4 c + 3 of w, at place c ^ (m &
    // 7).
    __syncthreads();
    float4* const sums_sh = reinterpret_cast<float4*>(shared.line);
    static_assert(sizeof(float4) * kPairsWarps * M_TILE * 8 <= sizeof shared.line);
#pragma unroll
    for (int tile = 0; tile < kTiles; tile++) {
#pragma unroll
        for (int column = 0; column < 2; column++) {
            const int m = tile * 8 + t * 2 + column;
            const auto& s = sum[tile];
            sums_sh[(warp * M_TILE + m) * 8 + (g ^ (m & 7))] =
                make_float4(s[0][column], s[0][2 + column], s[1][column], s[1][2 + column]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < groups_of_rows * rows_of_x * 8; i += kPairsThreads) {
        const int chunk = i % 8, m = i / 8 % rows_of_x, group = i / 8 / rows_of_x;
        const int n = (int(blockIdx.x) * groups_of_rows + group) * kPairsRows + chunk * 4;
        float total[4] = {};
        for (int other = 0; other < p.warps_per_row; other++) {
            const float4 each = sums_sh[((group * p.warps_per_row + other) * M_TILE + m) * 8 + (chunk ^ (m & 7))];
            total[0] += each.x, total[1] += each.y, total[2] += each.z, total[3] += each.w;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            total[k] *= 1.0f / kPairScale;
            if (p.bias.data && n + k < p.N) total[k] += load_any(p.bias, n + k);
        }
        T* to = static_cast<T*>(p.y) + int64_t(m0 + m) * p.N + n;
        if (p.N % 4 == 0) {
            const uint2 words = make_uint2(pack_pair<T>(total[0], total[1]), pack_pair<T>(total[2], total[3]));
            if (n < p.N) *reinterpret_cast<uint2*>(to) = words;
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (n + k < p.N) to[k] = round_to<T>(total[k]);
            }
        }
    }
}

namespace {

// How many warps share rows of w, which does not depend on M, so that the order of a sum does not. One group of blocks
// is added for a warp's begin and end; warps beyond the resident ones wait.
int pairs_warps_per_row(int64_t N, int64_t K, int multiprocessors) {
    constexpr int kResidentWarps = 2 * kPairsWarps;
    const int64_t rows = ceil_div<int64_t>(N, kPairsRows), groups = K / kGroupK;
    const int64_t resident = int64_t(multiprocessors) * kResidentWarps;
    int best = 1;
    int64_t least = INT64_MAX;
    for (int warps = 1; warps <= kPairsWarps && warps <= groups; warps *= 2) {
        const int64_t cost = (ceil_div<int64_t>(groups, warps) + 1) * std::max(resident, rows * warps);
        if (cost < least) least = cost, best = warps;
    }
    return best;
}

template <int M_TILE, bool DOUBLE>
cudaError_t launch_pairs_tile(const PairsProblem& problem, cudaStream_t stream) {
    const auto kernel = linear_nf4_pairs_kernel<__nv_bfloat16, M_TILE, DOUBLE>;
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(PairsShared));
    if (error != cudaSuccess) return error;
    const int rows = kPairsWarps / problem.warps_per_row * kPairsRows;
    const dim3 grid(static_cast<unsigned>(ceil_div(problem.N, rows)),
                    static_cast<unsigned>(ceil_div(problem.M, M_TILE)));
    return launch({grid, kPairsThreads, sizeof(PairsShared), stream}, kernel, problem);
}

// The rows of x of a thread block, a multiple of 8. More than kPairsMostTile rows are divided evenly between two
// blocks.
int pairs_tile(int M) {
    const int blocks = ceil_div(M, kPairsMostTile);
    return ceil_div(ceil_div(M, blocks), 8) * 8;
}

template <bool DOUBLE>
cudaError_t launch_pairs(const PairsProblem& problem, cudaStream_t stream) {
    switch (pairs_tile(problem.M)) {
        case 8:
            return launch_pairs_tile<8, DOUBLE>(problem, stream);
        case 16:
            return launch_pairs_tile<16, DOUBLE>(problem, stream);
        case 24:
            return launch_pairs_tile<24, DOUBLE>(problem, stream);
        default:
            return launch_pairs_tile<kPairsMostTile, DOUBLE>(problem, stream);
    }
}

}  // namespace
}  // namespace qlora

int linear_nf4_pairs_tile(int M) { return qlora::pairs_tile(M); }

int linear_nf4_pairs_warps_per_row(int64_t N, int64_t K, int multiprocessors) {
    return qlora::pairs_warps_per_row(N, K, multiprocessors);
}

cudaError_t launch_linear_nf4_pairs(const qlora::LinearNF4PairsArgs* args, cudaStream_t stream) {
    using namespace qlora;
    const NF4Weight& w = args->weight;
    bool aligned = true;
    for (const void* pointer : {args->x, static_cast<const void*>(w.packed), static_cast<const void*>(w.absmax),
                                args->s, args->lora_B, static_cast<const void*>(args->y)}) {
        aligned = aligned && is_aligned(pointer, 16);
    }
    aligned = aligned && is_aligned(w.absmax_q, 4);
    if (args->M < 1 || args->M > kPairsMostRows || args->multiprocessors < 1 || w.N < 1 || w.N > INT32_MAX - 256 ||
        w.K < kGroupK || w.K > INT32_MAX || w.K % kGroupK || 1 << w.block_shift != kPairsBlockK ||
        w.N * (w.K / kPairsBlockK) > int64_t(UINT32_MAX) || args->r % 8 || !aligned) {
        return cudaErrorInvalidValue;
    }
    PairsProblem problem{*args};
    problem.N = static_cast<int>(w.N);
    problem.K = static_cast<int>(w.K);
    problem.warps_per_row = pairs_warps_per_row(w.N, w.K, args->multiprocessors);
    if (args->r <= 0) problem.s = nullptr;
    return w.absmax ? launch_pairs<false>(problem, stream) : launch_pairs<true>(problem, stream);
}
