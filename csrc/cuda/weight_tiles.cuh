// How a block of linear_nf4_gemm reads NF4 weights: as w^T for the forward product, as w for its gradient.
//
// One stage holds 256 pieces of 32 weights (16 bytes, one absmax each): 128 outputs by 64 of the contraction. Both
// kinds hand out the B fragments of mma.m16n8k16 decoded in registers; no decoded weight is written to shared memory.
//
// A warp owns 32 outputs as four n8 tiles. Column g of tile j is output 4 g + j of the 32, so that a thread's sums of
// the four tiles (columns 2t and 2t + 1 of each) are eight neighbouring outputs: one 16-byte store.
#pragma once

#include <cstdint>

#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4.cuh"

namespace qlora {

constexpr int kGemmWarps = 4;
constexpr int kGemmThreads = kGemmWarps * 32;
constexpr int kBlockOut = 128;                         // outputs of a block, 32 a warp
constexpr int kWarpTiles = 4;                          // n8 tiles of a warp
constexpr int kBlockDepth = 64;                        // contraction of a stage
constexpr int kPieces = kBlockOut * kBlockDepth / 32;  // of packed weights in a stage
constexpr int kPiecesPerThread = kPieces / kGemmThreads;

// Output of the block that stands at `position` (warp, tile, column): position = 32 warp + 8 tile + column.
__device__ __forceinline__ int output_at(int position) {
    return (position & ~31) + (position & 7) * 4 + (position >> 3 & 3);
}
// Sixteen-byte chunk `half` of the 32-byte row `position`. Eight neighbouring rows of one half fall into eight
// different groups of four banks.
__device__ __forceinline__ int row_chunk(int position, int half) { return position * 2 + (half ^ (position >> 2 & 1)); }

// Where a piece comes from and goes to.
struct Piece {
    int n, k;    // its first weight
    int packed;  // index of its 16 bytes in the stage
    int absmax;  // index of its absmax in the stage
};

// Byte offset in the code table of the high (even) or low (odd) nibble of byte `t` of a word.
__device__ __forceinline__ uint32_t even_offset(uint32_t word, int t) { return word >> (8 * t + 2) & 0x3C; }
__device__ __forceinline__ uint32_t odd_offset(uint32_t word, int t) {
    return __funnelshift_r(word, word, (8 * t + 30) & 31) & 0x3C;  // rotates right by 8 t - 2, which may be -2
}

// y = x w^T: outputs are rows of w, the contraction runs along k.
struct ForwardWeights {
    static __device__ __forceinline__ Piece piece(int index, int out0, int depth0) {
        const int position = index / 2, half = index % 2;
        return {out0 + output_at(position), depth0 + half * 32, row_chunk(position, half), half * kBlockOut + position};
    }

    // Contraction steps 2 * half and 2 * half + 1 of sixteen. Element k of the step is in byte k / 2 of its eight: the
    // pair (2t, 2t + 1) of a thread is byte t of a word, the pair 8 later byte t of the next.
    template <typename T>
    static __device__ __forceinline__ void fragments(uint32_t (&b)[2][kWarpTiles][2], const uint4* packed,
                                                     const float* absmax, const CodeTable& code, int half) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int tile = 0; tile < kWarpTiles; tile++) {
            const int position = warp * 32 + tile * 8 + g;
            const uint4 words = packed[row_chunk(position, half)];
            const float scale = absmax[half * kBlockOut + position];
            const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                b[i / 2][tile][i % 2] = pack_pair<T>(__fmul_rn(code.at(even_offset(word[i], t)), scale),
                                                     __fmul_rn(code.at(odd_offset(word[i], t)), scale));
            }
        }
    }
};

// grad_x = grad_y w: outputs are columns of w, the contraction runs along n.
struct TransposedWeights {
    // Chunk `q` (32 columns) of row `n` of the stage; four rows that lanes read at once fall into different banks.
    static __device__ __forceinline__ int chunk(int n, int q) { return n * 4 + (q ^ (n >> 1 & 3)); }

    static __device__ __forceinline__ Piece piece(int index, int out0, int depth0) {
        const int n = index / 4, q = index % 4;
        return {depth0 + n, out0 + q * 32, chunk(n, q), n * 4 + q};
    }

    // A thread's column g of the four tiles is columns 4g .. 4g + 3 of the warp's 32: one half word of each row.
    template <typename T>
    static __device__ __forceinline__ void fragments(uint32_t (&b)[2][kWarpTiles][2], const uint4* packed,
                                                     const float* absmax, const CodeTable& code, int half) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int step = 0; step < 2; step++) {
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {  // contraction 2t, 2t + 1, then 2t + 8, 2t + 9
                float value[2][kWarpTiles];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int n = half * 32 + step * 16 + pair * 8 + t * 2 + i;
                    const uint32_t nibbles = reinterpret_cast<const uint16_t*>(packed + chunk(n, warp))[g];
                    const float scale = absmax[n * 4 + warp];
                    value[i][0] = __fmul_rn(code.at(nibbles >> 2 & 0x3C), scale);
                    value[i][1] = __fmul_rn(code.at(nibbles << 2 & 0x3C), scale);
                    value[i][2] = __fmul_rn(code.at(nibbles >> 10 & 0x3C), scale);
                    value[i][3] = __fmul_rn(code.at(nibbles >> 6 & 0x3C), scale);
                }
#pragma unroll
                for (int tile = 0; tile < kWarpTiles; tile++) {
                    b[step][tile][pair] = pack_pair<T>(value[0][tile], value[1][tile]);
                }
            }
        }
    }
};

}  // namespace qlora
