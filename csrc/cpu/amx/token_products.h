// Products that contract over tokens: grad_A = ds^T dropout(x) and grad_B^T = s^T grad_y, [r, M] times [M, width].
//
// L tiles are the factors' columns (s or ds, transposed once per call). R tiles are pairs of rows of x or grad_y, which
// the task that uses them interleaves. A task computes 64 columns of the result. It interleaves 256 tokens at a time
// (32 KiB), multiplies them with every tile of ranks, and keeps the sums as fp32 tiles.
#pragma once

#include "low_rank.h"

namespace qlora::QLORA_ISA {

// The left operand of a product over tokens: row-major [M, r].
struct TokenFactors {
    const Bf16* data;
    int64_t r;
};

inline constexpr int64_t kTokenPiece = 256;

// The factors as L tiles [natural_steps(M)][rank_tiles(r)] in scratch memory of the calling thread: row j of a tile
// holds 32 tokens of rank j.
static inline const uint8_t* pack_factors(const TokenFactors& factors, int64_t M) {
    const int64_t r = factors.r, tiles = rank_tiles(r), steps = natural_steps(M);
    uint8_t* out = static_cast<uint8_t*>(workspace(Slot::kFactors, static_cast<size_t>(steps * tiles * kTileBytes)));
    parallel_tasks(steps, [&](int64_t step) {
        uint8_t* to = out + step * tiles * kTileBytes;
        memset(to, 0, static_cast<size_t>(tiles * kTileBytes));
        const int64_t m0 = step * kStep, count = std::min(kStep, M - m0);
        for (int64_t m = 0; m < count; ++m) {
            const Bf16* row = factors.data + (m0 + m) * r;
            for (int64_t j = 0; j < r; ++j) {
                memcpy(to + j / 16 * kTileBytes + j % 16 * kTileRowBytes + m * 2, row + j, sizeof(Bf16));
            }
        }
    });
    return out;
}

// Rows [m0, m0 + 32 steps) of 64 columns as R tiles [steps][4]; missing rows and columns are zeros.
static inline void pack_token_pairs(const TokenRows& rows, int64_t m0, int64_t steps, int64_t column0, uint8_t* out) {
    const __mmask32 low = rows.existing(column0), high = rows.existing(column0 + 32);
    for (int64_t p = 0; p < steps * kTileRows; ++p) {
        alignas(64) Bf16 pair[2][kGroup64];
        for (int i = 0; i < 2; ++i) {
            const int64_t m = m0 + 2 * p + i;
            _mm512_store_si512(pair[i], rows.load(m, column0, low));
            _mm512_store_si512(pair[i] + 32, rows.load(m, column0 + 32, high));
        }
        uint8_t* to = out + p / kTileRows * kStripTiles * kTileBytes + p % kTileRows * kTileRowBytes;
        for (int t = 0; t < 4; ++t) {
            interleave<16>(pair[0] + 16 * t, pair[1] + 16 * t, reinterpret_cast<uint32_t*>(to + t * kTileBytes));
        }
    }
}

// store(j, column, columns, sums): sums[i] = scale * sum_m factors[m][j] * rows[m][column + i], for i < columns <= 16.
template <class Store>
static void token_product(const TokenFactors& factors, const TokenRows& rows, float scale, const Store& store_sums) {
    const int64_t M = rows.rows, width = rows.length, tiles = rank_tiles(factors.r), steps = natural_steps(M);
    const uint8_t* left = pack_factors(factors, M);
    const F32 factor = set1(scale);
    parallel_tasks((width + kGroup64 - 1) / kGroup64, [&](int64_t strip) {
        const int64_t column0 = strip * kGroup64, piece_steps = kTokenPiece / kStep;
        uint8_t* pairs =
            static_cast<uint8_t*>(workspace(Slot::kPanel, static_cast<size_t>(piece_steps * kStripTiles * kTileBytes)));
        float* sums =
            static_cast<float*>(workspace(Slot::kPartial, static_cast<size_t>(tiles * kStripTiles * kTileBytes)));
        const TileSession session;
        NoUnits none;
        for (int64_t step = 0; step < steps; step += piece_steps) {
            const int64_t count = std::min(piece_steps, steps - step);
            pack_token_pairs(rows, step * kStep, count, column0, pairs);
            for (int64_t tile = 0; tile < tiles; ++tile) {
                multiply_tiles<1, 4, 0>(left + (step * tiles + tile) * kTileBytes, tiles * kTileBytes, pairs,
                                        kStripTiles * kTileBytes, count, sums + tile * kStripTiles * kTileFloats,
                                        step == 0 ? Sums::kZero : Sums::kMemory, Sums::kMemory, none, 0);
            }
        }
        for (int64_t j = 0; j < factors.r; ++j) {
            for (int64_t t = 0; t < kStripTiles && column0 + 16 * t < width; ++t) {
                alignas(64) float row[16];
                store(row, mul(load(sums + (j / 16 * kStripTiles + t) * kTileFloats + j % 16 * 16), factor));
                store_sums(j, column0 + 16 * t, std::min<int64_t>(16, width - column0 - 16 * t), row);
            }
        }
    });
}

}  // namespace qlora::QLORA_ISA
