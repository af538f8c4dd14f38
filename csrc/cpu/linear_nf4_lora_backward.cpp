// linear_nf4_lora_backward, with G = grad_y:
//
//     ds     = scaling * G B               narrow product over n, from the tiles of G that grad_x also uses
//     grad_B = scaling * (s^T G)^T         r x N product over tokens, panels of G
//     grad_A = ds^T dropout(x)             r x K product over tokens, panels of x with the dropped elements zeroed
//     grad_x = G W + mask * (ds A) / keep  the large product, the low-rank one added to its tiles
//
// The mask is one bitmap that is made once and read twice. All sums are fp32; ds is rounded to x's dtype, as in the
// composed operations.
#include "lora.h"

namespace qlora::QLORA_ISA {
namespace {

// Prefetches `count` elements of a later row of a matrix that ends at `end`: panels read short pieces of many rows,
// which hardware prefetchers do not detect.
template <class T>
void prefetch_row(const T* row, int64_t count, const T* end) {
    if (row + count > end) return;
    for (const T* line = row; line < row + count; line += 64 / sizeof(T)) __builtin_prefetch(line);
}

// Packs the rows of a row-major [M, width] matrix as panels that contract over m, with dropped elements zeroed if
// `bits` is given.
template <class Mac, class T>
auto token_panels(const T* src, int64_t M, int64_t width, const uint8_t* bits) {
    using Elem = typename Mac::Elem;
    return [=](const PanelRange& range, Elem* panel) {
        const auto read = [=](int64_t m, int64_t begin, int64_t count, Elem* dst) -> const Elem* {
            const T* row = src + m * width + begin;
            prefetch_row(row + kPrefetchRows * width, count, src + M * width);
            if (bits) {
                masked_row(row, count, bits, m * width + begin, dst);
                return dst;
            }
            if constexpr (std::is_same_v<T, Elem>) {
                if (count % kColumns == 0) return row;
            }
            convert_row(row, count, dst);
            return dst;
        };
        fill_from_columns<Mac, kColumns>(range, M, panel, read);
    };
}

void multiply(float* c, int64_t floats, float scale) {
    const F32 factor = set1(scale);
    for (int64_t i = 0; i < floats; i += kLanes) store(c + i, mul(load(c + i), factor));
}

// out[j, column] = scale * sum_m factors[m, j] * rows[m, column], for factors [M, r].
template <class Mac, class T, class Fill>
void grad_factor(const T* factors, int64_t M, int64_t r, int64_t columns, float scale, const Fill& fill,
                 bool transposed, float* out) {
    const LhsView<Mac> a = lhs_transposed<Mac>(Slot::kFactorRows, factors, M, r);
    panel_gemm<Mac, kVectors>(a, columns, fill, [&](int64_t tile, int64_t column0, int64_t width, float* c) {
        multiply(c, a.tiling.size(tile) * kColumns, scale);
        if (!transposed) return store_tile<kColumns>(c, a.tiling, tile, column0, width, columns, out);
        for (int64_t n = 0; n < width; ++n) {
            float* row = out + (column0 + n) * r + a.tiling.begin(tile);
            for (int j = 0; j < a.tiling.size(tile); ++j) row[j] = c[j * kColumns + n];
        }
    });
}

// c *= scale for kept elements, 0 for dropped ones, for the tile of an [M, K] tensor.
void apply_mask(const uint8_t* bits, const Tiling& tiling, int64_t tile, int64_t column0, int64_t K, float scale,
                float* c) {
    const F32 factor = set1(scale);
    for (int i = 0; i < tiling.size(tile); ++i) {
        const uint64_t mask = bits_at(bits, (tiling.begin(tile) + i) * K + column0);
        for (int j = 0; j < kColumns; j += kLanes) {
            float* lane = c + i * kColumns + j;
            store(lane, keep(mul(load(lane), factor), static_cast<uint32_t>(mask >> j)));
        }
    }
}

template <class T>
void lora_backward(const LinearProblem& p, const Lora& lora, const T* grad_y, const T* x, const T* s, T* grad_x,
                   float* grad_A, float* grad_B) {
    using Mac = typename Arithmetic<T>::Mac;
    using Elem = typename Mac::Elem;
    const int64_t M = p.M, N = p.weight.N, K = p.weight.K, r = lora.r;
    const uint8_t* bits = dropout_bitmap(lora, M * K);

    T* ds = static_cast<T*>(workspace(Slot::kSmall, static_cast<size_t>(M * r) * sizeof(T)));

    const LhsView<Mac> a = lhs_view<Mac>(Slot::kRows, grad_y, M, N);
    narrow_product(
        a, r, lora.scaling,
        [&](auto width, const PanelRange& range, Elem* panel) {
            fill_from_columns<Mac, decltype(width)::value>(range, N, panel,
                                                           [&](int64_t n, int64_t j, int64_t count, Elem* dst) {
                                                               factor_row<T>(lora.B, n * r + j, count, 1.0f, dst);
                                                               return dst;
                                                           });
        },
        ds);

    const float scale = bits ? keep_scale(lora) : 1.0f;
    grad_factor<Mac>(s, M, r, N, lora.scaling, token_panels<Mac>(grad_y, M, N, nullptr), true, grad_B);
    grad_factor<Mac>(ds, M, r, K, scale, token_panels<Mac>(x, M, K, bits), false, grad_A);
    if (!grad_x) return;

    const LowRankTerm<Mac> low_rank{lhs_view<Mac>(Slot::kFactorRows, ds, M, r)};
    const auto lora_a = [&](int64_t column0, int64_t columns, Elem* strip) {
        fill_from_columns<Mac, kColumns>({column0, columns, 0, low_rank.lhs.steps}, r, strip,
                                         [&](int64_t j, int64_t k, int64_t count, Elem* dst) {
                                             factor_row<T>(lora.A, j * K + k, count, 1.0f, dst);
                                             return dst;
                                         });
    };
    const auto fill = low_rank.fill_with(weight_rows<T>(p.weight), lora_a);
    const bool masked = bits != nullptr;
    const auto finish = [&](int64_t tile, int64_t column0, int64_t columns, float* c) {
        if (masked || !Mac::kTails) {
            low_rank.add_to(c, tile, column0, [&](float* product) {
                if (masked) apply_mask(bits, a.tiling, tile, column0, K, scale, product);
            });
        }
        store_tile<kColumns>(c, a.tiling, tile, column0, columns, K, grad_x);
    };
    if constexpr (Mac::kTails) {
        panel_gemm<Mac, kVectors>(a, K, fill, finish, [&](int64_t tile, int64_t column0) {
            return masked ? Tail<Mac>() : low_rank.tail(tile, column0);
        });
    } else {
        panel_gemm<Mac, kVectors>(a, K, fill, finish);
    }
}

}  // namespace

void linear_nf4_lora_backward(const LinearProblem& p, const Lora& lora, const void* grad_y, const void* x,
                              const void* s, void* grad_x, float* grad_A, float* grad_B) {
    if (p.M == 0) {
        memset(grad_A, 0, static_cast<size_t>(lora.r * p.weight.K) * sizeof(float));
        memset(grad_B, 0, static_cast<size_t>(lora.r * p.weight.N) * sizeof(float));
        return;
    }
    with_type(p.dtype, [&]<class T>(T*) {
        lora_backward(p, lora, static_cast<const T*>(grad_y), static_cast<const T*>(x), static_cast<const T*>(s),
                      static_cast<T*>(grad_x), grad_A, grad_B);
    });
}

}  // namespace qlora::QLORA_ISA
