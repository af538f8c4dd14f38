// linear_nf4_lora and linear_nf4_lora_group: s = dropout(x) A^T;  y_i = x W_i^T + bias_i + scaling_i * s_i B_i^T.
//
// One linear is a group of one. s of all members is computed first, in one pass over x, with the dropped elements
// zeroed (1 / keep is applied to the fp32 sums). The large product has the strips of all members side by side: a strip
// belongs to one member, and a task may own strips of several. s_i (scaling_i B_i)^T is added to each finished tile, as
// r_i more steps of the same kernel. Each y is therefore written once, and the low-rank path costs r / K of the product
// instead of three passes over y. For a few tokens the sums of dots.h start with s_i (scaling_i B_i)^T.
#include "dots.h"
#include "lora.h"

namespace qlora::QLORA_ISA {
namespace {

// sums[m * kGroup + i] = scaling * sum_j s[m, j] * B[n + i, j] for kGroup rows of B [N, r], of which `valid` exist. It
// is summed in chains, as the tiles of gemm.h are, and for the same reason. The rows of s are s_length elements apart.
template <class T>
void start_sums(const Lora& lora, const T* s, int64_t s_length, int64_t M, int64_t n, int valid, float* sums) {
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
                    const float factor = to_float(s[m * s_length + j0 + j]);
                    for (int i = 0; i < kGroup; ++i) sum[i] += factor * columns[j][i];
                }
                for (int i = 0; i < kGroup; ++i) sums[m * kGroup + i] += sum[i];
            }
        }
    }
}

// Returns x as an operand, after s [M, R] = dropout(x) A^T, A the factors of all members below each other.
template <class T>
LhsView<typename Arithmetic<T>::Mac> down_project(const LinearGroup& group, const Offsets& ranks, const T* x, T* s) {
    using Mac = typename Arithmetic<T>::Mac;
    using Elem = typename Mac::Elem;
    const int64_t M = group.M, K = group.K, R = group.R;
    const auto lora_A = [&](auto width, const PanelRange& range, Elem* panel) {
        fill_from_rows<Mac, decltype(width)::value>(
            range, K, panel, [&](int64_t j, int64_t k, int64_t count, Elem* dst) {
                const auto [member, row] = ranks.locate(j);
                factor_row<T>(group.members[member].lora.A, row * K + k, count, 1.0f, dst);
            });
    };
    const Lora& first = group.members[0].lora;
    const uint8_t* bits = R > 0 ? dropout_bitmap(first, M * K) : nullptr;
    if (bits) {
        const LhsView<Mac> masked =
            lhs_copy<Mac>(Slot::kRows, M, K, [&](int64_t m, Elem* dst) { masked_row(x + m * K, K, bits, m * K, dst); });
        narrow_product<Mac>(masked, R, keep_scale(first), lora_A, s, R);
    }
    const LhsView<Mac> a = lhs_view<Mac>(Slot::kRows, x, M, K);
    if (R > 0 && !bits) narrow_product<Mac>(a, R, 1.0f, lora_A, s, R);
    return a;
}

// The s_i of each member as an operand: columns of s, or of a copy in which each s_i is padded to whole steps.
template <class T, class Mac>
void make_terms(const LinearGroup& group, const Offsets& ranks, const T* s, Array<LowRankTerm<Mac>>& terms) {
    using Elem = typename Mac::Elem;
    const Offsets padded(group.count, [&](int64_t i) { return steps_of<Mac>(group.members[i].lora.r) * Mac::kPair; });
    bool whole_steps = true;
    int64_t most = 0;
    for (int64_t i = 0; i < group.count; ++i) {
        whole_steps = whole_steps && padded.begin(i) == ranks.begin(i);
        most = std::max(most, steps_of<Mac>(group.members[i].lora.r));
    }
    const LhsView<Mac> all = whole_steps
                                 ? lhs_view<Mac>(Slot::kFactorRows, s, group.M, group.R)
                                 : lhs_copy<Mac>(Slot::kFactorRows, group.M, padded.total(), [&](int64_t m, Elem* dst) {
                                       for (int64_t i = 0; i < group.count; ++i) {
                                           const int64_t r = group.members[i].lora.r;
                                           Elem* own = dst + padded.begin(i);
                                           convert_row(s + m * group.R + ranks.begin(i), r, own);
                                           zero_row(own + r, padded.begin(i + 1) - padded.begin(i) - r);
                                       }
                                   });
    for (int64_t i = 0; i < group.count; ++i) {
        terms[i] = {all, most};
        terms[i].lhs.data += padded.begin(i);
        terms[i].lhs.steps = steps_of<Mac>(group.members[i].lora.r);
    }
}

// The biases as fp32, in scratch memory where they are not; null stays null.
void convert_biases(const LinearGroup& group, const AnyFloat* biases, Array<const float*>& values) {
    const auto is_copied = [&](int64_t i) { return biases[i].data && biases[i].dtype != DType::kFloat32; };
    const Offsets copies(group.count, [&](int64_t i) { return is_copied(i) ? group.members[i].weight.N : 0; });
    float* space = static_cast<float*>(workspace(Slot::kSmall, static_cast<size_t>(copies.total()) * sizeof(float)));
    for (int64_t i = 0; i < group.count; ++i) {
        values[i] = static_cast<const float*>(biases[i].data);
        if (!is_copied(i)) continue;
        convert_row(biases[i], 0, group.members[i].weight.N, space + copies.begin(i));
        values[i] = space + copies.begin(i);
    }
}

template <class T>
bool all_suit_dots(const LinearGroup& group) {
    if (group.M > kDirectTokens) return false;
    for (int64_t i = 0; i < group.count; ++i) {
        if (!suits_dots<typename Arithmetic<T>::Mac>(group.members[i].weight, group.M)) return false;
    }
    return true;
}

template <class T>
void linear_lora(const LinearGroup& group, const T* x, const AnyFloat* biases, void* const* ys, T* s) {
    using Mac = typename Arithmetic<T>::Mac;
    using Elem = typename Mac::Elem;
    const Offsets ranks(group.count, [&](int64_t i) { return group.members[i].lora.r; });
    Array<const float*> bias(group.count);
    convert_biases(group, biases, bias);
    const LhsView<Mac> a = down_project(group, ranks, x, s);

    if (all_suit_dots<T>(group)) {
        for (int64_t i = 0; i < group.count; ++i) {
            const Lora& lora = group.members[i].lora;
            const T* own = s + ranks.begin(i);
            linear_dots(
                group.members[i].weight, group.M, x, bias[i], static_cast<T*>(ys[i]),
                [&](int64_t n, int valid, float* sums) { start_sums(lora, own, group.R, group.M, n, valid, sums); });
        }
        return;
    }

    Array<LowRankTerm<Mac>> terms(group.count);
    make_terms(group, ranks, s, terms);
    const Offsets strips(group.count, [&](int64_t i) { return (group.members[i].weight.N + kColumns - 1) / kColumns; });
    struct Strip {
        int64_t member, column0, columns;
    };
    const auto strip_of = [&](int64_t column0) -> Strip {
        const auto [member, strip] = strips.locate(column0 / kColumns);
        return {member, strip * kColumns,
                std::min<int64_t>(kColumns, group.members[member].weight.N - strip * kColumns)};
    };
    const auto fill = [&](const PanelRange& range, Elem* panel) {
        for (int64_t c = range.column0; c < range.column0 + range.columns; c += kColumns) {
            const Strip strip = strip_of(c);
            const Lora& lora = group.members[strip.member].lora;
            weight_columns<T>(group.members[strip.member].weight)(
                {strip.column0, strip.columns, range.step0, range.step1}, panel);
            panel += (range.step1 - range.step0) * kColumns * Mac::kPair;
            if (range.step0 > 0 || lora.r == 0) continue;
            const LowRankTerm<Mac>& term = terms[strip.member];
            fill_from_rows<Mac, kColumns>({strip.column0, strip.columns, 0, term.lhs.steps}, lora.r, term.strip(c),
                                          [&](int64_t n, int64_t j, int64_t count, Elem* dst) {
                                              factor_row<T>(lora.B, n * lora.r + j, count, lora.scaling, dst);
                                          });
        }
    };
    const auto finish = [&](int64_t tile, int64_t column0, int64_t, float* c) {
        const Strip strip = strip_of(column0);
        const GroupMember& member = group.members[strip.member];
        if (!Mac::kTails && member.lora.r > 0) {
            terms[strip.member].add_to(c, tile, column0, [](float*) {});
        }
        store_tile<kColumns>(c, a.tiling, tile, strip.column0, strip.columns, member.weight.N,
                             static_cast<T*>(ys[strip.member]), bias[strip.member]);
    };
    const int64_t columns = strips.total() * kColumns;
    if constexpr (Mac::kTails) {
        panel_gemm<Mac, kVectors>(a, columns, fill, finish, [&](int64_t column0, int64_t) {
            const Strip strip = strip_of(column0);
            StripEnd<Mac> end = terms[strip.member].tail(column0);
            if (!bias[strip.member]) {
                store_in_kernel(static_cast<T*>(ys[strip.member]), group.members[strip.member].weight.N, strip.column0,
                                strip.columns, end);
            }
            return end;
        });
    } else {
        panel_gemm<Mac, kVectors>(a, columns, fill, finish);
    }
}

}  // namespace

void linear_nf4_lora_group(const LinearGroup& group, const void* x, const AnyFloat* biases, void* const* ys, void* s) {
    if (group.M == 0) return;
    with_type(group.dtype,
              [&]<class T>(T*) { linear_lora(group, static_cast<const T*>(x), biases, ys, static_cast<T*>(s)); });
}

void linear_nf4_lora(const LinearProblem& p, const Lora& lora, const void* x, AnyFloat bias, void* y, void* s) {
    const GroupMember member{p.weight, lora};
    linear_nf4_lora_group({&member, 1, p.dtype, p.M, p.weight.K, lora.r}, x, &bias, &y, s);
}

}  // namespace qlora::QLORA_ISA
