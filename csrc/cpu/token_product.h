// Products that contract over tokens, for the gradients of the low-rank factors with bf16 pairs:
//
//     c[j][n] = sum_m F[m][j] * rows[m][n]
//
// F has few columns, so that each element of the rows takes part in few products, and a panel of the rows would cost
// about as much as they do. Therefore the rows are read in place, and two of them are interleaved in registers.
#pragma once

#include "pack.h"

namespace qlora::QLORA_ISA {

#ifdef __AVX512BF16__
// Tokens by which rows are prefetched: hardware prefetchers do not detect short pieces of many rows.
inline constexpr int64_t kPrefetchTokens = 16;

// c[kRows][2 * kLanes] = sum over M tokens of the factors a, as lhs_transposed lays them out, `step` elements from pair
// to pair, times `columns` <= 2 * kLanes columns of rows that are `width` elements apart. The other columns of c are
// zero.
template <int kRows>
static void token_tile(const Bf16* a, int64_t step, const Bf16* rows, int64_t width, int64_t M, int64_t columns,
                       float* c) {
    const __mmask32 inside = columns < 2 * kLanes ? (1u << columns) - 1 : 0xffffffff;
    F32 acc[kRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) acc[i][0] = acc[i][1] = zero();
    for (int64_t m = 0; m < M; m += 2) {
        const Bf16* row = rows + m * width;
        const __m512i first = _mm512_maskz_loadu_epi16(inside, row);
        const __m512i second = m + 1 < M ? _mm512_maskz_loadu_epi16(inside, row + width) : _mm512_setzero_si512();
        __builtin_prefetch(rows + std::min(m + kPrefetchTokens, M - 1) * width);
        __builtin_prefetch(rows + std::min(m + kPrefetchTokens + 1, M - 1) * width);
        const __m512i low = interleaved<0>(first, second), high = interleaved<1>(first, second);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const __m512i pair = Bf16Dot::broadcast(a + 2 * i);
            acc[i][0] = Bf16Dot::mac(acc[i][0], pair, low);
            acc[i][1] = Bf16Dot::mac(acc[i][1], pair, high);
        }
        a += step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        store(c + 2 * i * kLanes, acc[i][0]);
        store(c + (2 * i + 1) * kLanes, acc[i][1]);
    }
}

// token_tile for a number of rows that is known only at run time.
template <int kRows = kMaxRows>
static auto token_tile_for(int rows) -> decltype(&token_tile<1>) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return token_tile_for<kRows - 1>(rows);
    }
    return token_tile<kRows>;
}

// finish(tile, column0, columns, c) for each tile of the factors a (lhs_transposed) and each strip of two vectors of
// the [M, width] rows.
template <class Finish>
static void token_product(const LhsView<Bf16Dot>& a, const Bf16* rows, int64_t M, int64_t width, const Finish& finish) {
    constexpr int64_t kStrip = 2 * kLanes;
    parallel_ranges(width, kStrip, [&](int64_t begin, int64_t end) {
        alignas(64) float c[kMaxRows * kStrip];
        for (int64_t column = begin; column < end; column += kStrip) {
            const int64_t columns = std::min(kStrip, end - column);
            for (int64_t tile = 0; tile < a.tiling.count; ++tile) {
                token_tile_for(a.tiling.size(tile))(a.data + a.tiling.begin(tile) * a.stride, a.step, rows + column,
                                                    width, M, columns, c);
                finish(tile, column, columns, c);
            }
        }
    });
}
#endif

}  // namespace qlora::QLORA_ISA
