// The low-rank products of LoRA, computed with the same tiles and panels (gemm.h) as the quantized product.
#pragma once

#include <algorithm>
#include <type_traits>

#include "linear.h"
#include "ops.h"

namespace qlora::QLORA_ISA {

// The low-rank product, which is added to the finished sums of the large product. It is added last, because the large
// product adds its chains to c, and each of these additions would round the low-rank part, often the larger of the two,
// once more. Each task fills the low-rank strips together with its strips of the weight, in separate memory.
template <class Mac>
struct LowRankTerm {
    LhsView<Mac> lhs;

    typename Mac::Elem* strip(int64_t column0) const {
        const int64_t size = lhs.steps * kColumns * Mac::kPair;
        const size_t bytes = static_cast<size_t>(kMaxGroup * size) * sizeof(typename Mac::Elem);
        auto* strips = static_cast<typename Mac::Elem*>(workspace(Slot::kFactors, bytes));
        return strips + column0 / kColumns % kMaxGroup * size;
    }

    // Returns the fill of the large product, extended to fill the strips of the low-rank product with the first panel.
    // weight: the fill of the weight's panels.   fill(column0, columns, strip): writes one strip of the factor.
    template <class Weight, class Fill>
    auto fill_with(const Weight& weight, const Fill& fill) const {
        return [=, this](const PanelRange& range, typename Mac::Elem* panel) {
            weight(range, panel);
            for (int64_t c = 0; range.step0 == 0 && c < range.columns; c += kColumns) {
                const int64_t column = range.column0 + c;
                fill(column, std::min<int64_t>(range.columns - c, kColumns), strip(column));
            }
        };
    }

    // The tile of the low-rank product as the tail of the large product's sums, if Mac::kTails: one chain then holds
    // all steps, and the low-rank part is not rounded by further additions.
    Tail<Mac> tail(int64_t tile, int64_t column0) const { return lhs.tail(tile, strip(column0)); }

    // c += the tile of the low-rank product, which change(product) may modify first.
    template <class Change>
    void add_to(float* c, int64_t tile, int64_t column0, const Change& change) const {
        alignas(64) float product[kMaxRows * kColumns];
        const int64_t floats = lhs.tiling.size(tile) * kColumns;
        lhs.template multiply<kVectors>(tile, 0, strip(column0), lhs.steps, {}, false, product);
        change(product);
        for (int64_t i = 0; i < floats; i += kLanes) store(c + i, add(load(c + i), load(product + i)));
    }
};

// out[m, j] = scale * sum_l a[m, l] * B[l, j] for a narrow B: a single strip of kLanes columns if r allows.
template <class Mac, class T, class Fill>
static void narrow_product(const LhsView<Mac>& a, int64_t r, float scale, const Fill& fill, T* out) {
    const F32 factor = set1(scale);
    const auto run = [&](auto vectors) {
        constexpr int kWidth = decltype(vectors)::value * kLanes;
        panel_gemm<Mac, decltype(vectors)::value>(
            a, r,
            [&](const PanelRange& range, typename Mac::Elem* panel) {
                fill(std::integral_constant<int, kWidth>(), range, panel);
            },
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

// The factor of kept elements.
static inline float keep_scale(const Lora& lora) { return 65536.0f / static_cast<float>(65536 - lora.threshold); }

// The dropout bitmap of an [M, K] tensor in scratch memory, or null without dropout.
static inline const uint8_t* dropout_bitmap(const Lora& lora, int64_t numel) {
    if (lora.threshold == 0) return nullptr;
    uint8_t* bits = static_cast<uint8_t*>(workspace(Slot::kBits, static_cast<size_t>((numel + 7) / 8 + 8)));
    dropout_bits(lora.seed, lora.threshold, numel, bits);
    return bits;
}

}  // namespace qlora::QLORA_ISA
