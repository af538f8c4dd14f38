// linear_nf4_lora_backward and linear_nf4_lora_group_backward, with G_i = grad_y_i; one linear is a group of one:
//
//     ds_i     = scaling_i * G_i B_i            narrow products over n, from the tiles of G_i that grad_x also uses
//     grad_B_i = scaling_i * (s_i^T G_i)^T      r_i x N_i products over tokens, panels of G_i
//     grad_A   = ds^T dropout(x)                R x K product over tokens, panels of x with the dropped elements zeroed
//     grad_x   = G W + mask * (ds A) / keep     the large product over the rows of all W_i, one after the other; the
//                                               low-rank product of all members is added to its tiles
//
// A and ds have the factors of all members side by side, R in total. The mask is one bitmap that is made once and read
// twice. All sums are fp32; ds is rounded to x's dtype, as in the composed operations.
#include "lora.h"
#include "token_product.h"

namespace qlora::QLORA_ISA {
namespace {

// Prefetches `count` elements of a later row of a matrix that ends at `end`: panels read short pieces of many rows,
// which hardware prefetchers do not detect.
template <class T>
void prefetch_row(const T* row, int64_t count, const T* end) {
    if (row + count > end) return;
    for (const T* line = row; line < row + count; line += 64 / sizeof(T)) __builtin_prefetch(line);
}

// The rows of a row-major [M, width] matrix, with dropped elements zeroed if `bits` is given.
template <class T>
struct TokenRows {
    const T* data;
    int64_t M, width;
    const uint8_t* bits;
};

// Packs the rows as panels that contract over m.
template <class Mac, class T>
auto token_panels(const TokenRows<T>& tokens) {
    using Elem = typename Mac::Elem;
    return [tokens](const PanelRange& range, Elem* panel) {
        const auto read = [&](int64_t m, int64_t begin, int64_t count, Elem* dst) -> const Elem* {
            const T* row = tokens.data + m * tokens.width + begin;
            prefetch_row(row + kPrefetchRows * tokens.width, count, tokens.data + tokens.M * tokens.width);
            if (tokens.bits) {
                masked_row(row, count, tokens.bits, m * tokens.width + begin, dst);
                return dst;
            }
            if constexpr (std::is_same_v<T, Elem>) {
                if (count % kColumns == 0) return row;
            }
            convert_row(row, count, dst);
            return dst;
        };
        fill_from_columns<Mac, kColumns>(range, tokens.M, panel, read);
    };
}

void multiply(float* c, int64_t floats, float scale) {
    const F32 factor = set1(scale);
    for (int64_t i = 0; i < floats; i += kLanes) store(c + i, mul(load(c + i), factor));
}

// out[j, column] = scale * sum_m factors[m, j] * rows[m, column], for factors [M, r] whose rows are `stride` elements
// apart.
template <class Mac, class T>
void grad_factor(const T* factors, int64_t stride, int64_t r, float scale, const TokenRows<T>& rows, bool transposed,
                 float* out) {
    const int64_t columns = rows.width;
    const LhsView<Mac> a = lhs_transposed<Mac>(Slot::kFactorRows, factors, rows.M, r, stride);
    const auto finish = [&](int64_t tile, int64_t column0, int64_t width, float* c) {
        multiply(c, a.tiling.size(tile) * kColumns, scale);
        if (!transposed) return store_tile<kColumns>(c, a.tiling, tile, column0, width, columns, out);
        for (int64_t n = 0; n < width; ++n) {
            float* row = out + (column0 + n) * r + a.tiling.begin(tile);
            for (int j = 0; j < a.tiling.size(tile); ++j) row[j] = c[j * kColumns + n];
        }
    };
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<Mac, Bf16Dot>) {
        if (!rows.bits) return token_product(a, rows.data, rows.M, columns, finish);
    }
#endif
    panel_gemm<Mac, kVectors>(a, columns, token_panels<Mac>(rows), finish);
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

// The G_i as operands, in place or copied.
template <class T, class Mac>
void view_gradients(const LinearGroup& group, const void* const* grad_ys, Array<LhsView<Mac>>& views) {
    using Elem = typename Mac::Elem;
    const int64_t M = group.M;
    const Offsets copies(group.count, [&](int64_t i) {
        const int64_t N = group.members[i].weight.N;
        return reads_in_place<Mac, T>(N) ? 0 : M * copy_stride<Elem>(N);
    });
    Elem* space = static_cast<Elem*>(workspace(Slot::kRows, static_cast<size_t>(copies.total()) * sizeof(Elem)));
    for (int64_t i = 0; i < group.count; ++i) {
        views[i] =
            lhs_view<Mac>(static_cast<const T*>(grad_ys[i]), M, group.members[i].weight.N, space + copies.begin(i));
    }
}

template <class T>
void lora_backward(const LinearGroup& group, const void* const* grad_ys, const T* x, const T* s, T* grad_x,
                   float* grad_A, float* const* grads_B) {
    using Mac = typename Arithmetic<T>::Mac;
    using Elem = typename Mac::Elem;
    const int64_t M = group.M, K = group.K;
    const Offsets ranks(group.count, [&](int64_t i) { return group.members[i].lora.r; });
    const int64_t R = group.R;
    const Lora& first = group.members[0].lora;
    const uint8_t* bits = R > 0 ? dropout_bitmap(first, M * K) : nullptr;
    const float scale = bits ? keep_scale(first) : 1.0f;

    T* ds = static_cast<T*>(workspace(Slot::kSmall, static_cast<size_t>(M * R) * sizeof(T)));
    Array<LhsView<Mac>> gradients(group.count);
    view_gradients<T>(group, grad_ys, gradients);
    const JoinedLhs<Mac> a(gradients);
    for (int64_t i = 0; i < group.count; ++i) {
        const Lora& lora = group.members[i].lora;
        const int64_t N = group.members[i].weight.N;
        if (lora.r == 0) continue;
        if (grad_A || grad_x) {
            narrow_product<Mac>(
                gradients[i], lora.r, lora.scaling,
                [&](auto width, const PanelRange& range, Elem* panel) {
                    fill_from_columns<Mac, decltype(width)::value>(
                        range, N, panel, [&](int64_t n, int64_t j, int64_t count, Elem* dst) {
                            factor_row<T>(lora.B, n * lora.r + j, count, 1.0f, dst);
                            return dst;
                        });
                },
                ds + ranks.begin(i), R);
        }
        if (!grads_B[i]) continue;
        const TokenRows<T> rows{static_cast<const T*>(grad_ys[i]), M, N, nullptr};
        grad_factor<Mac>(s + ranks.begin(i), R, lora.r, lora.scaling, rows, true, grads_B[i]);
    }
    if (R > 0 && grad_A) grad_factor<Mac>(ds, R, R, scale, TokenRows<T>{x, M, K, bits}, false, grad_A);
    if (!grad_x) return;

    // The rows of all weights, each weight padded to whole steps as its G_i is.
    const Offsets rows(group.count, [&](int64_t i) { return steps_of<Mac>(group.members[i].weight.N) * Mac::kPair; });
    const LhsView<Mac> ds_rows = lhs_view<Mac>(Slot::kFactorRows, ds, M, R);
    const LowRankTerm<Mac> low_rank{ds_rows, ds_rows.steps};
    const auto fill = [&](const PanelRange& range, Elem* panel) {
        if (group.count == 1) {  // without the search for each row's member, which few tokens would notice
            weight_rows<T>(group.members[0].weight)(range, panel);
        } else {
            fill_from_columns<Mac, kColumns>(range, rows.total(), panel,
                                             [&](int64_t row, int64_t k, int64_t count, Elem* dst) {
                                                 const auto [member, n] = rows.locate(row);
                                                 const NF4Weight& weight = group.members[member].weight;
                                                 if (n < weight.N) {
                                                     weight_row<T>(weight, n, k, count, dst);
                                                 } else {
                                                     zero_row(dst, count);
                                                 }
                                                 return dst;
                                             });
        }
        for (int64_t c = 0; range.step0 == 0 && R > 0 && c < range.columns; c += kColumns) {
            const int64_t column = range.column0 + c;
            fill_from_columns<Mac, kColumns>(
                {column, std::min<int64_t>(range.columns - c, kColumns), 0, low_rank.lhs.steps}, R,
                low_rank.strip(column), [&](int64_t j, int64_t k, int64_t count, Elem* dst) {
                    const auto [member, row] = ranks.locate(j);
                    factor_row<T>(group.members[member].lora.A, row * K + k, count, 1.0f, dst);
                    return dst;
                });
        }
    };
    const auto finish = [&](int64_t tile, int64_t column0, int64_t columns, float* c) {
        if (R > 0 && (bits || !Mac::kTails)) {
            low_rank.add_to(c, tile, column0, [&](float* product) {
                if (bits) apply_mask(bits, a.tiling, tile, column0, K, scale, product);
            });
        }
        store_tile<kColumns>(c, a.tiling, tile, column0, columns, K, grad_x);
    };
    if constexpr (Mac::kTails) {
        panel_gemm<Mac, kVectors>(a, K, fill, finish, [&](int64_t column0, int64_t columns) {
            if (bits) return StripEnd<Mac>();  // the mask acts on the low-rank product alone
            StripEnd<Mac> end = low_rank.tail(column0);
            store_in_kernel(grad_x, K, column0, columns, end);
            return end;
        });
    } else {
        panel_gemm<Mac, kVectors>(a, K, fill, finish);
    }
}

}  // namespace

void linear_nf4_lora_group_backward(const LinearGroup& group, const void* const* grad_ys, const void* x, const void* s,
                                    void* grad_x, float* grad_A, float* const* grads_B) {
    if (group.M == 0) {
        if (grad_A) memset(grad_A, 0, static_cast<size_t>(group.R * group.K) * sizeof(float));
        for (int64_t i = 0; i < group.count; ++i) {
            const auto& [weight, lora] = group.members[i];
            if (grads_B[i]) memset(grads_B[i], 0, static_cast<size_t>(lora.r * weight.N) * sizeof(float));
        }
        return;
    }
    with_type(group.dtype, [&]<class T>(T*) {
        lora_backward(group, grad_ys, static_cast<const T*>(x), static_cast<const T*>(s), static_cast<T*>(grad_x),
                      grad_A, grads_B);
    });
}

void linear_nf4_lora_backward(const LinearProblem& p, const Lora& lora, const void* grad_y, const void* x,
                              const void* s, void* grad_x, float* grad_A, float* grad_B) {
    const GroupMember member{p.weight, lora};
    const LinearGroup group{&member, 1, p.dtype, p.M, p.weight.K, lora.r};
    linear_nf4_lora_group_backward(group, &grad_y, x, s, grad_x, grad_A, &grad_B);
}

}  // namespace qlora::QLORA_ISA
