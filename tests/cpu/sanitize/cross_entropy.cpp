// linear_cross_entropy compared with double precision; every buffer is a heap block of its exact size.
#include <cmath>
#include <cstdio>

#include "checks.h"
#include "kernels.h"

namespace checks {
namespace {

using qlora::AnyFloat;
using qlora::DType;

template <class T>
void check(int64_t M, int64_t V, int64_t K, DType dtype, float softcap, double tolerance) {
    const std::vector<T> hidden = rounded<T>(normal(M * K, 1));
    const std::vector<qlora::Bf16> weight = rounded<qlora::Bf16>(normal(V * K, 2));
    const std::vector<float> bias = normal(V, 3);
    std::vector<int64_t> labels(static_cast<size_t>(M));
    for (int64_t m = 0; m < M; ++m) labels[m] = m % 4 == 3 ? -100 : m * 11 % V;
    std::vector<float> losses(static_cast<size_t>(M)), log_sums(static_cast<size_t>(M)), losses_alone(losses);
    std::vector<T> grad(static_cast<size_t>(M * K));
    const double scale = 1 / std::sqrt(double(K));
    const qlora::CrossEntropyProblem problem{M,
                                             V,
                                             K,
                                             dtype,
                                             {{weight.data(), DType::kBfloat16}, {}, {}, 0},
                                             {bias.data(), DType::kFloat32},
                                             labels.data(),
                                             -100,
                                             static_cast<float>(scale),
                                             softcap};
    const qlora::Kernels& kernels = qlora::cpu_kernels();
    kernels.linear_cross_entropy(problem, hidden.data(), {losses.data(), log_sums.data(), grad.data()});
    kernels.linear_cross_entropy(problem, hidden.data(), {losses_alone.data(), log_sums.data(), nullptr});

    double worst = 0;
    for (int64_t m = 0; m < M; ++m) {
        std::vector<double> z(static_cast<size_t>(V)), gradient(static_cast<size_t>(K));
        double total = 0, loss = 0;
        for (int64_t v = 0; v < V && labels[m] >= 0; ++v) {
            z[v] = bias[v];
            for (int64_t k = 0; k < K; ++k) {
                const float w = qlora::to_float(qlora::from_float<T>(qlora::to_float(weight[v * K + k])));
                z[v] += double(qlora::to_float(hidden[m * K + k])) * w;
            }
            z[v] *= scale;
            if (softcap > 0) z[v] = softcap * std::tanh(z[v] / softcap);
            total += std::exp(z[v]);
        }
        for (int64_t v = 0; v < V && labels[m] >= 0; ++v) {
            const double slope = softcap > 0 ? 1 - std::pow(z[v] / softcap, 2) : 1.0;
            const double of_logit = (std::exp(z[v]) / total - (v == labels[m])) * slope * scale;
            for (int64_t k = 0; k < K; ++k) gradient[k] += of_logit * qlora::to_float(weight[v * K + k]);
        }
        if (labels[m] >= 0) loss = std::log(total) - z[labels[m]];
        worst = std::fmax(worst, std::fmax(std::fabs(losses[m] - loss), std::fabs(losses_alone[m] - loss)) / 10);
        for (int64_t k = 0; k < K; ++k) {
            worst = std::fmax(worst, std::fabs(double(qlora::to_float(grad[m * K + k])) - gradient[k]));
        }
    }
    char where[80];
    std::snprintf(where, sizeof where, "at M%ld V%ld K%ld, by %g", long(M), long(V), long(K), worst);
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
}

}  // namespace checks
