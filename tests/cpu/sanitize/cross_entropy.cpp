// linear_cross_entropy compared with double precision; every buffer is a heap block of its exact size.
#include <cmath>
#include <cstdio>

#include "checks.h"
#include "kernels.h"

namespace checks {
namespace {

using qlora::AnyFloat;
using qlora::DType;

// rank: of the low-rank columns, the last ones of K.   nf4: whether the other columns are in NF4.
template <class T>
void check(int64_t M, int64_t V, int64_t K, DType dtype, float softcap, double tolerance, int64_t rank = 0,
           bool nf4 = false) {
    constexpr int kBlockShift = 6;
    const int64_t own = K - rank;
    const qlora::Kernels& kernels = qlora::cpu_kernels();
    const std::vector<T> hidden = rounded<T>(normal(M * K, 1));
    std::vector<qlora::Bf16> weight = rounded<qlora::Bf16>(normal(V * own, 2));
    const std::vector<qlora::Bf16> low_rank = rounded<qlora::Bf16>(normal(V * rank, 4));
    std::vector<uint8_t> packed(static_cast<size_t>((V * own + 1) / 2));
    std::vector<float> absmax(static_cast<size_t>((V * own + 63) >> kBlockShift));
    const qlora::NF4Weight quantized{packed.data(), absmax.data(), nullptr, nullptr, nullptr, V, own, kBlockShift};
    if (nf4) {
        kernels.quantize_nf4(weight.data(), DType::kBfloat16, V * own, kBlockShift, packed.data(), absmax.data());
        std::vector<T> decoded(static_cast<size_t>(V * own));
        kernels.dequantize_nf4(quantized, dtype, decoded.data());
        for (int64_t i = 0; i < V * own; ++i) weight[i] = qlora::from_float<qlora::Bf16>(qlora::to_float(decoded[i]));
    }
    const auto weight_at = [&](int64_t v, int64_t k) {
        const qlora::Bf16 value = k < own ? weight[v * own + k] : low_rank[v * rank + k - own];
        return double(qlora::to_float(qlora::from_float<T>(qlora::to_float(value))));
    };
    const std::vector<float> bias = normal(V, 3);
    std::vector<int64_t> labels(static_cast<size_t>(M));
    for (int64_t m = 0; m < M; ++m) labels[m] = m % 4 == 3 ? -100 : m * 11 % V;
    std::vector<float> losses(static_cast<size_t>(M)), log_sums(static_cast<size_t>(M)), losses_alone(losses);
    std::vector<T> grad(static_cast<size_t>(M * K));
    const double scale = 1 / std::sqrt(double(K));
    const qlora::CrossEntropyProblem problem{
        M,
        V,
        K,
        dtype,
        {{nf4 ? nullptr : weight.data(), DType::kBfloat16}, quantized, {low_rank.data(), DType::kBfloat16}, rank},
        {bias.data(), DType::kFloat32},
        labels.data(),
        -100,
        static_cast<float>(scale),
        softcap};
    kernels.linear_cross_entropy(problem, hidden.data(), {losses.data(), log_sums.data(), grad.data()});
    kernels.linear_cross_entropy(problem, hidden.data(), {losses_alone.data(), log_sums.data(), nullptr});

    double worst = 0;
    for (int64_t m = 0; m < M; ++m) {
        std::vector<double> z(static_cast<size_t>(V)), gradient(static_cast<size_t>(K));
        double total = 0, loss = 0;
        for (int64_t v = 0; v < V && labels[m] >= 0; ++v) {
            z[v] = bias[v];
            for (int64_t k = 0; k < K; ++k) z[v] += double(qlora::to_float(hidden[m * K + k])) * weight_at(v, k);
            z[v] *= scale;
            if (softcap > 0) z[v] = softcap * std::tanh(z[v] / softcap);
            total += std::exp(z[v]);
        }
        for (int64_t v = 0; v < V && labels[m] >= 0; ++v) {
            const double slope = softcap > 0 ? 1 - std::pow(z[v] / softcap, 2) : 1.0;
            const double of_logit = (std::exp(z[v]) / total - (v == labels[m])) * slope * scale;
            for (int64_t k = 0; k < K; ++k) gradient[k] += of_logit * weight_at(v, k);
        }
        if (labels[m] >= 0) loss = std::log(total) - z[labels[m]];
        worst = std::fmax(worst, std::fmax(std::fabs(losses[m] - loss), std::fabs(losses_alone[m] - loss)) / 10);
        for (int64_t k = 0; k < K; ++k) {
            worst = std::fmax(worst, std::fabs(double(qlora::to_float(grad[m * K + k])) - gradient[k]));
        }
    }
    char where[96];
    std::snprintf(where, sizeof where, "at M%ld V%ld K%ld rank%ld%s, by %g", long(M), long(V), long(K), long(rank),
                  nf4 ? " nf4" : "", worst);
    expect(worst <= tolerance, "linear_cross_entropy", where);
}

}  // namespace

void check_cross_entropy() {
    constexpr int64_t kShapes[][3] = {{1, 1, 1}, {4, 5, 3}, {35, 300, 65}, {270, 257, 40}, {7, 30, 2100}};
    for (const auto& [M, V, K] : kShapes) {
        for (const float softcap : {0.0f, 2.0f}) {
            check<float>(M, V, K, DType::kFloat32, softcap, 2e-6);
            check<qlora::Bf16>(M, V, K, DType::kBfloat16, softcap, 1e-2);
            check<qlora::Fp16>(M, V, K, DType::kFloat16, softcap, 2e-3);
        }
    }
    check<qlora::Bf16>(35, 301, 68, DType::kBfloat16, 0, 1e-2, 3, true);
    check<qlora::Bf16>(35, 301, 68, DType::kBfloat16, 0, 1e-2, 3);
    check<qlora::Bf16>(5, 33, 2110, DType::kBfloat16, 0, 2e-2, 0, true);
}

}  // namespace checks
