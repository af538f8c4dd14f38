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
    int64_t strip_steps;  // of the memory of one strip: at least lhs.steps, and equal for all terms of a group

    // Memory of the strip that starts at `column0`, a multiple of kColumns; at most kMaxGroup strips exist at a time.
    typename Mac::Elem* strip(int64_t column0) const {
        const int64_t size = strip_steps * kColumns * Mac::kPair;
        const size_t bytes = static_cast<size_t>(kMaxGroup * size) * sizeof(typename Mac::Elem);
        auto* strips = static_cast<typename Mac::Elem*>(workspace(Slot::kFactors, bytes));
        return strips + column0 / kColumns % kMaxGroup * size;
    }

    // The low-rank product as the tail of the large product's sums, if Mac::kTails: one chain then holds all steps, and
    // the low-rank part is not rounded by further additions.
    StripEnd<Mac> tail(int64_t column0) const {
        StripEnd<Mac> end;
        if (lhs.steps > 0) end = {lhs.data, lhs.stride, strip(column0), lhs.steps};
        return end;
    }

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

// out[m, j] = scale * sum_l a[m, l] * B[l, j] for a narrow B: in strips of kLanes columns if they waste less than
// strips of two vectors. The rows of out are row_length elements apart.
template <class Mac, class T, class Lhs, class Fill>
static void narrow_product(const Lhs& a, int64_t r, float scale, const Fill& fill, T* out, int64_t row_length) {
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
                store_tile<kWidth>(c, a.tiling, tile, column0, columns, row_length, out);
            },
            NoEnds(), Division::kTiles);
    };
    if ((r - 1) / kLanes % 2 == 0) {
        run(std::integral_constant<int, 1>());
    } else {
        run(std::integral_constant<int, 2>());
    }
}

// The factor of kept elements.
static inline float keep_scale(const Lora& lora) { return 65536.0f / static_cast<float>(65536 - lora.threshold); }

// Sizes of several things side by side, and where each begins.
class Offsets {
  public:
    // size(i): of the i-th of `count` things.
    template <class Size>
    Offsets(int64_t count, const Size& size) : count_(count), begins_(count + 1) {
        begins_[0] = 0;
        for (int64_t i = 0; i < count; ++i) begins_[i + 1] = begins_[i] + size(i);
    }

    int64_t begin(int64_t i) const { return begins_[i]; }
    int64_t total() const { return begins_[count_]; }

    struct Place {
        int64_t index, offset;
    };

    // The thing at `position`, and the position inside it.
    Place locate(int64_t position) const {
        int64_t i = 0;
        while (position >= begin(i + 1)) ++i;
        return {i, position - begin(i)};
    }

  private:
    int64_t count_;
    Array<int64_t> begins_;
};

// The dropout bitmap of an [M, K] tensor in scratch memory, or null without dropout.
static inline const uint8_t* dropout_bitmap(const Lora& lora, int64_t numel) {
    if (lora.threshold == 0) return nullptr;
    uint8_t* bits = static_cast<uint8_t*>(workspace(Slot::kBits, static_cast<size_t>((numel + 7) / 8 + 8)));
    dropout_bits(lora.seed, lora.threshold, numel, bits);
    return bits;
}

}  // namespace qlora::QLORA_ISA
