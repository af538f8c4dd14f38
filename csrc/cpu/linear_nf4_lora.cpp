// linear_nf4_lora: s = dropout(x) A^T;  y = x W^T + bias + scaling * s B^T.
//
// s is computed first, from tiles of x with the dropped elements zeroed (1 / keep is applied to the fp32 sums). s
// (scaling B)^T is added to each finished tile of the large product, as r more steps of the same kernel. y is therefore
// written once, and the low-rank path costs r / K of the product instead of three passes over y. For a few tokens the
// sums of dots.h start with s (scaling B)^T.
#include "dots.h"
#include "lora.h"

namespace qlora::QLORA_ISA {
namespace {

// sums[m * kGroup + i] = scaling * sum_j s[m, j] * B[n + i, j] for kGroup rows of B [N, r], of which `valid` exist. It
// is summed in chains, as the tiles of gemm.h are, and for the same reason.
template <class T>
void start_sums(const Lora& lora, const T* s, int64_t M, int64_t n, int valid, float* sums) {
    float columns[kSpan][kGroup];  // of scaling * B^T, a piece of r
    float row[kSpan];
    memset(sums, 0, static_cast<size_t>(M * kGroup) * sizeof(float));
    for (int64_t j0 = 0; j0 < lora.r; j0 += kSpan) {
        const int64_t count = lora.r - j0 < kSpan ? lora.r - j0 : kSpan;
        for (int i = 0; i < kGroup; ++i) {
            factor_row<T>(lora.B, (n + (i < valid ? i : valid - 1)) * lora.r + j0, count, lora.scaling, row);
            for (int64_t j = 0; j < count; ++j) columns[j][i] = row[j];
        }
        for (int64_t m = 0; m < M; ++m) {
            for (int64_t j = 0; j < count;) {
                const int64_t end = j + Fp32Fma::kChain < count ? j + Fp32Fma::kChain : count;
                float sum[kGroup] = {};
                for (; j < end; ++j) {
                    const float factor = to_float(s[m * lora.r + j0 + j]);
                    for (int i = 0; i < kGroup; ++i) sum[i] += factor * columns[j][i];
                }
                for (int i = 0; i < kGroup; ++i) sums[m * kGroup + i] += sum[i];
            }
        }
    }
}

template <class T>
void linear_lora(const LinearProblem& p, const Lora& lora, const T* x, AnyFloat bias, T* y, T* s) {
    using Mac = typename Arithmetic<T>::Mac;
    using Elem = typename Mac::Elem;
    const int64_t M = p.M, N = p.weight.N, K = p.weight.K, r = lora.r;
    const float* bias_values = bias_as_float(bias, N);
    const auto lora_a = [&](auto width, const PanelRange& range, Elem* panel) {
        fill_from_rows<Mac, decltype(width)::value>(range, K, panel,
                                                    [&](int64_t j, int64_t k, int64_t count, Elem* dst) {
                                                        factor_row<T>(lora.A, j * K + k, count, 1.0f, dst);
                                                    });
    };

    const uint8_t* bits = dropout_bitmap(lora, M * K);
    if (bits) {
        const LhsView<Mac> masked =
            lhs_copy<Mac>(Slot::kRows, M, K, [&](int64_t m, Elem* dst) { masked_row(x + m * K, K, bits, m * K, dst); });
        narrow_product(masked, r, keep_scale(lora), lora_a, s);
    }
    const LhsView<Mac> a = lhs_view<Mac>(Slot::kRows, x, M, K);
    if (!bits) narrow_product(a, r, 1.0f, lora_a, s);

    if (M <= kDirectTokens && suits_dots<Mac>(p.weight, M)) {
        return linear_dots(p.weight, M, x, bias_values, y,
                           [&](int64_t n, int valid, float* sums) { start_sums(lora, s, M, n, valid, sums); });
    }
    const LowRankTerm<Mac> low_rank{lhs_view<Mac>(Slot::kFactorRows, s, M, r)};
    const auto lora_b = [&](int64_t column0, int64_t columns, Elem* strip) {
        fill_from_rows<Mac, kColumns>({column0, columns, 0, low_rank.lhs.steps}, r, strip,
                                      [&](int64_t n, int64_t j, int64_t count, Elem* dst) {
                                          factor_row<T>(lora.B, n * r + j, count, lora.scaling, dst);
                                      });
    };
    const auto fill = low_rank.fill_with(weight_columns<T>(p.weight), lora_b);
    const auto finish = [&](int64_t tile, int64_t column0, int64_t columns, float* c) {
        if constexpr (!Mac::kTails) low_rank.add_to(c, tile, column0, [](float*) {});
        store_tile<kColumns>(c, a.tiling, tile, column0, columns, N, y, bias_values);
    };
    if constexpr (Mac::kTails) {
        panel_gemm<Mac, kVectors>(a, N, fill, finish,
                                  [&](int64_t tile, int64_t column0) { return low_rank.tail(tile, column0); });
    } else {
        panel_gemm<Mac, kVectors>(a, N, fill, finish);
    }
}

}  // namespace

void linear_nf4_lora(const LinearProblem& p, const Lora& lora, const void* x, AnyFloat bias, void* y, void* s) {
    if (p.M == 0) return;
    with_type(p.dtype, [&]<class T>(T*) {
        linear_lora(p, lora, static_cast<const T*>(x), bias, static_cast<T*>(y), static_cast<T*>(s));
    });
}

}  // namespace qlora::QLORA_ISA
