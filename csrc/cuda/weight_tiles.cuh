// How a block of linear_nf4_gemm reads NF4 weights: as w^T for the forward product, as w for its gradient.
//
// One stage holds 256 chunks of 32 weights (16 bytes, one absmax each): 128 output columns by 64 of the contraction.
// Both readers decode the B fragments of mma.m16n8k16 in registers; no decoded weight is written to shared memory.
//
// A warp owns 32 output columns as four n8 tiles. Column g of tile j is output 4 g + j of the 32, so that a thread's
// sums of the four tiles (columns 2t and 2t + 1 of each) are eight neighbouring outputs: one 16-byte store.
//
//     slot (warp, tile j, column g)   0  1  2 ...  7 |  8  9 ... 15 | 16 ... 23 | 24 ... 31
//     output column of the warp       0  4  8 ... 28 |  1  5 ... 29 |  2 ... 30 |  3 ... 31
#pragma once

#include <cstdint>

#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4.cuh"

namespace qlora {

constexpr int kGemmWarps = 4;
constexpr int kGemmThreads = kGemmWarps * 32;
constexpr int kBlockN = 128;                     // output columns of a thread block, 32 a warp
constexpr int kWarpTiles = 4;                    // n8 tiles of a warp
constexpr int kBlockK = 64;                      // contraction of a stage
constexpr int kChunks = kBlockN * kBlockK / 32;  // of packed weights in a stage
constexpr int kChunksPerThread = kChunks / kGemmThreads;

// The output column, within the thread block, that slot = 32 warp + 8 tile + column holds.
__device__ __forceinline__ int column_of_slot(int slot) { return (slot & ~31) + (slot & 7) * 4 + (slot >> 3 & 3); }
// Position of 16-byte chunk `k_half` of the 32-byte row `slot`. The same chunk of eight neighbouring rows lies in
// eight different groups of four banks.
__device__ __forceinline__ int row_chunk(int slot, int k_half) { return slot * 2 + (k_half ^ (slot >> 2 & 1)); }

// Source and destination of the 32 weights of one 16-byte chunk.
struct WeightChunk {
    int n, k;    // its first weight
    int packed;  // index of its 16 bytes in the stage
    int absmax;  // index of its absmax in the stage
};

// Byte offset in the code table of the high (even) or low (odd) nibble of byte `t` of a word.
__device__ __forceinline__ uint32_t even_offset(uint32_t word, int t) { return word >> (8 * t + 2) & 0x3C; }
__device__ __forceinline__ uint32_t odd_offset(uint32_t word, int t) {
    return __funnelshift_r(word, word, (8 * t + 30) & 31) & 0x3C;  // rotates right by 8 t - 2, which may be -2
}

// y = x w^T: output columns are rows of w, the contraction runs along the columns of w.
struct ForwardWeights {
    static __device__ __forceinline__ WeightChunk chunk(int index, int n0, int k0) {
        const int slot = index / 2, k_half = index % 2;
        return {n0 + column_of_slot(slot), k0 + k_half * 32, row_chunk(slot, k_half), k_half * kBlockN + slot};
    }

    // The B fragments of contraction steps 2 * k_half and 2 * k_half + 1, sixteen of k each. One 32-bit word holds
    // eight consecutive k of one output column. Thread t = lane % 4 takes byte t of each word:
    //
    //     word of step     0                           1
    //     byte             0     1     2     3         0     1      2      3
    //     k of the step    0 1   2 3   4 5   6 7       8 9   10 11  12 13  14 15
    //     thread t         0     1     2     3         0     1      2      3
    //     register         b[0]                        b[1]
    template <typename T>
    static __device__ __forceinline__ void fragments(uint32_t (&b)[2][kWarpTiles][2], const uint4* packed,
                                                     const float* absmax, const CodeTable& code, int k_half) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int tile = 0; tile < kWarpTiles; tile++) {
            const int slot = warp * 32 + tile * 8 + g;
            const uint4 words = packed[row_chunk(slot, k_half)];
            const float scale = absmax[k_half * kBlockN + slot];
            const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                b[i / 2][tile][i % 2] = pack_pair<T>(__fmul_rn(code.at(even_offset(word[i], t)), scale),
                                                     __fmul_rn(code.at(odd_offset(word[i], t)), scale));
            }
        }
    }
};

// grad_x = grad_y w: output columns are columns of w, the contraction runs along the rows of w.
struct TransposedWeights {
    // Where chunk `q` (32 columns) of row `n` of the stage is stored; four rows that lanes read at once fall into
    // different banks.
    static __device__ __forceinline__ int swizzled(int n, int q) { return n * 4 + (q ^ (n >> 1 & 3)); }

    static __device__ __forceinline__ WeightChunk chunk(int index, int n0, int k0) {
        const int n = index / 4, q = index % 4;
        return {k0 + n, n0 + q * 32, swizzled(n, q), n * 4 + q};
    }

    // A thread's column g of the four tiles is columns 4g .. 4g + 3 of the warp's 32: one half word of each row.
    template <typename T>
    static __device__ __forceinline__ void fragments(uint32_t (&b)[2][kWarpTiles][2], const uint4* packed,
                                                     const float* absmax, const CodeTable& code, int k_half) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int step = 0; step < 2; step++) {
#pragma unroll
            for (int pair = 0; pair < 2; pair++) {  // contraction 2t, 2t + 1, then 2t + 8, 2t + 9
                float value[2][kWarpTiles];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int n = k_half * 32 + step * 16 + pair * 8 + t * 2 + i;
                    const uint32_t nibbles = reinterpret_cast<const uint16_t*>(packed + swizzled(n, warp))[g];
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
