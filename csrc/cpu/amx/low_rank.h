// The narrow products of LoRA on AMX tiles: s = dropout(x) A^T and ds = scaling * grad_y B, from the tiles of x and
// grad_y that the large products also use.
#pragma once

#include "../lora.h"
#include "product.h"

namespace qlora::QLORA_ISA {

static inline int64_t rank_tiles(int64_t r) { return (r + kTileRows - 1) / kTileRows; }

// A [r, K] as L tiles [nibble_steps(K)][rank_tiles(r)] in scratch memory of the calling thread, rounded to bf16.
static inline const uint8_t* pack_lora_A(const Lora& lora, int64_t K) {
    const int64_t tiles = rank_tiles(lora.r), step_bytes = tiles * kTileBytes, padded = round_up(K, kGroup64);
    uint8_t* out = static_cast<uint8_t*>(workspace(Slot::kFactors, static_cast<size_t>(nibble_steps(K) * step_bytes)));
    parallel_tasks(tiles * kTileRows, [&](int64_t j) {
        uint8_t* to = out + j / kTileRows * kTileBytes + j % kTileRows * kTileRowBytes;
        for (int64_t k = 0; k < padded; k += kGroup128) {
            alignas(64) Bf16 row[kGroup128] = {};
            if (j < lora.r && k < K) factor_row<Bf16>(lora.A, j * K + k, std::min(kGroup128, K - k), 1.0f, row);
            pack_left_nibble_order(row, std::min(kGroup128, padded - k), to + k / kStep * step_bytes, step_bytes);
        }
    });
    return out;
}

// B [N, r] as R tiles [natural_steps(N)][rank_tiles(r)] of row pairs in scratch memory of the calling thread.
static inline const uint8_t* pack_lora_B(const Lora& lora, int64_t N) {
    const int64_t tiles = rank_tiles(lora.r), step_bytes = tiles * kTileBytes, steps = natural_steps(N);
    uint8_t* out = static_cast<uint8_t*>(workspace(Slot::kFactors, static_cast<size_t>(steps * step_bytes)));
    parallel_tasks(steps, [&](int64_t step) {
        for (int64_t p = 0; p < kTileRows; ++p) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                alignas(64) Bf16 rows[2][16] = {};
                const int64_t j = tile * 16, count = std::min<int64_t>(16, lora.r - j);
                for (int i = 0; i < 2; ++i) {
                    const int64_t n = step * kStep + 2 * p + i;
                    if (n < N) factor_row<Bf16>(lora.B, n * lora.r + j, count, 1.0f, rows[i]);
                }
                uint8_t* to = out + step * step_bytes + tile * kTileBytes + p * kTileRowBytes;
                interleave<16>(rows[0], rows[1], reinterpret_cast<uint32_t*>(to));
            }
        }
    });
    return out;
}

// sums[kL][kR] of whole contractions, with two tiles of a side at a time if there are two: with one accumulator, each
// product would wait for the latency of the previous one.
static inline void multiply_few(int left_tiles, int right_tiles, const uint8_t* left, int64_t left_step,
                                const uint8_t* right, int64_t right_step, int64_t steps, float* sums) {
    NoUnits none;
    const auto run = [&](auto l, auto r) {
        multiply_tiles<decltype(l)::value, decltype(r)::value, 0>(left, left_step, right, right_step, steps, sums,
                                                                  Sums::kZero, Sums::kMemory, none, 0);
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    if (left_tiles == 2) {
        right_tiles == 2 ? run(two, two) : run(two, one);
    } else {
        right_tiles == 2 ? run(one, two) : run(one, one);
    }
}

// s[m][j] = bf16(scale * sum_k x[m][k] A[j][k]) for the `rows` tokens of a block of `count` R tiles of x.
static inline void low_rank_of_x(const uint8_t* lora_A, const uint8_t* x, int count, int64_t steps, float scale,
                                 int64_t r, int64_t rows, Bf16* s) {
    const int64_t tiles = rank_tiles(r);
    const F32 factor = set1(scale);
    alignas(64) float sums[4 * kTileFloats];
    const TileSession session;
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        const int ranks = tiles - tile > 1 ? 2 : 1;
        multiply_few(ranks, count, lora_A + tile * kTileBytes, tiles * kTileBytes, x, count * kTileBytes, steps, sums);
        for (int i = 0; i < ranks; ++i) {
            const int64_t j = (tile + i) * 16;
            for (int t = 0; t < count; ++t) {
                __m512i v[16];  // [16 ranks][16 tokens], then transposed
#pragma GCC unroll 16
                for (int k = 0; k < 16; ++k) v[k] = _mm512_load_si512(sums + (i * count + t) * kTileFloats + 16 * k);
                transpose_registers(v);
                alignas(64) float tokens[16][16];
#pragma GCC unroll 16
                for (int k = 0; k < 16; ++k) _mm512_store_si512(tokens[k], v[k]);
                for (int64_t m = t * 16; m < rows && m < t * 16 + 16; ++m) {
                    store_sum_n(s + m * r + j, mul(load(tokens[m - t * 16]), factor),
                                static_cast<int>(std::min<int64_t>(16, r - j)));
                }
            }
        }
    }
}

// ds[m][j] = bf16(scaling * sum_n grad_y[m][n] B[n][j]) for the `rows` tokens of a block of `count` L tiles of grad_y.
static inline void low_rank_of_grad_y(const uint8_t* grad_y, const uint8_t* lora_B, int count, int64_t steps,
                                      float scaling, int64_t r, int64_t rows, Bf16* ds) {
    const int64_t tiles = rank_tiles(r);
    const F32 factor = set1(scaling);
    alignas(64) float sums[4 * kTileFloats];
    const TileSession session;
    for (int64_t tile = 0; tile < tiles; tile += 2) {
        const int ranks = tiles - tile > 1 ? 2 : 1;
        multiply_few(count, ranks, grad_y, count * kTileBytes, lora_B + tile * kTileBytes, tiles * kTileBytes, steps,
                     sums);
        for (int64_t m = 0; m < rows; ++m) {
            for (int i = 0; i < ranks; ++i) {
                const int64_t j = (tile + i) * 16;
                const float* row = sums + (m / 16 * ranks + i) * kTileFloats + m % 16 * 16;
                store_sum_n(ds + m * r + j, mul(load(row), factor), static_cast<int>(std::min<int64_t>(16, r - j)));
            }
        }
    }
}

}  // namespace qlora::QLORA_ISA
