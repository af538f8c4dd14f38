// The low-rank products beside the quantized one. All are the same tiles and panels (gemm.h); only the operands differ.
#pragma once

#include <type_traits>

#include "linear.h"
#include "ops.h"

namespace qlora::QLORA_ISA {

// Panel strips of a factor, prepared once for all columns: [strip][steps][kColumns][kPair].
template <class Mac>
struct Factor {
    const typename Mac::Elem* strips;
    int64_t steps;

    const typename Mac::Elem* strip(int64_t column0) const { return strips + column0 * steps * Mac::kPair; }
};

template <class Mac>
static typename Mac::Elem* factor_space(int64_t columns, int64_t r) {
    const int64_t padded = (columns + kColumns - 1) / kColumns * kColumns;
    const size_t elements = static_cast<size_t>(padded * steps_of<Mac>(r) * Mac::kPair);
    return static_cast<typename Mac::Elem*>(workspace(Slot::kFactors, elements * sizeof(typename Mac::Elem)));
}

// Columns n of scale * B^T, for y += s (scale B)^T; B is [N, r].
template <class Mac, class T>
static Factor<Mac> factor_from_rows(const AnyFloat& b, int64_t N, int64_t r, float scale) {
    typename Mac::Elem* space = factor_space<Mac>(N, r);
    const int64_t steps = steps_of<Mac>(r);
    fill_from_rows<Mac, kColumns>(0, N, 0, steps, r, space,
                                  [&](int64_t n, int64_t begin, int64_t count, typename Mac::Elem* dst) {
                                      factor_row<T>(b, n * r + begin, count, scale, dst);
                                  });
    return {space, steps};
}

// Columns k of A, for grad_x += ds A; A is [r, K].
template <class Mac, class T>
static Factor<Mac> factor_from_columns(const AnyFloat& a, int64_t K, int64_t r) {
    typename Mac::Elem* space = factor_space<Mac>(K, r);
    const int64_t steps = steps_of<Mac>(r);
    constexpr int64_t kWidest = kColumns * kMaxGroup;
    for (int64_t k = 0; k < K; k += kWidest) {
        fill_from_columns<Mac, kColumns>(k, K - k < kWidest ? K - k : kWidest, 0, steps, r,
                                         space + k * steps * Mac::kPair,
                                         [&](int64_t j, int64_t begin, int64_t count, typename Mac::Elem* dst) {
                                             factor_row<T>(a, j * K + begin, count, 1.0f, dst);
                                         });
    }
    return {space, steps};
}

// out[m, j] = scale * sum_l a[m, l] * B[l, j] for a narrow B: one strip of kLanes columns where r allows.
template <class Mac, class T, class Fill>
static void narrow_product(const Rows<Mac>& a, int64_t r, float scale, const Fill& fill, T* out) {
    const F32 factor = set1(scale);
    const auto run = [&](auto vectors) {
        constexpr int kWidth = decltype(vectors)::value * kLanes;
        panel_gemm<Mac, decltype(vectors)::value>(
            a, r,
            [&](int64_t column0, int64_t columns, int64_t step0, int64_t step1, typename Mac::Elem* panel) {
                fill(std::integral_constant<int, kWidth>(), column0, columns, step0, step1, panel);
            },
            [&](int64_t tile, int64_t, int64_t, float* c) { clear(c, a.tiling.size(tile) * kWidth); },
            [&](int64_t tile, int64_t column0, int64_t columns, float* c) {
                for (int64_t i = 0; i < a.tiling.size(tile) * kWidth; i += kLanes)
                    store(c + i, mul(load(c + i), factor));
                store_tile<kWidth>(c, a.tiling, tile, column0, columns, r, out);
            });
    };
    if (r <= kLanes) {
        run(std::integral_constant<int, 1>());
    } else {
        run(std::integral_constant<int, 2>());
    }
}

// What the kept elements are multiplied by.
static inline float keep_scale(const Lora& lora) { return 65536.0f / static_cast<float>(65536 - lora.threshold); }

// The dropout bitmap of an [M, K] tensor in scratch memory, or null without dropout.
static inline const uint8_t* dropout_bitmap(const Lora& lora, int64_t numel) {
    if (lora.threshold == 0) return nullptr;
    uint8_t* bits = static_cast<uint8_t*>(workspace(Slot::kBits, static_cast<size_t>((numel + 7) / 8 + 8)));
    dropout_bits(lora.seed, lora.threshold, numel, bits);
    return bits;
}

}  // namespace qlora::QLORA_ISA
